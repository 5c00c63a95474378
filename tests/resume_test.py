"""A run killed at any moment and started again ends as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = Path(__file__).parent.parent
STAGES = ('pretrain', 'finetune')

# Small, with several checkpoints inside each epoch, so that a kill falls anywhere.
FLAGS = [
    '--dataset=synthetic',
    '--synthetic_users=300',
    '--synthetic_items=60',
    '--width=16',
    '--num_experts=2',
    '--max_length=20',
    '--row_length=32',
    '--rows_per_step=4',
    '--pretrain_epochs=4',
    '--finetune_epochs=4',
    '--checkpoint_every=7',
    '--checkpoint_seconds=0',
    '--eval_users=128',
    '--progress=lines',
]


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    """One folder of compiled programs for all runs, so that a start takes seconds."""
    return tmp_path_factory.mktemp('xla')


def start(workdir, cache, *more):
    command = [sys.executable, '-m', 'fame_jax.main', *FLAGS, f'--workdir={workdir}']
    command += [f'--compilation_cache={cache}', *more]
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(workdir, cache, *more):
    process = start(workdir, cache, *more)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def final_arrays(workdir):
    """Every leaf of every stage's last checkpoint, by path."""
    found = {}
    for stage in STAGES:
        folder = workdir / 'checkpoints' / stage
        (step,) = (path for path in folder.iterdir() if path.name.isdigit())
        for item in ('params', 'optimizer', 'best'):
            tree = ocp.StandardCheckpointer().restore(step / item)
            for path, leaf in _leaves(tree):
                found[f'{stage}/{step.name}/{item}/{path}'] = np.asarray(leaf)
    return found


def _leaves(tree, path=''):
    if isinstance(tree, dict):
        tree = list(tree.items())
    elif isinstance(tree, (list, tuple)):
        tree = list(enumerate(tree))
    else:
        return [(path, tree)] if tree is not None else []
    return [leaf for name, sub in tree for leaf in _leaves(sub, f'{path}/{name}')]


def without_times(workdir):
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    timed = ('seconds', 'histories_per_second', 'compile_seconds')
    return [{k: v for k, v in json.loads(x).items() if k not in timed} for x in lines]


def assert_same(workdir, other):
    ours, theirs = final_arrays(workdir), final_arrays(other)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=path)
    assert without_times(workdir) == without_times(other)
    results = [json.loads((d / 'results.json').read_text())['results'] for d in (workdir, other)]
    assert results[0] == results[1]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory, cache):
    """The run that nobody killed, and the seconds it took with its programs compiled before."""
    finish(tmp_path_factory.mktemp('warm') / 'run', cache)
    workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
    began = time.monotonic()
    finish(workdir, cache)
    return workdir, time.monotonic() - began


def kill_when(process, seen, delay):
    """Sends SIGKILL some time after a line with `seen` came; false if the run ended first."""
    for line in process.stderr:
        if seen in line:
            break
    time.sleep(delay)
    alive = process.poll() is None
    process.kill()
    process.communicate()
    return alive


@pytest.mark.parametrize(
    'seed', [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))]
)
def test_killed_at_random_moments_in_each_stage_ends_bit_identical(
    seed, undisturbed, cache, tmp_path
):
    reference, _ = undisturbed
    workdir, draw = tmp_path / 'run', random.Random(seed)
    # While preparing, in the middle of both trainings, between epochs, and while judging.
    moments = [
        '',
        'pretrain:',
        'pretrain 1/',
        'pretrain',
        'finetune:',
        'finetune 2/',
        'finetune: best',
    ]
    killed = sum(kill_when(start(workdir, cache), seen, draw.uniform(0, 0.25)) for seen in moments)
    assert killed >= 6
    finish(workdir, cache)
    assert_same(workdir, reference)


@pytest.mark.slow
def test_a_checkpoint_at_every_step_changes_nothing(undisturbed, cache, tmp_path):
    """Also at the last step of an epoch, where two saves would meet."""
    finish(tmp_path / 'run', cache, '--checkpoint_every=1')
    assert_same(tmp_path / 'run', undisturbed[0])


def test_epochs_that_left_no_checkpoint_are_trained_again(undisturbed, cache, tmp_path):
    """Short epochs leave none; what a kill takes with it comes back the same."""
    few = '--checkpoint_every=0', '--checkpoint_seconds=1000'
    assert kill_when(start(tmp_path / 'run', cache, *few), 'pretrain 3/', 0)
    _, err = finish(tmp_path / 'run', cache, *few)
    assert 'pretrain: goes on at epoch 1, step 0' in err
    assert_same(tmp_path / 'run', undisturbed[0])


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_the_same_command_goes_on(number, undisturbed, cache, tmp_path):
    reference, _ = undisturbed
    workdir = tmp_path / 'run'
    process = start(workdir, cache, '--checkpoint_every=0')
    for line in process.stderr:
        if 'pretrain 1/' in line:
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert 'saved at step' in err and 'Traceback' not in err
    steps = [p.name for p in (workdir / 'checkpoints' / 'pretrain').iterdir() if p.name.isdigit()]
    assert f'saved at step {steps[0]};' in err
    finish(workdir, cache)
    assert_same(workdir, reference)


def test_a_finished_run_is_skipped_and_judged_the_same(undisturbed, cache):
    reference, _ = undisturbed
    before = (reference / 'results.json').read_text()
    _, err = finish(reference, cache)
    assert 'pretrain: finished before' in err and 'finetune: finished before' in err
    after = json.loads((reference / 'results.json').read_text())
    assert after['results'] == json.loads(before)['results']


def test_evaluate_restores_the_parameters_alone_also_on_other_devices(
    undisturbed, cache, monkeypatch
):
    reference, _ = undisturbed
    before = json.loads((reference / 'results.json').read_text())['results']
    for stage in STAGES:  # the optimizer's state is not needed: take it away
        (step,) = (p for p in (reference / 'checkpoints' / stage).iterdir() if p.name.isdigit())
        (step / 'optimizer').rename(step.parent.parent / f'{stage}_optimizer')
    monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=3')
    try:
        command = [sys.executable, '-m', 'fame_jax.main', '--stages=evaluate']
        done = subprocess.run(
            [*command, f'--workdir={reference}'], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    finally:
        for stage in STAGES:
            (step,) = (p for p in (reference / 'checkpoints' / stage).iterdir() if p.name.isdigit())
            (step.parent.parent / f'{stage}_optimizer').rename(step / 'optimizer')
    after = json.loads((reference / 'results.json').read_text())
    assert after['results'] == before
    assert after['card']['judged_on']['device']['count'] == 3
