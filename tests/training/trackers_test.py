"""MLflow and trackio, by stand-ins with their signatures: what they get; that none ends a run."""

import importlib.machinery
import json
import math
import sys
import types

import pytest
from run_fixtures import SMALL_RUN

from fame_jax.errors import UserError
from fame_jax.main import main
from fame_jax.run_dir import Metrics
from fame_jax.screen import Screen
from fame_jax.training import trackers
from fame_jax.training.log import open_log

CONFIG = {'width': 8, 'facets': ('a', 'b'), 'num_heads': None, 'filter_seen': True}
TEXTS = {'width': '8', 'facets': 'a,b', 'filter_seen': 'true'}


class StandIns:
    """Both packages, with their calls in order."""

    def __init__(self):
        self.calls = []
        self.known = set()  # runs of MLflow's store
        self.active = []
        self.fails = ''  # the name of a function that raises

    def mlflow(self):
        def set_experiment(experiment_name=None):
            self.add('set_experiment', experiment_name)

        def start_run(run_id=None, run_name=None, nested=False):
            if run_id and run_id not in self.known:
                raise ValueError('no such run')
            assert nested or not self.active
            self.add('start_run', run_id or run_name)
            run_id = run_id or f'id{len(self.known)}'
            self.known.add(run_id)
            self.active.append(run_id)
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

        def log_params(params, run_id=None):
            self.add('log_params', run_id, params)

        def log_metrics(metrics, step=None, run_id=None):
            self.add('log_metrics', run_id, step, metrics)

        def end_run(status='FINISHED'):
            self.add('end_run', self.active.pop())

        return make_module('mlflow', set_experiment, start_run, log_params, log_metrics, end_run)

    def trackio(self):
        def init(project, name=None, config=None, resume='never'):
            self.add('init', project, name, config, resume)

        def log(metrics, step=None):
            self.add('log', step, metrics)

        def finish():
            self.add('finish')

        return make_module('trackio', init, log, finish)

    def add(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name == self.fails:
            raise RuntimeError(f'{name} is\nbroken')

    def of(self, name):
        return [call[1:] for call in self.calls if call[0] == name]


def make_module(name, *functions):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update({function.__name__: function for function in functions})
    return module


@pytest.fixture
def stand_ins(monkeypatch):
    made = StandIns()
    monkeypatch.setitem(sys.modules, 'mlflow', made.mlflow())
    monkeypatch.setitem(sys.modules, 'trackio', made.trackio())
    monkeypatch.delenv('MLFLOW_EXPERIMENT_NAME', raising=False)
    return made


def open_trackers(folder, *names, said=None):
    return trackers.Trackers(names, folder, CONFIG, [].append if said is None else said.append)


def test_mlflow_gets_the_settings_once_and_finite_values_with_allowed_names(stand_ins, tmp_path):
    for step in (4, 8):
        tracked = open_trackers(tmp_path, 'mlflow')
        tracked.log(step, {'pretrain/validation/ndcg@20': 0.5, 'loss': math.nan, 'seconds': 2})
        tracked.close()
    run = str(tmp_path)
    assert stand_ins.calls == [
        ('set_experiment', 'fame_jax'),
        ('start_run', run),
        ('log_params', 'id0', TEXTS),
        ('log_metrics', 'id0', 4, {'pretrain/validation/ndcg_at_20': 0.5, 'seconds': 2.0}),
        ('end_run', 'id0'),
        ('set_experiment', 'fame_jax'),
        ('start_run', 'id0'),  # the same run goes on
        ('log_metrics', 'id0', 8, {'pretrain/validation/ndcg_at_20': 0.5, 'seconds': 2.0}),
        ('end_run', 'id0'),
    ]
    assert json.loads((tmp_path / 'tracking.json').read_text()) == {'mlflow': 'id0'}


def test_trackio_goes_on_with_the_run_of_the_workdir(stand_ins, tmp_path):
    for folder in (tmp_path / 'a', tmp_path / 'a', tmp_path / 'b'):
        folder.mkdir(exist_ok=True)
        tracked = open_trackers(folder, 'trackio')
        tracked.log(4, {'validation/ndcg@20': 0.5})
        tracked.close()
    first, again, other = stand_ins.of('init')
    assert first == ('fame_jax', first[1], TEXTS, 'never') and str(tmp_path / 'a') in first[1]
    assert again == ('fame_jax', first[1], None, 'allow')
    assert other[3] == 'never' and other[1] != first[1]
    assert stand_ins.of('log') == [(4, {'validation/ndcg@20': 0.5})] * 3
    assert len(stand_ins.of('finish')) == 3


def test_runs_that_are_open_together_get_their_own_values(stand_ins, tmp_path):
    """As seeds in one program: MLflow's values carry the id, and the last run ends first."""
    folders = [tmp_path / name for name in 'ab']
    for folder in folders:
        folder.mkdir()
    first, second = (open_trackers(folder, 'mlflow') for folder in folders)
    first.log(1, {'loss': 1.0})
    second.log(1, {'loss': 2.0})
    second.close()
    first.close()
    assert [(run, of['loss']) for run, _, of in stand_ins.of('log_metrics')] == [
        ('id0', 1.0),
        ('id1', 2.0),
    ]
    assert stand_ins.of('end_run') == [('id1',), ('id0',)]


@pytest.mark.parametrize('fails', ['set_experiment', 'log_params', 'log_metrics', 'end_run'])
def test_a_failure_is_one_line_and_the_other_tracker_goes_on(stand_ins, tmp_path, fails):
    said, stand_ins.fails = [], fails
    tracked = open_trackers(tmp_path, 'mlflow', 'trackio', said=said)
    for step in (1, 2):
        tracked.log(step, {'loss': 1.0})
    tracked.close()
    line = f'--track=mlflow failed ({fails} is broken); training goes on without it'
    assert said == [line] and len(stand_ins.of(fails)) == 1
    assert [step for step, _ in stand_ins.of('log')] == [1, 2] and stand_ins.of('finish') == [()]


def test_a_run_that_the_store_has_lost_is_begun_anew(stand_ins, tmp_path):
    said = []
    (tmp_path / 'tracking.json').write_text('{"mlflow": "lost", "trackio": "kept"}')
    open_trackers(tmp_path, 'mlflow', said=said).close()
    assert said == ['--track=mlflow: the run lost cannot be resumed; a new one']
    stored = json.loads((tmp_path / 'tracking.json').read_text())
    assert stored == {'mlflow': 'id0', 'trackio': 'kept'}
    assert stand_ins.of('log_params') == [('id0', TEXTS)]


def test_a_damaged_tracking_file_ends_nothing(stand_ins, tmp_path):
    said = []
    (tmp_path / 'tracking.json').write_text('{"ml')
    open_trackers(tmp_path, 'mlflow', said=said).close()
    assert len(said) == 1 and 'tracking.json is not JSON' in said[0]


def test_where_a_stage_writes(stand_ins, tmp_path):
    for track, write, has_events, runs in (
        (('tensorboard',), True, True, 0),
        (('mlflow', 'trackio'), True, False, 2),
        ((), True, False, 0),
        (('tensorboard', 'mlflow'), False, False, 0),  # another process writes
    ):
        folder = tmp_path / f'{len(list(tmp_path.iterdir()))}'
        folder.mkdir()
        stand_ins.calls.clear()
        metrics = Metrics(folder / 'metrics.jsonl')
        with open_log('pretrain', folder, metrics, Screen('none'), write, track, CONFIG) as log:
            log.values('train', 3, 1, {'loss': 2.0})
        assert (folder / 'tensorboard').exists() == has_events
        assert len(stand_ins.of('start_run') + stand_ins.of('init')) == runs
        assert len(metrics.read()) == 1


def test_a_missing_package_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers.importlib.util, 'find_spec', lambda name: None)
    trackers.check(['tensorboard'])
    with pytest.raises(UserError, match=r"pip install 'fame_jax\[trackio\]'"):
        trackers.check(['tensorboard', 'trackio'])
    assert main([f'--workdir={tmp_path / "run"}', '--track=mlflow', '--progress=none']) == 2
    assert capsys.readouterr().err == (
        "error: --track=mlflow: mlflow is not installed; pip install 'fame_jax[mlflow]'\n"
    )
    assert not (tmp_path / 'run').exists()


def test_a_run_is_one_tracked_run_of_all_its_stages(stand_ins, tmp_path):
    """Fine-tuning goes on with the run of pre-training; each line of metrics.jsonl is sent once."""
    argv = [*SMALL_RUN, f'--workdir={tmp_path}', '--stages=prepare,pretrain,finetune']
    assert main([*argv, '--track=mlflow,trackio']) == 0
    lines = Metrics(tmp_path / 'metrics.jsonl').read()
    assert {line['stage'] for line in lines} == {'pretrain', 'finetune'} and len(lines) > 3
    expected = []
    for line in lines:
        names = [n for n in line if n not in ('stage', 'step', 'epoch', 'split')]
        values = {f'{line["stage"]}/{line["split"]}/{n}': line[n] for n in names}
        expected.append((line['step'], values))
    assert stand_ins.of('log') == expected
    ids = {run for run, *_ in stand_ins.of('log_metrics')}
    assert ids == {'id0'} and len(stand_ins.of('log_params')) == 1
    assert stand_ins.of('log_params')[0][1]['num_experts'] == '2'
    assert not (tmp_path / 'tensorboard').exists()
    assert len({name for _, name, *_ in stand_ins.of('init')}) == 1
