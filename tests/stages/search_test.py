"""fame_jax search: trials are runs, the best of them is a flag file, a second call goes on."""

import json
import statistics

import pytest

from fame_jax import run_dir
from fame_jax.config import flags
from fame_jax.errors import DivergedError
from fame_jax.main import main
from fame_jax.stages import search as stages_search
from fame_jax.stages.context import RunContext
from fame_jax.stages.search import Choice, parse_space

pytest.importorskip('optuna')

FLAGS = [
    *('--synthetic=users=120,items=40', '--model=sasrec', '--width=8', '--num_blocks=1'),
    *('--max_length=12', '--row_length=16', '--rows_per_step=4', '--progress=none'),
    *('--pretrain_epochs=2', '--patience=9'),
]
SPACE = 'learning_rate 1e-5..1e-2 log\nnum_heads 1|2  # heads\n\ndropout .1..0.5\n'


def search(folder, space, *more, trials=3):
    """The exit code of the command in this process."""
    file = folder / 'space.txt'
    file.write_text(space)
    argv = [f'--space={file}', f'--trials={trials}', *FLAGS, f'--workdir={folder / "s"}', *more]
    return main(['search', *argv])


def best_validation(folder):
    """The best NDCG@20 of a run's metrics.jsonl; epoch 0 counts too."""
    lines = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
    return max(line['ndcg@20'] for line in lines if line['split'] == 'validation')


def test_the_best_trial_by_validation_is_a_flag_file(tmp_path, capsys):
    """A later call with more trials trains the new ones alone; the flag file repeats the best."""
    assert search(tmp_path, SPACE, '--seeds=0,3', trials=2) == 0
    out = capsys.readouterr().out
    record = run_dir.read_json(tmp_path / 's' / 'sweep.json')
    assert sorted(s['name'] for s in record['settings']) == ['trial_0', 'trial_1']
    for setting in record['settings']:
        folders = [tmp_path / 's' / setting['name'] / f'seed_{seed}' for seed in (0, 3)]
        assert setting['validation'] == [best_validation(folder) for folder in folders]
        stored = [flags.read(folder / 'flags.cfg') for folder in folders]
        for values in stored:
            assert {n: str(values[n]) for n in setting['flags']} == setting['flags']
    means = [statistics.mean(s['validation']) for s in record['settings']]
    assert means == sorted(means, reverse=True) and record['best'] == record['settings'][0]['name']
    assert not list((tmp_path / 's').glob('*/*/results.json')), 'the test split is not used'
    assert (tmp_path / 's' / 'sweep.svg').read_text().lstrip().startswith('<?xml')
    for name, value in record['settings'][0]['flags'].items():
        assert f'--{name}={value}' in out

    logs = {p: p.read_text() for p in (tmp_path / 's').glob('*/*/metrics.jsonl')}
    assert len(logs) == 4
    assert search(tmp_path, SPACE, '--seeds=0,3', trials=3) == 0
    assert all(path.read_text() == log for path, log in logs.items())
    record = run_dir.read_json(tmp_path / 's' / 'sweep.json')
    assert len(record['settings']) == 3

    again = [f'--flagfile={tmp_path / "s" / "best.cfg"}', f'--workdir={tmp_path / "again"}']
    assert main([*again, '--seed=3', '--progress=none', '--stages=prepare,pretrain']) == 0
    best = tmp_path / 's' / record['best'] / 'seed_3'
    assert best_validation(tmp_path / 'again') == best_validation(best)


def test_trials_that_lag_behind_end_early(tmp_path, monkeypatch):
    """Training is replaced: the first four trials have a validation of .5, later ones .1."""
    until = []
    monkeypatch.setattr(stages_search, 'run_stages', lambda *given: until.append(given[5:]))
    monkeypatch.setattr(RunContext, 'is_finished', lambda *_: until[-1] == (None,))
    monkeypatch.setattr(stages_search, 'epochs_of', lambda _: 1)
    monkeypatch.setattr(
        stages_search,
        'validation_of',
        lambda context: 0.5 if int(context.folder.name.removeprefix('trial_')) < 4 else 0.1,
    )
    more = ('--pretrain_epochs=27', '--together=4')
    assert search(tmp_path, 'dropout .1..0.5\n', *more, trials=6) == 0
    record = run_dir.read_json(tmp_path / 's' / 'sweep.json')
    early = sorted(s['name'] for s in record['settings'] if s['ended_early'])
    assert early == ['trial_4', 'trial_5']
    of_four = [epochs for epochs in (1, 3, 9, None) for _ in range(4)]
    assert [epochs for epochs, *_ in filter(None, until)] == [*of_four, 1, 1]


def test_a_setting_that_no_run_can_have_is_passed_over(tmp_path, capsys):
    """Three heads do not divide a width of 8."""
    more = ('--progress=lines',)
    assert search(tmp_path, 'num_heads 2|3\n', *more, trials=3) == 0
    err = capsys.readouterr().err
    assert 'cannot be trained: ' in err and 'num_heads=3' in err
    record = run_dir.read_json(tmp_path / 's' / 'sweep.json')
    assert {s['flags']['num_heads'] for s in record['settings']} == {'2'}


def test_a_space_is_a_flag_a_line(tmp_path):
    file = tmp_path / 'space.txt'
    file.write_text(SPACE + 'num_blocks 1..3\n')
    assert parse_space(str(file)) == {
        'learning_rate': Choice((), 1e-5, 1e-2, is_log=True),
        'num_heads': Choice(('1', '2')),
        'dropout': Choice((), 0.1, 0.5),
        'num_blocks': Choice((), 1, 3, is_whole=True),
    }


@pytest.mark.parametrize(
    'space, words',
    [
        ('learning_rat 1..2', 'did you mean learning_rate?'),
        ('k_core 2..3', '--k_core cannot be searched'),
        ('select_on masked|unmasked', '--select_on cannot be searched'),
        ('dropout .5..1.5', 'out of range'),
        ('dropout .5..1', 'out of range'),
        ('dropout .5..0.1', 'with LOW below HIGH'),
        ('learning_rate 0..1 log', 'has no logarithm'),
        ('num_blocks 1.5..3', 'whole number'),
        ('dropout .1|.1', 'each value once'),
        ('dropout .1..0.2\ndropout .1..0.3', 'stands there twice'),
        ('', 'has no flag'),
    ],
)
def test_a_wrong_space_is_refused_before_anything_is_written(tmp_path, capsys, space, words):
    assert search(tmp_path, space) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and words in line
    assert not (tmp_path / 's').exists()


@pytest.mark.parametrize(
    'more, words',
    [
        (('--trials=0',), '--trials'),
        (('--sweep=dropout:.1',), '--sweep does not go'),
        (('--dropout=.5',), '--dropout=0.5 has no effect, since '),
        (('--no_such=1',), 'no_such'),
    ],
)
def test_wrong_flags_are_refused(tmp_path, capsys, more, words):
    assert search(tmp_path, SPACE, *more) == 2
    assert words in capsys.readouterr().err


def test_another_search_in_the_folder_is_refused(tmp_path, capsys):
    assert search(tmp_path, SPACE, trials=1) == 0
    assert search(tmp_path, 'dropout .1..0.5\n', trials=1) == 2
    assert 'has a search of other flags, values or seeds' in capsys.readouterr().err


def test_two_searches_at_once_are_refused(tmp_path, capsys):
    """The second one must not take the trials of the first for failures."""
    assert search(tmp_path, SPACE, trials=1) == 0
    capsys.readouterr()
    with run_dir.lock(tmp_path / 's'):
        assert search(tmp_path, SPACE, trials=2) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and str(tmp_path / 's') in line
    assert len((tmp_path / 's' / 'study.log').read_text().splitlines()) > 0
    assert not (tmp_path / 's' / 'trial_1').exists()


def test_a_trial_that_diverges_fails_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    """Training is replaced: of two that train together the first diverges, also by itself."""

    def diverge(contexts, *_):
        if any(context.folder.name == 'trial_0' for context in contexts):
            raise DivergedError('the loss is nan')

    monkeypatch.setattr(stages_search, 'run_stages', diverge)
    monkeypatch.setattr(RunContext, 'is_finished', lambda *_: True)
    monkeypatch.setattr(stages_search, 'epochs_of', lambda _: 1)
    monkeypatch.setattr(stages_search, 'validation_of', lambda _: 0.5)
    more = ('--together=2', '--progress=lines', '--members=vmap')
    assert search(tmp_path, 'dropout .1..0.5\n', *more, trials=2) == 0
    assert 'trial_0: cannot be trained: the loss is nan' in capsys.readouterr().err
    record = run_dir.read_json(tmp_path / 's' / 'sweep.json')
    assert [s['name'] for s in record['settings']] == ['trial_1']
