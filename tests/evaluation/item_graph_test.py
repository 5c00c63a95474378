"""The item graph against explicit loops: transitions, scores, ranks with ties, lists, choice."""

import numpy as np
import pytest
from fixtures import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import item_graph_loop, item_graph_rank_loop, item_graph_scores_loop

from fame_jax.evaluation import item_graph, metrics
from fame_jax.evaluation.item_graph import Setting

# Of six items the last is in no training history, and item 5 has no neighbour.
TRAINING = [[1, 2, 3], [2, 3, 1, 4, 2], [5], [3, 2], [4, 1, 2, 3, 1, 4]]
NUM_ITEMS = 6
COUNTS = np.array([0, 4, 5, 4, 3, 1, 0])


def ragged(rows):
    """Items end to end, int32, and the start of each row."""
    return np.concatenate(rows).astype(np.int32), np.cumsum([0, *map(len, rows)])


def make_training(rows=TRAINING, num_items=NUM_ITEMS):
    return item_graph.Training(*ragged(rows), num_items)


def make_histories(rows, targets):
    items, offsets = ragged(rows)
    targets = np.array(targets, np.int32)
    return item_graph.Histories(items, offsets[:-1], offsets[1:], targets)


def ranks_loop(rows, targets, setting, training=TRAINING, num_items=NUM_ITEMS):
    """Masked and unmasked ranks of all targets."""
    graph_VV = item_graph_loop(training, num_items, setting.window, setting.decay)
    count_V = make_training(training, num_items).count_V
    found = {'masked': [], 'unmasked': []}
    for row, target in zip(rows, targets):
        score_V = item_graph_scores_loop(row, graph_VV, count_V, setting)
        for protocol, left_out in (('masked', row), ('unmasked', [])):
            found[protocol].append(item_graph_rank_loop(score_V, count_V, target, left_out))
    return found


def test_training_actions_are_counted():
    assert make_training().count_V.tolist() == COUNTS.tolist()


@pytest.mark.parametrize('window, decay', [(1, 1.0), (2, 0.5), (50, 0.8)])
def test_transitions_are_those_of_the_loop(window, decay):
    graph_VV = item_graph.transitions(make_training(), window, decay).toarray()
    assert_close(graph_VV, item_graph_loop(TRAINING, NUM_ITEMS, window, decay))
    assert graph_VV[1, 4] and not graph_VV[5].any()


def test_transitions_by_hand():
    """Of 1 2 1 the two items at distance 2 are the same: their pair counts in either order."""
    graph_VV = item_graph.transitions(make_training([[1, 2, 1]], 2), 2, 0.25).toarray()
    assert graph_VV[1:, 1:].tolist() == [[2 * 0.25, 2], [2, 0]]


def test_histories_without_a_pair_have_no_transition():
    training = make_training([[1], [2]], 2)
    assert item_graph.transitions(training, 5, 0.5).nnz == 0
    path_VV = item_graph.paths(training, Setting(5, 0.5, 0.15, 0.3, 2, 0.5))
    assert path_VV.shape == (3, 3) and path_VV.nnz == 0


def test_steps_are_shares_of_a_row():
    step_VV = item_graph.step_shares(item_graph.transitions(make_training(), 1, 1.0)).toarray()
    graph_VV = item_graph_loop(TRAINING, NUM_ITEMS, 1, 1.0)
    for share_V, row_V in zip(step_VV, graph_VV):
        assert_close(share_V, row_V / sum(row_V) if sum(row_V) else row_V)


def test_weights_of_a_history_by_hand():
    histories = make_histories([[1, 2], [4, 5, 4]], [3, 3])
    weight_BV = item_graph.weigh_histories(histories, NUM_ITEMS, 3, 0.5).toarray()
    assert weight_BV.tolist() == [[0, 0.5, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1 + 0.25, 0.5, 0]]
    last_BV = item_graph.weigh_histories(histories, NUM_ITEMS, 1, 0.5).toarray()
    assert last_BV.tolist() == [[0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0]]
    seen_BV = item_graph.seen_items(histories, NUM_ITEMS).toarray()
    assert seen_BV.tolist() == [[0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0]]


SETTINGS = [
    Setting(1, 1.0, 0.0, 0.0, 1, 1.0),
    Setting(2, 0.5, 0.0, 0.3, 2, 0.5),
    Setting(1, 1.0, 0.15, 0.0, 2, 0.5),
    Setting(50, 0.8, 0.5, 1.0, 50, 0.7),
]


@pytest.mark.parametrize('setting', SETTINGS)
def test_scores_are_those_of_the_loop(setting):
    rows = [*TRAINING, [6], [1, 6, 1]]
    weight_BV = item_graph.weigh_histories(
        make_histories(rows, [1] * len(rows)), NUM_ITEMS, setting.last, setting.fade
    )
    score_BV = (weight_BV @ item_graph.paths(make_training(), setting)).toarray()
    graph_VV = item_graph_loop(TRAINING, NUM_ITEMS, setting.window, setting.decay)
    for row, score_V in zip(rows, score_BV):
        assert_close(score_V, item_graph_scores_loop(row, graph_VV, COUNTS, setting))


# Ranks and lists of given scores: small whole numbers, so that many items tie.


def places(count_V):
    return item_graph.popularity(count_V).place_V


def test_the_order_of_items_of_equal_score_by_hand():
    order = item_graph.popularity(np.array([0, 2, 0, 3, 2]))
    assert order.place_V.tolist() == [5, 3, 4, 1, 3] and order.item_V.tolist() == [3, 1, 4, 2]


@st.composite
def scored(draw):
    """Scores [B, V + 1], counts, and for each row a target and a history."""
    num_items, rows = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    item = st.integers(1, num_items)
    score_BV = draw(
        st.lists(
            st.lists(st.integers(0, 2), min_size=num_items, max_size=num_items),
            min_size=rows,
            max_size=rows,
        )
    )
    count_V = draw(st.lists(st.integers(0, 2), min_size=num_items, max_size=num_items))
    histories = [draw(st.lists(item, min_size=1, max_size=5)) for _ in range(rows)]
    targets = [draw(item) for _ in range(rows)]
    padded_BV = np.array([[0, *row] for row in score_BV], np.float32)
    return padded_BV, np.array([0, *count_V]), histories, targets


@settings(max_examples=150, deadline=None)
@given(scored())
def test_ranks_are_those_of_the_loop(case):
    score_BV, count_V, rows, targets = case
    seen_BV = item_graph.seen_items(make_histories(rows, targets), len(count_V) - 1)
    masked_B, unmasked_B = item_graph.rank(
        item_graph.Sparse(score_BV), np.array(targets, np.int32), seen_BV, places(count_V)
    )
    for b, (score_V, row, target) in enumerate(zip(score_BV, rows, targets)):
        assert masked_B[b] == item_graph_rank_loop(score_V, count_V, target, row)
        assert unmasked_B[b] == item_graph_rank_loop(score_V, count_V, target, [])


def test_items_without_a_path_by_hand():
    """Items 3 to 6 have no path; 3 and 4 are as popular, 5 is more popular, 6 is seen."""
    score_BV = item_graph.Sparse(np.array([[0, 0.5, 0.25, 0, 0, 0, 0]] * 4, np.float32))
    count_V = np.array([0, 1, 1, 2, 2, 3, 4])
    targets = np.array([3, 5, 1, 6], np.int32)
    seen_BV = item_graph.seen_items(make_histories([[6]] * 4, targets), 6)
    masked_B, unmasked_B = item_graph.rank(score_BV, targets, seen_BV, places(count_V))
    # Item 3 is behind 1, 2, 5 and 6, and the tie with 4 counts against it.
    assert unmasked_B.tolist() == [1 + 5, 1 + 3, 1, 1 + 2]
    assert masked_B.tolist() == [1 + 4, 1 + 2, 1, 6]


@settings(max_examples=100, deadline=None)
@given(scored(), st.integers(1, 8), st.booleans())
def test_lists_are_those_of_the_loop(case, k, masked):
    score_BV, count_V, rows, targets = case
    seen_BV = item_graph.seen_items(make_histories(rows, targets), len(count_V) - 1)
    hidden_BV = seen_BV if masked else item_graph.Sparse(seen_BV.shape, dtype=np.float32)
    order = item_graph.popularity(count_V)
    found_BK = item_graph.top_items(item_graph.Sparse(score_BV), hidden_BV, order, k)
    for score_V, row, found_K in zip(score_BV, rows, found_BK):
        left = [v for v in range(1, len(count_V)) if not (masked and v in row)]
        best = sorted(left, key=lambda v: (-score_V[v], -count_V[v], v))[:k]
        assert found_K.tolist() == best + [0] * (k - len(best))


# Users.

ROWS = [[1], [2, 3], [6, 5], [3, 1, 4, 1], [4, 2], [5]]
TARGETS = [2, 1, 3, 4, 6, 5]
SETTING = Setting(2, 0.5, 0.15, 0.0, 2, 0.5)


@pytest.mark.parametrize('at_once, least, most', [(1, 6, 6), (30, 2, 5), (2**22, 1, 1)])
def test_blocks_of_users_change_nothing(at_once, least, most, monkeypatch):
    monkeypatch.setattr(item_graph, 'ENTRIES_AT_ONCE', at_once)
    histories, training = make_histories(ROWS, TARGETS), make_training()
    path_VV = item_graph.paths(training, SETTING)
    parts = list(item_graph.blocks(histories, path_VV, SETTING.last))
    assert [u for part in parts for u in range(len(ROWS))[part]] == [*range(len(ROWS))]
    assert least <= len(parts) <= most
    ranks = item_graph.rank_users(histories, path_VV, SETTING, training.count_V)
    expected = ranks_loop(ROWS, TARGETS, SETTING)
    assert {p: getattr(ranks, p).tolist() for p in metrics.PROTOCOLS} == expected
    lists = item_graph.list_users(histories, path_VV, SETTING, training.count_V, 3)
    # The item at rank r is in the list of the first three if and only if r <= 3, ties apart.
    for protocol, item_UK in lists.items():
        assert item_UK.shape == (len(ROWS), 3)
        for row, item_K, target, rank in zip(ROWS, item_UK, TARGETS, expected[protocol]):
            assert target in item_K or rank > 3
            assert protocol == 'unmasked' or not set(row) & set(item_K.tolist())


def test_the_multiplications_of_a_user():
    path_VV = item_graph.paths(make_training(), Setting(1, 1.0, 0.0, 0.0, 2, 0.5))
    neighbours = (item_graph_loop(TRAINING, NUM_ITEMS, 1, 1.0) > 0).sum(axis=1)
    found = item_graph.products(make_histories(ROWS, TARGETS), path_VV, 2)
    assert found.tolist() == [sum(neighbours[item] for item in row[-2:]) for row in ROWS]


# The choice.


def walks(seed, users=60, num_items=9):
    """Histories in which items follow one another by a rule with some noise."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(users):
        row = [int(draw.integers(1, num_items + 1))]
        for _ in range(int(draw.integers(3, 7))):
            step = int(draw.choice([1, 2, 4], p=[0.5, 0.3, 0.2]))
            row.append((row[-1] + step - 1) % num_items + 1)
        rows.append(row)
    return rows


def grid(second_hops):
    """Settings of the grid in their order."""
    return [
        Setting(*graph, second_hop, exponent, *history)
        for graph in item_graph.GRAPHS
        for second_hop in second_hops
        for exponent in item_graph.EXPONENTS
        for history in item_graph.HISTORIES
    ]


def choose(rows, users=slice(None), protocol='masked'):
    training = make_training([row[:-1] for row in rows], 9)
    validation = make_histories([row[:-1] for row in rows], [row[-1] for row in rows])
    users = np.arange(len(rows))[users]
    return item_graph.choose(training, validation, users, protocol)


@pytest.mark.parametrize('protocol', metrics.PROTOCOLS)
@pytest.mark.parametrize('seed', [0, 1])
def test_the_best_setting_on_the_users_is_chosen(seed, protocol):
    rows, sample = walks(seed), slice(10, 40)
    training = make_training([row[:-1] for row in rows], 9)
    histories = make_histories(
        [row[:-1] for row in rows[sample]], [row[-1] for row in rows[sample]]
    )

    def value(setting):
        path_VV = item_graph.paths(training, setting)
        ranks = item_graph.rank_users(histories, path_VV, setting, training.count_V)
        return metrics.metrics(getattr(ranks, protocol))['ndcg@20']

    candidates = {}
    for graph in item_graph.GRAPHS:
        one_hop = {s: value(s) for s in grid([0.0]) if s[:2] == graph}
        best = max(one_hop, key=one_hop.get)
        two_hops = [best._replace(second_hop=weight) for weight in item_graph.SECOND_HOPS]
        candidates |= one_hop | {setting: value(setting) for setting in two_hops}
    chosen = choose(rows, sample, protocol)
    assert chosen.value == max(candidates.values()) == candidates[chosen.setting]
    assert_close(chosen.path_VV.toarray(), item_graph.paths(training, chosen.setting).toarray())
    assert choose(rows, sample, protocol).setting == chosen.setting


def test_settings_that_need_too_much_are_left_out(monkeypatch):
    rows = walks(0)
    actions = sum(len(row) - 1 for row in rows)
    monkeypatch.setattr(item_graph, 'SECOND_HOPS', (1e6,))  # always the best, where it is tried
    with monkeypatch.context() as patch:
        patch.setattr(item_graph, 'metrics', lambda rank_U: {'ndcg@20': 0.0})
        assert choose(rows).setting == grid([0.0])[0]  # the first of equal ones
        patch.setattr(item_graph, 'MAX_PAIRS', actions - 1)
        assert choose(rows) is None
    monkeypatch.setattr(item_graph, 'MAX_PAIRS', 5 * actions)
    assert choose(rows).setting.window in (1, 5)
    monkeypatch.setattr(item_graph, 'MAX_ENTRIES', 0)
    assert choose(rows).setting.second_hop == 0
    monkeypatch.setattr(item_graph, 'MAX_PRODUCTS', 0)
    assert choose(rows) is None
