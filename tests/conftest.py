"""What every test stands on: strict arrays, programs compiled once, parsed flags, a random key."""

import os
import shutil
import sys
import tempfile

import jax
import pytest
from absl import flags

# A silent broadcast over ranks or a loose dtype is a bug here, not a convenience.
jax.config.update('jax_numpy_rank_promotion', 'raise')

# Programs run for milliseconds here and compile for seconds.
jax.config.update('jax_disable_most_optimizations', True)

# Many tests compile the same programs. All processes of a session, pytest's workers and those
# that tests start, share a folder of them: the first makes it and removes it at its end.
PROGRAMS = ''
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    PROGRAMS = tempfile.mkdtemp(prefix='fame_jax_tests_')
    for name, value in {
        'jax_compilation_cache_dir': PROGRAMS,
        'jax_persistent_cache_min_compile_time_secs': 0,
        'jax_persistent_cache_min_entry_size_bytes': -1,
    }.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)

# Grain reads an absl flag; libraries must find the flags parsed even though no main ran.
if not flags.FLAGS.is_parsed():
    flags.FLAGS(sys.argv[:1])


def pytest_unconfigure():
    if PROGRAMS:
        shutil.rmtree(PROGRAMS, ignore_errors=True)


@pytest.fixture
def key():
    return jax.random.key(0)
