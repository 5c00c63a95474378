"""Whole runs on several devices and in several processes give the results of one device."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from device_fixtures import EIGHT, MESHES, environment_of, on_eight
from run_fixtures import largest_difference

from fame_jax import stages
from fame_jax.config import flags
from fame_jax.main import main
from fame_jax.training.step import Program

# Training runs take minutes.
pytestmark = pytest.mark.slow

FLAGS = [
    *('--synthetic=users=120,items=45', '--k_core=0', '--width=8'),
    *('--pretrain_epochs=2', '--finetune_epochs=2', '--num_experts=2', '--max_length=12'),
    *('--rows_per_step=8', '--row_length=16', '--loss_chunk=7,0', '--progress=lines'),
    '--num_blocks=1',
]


def metrics_lines(folder, split='validation'):
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [line for line in lines if line['split'] == split]


def assert_same_run(one, other):
    """Losses and parameters to float tolerance, metrics exactly."""
    for line, same in zip(metrics_lines(one, 'train'), metrics_lines(other, 'train'), strict=True):
        assert (line['stage'], line['epoch']) == (same['stage'], same['epoch'])
        np.testing.assert_allclose(line['loss'], same['loss'], rtol=1e-5)
    results = [
        json.loads((folder / 'results.json').read_text())['results'] for folder in (one, other)
    ]
    for stage in ('popularity', 'item_graph', 'pretrain', 'finetune'):
        assert results[0][stage]['test'] == results[1][stage]['test']
    assert largest_difference(best_params(one), best_params(other)) < 2e-4


def best_params(folder):
    """The best parameters of fine-tuning, restored on one device."""
    run = stages.open_run(flags.parse([f'--workdir={folder}', '--stages=recommend']))
    return run.best_params('finetune', run.module('finetune'))


@pytest.fixture(scope='module')
def one_device(tmp_path_factory):
    """The workdir of a run on one device."""
    folder = tmp_path_factory.mktemp('one_device')
    assert main([*FLAGS, f'--workdir={folder}']) == 0
    return folder


@on_eight
@pytest.mark.parametrize('data, model', MESHES)
def test_a_run_on_a_mesh_is_that_of_one_device(data, model, one_device, tmp_path):
    mesh = [f'--data_parallel={data}', f'--model_parallel={model}']
    assert main([*FLAGS, *mesh, f'--workdir={tmp_path}']) == 0
    assert_same_run(one_device, tmp_path)


@on_eight
def test_a_run_resumes_on_other_devices(one_device, tmp_path):
    """Pre-trained on 2 x 4 devices, fine-tuned on 4 x 1, evaluated on 1 x 8 and on one."""
    steps = [
        ['--stages=prepare,pretrain', '--data_parallel=2', '--model_parallel=4'],
        ['--stages=pretrain,finetune', '--data_parallel=4', '--model_parallel=1'],
        ['--stages=evaluate', '--model_parallel=8'],
        ['--stages=evaluate'],
    ]
    for step in steps:
        assert main([*FLAGS, *step, f'--workdir={tmp_path}']) == 0
        if 'evaluate' in step[0]:
            assert_same_run(one_device, tmp_path)


@on_eight
def test_a_run_resumes_inside_an_epoch_on_another_mesh(one_device, tmp_path, monkeypatch):
    """Stopped after two blocks on 2 x 4, resumed on 4 x 2, with other padding rows."""
    argv = [*FLAGS, f'--workdir={tmp_path}', '--steps_per_dispatch=1']
    calls = []

    take_block = Program.__call__
    with monkeypatch.context() as patch:

        def call(self, state, block, key):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return take_block(self, state, block, key)

        patch.setattr(Program, '__call__', call)
        assert main([*argv, '--data_parallel=2', '--model_parallel=4']) == 128 + signal.SIGTERM
    assert main([*argv, '--data_parallel=4', '--model_parallel=2']) == 0
    assert_same_run(one_device, tmp_path)


def start_two(folder, *more, devices=4):
    """Starts two processes of one run with so many devices each; their output goes to files."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    # Both compile the same programs at once, and could read a half-written cache entry.
    environment = environment_of(devices) | {'JAX_ENABLE_COMPILATION_CACHE': 'false'}
    command = [sys.executable, '-m', 'fame_jax.main', *FLAGS, *more, f'--workdir={folder}']
    processes = []
    for i in range(2):
        with open(folder / f'output{i}', 'w') as output:
            processes.append(
                subprocess.Popen(
                    [*command, f'--distributed=127.0.0.1:{port},{i}/2'],
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes


def wait_for(folder, line, seconds=240):
    """Waits until the first process has printed the line."""
    end = time.monotonic() + seconds
    while line not in (folder / 'output0').read_text():
        assert time.monotonic() < end, (folder / 'output0').read_text()
        time.sleep(0.1)


def wait_for_exit(processes, seconds=240):
    """The exit codes of the processes."""
    try:
        return [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.skipif(EIGHT, reason='starts processes with devices of their own')
def test_two_processes_are_one_run(one_device, tmp_path):
    processes = start_two(tmp_path, '--data_parallel=4', '--model_parallel=2')
    assert wait_for_exit(processes) == [0, 0], (tmp_path / 'output0').read_text()
    assert_same_run(one_device, tmp_path)
    assert 'HR@10' not in (tmp_path / 'output1').read_text()  # only the chief prints


LONG = ['--stages=prepare,pretrain', '--pretrain_epochs=400', '--patience=400']


@pytest.mark.skipif(EIGHT, reason='starts processes with devices of their own')
def test_sigterm_to_one_process_saves_and_stops_both(tmp_path):
    long = [*LONG, '--data_parallel=1', '--model_parallel=8']
    processes = start_two(tmp_path, *long)
    wait_for(tmp_path, 'pretrain 2/400')
    processes[1].send_signal(signal.SIGTERM)
    assert wait_for_exit(processes) == [128 + signal.SIGTERM] * 2
    assert 'stopped by SIGTERM in pretrain: saved at step' in (tmp_path / 'output0').read_text()
    epochs = len(metrics_lines(tmp_path, 'train'))
    processes = start_two(tmp_path, *long)
    wait_for(tmp_path, 'resumes at epoch')
    wait_for(tmp_path, f'pretrain {epochs + 2}/400')
    processes[0].send_signal(signal.SIGINT)
    assert wait_for_exit(processes) == [128 + signal.SIGTERM] * 2


@pytest.mark.skipif(EIGHT, reason='starts processes with devices of their own')
@pytest.mark.parametrize('dies', [0, 1])
def test_the_death_of_one_process_stops_the_other(dies, tmp_path):
    processes = start_two(tmp_path, *LONG, '--data_parallel=4', '--model_parallel=2')
    wait_for(tmp_path, 'pretrain 2/400')
    processes[dies].kill()
    assert wait_for_exit(processes, 90)[1 - dies] not in (0, None)
    output = (tmp_path / f'output{1 - dies}').read_text()
    assert 'another task died' in output
    epochs = len(metrics_lines(tmp_path, 'train'))
    shorter = ['--stages=pretrain', f'--pretrain_epochs={epochs + 2}', '--patience=400']
    others = [flag for flag in FLAGS if 'epochs' not in flag]
    text = (tmp_path / 'flags.cfg').read_text()
    (tmp_path / 'flags.cfg').write_text(re.sub('--pretrain_epochs=.*', shorter[1], text))
    assert main([*others, *shorter, f'--workdir={tmp_path}']) == 0
    assert len(metrics_lines(tmp_path, 'train')) == epochs + 2
