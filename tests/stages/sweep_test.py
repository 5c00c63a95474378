"""--sweep: settings are runs of their own, compared on validation; only the best is evaluated."""

import contextlib
import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from report_fixtures import svg_texts

from fame_jax import run_dir, stages
from fame_jax.config import flags as config_flags
from fame_jax.main import main
from fame_jax.models import options
from fame_jax.models.registry import MODELS
from fame_jax.stages import members, train
from fame_jax.stages.context import abstract_params
from fame_jax.stages.sweep import group_runs, rungs
from fame_jax.training.step import abstract_state

FLAGS = [
    *('--synthetic=users=120,items=40', '--model=sasrec', '--width=8', '--num_blocks=1'),
    *('--max_length=12', '--row_length=16', '--rows_per_step=4', '--progress=none'),
    *('--pretrain_epochs=2', '--patience=9'),
]


def run(workdir, *more):
    """The exit code of main in this process."""
    return main([*FLAGS, f'--workdir={workdir}', *more])


def best_validation(folder):
    """The best NDCG@20 of a run's metrics.jsonl; epoch 0 counts too."""
    lines = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
    return max(line['ndcg@20'] for line in lines if line['split'] == 'validation')


def test_the_best_setting_by_validation_is_evaluated(tmp_path, capsys):
    """Four settings, one of which is the same as a command of its own."""
    assert run(tmp_path / 'all', '--sweep=learning_rate:1e-5,1e-2; dropout:.1,.9') == 0
    shown = capsys.readouterr().out
    record = run_dir.read_json(tmp_path / 'all' / 'sweep.json')
    names = [setting['name'] for setting in record['settings']]
    assert sorted(names) == sorted(
        f'learning_rate={rate},dropout={dropout}' for rate in (1e-5, 0.01) for dropout in (0.1, 0.9)
    )
    values = [best_validation(tmp_path / 'all' / name) for name in names]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]
    assert [setting['validation'] for setting in record['settings']] == [[v] for v in values]
    assert record['best'] == names[0]
    assert record['selected_by'].startswith('validation NDCG@20, masked of')
    assert {'--learning_rate', '--dropout'} <= {*svg_texts(tmp_path / 'all' / 'sweep.svg')}
    evaluated = [name for name in names if (tmp_path / 'all' / name / 'results.json').exists()]
    assert evaluated == names[:1]
    assert f'{names[0]}' in shown and 'test: all 120 users' in shown

    flags = [f'--{name}={value}' for name, value in record['settings'][0]['flags'].items()]
    assert run(tmp_path / 'one', *flags) == 0
    first, second = (
        run_dir.read_json(folder / 'results.json')['results']
        for folder in (tmp_path / 'all' / names[0], tmp_path / 'one')
    )
    assert first == second


def test_settings_have_seeds(tmp_path):
    """The mean over seeds decides, and the best setting has results over its seeds."""
    assert run(tmp_path, '--sweep=learning_rate:1e-5,1e-2', '--seeds=0,3') == 0
    record = run_dir.read_json(tmp_path / 'sweep.json')
    for setting in record['settings']:
        folder = tmp_path / setting['name']
        assert setting['validation'] == [best_validation(folder / f'seed_{s}') for s in (0, 3)]
    means = [statistics.mean(setting['validation']) for setting in record['settings']]
    assert means[0] > means[1] and record['best'] == record['settings'][0]['name']
    assert run_dir.read_json(tmp_path / record['best'] / 'seeds.json')['seeds'] == [0, 3]
    assert not (tmp_path / record['settings'][1]['name'] / 'seeds.json').exists()


def test_a_file_has_a_setting_on_each_line(tmp_path, capsys):
    """Values with commas, a model with one more stage, and a second call that trains nothing."""
    file = tmp_path / 'settings.txt'
    lines = ('# labels', '--future_targets=1,.5 --ema=.9', '', '--model=fame --num_experts=2')
    file.write_text('\n'.join(lines) + ' --finetune_epochs=1\n')
    assert run(tmp_path / 'all', f'--sweep={file}') == 0
    record = run_dir.read_json(tmp_path / 'all' / 'sweep.json')
    flags = {setting['name']: setting['flags'] for setting in record['settings']}
    assert flags == {
        'setting_2': {'future_targets': '1,.5', 'ema': '0.9'},
        'setting_4': {'model': 'fame', 'num_experts': '2', 'finetune_epochs': '1'},
    }
    assert (tmp_path / 'all' / 'setting_4' / 'checkpoints' / 'finetune').is_dir()
    before = (tmp_path / 'all' / 'sweep.json').read_text()
    logs = {name: (tmp_path / 'all' / name / 'metrics.jsonl').read_text() for name in flags}
    assert run(tmp_path / 'all', f'--sweep={file}') == 0
    assert (tmp_path / 'all' / 'sweep.json').read_text() == before
    for name, log in logs.items():
        assert (tmp_path / 'all' / name / 'metrics.jsonl').read_text() == log


@pytest.mark.parametrize(
    'sweep, words',
    [
        ('learning_rat:1,2', 'did you mean --learning_rate?'),
        ('learning_rate:1,x', '--learning_rate=x'),
        ('learning_rate:1;learning_rate:2', 'has a flag twice'),
        ('k_core:2,3', '--k_core cannot be swept'),
        ('seed:1,2', '--seed cannot be swept'),
        ('select_on:masked,unmasked', '--select_on cannot be swept'),
        ('learning_rate:1e-3,.001', 'has learning_rate=0.001 twice'),
        ('num_heads:2,3', 'num_heads=3'),
        ('no_such_file', 'No such file or directory; give FLAG:VALUE,VALUE or a file'),
        ('learning_rate:', 'could not convert'),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_written(tmp_path, capsys, sweep, words):
    assert run(tmp_path / 'run', f'--sweep={sweep}') == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and words in line
    assert not (tmp_path / 'run').exists()


NUMBERS = (
    '--learning_rate=1e-2 --weight_decay=.1 --dropout=.5 --seen_weight=2 --ema=.9 '
    '--future_targets=1,.5 --model_options=head_loss=.3',
    '--learning_rate=3e-3 --weight_decay=.3 --dropout=.1 --seen_weight=4 --ema=.5 '
    '--future_targets=1,.1 --model_options=head_loss=2 --temperature=.2 --finetune_dropout=.3',
)


def test_settings_in_one_program_are_the_runs_of_their_own(tmp_path, capsys):
    """Numbers of the program are values that each run has by itself, with its seeds."""
    file = tmp_path / 'settings.txt'
    file.write_text('\n'.join(NUMBERS))
    flags = ['--model=fame', '--num_experts=2', '--finetune_epochs=1', '--patience=1']
    argv = [*flags, f'--sweep={file}', '--seeds=0,3', '--members=vmap', '--progress=lines']
    assert run(tmp_path / 'all', *argv, '--stages=prepare,pretrain,finetune') == 0
    assert 'finetune: 4 runs in one program' in capsys.readouterr().err
    for number, seed in ((1, 0), (2, 3)):
        alone = tmp_path / f'{number}_{seed}'
        own = [*flags, *NUMBERS[number - 1].split(), f'--seed={seed}']
        assert run(alone, *own, '--stages=prepare,pretrain,finetune') == 0
        together = tmp_path / 'all' / f'setting_{number}' / f'seed_{seed}'
        first, second = (
            {
                (line['stage'], line['split'], line['epoch']): line.get('loss', line.get('mrr'))
                for line in map(json.loads, (f / 'metrics.jsonl').read_text().splitlines())
                if line['split'] in ('train', 'validation')
            }
            for f in (together, alone)
        )
        assert first == pytest.approx(second, rel=1e-3)


def test_settings_with_other_shapes_have_programs_of_their_own(tmp_path, capsys):
    sweep = '--sweep=num_heads:1,2;dropout:.1,.5'
    assert run(tmp_path, sweep, '--members=vmap', '--progress=lines') == 0
    assert capsys.readouterr().err.count('2 runs in one program') == 2


@pytest.mark.parametrize('how', ['vmap', 'loop'])
def test_halving_ends_the_worse_settings_early(tmp_path, how):
    """Four settings, of which two go on after epoch 1, and one after epoch 2 of 4."""
    rates = (1e-6, 1e-5, 1e-3, 1e-2)
    sweep = f'--sweep=learning_rate:{",".join(map(str, rates))}'
    flags = [sweep, '--sweep_halving=2', f'--members={how}', '--pretrain_epochs=4']
    flags.append('--stages=prepare,pretrain')
    assert run(tmp_path / 'half', *flags) == 0
    record = run_dir.read_json(tmp_path / 'half' / 'sweep.json')
    epochs = {s['flags']['learning_rate']: s['epochs'] for s in record['settings']}
    kept = run_dir.read_json(tmp_path / 'half' / 'halving.json')['kept']
    assert [len(names) for names in kept] == [2, 1] and set(kept[1]) < set(kept[0])
    assert sorted(epochs.values()) == [[1], [1], [2], [4]]
    assert [s['ended_early'] for s in record['settings']] == [False, True, True, True]

    # The decisions are those of the validation metric up to the rung.
    def upto(name, epoch):
        lines = (tmp_path / 'half' / name / 'metrics.jsonl').read_text().splitlines()
        values = [json.loads(line) for line in lines]
        return max(
            v['ndcg@20'] for v in values if v['split'] == 'validation' and v['epoch'] <= epoch
        )

    names = [s['name'] for s in record['settings']]
    best = sorted(names, key=lambda name: -upto(name, 1))[:2]
    assert sorted(kept[0]) == sorted(best)
    assert kept[1] == [max(best, key=lambda name: upto(name, 2))]
    if how == 'vmap':
        return
    # The survivor is the run that was never interrupted.
    rate = record['settings'][0]['flags']['learning_rate']
    alone = [f'--learning_rate={rate}', '--pretrain_epochs=4', '--stages=prepare,pretrain']
    assert run(tmp_path / 'one', *alone) == 0
    assert best_validation(tmp_path / 'one') == record['settings'][0]['validation'][0]
    # The same command again trains nothing and ends the same.
    before = (tmp_path / 'half' / 'sweep.json').read_text()
    assert run(tmp_path / 'half', *flags) == 0
    assert (tmp_path / 'half' / 'sweep.json').read_text() == before


@pytest.mark.parametrize(
    'settings, eta, epochs, expected',
    [
        (9, 3, 60, [6, 20]),
        (8, 3, 60, [20]),
        (4, 2, 8, [2, 4]),
        (2, 3, 8, []),
        (27, 3, 5, [1, 1, 1]),
    ],
)
def test_rungs(settings, eta, epochs, expected):
    assert rungs(settings, eta, epochs) == expected


def test_a_halving_of_other_settings_is_refused(tmp_path, capsys):
    run_dir.write_json(
        tmp_path / 'halving.json', {'halving': 2, 'settings': ['dropout=0.1'], 'kept': []}
    )
    flags = ['--sweep_halving=2', '--members=loop', '--sweep=learning_rate:1e-3,1e-2']
    assert run(tmp_path, *flags, '--progress=none') == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'halving.json is of a sweep of other settings' in line


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """A folder of prepared data."""
    folder = tmp_path_factory.mktemp('prepared')
    assert main([FLAGS[0], f'--workdir={folder}', '--stages=prepare', '--progress=none']) == 0
    return folder


@contextlib.contextmanager
def opened(prepared, *settings):
    """The contexts of runs with these settings."""
    with contextlib.ExitStack() as stack:
        contexts = []
        for number, setting in enumerate(settings):
            argv = [*FLAGS[4:], f'--prepared={prepared}', f'--workdir={prepared / f"{number}"}']
            context = stages.open_run(config_flags.parse([*argv, *setting.split()]))
            contexts.append(stack.enter_context(contextlib.closing(context)))
        yield contexts


@pytest.mark.parametrize('name', [n for n, cls in MODELS.items() if cls.row_layout != 'prefixes'])
def test_the_numbers_of_every_model_can_be_traced(prepared, name):
    """Every option that is marked as traced, with a value that switches nothing off."""
    marked = [n for n, option in options.of(MODELS[name]).items() if option.is_traced]
    assert {'dropout', 'temperature'} <= set(marked)
    given = f'--model={name} --width=24 --weight_decay=.1 --ema=.9'
    own = [n for n in marked if n not in ('dropout', 'temperature')]
    if name == 'fame_bert4rec':  # is trained on masks, not on the targets of heads
        own.remove('head_loss')
    if own:
        given += ' --model_options=' + ','.join(f'{option}=.3' for option in own)
    with opened(prepared, given) as (context,):
        for stage in [s for s in context.config.run.stages if s in ('pretrain', 'finetune')]:
            found = train.numbers(context, stage)
            assert {'rate', 'weight_decay', 'ema', 'dropout', 'temperature'} <= set(found)
            assert set(own) <= set(found) or stage == 'pretrain'
            setup = train.make_setup(context, stage)
            state = abstract_state(abstract_params(setup.module), setup.optimizer, None)
            traced = jax.tree.map(jnp.float32, found)
            step = train.step_of_numbers(context, stage)
            new, sums = jax.eval_shape(step, traced, state, setup.batch, jax.random.key(0))
            assert jax.tree.structure(new) == jax.tree.structure(state)
            assert {'loss', 'weight'} <= set(sums)


def test_only_numbers_that_differ_are_traced(prepared):
    """The others are constants, with the bits that they have in a single run."""
    settings = ('--model=sasrec --ema=.9 --dropout=.1', '--model=sasrec --ema=.9 --dropout=.3')
    with opened(prepared, *settings, settings[0]) as (first, second, same):
        group = members.Group([first, second], 'pretrain')
        assert group.numbers_of(first).tolist() == [np.float32(0.1)]
        assert group.numbers_of(second).tolist() == [np.float32(0.3)]
        assert members.Group([first, same], 'pretrain').numbers_of(first).tolist() == []


@pytest.mark.parametrize(
    'first, second, together',
    [
        ('--learning_rate=1e-3', '--learning_rate=1e-2', True),
        ('--dropout=0', '--dropout=.5', True),
        ('--ema=.9', '--ema=.5', True),
        ('--ema=.9', '--ema=0', False),
        ('--seen_weight=3', '--seen_weight=1', False),
        ('--future_targets=1,.3', '--future_targets=1,.1', True),
        ('--future_targets=1,.3', '--future_targets=1,.3,.1', False),
        ('--num_heads=1', '--num_heads=2', False),
        ('--model=cl4srec', '--model=cl4srec --model_options=contrast_weight=.3', True),
        ('--model=cl4srec', '--model=cl4srec --model_options=contrast_weight=0', False),
        ('--model=cl4srec', '--model=cl4srec --model_options=crop_share=.5', False),
        ('--pretrain_epochs=3', '--pretrain_epochs=2', False),
        ('--model=msgifsr --dropout=.1', '--model=msgifsr --dropout=.3', False),
    ],
)
def test_which_settings_share_a_program(prepared, first, second, together):
    with opened(prepared, first, second) as (one, two):
        groups = group_runs({'one': [one], 'two': [two]}, 'auto' if 'msgifsr' in first else 'vmap')
    assert groups == ([['one', 'two']] if together else [['one'], ['two']])
