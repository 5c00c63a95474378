"""What is read of facets off vectors, on vectors that were made to carry them."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fame_jax import probe


def column(*labels):
    return np.array(labels, np.int32)[:, None]


def padded(sets):
    """One row an item; slots in any order, padding anywhere."""
    label_VS = np.full((len(sets), 4), -1, np.int32)
    for row, labels in zip(label_VS, sets):
        row[4 - len(labels) :] = labels
    return label_VS


def two_pairs(first, second):
    """Vectors of four items: the first two point one way, the last two another."""
    return np.array([[first, 0.1], [first, -0.1], [0.1, second], [-0.1, second]])


def planted(label_V, width=8, noise=0.01, seed=0):
    """A vector an item: its label's mean and little noise."""
    rng = np.random.default_rng(seed)
    mean_CK = rng.normal(size=(label_V.max() + 1, width))
    return (mean_CK[label_V] + noise * rng.normal(size=(len(label_V), width))).astype(np.float32)


@pytest.mark.parametrize(
    ('labels', 'agreement'),
    [
        ([0, 0, 1, 1], (1 - 1 / 2) / (1 - 1 / 2)),  # the neighbour always shares the label
        ([0, 1, 0, 1], (0 - 1 / 2) / (1 - 1 / 2)),  # never, which is worse than chance
        ([0, 0, 1, 2], (1 / 2 - 3 / 8) / (1 - 3 / 8)),  # for items 0 and 1 alone
        ([4, 4, 4, 4], 0),  # a label that says nothing
        ([-1, -1, 3, 3], 0),  # the labelled items' label says nothing
        ([0, -1, 0, 1], (1 / 3 - 5 / 9) / (1 - 5 / 9)),  # for item 0, whose neighbour now is 2
        ([-1, -1, 5, -1], 0),  # nobody to agree with
        ([-1, -1, -1, -1], 0),
    ],
)
def test_agreement_of_neighbours_by_hand(labels, agreement):
    # Cosine: that one pair's vectors are long changes nothing.
    found = probe.neighbour_agreement(two_pairs(1, 9), column(*labels), 1)
    assert isinstance(found, float)
    assert found == pytest.approx(agreement, abs=1e-12)


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
def test_agreement_is_what_the_loop_says(sets, neighbours, seed):
    vector_VK = np.random.default_rng(seed).normal(size=(len(sets), 3))
    label_VS = padded([sorted(labels) for labels in sets])
    found = probe.neighbour_agreement(vector_VK, label_VS, neighbours)
    assert found == pytest.approx(slow_agreement(vector_VK, sets, neighbours), abs=1e-9)


def test_agreement_beyond_one_block():
    """More kinds of items than are taken at a time."""
    rng = np.random.default_rng(0)
    sets = [set(rng.integers(0, 300, rng.integers(0, 4)).tolist()) for _ in range(800)]
    assert len({frozenset(labels) for labels in sets}) > 513
    vector_VK = rng.normal(size=(800, 5))
    found = probe.neighbour_agreement(vector_VK, padded([list(labels) for labels in sets]), 3)
    assert found == pytest.approx(slow_agreement(vector_VK, sets, 3), abs=1e-9)


def test_a_label_that_is_told_twice_counts_once():
    """Telling the commoner one twice would make the probe answer it more often."""
    rng = np.random.default_rng(0)
    once_VS = rng.choice(3, (300, 1), p=[0.5, 0.3, 0.2])
    twice_VS = np.concatenate([once_VS, np.where(once_VS == 0, 0, -1)], axis=1)
    vector_VK = planted(once_VS[:, 0], width=4, noise=2)
    for figure in (probe.neighbour_agreement, lambda v, label: probe.linear_probe(v, label, 0)):
        assert 0.05 < figure(vector_VK, once_VS) < 0.95
        assert figure(vector_VK, once_VS) == figure(vector_VK, twice_VS)


def test_a_vector_of_zeros_is_nobody_s_neighbour():
    """Its cosine with all is 0, so who has a neighbour of a higher one never meets it."""
    vector_VK = np.array([[1, 0], [1, 2], [0, 0], [0, 0]])
    found = probe.neighbour_agreement(vector_VK, column(0, 0, 1, 1), 1)
    assert found == pytest.approx(1)


def test_the_probe_reads_what_is_linear():
    rng = np.random.default_rng(0)
    label_V = rng.integers(0, 6, 600)
    vector_VK = planted(label_V)
    assert probe.linear_probe(vector_VK, label_V[:, None], 0) == 1
    # Neither scale nor shift nor a dead coordinate is in its way.
    moved_VK = np.column_stack([1e-4 * vector_VK + 3, np.full(600, 7)]).astype(np.float64)
    assert probe.linear_probe(moved_VK, label_V[:, None], 0) == 1


def test_the_probe_that_learns_nothing_answers_the_commonest():
    label_V = np.repeat([0, 1], [900, 100])
    vector_VK = np.random.default_rng(0).normal(size=(1000, 3))
    assert probe.linear_probe(vector_VK, label_V[:, None], 0) == 0


def test_the_probe_is_linear():
    """On a line the rarer one between two others has the highest score nowhere."""
    line_V = np.repeat([0, 1, 2], [400, 200, 400])
    found = probe.linear_probe(line_V[:, None] - 1.0, line_V[:, None], 0)
    assert found == pytest.approx((4 / 5 - 2 / 5) / (1 - 2 / 5), abs=0.1)


def test_the_probe_by_hand():
    """Twenty items, four to be judged: label 0 or 1 by the sign, and label 7 of too few items."""
    seed = 3
    learn, test = np.split(np.random.default_rng(seed).permutation(20), [16])
    sign_V = np.ones(20)
    sign_V[learn[:6]] = sign_V[test[:1]] = -1
    label_VS = np.stack([np.where(sign_V > 0, 0, 1), np.full(20, -1)], axis=1).astype(np.int32)
    label_VS[learn[-4:], 1] = 7  # four to learn from: left out
    label_VS[test[3]] = 7  # and so is a test item that has no other
    # Of the three others one is a 1; the commonest answer is right for two.
    assert probe.linear_probe(sign_V[:, None], label_VS, seed) == 1
    label_VS[test[0], 0] = 0  # an item that lies
    label_VS[test[1], 0] = 1  # and another
    assert probe.linear_probe(sign_V[:, None], label_VS, seed) == pytest.approx(
        (1 / 3 - 2 / 3) / (1 - 2 / 3)
    )


def test_one_of_several_labels_is_enough_for_the_probe():
    """Each item has two labels of a ring of six, and the vector tells its place in the ring."""
    place_V = np.random.default_rng(0).integers(0, 6, 500)
    both_VS = np.stack([place_V, (place_V + 1) % 6], axis=1)
    assert probe.linear_probe(planted(place_V), both_VS, 0) > 0.95


@pytest.mark.parametrize(
    ('vectors', 'labels', 'low', 'high'),
    [
        (two_pairs(1, 9), [0, 0, 1, 1], 0.95, 1),  # long vectors of one direction
        (two_pairs(1, 9), [0, 1, 0, 1], -1, -0.45),
        ([[1, 0], [2, 0], [0, 3], [0, 4]], [0, 0, 1, 1], 1, 1),
        ([[1, 0], [2, 0], [0, 3], [0, 4]], [0, 0, 1, -1], 2 / 3, 2 / 3),  # a cluster of one is 0
    ],
)
def test_silhouettes_of_clusters_made_by_hand(vectors, labels, low, high):
    found = probe.silhouette(np.array(vectors, float), column(*labels), 0)
    assert low - 1e-6 <= found <= high + 1e-6


def test_the_silhouette_of_several_labels_is_of_the_rarest():
    vector_VK = np.array([[1, 0], [2, 0], [0, 3], [0, 4], [-1, 0], [-2, 0]], float)
    label_VS = np.array([[9, 0], [9, 0], [1, 9], [9, 1], [2, -1], [-1, 2]])
    assert probe.silhouette(vector_VK, label_VS, 0) == pytest.approx(1)


@pytest.mark.parametrize('labels', [[0, 0, 0, 0], [0, 1, 2, 3], [-1] * 4, [5, -1, -1, -1]])
def test_there_is_no_silhouette_of_one_cluster_or_of_single_items(labels):
    assert probe.silhouette(two_pairs(1, 1), column(*labels), 0) is None


def test_the_silhouette_looks_at_no_more_items_than_it_is_told():
    label_V = np.random.default_rng(0).integers(0, 4, 400)
    vector_VK = planted(label_V)
    assert probe.silhouette(vector_VK, label_V[:, None], 0, sample=40) > 0.9
    assert probe.silhouette(vector_VK, label_V[:, None], 0, sample=1) is None


@pytest.mark.parametrize('label_VS', [column(*[0] * 9), column(*[-1] * 9), np.zeros((9, 0), int)])
def test_nothing_is_read_where_there_is_nothing(label_VS):
    vector_VK = np.random.default_rng(0).normal(size=(9, 3))
    assert probe.neighbour_agreement(vector_VK, label_VS) == 0
    assert probe.linear_probe(vector_VK, label_VS, 0) == 0
    assert probe.silhouette(vector_VK, label_VS, 0) is None


def test_a_vector_that_is_not_finite_is_an_error():
    for bad in (np.nan, np.inf):
        vector_VK = two_pairs(1, bad)
        for figure in (probe.neighbour_agreement, probe.linear_probe, probe.silhouette):
            with pytest.raises(FloatingPointError, match='not finite'):
                figure(vector_VK, column(0, 0, 1, 1), 1)


def test_heads_are_matched_to_the_facets_they_carry():
    rng = np.random.default_rng(0)
    label_VM = rng.integers(0, 4, (200, 2))
    carried = [1, 0]  # head 0 carries facet 1, and head 1 facet 0
    item_HVK = np.stack([planted(label_VM[:, m]) for m in carried])
    found = probe.match_heads(item_HVK, [label_V[:, None] for label_V in label_VM.T])
    assert found['matching'] == [[0, 1], [1, 0]]
    assert found['matched'] == pytest.approx(1)
    assert abs(found['unmatched']) < 0.1
    assert np.shape(found['agreement']) == (2, 2)


def test_one_head_and_one_facet_leave_nothing_unmatched():
    found = probe.match_heads(two_pairs(1, 1)[None], [column(0, 0, 1, 1)], 1)
    assert found == {
        'agreement': [[1.0]],
        'matching': [[0, 0]],
        'matched': 1.0,
        'unmatched': None,
    }


def three_facets(items=2500):
    """Three heads of one facet each; facet 'c' has two labels an item, and a third have none."""
    rng = np.random.default_rng(1)
    label_VM = rng.integers(0, 8, (items, 3)).astype(np.int32)
    item_HVK = np.stack([planted(label_VM[:, m], seed=m) for m in range(3)])
    both_VS = np.stack([label_VM[:, 2], label_VM[:, 2] + 8], axis=1)
    both_VS[rng.random(items) < 1 / 3] = -1
    return item_HVK, {'a': label_VM[:, :1], 'b': label_VM[:, 1:2], 'c': both_VS}


@pytest.fixture(scope='module')
def found():
    return probe.compare(*three_facets(), seed=0)


def test_heads_that_carry_a_facet_each_show_on_the_diagonal(found):
    assert found['facets'] == ['a', 'b', 'c']
    assert found['matching'] == [[0, 0], [1, 1], [2, 2]]
    for figure, bound in (('neighbours', 0.99), ('probe', 0.99), ('silhouette', 0.9)):
        figure_HM = np.array(found[figure])
        assert figure_HM.shape == (3, 3)
        assert np.diag(figure_HM).min() > bound
        # 2,500 items, 500 of them for the probe's test: a deviation of chance is about .015.
        # Silhouettes of labels by chance are below 0.
        others = figure_HM[~np.eye(3, dtype=bool)]
        assert others.max() < 0.05 and others.min() > (-0.1 if figure == 'silhouette' else -0.05)
    assert found['matched'] > 0.99 and abs(found['unmatched']) < 0.05


def test_the_heads_side_by_side_carry_every_facet(found):
    assert min(found['whole']['probe']) > 0.99
    assert min(found['whole']['neighbours']) > 0.2  # the other facets are two thirds of a vector
    assert len(found['whole']['silhouette']) == 3


def test_shuffled_labels_are_found_nowhere():
    """2,500 items; both figures of all heads are within .05 of nothing, and clusters are none."""
    item_HVK, facets = three_facets()
    rng = np.random.default_rng(2)
    found = probe.compare(item_HVK, {n: rng.permutation(f) for n, f in facets.items()}, seed=0)
    for figure in ('neighbours', 'probe'):
        assert np.abs([*found[figure], found['whole'][figure]]).max() < 0.05
    assert np.max([*found['silhouette'], found['whole']['silhouette']]) < 0.05


def test_what_is_compared_goes_into_json_and_comes_out_the_same_again():
    item_HVK, facets = three_facets(60)
    facets |= {'none': np.full((60, 2), -1)}
    first, second = (probe.compare(item_HVK, facets, seed=4) for _ in range(2))
    assert json.loads(json.dumps(first, allow_nan=False)) == first == second
    assert [row[3] for row in first['silhouette']] == [None] * 3
    assert len(first['matching']) == 3  # heads; the fourth facet has none


def test_another_seed_is_another_split():
    rng = np.random.default_rng(0)
    vector_VK, label_VS = rng.normal(size=(100, 4)), rng.integers(0, 3, (100, 1))
    assert len({probe.linear_probe(vector_VK, label_VS, seed) for seed in range(5)}) > 1


def test_the_map_keeps_clusters_together_and_is_the_same_again():
    label_V = np.repeat([0, 1, 2], 20)
    vector_VD = planted(label_V, width=40, noise=0.1)
    item_B, xy = probe.flatten(vector_VD, seed=0, sample=45)
    assert xy.shape == (45, 2) and xy.dtype == np.float32
    assert (np.diff(item_B) > 0).all() and item_B.max() < 60
    assert probe.silhouette(xy - xy.mean(axis=0), label_V[item_B][:, None], 0) > 0.5
    again_B, again = probe.flatten(vector_VD, seed=0, sample=45)
    assert (again_B == item_B).all() and (again == xy).all()


def test_a_map_of_few_items():
    item_B, xy = probe.flatten(np.random.default_rng(0).normal(size=(5, 2)), seed=0)
    assert item_B.tolist() == [0, 1, 2, 3, 4] and np.isfinite(xy).all()


def test_the_door_does_not_wait_for_scikit_learn():
    code = "import sys, fame_jax.probe; print('sklearn' in sys.modules)"
    assert subprocess.check_output([sys.executable, '-c', code], text=True).strip() == 'False'


@pytest.mark.parametrize('vector_VD', [np.ones((9, 4)), np.arange(9.0)[:, None], np.eye(3)[:1]])
def test_vectors_that_span_no_plane_are_one_place_on_the_map(vector_VD):
    item_B, xy = probe.flatten(vector_VD, seed=0)
    assert item_B.tolist() == list(range(len(vector_VD)))
    np.testing.assert_array_equal(xy, np.zeros((len(vector_VD), 2)))
