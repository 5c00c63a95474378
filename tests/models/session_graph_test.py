"""Session graphs against dictionaries of runs and sets of pairs; attention along their edges."""

from functools import cache

import jax
import numpy as np
from fixtures import assert_close, float64, quick_jit, random_tree, right_aligned
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import graph_layer_loop, graph_loop

from fame_jax.models import session_graph

LENGTH, ORDER = 7, 3
items = st.lists(st.integers(1, 3), max_size=LENGTH)


@cache
def graph(order):
    def build(tokens_BL, real_BL):
        levels = session_graph.equal_runs(tokens_BL, real_BL, order)
        kinds = [edge[:3] for edge in session_graph.edges(levels)]
        links = [edge.link_BQS for edge in session_graph.edges(levels)]
        kept.append(kinds)
        return levels, [session_graph.nodes(level) for level in levels], links

    kept = []
    compiled = quick_jit(build)

    def read(tokens_BL, real_BL):
        same, nodes, links = compiled(tokens_BL, real_BL)
        return same, nodes, dict(zip(kept[0], links))

    return read


def run_at(history, length, k, column):
    """The run of k that ends at a column, or None."""
    end = column - (length - len(history)) + 1
    return tuple(history[end - k : end]) if end >= k else None


def assert_graph(history, order, length=LENGTH):
    tokens_BL = right_aligned(history, length)
    same, first, links = graph(order)(tokens_BL, tokens_BL > 0)
    nodes, edges = graph_loop(history, order)
    ends = [[run_at(history, length, k + 1, i) for i in range(length)] for k in range(order)]
    for k in range(order):
        equal = [[a is not None and a == b for b in ends[k]] for a in ends[k]]
        assert same[k][0].tolist() == equal
        assert [ends[k][i] for i in np.flatnonzero(first[k][0])] == nodes[k]
    assert links.keys() == edges.keys()
    for (kind, a, b), pairs in edges.items():
        linked = [[(s, q) in pairs for s in ends[a]] for q in ends[b]]
        assert links[kind, a, b][0].tolist() == linked


@settings(max_examples=60, deadline=None)
@given(items)
@example([])
@example([1, 1, 1, 1, 1, 1, 1])
@example([1, 2, 1, 2, 3, 1, 2])
def test_graphs_are_those_of_dictionaries(history):
    assert_graph(history, ORDER)


def test_rows_shorter_than_the_longest_run():
    for length in (1, 2):
        for history in ([], [4], [4, 4])[: length + 1]:
            assert_graph(history, 4, length)


def test_the_example_of_the_docstring():
    tokens_BL = np.array([[0, 1, 2, 1, 2]], np.int32)
    _, first, links = graph(2)(tokens_BL, tokens_BL > 0)
    assert first[0][0].tolist() == [0, 1, 1, 0, 0]
    assert first[1][0].tolist() == [0, 0, 1, 1, 0]
    # Rows are ends, columns starts: 1 2 at columns 1, 3 and 2, 4; 12 at 2, 4 and 21 at 3.
    assert links['intra_1', 0, 0][0].tolist() == [
        [0, 0, 0, 0, 0],
        [0, 0, 1, 0, 1],
        [0, 1, 0, 1, 0],
        [0, 0, 1, 0, 1],
        [0, 1, 0, 1, 0],
    ]
    assert links['inter', 0, 1][0].tolist() == [
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 1, 0, 1],
        [0, 1, 0, 1, 0],
        [0, 0, 1, 0, 1],
    ]


def test_a_layer_gathers_along_the_edges_and_against_them():
    """A single layer, two heads, on a history with a repeated run; any column of a node has it."""
    history, order, width = [1, 2, 1, 2, 3], 2, 4
    tokens_BL = right_aligned(history)
    rng = np.random.default_rng(0)
    nodes, edges = graph_loop(history, order)
    x = [{run: rng.normal(size=width) for run in level} for level in nodes]
    columns = [
        np.array(
            [[x[k].get(run_at(history, LENGTH, k + 1, i), np.zeros(width)) for i in range(LENGTH)]],
            np.float32,
        )
        for k in range(order)
    ]
    layer = session_graph.GraphLayer(2, 0.0, np.float32)

    def inputs(tokens_BL):
        same = session_graph.equal_runs(tokens_BL, tokens_BL > 0, order)
        return [session_graph.nodes(level) for level in same], session_graph.edges(same)

    def run(params, columns, tokens_BL):
        return layer.apply({'params': params}, columns, *inputs(tokens_BL), train=False)

    def init(columns, tokens_BL):
        key = np.zeros(2, np.uint32)
        return layer.init(key, columns, *inputs(tokens_BL), train=False)['params']

    params = random_tree(jax.eval_shape(init, columns, tokens_BL))
    out = quick_jit(run)(params, columns, tokens_BL)
    expected = graph_layer_loop(float64(params), x, edges)
    for k in range(order):
        for i in range(LENGTH):
            run_of = run_at(history, LENGTH, k + 1, i)
            if run_of:
                assert_close(out[k][0, i], expected[k][run_of])
