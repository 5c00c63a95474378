"""BERT4Rec against explicit float64 loops; its masks and their effect; FAME over BERT4Rec."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import (
    assert_close,
    compile_gradient,
    encode,
    float64,
    make_model,
    new_key,
    parameter_shapes,
    quick_jit,
    rows,
)
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import block_loop, comparable_loop, facet_loop, gelu_loop, norm_loop

from fame_jax.batch import Batch
from fame_jax.models import bert4rec, fame_block, surgery

NUM_ITEMS, MASK = 12, 13
NAMES = ['bert4rec', 'fame_bert4rec']

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


def make_bert(name='bert4rec', seed=0, **options):
    """A small model with cosine scores, and random parameters."""
    cosine = {'similarity': 'cosine', 'temperature': 0.5}
    return make_model(name, seed, **{'max_length': 5, **cosine, **options})


def fields_of(written):
    return tuple(np.array(written[name], np.int32) for name in PACKED)


def make_batch(written):
    """A Batch of whole histories, in the layout 'masked'."""
    fields = fields_of(written)
    return Batch(*fields, fields[0], (fields[2] > 0).astype(np.float32))


# The equations.


def both_sides_loop(block, x_LD, segments_L):
    """A causal loop that reads both sides: each position in turn is moved to the row's end.

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
    """Rows as in training; some items are masked, and one row is all masks."""
    tokens_BL, positions_BL, segments_BL = rows(length)
    tokens_BL[0, ::2] = MASK
    tokens_BL[-1] = np.where(segments_BL[-1] > 0, MASK, 0)
    return tokens_BL, positions_BL, segments_BL


CASES = [
    (2, {'similarity': 'dot', 'num_heads': 1}),
    (5, {'num_blocks': 2}),
    (5, {'num_heads': 4, 'attention_scale': 'model'}),
]


@pytest.mark.parametrize('length, options', CASES)
def test_matches_the_loop(length, options):
    module, params = make_bert(**options)
    fields = rows_with_masks(length)
    query_BLD, item_VD, _ = encode(module, params, *fields, method='forward')
    p = float64(params)
    for query_LD, *row in zip(query_BLD, *fields, strict=True):
        h_LD = below_loop(p, *row, module, module.num_blocks)
        for i in np.flatnonzero(row[2]):
            head_D = gelu_loop(h_LD[i] @ p['head']['kernel'] + p['head']['bias'])
            head_D = comparable_loop(head_D, module.similarity, module.temperature)
            assert_close(query_LD[i], [*head_D, 1.0], 2e-5)
    table_VD = p['item_table']
    for v, vector_D in enumerate(item_VD):
        expected_D = comparable_loop(table_VD[v], module.similarity)
        assert_close(vector_D, [*expected_D, p['item_bias'][v]])


@pytest.mark.parametrize('length, options', [(2, {}), (5, {'num_experts': 2, 'num_blocks': 2})])
def test_fame_over_it_matches_the_loop(length, options):
    module, params = make_bert('fame_bert4rec', **options)
    fields = rows_with_masks(length)
    query_BLD, item_VD, _ = encode(module, params, *fields, method='forward')
    p = float64(params)
    for query_LD, *row in zip(query_BLD, *fields, strict=True):
        x_LD = below_loop(p, *row, module, module.num_blocks - 1)
        u_LD = both_sides_loop(partial(facet_loop, p=p['facet_block'], model=module), x_LD, row[2])
        for i in np.flatnonzero(row[2]):
            assert_close(query_LD[i], comparable_loop(u_LD[i], 'cosine', 0.5), 2e-5)
    assert_close(item_VD, [comparable_loop(x_D, 'cosine') for x_D in p['item_table']])


def test_the_head_knows_an_items_bias_wherever_it_scores():
    module, params = make_bert()
    fields = rows(2)
    query_BLD, item_VD, _ = encode(module, params, *fields, method='forward')
    more = params | {'item_bias': params['item_bias'].at[7].add(3.0)}
    _, other_VD, _ = encode(module, more, *fields, method='forward')
    risen_BLV = np.einsum('BLD,VD->BLV', query_BLD, other_VD - item_VD)
    assert_close(risen_BLV, np.broadcast_to(3.0 * (np.arange(13) == 7), risen_BLV.shape))


# The mask of attention.


def test_attention_mask_of_a_packed_row():
    module, _ = make_bert()
    mask_BQS = module.attention_mask(jnp.array([[1, 1, 1, 2, 2, 0], [0, 0, 1, 1, 1, 1]]))
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


@pytest.mark.parametrize('name', NAMES)
def test_a_query_depends_on_the_rest_of_its_history_and_not_on_what_is_masked(name):
    """Items are distinct, so that an item is a place; 3 of 1 2 3 4 and 6 of 5 6 are masked."""
    module, params = make_bert(name, num_blocks=1)
    tokens_BL = np.array([[1, 2, MASK, 4, 5, MASK, 0]], np.int32)
    segments_BL = np.array([[1, 1, 1, 1, 2, 2, 0]], np.int32)
    positions_BL = np.array([[0, 1, 2, 3, 0, 1, 0]], np.int32)
    direction_D = np.random.default_rng(3).normal(size=8 + (name == 'bert4rec'))

    def outputs(item_table):
        tree = {'params': params | {'item_table': item_table}}
        query_BLD, _ = module.apply(tree, tokens_BL, positions_BL, segments_BL)
        return query_BLD @ direction_D.astype(np.float32)

    slope_BLVD = quick_jit(jax.jacrev(outputs))(params['item_table'])
    depends_LV = np.abs(slope_BLVD).max(axis=-1)[0] > 0
    actual = [np.flatnonzero(depends_V).tolist() for depends_V in depends_LV[:6]]
    assert actual == [[1, 2, 4]] * 4 + [[5]] * 2


# Masked items.


@cache
def masker(num_items=NUM_ITEMS, **more):
    """(key, tokens_BL, segments_BL, prob) -> (tokens_BL, masked_BL)."""

    def f(key, tokens_BL, segments_BL, prob):
        options = {'prob': prob, 'num_items': num_items, 'mask_id': num_items + 1, **more}
        return bert4rec.mask_items(key, tokens_BL, segments_BL, **options)

    return quick_jit(f)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.lists(st.integers(1, 6), max_size=3), min_size=4, max_size=4),
    rate=st.sampled_from([0.001, 0.2, 1.0]),
    seed=st.integers(0, 99),
)
def test_every_history_has_a_masked_item_and_padding_has_none(lengths, rate, seed):
    segments_BL = np.zeros((4, 18), np.int32)
    for row, own in zip(segments_BL, lengths):
        row[: sum(own)] = np.repeat(np.arange(1, len(own) + 1), own)
    tokens_BL = np.where(segments_BL > 0, 5, 0).astype(np.int32)
    read_BL, masked_BL = masker()(new_key(seed), tokens_BL, segments_BL, rate)
    for read_L, masked_L, segments_L in zip(read_BL, masked_BL, segments_BL):
        assert not masked_L[segments_L == 0].any() and not read_L[segments_L == 0].any()
        for segment in range(1, segments_L.max() + 1):
            assert masked_L[segments_L == segment].any()
    assert (read_BL[~masked_BL] == tokens_BL[~masked_BL]).all()
    assert np.isin(read_BL[masked_BL], range(1, MASK + 1)).all()
    if rate == 1.0:
        assert (masked_BL == (segments_BL > 0)).all()


def test_if_no_item_is_drawn_the_last_is_masked():
    tokens_BL, _, segments_BL = fields_of(PACKED)
    read_BL, masked_BL = masker()(new_key(0), tokens_BL, segments_BL, 0.0)
    assert masked_BL[0].astype(int).tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1, 0]
    assert read_BL[0].tolist() == [1, 2, 3, 4, 5, MASK, 7, 8, MASK, 9, MASK, 0]
    assert not masked_BL[1:].any()


def test_shares_of_the_masked_items():
    """A draw so large that every share is within four deviations; the histories are long."""
    num_items, rate = 1000, 0.3
    tokens_BL = np.full((50, 400), 7, np.int32)
    read_BL, masked_BL = masker(num_items)(new_key(0), tokens_BL, np.ones_like(tokens_BL), rate)
    read_T = read_BL[masked_BL]
    kept, masked = read_T == 7, read_T == num_items + 1
    for share, expected, number in [
        (masked_BL.mean(), rate, masked_BL.size),
        (masked.mean(), 0.8, len(read_T)),
        (kept.mean(), 0.1, len(read_T)),
    ]:
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / number) + 1e-3
    replaced = read_T[~kept & ~masked]
    assert replaced.min() < 20 and 980 < replaced.max() <= num_items
    assert abs(replaced.mean() - 500) < 4 * 289 / np.sqrt(len(replaced))


def test_all_selected_items_may_become_masks():
    tokens_BL = np.full((8, 50), 7, np.int32)
    fields = new_key(0), tokens_BL, np.ones_like(tokens_BL), 0.4
    read_BL, masked_BL = masker(mask_share=1.0)(*fields)
    _, same_BL = masker()(*fields)
    np.testing.assert_array_equal(masked_BL, same_BL)
    np.testing.assert_array_equal(read_BL, np.where(masked_BL, MASK, 7))


def test_a_share_of_histories_has_its_last_item_alone_masked():
    """By a loop over histories: the draw by probability, or the last item alone."""
    lengths = [2, 5, 3, 4, 6] * 4
    segments_BL = np.tile(np.repeat(np.arange(1, 21), lengths), (40, 1)).astype(np.int32)
    tokens_BL = np.full_like(segments_BL, 7)
    _, old_BL = masker()(new_key(0), tokens_BL, segments_BL, 0.9)
    read_BL, new_BL = masker(last_share=0.4)(new_key(0), tokens_BL, segments_BL, 0.9)
    alone = 0
    for b in range(40):
        for segment in range(1, 21):
            own = segments_BL[b] == segment
            last = np.arange(own.sum()) == own.sum() - 1
            is_alone = (new_BL[b, own] == last).all() and read_BL[b, own][-1] == MASK
            assert is_alone or (new_BL[b, own] == old_BL[b, own]).all()
            alone += is_alone and not (old_BL[b, own] == last).all()
    # At a probability of .9 hardly a history has its last item alone selected by the draw.
    assert abs(alone / 800 - 0.4) < 4 * np.sqrt(0.4 * 0.6 / 800) + 0.03


@pytest.mark.parametrize('name', NAMES)
def test_positions_from_the_end(name):
    """They are those of a table by position that is read backwards, in each history by itself."""
    module, params = make_bert(name, num_blocks=2)
    backward = module.clone(positions='end')
    tokens_BL, positions_BL, segments_BL = rows_with_masks(5)
    from_end_BL = np.zeros_like(positions_BL)
    for b, i in zip(*np.nonzero(segments_BL)):
        own = np.flatnonzero(segments_BL[b] == segments_BL[b, i])
        from_end_BL[b, i] = own[-1] - i
    expected_BLD, _ = encode(module, params, tokens_BL, from_end_BL, segments_BL)
    found_BLD, _ = encode(backward, params, tokens_BL, positions_BL, segments_BL)
    real_BL = segments_BL > 0
    assert_close(found_BLD[real_BL], expected_BLD[real_BL])


def test_the_mask_to_predict_has_position_0_from_the_end():
    """Its own row of the position table reaches its query for every length of history."""
    module, params = make_bert(positions='end', num_blocks=1)
    for length in (1, 4):
        row = np.array([[7] * length], np.int32)
        fields = row, np.arange(length, dtype=np.int32)[None], np.ones_like(row)
        appended = np.array([[7] * length + [MASK]], np.int32)
        whole = appended, np.arange(length + 1, dtype=np.int32)[None], np.ones_like(appended)
        query_B1D, _ = encode(module, params, *fields, last=True)
        expected_BLD, _ = encode(module, params, *whole)
        assert_close(query_B1D[:, 0], expected_BLD[:, -1])


def test_masks_depend_on_the_key_and_not_on_the_items():
    tokens_BL, _, segments_BL = fields_of(PACKED)
    other_BL = np.where(segments_BL > 0, NUM_ITEMS + 1 - tokens_BL, 0).astype(np.int32)
    read_BL, masked_BL = masker()(new_key(0), tokens_BL, segments_BL, 0.5)
    again_BL, _ = masker()(new_key(0), tokens_BL, segments_BL, 0.5)
    np.testing.assert_array_equal(again_BL, read_BL)
    _, redrawn_BL = masker()(new_key(1), tokens_BL, segments_BL, 0.5)
    assert (redrawn_BL != masked_BL).any()
    same_BL, also_BL = masker()(new_key(0), other_BL, segments_BL, 0.5)
    np.testing.assert_array_equal(also_BL, masked_BL)
    np.testing.assert_array_equal(same_BL == MASK, read_BL == MASK)


# The objective.


@cache
def graded(module, prob=0.5, chunk_tokens=0):
    """(params, batch, key) -> ((sum, count), gradient)."""
    return compile_gradient(module.clone(mask_prob=prob), chunk_tokens=chunk_tokens)


@pytest.mark.parametrize('name', NAMES)
def test_the_loss_is_that_of_the_masked_positions(name):
    """Of what was read in their place, which is drawn here once more."""
    module, params = make_bert(name)
    batch, key = make_batch(PACKED), new_key(3)
    mask_key, _ = jax.random.split(key)
    read_BL, masked_BL = masker()(mask_key, batch.tokens_BL, batch.segments_BL, 0.5)
    rest = batch.positions_BL, batch.segments_BL
    query_BLD, item_VD, _ = encode(module, params, read_BL, *rest, method='forward')
    expected, count = 0.0, 0
    for i in np.flatnonzero(masked_BL[0]):
        score_V = float64(item_VD)[1:] @ float64(query_BLD)[0, i]
        expected += np.log(np.exp(score_V).sum()) - score_V[batch.targets_BL[0, i] - 1]
        count += 1
    (total, number), _ = graded(module)(params, batch, key)
    assert_close(total, expected)
    assert number == count and 3 <= count < 11


def test_chunks_change_nothing():
    module, params = make_bert()
    arguments = params, make_batch(PACKED), new_key(1)
    expected = graded(module)(*arguments)
    assert 2 < expected[0][1] < 11
    jax.tree.map(assert_close, graded(module, chunk_tokens=2)(*arguments), expected)


@pytest.mark.parametrize('name', NAMES)
def test_packing_changes_neither_loss_nor_gradients(name):
    """All last items are masked and no others, so that no draw depends on the row."""
    module, params = make_bert(name)
    f, key = graded(module, prob=0.0), new_key(0)
    (loss, count), gradient = f(params, make_batch(ALONE), key)
    assert count == 3
    for written in (PACKED, AT_THE_END):
        (other_loss, other_count), other_gradient = f(params, make_batch(written), key)
        assert_close(other_loss, loss)
        assert other_count == 3
        jax.tree.map(assert_close, other_gradient, gradient)
    assert not np.any(gradient['item_table'][0])
    largest = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda x: abs(x).max(), gradient))
    without = {jax.tree_util.keystr(p, simple=True, separator='/') for p, g in largest if g < 1e-5}
    # A key's bias adds the same to all logits of a query.
    last = 'facet_block' if name == 'fame_bert4rec' else 'block_0/attention'
    assert without == {f'{last}/key_bias'}


def test_a_batch_of_padding_is_zero_and_has_no_gradient():
    module, params = make_bert()
    empty = Batch(*(0 * field for field in make_batch(PACKED)))
    (total, number), gradient = graded(module, chunk_tokens=2)(params, empty, new_key(0))
    assert total == number == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_bfloat16_is_finite_and_near_float32():
    module, params = make_bert()
    arguments = params, make_batch(PACKED), new_key(0)
    (expected, count), _ = graded(module)(*arguments)
    half = graded(module.clone(dtype=jnp.bfloat16), chunk_tokens=2)
    (total, number), gradient = half(*arguments)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert number == count and abs(total - expected) < 0.03 * expected


@pytest.mark.parametrize('name', NAMES)
def test_both_sides_of_a_score_are_of_the_models_dtype(name):
    module, params = make_bert(name, dtype=jnp.bfloat16)
    *sides, _ = encode(module, params, *fields_of(ALONE), method='forward')
    for side in sides:
        assert side.dtype == jnp.bfloat16 and np.isfinite(side.astype(np.float32)).all()


# Ranking.


@pytest.mark.parametrize('name', NAMES)
def test_the_last_column_is_a_mask_after_the_last_item(name):
    """Of 4 of 5 items, 3, and none at all; against the same histories without padding."""
    module, params = make_bert(name)
    written = {
        'tokens': [[0, 1, 2, 3, 4], [0, 0, 7, 8, 3], [0, 0, 0, 0, 0], [2, 4, 6, 8, 9]],
        'positions': [[0, 0, 1, 2, 3], [0, 0, 0, 1, 2], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]],
        'segments': [[0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
    }
    query_B1D, parts = encode(module, params, *fields_of(written), last=True)
    assert query_B1D.shape == (4, 1, 8 + (name == 'bert4rec'))
    (out,) = parts.values()
    assert out['attention_BHNQS'].shape[-2:] == (1, 6)
    with_mask = [[*filter(None, tokens_L), MASK] for tokens_L in written['tokens']]
    tokens_BL = np.array([[*row, 0, 0, 0, 0, 0][:6] for row in with_mask], np.int32)
    segments_BL = (tokens_BL > 0).astype(np.int32)
    positions_BL = np.arange(6, dtype=np.int32)[None] * segments_BL
    expected_BLD, _ = encode(module, params, tokens_BL, positions_BL, segments_BL)
    for query_1D, expected_LD, row in zip(query_B1D, expected_BLD, with_mask):
        assert_close(query_1D[0], expected_LD[len(row) - 1])


def test_a_row_too_long_for_the_table_loses_its_earliest_column():
    """One of six items, and one of five behind padding."""
    module, params = make_bert()
    tokens_BL = np.array([[1, 2, 3, 4, 5, 6], [0, 2, 3, 4, 5, 6]], np.int32)
    positions_BL = np.array([[0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4]], np.int32)
    segments_BL = (tokens_BL > 0).astype(np.int32)
    query_B1D, _ = encode(module, params, tokens_BL, positions_BL, segments_BL, last=True)
    kept_BL = positions_BL[1:, 1:]
    expected_11D, _ = encode(module, params, tokens_BL[1:, 1:], kept_BL, kept_BL * 0 + 1, last=True)
    for query_1D in query_B1D:
        assert_close(query_1D, expected_11D[0], 1e-6)


# From BERT4Rec to FAME.


def transplanted(**options):
    """(BERT4Rec, its parameters, FAME over it, its parameters after surgery)."""
    module, new = make_bert('fame_bert4rec', seed=1, **options)
    backbone, old = make_bert()
    plan = module.surgery_plan(new_key(0))
    return backbone, old, module, surgery.transplant(old, new, plan)


@pytest.mark.parametrize('projection, residual', [('drop', 'norm'), ('keep', 'none')])
def test_every_leaf_is_used_or_left_on_purpose(projection, residual):
    """Each old leaf is filled with a number of its own, which the new tree has or has not."""
    module, new = make_bert(
        'fame_bert4rec',
        num_experts=1,
        output_projection=projection,
        attention_residual=residual,
    )
    _, old = make_bert()
    leaves, tree = jax.tree.flatten(old)
    old = tree.unflatten([np.full(leaf.shape, 100.0 + i) for i, leaf in enumerate(leaves)])
    result = surgery.transplant(old, new, module.surgery_plan(new_key(0)))
    origin = {float(leaf.ravel()[0]): path for path, leaf in flatten_dict(old, sep='/').items()}
    actual = {
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
    assert actual == expected | {path: path for path in below}
    left = {'head/kernel', 'head/bias', 'item_bias'}
    left |= {path for path in origin.values() if path.startswith('block_0/')}
    assert set(origin.values()) - set(actual.values()) == left - set(expected.values())


def test_surgery_keeps_the_encoders_slices():
    """What both have kept, and the rest made idle: u is the encoder's output before the head.

    As over SASRec: the feed-forward nets add nothing, gates are even and facets the slices; a head
    then holds its slice of that output, normalised once more.
    """
    backbone, old, module, new = transplanted(
        num_experts=1, output_projection='keep', similarity='dot'
    )
    dense = old['block_0']['feed_forward']
    dense['down'] = jax.tree.map(jnp.zeros_like, dense['down'])
    block = new['facet_block']
    idle = ('down', 'down_bias', 'gate', 'gate_bias')
    block |= {name: jnp.zeros_like(block[name]) for name in idle}
    block['facet'] = fame_block.slice_selectors(None, (2, 8, 4))
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
    block = 4 * (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8) + 2 * norm
    encoder = items + 6 * 8 + 8 + norm + block  # six positions, and [MASK]
    head = 8 * 8 + 8 + 13
    sizes = [leaf.size for leaf in jax.tree.leaves(parameter_shapes(make_bert()[0]))]
    assert sum(sizes) == encoder + head
    names = set(parameter_shapes(make_bert('fame_bert4rec')[0]))
    assert names == {*('item_table', 'mask_vector', 'position_table', 'input_norm', 'facet_block')}
