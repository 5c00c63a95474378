"""Views of packed histories, one history at a time: their lengths, items and positions."""

import collections
import functools
import itertools
import math

import numpy as np
import pytest
from fixtures import new_key, quick_jit
from hypothesis import given, settings
from hypothesis import strategies as st

from fame_jax.models import augmentations

ROWS, LENGTH, MASK = 2, 12, 99
SHARES = (0.3, 0.6, 1.0)
SETTINGS = settings(max_examples=25, deadline=None)

# Rows to count what is drawn in: two histories of five each, in these columns.
MANY, FORMER, LATTER = 3000, slice(0, 5), slice(5, 10)


@functools.cache
def compiled(name, share, **options):
    return quick_jit(functools.partial(getattr(augmentations, name), share=share, **options))


@functools.cache
def compiled_views(different, operators):
    f = functools.partial(augmentations.two_views, operators=operators, different=different)
    return quick_jit(lambda key, *fields: f(key, fields))


def packed(*rows):
    """Rows of items 1, 2, ... from (padding before, lengths of the histories), [ROWS, LENGTH]."""
    tokens, positions, segments = np.zeros((3, len(rows), LENGTH), np.int32)
    item = itertools.count(1)
    for b, (before, lengths) in enumerate(rows):
        column = before
        for s, n in enumerate(lengths):
            for i in range(n):
                tokens[b, column] = next(item)
                positions[b, column], segments[b, column] = i, s + 1
                column += 1
    return tokens, positions, segments


@st.composite
def any_rows(draw):
    rows = []
    for _ in range(ROWS):
        before, lengths = draw(st.integers(0, 3)), draw(st.lists(st.integers(1, 7), max_size=5))
        while before + sum(lengths) > LENGTH:
            lengths.pop()
        rows.append((before, lengths))
    return packed(*rows)


def by_history(fields, view):
    """For each history its columns, as a slice of both: (tokens, [view's tokens, ...])."""
    tokens, _, segments = fields
    for b, s in itertools.product(range(len(tokens)), range(1, LENGTH + 1)):
        columns = np.flatnonzero(segments[b] == s)
        if len(columns):
            yield b, s, tokens[b, columns], [field[b, columns] for field in view]
    for field in view:
        assert not field[segments == 0].any()


def keys():
    return st.integers(0, 1000).map(new_key)


@SETTINGS
@given(any_rows(), keys(), st.sampled_from(SHARES))
def test_a_crop_is_a_stretch_in_its_place_with_positions_from_zero(fields, key, share):
    view = compiled('crop', share)(key, *fields)
    for _, s, items, (tokens, positions, segments) in by_history(fields, view):
        kept = np.flatnonzero(segments)
        assert len(kept) == max(1, math.floor(share * len(items)))
        assert kept.tolist() == list(range(kept[0], kept[0] + len(kept)))
        assert set(segments[kept]) == {s}
        assert tokens[kept].tolist() == items[kept].tolist()
        assert positions[kept].tolist() == list(range(len(kept)))
        gone = np.flatnonzero(segments == 0)
        assert not tokens[gone].any() and not positions[gone].any()


@SETTINGS
@given(any_rows(), keys(), st.sampled_from(SHARES), st.sampled_from([0, MASK]))
def test_a_mask_hides_its_share_and_never_all(fields, key, share, mask_id):
    view = compiled('mask', share, mask_id=mask_id)(key, *fields)
    for _, s, items, (tokens, positions, segments) in by_history(fields, view):
        n = len(items)
        hidden = tokens != items
        assert hidden.sum() == min(math.floor(share * n), n - 1)
        assert set(tokens[hidden]) <= {mask_id}
        left = hidden if mask_id == 0 else np.zeros(n, bool)
        assert segments.tolist() == np.where(left, 0, s).tolist()
        assert positions.tolist() == np.where(left, 0, np.arange(n)).tolist()


@SETTINGS
@given(any_rows(), keys(), st.sampled_from(SHARES))
def test_a_reordering_moves_a_stretch_among_its_own_places(fields, key, share):
    view = compiled('reorder', share)(key, *fields)
    np.testing.assert_array_equal(view[1], fields[1])
    np.testing.assert_array_equal(view[2], fields[2])
    for _, _, items, (tokens, _, _) in by_history(fields, view):
        assert sorted(tokens) == sorted(items)
        moved = np.flatnonzero(tokens != items)
        assert not len(moved) or moved[-1] - moved[0] < math.floor(share * len(items))


@pytest.mark.parametrize(
    'name, options', [('crop', {}), ('mask', {'mask_id': MASK}), ('reorder', {})]
)
def test_a_view_is_a_function_of_the_key(name, options):
    f = compiled(name, 0.6, **options)
    fields = packed((0, [7, 5]), (0, [6, 6]))
    drawn = [f(new_key(seed), *fields) for seed in (1, 1, 2, 3, 4)]
    same = [all(np.array_equal(a, b) for a, b in zip(drawn[0], other)) for other in drawn]
    assert same[:2] == [True, True] and not all(same[2:])


def outcomes(view, index):
    """How often each outcome of the former history of a row, then of the latter."""
    field = view[index]
    return [collections.Counter(map(tuple, field[:, part].tolist())) for part in (FORMER, LATTER)]


@functools.cache
def many():
    tokens = np.tile(np.array([[1, 2, 3, 4, 5] * 2 + [0, 0]], np.int32), (MANY, 1))
    positions = np.tile(np.array([[0, 1, 2, 3, 4] * 2 + [0, 0]], np.int32), (MANY, 1))
    segments = np.tile(np.array([[1] * 5 + [2] * 5 + [0, 0]], np.int32), (MANY, 1))
    return tokens, positions, segments


def assert_even(counts, expected):
    """All that is expected and no more, with binomial counts around their share of `expected`."""
    assert set(counts) == set(expected)
    for outcome, share in expected.items():
        spread = math.sqrt(MANY * share * (1 - share))
        assert abs(counts[outcome] - MANY * share) < 5 * spread


def test_crops_begin_anywhere_evenly():
    expected = {(1, 2, 3, 0, 0): 1 / 3, (0, 2, 3, 4, 0): 1 / 3, (0, 0, 3, 4, 5): 1 / 3}
    view = compiled('crop', 0.6)(new_key(0), *many())
    for counts in outcomes(view, 0):
        assert_even(counts, expected)


def test_every_subset_is_masked_evenly():
    expected = {}
    for hidden in itertools.combinations(range(5), 3):
        expected[tuple(MASK if i in hidden else i + 1 for i in range(5))] = 1 / 10
    view = compiled('mask', 0.6, mask_id=MASK)(new_key(0), *many())
    for counts in outcomes(view, 0):
        assert_even(counts, expected)


def test_every_order_of_every_stretch_is_drawn_evenly():
    expected = collections.Counter()
    for begin in range(3):
        stretch = range(begin + 1, begin + 4)
        for order in itertools.permutations(stretch):
            row = (*range(1, begin + 1), *order, *range(begin + 4, 6))
            expected[row] += 1 / 18
    view = compiled('reorder', 0.6)(new_key(0), *many())
    for counts in outcomes(view, 0):
        assert_even(counts, expected)


def test_histories_of_a_row_are_drawn_apart():
    for name, options in (('crop', {}), ('mask', {'mask_id': MASK}), ('reorder', {})):
        tokens, _, _ = compiled(name, 0.6, **options)(new_key(0), *many())
        same = (tokens[:, FORMER] == tokens[:, LATTER]).all(axis=1).mean()
        assert 0 < same < 0.5


def stamp(number):
    """An operator that writes its number, to see who drew it."""
    return lambda key, t, p, s: (t * 0 + number, p, s)


STAMPS = tuple(stamp(number) for number in (1, 2, 3))


def choices(different):
    one, other = compiled_views(different, STAMPS)(new_key(5), *many())
    for view in (one, other):
        assert (view[0][:, FORMER] == view[0][:, :1]).all()
        assert (view[0][:, LATTER] == view[0][:, 5:6]).all()
    return one[0], other[0]


@pytest.mark.parametrize('different', [True, False])
def test_operators_are_drawn_for_each_history(different):
    one, other = choices(different)
    pairs = list(itertools.product((1, 2, 3), repeat=2))
    drawn = [pair for pair in pairs if not different or pair[0] != pair[1]]
    for column in (0, 5):
        counts = collections.Counter(zip(one[:, column].tolist(), other[:, column].tolist()))
        assert_even(counts, {pair: 1 / len(drawn) for pair in drawn})
    both = collections.Counter(zip(one[:, 0].tolist(), one[:, 5].tolist()))
    assert_even(both, {pair: 1 / 9 for pair in pairs})


def test_one_operator_for_both_views_draws_twice():
    operators = (functools.partial(augmentations.reorder, share=1.0),)
    one, other = compiled_views(False, operators)(new_key(0), *many())
    same = (one[0][:, FORMER] == other[0][:, FORMER]).all(axis=1).mean()
    assert same < 3 / math.factorial(5)


OPERATORS = (
    functools.partial(augmentations.crop, share=0.6),
    functools.partial(augmentations.mask, share=0.6, mask_id=0),
    functools.partial(augmentations.reorder, share=0.6),
)


@SETTINGS
@given(any_rows(), keys(), st.booleans())
def test_both_views_hold_every_history_so_their_ends_agree(fields, key, different):
    pair = compiled_views(different, OPERATORS)(key, *fields)
    expected = [(b, s) for b, s, _, _ in by_history(fields, pair[0])]
    for view in pair:
        for _, _, items, (tokens, _, segments) in by_history(fields, view):
            assert set(tokens[tokens > 0]) <= set(items) and segments.any()
        index, real = found_ends(view[2])
        places = [divmod(int(i), LENGTH) for i in index[real]]
        assert [(b, view[2][b, column]) for b, column in places] == expected
        for b, column in places:
            assert view[2][b, column] not in view[2][b, column + 1 :]


found_ends = quick_jit(functools.partial(augmentations.ends, size=ROWS * LENGTH))


def test_views_written_out():
    """Shares that leave nothing to chance."""
    fields = packed((1, [1, 3]), (0, [2]))
    assert fields[0][:, :5].tolist() == [[0, 1, 2, 3, 4], [5, 6, 0, 0, 0]]
    for name, options in (('crop', {}), ('mask', {'mask_id': MASK})):
        view = compiled(name, 1.0 if name == 'crop' else 0.3, **options)(new_key(0), *fields)
        for field, expected in zip(view, fields):
            np.testing.assert_array_equal(field, expected)
    tokens, positions, segments = compiled('crop', 0.3)(new_key(0), *fields)
    assert tokens[0, 1] == 1 and segments[0].tolist().count(2) == 1
    assert not positions.any()


def test_ends_written_out():
    segments = np.array([[1, 1, 0, 1, 2, 2, 3, 0, 3, 0], [0] * 10, [0, 0, 4, 0, 0, 0, 5, 5, 5, 5]])
    expected = [3, 5, 8, 22, 29]
    for size in (3, 7):
        find = quick_jit(functools.partial(augmentations.ends, size=size))
        index, real = find(segments.astype(np.int32))
        wanted = expected[:size]
        assert index.tolist() == wanted + [0] * (size - len(wanted))
        assert real.tolist() == [True] * len(wanted) + [False] * (size - len(wanted))


def test_the_operators_of_a_pair_are_drawn_apart():
    """Where a crop begins tells nothing of which item the other view has masked."""
    number = 2000
    tokens_BL = np.tile(np.arange(1, 5, dtype=np.int32), (number, 1))
    fields = tokens_BL, tokens_BL - 1, np.ones_like(tokens_BL)
    operators = (
        functools.partial(augmentations.crop, share=0.5),
        functools.partial(augmentations.mask, share=0.3, mask_id=9),
    )
    one, other = quick_jit(
        lambda key: augmentations.two_views(key, fields, operators, different=True)
    )(new_key(0))
    # Which of the two views is the crop is drawn as well.
    cropped_B = (np.asarray(one[2]) == 0).any(axis=1)
    crop_BL = np.where(cropped_B[:, None], one[2], other[2])
    masked_BL = np.where(cropped_B[:, None], other[0], one[0]) == 9
    assert masked_BL.sum(axis=1).tolist() == [1] * number
    inside = np.mean((crop_BL > 0)[masked_BL])
    assert abs(inside - 0.5) < 4 * 0.5 / number**0.5  # two of four items are in the crop
