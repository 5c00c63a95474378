"""Contrastive losses against loops and by hand."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fame_jax import losses


def contrast_loop(vector_BK, weight_BB, compared_BB, temperature):
    """Supervised contrastive loss, a pair at a time, in float64."""
    total, count = 0.0, 0
    for i, anchor in enumerate(np.asarray(vector_BK, np.float64)):
        others = [a for a in range(len(vector_BK)) if a != i and compared_BB[i, a]]
        logit = {a: float(anchor @ vector_BK[a]) / temperature for a in others}
        positives = [p for p in others if weight_BB[i, p] > 0]
        if not positives:
            continue
        log_all = math.log(sum(math.exp(s) for s in logit.values()))
        loss = sum(weight_BB[i, p] * (log_all - logit[p]) for p in positives)
        total += loss / sum(weight_BB[i, p] for p in positives)
        count += 1
    return total, count


def unit_vectors(batch, width, seed):
    vector_BK = np.random.default_rng(seed).normal(size=(batch, width))
    return (vector_BK / np.linalg.norm(vector_BK, axis=1, keepdims=True)).astype(np.float32)


def all_pairs(batch):
    return np.ones((batch, batch), bool)


def label_sets(length):
    return st.lists(
        st.lists(st.integers(0, 4), max_size=3, unique=True), min_size=length, max_size=length
    )


def slots(sets):
    """Label sets as a padded array, label_BS."""
    label_BS = np.full((len(sets), 3), -1, np.int32)
    for i, labels in enumerate(sets):
        label_BS[i, : len(labels)] = sorted(labels)
    return label_BS


# Few shapes, since each is compiled.
@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 2, 7]).flatmap(label_sets), st.integers(0, 100))
def test_label_overlap_and_contrast_against_loops(sets, seed):
    weight_BB = np.array(
        [[len({*a} & {*b}) / max(len({*a} | {*b}), 1) for b in sets] for a in sets], np.float32
    )
    np.testing.assert_allclose(losses.label_overlap(slots(sets)), weight_BB, rtol=1e-6)
    vector_BK = unit_vectors(len(sets), 3, seed)
    compared_BB = np.random.default_rng(seed).random(weight_BB.shape) < 0.7
    expected = contrast_loop(vector_BK, weight_BB, compared_BB, 0.5)
    actual = losses.supervised_contrastive(vector_BK, weight_BB, compared_BB, 0.5)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_contrast_of_four_items_by_hand():
    """Two labels of two items each: an anchor's inner products with the others are 1, 0 and 0."""
    vector_BK = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    weight_BB = losses.label_overlap(np.array([[0], [0], [1], [1]]))
    total, count = losses.supervised_contrastive(vector_BK, weight_BB, all_pairs(4), 0.5)
    assert count == 4
    np.testing.assert_allclose(total, 4 * (math.log(math.e**2 + 2) - 2), rtol=1e-6)
    # With these labels every positive is at right angles to its anchor.
    weight_BB = losses.label_overlap(np.array([[0], [1], [0], [1]]))
    total, _ = losses.supervised_contrastive(vector_BK, weight_BB, all_pairs(4), 0.5)
    np.testing.assert_allclose(total, 4 * math.log(math.e**2 + 2), rtol=1e-6)
    # Item 2 has both labels and overlaps by half with either; item 4 has none and is not counted.
    label_BS = np.array([[0, -1], [0, 1], [1, -1], [-1, -1]])
    weight_BB = losses.label_overlap(label_BS)
    np.testing.assert_array_equal(
        weight_BB, [[1, 1 / 2, 0, 0], [1 / 2, 1, 1 / 2, 0], [0, 1 / 2, 1, 0], [0, 0, 0, 0]]
    )
    total, count = losses.supervised_contrastive(vector_BK, weight_BB, all_pairs(4), 1.0)
    log_all = math.log(math.e + 2)  # for all: inner products of 1, 0 and 0
    expected = (log_all - 1) + (log_all - 1 / 2) + log_all
    np.testing.assert_allclose([total, count], [expected, 3], rtol=1e-6)


@pytest.mark.parametrize(
    'label_BS',
    [[[0]] * 4, [[-1]] * 4, [[0], [1], [2], [3]], [[0], [0], [-1], [1]]],
    ids=['one label', 'no label', 'no pair', 'some'],
)
@pytest.mark.parametrize('identical', [True, False])
@pytest.mark.parametrize('compared', [True, False])
def test_contrast_has_finite_gradients(label_BS, identical, compared):
    vector_BK = np.tile(unit_vectors(1, 3, 0), (4, 1)) if identical else unit_vectors(4, 3, 0)
    weight_BB = losses.label_overlap(np.array(label_BS))

    def total(vector_BK):
        return losses.supervised_contrastive(vector_BK, weight_BB, all_pairs(4) & compared, 0.07)[0]

    value, slope_BK = jax.value_and_grad(total)(vector_BK)
    assert np.isfinite(value)
    assert np.all(np.isfinite(slope_BK))
    has_pair = compared and np.any(np.asarray(weight_BB) * (1 - np.eye(4)))
    assert (value > 0) == has_pair
