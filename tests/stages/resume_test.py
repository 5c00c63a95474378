"""A run that was interrupted at any moment and started again ends bit-identical.

Most interruptions are raised in this process before a block of steps, at which the files are those
that a kill leaves. Some tests kill another process by a signal.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from device_fixtures import environment_of
from fixtures import ROOT

from fame_jax.config.flags import read as read_flags
from fame_jax.main import main
from fame_jax.training.step import Program

STAGES = ('pretrain', 'finetune')
EPOCHS, BLOCK = 2, 4
FLAGS = [
    *('--synthetic=users=150,items=60', '--width=8', '--num_blocks=1', '--num_experts=2'),
    *('--max_length=20', '--row_length=32', '--rows_per_step=4', '--progress=lines'),
    *(f'--pretrain_epochs={EPOCHS}', f'--finetune_epochs={EPOCHS}'),
    f'--steps_per_dispatch={BLOCK}',
    *('--future_targets=1,.5', '--finetune_future_targets=1,.2', '--seen_weight=3', '--ema=.9'),
    *('--model_options=head_loss=.3', '--finetune_dropout=.4', '--warmup_epochs=.5'),
]
EVERY_BLOCK = ['--checkpoint_seconds=0']
PRETRAIN = '--stages=prepare,pretrain'
SMALLER_BLOCKS = [*EVERY_BLOCK, '--steps_per_dispatch=3']
FEW = ['--checkpoint_seconds=1000']


def run(workdir, *more):
    """The exit code of main in this process."""
    return main([*FLAGS, f'--workdir={workdir}', *more])


def start(workdir, *more, devices=1):
    """Another process with the same compiled programs."""
    return subprocess.Popen(
        [sys.executable, '-m', 'fame_jax.main', *FLAGS, f'--workdir={workdir}', *more],
        cwd=ROOT,
        env=environment_of(devices) | {'JAX_PLATFORMS': 'cpu'},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def step_folder(workdir, stage):
    """The folder of a stage's only checkpoint."""
    folder = workdir / 'checkpoints' / stage
    (step,) = (path for path in folder.iterdir() if path.name.isdigit())
    return step


def final_arrays(workdir, stages):
    """Every leaf of the stages' last checkpoints, by path."""
    arrays = {}
    for stage in stages:
        step = step_folder(workdir, stage)
        for item in ('params', 'optimizer', 'best'):
            tree = ocp.StandardCheckpointer().restore(step / item)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                name = f'{stage}/{step.name}/{item}/{jax.tree_util.keystr(path)}'
                arrays[name] = np.asarray(leaf)
    return arrays


def without_times(workdir, stages):
    lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    timed = ('seconds', 'histories_per_second', 'compile_seconds')
    return [{k: v for k, v in x.items() if k not in timed} for x in lines if x['stage'] in stages]


def results(workdir):
    return json.loads((workdir / 'results.json').read_text())['results']


def assert_same(workdir, other, stages=STAGES):
    arrays, others = final_arrays(workdir, stages), final_arrays(other, stages)
    assert arrays.keys() == others.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(array, others[path], err_msg=path)
    assert without_times(workdir, stages) == without_times(other, stages)
    if stages == STAGES:
        assert results(workdir) == results(other)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """The folder of a run without interruption."""
    workdir = tmp_path_factory.mktemp('uninterrupted') / 'run'
    assert run(workdir, *FEW) == 0
    return workdir


class Kill(BaseException):
    """Ends main as a kill does, without a checkpoint."""


@pytest.fixture
def at_block(monkeypatch):
    """(number, action) -> calls the action before the block of this number, counted from 1."""
    take_block = Program.__call__

    def install(number, action):
        calls = []

        def take_or_act(self, *args):
            calls.append(1)
            if len(calls) == number:
                action()
            return take_block(self, *args)

        monkeypatch.setattr(Program, '__call__', take_or_act)

    return install


def kill():
    raise Kill


def test_a_run_interrupted_in_every_epoch_ends_bit_identical(
    uninterrupted, at_block, tmp_path, capsys
):
    steps = int(step_folder(uninterrupted, 'pretrain').name) // EPOCHS  # of an epoch
    blocks = -(-steps // BLOCK)
    assert blocks == 3 and steps % BLOCK  # the last block is shorter
    # The block before which a command is killed, and where the next command resumes.
    kills = [
        # In epoch 2; the only checkpoint is the one before the first step.
        (blocks + 2, [*FEW, PRETRAIN], 'pretrain: resumes at epoch 1, step 0'),
        # In epoch 2, after a block.
        (
            blocks + 2,
            [*EVERY_BLOCK, PRETRAIN],
            f'pretrain: resumes at epoch 2, step {steps + BLOCK}',
        ),
        # After the rest of pretrain in smaller blocks, in epoch 2 of finetune.
        (
            -(-(steps - BLOCK) // 3) + -(-steps // 3) + 2,
            SMALLER_BLOCKS,
            f'finetune: resumes at epoch 2, step {steps + 3}',
        ),
    ]
    for number, flags, _ in kills:
        at_block(number, kill)
        with pytest.raises(Kill):
            run(tmp_path, *flags)
    at_block(0, kill)  # never
    assert run(tmp_path, *FEW) == 0
    printed = re.findall(r'^\w+: resumes .*', capsys.readouterr().err, re.MULTILINE)
    assert printed == [line for *_, line in kills]
    assert_same(tmp_path, uninterrupted)


def test_sigterm_saves_first_and_the_same_command_resumes(
    uninterrupted, at_block, tmp_path, capsys
):
    at_block(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(tmp_path, *FEW, PRETRAIN) == 128 + signal.SIGTERM
    step = step_folder(tmp_path, 'pretrain').name
    error = capsys.readouterr().err
    assert f'stopped by SIGTERM in pretrain: saved at step {step};' in error
    assert int(step) == 2 * BLOCK
    assert run(tmp_path, *FEW, PRETRAIN) == 0
    assert_same(tmp_path, uninterrupted, ['pretrain'])


def kill_when(process, seen, delay):
    """Kills a process some time after it has printed `seen`; False if it ended before."""
    for line in process.stderr:
        if seen in line:
            break
    time.sleep(delay)
    alive = process.poll() is None
    process.kill()
    process.communicate()
    return alive


@pytest.mark.slow
def test_a_killed_process_leaves_a_run_that_ends_bit_identical(uninterrupted, tmp_path):
    assert kill_when(start(tmp_path, *EVERY_BLOCK), 'pretrain 1/', 0)
    assert run(tmp_path, *FEW, PRETRAIN) == 0
    assert_same(tmp_path, uninterrupted, ['pretrain'])


# In preparation, in the middle of both trainings, between epochs, and in the evaluation.
MOMENTS = ['', 'pretrain:', 'pretrain 1/', 'pretrain', 'finetune:', 'finetune 1/', 'finetune: best']


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, pytest.param(1, marks=pytest.mark.fuzz)])
def test_processes_killed_at_random_moments(seed, uninterrupted, tmp_path):
    draw = random.Random(seed)
    killed = [
        kill_when(start(tmp_path, *EVERY_BLOCK), seen, draw.uniform(0, 0.25)) for seen in MOMENTS
    ]
    assert sum(killed) >= len(MOMENTS) - 1
    assert run(tmp_path, *FEW) == 0
    assert_same(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_process_saves_first(number, uninterrupted, tmp_path):
    process = start(tmp_path, *FEW)
    for line in process.stderr:
        if 'pretrain 1/' in line:
            break
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert 'Traceback' not in error
    assert f'saved at step {step_folder(tmp_path, "pretrain").name};' in error
    assert run(tmp_path, *FEW) == 0
    assert_same(tmp_path, uninterrupted)


@pytest.mark.slow
def test_a_checkpoint_after_every_step_changes_nothing(uninterrupted, tmp_path):
    """Also after the last step of an epoch, which the epoch's own checkpoint follows."""
    assert run(tmp_path, *EVERY_BLOCK, '--steps_per_dispatch=1') == 0
    assert_same(tmp_path, uninterrupted)


def test_finished_stages_are_skipped_and_evaluated_again(uninterrupted, tmp_path, capsys):
    """The evaluation needs no optimizer state."""
    workdir = tmp_path / 'run'
    shutil.copytree(uninterrupted, workdir)
    for stage in STAGES:
        shutil.rmtree(step_folder(workdir, stage) / 'optimizer')
    (workdir / 'results.json').unlink()
    assert run(workdir) == 0
    error = capsys.readouterr().err
    assert 'pretrain: finished before' in error and 'finetune: finished before' in error
    assert results(workdir) == results(uninterrupted)
    assert without_times(workdir, STAGES) == without_times(uninterrupted, STAGES)


def test_more_epochs_give_the_run_that_had_them_from_the_start(uninterrupted, tmp_path, capsys):
    assert run(tmp_path, *FEW, PRETRAIN, '--pretrain_epochs=1') == 0
    assert run(tmp_path, *FEW, '--finetune_epochs=1') == 0
    assert 'pretrain: goes on after epoch 1\n' in capsys.readouterr().err
    assert run(tmp_path, *FEW) == 0
    printed = capsys.readouterr().err
    assert 'pretrain: finished before' in printed
    assert 'finetune: goes on after epoch 1\n' in printed
    assert_same(tmp_path, uninterrupted)
    assert results(tmp_path) == results(uninterrupted)
    values = read_flags(tmp_path / 'flags.cfg')
    assert (values['pretrain_epochs'], values['finetune_epochs']) == (EPOCHS, EPOCHS)


@pytest.mark.parametrize(
    'flags',
    [
        ['--pretrain_epochs=3'],  # finetune began from the backbone of two
        ['--pretrain_epochs=1'],
        ['--finetune_epochs=1'],
        ['--patience=9'],
        ['--finetune_epochs=3', '--stages=evaluate'],  # which does not train
        ['--finetune_epochs=3', '--stages=prepare,pretrain'],
    ],
)
def test_limits_that_may_not_change(flags, uninterrupted, capsys):
    before = (uninterrupted / 'flags.cfg').read_text()
    assert run(uninterrupted, *flags) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and f'{flags[0]} (there: ' in error and 'may only grow' in error
    assert (uninterrupted / 'flags.cfg').read_text() == before


@pytest.mark.slow
def test_a_process_with_more_devices_evaluates_the_same(uninterrupted, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(uninterrupted, workdir)
    process = start(workdir, '--stages=evaluate', devices=3)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    card = json.loads((workdir / 'results.json').read_text())['card']
    assert card['evaluated_on']['device']['count'] == 3
    assert results(workdir) == results(uninterrupted)
