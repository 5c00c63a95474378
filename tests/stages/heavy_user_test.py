"""One user with a million actions: memory of a whole run, in a process of its own."""

import subprocess
import sys

import numpy as np
import pytest
from run_fixtures import make_world

RUN = """
import sys
from fame_jax import machine
from fame_jax.main import main
code = main(sys.argv[1:])
print('peak', machine.peak_memory())
sys.exit(code)
"""


def peak_of_a_run(folder, longest):
    """Bytes of a run on a history of so many items and a thousand of ten."""
    draw = np.random.default_rng(0)
    lengths = [10] * 1000 + [longest]
    make_world(folder, [draw.integers(1, 300, length) for length in lengths])
    argv = ['--model=sasrec', '--width=8', '--num_blocks=1', '--max_length=20', '--k_core=0']
    argv += ['--pretrain_epochs=1', '--rows_per_step=1024', '--progress=none']
    argv += ['--stages=pretrain,evaluate', f'--workdir={folder}']
    done = subprocess.run([sys.executable, '-c', RUN, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_a_history_of_a_million_items_takes_little_memory(tmp_path):
    """A row of seen items for each user of its batch would take 16 GB a split."""
    short, long = (peak_of_a_run(tmp_path / str(longest), longest) for longest in (10, 1_000_000))
    assert long < 2 * 2**30
    # A fixed number of bytes an action: its arrays, and the rows of an epoch.
    assert long - short < 900 * 1_000_000
