"""Runs as processes: what is run and when, how it ends, and what is told of it."""

import json
import subprocess

import pytest
from runs_test import finish, runs_of

from benchmarks import children
from benchmarks.runs import MODELS


class Fake:
    """A runner without processes: each run takes so many looks, and leaves what a run leaves."""

    def __init__(self, tmp_path, codes=(), looks=2, seconds=10.0):
        self.folder, self.codes, self.looks = tmp_path, dict(codes), looks
        self.events, self.at_once, self.most, self.seconds = [], 0, 0, seconds
        self.hook = lambda run: None

    def __call__(self, run, jobs):
        self.events.append(('begin', run.workdir.name))
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        self.hook(run)
        return FakeProcess(self, run)


class FakeProcess:
    def __init__(self, fake, run):
        self.fake, self.run, self.left, self.heard = fake, run, fake.looks, []

    def poll(self):
        self.left -= 1
        if self.left and not self.heard:
            return None
        fake, name = self.fake, self.run.workdir.name
        code = 128 + self.heard[0] if self.heard else fake.codes.get(name, 0)
        if code == 0:
            finish(fake.folder, self.run.model, self.run.seed, seconds=fake.seconds)
        elif code != 128:
            self.run.log.parent.mkdir(parents=True, exist_ok=True)
            self.run.log.write_text('epoch 1\nerror: the reason\n\n')
        fake.at_once -= 1
        fake.events.append(('end', name))
        return code

    def send_signal(self, number):
        self.heard.append(number)


def begun(fake):
    return [name for event, name in fake.events if event == 'begin']


def run(tmp_path, fake, *flags, jobs=1):
    return children.run_all(runs_of(tmp_path, *flags), jobs, fake, pause=0)


def test_what_is_done_is_skipped_and_what_is_half_done_goes_on(tmp_path):
    finish(tmp_path, 'sasrec', 0)
    (tmp_path / 'toys' / 'fame_seed0').mkdir()  # begun: its checkpoints are the child's business
    fake = Fake(tmp_path)
    assert run(tmp_path, fake, '--models=fame', '--seeds=0,1') == ({}, None)
    assert begun(fake) == ['fame_seed0', 'sasrec_seed1', 'fame_seed1']
    fake = Fake(tmp_path)
    assert run(tmp_path, fake, '--models=fame', '--seeds=0,1') == ({}, None)
    assert fake.events == []


@pytest.mark.parametrize('jobs', [1, 2, 5])
def test_so_many_run_at_once_and_none_before_its_backbone(tmp_path, jobs):
    fake = Fake(tmp_path, looks=3)
    flags = ('--models=fame,core,fame_bert4rec', '--seeds=0,1')
    assert run(tmp_path, fake, *flags, jobs=jobs) == ({}, None)
    assert sorted(begun(fake)) == sorted(r.workdir.name for r in runs_of(tmp_path, *flags))
    assert fake.most == jobs
    for name, model in MODELS.items():
        for seed in (0, 1) if model.backbone else ():
            begin = fake.events.index(('begin', f'{name}_seed{seed}'))
            assert fake.events.index(('end', f'{model.backbone}_seed{seed}')) < begin


def test_what_needs_a_failed_run_is_not_run(tmp_path):
    fake = Fake(tmp_path, codes={'sasrec_seed0': 1})
    found, stopped = run(tmp_path, fake, '--models=fame,core', '--seeds=0')
    assert begun(fake) == ['sasrec_seed0', 'core_seed0'] and stopped is None
    assert list(found) == ['toys/sasrec_seed0', 'toys/fame_seed0']
    assert found['toys/sasrec_seed0'].endswith('ends with: error: the reason')
    assert found['toys/fame_seed0'] == 'not run, since sasrec_seed0 failed'


def test_a_child_that_leaves_no_verdict_has_failed(tmp_path):
    true = subprocess.Popen(['true'])
    runs = runs_of(tmp_path, '--models=core', '--seeds=0')
    found, _ = children.run_all(runs, 1, lambda *_: true, pause=0)
    assert found == {'toys/core_seed0': 'ended without a verdict'}


def test_a_child_that_cannot_be_started_fails_alone(tmp_path):
    (tmp_path / 'toys').write_text('a file where a folder should be')
    found, _ = children.run_all(
        runs_of(tmp_path, '--models=core', '--seeds=0,1'), 1, children.start_child, 0
    )
    assert list(found) == ['toys/core_seed0', 'toys/core_seed1']
    assert all('choose another --folder' in why for why in found.values())


def test_a_real_child_has_its_screen_in_the_log_and_its_command_written_down(tmp_path):
    (one,) = runs_of(tmp_path, '--models=core', '--seeds=0', '--extra=--help')
    for jobs, most in ((3, 3), (1, 3)):
        assert children.start_child(one, jobs).wait() == 0
        told = json.loads((one.workdir / 'command.json').read_text())
        assert told['jobs'] == most and told['command'].startswith('-m fame_jax.main --flagfile=')
    assert one.log.read_text().count('usage: python -m fame_jax.main') == 2
