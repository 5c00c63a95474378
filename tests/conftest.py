"""Settings of all tests: strict arrays, a cache of compiled programs, parsed flags."""

import gc
import os
import sys
from pathlib import Path

import hypothesis
import jax
import pytest
from absl import flags

# pytest explains the failed assertions of these modules as it does those of test files.
pytest.register_assert_rewrite(
    *('oracles', 'fixtures', 'model_checks', 'run_fixtures', 'device_fixtures', 'clock_fixtures'),
    'service_fixtures',
)

# Arrays of different rank do not broadcast: in these formulas that would be a bug.
jax.config.update('jax_numpy_rank_promotion', 'raise')

# Programs of tests run for milliseconds and compile for seconds: fewer optimizations, and the code
# generators that compile twice as fast, in the processes that tests start too. A jaxlib that lacks
# a flag ends the process, so the flags are of the version in which they were measured.
jax.config.update('jax_disable_most_optimizations', True)
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
FAST_COMPILATION = '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
if jax.__version__.startswith('0.10.') and FAST_COMPILATION not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {FAST_COMPILATION}'.strip()

# Compiled programs are kept between sessions, and shared with the processes that tests start;
# `make clean` removes them.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    for name, value in {
        'jax_compilation_cache_dir': str(Path(__file__).resolve().parents[1] / '.jax_cache'),
        'jax_persistent_cache_min_compile_time_secs': 0,
        'jax_persistent_cache_min_entry_size_bytes': -1,
    }.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)

# The same examples in each session, however slow the machine is;
# `pytest --hypothesis-profile=default` draws new ones.
hypothesis.settings.register_profile('repeatable', derandomize=True, deadline=None)
hypothesis.settings.load_profile('repeatable')

# Grain reads an absl flag, which no main parses here.
if not flags.FLAGS.is_parsed():
    flags.FLAGS(sys.argv[:1])


# Linux lets a process have 65,530 mappings by default; XLA maps a few for each compiled program,
# and a program that cannot be mapped is a segmentation fault.
MAX_MAPPINGS = 20_000


@pytest.fixture(scope='module', autouse=True)
def drop_programs():
    """Drops the compiled programs of earlier test files before the kernel refuses to map more."""
    yield
    mappings = Path('/proc/self/maps')
    if mappings.exists() and mappings.read_bytes().count(b'\n') > MAX_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(scope='module')
def tiny_run(tmp_path_factory):
    """(model) -> a run with data and without training, its module and random parameters."""
    # Imported here, so that tests without a run do not wait for it.
    from run_fixtures import open_tiny_run

    return lambda model: open_tiny_run(model, tmp_path_factory.mktemp(model))
