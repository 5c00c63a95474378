"""The facet objective: sampling, which heads an update moves, and that heads separate facets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fame_jax.errors import UserError
from fame_jax.evaluation import facet_probe
from fame_jax.text import facet_objective, projection
from fame_jax.text.facets import Facet
from fame_jax.text.options import TextOptions

OPTIONS = TextOptions(
    epochs=2,
    learning_rate=1e-2,
    labels_per_step=4,
    items_per_label=3,
    temperature=0.1,
    inner_width=16,
)
LABELS = np.array(
    # Padding, three items with label 0, two with 1, one with 2, one with both 0 and 1, one without.
    [[-1, -1], [0, -1], [0, -1], [0, -1], [1, -1], [1, -1], [2, -1], [0, 1], [-1, -1]]
)
HEADS = ['facet_1', 'facet_2']


@functools.cache
def world(items=120, values=4, noise=0.3):
    """Text vectors that mix one-hot codes of two facets with noise; and the facets."""
    rng = np.random.default_rng(0)
    label_MV = np.stack([rng.permutation(items) % values for _ in HEADS])
    hot_VE = np.concatenate([np.eye(values)[label_V] for label_V in label_MV], axis=1)
    mix_EE = rng.normal(size=(hot_VE.shape[1],) * 2)
    text_VE = (hot_VE + noise * rng.normal(size=hot_VE.shape)) @ mix_EE
    text_VE = np.concatenate([np.zeros((1, text_VE.shape[1])), text_VE]).astype(np.float32)
    names = [str(value) for value in range(values)]
    facets = [
        Facet(name, names, np.concatenate([[-1], label_V])[:, None], {})
        for name, label_V in zip(HEADS, label_MV)
    ]
    return text_VE, facets


def fit(heads=HEADS, report=lambda epoch, loss_H: None, seed=0, **options):
    text_VE, facets = world()
    options = dataclasses.replace(OPTIONS, **options)
    return facet_objective.fit_heads(
        text_VE, heads, facets, width=16, options=options, seed=seed, report=report
    )


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)))


def test_a_pool_lists_the_items_of_each_label():
    pool = facet_objective.make_pool(LABELS)
    assert pool.count_C.tolist() == [4, 3, 1]
    members = [
        sorted(pool.member_I[first : first + count].tolist())
        for first, count in zip(pool.first_C, pool.count_C)
    ]
    assert members == [[1, 2, 3, 7], [4, 5, 7], [6]]


def test_a_batch_has_items_of_distinct_labels_with_two_items_or_more(key):
    pool = facet_objective.make_pool(LABELS)
    for k in jax.random.split(key, 20):
        item_B, weight_BB, compared_BB = jax.device_get(facet_objective.draw(k, pool, 2, 3))
        shared = [
            set.intersection(*({*LABELS[i]} - {-1} for i in row)) for row in item_B.reshape(2, 3)
        ]
        assert {*item_B} <= {1, 2, 3, 4, 5, 7}
        assert len(set.union(*shared)) == 2
        np.testing.assert_array_equal(compared_BB, item_B[:, None] != item_B[None])
        for b, i in enumerate(item_B):
            for c, j in enumerate(item_B):
                one, other = {*LABELS[i]} - {-1}, {*LABELS[j]} - {-1}
                assert weight_BB[b, c] == len(one & other) / len(one | other)


def test_a_facet_with_few_labels_gives_more_items_of_each(key):
    item_B, _, _ = facet_objective.draw(key, facet_objective.make_pool(LABELS), 6, 4)
    assert item_B.shape == (6 * 4,)
    label_sets = [{*LABELS[i]} - {-1} for i in np.asarray(item_B)]
    assert sum(0 in labels for labels in label_sets) >= 8


def test_labels_are_drawn_by_the_root_of_their_frequency(key):
    pool = facet_objective.make_pool(np.array([[-1]] + [[0]] * 16 + [[1]] * 4))
    drawn = jax.vmap(lambda k: facet_objective.draw(k, pool, 1, 1)[0])(jax.random.split(key, 3000))
    share, expected = np.mean(np.asarray(drawn) <= 16), 4 / (4 + 2)
    assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / 3000)


def test_an_instance_batch_has_each_item_twice_and_no_other_positives(key):
    pool = facet_objective.make_instance_pool(np.array([False, True, True, False, True]))
    item_B, weight_BB, compared_BB = jax.device_get(facet_objective.draw(key, pool, 3, 2))
    assert item_B.shape == (6,) and {*item_B.tolist()} <= {1, 2, 4}
    np.testing.assert_array_equal(item_B[:3], item_B[3:])
    np.testing.assert_array_equal(weight_BB, item_B[:, None] == item_B)
    assert np.all(compared_BB)


def test_a_facet_without_a_pair_is_refused():
    _, facets = world()
    has_text_V = np.arange(len(facets[0].label_VS)) == 1
    with pytest.raises(UserError, match="facet 'facet_1': no two items with a text share a label"):
        facet_objective.make_pools(['instance', 'facet_1'], facets, has_text_V)


@pytest.mark.parametrize('h', [0, 1])
def test_an_update_moves_its_own_head_only(h):
    text_VE, facets = world()
    module = projection.Projection(2, 16, OPTIONS.inner_width)
    params = module.init(jax.random.key(0), text_VE[:1])['params']
    optimizer = optax.adam(0.1)
    scan = facet_objective.make_scan(module, optimizer, [[h]], OPTIONS)
    moments = {name: optimizer.init(params[name]) for name in params}
    pools = tuple(facet_objective.make_pools(HEADS, facets, text_VE.any(axis=1)))
    keys = jax.random.split(jax.random.key(2), 3)
    after, after_moments, loss_H = scan(params, moments, jnp.asarray(text_VE), pools, keys)
    for name in ('head_0', 'head_1'):
        unchanged = name != f'head_{h}'
        assert equal(params[name], after[name]) == unchanged
        assert equal(moments[name], after_moments[name]) == unchanged
    assert loss_H.shape == (1,)


def test_the_three_alternations_train_the_same_heads():
    """Heads share no parameters, so the order of their steps has no effect."""
    _, before, by_step = fit()
    assert not equal(before, by_step)
    for alternation in ('epoch', 'sum'):
        _, _, other = fit(alternation=alternation)
        for a, b in zip(jax.tree.leaves(by_step), jax.tree.leaves(other)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_every_epoch_is_reported_and_a_seed_repeats_the_training():
    lines = []
    _, _, one = fit(report=lambda *line: lines.append(line))
    _, _, again = fit()
    assert equal(one, again) and not equal(one, fit(seed=1)[2])
    assert [epoch for epoch, _ in lines] == [1, 2]
    assert all(len(loss_H) == 2 and np.all(np.isfinite(loss_H)) for _, loss_H in lines)


def test_no_epochs_leave_the_initial_parameters():
    _, before, after = fit(epochs=0)
    assert equal(before, after)


def test_each_head_separates_its_facet_and_shuffled_labels_do_not():
    text_VE, facets = world()
    module, _, params = fit(epochs=30)
    figures = projection.probe(module, params, text_VE, facets, seed=0)
    assert figures['matching'] == [[0, 0], [1, 1]]
    assert figures['matched'] > 0.8 and figures['unmatched'] < figures['matched'] - 0.5
    module, _, params = fit(epochs=30, shuffled_labels=True)
    item_VHK = np.asarray(module.apply({'params': params}, text_VE[1:]))
    labels = [facet.label_VS[1:] for facet in facets]
    (a, b), (c, d) = facet_probe.match_heads(item_VHK.swapaxes(0, 1), labels)['agreement']
    # Whatever the text itself says about the facets is the same for both heads.
    assert abs((a + d - b - c) / 2) < 0.2


def test_dropout_keeps_the_mean(key):
    text_BE = facet_objective.apply_dropout(key, jnp.ones((200, 100)), 0.25)
    np.testing.assert_allclose(np.unique(text_BE), [0, 4 / 3], rtol=1e-6)
    assert abs(float(text_BE.mean()) - 1) < 0.02


def test_unit_vectors_and_the_gradient_at_zero():
    slope = jax.grad(lambda x: projection.unit(x).sum())(jnp.zeros((2, 3)))
    assert np.all(np.isfinite(slope))
    np.testing.assert_array_equal(projection.unit(jnp.zeros((2, 3))), np.zeros((2, 3)))
    lengths = np.linalg.norm(projection.unit(jnp.ones((2, 3))), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)


def test_item_vectors_are_the_heads_side_by_side_and_zeros_without_text():
    module, _, params = fit(epochs=0)
    text_VE = world()[0][:4].copy()
    text_VE[2] = 0
    item_VD = projection.item_vectors(module, params, text_VE)
    assert item_VD.shape == (4, 16) and item_VD.dtype == np.float32
    assert not item_VD[[0, 2]].any()
    for h in range(2):
        vector_BK = module.apply({'params': params}, text_VE, h, method='head')
        np.testing.assert_allclose(item_VD[[1, 3], 8 * h : 8 * h + 8], vector_BK[jnp.array([1, 3])])
    assert projection.probe(module, params, text_VE, [], seed=0) == {}
