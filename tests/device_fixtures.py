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

EIGHT = jax.device_count() == 8
on_eight = pytest.mark.skipif(not EIGHT, reason='run by test_on_eight_devices')
# (data, model): the sizes of the axes of each mesh.
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]


def eight_devices():
    """This process's environment, and the flag that makes eight devices of one CPU."""
    flags = os.environ.get('XLA_FLAGS', '')
    return {**os.environ, 'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count=8'}


def run_on_eight(files, marked):
    """Run the tests of a file or of several that match a mark, in a process with eight devices."""
    files = [files] if isinstance(files, str) else files
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:xdist', '-p', 'no:cacheprovider']
    done = subprocess.run(
        [*command, '-m', marked, *files], env=eight_devices(), capture_output=True, text=True
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
