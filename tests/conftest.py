"""What every test stands on: strict arrays, parsed flags, and a small world."""

import sys

import jax
import pytest
from absl import flags

# A silent broadcast over ranks or a loose dtype is a bug here, not a convenience.
jax.config.update('jax_numpy_rank_promotion', 'raise')

# Programs run for milliseconds here and compile for seconds.
jax.config.update('jax_disable_most_optimizations', True)

# Grain reads an absl flag; libraries must find the flags parsed even though no main ran.
if not flags.FLAGS.is_parsed():
    flags.FLAGS(sys.argv[:1])


@pytest.fixture
def key():
    return jax.random.key(0)
