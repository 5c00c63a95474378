"""The facet objective: what is drawn, what moves in whose turn, and that heads find facets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fame_jax import contrast, probe
from fame_jax.models.projection import Projection, moving, unit

DESIGNS = ('independent', 'shared')
OPTIONS = contrast.Options(
    epochs=2,
    learning_rate=1e-2,
    alternation='step',
    labels_per_step=4,
    items_per_label=3,
    temperature=0.1,
    dropout=0.1,
    decorrelation=0.0,
    orthogonality=0.0,
)
LABELS = np.array(
    # The padding, three items of label 0, two of 1, one of 2, one of both 0 and 1, one of none.
    [[-1, -1], [0, -1], [0, -1], [0, -1], [1, -1], [1, -1], [2, -1], [0, 1], [-1, -1]]
)


@functools.cache
def world(items=120, values=4, facets=2, noise=0.3):
    """Text vectors that hold each facet's value in columns of their own, mixed; and the labels."""
    rng = np.random.default_rng(0)
    label_MV = np.stack([rng.permutation(items) % values for _ in range(facets)])
    hot_VE = np.concatenate([np.eye(values)[label_V] for label_V in label_MV], axis=1)
    text_VE = (hot_VE + noise * rng.normal(size=hot_VE.shape)) @ rng.normal(
        size=(facets * values,) * 2
    )
    text_VE = np.concatenate([np.zeros((1, facets * values)), text_VE]).astype(np.float32)
    return text_VE, [np.concatenate([[-1], label_V])[:, None] for label_V in label_MV]


def heads(design='independent', num_heads=2):
    text_VE, labels = world()
    module = Projection(num_heads, 8 * num_heads, 16, design)
    params = module.init(jax.random.key(0), text_VE[:1])['params']
    return module, params, text_VE, [contrast.make_pool(label_VS) for label_VS in labels]


def fit(options, design='independent', pools=None, report=lambda epoch, loss_H: None):
    module, params, text_VE, found = heads(design)
    args = text_VE, pools or found, jax.random.key(1), options, report
    return module, params, contrast.fit(module, params, *args)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)))


def test_a_pool_lists_each_labels_items():
    pool = contrast.make_pool(LABELS)
    assert pool.count_C.tolist() == [4, 3, 1]
    members = [
        sorted(pool.member_I[first : first + count].tolist())
        for first, count in zip(pool.first_C, pool.count_C)
    ]
    assert members == [[1, 2, 3, 7], [4, 5, 7], [6]]


def test_a_draw_takes_items_of_distinct_labels_that_two_items_share(key):
    pool = contrast.make_pool(LABELS)
    for k in jax.random.split(key, 20):
        item_B, weight_BB, compared_BB = contrast.draw(k, pool, labels=2, items=3)
        item_PS = np.asarray(item_B).reshape(2, 3)
        held = [set.intersection(*({*LABELS[i]} - {-1} for i in row)) for row in item_PS]
        assert {*item_PS.ravel()} <= {1, 2, 3, 4, 5, 7}
        assert len(set.union(*held)) == 2
        np.testing.assert_array_equal(
            compared_BB, np.asarray(item_B)[:, None] != np.asarray(item_B)[None]
        )
        for b, i in enumerate(np.asarray(item_B)):
            for c, j in enumerate(np.asarray(item_B)):
                one, other = {*LABELS[i]} - {-1}, {*LABELS[j]} - {-1}
                assert weight_BB[b, c] == len(one & other) / len(one | other)


def test_a_facet_of_few_labels_fills_the_batch_with_more_items_of_each(key):
    item_B, _, _ = contrast.draw(key, contrast.make_pool(LABELS), labels=6, items=4)
    assert item_B.shape == (6 * 4,)
    held = [{*LABELS[i]} - {-1} for i in np.asarray(item_B)]
    assert sum(0 in labels for labels in held) >= 8


def test_labels_are_drawn_by_the_root_of_their_frequency(key):
    pool = contrast.make_pool(np.array([[-1]] + [[0]] * 16 + [[1]] * 4))
    drawn = jax.vmap(lambda k: contrast.draw(k, pool, 1, 1)[0])(jax.random.split(key, 3000))
    share = np.mean(np.asarray(drawn) <= 16)
    assert abs(share - 4 / (4 + 2)) < 5 * np.sqrt(2 / 9 / 3000)


def test_instances_come_twice_and_are_positives_of_themselves_alone(key):
    pool = contrast.make_instances(np.array([False, True, True, False, True]))
    item_B, weight_BB, compared_BB = contrast.draw(key, pool, 3, 2)
    assert item_B.shape == (6,)
    assert {*item_B.tolist()} <= {1, 2, 4}
    np.testing.assert_array_equal(item_B[:3], item_B[3:])
    np.testing.assert_array_equal(weight_BB, np.asarray(item_B)[:, None] == np.asarray(item_B))
    assert np.all(compared_BB)


def test_moving_names_the_heads_of_a_turn_and_what_all_read():
    _, params, _, _ = heads()
    assert moving(params, [1]) == ['head_1']
    _, params, _, _ = heads('shared')
    assert sorted(moving(params, [0])) == ['adaptor', 'head_0']
    assert sorted(moving(params, [0, 1])) == ['adaptor', 'head_0', 'head_1']


@pytest.mark.parametrize('design', DESIGNS)
@pytest.mark.parametrize('h', [0, 1])
def test_only_the_facet_in_turn_moves(design, h):
    module, params, text_VE, pools = heads(design)
    options = OPTIONS._replace(decorrelation=0.1, orthogonality=0.1)
    optimizer = optax.adam(0.1)
    scan = contrast.make_scan(module, optimizer, [[h]], options)
    moments = {name: optimizer.init(params[name]) for name in params}
    keys = jax.random.split(jax.random.key(2), 3)
    after, after_moments, loss_H = scan(params, moments, text_VE, tuple(pools), keys)
    for name in params:
        moves = name in moving(params, [h])
        assert same(params[name], after[name]) != moves
        assert same(moments[name], after_moments[name]) != moves
    assert loss_H.shape == (1,)


def test_for_independent_heads_a_sum_of_facets_is_what_turns_are():
    _, _, turns = fit(OPTIONS)
    _, _, summed = fit(OPTIONS._replace(alternation='sum'))
    _, _, epochs = fit(OPTIONS._replace(alternation='epoch'))
    for other in (summed, epochs):
        for a, b in zip(jax.tree.leaves(turns), jax.tree.leaves(other)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_for_shared_heads_it_is_not():
    _, _, turns = fit(OPTIONS, 'shared')
    _, _, summed = fit(OPTIONS._replace(alternation='sum'), 'shared')
    assert np.abs(turns['adaptor']['kernel'] - summed['adaptor']['kernel']).max() > 1e-3


def test_no_epochs_leave_everything_as_it_was():
    _, before, after = fit(OPTIONS._replace(epochs=0))
    assert same(before, after)


def test_a_fit_reports_every_facet_each_epoch_and_is_deterministic():
    told = []
    _, _, one = fit(OPTIONS, report=lambda *line: told.append(line))
    _, _, other = fit(OPTIONS)
    assert same(one, other)
    assert [epoch for epoch, _ in told] == [1, 2]
    assert all(len(loss_H) == 2 and np.all(np.isfinite(loss_H)) for _, loss_H in told)


@pytest.mark.parametrize('design', DESIGNS)
def test_each_head_finds_its_facet_and_shuffled_labels_nothing(design):
    text_VE, labels = world()
    options = OPTIONS._replace(epochs=30, orthogonality=0.01)
    module, _, params = fit(options, design)
    item_VHK = np.asarray(module.apply({'params': params}, text_VE[1:]))
    known = [label_VS[1:] for label_VS in labels]
    found = probe.match_heads(item_VHK.swapaxes(0, 1), known)
    assert found['matching'] == [[0, 0], [1, 1]]
    assert found['matched'] > 0.8
    assert found['unmatched'] < found['matched'] - (0.5 if design == 'independent' else 0.3)
    rng = np.random.default_rng(3)
    dealt = [contrast.make_pool(np.concatenate([v[:1], rng.permutation(v[1:])])) for v in labels]
    module, _, params = fit(options, design, dealt)
    item_VHK = np.asarray(module.apply({'params': params}, text_VE[1:]))
    shuffled = np.array(probe.match_heads(item_VHK.swapaxes(0, 1), known)['agreement'])
    # What the text itself tells of the facets stays, the same in all cells: no diagonal.
    assert abs((shuffled[0, 0] + shuffled[1, 1] - shuffled[0, 1] - shuffled[1, 0]) / 2) < 0.2


def test_decorrelation_is_the_mean_squared_correlation():
    rng = np.random.default_rng(0)
    one_BK, other_BJ = rng.normal(size=(50, 3)), rng.normal(size=(50, 2))
    correlation_KJ = np.corrcoef(one_BK.T, other_BJ.T)[:3, 3:]
    found = contrast.decorrelation(jnp.asarray(one_BK), jnp.asarray(other_BJ))
    np.testing.assert_allclose(found, np.mean(correlation_KJ**2), rtol=1e-4)


def test_dropped_text_keeps_its_mean(key):
    text_BE = contrast.drop(key, jnp.ones((200, 100)), 0.25)
    np.testing.assert_allclose(np.unique(text_BE), [0, 4 / 3], rtol=1e-6)
    assert abs(float(text_BE.mean()) - 1) < 0.02


def test_zeros_have_no_direction_and_a_finite_gradient():
    slope = jax.grad(lambda x: unit(x).sum())(jnp.zeros((2, 3)))
    assert np.all(np.isfinite(slope))
    np.testing.assert_array_equal(unit(jnp.zeros((2, 3))), np.zeros((2, 3)))
    np.testing.assert_allclose(np.linalg.norm(unit(jnp.ones((2, 3))), axis=1), 1, rtol=1e-6)
