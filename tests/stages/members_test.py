"""--seeds: each member is the run of its own seed, however they train, stop and resume."""

import contextlib
import json
import shutil
import statistics
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from run_fixtures import largest_difference

from fame_jax import api, machine, run_dir, stages
from fame_jax.config import flags
from fame_jax.errors import UserError
from fame_jax.evaluation import significance
from fame_jax.main import main
from fame_jax.models import registry
from fame_jax.report import tables
from fame_jax.stages import members
from fame_jax.training.step import Program

SEEDS = (0, 1, 7)
FLAGS = [
    *('--synthetic=users=120,items=40', '--width=8', '--progress=none'),
    *('--max_length=12', '--row_length=16', '--rows_per_step=4', '--steps_per_dispatch=4'),
    *(
        '--pretrain_epochs=2',
        '--finetune_epochs=2',
    ),
]
FAME = [
    '--num_blocks=1',
    '--num_experts=2',
    '--model_options=head_loss=.3',
    '--seen_weight=3',
    '--ema=.9',
]


def run(workdir, *more):
    """The exit code of main in this process."""
    return main([*FLAGS, f'--workdir={workdir}', *more])


def best(workdir, stage):
    """The parameters of a stage's best epoch."""
    (step,) = (p for p in (workdir / 'checkpoints' / stage).iterdir() if p.name.isdigit())
    return ocp.StandardCheckpointer().restore(step.absolute() / 'best')


def validation(workdir):
    """NDCG@20 of the lines of metrics.jsonl by stage and epoch."""
    lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    return {
        (line['stage'], line['epoch']): line['ndcg@20']
        for line in lines
        if line['split'] == 'validation'
    }


def losses(workdir):
    """The mean loss, and FAME's other terms, of each stage and epoch."""
    lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    return {
        (line['stage'], line['epoch'], name): line[name]
        for line in lines
        if line['split'] == 'train'
        for name in ('loss', 'head_loss')
        if name in line
    }


def seeds_of(numbers=SEEDS):
    return '--seeds=' + ','.join(map(str, numbers))


@pytest.mark.parametrize(
    'model',
    [
        ['--model=fame', *FAME],
        ['--model=gru4rec'],
        pytest.param(['--model=bert4rec'], marks=pytest.mark.slow),
        pytest.param(['--model=cl4srec'], marks=pytest.mark.slow),
    ],
    ids=lambda model: model[0].removeprefix('--model='),
)
def test_a_member_is_the_run_of_its_seed(tmp_path, model):
    """To rounding; at the same epochs, and with the ranks of nearly all users."""
    assert run(tmp_path / 'many', *model, seeds_of(), '--members=vmap') == 0
    for seed in SEEDS[1:]:
        assert run(tmp_path / f'{seed}', *model, f'--seed={seed}') == 0
        many, one = tmp_path / 'many' / f'seed_{seed}', tmp_path / f'{seed}'
        stages = [path.name for path in (one / 'checkpoints').iterdir()]
        assert stages
        for stage in stages:
            assert largest_difference(best(many, stage), best(one, stage)) < 1e-5
        assert validation(many) == pytest.approx(validation(one), abs=1e-3)
        assert losses(many) == pytest.approx(losses(one), rel=1e-4)
        with np.load(many / 'ranks.npz') as first, np.load(one / 'ranks.npz') as second:
            for name in second.files:
                assert (first[name] != second[name]).mean() < 0.02


def test_one_after_the_other_they_have_the_bits_of_their_runs(tmp_path):
    assert run(tmp_path / 'many', *FAME, seeds_of(), '--members=loop') == 0
    assert run(tmp_path / 'one', *FAME, '--seed=7') == 0
    for stage in ('pretrain', 'finetune'):
        assert (
            largest_difference(best(tmp_path / 'many/seed_7', stage), best(tmp_path / 'one', stage))
            == 0
        )
    results = [
        run_dir.read_json(tmp_path / f / 'results.json')['results'] for f in ('many/seed_7', 'one')
    ]
    assert results[0] == results[1]


def test_the_results_are_those_of_the_seeds(tmp_path, capsys):
    """Means and deviations by hand, and the test of FAME against its backbone over all seeds."""
    assert run(tmp_path, *FAME, seeds_of(), '--finetune_epochs=1') == 0
    shown = capsys.readouterr().out
    whole = run_dir.read_json(tmp_path / 'seeds.json')
    members = [run_dir.read_json(tmp_path / f'seed_{seed}' / 'results.json') for seed in SEEDS]
    assert whole['seeds'] == list(SEEDS)
    assert [member['card']['seed'] for member in members] == list(SEEDS)
    for stage in ('popularity', 'item_graph', 'pretrain', 'finetune'):
        values = [m['results'][stage]['test']['masked']['ndcg@10'] for m in members]
        row = whole['over_seeds'][stage]
        assert row['mean']['test']['masked']['ndcg@10'] == pytest.approx(statistics.mean(values))
        assert row['deviation']['test']['masked']['ndcg@10'] == pytest.approx(
            statistics.stdev(values), abs=1e-12
        )
    mean, deviation = row['mean'], row['deviation']
    cell = '{:.4f} ± {:.4f}'.format(
        mean['test']['unmasked']['ndcg@20'], deviation['test']['unmasked']['ndcg@20']
    )
    assert cell.replace('0.', '.') in shown
    differences = []
    for seed in SEEDS:
        with np.load(tmp_path / f'seed_{seed}' / 'ranks.npz') as ranks:
            gains = [
                significance.ndcg(ranks[f'{stage}/test/masked'], 10).mean()
                for stage in ('finetune', 'pretrain')
            ]
        differences.append(gains[0] - gains[1])
    test = whole['tests']['test']['masked']
    assert test['of_each_seed'] == pytest.approx(differences)
    assert test['difference'] == pytest.approx(np.mean(differences))
    larger = sum(value > 0 for value in differences)
    (line,) = (line for line in shown.splitlines() if line.startswith('test, masked'))
    assert line.endswith(f'{larger} of 3')
    assert f'{np.mean(differences):+.4f}'.replace('0.', '.', 1) in line


def test_a_member_that_ends_early_changes_no_more(tmp_path, monkeypatch):
    """Seeds end at epochs of their own, as they do alone; the program is compiled once."""
    traced, run_block = [], Program._run_block

    def count(program, *arguments):
        traced.append(program)
        return run_block(program, *arguments)

    more = [
        '--model=sasrec',
        '--num_blocks=1',
        '--pretrain_epochs=30',
        '--patience=2',
        '--learning_rate=0.03',
    ]
    with monkeypatch.context() as patch:
        patch.setattr(Program, '_run_block', count)
        assert run(tmp_path / 'many', *more, seeds_of(), '--members=vmap') == 0
    assert len(traced) == 1
    ends = []
    for seed in SEEDS:
        assert run(tmp_path / f'{seed}', *more, f'--seed={seed}', '--stages=prepare,pretrain') == 0
        curve, alone = (
            validation(folder)
            for folder in (tmp_path / 'many' / f'seed_{seed}', tmp_path / f'{seed}')
        )
        ends.append(max(alone)[1])
        assert curve.keys() == alone.keys()
        assert curve == pytest.approx(alone, abs=0.02)
    assert len(set(ends)) > 1


def test_the_memory_of_the_device_limits_the_seeds_of_a_program(tmp_path, monkeypatch):
    """By hand, for 32 tokens of 40 items: the state is 3 float32 arrays of each parameter."""
    more = ['--model=sasrec', '--num_blocks=1', f'--workdir={tmp_path}', '--rows_per_step=2']
    with contextlib.closing(stages.open_run(flags.parse([*FLAGS, *more]))) as context:
        stages.STAGES['prepare'](context)
        params = registry.init_params(context.module('pretrain'), jax.random.key(0))
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        each = 4 * (3 * 3 * size + 4 * 2 * 16 * 40)
        for number in (1, 2, 4):
            memory = int((number + 0.5) * each / 0.8)
            monkeypatch.setattr(machine, 'device_memory', lambda memory=memory: memory)
            assert members.count_members(context, 'pretrain', 9) == number
        monkeypatch.setattr(machine, 'device_memory', lambda: 1)
        assert members.count_members(context, 'pretrain', 9) == 1
        monkeypatch.setattr(machine, 'device_memory', lambda: None)
        assert members.count_members(context, 'pretrain', 9) == 9


def test_seeds_that_do_not_fit_train_in_groups(tmp_path, monkeypatch, capsys):
    """Two of three in one program, then the third, as the two by themselves."""
    more = ['--model=sasrec', '--num_blocks=1', '--members=vmap', '--progress=lines']
    with monkeypatch.context() as patch:
        patch.setattr(members, 'count_members', lambda context, stage, number: 2)
        assert run(tmp_path / 'many', *more, seeds_of()) == 0
    assert 'pretrain: 2 runs in one program' in capsys.readouterr().err
    assert len(run_dir.seed_folders(tmp_path / 'many')) == 3
    assert run(tmp_path / 'pair', *more, seeds_of(SEEDS[:2])) == 0
    for seed in SEEDS[:2]:
        first, second = (best(tmp_path / f / f'seed_{seed}', 'pretrain') for f in ('many', 'pair'))
        assert largest_difference(first, second) == 0


@pytest.mark.parametrize('block', [3, pytest.param(5, marks=pytest.mark.slow)])
def test_interrupted_anywhere_they_end_with_the_same_bits(tmp_path, monkeypatch, block):
    """Before a block the files are those that a kill leaves there."""
    seeds = (0, 7)
    more = [*FAME, seeds_of(seeds), '--members=vmap', '--checkpoint_seconds=1000']
    more += ['--finetune_epochs=1', '--rows_per_step=8']
    assert run(tmp_path / 'whole', *more) == 0
    call, blocks = Program.__call__, []

    def stop(program, *arguments):
        blocks.append(program)
        if len(blocks) == block:
            raise KeyboardInterrupt
        return call(program, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Program, '__call__', stop)
        assert run(tmp_path / 'cut', *more, '--checkpoint_seconds=0') == 130
    assert run(tmp_path / 'cut', *more) == 0
    for seed in seeds:
        for stage in ('pretrain', 'finetune'):
            first, second = (best(tmp_path / f / f'seed_{seed}', stage) for f in ('whole', 'cut'))
            assert largest_difference(first, second) == 0
    results = [run_dir.read_json(tmp_path / f / 'seeds.json') for f in ('whole', 'cut')]
    assert results[0]['over_seeds'] == results[1]['over_seeds']


@pytest.mark.slow
def test_interrupted_after_a_seed_has_ended_the_others_end_with_the_same_bits(
    tmp_path, monkeypatch, capsys
):
    """The ended seed is not trained again, and its place in the program is filled."""
    more = ['--model=sasrec', '--num_blocks=1', '--members=vmap', '--checkpoint_seconds=1000']
    more += ['--pretrain_epochs=30', '--patience=2', '--learning_rate=0.03', seeds_of()]
    assert run(tmp_path / 'whole', *more) == 0
    curves = [validation(tmp_path / 'whole' / f'seed_{seed}') for seed in SEEDS]
    ends = [max(curve)[1] for curve in curves]
    assert min(ends) < max(ends)
    call, epochs = Program.__call__, []

    def stop(program, state, batches, key):
        ended = [line for line in (tmp_path / 'cut').glob('seed_*/metrics.jsonl')]
        epochs.append(sum(len(validation(path.parent)) - 1 for path in ended))
        if epochs[-1] > len(SEEDS) * min(ends):
            raise KeyboardInterrupt
        return call(program, state, batches, key)

    with monkeypatch.context() as patch:
        patch.setattr(Program, '__call__', stop)
        assert run(tmp_path / 'cut', *more, '--checkpoint_seconds=0') == 130
    capsys.readouterr()
    assert run(tmp_path / 'cut', *more, '--progress=lines') == 0
    assert 'pretrain: finished before' in capsys.readouterr().err
    for seed in SEEDS:
        first, second = (best(tmp_path / f / f'seed_{seed}', 'pretrain') for f in ('whole', 'cut'))
        assert largest_difference(first, second) == 0
        assert validation(tmp_path / 'cut' / f'seed_{seed}') == validation(
            tmp_path / 'whole' / f'seed_{seed}'
        )


def test_a_members_folder_is_a_run(tmp_path, capsys):
    """Later commands use it, and a finished command says so and changes nothing."""
    more = [*FAME, seeds_of((3, 4)), '--members=vmap']
    assert run(tmp_path, *more) == 0
    before = (tmp_path / 'seeds.json').read_text()
    capsys.readouterr()
    assert main([f'--workdir={tmp_path}', '--stages=evaluate', '--progress=none']) == 2
    assert f'name one of them, such as {tmp_path}/seed_3, or add --seeds=3,4' in (
        capsys.readouterr().err
    )
    assert [(r.seed, r.stage) for r in tables.read_runs([tmp_path])[0]] == [
        (seed, stage) for seed in (3, 4) for stage in ('pretrain', 'finetune')
    ]
    member = f'--workdir={tmp_path / "seed_4"}'
    assert main([member, '--stages=evaluate,export,recommend', '--progress=none']) == 0
    assert (tmp_path / 'seed_4' / 'export').is_dir()
    assert run(tmp_path, *more) == 0
    after = json.loads((tmp_path / 'seeds.json').read_text())
    assert after['over_seeds'] == json.loads(before)['over_seeds']
    of_all = [f'--workdir={tmp_path}', '--seeds=3,4', '--stages=evaluate', '--progress=none']
    assert main(of_all) == 0  # the flags of the runs are in their folders
    again = json.loads((tmp_path / 'seeds.json').read_text())
    assert again['over_seeds'] == after['over_seeds']
    other = ['--stages=finetune,evaluate', f'--backbone={tmp_path / "seed_3"}', '--seed=5']
    assert run(tmp_path / 'other', *FAME, *other, f'--prepared={tmp_path}') == 0


def test_each_seed_is_fine_tuned_from_the_backbone_of_its_seed(tmp_path, capsys):
    assert run(tmp_path / 'whole', *FAME, seeds_of((0, 1))) == 0
    again = ['--stages=finetune', f'--prepared={tmp_path}/whole', f'--backbone={tmp_path}/whole']
    assert run(tmp_path / 'again', *FAME, *again, seeds_of((1, 0))) == 0
    for seed in (0, 1):
        first, second = (
            best(tmp_path / f / f'seed_{seed}', 'finetune') for f in ('whole', 'again')
        )
        assert largest_difference(first, second) == 0
    capsys.readouterr()
    assert run(tmp_path / 'other', *FAME, *again, seeds_of((0, 9))) == 2
    assert 'no run of seed 9' in capsys.readouterr().err
    # The runs of `again` use the data of `whole`.
    argv = ['--progress=none', f'--prepared={tmp_path}/again', f'--workdir={tmp_path}/third']
    assert main([*argv, '--stages=prepare']) == 0
    assert f'--prepared={tmp_path}/whole' in (tmp_path / 'third' / 'flags.cfg').read_text()


@pytest.mark.parametrize(
    'given, words',
    [
        (['--seeds=1,1'], 'has a seed twice'),
        (['--seeds=1,x'], "'x' is no seed"),
        (['--seeds=-1'], "'-1' is no seed"),
        (['--seeds=1,2', '--seed=3'], '--seed does not go with --seeds'),
        (['--seeds=1,2', '--out=a.csv', '--stages=recommend'], '--out does not go with'),
        (['--seeds=1,2', '--members=vmap', '--schedule=cosine'], 'schedule'),
        (['--seeds=1,2', '--members=vmap', '--model=bsarec'], 'rows of several shapes'),
        (['--seeds=1,2', '--members=vmap', '--profile=p'], 'a profile'),
        (['--members=vmap'], 'has no effect where --seeds='),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, capsys, given, words):
    assert run(tmp_path, *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and words in line


# Runs in one folder. Paths are relative, so that the folders can be copied.

QUICK = ['--model=sasrec', '--num_blocks=1', '--pretrain_epochs=1']


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A folder with the single run `a` and the seeds 0, 1 and 2 in `b`."""
    folder = tmp_path_factory.mktemp('finished')
    with contextlib.chdir(folder):
        assert run('a', *QUICK) == 0
        assert run('b', *QUICK, '--seeds=0,1,2', '--prepared=a') == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path, monkeypatch, capsys):
    """Those runs in a folder of the test's own, the current one."""
    folder = shutil.copytree(finished, tmp_path / 'runs')
    monkeypatch.chdir(folder)
    capsys.readouterr()
    return folder


def files(folder):
    """All paths below a folder, with the content of files."""
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob('*')}


def refused(capsys, *argv):
    """The only line of a command that changes no file."""
    before = files(Path())
    assert main([*argv, '--progress=none']) == 2
    assert files(Path()) == before
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    'argv, words',
    [
        (['--workdir=b'], 'b holds runs of the seeds 0, 1, 2; choose another --workdir, or add'),
        (['--workdir=b', '--seed=5'], 'or add --seeds=0,1,2'),
        (['--workdir=b', '--sweep=dropout:.1'], 'b holds runs of the seeds 0, 1, 2; choose'),
        (
            ['--workdir=a', '--seeds=0,1'],
            'a holds a single run; choose another --workdir, or leave',
        ),
        (['--workdir=a', '--sweep=dropout:.1'], 'a holds a single run; choose another --workdir'),
        (['--workdir=a', '--sweep=dropout:.1', '--seeds=0,1'], 'or leave --sweep out'),
        (['--workdir=a/seed_0'], 'a holds a single run; choose another --workdir'),
        (
            ['--workdir=b', '--seeds=5', '--width=4'],
            'b/seed_0 holds another run: --width=4 (there: 8)',
        ),
    ],
)
def test_a_workdir_belongs_to_one_run(copied, capsys, argv, words):
    assert words in refused(capsys, *FLAGS, *QUICK, *argv)


@pytest.mark.parametrize('stage', ['recommend', 'similar', 'explain', 'export', 'report'])
def test_a_stage_that_needs_a_run_names_one_of_the_seeds(copied, capsys, stage):
    line = refused(capsys, '--workdir=b', f'--stages={stage}')
    assert line == 'error: b holds runs of several seeds; name one of them, such as b/seed_0'


def test_a_folder_of_seeds_is_no_run_to_load_to_update_or_to_grow(copied, capsys):
    words = 'holds runs of several seeds; name one of them, such as b/seed_0'
    with pytest.raises(UserError, match=f'^b {words}$'):
        api.load('b')
    (copied / 'log.csv').write_text('user,item,time\n')
    line = refused(capsys, '--append=log.csv', '--from=b', '--workdir=c')
    assert line == f'error: --from=b {words}'
    more = ['--model=fame', '--prepared=a', '--stages=finetune', '--backbone=b']
    assert run('c', *QUICK, *more) == 2
    assert capsys.readouterr().err == f'error: --backbone=b {words}\n'
    assert api.load('b/seed_1').num_items == api.load('a').num_items


def test_data_that_are_prepared_serve_a_run_and_seeds(tmp_path, capsys):
    """A folder with data alone holds no run, whatever prepared them."""
    prepare = [*QUICK, '--stages=prepare']
    assert run(tmp_path / 'one', *prepare) == 0 and run(tmp_path / 'many', *prepare) == 0
    assert run(tmp_path / 'one', *QUICK) == 0
    assert run(tmp_path / 'many', *QUICK, '--seeds=3') == 0
    assert run(tmp_path / 'many', *prepare) == 0
    assert run_dir.read_json(tmp_path / 'many' / 'seeds.json')['seeds'] == [3]


def means(folder='b'):
    """The seeds of seeds.json, and the mean of a metric in it and over their results.json."""
    whole = run_dir.read_json(Path(folder) / 'seeds.json')
    each = [
        run_dir.read_json(Path(folder) / f'seed_{seed}' / 'results.json')['results']
        for seed in whole['seeds']
    ]
    values = [results['pretrain']['test']['masked']['mrr'] for results in each]
    found = whole['over_seeds']['pretrain']['mean']['test']['masked']['mrr']
    return whole['seeds'], found, statistics.mean(values)


@pytest.mark.parametrize('seeds, others', [('0,1', '2'), ('2', '0, 1'), ('1,0,2', '')])
def test_the_results_are_those_of_all_finished_seeds(copied, capsys, seeds, others):
    before = means()
    assert before[0] == [0, 1, 2] and before[1] == pytest.approx(before[2])
    assert run('b', *QUICK, f'--seeds={seeds}', '--prepared=a') == 0
    assert means() == before
    shown = capsys.readouterr().out
    assert 'mean ± standard deviation of 3 seeds' in shown
    line = f'Runs of earlier commands count too: seed {others}.'
    assert (line in shown) if others else ('earlier commands' not in shown)


def test_a_seed_is_added_to_those_that_are_finished(copied):
    logs = {path: path.read_bytes() for path in Path('b').glob('*/metrics.jsonl')}
    assert run('b', *QUICK, '--seeds=7', '--prepared=a') == 0
    assert means()[0] == [0, 1, 2, 7] and means()[1] == pytest.approx(means()[2])
    assert len(logs) == 3 and all(path.read_bytes() == log for path, log in logs.items())


def test_seeds_that_do_not_count_are_named(copied, capsys):
    """One has no results, and one was trained with other limits."""
    (copied / 'b' / 'seed_1' / 'results.json').unlink()
    argv = [*QUICK, '--pretrain_epochs=2', '--prepared=a']
    assert run('b', *argv, '--seeds=0') == 0
    shown = capsys.readouterr().out
    assert 'Seed 1 is left out: it has no results; add it to --seeds.' in shown
    assert 'Seed 2 is left out: --pretrain_epochs=2 (there: 1); add it to --seeds.' in shown
    assert means()[0] == [0]
    assert run('b', *argv, '--seeds=0,1,2') == 0
    assert 'left out' not in capsys.readouterr().out
    assert means()[0] == [0, 1, 2]
