"""Logs that were once read wrongly without a word: read right, or refused in one line."""

import io
import json
import re
from datetime import time, timedelta
from decimal import Decimal

import polars as pl
import pytest

from fame_jax.data.prepare import prepare
from fame_jax.errors import UserError

EPOCH = 1_577_836_800  # 2020-01-01
RIGHT = {'c': ['d', 'b', 'a']}  # of records in the order a, b, d with falling times
DATES = ['2020-01-03', '2020-01-02', '2020-01-01']
SECONDS = [EPOCH + 3, EPOCH + 2, EPOCH + 1]


def timed(name, values, separator=','):
    rows = [['user_id', 'item_id', name], *zip('ccc', 'abd', map(str, values))]
    return ''.join(separator.join(row) + '\n' for row in rows)


def objects(*changes):
    """Lines of objects with the items a, b, d."""
    lines = [{'user': 'c', 'item': item} | more for item, more in zip('abd', changes)]
    return ''.join(json.dumps(line) + '\n' for line in lines)


def parquet(**columns):
    file = io.BytesIO()
    pl.DataFrame({'user': ['c'] * 3, 'item': list('abd')} | columns).write_parquet(file)
    return file.getvalue()


def run(content, folder, name='x.csv', **options):
    """The histories of a log by user."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return dict(prepare(str(path), **{'k_core': 0} | options).histories())


def refusal(content, folder, name='x.csv', **options):
    """The one line that refuses a log, without the path."""
    with pytest.raises(UserError) as caught:
        run(content, folder, name, **options)
    message = str(caught.value)
    assert '\n' not in message and message.startswith(str(folder / name))
    return message.removeprefix(str(folder / name))


NAMES = """
t_dat eventdate InvoiceDate utcTimestamp bought_at rated_on clicked event_dt last_seen dateAdded
created_utc visit_start_time time_stamp TIME fecha Bestelldatum timestamp_ms reviewTime play_date
transaction_time checkin_time day submitted Zeit listened_at CreationDate local_time scrobbled
"""
DOUBTFUL = 'at epoch_ms ts_ms gmt_create month hour modified session_start uts x'


@pytest.mark.parametrize('name', NAMES.split())
def test_a_time_of_any_name_orders_the_actions(name, tmp_path):
    assert run(timed(name, DATES), tmp_path) == RIGHT
    assert run(timed(name, SECONDS, '\t'), tmp_path, 'x.tsv') == RIGHT


@pytest.mark.parametrize('name', DOUBTFUL.split())
@pytest.mark.parametrize('values', [DATES, SECONDS], ids=['dates', 'seconds'])
def test_times_under_other_names_are_refused_with_the_choice(name, values, tmp_path):
    content = timed(name, values)
    expected = f', line 1: column {name!r} looks like a time, and no column is named as one'
    assert refusal(content, tmp_path).startswith(expected)
    assert run(content, tmp_path, columns={'time': name}) == RIGHT
    assert run(content, tmp_path, columns={'time': '-'}) == {'c': ['a', 'b', 'd']}


@pytest.mark.parametrize('value', [
    '2020/01/03', '03/01/2020', '3.1.2020', '03-Jan-2020', '3 January 2020', 'Jan 3 2020',
    '03/Jan/2020:18:00:09 +0000', '1/3/2020 9:05:58 AM', 'Fri Jan 03 18:00:09 +0000 2020',
    '20200103', '202001031800', '20200103180009', '20200103T180009', '2020-01', '2020-W03',
])  # fmt: skip
def test_dates_in_forms_that_are_not_read_do_not_leave_the_order_of_the_file(value, tmp_path):
    assert "column 'x' looks like a time" in refusal(timed('x', [value] * 3), tmp_path)


@pytest.mark.parametrize('name', ['step', 'price', 'watch_time', 'session_start', 'year'])
def test_small_numbers_are_no_times(name, tmp_path):
    assert run(timed(name, [300, 200, 100]), tmp_path) == {'c': ['a', 'b', 'd']}


def at(*times):
    """Lines of objects with the items a, b, d at these times; None: without a time."""
    return objects(*({} if time is None else {'ts': time} for time in times))


FILES = {
    # JSON lines whose keys differ.
    'no time in line 1': (
        'x.jsonl',
        at(None, 2, 1),
        {},
        ", line 1: 'ts' is empty or missing, as in 1 of 3",
    ),
    'no time in line 3': (
        'x.jsonl',
        at(3, 2, None),
        {},
        ", line 3: 'ts' is empty or missing, as in 1 of 3",
    ),
    'a time in line 3 alone': (
        'x.jsonl',
        at(None, None, 1),
        {},
        ", line 1: 'ts' is empty or missing, as in 2",
    ),
    'two keys of times': (
        'x.jsonl',
        objects({'ts': 3}, {'date': '2020-01-02'}, {'ts': 1}),
        {},
        ': .ts. and .date. may be the time',
    ),
    'a named key that line 1 lacks': (
        'x.jsonl',
        at(None, 2, 1),
        {'columns': {'time': 'ts'}},
        ", line 1: 'ts' is empty or missing",
    ),
    'an unused key in one line': (
        'x.jsonl',
        objects({'ts': 3, 'x': 1}, {'ts': 2}, {'ts': 1}),
        {},
        RIGHT,
    ),
    # A key twice in one object.
    'a time twice': (
        'x.jsonl',
        at(3, 2, 1).replace('"ts": 2', '"ts": 2, "ts": 9'),
        {},
        ", line 2: 'ts' occurs twice with",
    ),
    'an item twice': (
        'x.jsonl',
        at(3, 2, 1).replace('"item": "b"', '"item": "e" , "item" : "b"'),
        {},
        ", line 2: 'item' occurs",
    ),
    'a time twice in a Python dict': (
        'x.json',
        at(3, 2, 1).replace('"', "'").replace("'ts': 1", "'ts': 1, 'ts': 4"),
        {},
        ", line 3: 'ts' occ",
    ),
    'a time twice in an array': (
        'x.json',
        '[{"user": "c", "item": "a", "ts": 3, "ts": 1}]',
        {},
        ", object 1: 'ts' occurs twice",
    ),
    'a time twice with one value': (
        'x.jsonl',
        at(3, 2, 1).replace('"ts": 2', '"ts": 2, "ts": 2'),
        {},
        RIGHT,
    ),
    'keys inside of values': (
        'x.jsonl',
        objects(*({'ts': n, 'x': [{'ts': 7}, {'ts': 'a": "b'}]} for n in (3, 2, 1))),
        {},
        RIGHT,
    ),
    # Two columns of times, mixed units.
    'seconds watched, and times': (
        'x.csv',
        timed('time,ts', [f'{n},{s}' for n, s in enumerate(SECONDS)]),
        {},
        ", line 1: 'time' and 'ts' may",
    ),
    'the day and the time of the day': (
        'x.csv',
        timed('date,time', [f'{day},18:00' for day in DATES]),
        {},
        ", line 1: 'date' and 'time' may",
    ),
    'the day, named': (
        'x.csv',
        timed('date,time', [f'{day},18:00' for day in DATES]),
        {'columns': {'time': 'date'}},
        RIGHT,
    ),
    'one name twice': (
        'x.csv',
        timed('ts,ts', ['1,3', '2,2', '3,1']),
        {},
        ', line 1: columns 3 and 4 are both named',
    ),
    'two names but for case': (
        'x.csv',
        timed('ts,TS', ['1,3', '2,2', '3,1']),
        {},
        ", line 1: 'ts' and 'TS' may be",
    ),
    'one millisecond': (
        'x.csv',
        timed('ts', [EPOCH + 3, EPOCH * 1000, EPOCH]),
        {},
        ", line 3: 'ts' is 1577836800000",
    ),
    'one date': (
        'x.csv',
        timed('ts', [EPOCH + 3, '2020-01-02', EPOCH]),
        {},
        ", line 3: 'ts' is '2020-01-02'",
    ),
    'one number': (
        'x.csv',
        timed('ts', ['2020-01-03', f'{EPOCH}000', DATES[2]]),
        {},
        ", line 3: 'ts' is '15778368",
    ),
    'one zero': (
        'x.csv',
        timed('ts', [EPOCH + 3, 0, EPOCH]),
        {},
        ", line 3: 'ts' is 0, not a time in seconds",
    ),
    # Tables and other texts under the name of histories.
    'a table called txt': (
        'x.txt',
        'event_id user_id item_id timestamp\n1 c a 3\n2 c b 2\n3 c d 1\n',
        {},
        RIGHT,
    ),
    'a table with tabs': ('x.txt', timed('when', DATES, '\t'), {}, RIGHT),
    'a table with commas': ('x.txt', timed('when', DATES), {}, RIGHT),
    'objects called txt': ('x.txt', at(3, 2, 1), {}, RIGHT),
    'users with colons': (
        'x.txt',
        '1: 5 30 7\n2: 5 7 30\n',
        {},
        ", line 1: user '1:' ends with a colon",
    ),
    'lists after users': (
        'x.txt',
        '1 [5, 30, 7]\n2 [5, 7, 30]\n',
        {},
        ', line 1: items in brackets',
    ),
    'ids in quotes': ('x.txt', '"1" "5" "30"\n"2" "5" "7"\n', {}, ', line 1: ids in quotes'),
    'ids in single quotes': ('x.txt', "'1' '5' '30'\n'2' '5' '7'\n", {}, ', line 1: ids in quotes'),
    'a comment': (
        'x.txt',
        '# a user and the items\n1 5 30 7\n2 5 7 30\n',
        {},
        ', line 1: a comment; delete the line',
    ),
    'a comment of Matlab': (
        'x.txt',
        '%%Market matrix of items\n1 5 30 7\n',
        {},
        ', line 1: a comment; delete',
    ),
    'names above histories': (
        'x.txt',
        'user item item\n1 5 30 7\n2 5 7 30\n',
        {},
        ', line 2: 4 fields where line 1 has 3',
    ),
    'two names above histories': (
        'x.txt',
        'user items\n1 5 30 7\n2 5 7 30\n',
        {},
        ', line 1: looks like names',
    ),
    'an id with a letter in line 1': (
        'x.txt',
        '10 x30 4 5\n9 4 30 11\n',
        {},
        {'10': ['x30', '4', '5'], '9': ['4', '30', '11']},
    ),
    # Lists where one item belongs.
    'lists with blanks': (
        'x.tsv',
        'user\titem\nc\t5 30\nc\t7 5\nc\t8 30\n',
        {},
        ': 3 of the first 3 items are lists',
    ),
    'lists in brackets': (
        'x.csv',
        'user,item\nc,"[5, 30]"\nc,"[7]"\nc,"[]"\n',
        {},
        ': 3 of the first 3 items',
    ),
    'lists with commas': (
        'x.csv',
        'user;item\nc;5,30\nc;7,5\nc;8\n',
        {},
        ': 2 of the first 3 items',
    ),
    'a list of RecBole': (
        'x.tsv',
        'user_id:token\titem_id:token_seq\nc\t5 30\n',
        {},
        ', line 1: column .* contains lists',
    ),
    'titles as ids': (
        'x.csv',
        'user,item\nc,Toy Story 2\nc,7 8\nc,2001\n',
        {},
        {'c': ['Toy Story 2', '7 8', '2001']},
    ),
    # Files that were joined.
    'names again': (
        'x.csv',
        'user,item\nc,a\nc,b\nuser,item\nc,d\n',
        {},
        ', line 4: the names of the columns again',
    ),
    'names again, with times': (
        'x.csv',
        timed('ts', (3, 2, 1)) * 2,
        {},
        ', line 5: the names of the columns again',
    ),
    'a user called user': (
        'x.csv',
        'user,item\nuser,a\nuser,b\nuser,user\n',
        {},
        {'user': ['a', 'b', 'user']},
    ),
    # Without a header.
    'words alone': (
        'x.csv',
        'ann,tea\nann,cup\n',
        {},
        ', line 1: no column .*; if line 1 is data, give positions: --',
    ),
    'words with tabs': (
        'x.tsv',
        'ann\ttea\nann\tcup\n',
        {},
        ', line 1: .* give positions: --columns=user:1,item:2',
    ),
    'words by position': (
        'x.csv',
        'c,a\nc,b\nc,d\n',
        {'columns': {'user': '1', 'item': '2'}},
        {'c': ['a', 'b', 'd']},
    ),
    'an unnamed time': (
        'x.csv',
        f'c,a,{EPOCH + 3}\nc,b,{EPOCH}\n',
        {'columns': {'user': '1', 'item': '2'}},
        ": column '3' looks like a time",
    ),
    'pairs': ('x.txt', 'c d\nc b\ne b\nc a\n', {}, RIGHT),
    'the file of NCF': ('ml.train.rating', 'c\ta\t4\t3\nc\tb\t5\t2\nc\td\t1\t1\n', {}, RIGHT),
    'lines of Steam': (
        'x.json',
        ''.join(
            f"{{u'username': u'c', u'product_id': u'{i}', u'date': u'{day}', u'found': True}}\n"
            for i, day in zip('abd', DATES)
        ),
        {},
        RIGHT,
    ),
    # Types of Parquet.
    'decimal times': (
        'x.parquet',
        parquet(time=[Decimal('2.9'), Decimal('2.5'), Decimal('2.1')]),
        {},
        RIGHT,
    ),
    'decimal ratings': (
        'x.parquet',
        parquet(time=[3, 2, 1], rating=[Decimal('3.9'), Decimal('3.5'), Decimal('3.6')]),
        {'min_rating': 3.5},
        RIGHT,
    ),
    'ratings of 32 bits': (
        'x.parquet',
        parquet(time=[3, 2, 1], rating=pl.Series([3.6, 3.6, 3.7], dtype=pl.Float32)),
        {'min_rating': 3.6},
        RIGHT,
    ),
    'times of the day': (
        'x.parquet',
        parquet(time=[time(1)] * 3),
        {},
        ": column 'time' contains Time; a time needs a date",
    ),
    'durations': (
        'x.parquet',
        parquet(when=[timedelta(1)] * 3),
        {},
        ": column 'when' contains Duration",
    ),
    'unsigned nanoseconds': (
        'x.parquet',
        parquet(time=pl.Series([EPOCH * 10**9 + n for n in (3, 2, 1)], dtype=pl.UInt64)),
        {},
        RIGHT,
    ),
    'whole floats as ids': (
        'x.csv',
        'user,item,ts\n1.0,12.0,3\n1,12,2\n1,7,1\n',
        {},
        {'1': ['7', '12', '12']},
    ),
    # Quotes.
    'a blank before quotes': (
        'x.csv',
        timed('ts', (3, 2, 1)).replace('c,a', '"c", "a"'),
        {},
        RIGHT,
    ),
    'quotes far apart': (
        'x.tsv',
        timed('ts,artist', ['3,"Heroes', '2,Queen', '1,Oasis"']).replace(',', '\t'),
        {},
        RIGHT,
    ),
    'quotes far apart between bars': (
        'x.csv',
        timed('ts,artist', ['3,"Heroes', '2,Queen', '1,Oasis"']).replace(',', '|'),
        {},
        RIGHT,
    ),
}


@pytest.mark.parametrize('case', FILES)
def test_a_file_is_read_right_or_refused(case, tmp_path):
    name, content, options, expected = FILES[case]
    if isinstance(expected, dict):
        assert run(content, tmp_path, name, **options) == expected
    else:
        assert re.match(expected, refusal(content, tmp_path, name, **options))
