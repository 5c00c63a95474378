"""Peak memory is that of the program alone."""

import sys

import jax
import pytest
from fixtures import run_python

from fame_jax import machine

SMALL = 'from fame_jax import machine; print(machine.peak_memory())'
LARGE = f"""
import subprocess, sys
used = bytearray(b'x') * 500_000_000
subprocess.run([sys.executable, '-c', {SMALL!r}], check=True)
"""


def test_the_peak_grows_with_the_memory_used():
    before = machine.peak_memory()
    used = bytearray(b'x') * (before + 100_000_000)
    assert machine.peak_memory() > len(used) > before


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere only getrusage says it')
def test_a_process_started_by_a_large_one_has_a_peak_of_its_own():
    assert 10_000_000 < int(run_python(LARGE)) < 450_000_000


def test_the_precision_of_products_is_described():
    with jax.default_matmul_precision(None):
        assert machine.describe()['matmul_precision'] == 'default'
    with jax.default_matmul_precision('float32'):
        assert machine.describe()['matmul_precision'] == 'float32'
