"""Ranker: all users of a split by one model, with programs compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import make_eval_batches

from fame_jax.evaluation import ranking
from fame_jax.evaluation.ranker import Ranker
from fame_jax.parallel import mesh as mesh_lib

NUM_ITEMS = 5


class LastItem:
    """A model whose query is its table's row of the last item; item vectors are unit vectors."""

    num_items, mesh = NUM_ITEMS, None

    def __init__(self):
        self.traced = []  # shapes of the batches for which `encode` was traced

    def apply(self, variables, *rows, method=None, last=False):
        table_VV = variables['params']['table']
        if method == 'item_vectors':
            return jnp.eye(len(table_VV))
        assert last
        tokens_BL, _, _ = rows
        self.traced.append(tokens_BL.shape)
        return table_VV[tokens_BL[:, -1:]], {}

    @staticmethod
    def combine(score_BQV):
        return score_BQV[:, 0]


def make_ranker(seed=0):
    """A ranker of three users and two splits, its model and random scores of its parameters."""
    table_VV = np.random.default_rng(seed).normal(size=(NUM_ITEMS + 1, NUM_ITEMS + 1))
    params = {'table': jnp.asarray(table_VV, jnp.float32)}
    eval_batches = {
        'validation': make_eval_batches([[1], [4], [5]], [2, 3, 2]),
        'test': make_eval_batches([[1, 2], [4, 3], [5, 2]], [3, 1, 4]),
    }
    model = LastItem()
    return Ranker(model, mesh_lib.abstract(params, None), eval_batches), model, params


def test_ranks_are_those_of_the_scores():
    ranker, _, params = make_ranker()
    table_VV = np.asarray(params['table'])
    ranks = ranker(params, 'test')
    for user, (history, target) in enumerate([([1, 2], 3), ([4, 3], 1), ([5, 2], 4)]):
        score_V = table_VV[history[-1]]
        ahead = [v for v in range(1, NUM_ITEMS + 1) if score_V[v] >= score_V[target]]
        assert ranks.unmasked[user] == len(ahead)
        assert ranks.masked[user] == len(set(ahead) - set(history))


def test_each_shape_is_compiled_once_and_ahead():
    ranker, model, params = make_ranker()
    ranker.precompile('test')
    assert model.traced == [(2, 8)]  # both splits have batches of two users and eight positions
    for split in ('test', 'validation', 'test'):
        ranker(params, split)
    ranker(jax.tree.map(lambda x: -x, params), 'validation')
    assert model.traced == [(2, 8)]


def test_other_parameters_give_other_ranks():
    ranker, _, params = make_ranker()
    ranks = ranker(params, 'test')
    reverse = ranker(jax.tree.map(lambda x: -x, params), 'test')
    np.testing.assert_array_equal(ranks.unmasked + reverse.unmasked, [NUM_ITEMS + 1] * 3)


def test_a_nan_is_an_error():
    ranker, _, params = make_ranker()
    with pytest.raises(FloatingPointError, match='NaN'):
        ranker({'table': params['table'].at[2, 1].set(jnp.nan)}, 'test')


def test_ranks_are_of_type_ranks():
    ranker, _, params = make_ranker()
    assert isinstance(ranker(params, 'validation'), ranking.Ranks)


def test_a_sample_of_users_has_their_ranks():
    """A split may have any number of users; its ranks are in their order."""
    table_VV = jnp.asarray(np.random.default_rng(1).normal(size=(NUM_ITEMS + 1, NUM_ITEMS + 1)))
    params = {'table': table_VV.astype(jnp.float32)}
    histories, targets = [[1, 2], [4, 3], [5, 2], [1]], [3, 1, 4, 5]
    splits = {
        'all': make_eval_batches(histories, targets),
        'some': make_eval_batches(histories[1::2], targets[1::2]),
    }
    ranker = Ranker(LastItem(), mesh_lib.abstract(params, None), splits)
    everyone, some = ranker(params, 'all'), ranker(params, 'some')
    np.testing.assert_array_equal(some.masked, everyone.masked[1::2])
    np.testing.assert_array_equal(some.unmasked, everyone.unmasked[1::2])
