"""Tests on eight devices, which XLA simulates on the CPU.

It does so only in a process that sets XLA_FLAGS before JAX starts. Tests with the mark `on_eight`
are skipped elsewhere; a test without that mark calls `run_on_eight` on their files.
"""

import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

DEVICES = '--xla_force_host_platform_device_count'
EIGHT = jax.device_count() == 8
on_eight = pytest.mark.skipif(not EIGHT, reason='run by test_on_eight_devices')
# (data, model): the sizes of the axes of each mesh.
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]


def environment_of(devices):
    """This process's environment, and the flag that makes so many devices of one CPU."""
    flags = [flag for flag in os.environ.get('XLA_FLAGS', '').split() if DEVICES not in flag]
    return {**os.environ, 'XLA_FLAGS': ' '.join([*flags, f'{DEVICES}={devices}'])}


def run_on_eight(files, marked):
    """Run the tests of a file or of several that match a mark, in a process with eight devices."""
    files = [files] if isinstance(files, str) else files
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:xdist', '-p', 'no:cacheprovider']
    done = subprocess.run(
        [*command, '-m', marked, *files], env=environment_of(8), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'passed' in done.stdout


def collectives(compiled):
    """(kind, elements of the largest operand) of each collective in a compiled program."""
    sent = []
    pattern = r'= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\('
    for shapes, kind in re.findall(pattern, compiled.as_text()):
        sizes = [
            int(np.prod([int(n) for n in dims.split(',') if n] or [1]))
            for dims in re.findall(r'\w+\[([\d,]*)\]', shapes)
        ]
        sent.append((kind, max(sizes)))
    return sent
