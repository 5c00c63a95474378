"""Dataset.from_frame: pandas, polars and Arrow frames give what the same table in a file gives."""

from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from fame_jax.data.dataset import Dataset
from fame_jax.errors import UserError


def actions(number=400):
    """Columns of a log with ties in time, unsorted users, and ids with leading zeros."""
    rng = np.random.default_rng(0)
    return {
        'customer': rng.integers(12, size=number).tolist(),
        'sku': [f'{n:03}' for n in rng.zipf(1.5, number) % 40],
        'bought_at': rng.integers(1, 90, number).tolist(),
        'stars': rng.integers(1, 6, number).astype(float).tolist(),
    }


NAMES = {'user': 'customer', 'item': 'sku', 'time': 'bought_at', 'rating': 'stars'}
DAY = datetime(2026, 1, 1)


class ArrowTable:
    """A frame of which only the Arrow PyCapsule interface is known."""

    def __init__(self, columns):
        self.frame = pl.DataFrame(columns)

    def __arrow_c_stream__(self, requested_schema=None):
        return self.frame.__arrow_c_stream__(requested_schema)


def pandas_frame(columns):
    # The index of a frame that was filtered or sorted is not 0, 1, 2, ...
    frame = pytest.importorskip('pandas').DataFrame(columns)
    frame.index = range(len(frame), 0, -1)
    return frame


def pyarrow_table(columns):
    return pytest.importorskip('pyarrow').table(columns)


def pyarrow_reader(columns):
    return pyarrow_table(columns).to_reader()  # can be read only once


FRAMES = {
    'polars': pl.DataFrame,
    'polars lazy': pl.LazyFrame,
    'arrow': ArrowTable,
    'pandas': pandas_frame,
    'pyarrow': pyarrow_table,
    'pyarrow reader': pyarrow_reader,
}


@pytest.fixture(params=FRAMES)
def make_frame(request):
    return FRAMES[request.param]


def assert_same(data, expected):
    """Equal but for the source in the card; the ids of a text file are text."""
    assert data.card['fingerprint'] == expected.card['fingerprint']
    for name in ('users', 'items', 'actions', 'read', 'dropped', 'columns', 'k_core', 'min_rating'):
        assert data.card[name] == expected.card[name], name
    assert data.card['order'].replace('frame', 'file') == expected.card['order']


@pytest.mark.parametrize('filters', [{}, {'k_core': 0}, {'k_core': 3, 'min_rating': 3.0}])
def test_a_frame_is_the_same_table_in_a_file(make_frame, filters, tmp_path):
    pl.DataFrame(actions()).write_csv(tmp_path / 'log.csv')
    data = Dataset.from_frame(make_frame(actions()), **NAMES, **filters)
    expected = Dataset.from_file(tmp_path / 'log.csv', **NAMES, **filters)
    assert_same(data, expected)
    assert data.card['id_kinds'] == {'user': 'int', 'item': 'str'}
    assert [(str(user), items) for user, items in data.histories()] == list(expected.histories())


def test_dates_are_those_of_a_file(make_frame, tmp_path):
    """Datetimes, and the same as ISO text in a file."""
    columns = actions()
    times = [DAY + timedelta(hours=7 * n, microseconds=n) for n in columns['bought_at']]
    texts = [time.isoformat() for time in times]
    pl.DataFrame(columns | {'bought_at': texts}).write_csv(tmp_path / 'log.csv')
    expected = Dataset.from_file(tmp_path / 'log.csv', **NAMES)
    for values in (times, texts, [time.replace(tzinfo=UTC) for time in times]):
        frame = make_frame(columns | {'bought_at': values})
        assert_same(Dataset.from_frame(frame, **NAMES), expected)


def test_days_are_times(make_frame):
    days = [date(2026, 1, day) for day in (3, 1, 2)]
    frame = make_frame({'user': [1] * 3, 'item': ['c', 'a', 'b'], 'time': days})
    assert list(Dataset.from_frame(frame, k_core=0).histories()) == [(1, ['a', 'b', 'c'])]


def test_without_time_the_order_of_rows_is_taken(make_frame):
    columns = {'user': [2, 1, 2, 1, 2, 1], 'item': [30, 10, 10, 20, 20, 30]}
    data = Dataset.from_frame(make_frame(columns), time=None, k_core=0)
    assert list(data.histories()) == [(1, [10, 20, 30]), (2, [30, 10, 20])]
    assert data.card['order'] == 'as in the frame: no time column'
    assert data.card['columns'] == {'user': 'user', 'item': 'item'}


def test_ids_come_back_as_they_went_in(make_frame):
    columns = {'user': ['7'] * 3 + ['x'] * 3, 'item': [5, -7, 11, 5, 11, -7], 'time': [1, 2, 3] * 2}
    data = Dataset.from_frame(make_frame(columns), k_core=0)
    assert list(data.histories()) == [('7', [5, -7, 11]), ('x', [5, 11, -7])]
    assert data.item_ids == ['', '-7', '5', '11']


def test_ids_survive_save_and_load(tmp_path):
    frame = pl.DataFrame({'user': [7] * 3, 'item': [30, 20, 10], 'time': [1, 2, 3]})
    Dataset.from_frame(frame, k_core=0).save(tmp_path / 'set')
    assert list(Dataset.load(tmp_path / 'set').histories()) == [(7, [30, 20, 10])]


@pytest.mark.parametrize('dtype', [pl.Categorical, pl.Enum(['10', '9', 'a']), pl.String])
def test_categories_are_text(dtype):
    column = pl.Series('item', ['a', '10', '9'], dtype=dtype)
    frame = pl.DataFrame({'user': [1] * 3, 'time': ['3', '1', '2']}).with_columns(column)
    frame = frame.with_columns(pl.col('time').cast(pl.Categorical))
    assert list(Dataset.from_frame(frame, k_core=0).histories()) == [(1, ['10', '9', 'a'])]


def test_whole_floats_are_integers(make_frame):
    columns = {'user': [1.0] * 3, 'item': [30.0, 20.0, 10.0], 'time': [1, 2, 3]}
    data = Dataset.from_frame(make_frame(columns), k_core=0)
    assert list(data.histories()) == [(1, [30, 20, 10])]
    assert all(type(item) is int for _, items in data.histories() for item in items)


COLUMNS = {'customer': [1] * 3, 'item': ['a', 'b', 'c'], 'bought_at': [1, 2, 3]}
LIST = [[1], [2], [3]]
# Name of the case: (columns that differ, arguments, the message).
MISTAKES = {
    'wrong user': ({}, {'user': 'costumer'}, "user='NAME' in Python); did you mean 'customer'?"),
    'unknown': ({}, {'item': 'xyz'}, "in Python); choose one of 'customer', 'item', 'bought_at'"),
    'no user': ({'customer': None, 'who': LIST}, {'user': None}, 'no column looks like the user'),
    'two users': ({'member': [1] * 3}, {'user': None}, "'customer' and 'member' may be the user"),
    'two times': ({'ts': [3, 1, 1]}, {'time': None}, "'bought_at' and 'ts' may be the time"),
    'doubtful time': (
        {'bought_at': None, 'x': [DAY] * 3}, {'time': None}, "column 'x' looks like a time",
    ),
    'rating without column': ({}, {'min_rating': 3}, 'no column looks like the rating'),
    'missing user': ({'customer': [1, None, 1]}, {}, "row 1 (the first is row 0): 'customer' is"),
    'missing item': ({'item': ['a', 'b', None]}, {}, "row 2 (the first is row 0): 'item' is empty"),
    'blank item': ({'item': ['a', ' ', 'c']}, {}, "row 1 (the first is row 0): 'item' is empty"),
    'missing time': ({'bought_at': [1, 2, None]}, {}, "row 2 (the first is row 0): 'bought_at' is"),
    'missing date': ({'bought_at': [DAY, None, DAY]}, {}, "is row 0): 'bought_at' is empty"),
    'time is text': ({'bought_at': ['1', '2', 'late']}, {}, "'bought_at' is 'late', not a number"),
    'time is a duration': ({'bought_at': [timedelta(1)] * 3}, {}, 'a time needs a date'),
    'item is a list': ({'item': LIST}, {}, "column 'item' contains List"),
    'item is a truth value': ({'item': [True, False, True]}, {}, "column 'item' contains Boolean"),
    'too few actions': ({}, {'k_core': 5}, 'nothing is left: 3 actions read, 0 left by k_core=5'),
}  # fmt: skip


@pytest.mark.parametrize('case', MISTAKES)
def test_a_wrong_frame_or_argument_is_a_one_line_error(make_frame, case):
    changes, arguments, message = MISTAKES[case]
    arguments = {'user': 'customer', 'time': 'bought_at', 'k_core': 0} | arguments
    with pytest.raises(UserError) as caught:
        columns = {n: values for n, values in (COLUMNS | changes).items() if values is not None}
        Dataset.from_frame(make_frame(columns), **arguments)
    assert message in str(caught.value) and '\n' not in str(caught.value)
    assert str(caught.value).startswith('the frame')


def test_no_rows_are_an_error(make_frame):
    with pytest.raises(UserError, match='the frame: no records'):
        Dataset.from_frame(make_frame({'user': [], 'item': [], 'time': []}))


@pytest.mark.parametrize('frame', [[1, 2], 'orders.csv', None, {'user': [1]}])
def test_what_is_no_frame_is_a_type_error(frame):
    with pytest.raises(TypeError, match=f'not {type(frame).__name__}') as caught:
        Dataset.from_frame(frame)
    assert ('Dataset.from_file' in str(caught.value)) == isinstance(frame, str)


def test_pandas_columns_of_mixed_types():
    """Ids 7 and 'a' in one column are text; anything but numbers and text is refused."""
    pandas = pytest.importorskip('pandas')
    columns = {'user': [1] * 3, 'item': [7, 'a', '7'], 'time': [1, 2.5, '3']}
    frame = pandas.DataFrame(columns, dtype=object)
    assert list(Dataset.from_frame(frame, k_core=0).histories()) == [(1, ['7', 'a', '7'])]
    for value in (b'x', True, ('a', 'b')):
        frame = pandas.DataFrame(columns | {'item': [7, 'a', value]}, dtype=object)
        with pytest.raises(UserError, match=r"row 2 .*: 'item' is .*, not text or a number"):
            Dataset.from_frame(frame, k_core=0)
    frame = pandas.DataFrame(columns | {'item': ['a', 'b', '\ud800']}, dtype=object)
    with pytest.raises(UserError, match="'item' contains half a character"):
        Dataset.from_frame(frame, k_core=0)


def test_pandas_types_of_columns():
    """Nullable integers, categories, strings, and times in another zone."""
    pandas = pytest.importorskip('pandas')
    hours = pandas.to_datetime([f'2026-01-01T0{n}:00' for n in (3, 1, 2)])
    frame = pandas.DataFrame(
        {
            'user': pandas.array([1, 1, 1], dtype='Int64'),
            'item': pandas.Categorical(['a', 'b', 'c']),
            'time': hours.tz_localize('Asia/Tokyo'),
            'text': pandas.array(['a', 'b', 'c'], dtype='string'),
        }
    )
    for item in ('item', 'text'):
        data = Dataset.from_frame(frame, item=item, k_core=0)
        assert list(data.histories()) == [(1, ['b', 'c', 'a'])]


def test_columns_of_the_same_name_are_an_error():
    pandas = pytest.importorskip('pandas')
    frame = pandas.DataFrame([[1, 2, 3]], columns=['user', 'user', 'item'])
    with pytest.raises(UserError, match="columns 1 and 2 are both named 'user'"):
        Dataset.from_frame(frame, time=None)
    pyarrow = pytest.importorskip('pyarrow')
    columns = ['user', 'item', 'ts', 'note', 'note']
    frame = pandas.DataFrame(
        [[1, 'a', 3, 4, 5], [1, 'b', 2, 5, 6], [1, 'c', 1, 6, 7]], columns=columns
    )
    assert list(Dataset.from_frame(frame, k_core=0).histories()) == [(1, ['c', 'b', 'a'])]
    frame = pyarrow.table([[1], [2], [3]], names=['user', 'user', 'item'])
    with pytest.raises(UserError, match='rename one'):
        Dataset.from_frame(frame, time=None)
