"""Figures of facets, on vectors with planted facets and against loops."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fame_jax.evaluation import facet_probe


def column(*labels):
    return np.array(labels, np.int32)[:, None]


def padded(sets):
    """Label sets as a padded array, one row per item; padding comes first here."""
    label_VS = np.full((len(sets), 4), -1, np.int32)
    for row, labels in zip(label_VS, sets):
        row[4 - len(labels) :] = labels
    return label_VS


def two_pairs(first, second):
    """Vectors of four items: the first two have one direction, the last two another."""
    return np.array([[first, 0.1], [first, -0.1], [0.1, second], [-0.1, second]])


def planted(label_V, width=8, noise=0.01, seed=0):
    """The vectors of items: the mean of their label, and a little noise."""
    rng = np.random.default_rng(seed)
    mean_CK = rng.normal(size=(label_V.max() + 1, width))
    return (mean_CK[label_V] + noise * rng.normal(size=(len(label_V), width))).astype(np.float32)


@pytest.mark.parametrize(
    ('labels', 'agreement'),
    [
        ([0, 0, 1, 1], (1 - 1 / 2) / (1 - 1 / 2)),  # the neighbour always shares the label
        ([0, 1, 0, 1], (0 - 1 / 2) / (1 - 1 / 2)),  # never: below chance
        ([0, 0, 1, 2], (1 / 2 - 3 / 8) / (1 - 3 / 8)),  # for items 0 and 1 alone
        ([4, 4, 4, 4], 0),  # a label of all items
        ([-1, -1, 3, 3], 0),  # a label of all labelled items
        ([0, -1, 0, 1], (1 / 3 - 5 / 9) / (1 - 5 / 9)),  # for item 0, whose neighbour now is 2
        ([-1, -1, 5, -1], 0),  # no other labelled item
        ([-1, -1, -1, -1], 0),
    ],
)
def test_agreement_of_neighbours_by_hand(labels, agreement):
    # By cosine, so the length of the second pair's vectors has no effect.
    result = facet_probe.neighbour_agreement(two_pairs(1, 9), column(*labels), 1)
    assert isinstance(result, float)
    assert result == pytest.approx(agreement, abs=1e-12)


def slow_agreement(vector_VK, sets, neighbours):
    """The definition, item by item and pair by pair."""
    items = [v for v, labels in enumerate(sets) if labels]
    if len(items) < 2:
        return 0
    unit_VK = vector_VK / np.linalg.norm(vector_VK, axis=1, keepdims=True)
    shared = []
    for v in items:
        others = sorted((w for w in items if w != v), key=lambda w: -(unit_VK[v] @ unit_VK[w]))
        shared += [bool(sets[v] & sets[w]) for w in others[:neighbours]]
    chance = np.mean([bool(sets[v] & sets[w]) for v, w in itertools.product(items, items)])
    return 0 if chance == 1 else (np.mean(shared) - chance) / (1 - chance)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 5), max_size=4), min_size=1, max_size=14),
    st.integers(1, 20),
    st.integers(0, 99),
)
def test_agreement_equals_a_loop(sets, neighbours, seed):
    vector_VK = np.random.default_rng(seed).normal(size=(len(sets), 3))
    label_VS = padded([sorted(labels) for labels in sets])
    result = facet_probe.neighbour_agreement(vector_VK, label_VS, neighbours)
    assert result == pytest.approx(slow_agreement(vector_VK, sets, neighbours), abs=1e-9)


def test_agreement_with_more_label_sets_than_a_block():
    """512 different label sets are counted at a time."""
    rng = np.random.default_rng(0)
    sets = [set(rng.integers(0, 300, rng.integers(0, 4)).tolist()) for _ in range(800)]
    assert len({frozenset(labels) for labels in sets}) > 513
    vector_VK = rng.normal(size=(800, 5))
    result = facet_probe.neighbour_agreement(
        vector_VK, padded([list(labels) for labels in sets]), 3
    )
    assert result == pytest.approx(slow_agreement(vector_VK, sets, 3), abs=1e-9)


def test_a_repeated_label_counts_once():
    """Counted twice, the frequent label would be predicted more often."""
    rng = np.random.default_rng(0)
    once_VS = rng.choice(3, (300, 1), p=[0.5, 0.3, 0.2])
    twice_VS = np.concatenate([once_VS, np.where(once_VS == 0, 0, -1)], axis=1)
    vector_VK = planted(once_VS[:, 0], width=4, noise=2)
    for figure in (
        facet_probe.neighbour_agreement,
        lambda v, label: facet_probe.linear_probe(v, label, 0),
    ):
        assert 0.05 < figure(vector_VK, once_VS) < 0.95
        assert figure(vector_VK, once_VS) == figure(vector_VK, twice_VS)


def test_a_vector_of_zeros_has_cosine_0_with_all():
    """So items with a neighbour of positive cosine do not have it as their nearest."""
    vector_VK = np.array([[1, 0], [1, 2], [0, 0], [0, 0]])
    result = facet_probe.neighbour_agreement(vector_VK, column(0, 0, 1, 1), 1)
    assert result == pytest.approx(1)


def test_the_probe_finds_linear_labels():
    rng = np.random.default_rng(0)
    label_V = rng.integers(0, 6, 600)
    vector_VK = planted(label_V)
    assert facet_probe.linear_probe(vector_VK, label_V[:, None], 0) == 1
    # Scale, shift and a constant coordinate have no effect.
    moved_VK = np.column_stack([1e-4 * vector_VK + 3, np.full(600, 7)]).astype(np.float64)
    assert facet_probe.linear_probe(moved_VK, label_V[:, None], 0) == 1


def test_the_probe_of_noise_predicts_the_most_frequent_label():
    label_V = np.repeat([0, 1], [900, 100])
    vector_VK = np.random.default_rng(0).normal(size=(1000, 3))
    assert facet_probe.linear_probe(vector_VK, label_V[:, None], 0) == 0


def test_the_probe_is_linear():
    """On a line, the rarer label between two others never has the highest score."""
    line_V = np.repeat([0, 1, 2], [400, 200, 400])
    result = facet_probe.linear_probe(line_V[:, None] - 1.0, line_V[:, None], 0)
    assert result == pytest.approx((4 / 5 - 2 / 5) / (1 - 2 / 5), abs=0.1)


def test_the_probe_by_hand():
    """Twenty items, four of them for the test; label 0 or 1 by sign, and label 7 with few items."""
    seed = 3
    train, test = np.split(np.random.default_rng(seed).permutation(20), [16])
    sign_V = np.ones(20)
    sign_V[train[:6]] = sign_V[test[:1]] = -1
    label_VS = np.stack([np.where(sign_V > 0, 0, 1), np.full(20, -1)], axis=1).astype(np.int32)
    label_VS[train[-4:], 1] = 7  # four training items: left out
    label_VS[test[3]] = 7  # so this test item, which has no other label, is left out
    # One of the three others has label 1; the baseline is right for two.
    assert facet_probe.linear_probe(sign_V[:, None], label_VS, seed) == 1
    label_VS[test[0], 0] = 0  # an item with the wrong label
    label_VS[test[1], 0] = 1  # and another one
    assert facet_probe.linear_probe(sign_V[:, None], label_VS, seed) == pytest.approx(
        (1 / 3 - 2 / 3) / (1 - 2 / 3)
    )


def test_a_prediction_of_any_label_of_an_item_is_right():
    """Each item has two adjacent labels of a ring of six; its vector is that of its place."""
    place_V = np.random.default_rng(0).integers(0, 6, 500)
    both_VS = np.stack([place_V, (place_V + 1) % 6], axis=1)
    assert facet_probe.linear_probe(planted(place_V), both_VS, 0) > 0.95


@pytest.mark.parametrize(
    ('vectors', 'labels', 'low', 'high'),
    [
        (two_pairs(1, 9), [0, 0, 1, 1], 0.95, 1),  # vectors of very different length
        (two_pairs(1, 9), [0, 1, 0, 1], -1, -0.45),
        ([[1, 0], [2, 0], [0, 3], [0, 4]], [0, 0, 1, 1], 1, 1),
        ([[1, 0], [2, 0], [0, 3], [0, 4]], [0, 0, 1, -1], 2 / 3, 2 / 3),  # a cluster of one is 0
    ],
)
def test_silhouette_by_hand(vectors, labels, low, high):
    result = facet_probe.silhouette(np.array(vectors, float), column(*labels), 0)
    assert low - 1e-6 <= result <= high + 1e-6


def test_the_silhouette_uses_the_rarest_of_several_labels():
    vector_VK = np.array([[1, 0], [2, 0], [0, 3], [0, 4], [-1, 0], [-2, 0]], float)
    label_VS = np.array([[9, 0], [9, 0], [1, 9], [9, 1], [2, -1], [-1, 2]])
    assert facet_probe.silhouette(vector_VK, label_VS, 0) == pytest.approx(1)


@pytest.mark.parametrize('labels', [[0, 0, 0, 0], [0, 1, 2, 3], [-1] * 4, [5, -1, -1, -1]])
def test_the_silhouette_of_one_cluster_or_of_single_items_is_undefined(labels):
    assert facet_probe.silhouette(two_pairs(1, 1), column(*labels), 0) is None


def test_the_silhouette_of_a_sample():
    label_V = np.random.default_rng(0).integers(0, 4, 400)
    vector_VK = planted(label_V)
    assert facet_probe.silhouette(vector_VK, label_V[:, None], 0, sample=40) > 0.9
    assert facet_probe.silhouette(vector_VK, label_V[:, None], 0, sample=1) is None


@pytest.mark.parametrize('label_VS', [column(*[0] * 9), column(*[-1] * 9), np.zeros((9, 0), int)])
def test_figures_without_informative_labels(label_VS):
    vector_VK = np.random.default_rng(0).normal(size=(9, 3))
    assert facet_probe.neighbour_agreement(vector_VK, label_VS) == 0
    assert facet_probe.linear_probe(vector_VK, label_VS, 0) == 0
    assert facet_probe.silhouette(vector_VK, label_VS, 0) is None


def test_an_infinite_vector_is_an_error():
    for bad in (np.nan, np.inf):
        vector_VK = two_pairs(1, bad)
        for figure in (
            facet_probe.neighbour_agreement,
            facet_probe.linear_probe,
            facet_probe.silhouette,
        ):
            with pytest.raises(FloatingPointError, match='not finite'):
                figure(vector_VK, column(0, 0, 1, 1), 1)


def test_heads_are_matched_to_their_facets():
    rng = np.random.default_rng(0)
    label_VM = rng.integers(0, 4, (200, 2))
    facet_of_head = [1, 0]
    item_HVK = np.stack([planted(label_VM[:, m]) for m in facet_of_head])
    result = facet_probe.match_heads(item_HVK, [label_V[:, None] for label_V in label_VM.T])
    assert result['matching'] == [[0, 1], [1, 0]]
    assert result['matched'] == pytest.approx(1)
    assert abs(result['unmatched']) < 0.1
    assert np.shape(result['agreement']) == (2, 2)


def test_heads_of_each_branch_are_matched_to_all_facets():
    label_VM = np.random.default_rng(0).integers(0, 4, (200, 2))
    item_HVK = np.stack([planted(label_VM[:, m]) for m in (1, 0, 0, 1)])
    labels = [label_V[:, None] for label_V in label_VM.T]
    result = facet_probe.match_heads(item_HVK, labels, branches=2)
    assert result['matching'] == [[0, 1], [1, 0], [2, 0], [3, 1]]
    assert result['matched'] == pytest.approx(1)
    # As if they were one branch, two heads that agree would count among the others.
    assert abs(result['unmatched']) < 0.1 < facet_probe.match_heads(item_HVK, labels)['unmatched']


def test_one_head_and_one_facet_have_no_unmatched_pair():
    result = facet_probe.match_heads(two_pairs(1, 1)[None], [column(0, 0, 1, 1)], 1)
    assert result == {
        'agreement': [[1.0]],
        'matching': [[0, 0]],
        'matched': 1.0,
        'unmatched': None,
    }


def three_facets(items=2500):
    """Three heads with one facet each; items have two labels of facet 'c', a third have none."""
    rng = np.random.default_rng(1)
    label_VM = rng.integers(0, 8, (items, 3)).astype(np.int32)
    item_HVK = np.stack([planted(label_VM[:, m], seed=m) for m in range(3)])
    both_VS = np.stack([label_VM[:, 2], label_VM[:, 2] + 8], axis=1)
    both_VS[rng.random(items) < 1 / 3] = -1
    return item_HVK, {'a': label_VM[:, :1], 'b': label_VM[:, 1:2], 'c': both_VS}


@pytest.fixture(scope='module')
def figures():
    return facet_probe.compare(*three_facets(), seed=0)


def test_heads_with_one_facet_each_have_a_diagonal(figures):
    assert figures['facets'] == ['a', 'b', 'c']
    assert figures['matching'] == [[0, 0], [1, 1], [2, 2]]
    for name, bound in (('neighbours', 0.99), ('probe', 0.99), ('silhouette', 0.9)):
        figure_HM = np.array(figures[name])
        assert figure_HM.shape == (3, 3)
        assert np.diag(figure_HM).min() > bound
        # 2,500 items, 500 of them in the probe's test: a standard deviation is about .015.
        # Silhouettes of random labels are below 0.
        others = figure_HM[~np.eye(3, dtype=bool)]
        assert others.max() < 0.05 and others.min() > (-0.1 if name == 'silhouette' else -0.05)
    assert figures['matched'] > 0.99 and abs(figures['unmatched']) < 0.05


def test_concatenated_heads_have_every_facet(figures):
    assert min(figures['whole']['probe']) > 0.99
    assert min(figures['whole']['neighbours']) > 0.2  # the other facets are two thirds of a vector
    assert len(figures['whole']['silhouette']) == 3


def test_shuffled_labels_have_figures_of_about_0():
    item_HVK, facets = three_facets()
    rng = np.random.default_rng(2)
    figures = facet_probe.compare(
        item_HVK, {n: rng.permutation(f) for n, f in facets.items()}, seed=0
    )
    for name in ('neighbours', 'probe'):
        assert np.abs([*figures[name], figures['whole'][name]]).max() < 0.05
    assert np.max([*figures['silhouette'], figures['whole']['silhouette']]) < 0.05


def test_figures_survive_json_and_are_reproducible():
    item_HVK, facets = three_facets(60)
    facets |= {'none': np.full((60, 2), -1)}
    first, second = (facet_probe.compare(item_HVK, facets, seed=4) for _ in range(2))
    assert json.loads(json.dumps(first, allow_nan=False)) == first == second
    assert [row[3] for row in first['silhouette']] == [None] * 3
    assert len(first['matching']) == 3  # of three heads, so one of four facets is unmatched


def test_the_seed_changes_the_split():
    rng = np.random.default_rng(0)
    vector_VK, label_VS = rng.normal(size=(100, 4)), rng.integers(0, 3, (100, 1))
    assert len({facet_probe.linear_probe(vector_VK, label_VS, seed) for seed in range(5)}) > 1


def test_the_map_shows_clusters_and_is_reproducible():
    label_V = np.repeat([0, 1, 2], 20)
    vector_VD = planted(label_V, width=40, noise=0.1)
    item_B, xy = facet_probe.tsne_map(vector_VD, seed=0, sample=45)
    assert xy.shape == (45, 2) and xy.dtype == np.float32
    assert (np.diff(item_B) > 0).all() and item_B.max() < 60
    assert facet_probe.silhouette(xy - xy.mean(axis=0), label_V[item_B][:, None], 0) > 0.5
    again_B, again = facet_probe.tsne_map(vector_VD, seed=0, sample=45)
    assert (again_B == item_B).all() and (again == xy).all()


def test_a_map_of_few_items():
    item_B, xy = facet_probe.tsne_map(np.random.default_rng(0).normal(size=(5, 2)), seed=0)
    assert item_B.tolist() == [0, 1, 2, 3, 4] and np.isfinite(xy).all()


def test_import_does_not_load_scikit_learn():
    code = "import sys, fame_jax.evaluation.facet_probe; print('sklearn' in sys.modules)"
    assert subprocess.check_output([sys.executable, '-c', code], text=True).strip() == 'False'


@pytest.mark.parametrize('vector_VD', [np.ones((9, 4)), np.arange(9.0)[:, None], np.eye(3)[:1]])
def test_the_map_of_vectors_that_do_not_span_a_plane(vector_VD):
    item_B, xy = facet_probe.tsne_map(vector_VD, seed=0)
    assert item_B.tolist() == list(range(len(vector_VD)))
    np.testing.assert_array_equal(xy, np.zeros((len(vector_VD), 2)))
