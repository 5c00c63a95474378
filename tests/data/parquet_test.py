"""Parquet: only wanted columns, native types, several files, and memory."""

import datetime
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest

from fame_jax.data import parquet
from fame_jax.data.dataset import Dataset
from fame_jax.data.parquet import open_parquet
from fame_jax.data.sources import open_source
from fame_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def open_parts(*paths):
    """A table of files, as if a folder or a pattern had named them."""

    class Parts:
        place = f'{paths[0].parent}'

    Parts.paths = paths
    return open_parquet(Parts)


VALUES = {
    'decimal': pl.Series([Decimal('2.9'), Decimal('2.1')]),
    'big': pl.Series([2**64 - 1, 0], dtype=pl.UInt64),
    'date': pl.Series([datetime.date(2020, 1, 2), None]),
    'moment': pl.Series([datetime.datetime(2020, 1, 2, 3), None], dtype=pl.Datetime('ns')),
    'category': pl.Series(['b', 'a'], dtype=pl.Categorical),
    'text': pl.Series(['x', None]),
}


def test_types_stay(tmp_path):
    path = tmp_path / 'log.parquet'
    pl.DataFrame(VALUES).write_parquet(path)
    table = open_parquet(open_source(path))
    assert table.columns == list(VALUES) and table.place == str(path)
    assert table.locate(1) == 'row 2'
    for name, series in VALUES.items():
        (read,) = table.read([name])
        assert read.dtype == series.dtype and read.to_list() == series.to_list()
    one, two, one_again = table.read(['big', 'text', 'big'])
    assert one.to_list() == one_again.to_list() and two.to_list() == ['x', None]


def test_parts_of_a_column_are_the_column(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, 'PART', 3)
    path = tmp_path / 'log.parquet'
    pl.DataFrame({'n': range(20), 't': map(str, range(20))}).write_parquet(path, row_group_size=7)
    table = open_parquet(open_source(path))
    parts = list(table.read_parts('t'))
    assert len(parts) > 3 and pl.concat(parts).to_list() == [*map(str, range(20))]


def test_several_files_follow_one_another(tmp_path):
    for name, rows in (('a[1]', [1, 2]), ('b', []), ('day=3', [3])):
        frame = pl.DataFrame(
            {'user': rows, 'item': rows}, schema={'user': pl.Int64, 'item': pl.Int8}
        )
        frame.write_parquet(tmp_path / f'{name}.parquet')
    table = open_parts(*sorted(tmp_path.iterdir()))
    assert table.columns == ['user', 'item'] and table.read(['user'])[0].to_list() == [1, 2, 3]
    places = [table.locate(record) for record in range(3)]
    assert places == ['row 1 of a[1].parquet', 'row 2 of a[1].parquet', 'row 1 of day=3.parquet']


def test_a_folder_called_day_3_says_nothing_about_the_column_day(tmp_path):
    (tmp_path / 'day=3').mkdir()
    path = tmp_path / 'day=3' / 'log.parquet'
    pl.DataFrame({'user': [7, 8], 'day': [1, 2]}).write_parquet(path)
    table = open_parquet(open_source(path))
    assert table.columns == ['user', 'day']
    assert [series.to_list() for series in table.read(['day', 'user'])] == [[1, 2], [7, 8]]


@pytest.mark.parametrize(
    ('other', 'message'),
    [
        ({'user': [1], 'sku': [1]}, "other columns than a.parquet (column 'item' is not in both)"),
        (
            {'item': [1], 'user': [1]},
            'other columns than a.parquet (the columns are in other order)',
        ),
        ({'user': ['1'], 'item': [1]}, "column 'user' contains String, in a.parquet Int64"),
    ],
)
def test_files_with_other_columns_are_an_error(tmp_path, other, message):
    pl.DataFrame({'user': [1], 'item': [1]}).write_parquet(tmp_path / 'a.parquet')
    pl.DataFrame(other).write_parquet(tmp_path / 'b.parquet')
    with pytest.raises(UserError) as caught:
        open_parts(tmp_path / 'a.parquet', tmp_path / 'b.parquet')
    assert str(caught.value).startswith(f'{tmp_path / "b.parquet"}: {message}')


@pytest.mark.parametrize('size', [3, 100, -40, -5])
def test_a_damaged_file_is_one_line(tmp_path, size):
    path = tmp_path / 'log.parquet'
    pl.DataFrame({'user': ['u'] * 900, 'item': range(900)}).write_parquet(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match='not a Parquet file, cut short or damaged') as caught:
        Dataset.from_file(path)
    assert str(path) in str(caught.value) and '\n' not in str(caught.value)


def test_damage_inside_is_one_line(tmp_path):
    path = tmp_path / 'log.parquet'
    pl.DataFrame({'user': map(str, range(9000)), 'item': range(9000)}).write_parquet(path)
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes(len(data) // 2) + data[100 + len(data) // 2 :])
    with pytest.raises(UserError, match='damaged'):
        Dataset.from_file(path)


# Reads a small log, by which all is loaded once, then a large one with so many bytes more.
LIMITED = """
import resource, sys
import polars as pl
from fame_jax import Dataset

small, large, more, way = sys.argv[1:]
Dataset.from_file(small)
kilobytes = int(open('/proc/self/status').read().split('VmData:')[1].split()[0])
limit = kilobytes * 1024 + int(more)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
data = Dataset.from_file(large) if way == 'ours' else pl.read_parquet(large)
print(len(data.items), data.num_users)
"""


@pytest.mark.slow
def test_a_log_larger_than_memory(tmp_path):
    """Its ids are 5 GB as text; 1.2 GB are enough for it, and not for reading it as a whole."""
    rows, limit = 8_000_000, 1_200_000_000
    name = '-' + 'a-long-name-as-some-companies-have-them' * 8
    user, item = (pl.format('{}{}', pl.col('n') % number, pl.lit(name)) for number in (99_999, 997))
    frame = pl.LazyFrame({'n': range(rows)}).select(user.alias('user'), item.alias('item'))
    files = [str(tmp_path / name) for name in ('small.parquet', 'large.parquet')]
    frame.head(700_000).sink_parquet(files[0])
    frame.sink_parquet(files[1])

    def read(way):
        command = [sys.executable, '-c', LIMITED, *files, str(limit), way]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    ours = read('ours')
    assert ours.returncode == 0, ours.stderr[-2000:]
    assert ours.stdout.split() == [str(rows), '99999']
    assert read('whole').returncode != 0
