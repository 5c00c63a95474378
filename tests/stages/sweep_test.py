"""--sweep: settings are runs of their own, compared on validation; only the best is evaluated."""

import contextlib
import json
import shutil
import statistics
from pathlib import Path

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
from fame_jax.stages.sweep_settings import parse_sweep
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
        'future_targets=1,0.5,ema=0.9': {'future_targets': '1,.5', 'ema': '0.9'},
        'model=fame,num_experts=2,finetune_epochs=1': {
            **{'model': 'fame', 'num_experts': '2', 'finetune_epochs': '1'}
        },
    }
    of_fame = tmp_path / 'all' / 'model=fame,num_experts=2,finetune_epochs=1'
    assert (of_fame / 'checkpoints' / 'finetune').is_dir()
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
        (
            'finetune_learning_rate:1e-3,1e-4',
            'cannot be swept for SASRec',
        ),
        ('no_such_file', 'No such file or directory; give FLAG:VALUE,VALUE or a file'),
        ('learning_rate:', 'could not convert'),
        ('width:', 'a setting without values; give FLAG=VALUE'),
        ('dropout:.1;' * 40 + 'k_core:1', 'has a flag twice'),  # longer than the name of a file
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_written(tmp_path, capsys, sweep, words):
    assert run(tmp_path / 'run', f'--sweep={sweep}') == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and words in line
    assert not (tmp_path / 'run').exists()


def test_a_sweep_that_trains_nothing_is_refused(tmp_path, capsys):
    assert run(tmp_path / 'run', '--sweep=dropout:.1,.2', '--stages=evaluate') == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: --stages=evaluate trains nothing') and '--workdir' in line
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
        values = dict(flag[2:].split('=', 1) for flag in NUMBERS[number - 1].split())
        (setting,) = (
            folder
            for folder in (tmp_path / 'all').glob('learning_rate=*')
            if f'learning_rate={float(values["learning_rate"])},' in folder.name
        )
        together = setting / f'seed_{seed}'
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


# Runs in one folder. Paths are relative, so that the folders can be copied.

QUICK = ['--pretrain_epochs=1', '--stages=prepare,pretrain']


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A folder with the sweep `s` of a file and the single run `a`."""
    folder = tmp_path_factory.mktemp('finished')
    with contextlib.chdir(folder):
        Path('f.txt').write_text('--dropout=.5\n--ema=.9 --dropout=.3\n')
        assert run('s', *QUICK, '--sweep=f.txt') == 0
        assert run('a', *QUICK) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path, monkeypatch, capsys):
    """Those runs in a folder of the test's own, the current one."""
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / 'runs'))
    capsys.readouterr()


def settings_of(folder='s'):
    """The flags of the settings in sweep.json by their names."""
    return {
        s['name']: s['flags'] for s in run_dir.read_json(Path(folder, 'sweep.json'))['settings']
    }


def logs():
    """What the settings of `s` have logged, by their folders."""
    return {path.parent.name: path.read_bytes() for path in Path('s').glob('*/metrics.jsonl')}


FINISHED = {
    'dropout=0.5': {'dropout': '0.5'},
    'ema=0.9,dropout=0.3': {'ema': '0.9', 'dropout': '0.3'},
}


@pytest.mark.parametrize(
    'lines',
    [
        '--dropout=.5\n--ema=.9 --dropout=.3',
        '--dropout=.2\n\n--ema=9e-1 --dropout=.30\n# the first\n--dropout=0.5',
        '--dropout=0.3 --ema=0.9\n--dropout=.5',
        'dropout:.3;ema:.9',
    ],
)
def test_a_setting_is_found_by_its_flags(copied, capsys, lines):
    """In whichever line of the file they stand, in whichever order and spelling."""
    assert settings_of() == FINISHED
    before = logs()
    Path('f.txt').write_text(lines)
    sweep = lines if ':' in lines else 'f.txt'
    assert run('s', *QUICK, f'--sweep={sweep}') == 0
    more = {'dropout=0.2': {'dropout': '0.2'}} if '.2' in lines else {}
    assert {n: {**f} for n, f in settings_of().items()} == FINISHED | more
    assert {name: log for name, log in logs().items() if name in before} == before
    assert logs().keys() == before.keys() | more.keys()
    assert ('of earlier commands' in capsys.readouterr().out) == (':' in lines)


@pytest.mark.parametrize('is_finished', [True, False])
def test_a_setting_is_found_in_a_numbered_folder(copied, is_finished):
    """As earlier versions named them by the line of the file, with or without a sweep.json."""
    names = {'dropout=0.5': 'setting_1', 'ema=0.9,dropout=0.3': 'setting_2'}
    text = Path('s/sweep.json').read_text()
    for name, number in names.items():
        Path('s', name).rename(Path('s', number))
        text = text.replace(f'"{name}"', f'"{number}"')
    Path('s/sweep.json').write_text(text)
    if not is_finished:
        Path('s/sweep.json').unlink()
    before = logs()
    Path('f.txt').write_text('--dropout=.3\n--dropout=.3 --ema=.9\n--dropout=.5\n')
    assert run('s', *QUICK, '--sweep=f.txt') == 0
    assert settings_of().keys() == {'dropout=0.3', 'setting_1', 'setting_2'}
    assert {name: log for name, log in logs().items() if name in before} == before


def test_a_long_setting_has_a_short_name(tmp_path):
    """Two that begin alike have names of their own, the same ones in each command."""
    begin = ' '.join(f'--{name}=.0123456789012' for name in ('dropout', 'ema', 'learning_rate'))
    begin += ' --finetune_learning_rate=.0123456789012 --weight_decay=.012345678901'
    file = tmp_path / 'f.txt'
    file.write_text(f'{begin} --seen_weight=2\n{begin} --seen_weight=3\n')
    found = list(parse_sweep(config_flags.parse([f'--sweep={file}'])))
    assert len(set(found)) == 2 and max(map(len, found)) <= 160 + 9
    assert all(name.startswith('dropout=0.0123456789012,ema=') for name in found)
    file.write_text(f'{begin} --seen_weight=3\n')
    assert list(parse_sweep(config_flags.parse([f'--sweep={file}']))) == found[1:]


@pytest.mark.parametrize(
    'content, words',
    [
        ('--dropout=.3\n--ema=.9\n--dropout=0.3', '{}:3: dropout=0.3 is in {}:1 too; give each'),
        ('--ema=.9 --dropout=.3\n\n--dropout=.3 --ema=.9', '{}:3: dropout=0.3,ema=0.9 is in {}:1'),
        ('--future_targets=1,.5\n--future_targets=1,0.50', '{}:2: future_targets=1,0.5 is in'),
        (
            '--model_options=a=1,b=.5\n--model_options=b=0.5 --model_options=a=1',
            '{}:2: model_options=b=0.5,a=1 is in {}:1 too',
        ),
        ('--dropout=.3\n--seed=1', '{}:2: --seed cannot be swept'),
        ('--dropout=".3', '{}:1: No closing quotation; close the quotation'),
        ('--width=', '{}:1: a setting without values'),
        (b'--dropout=\xff', '{} is not text in UTF-8'),
        ('# nothing', 'has 0 settings'),
    ],
)
def test_a_faulty_file_is_refused_in_one_line(tmp_path, capsys, content, words):
    file = tmp_path / 'f.txt'
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run(tmp_path / 'run', f'--sweep={file}') == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and words.format(file, file) in line
    assert not (tmp_path / 'run').exists()


def test_a_flag_that_no_setting_uses_is_refused(copied, capsys):
    """A flag file may have it, and a file may leave it to some of the settings."""
    assert run('n', *QUICK, '--sweep=dropout:.1,.2', '--dropout=.3') == 2
    assert capsys.readouterr().err == (
        'error: --dropout=0.3 has no effect, since each setting of --sweep has its own value; '
        'leave it out, or add it to --sweep\n'
    )
    assert not Path('n').exists()
    Path('g.cfg').write_text('--dropout=.3\n')
    argv = ['--sweep=dropout:.1,.2', '--flagfile=g.cfg']
    assert list(parse_sweep(config_flags.parse(argv))) == ['dropout=0.1', 'dropout=0.2']
    Path('f.txt').write_text('--dropout=.1\n--ema=.9\n')
    argv = ['--sweep=f.txt', '--dropout=.3']
    assert list(parse_sweep(config_flags.parse(argv))) == ['dropout=0.1', 'ema=0.9']


def refused(capsys, *argv):
    """The only line of a command that changes no file."""
    before = {path: path.is_file() and path.read_bytes() for path in Path().rglob('*')}
    assert main([*FLAGS, *QUICK, *argv]) == 2
    assert {path: path.is_file() and path.read_bytes() for path in Path().rglob('*')} == before
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    'argv, words',
    [
        (['--workdir=a', '--sweep=f.txt'], 'a holds a single run; choose another --workdir, or'),
        (['--workdir=s'], 's holds a sweep; choose another --workdir, or add its --sweep'),
        (['--workdir=s', '--seeds=0,1'], 's holds a sweep; choose another --workdir, or add its'),
        (
            ['--workdir=s', '--sweep=f.txt', '--seeds=0,1'],
            's/dropout=0.5 holds a single run; choose another --workdir, or leave --seeds out',
        ),
        (
            ['--workdir=s', '--sweep=dropout:.1', '--width=4'],
            's/dropout=0.5 holds another run: --width',
        ),
        (
            ['--workdir=s', '--stages=recommend'],
            's holds runs of a sweep; name one of them, such as s/dropout=0.5',
        ),
    ],
)
def test_a_workdir_belongs_to_one_sweep(copied, capsys, argv, words):
    assert words in refused(capsys, *argv)


def test_a_damaged_record_is_refused(copied, capsys):
    Path('s/sweep.json').write_text('{"settings": [{"name": "dropout=0.5"}], "best": "a"}')
    line = refused(capsys, '--workdir=s', '--sweep=f.txt')
    assert line == 'error: s/sweep.json is damaged; remove it and run the same command again'


def test_settings_of_earlier_commands_are_compared_too(copied, capsys):
    """Where they are trained to the end; all others are named."""
    before = run_dir.read_json(Path('s/sweep.json'))
    assert run('s', *QUICK, '--sweep=dropout:.7') == 0
    shown = capsys.readouterr().out
    assert settings_of() == FINISHED | {'dropout=0.7': {'dropout': '0.7'}}
    record = run_dir.read_json(Path('s/sweep.json'))
    for row in before['settings']:
        assert row in record['settings']
    values = [setting['validation'][0] for setting in record['settings']]
    assert (
        values == sorted(values, reverse=True) and record['best'] == record['settings'][0]['name']
    )
    (line,) = (line for line in shown.splitlines() if 'earlier' in line)
    names = line.removeprefix('Settings of earlier commands are compared too: ').rstrip('.')
    assert set(names.split(', ')) == {'dropout=0.5', 'ema=0.9,dropout=0.3'}

    shutil.copytree('s/dropout=0.5', 's/setting_9')  # of a command that was interrupted
    assert run('s', *QUICK, '--sweep=dropout:.7', '--pretrain_epochs=2') == 0
    assert settings_of() == {'dropout=0.7': {'dropout': '0.7'}}
    shown = capsys.readouterr().out.splitlines()
    for name in FINISHED:
        assert f'{name} is left out: it is not trained to the end; add it to --sweep.' in shown
    assert 'setting_9 is left out: sweep.json lacks it; add it to --sweep.' in shown
