"""LossOptions as a pytree: static choices, and one array."""

import jax
import jax.numpy as jnp
import numpy as np

from fame_jax.losses import LossOptions


def test_the_only_leaf_is_popularity():
    assert jax.tree.leaves(LossOptions()) == []
    popularity_V = jnp.array([0, 3, 4])
    options = LossOptions(loss='sampled', negatives='popularity', popularity_V=popularity_V)
    (leaf,) = jax.tree.leaves(options)
    assert leaf is popularity_V
    doubled = jax.tree.map(lambda x: 2 * x, options)
    np.testing.assert_array_equal(doubled.popularity_V, [0, 6, 8])
    assert (doubled.loss, doubled.negatives) == ('sampled', 'popularity')


def test_other_fields_are_static_under_jit():
    traced = []

    @jax.jit
    def total(options):
        traced.append(options.num_negatives)
        return options.popularity_V.sum()

    for num_negatives, counts in ((1, [0, 3, 4]), (1, [0, 5, 6]), (2, [0, 5, 6])):
        options = LossOptions(num_negatives=num_negatives, popularity_V=jnp.array(counts))
        assert total(options) == sum(counts)
    assert traced == [1, 2]
