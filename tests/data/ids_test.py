"""Ids of a column to codes, against a plain loop."""

import datetime
import itertools
from decimal import Decimal

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fame_jax.data import ids as ids_module
from fame_jax.data.ids import encode_ids
from fame_jax.data.tables import Table
from fame_jax.errors import UserError

TABLE = Table('log.csv', ['id'], lambda names: [], lambda record: f'line {record + 2}')


def encode(values, dtype=None):
    """Codes as a list, ids and kind of a column."""
    codes, ids, kind = encode_ids(TABLE, 'id', pl.Series(values, dtype=dtype))
    assert codes.dtype == np.int32
    return codes.tolist(), ids, kind


def number(tokens, order=None):
    """The code of each token, in the order given or by first appearance, and the ids."""
    ids = list(dict.fromkeys(tokens)) if order is None else order
    return [ids.index(token) for token in tokens], list(map(str, ids))


integers = st.integers(-(2**63), 2**63 - 1) | st.integers(-9, 9)


@settings(max_examples=100, deadline=None)
@given(st.lists(integers, min_size=1, max_size=30), st.integers(0, 100))
def test_integers_are_numbered_in_ascending_order(values, table):
    """Whether their range is small enough for a table or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ids_module, 'TABLE', table)
        assert encode(values, pl.Int64) == (*number(values, sorted(set(values))), 'int')


words = st.text('ab1 .\t"', max_size=4).filter(lambda text: text.strip(' \t'))


@settings(max_examples=150, deadline=None)
@given(st.lists(words, min_size=1, max_size=30), st.lists(st.integers(0, 30), max_size=4))
def test_texts_are_numbered_by_first_appearance(texts, cuts):
    """Whole, in parts, as categories; blanks around an id are no part of it."""
    tokens = [text.strip(' \t') for text in texts]
    values = [*texts, 'x']  # a column of whole numbers has its own rule
    expected = (*number([*tokens, 'x']), 'str')
    assert encode(values) == expected
    edges = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    parts = (pl.Series(values[a:b], dtype=pl.String) for a, b in itertools.pairwise(edges))
    codes, ids, kind = encode_ids(TABLE, 'id', parts)
    assert (codes.tolist(), ids, kind) == expected
    assert encode(values, pl.Categorical) == expected


@pytest.mark.parametrize(
    ('values', 'dtype', 'ids', 'kind'),
    [
        (['007', '7', '1e5', 'NA', 'null'], pl.String, ['007', '7', '1e5', 'NA', 'null'], 'str'),
        (['12.0', '7', ' 12'], pl.String, ['12', '7'], 'str'),
        (['12.0', '7', 'x'], pl.String, ['12.0', '7', 'x'], 'str'),
        (['12.50', '12.5'], pl.String, ['12.50', '12.5'], 'str'),
        (['07.0', '7'], pl.String, ['07.0', '7'], 'str'),
        ([12.0, 7.0], pl.Float64, ['7', '12'], 'int'),
        ([12.5, 7.0], pl.Float64, ['12.5', '7.0'], 'str'),
        ([Decimal('12.00'), Decimal('7.00')], pl.Decimal(9, 2), ['7', '12'], 'int'),
        ([Decimal('12.50'), Decimal('7.00')], pl.Decimal(9, 2), ['12.50', '7.00'], 'str'),
        ([2**64 - 1, 0], pl.UInt64, ['0', str(2**64 - 1)], 'int'),
        ([2**64 - 1, 2**64 - 2], pl.UInt64, [str(2**64 - 2), str(2**64 - 1)], 'int'),
        ([-(2**63), 2**63 - 1], pl.Int64, [str(-(2**63)), str(2**63 - 1)], 'int'),
        ([3, 1], pl.UInt8, ['1', '3'], 'int'),
        ([-100, 100], pl.Int8, ['-100', '100'], 'int'),
        ([*range(-100, 101)], pl.Int8, [*map(str, range(-100, 101))], 'int'),
        ([datetime.date(2020, 1, 2)], pl.Date, ['2020-01-02'], 'str'),
        (['\u20ac', 'a\nb', 'x' * 3000], pl.String, ['\u20ac', 'a\nb', 'x' * 3000], 'str'),
    ],
)
def test_each_type_of_column(values, dtype, ids, kind):
    codes, found, found_kind = encode(values, dtype)
    assert (found, found_kind) == (ids, kind)
    assert len(codes) == len(values) and sorted(set(codes)) == list(range(len(ids)))


@pytest.mark.parametrize(
    ('values', 'line'),
    [
        (['a', None, ''], 3),
        (['a', 'b', '', None], 4),
        (['a', ' \t'], 3),
        ([1, None], 3),
        ([1.0, 2.0, float('nan')], 4),
        ([1.5, None, 2.0], 3),
        ([Decimal(1), None], 3),
    ],
)
def test_a_missing_id_is_an_error_with_its_line(values, line):
    with pytest.raises(UserError, match=f"^log.csv, line {line}: 'id' is empty, not an id"):
        encode(values)


def test_a_missing_id_in_a_later_part_has_its_line():
    parts = [pl.Series(['a', 'b']), pl.Series(['c', None])]
    with pytest.raises(UserError, match=r'line 5: '):
        encode_ids(TABLE, 'id', parts)


@pytest.mark.parametrize('values', [[[1]], [True], [b'x']])
def test_columns_of_other_types_are_refused(values):
    with pytest.raises(UserError, match='not text or numbers'):
        encode(values)
