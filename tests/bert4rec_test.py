"""BERT4Rec against explicit float64 loops, what it hides and never lets through; FAME over it."""

from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fame_test import facet_loop
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from layers_test import (
    assert_close,
    block_loop,
    float64,
    gelu_loop,
    new_key,
    norm_loop,
    quick_jit,
    random_tree,
    rows,
)
from sasrec_test import comparable_loop, encode
from surgery_test import shapes

from fame_jax import surgery
from fame_jax.batch import Batch
from fame_jax.models import bert4rec, facet_block, fame
from fame_jax.models.bert4rec import BERT4Rec
from fame_jax.models.fame import FAMEBERT4Rec

NUM_ITEMS, MASK = 12, 13
ENCODER = {
    'num_items': NUM_ITEMS,
    'width': 8,
    'similarity': 'cosine',
    'temperature': 0.5,
    'tied_items': True,
    'item_training': 'trained',
    'num_blocks': 1,
    'num_heads': 2,
    'inner_multiple': 2,
    'activation': 'gelu',
    'dropout': 0.0,
    'max_length': 5,
    'positions': 'start',
    'attention_bias': True,
    'attention_scale': 'head',
    'dtype': jnp.float32,
}
FACETS = {
    'num_experts': 3,
    'routing': 'outputs',
    'active_experts': 0,
    'attention_dropout': -1.0,
    'attention': 'einsum',
    'remat': 'none',
    'attention_residual': 'norm',
    'output_projection': 'drop',
    'facet_init': 'slices',
    'facet_learned': True,
    'gate_scale': 'heads',
    'ffn_shared': True,
}

# Histories 1 2 3 4 5 6, 7 8 3 and 9 1, as rows: side by side, one to a row, and one to a row's end.
PACKED = {
    'tokens': [[1, 2, 3, 4, 5, 6, 7, 8, 3, 9, 1, 0], [0] * 12, [0] * 12],
    'positions': [[0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 0], [0] * 12, [0] * 12],
    'segments': [[1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 0], [0] * 12, [0] * 12],
}
ALONE = {
    'tokens': [[1, 2, 3, 4, 5, 6] + [0] * 6, [7, 8, 3] + [0] * 9, [9, 1] + [0] * 10],
    'positions': [[0, 1, 2, 3, 4, 5] + [0] * 6, [0, 1, 2] + [0] * 9, [0, 1] + [0] * 10],
    'segments': [[1] * 6 + [0] * 6, [1] * 3 + [0] * 9, [1] * 2 + [0] * 10],
}
AT_THE_END = {name: [row[6:] + row[:6] for row in ALONE[name]] for name in ALONE}
AT_THE_END['tokens'][1:] = [[0] * 9 + [7, 8, 3], [0] * 10 + [9, 1]]
AT_THE_END['positions'][1:] = [[0] * 9 + [0, 1, 2], [0] * 10 + [0, 1]]
AT_THE_END['segments'][1:] = [[0] * 9 + [1] * 3, [0] * 10 + [1] * 2]


def make_model(kind=BERT4Rec, seed=0, **options):
    """A small model, and parameters large enough for every part of it to show."""
    default = ENCODER if kind is BERT4Rec else ENCODER | FACETS
    module = kind(**default | options)
    return module, random_tree(shapes(module), seed)


def fields_of(written):
    return tuple(np.array(written[name], np.int32) for name in PACKED)


def make_batch(written):
    """A Batch of whole histories, as the layout 'cloze' has it."""
    fields = fields_of(written)
    return Batch(*fields, fields[0], (fields[2] > 0).astype(np.float32))


# The equations.


def both_sides_loop(block, x_LD, segments_L):
    """A causal loop that reads both sides: each position in turn is asked as the row's last.

    Without distances attention does not care for the order of what it reads.
    """
    out_LD = np.zeros(x_LD.shape)
    for i in np.flatnonzero(segments_L):
        order = [j for j in range(len(x_LD)) if j != i] + [i]
        out_LD[i] = block(x_LD[order], segments_L[order])[0][-1]
    return out_LD


def below_loop(p, tokens_L, positions_L, segments_L, module, num_blocks):
    """The first blocks' output, [L, D]."""
    x_LD = np.zeros((len(tokens_L), module.width))
    for i, (token, position) in enumerate(zip(tokens_L, positions_L)):
        x_D = p['mask_vector'][0] if token == MASK else p['item_table'][token]
        x_LD[i] = norm_loop(x_D + p['position_table'][position], p['input_norm'])
    for n in range(num_blocks):
        block = partial(block_loop, p=p[f'block_{n}'], scale=module.attention_scale)
        x_LD = both_sides_loop(block, x_LD, segments_L)
    return x_LD


def rows_with_masks(length):
    """Rows as in training; some items are hidden, and one row hides all."""
    tokens_BL, positions_BL, segments_BL = rows(length)
    tokens_BL[0, ::2] = MASK
    tokens_BL[-1] = np.where(segments_BL[-1] > 0, MASK, 0)
    return tokens_BL, positions_BL, segments_BL


CASES = [
    (2, {'similarity': 'dot', 'num_heads': 1}),
    (5, {'num_blocks': 2}),
    (5, {'num_heads': 4, 'attention_scale': 'model', 'tied_items': False}),
]


@pytest.mark.parametrize('length, options', CASES)
def test_matches_the_loop(length, options):
    module, params = make_model(**options)
    fields = rows_with_masks(length)
    query_BLD, item_VD = encode(module, params, *fields, method='query_and_items')
    p = float64(params)
    for query_LD, *row in zip(query_BLD, *fields, strict=True):
        h_LD = below_loop(p, *row, module, module.num_blocks)
        for i in np.flatnonzero(row[2]):
            head_D = gelu_loop(h_LD[i] @ p['head']['kernel'] + p['head']['bias'])
            head_D = comparable_loop(head_D, module.similarity, module.temperature)
            assert_close(query_LD[i], [*head_D, 1.0], 2e-5)
    table_VD = p['item_table' if module.tied_items else 'output_table']
    for v, vector_D in enumerate(item_VD):
        expected_D = comparable_loop(table_VD[v], module.similarity)
        assert_close(vector_D, [*expected_D, p['item_bias'][v]])


@pytest.mark.parametrize('length, options', [(2, {}), (5, {'num_experts': 2, 'num_blocks': 2})])
def test_fame_over_it_matches_the_loop(length, options):
    module, params = make_model(FAMEBERT4Rec, **options)
    fields = rows_with_masks(length)
    query_BLD, item_VD = encode(module, params, *fields, method='query_and_items')
    p = float64(params)
    block = SimpleNamespace(**ENCODER | FACETS | options, scale='head')
    for query_LD, *row in zip(query_BLD, *fields, strict=True):
        x_LD = below_loop(p, *row, module, module.num_blocks - 1)
        u_LD = both_sides_loop(partial(facet_loop, p=p['facet_block'], block=block), x_LD, row[2])
        for i in np.flatnonzero(row[2]):
            assert_close(query_LD[i], comparable_loop(u_LD[i], 'cosine', 0.5), 2e-5)
    assert_close(item_VD, [comparable_loop(x_D, 'cosine') for x_D in p['item_table']])


def test_the_head_knows_an_items_bias_wherever_it_scores():
    module, params = make_model()
    fields = rows(2)
    query_BLD, item_VD = encode(module, params, *fields, method='query_and_items')
    more = params | {'item_bias': params['item_bias'].at[7].add(3.0)}
    _, other_VD = encode(module, more, *fields, method='query_and_items')
    risen_BLV = np.einsum('BLD,VD->BLV', query_BLD, other_VD - item_VD)
    assert_close(risen_BLV, np.broadcast_to(3.0 * (np.arange(13) == 7), risen_BLV.shape))


# What is seen, and what never is.


def test_visible_of_a_packed_row():
    module, _ = make_model()
    mask_BQS = module.visible(jnp.array([[1, 1, 1, 2, 2, 0], [0, 0, 1, 1, 1, 1]]))
    packed = [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    at_the_end = [[0, 0, 0, 0, 0, 0]] * 2 + [[0, 0, 1, 1, 1, 1]] * 4
    np.testing.assert_array_equal(np.asarray(mask_BQS, int), [packed, at_the_end])


@pytest.mark.parametrize('kind', [BERT4Rec, FAMEBERT4Rec])
def test_a_query_depends_on_the_rest_of_its_history_and_not_on_what_is_hidden(kind):
    """Items are distinct, so that an item is a place; 3 of 1 2 3 4 and 6 of 5 6 are hidden."""
    module, params = make_model(kind, num_blocks=1)
    tokens_BL = np.array([[1, 2, MASK, 4, 5, MASK, 0]], np.int32)
    segments_BL = np.array([[1, 1, 1, 1, 2, 2, 0]], np.int32)
    positions_BL = np.array([[0, 1, 2, 3, 0, 1, 0]], np.int32)
    direction_D = np.random.default_rng(3).normal(size=8 + (kind is BERT4Rec))

    def outputs(item_table):
        tree = {'params': params | {'item_table': item_table}}
        query_BLD, _ = module.apply(tree, tokens_BL, positions_BL, segments_BL)
        return query_BLD @ direction_D.astype(np.float32)

    slope_BLVD = quick_jit(jax.jacrev(outputs))(params['item_table'])
    reached_LV = np.abs(slope_BLVD).max(axis=-1)[0] > 0
    found = [np.flatnonzero(reached_V).tolist() for reached_V in reached_LV[:6]]
    assert found == [[1, 2, 4]] * 4 + [[5]] * 2


# Hiding.


@cache
def hider(num_items=NUM_ITEMS):
    """(key, tokens_BL, segments_BL, rate) -> (tokens_BL, hidden_BL)."""

    def f(key, tokens_BL, segments_BL, rate):
        options = {'rate': rate, 'num_items': num_items, 'mask_id': num_items + 1}
        return bert4rec.hide(key, tokens_BL, segments_BL, **options)

    return quick_jit(f)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.lists(st.integers(1, 6), max_size=3), min_size=4, max_size=4),
    rate=st.sampled_from([0.001, 0.2, 1.0]),
    seed=st.integers(0, 99),
)
def test_every_history_has_something_hidden_and_padding_has_not(lengths, rate, seed):
    segments_BL = np.zeros((4, 18), np.int32)
    for row, own in zip(segments_BL, lengths):
        row[: sum(own)] = np.repeat(np.arange(1, len(own) + 1), own)
    tokens_BL = np.where(segments_BL > 0, 5, 0).astype(np.int32)
    read_BL, hidden_BL = hider()(new_key(seed), tokens_BL, segments_BL, rate)
    for read_L, hidden_L, segments_L in zip(read_BL, hidden_BL, segments_BL):
        assert not hidden_L[segments_L == 0].any() and not read_L[segments_L == 0].any()
        for segment in range(1, segments_L.max() + 1):
            assert hidden_L[segments_L == segment].any()
    assert (read_BL[~hidden_BL] == tokens_BL[~hidden_BL]).all()
    assert np.isin(read_BL[hidden_BL], range(1, MASK + 1)).all()
    if rate == 1.0:
        assert (hidden_BL == (segments_BL > 0)).all()


def test_where_nothing_is_drawn_the_last_is_masked():
    tokens_BL, _, segments_BL = fields_of(PACKED)
    read_BL, hidden_BL = hider()(new_key(0), tokens_BL, segments_BL, 0.0)
    assert hidden_BL[0].astype(int).tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1, 0]
    assert read_BL[0].tolist() == [1, 2, 3, 4, 5, MASK, 7, 8, MASK, 9, MASK, 0]
    assert not hidden_BL[1:].any()


def test_shares_of_what_is_hidden():
    """A draw so large that every share is within four deviations; the histories are long."""
    num_items, rate = 1000, 0.3
    tokens_BL = np.full((50, 400), 7, np.int32)
    read_BL, hidden_BL = hider(num_items)(new_key(0), tokens_BL, np.ones_like(tokens_BL), rate)
    read_T = read_BL[hidden_BL]
    kept, masked = read_T == 7, read_T == num_items + 1
    for share, expected, number in [
        (hidden_BL.mean(), rate, hidden_BL.size),
        (masked.mean(), 0.8, len(read_T)),
        (kept.mean(), 0.1, len(read_T)),
    ]:
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / number) + 1e-3
    replaced = read_T[~kept & ~masked]
    assert replaced.min() < 20 and 980 < replaced.max() <= num_items
    assert abs(replaced.mean() - 500) < 4 * 289 / np.sqrt(len(replaced))


def test_hiding_is_drawn_from_the_key_and_not_from_the_items():
    tokens_BL, _, segments_BL = fields_of(PACKED)
    other_BL = np.where(segments_BL > 0, NUM_ITEMS + 1 - tokens_BL, 0).astype(np.int32)
    read_BL, hidden_BL = hider()(new_key(0), tokens_BL, segments_BL, 0.5)
    again_BL, _ = hider()(new_key(0), tokens_BL, segments_BL, 0.5)
    np.testing.assert_array_equal(again_BL, read_BL)
    _, redrawn_BL = hider()(new_key(1), tokens_BL, segments_BL, 0.5)
    assert (redrawn_BL != hidden_BL).any()
    same_BL, also_BL = hider()(new_key(0), other_BL, segments_BL, 0.5)
    np.testing.assert_array_equal(also_BL, hidden_BL)
    np.testing.assert_array_equal(same_BL == MASK, read_BL == MASK)


# The objective.


@cache
def graded(module, chunk_tokens=0):
    """(params, batch, key, rate) -> ((sum, count), gradient)."""

    def f(params, batch, key, rate):
        options = {'cloze_rate': rate, 'chunk_tokens': chunk_tokens, 'chunk_items': 0}
        return bert4rec.cloze(module, params, batch, key, **options)

    return quick_jit(jax.value_and_grad(f, has_aux=True))


@pytest.mark.parametrize('kind', [BERT4Rec, FAMEBERT4Rec])
def test_the_loss_is_that_of_the_hidden_positions(kind):
    """Of what was read in their place, which is drawn here once more."""
    module, params = make_model(kind)
    batch, key = make_batch(PACKED), new_key(3)
    hide_key, _ = jax.random.split(key)
    read_BL, hidden_BL = hider()(hide_key, batch.tokens_BL, batch.segments_BL, 0.5)
    rest = batch.positions_BL, batch.segments_BL
    query_BLD, item_VD = encode(module, params, read_BL, *rest, method='query_and_items')
    expected, count = 0.0, 0
    for i in np.flatnonzero(hidden_BL[0]):
        score_V = float64(item_VD)[1:] @ float64(query_BLD)[0, i]
        expected += np.log(np.exp(score_V).sum()) - score_V[batch.targets_BL[0, i] - 1]
        count += 1
    (total, number), _ = graded(module)(params, batch, key, 0.5)
    assert_close(total, expected)
    assert number == count and 3 <= count < 11


def test_chunks_change_nothing():
    module, params = make_model()
    arguments = params, make_batch(PACKED), new_key(1), 0.5
    expected = graded(module)(*arguments)
    assert 2 < expected[0][1] < 11
    jax.tree.map(assert_close, graded(module, 2)(*arguments), expected)


@pytest.mark.parametrize('kind', [BERT4Rec, FAMEBERT4Rec])
def test_packing_changes_neither_loss_nor_gradients(kind):
    """All last items are hidden and no others, so that no draw depends on the row."""
    module, params = make_model(kind)
    f, rest = graded(module), (new_key(0), 0.0)
    (loss, count), gradient = f(params, make_batch(ALONE), *rest)
    assert count == 3
    for written in (PACKED, AT_THE_END):
        (other_loss, other_count), other_gradient = f(params, make_batch(written), *rest)
        assert_close(other_loss, loss)
        assert other_count == 3
        jax.tree.map(assert_close, other_gradient, gradient)
    assert not np.any(gradient['item_table'][0])
    largest = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda x: abs(x).max(), gradient))
    without = {jax.tree_util.keystr(p, simple=True, separator='/') for p, g in largest if g < 1e-5}
    # A key's bias adds the same to all logits of a query.
    last = 'facet_block' if kind is FAMEBERT4Rec else 'block_0/attention'
    assert without == {f'{last}/key_bias'}


def test_a_batch_of_padding_is_zero_and_has_no_gradient():
    module, params = make_model()
    empty = Batch(*(0 * field for field in make_batch(PACKED)))
    (total, number), gradient = graded(module, 2)(params, empty, new_key(0), 0.5)
    assert total == number == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_bfloat16_is_finite_and_near_float32():
    module, params = make_model()
    arguments = params, make_batch(PACKED), new_key(0), 0.5
    (expected, count), _ = graded(module)(*arguments)
    (total, number), gradient = graded(module.clone(dtype=jnp.bfloat16), 2)(*arguments)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert number == count and abs(total - expected) < 0.03 * expected


@pytest.mark.parametrize('kind', [BERT4Rec, FAMEBERT4Rec])
def test_both_sides_of_a_score_are_of_the_models_dtype(kind):
    module, params = make_model(kind, dtype=jnp.bfloat16)
    sides = encode(module, params, *fields_of(ALONE), method='query_and_items')
    for side in sides:
        assert side.dtype == jnp.bfloat16 and np.isfinite(side.astype(np.float32)).all()


# Judging.


@pytest.mark.parametrize('kind', [BERT4Rec, FAMEBERT4Rec])
def test_asked_for_the_last_column_is_asked_behind_the_last_item(kind):
    """Of 4 of 5 items, 3, and none at all; against the same histories without padding."""
    module, params = make_model(kind)
    written = {
        'tokens': [[0, 1, 2, 3, 4], [0, 0, 7, 8, 3], [0, 0, 0, 0, 0], [2, 4, 6, 8, 9]],
        'positions': [[0, 0, 1, 2, 3], [0, 0, 0, 1, 2], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]],
        'segments': [[0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
    }
    query_B1D, parts = encode(module, params, *fields_of(written), last=True)
    assert query_B1D.shape == (4, 1, 8 + (kind is BERT4Rec))
    (out,) = parts.values()
    assert out['attention_BHNQS'].shape[-2:] == (1, 6)
    asked = [[*filter(None, tokens_L), MASK] for tokens_L in written['tokens']]
    tokens_BL = np.array([[*row, 0, 0, 0, 0, 0][:6] for row in asked], np.int32)
    segments_BL = (tokens_BL > 0).astype(np.int32)
    positions_BL = np.arange(6, dtype=np.int32)[None] * segments_BL
    expected_BLD, _ = encode(module, params, tokens_BL, positions_BL, segments_BL)
    for query_1D, expected_LD, row in zip(query_B1D, expected_BLD, asked):
        assert_close(query_1D[0], expected_LD[len(row) - 1])


def test_a_row_too_long_for_the_table_loses_its_earliest_column():
    """One of six items, and one of five behind padding."""
    module, params = make_model()
    tokens_BL = np.array([[1, 2, 3, 4, 5, 6], [0, 2, 3, 4, 5, 6]], np.int32)
    positions_BL = np.array([[0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4]], np.int32)
    segments_BL = (tokens_BL > 0).astype(np.int32)
    query_B1D, _ = encode(module, params, tokens_BL, positions_BL, segments_BL, last=True)
    kept_BL = positions_BL[1:, 1:]
    expected_11D, _ = encode(module, params, tokens_BL[1:, 1:], kept_BL, kept_BL * 0 + 1, last=True)
    for query_1D in query_B1D:
        assert_close(query_1D, expected_11D[0], 1e-6)


# From BERT4Rec to FAME.


def operate(**options):
    """(BERT4Rec, its parameters, FAME over it, parameters after surgery)."""
    backbone, old = make_model()
    module, new = make_model(FAMEBERT4Rec, seed=1, **options)
    plan = fame.plan(module, new_key(0), 'upcycle', 0.0)
    return backbone, old, module, surgery.transplant(old, new, plan)


@pytest.mark.parametrize('projection, residual', [('drop', 'norm'), ('keep', 'none')])
def test_every_leaf_is_used_or_left_on_purpose(projection, residual):
    """Each old leaf is a number of its own, found again in the new tree or not."""
    module, new = make_model(
        FAMEBERT4Rec,
        num_experts=1,
        output_projection=projection,
        attention_residual=residual,
    )
    _, old = make_model()
    leaves, tree = jax.tree.flatten(old)
    old = tree.unflatten([np.full(leaf.shape, 100.0 + i) for i, leaf in enumerate(leaves)])
    result = surgery.transplant(old, new, fame.plan(module, new_key(0), 'upcycle', 0.0))
    origin = {float(leaf.ravel()[0]): path for path, leaf in flatten_dict(old, sep='/').items()}
    found = {
        path: origin[float(leaf.ravel()[0])]
        for path, leaf in flatten_dict(result, sep='/').items()
        if leaf.ravel()[0] >= 100
    }
    attention, block = 'block_0/attention', 'facet_block'
    kept = ['query', 'key', 'value', 'query_bias', 'key_bias', 'value_bias']
    kept += ['output', 'output_bias'] if projection == 'keep' else []
    expected = {f'{block}/{name}': f'{attention}/{name}' for name in kept}
    if residual == 'norm':
        norm = ('attention_norm/scale', 'attention_norm/bias')
        expected |= {f'{block}/{name}': f'block_0/{name}' for name in norm}
    below = {'item_table', 'position_table', 'mask_vector', 'input_norm/scale', 'input_norm/bias'}
    assert found == expected | {path: path for path in below}
    left = {'head/kernel', 'head/bias', 'item_bias'}
    left |= {path for path in origin.values() if path.startswith('block_0/')}
    assert set(origin.values()) - set(found.values()) == left - set(expected.values())


def test_surgery_keeps_the_encoders_slices():
    """What both have kept, and the rest made idle: u is the encoder's output before the head.

    As over SASRec: the feed-forward nets add nothing, gates are even and facets the slices; a head
    then holds its slice of that output, normalised once more.
    """
    backbone, old, module, new = operate(num_experts=1, output_projection='keep', similarity='dot')
    dense = old['block_0']['feed_forward']
    dense['down'] = jax.tree.map(jnp.zeros_like, dense['down'])
    block = new['facet_block']
    idle = ('down', 'down_bias', 'gate', 'gate_bias')
    block |= {name: jnp.zeros_like(block[name]) for name in idle}
    block['facet'] = facet_block.slice_selectors(None, (2, 8, 4))
    old['block_0']['feed_forward_norm'] = {'scale': jnp.ones(8), 'bias': jnp.zeros(8)}
    block['feed_forward_norm'] = {'scale': jnp.ones(4), 'bias': jnp.zeros(4)}
    _, _, segments_BL = fields = rows_with_masks(5)
    h_BLD, _ = encode(backbone, old, *fields, method='encode')
    u_BLD, _ = encode(module, new, *fields)
    for before_D, after_D in zip(h_BLD[segments_BL > 0], u_BLD[segments_BL > 0], strict=True):
        slices = [norm_loop(x_K, block['feed_forward_norm']) for x_K in np.split(before_D, 2)]
        assert_close(after_D, np.concatenate(slices), 1e-4)  # normed twice


def test_number_of_parameters():
    items, norm = 13 * 8, 8 + 8
    block = 4 * (8 * 8 + 8) + (8 * 16 + 16) + (16 * 8 + 8) + 2 * norm
    encoder = items + 6 * 8 + 8 + norm + block  # six positions, and [MASK]
    head = 8 * 8 + 8 + 13
    sizes = [leaf.size for leaf in jax.tree.leaves(shapes(BERT4Rec(**ENCODER)))]
    assert sum(sizes) == encoder + head
    names = set(shapes(FAMEBERT4Rec(**ENCODER | FACETS)))
    assert names == {*('item_table', 'mask_vector', 'position_table', 'input_norm', 'facet_block')}
