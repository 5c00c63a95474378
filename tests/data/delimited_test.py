"""Quotes, separators and first lines of text tables: read right, or refused in one line."""

import csv
import io
import random

import polars as pl
import pytest

from fame_jax.data import records
from fame_jax.data.sources import open_source
from fame_jax.data.tables import open_table
from fame_jax.errors import UserError

SEPARATORS = {'tab': '\t', 'comma': ',', 'semicolon': ';', 'bar': '|'}
POSITIONS = {'user': '1', 'item': '2'}


def write(folder, content, name='x.csv'):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def open_(folder, content, name='x.csv', **columns):
    return open_table(open_source(write(folder, content, name)), columns)


def rows(table, *names):
    """Records as lists of texts; empty fields are ''."""
    columns = table.read(list(names) or table.columns)
    return [[value or '' for value in row] for row in zip(*(c.to_list() for c in columns))]


def refusal(folder, content, name='x.csv', **columns):
    with pytest.raises(UserError) as caught:
        table = open_(folder, content, name, **columns)
        table.read(table.columns)
    message = str(caught.value)
    assert '\n' not in message and message.startswith(str(folder / name))
    return message.removeprefix(str(folder / name))


HEROES = """user,item,time,artist
u1,a,1,"Heroes
u1,b,2,Queen
u1,c,3,Blur
u1,d,4,Oasis"
u1,e,5,x
u1,f,6,y
"""


@pytest.mark.parametrize('separator', SEPARATORS.values(), ids=SEPARATORS)
def test_lone_quotes_swallow_no_records(separator, tmp_path):
    table = open_(tmp_path, HEROES.replace(',', separator), 'x.tsv')
    assert rows(table, 'item') == [[c] for c in 'abcdef']
    assert rows(table, 'artist')[0] == ['"Heroes'] and rows(table, 'artist')[3] == ['Oasis"']
    (note,) = table.notes
    assert note == 'fields with a lone quote, read as a character: 2, the first on line 2'
    assert table.locate(3) == 'line 5'


@pytest.mark.parametrize('separator', SEPARATORS.values(), ids=SEPARATORS)
def test_two_quotes_far_apart_swallow_no_records(separator, tmp_path):
    lines = [f'{n % 943},{n % 1682},{880_000_000 + n},x' for n in range(20_000)]
    lines[4_000], lines[16_000] = '7,7,1,"Heroes', '8,8,2,Oasis"'
    table = open_(tmp_path, '\n'.join(['user,item,time,artist', *lines]).replace(',', separator))
    assert [separator.join(row) for row in rows(table)] == [
        line.replace(',', separator) for line in lines
    ]


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ('u,"a,1\nu,b,2\nu,c",3\n', ['"a', 'b', 'c"']),  # in the column of ids
        ('u,12" disc,1\nu,7",2\n', ['12" disc', '7"']),
        ('u,"a,1\nu,b,2\n', ['"a', 'b']),  # one quote alone
        ('u,"a" and "b",1\nu,b,2\n', ['"a" and "b"', 'b']),
        ('u,""a,1\nu,b,2\nu,c"",3\n', ['""a', 'b', 'c""']),
        ('u,",1\nu,b,2\nu,",3\n', ['"', 'b', '"']),
        ('u,"a",1\nu,b",2\nu,c,3\n', ['a', 'b"', 'c']),
        ('u,"say ""a""",1\nu,b",2\nu,c,3\n', ['say "a"', 'b"', 'c']),
    ],
)
def test_a_quote_that_encloses_no_field_is_a_character(content, expected, tmp_path):
    table = open_(tmp_path, 'user,item,time\n' + content)
    assert [row[0] for row in rows(table, 'item')] == expected


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ('"u1","a","1"\n', [['u1', 'a', '1']]),
        ('"u1", "a",1\n"u2" ,"b",2\n', [['u1', 'a', '1'], ['u2', 'b', '2']]),
        ('"u1", "a, b", "1"\n', [['u1', 'a, b', '1']]),
        ('u1,"say ""hi""",1\n', [['u1', 'say "hi"', '1']]),
        ('u1,"say ""hi"", he",1\n', [['u1', 'say "hi", he', '1']]),
        ('u1,"a, b",1\nu2,"c, d",2\n', [['u1', 'a, b', '1'], ['u2', 'c, d', '2']]),
        ('u1,"",1\n', [['u1', '', '1']]),
        ('u1,"a\nb, c",1\n', [['u1', 'a\nb, c', '1']]),
        ('u1,"a\n\nb",1\nu2,"""c""",2\n', [['u1', 'a\n\nb', '1'], ['u2', '"c"', '2']]),
        # Lines have the right number of fields too, but then 'b' is a time.
        ('u1,a,1\nu1,"x,\nu1,b",2\n', [['u1', 'a', '1'], ['u1', 'x,\nu1,b', '2']]),
    ],
)
def test_enclosed_fields_are_unpacked(content, expected, tmp_path):
    assert rows(open_(tmp_path, 'user,item,time\n' + content)) == expected


def test_names_with_separators_in_quotes(tmp_path):
    table = open_(tmp_path, '"user","item","name, first"\n"u","a","x, y"\n"v","b","z, w"\n')
    assert table.columns == ['user', 'item', 'name, first']
    assert rows(table) == [['u', 'a', 'x, y'], ['v', 'b', 'z, w']]


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        # Two readings, and no column of numbers that tells them apart.
        ('user,item\nu,"a\nu,b"\n', ', line 2: a quote opens here and closes on line 3'),
        ('user,item\nu,a\nu,b\nu,"c\nu,d\nu,e"\n', ', line 4: a quote opens here and closes on'),
        # The lines inside look like records, and one of them is faulty.
        (HEROES.replace('u1,c,3,Blur\n', 'u1,c,3\n'), ', line 2: a quote opens here and closes on'),
        (HEROES.replace('u1,e,5,x\n', 'u1,e,5\n'), ', line 6: 3 fields where line 1 has 4'),
        ('user,item\n"u","a"\n"u","b\n"u","c"\n', ', line 3: a lone quote in column 2, where most'),
        ('user,item\nu,"a,b"c\nu,d\n', ', line 2: text after a closing quote'),
        ('user,item\nu,"a,b\nu,d\n', ', line 2: text after a closing quote, or a quote that never'),
        ('user,item\nu,"a, b"\nu,"c, d"\nu\n', ', line 4: 1 field where line 1 has 2'),
    ],
)
def test_doubtful_quotes_are_refused(content, expected, tmp_path):
    assert refusal(tmp_path, content).startswith(expected)


def test_long_texts_over_lines_are_read(tmp_path):
    """Texts of several lines, with commas: RFC 4180, since most lines inside are no records."""
    texts = [f'Hello {n},\nthis is a, b\n\nand "more"' for n in range(50)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator='\n')
    writer.writerows([['user', 'item', 'text'], *(['u', str(n), t] for n, t in enumerate(texts))])
    table = open_(tmp_path, file.getvalue())
    assert [row[0] for row in rows(table, 'text')] == texts
    assert table.locate(49) == f'line {2 + 49 * 4}' and table.lines == 201


def test_records_inside_of_a_quoted_field_are_doubted_among_long_texts_too(tmp_path):
    texts = [f'u,a,{n},"Hello {n}\nthis is\n\nlong"' for n in range(50)]
    songs = [f'u,b,{n},song' for n in range(4)]
    songs = [songs[0].replace('song', '"Heroes'), *songs[1:3], songs[3].replace('song', 'Oasis"')]
    message = refusal(tmp_path, '\n'.join(['user,item,time,text', *texts, *songs]) + '\n')
    assert message.startswith(', line 202: a quote opens here and closes on line 205')
    # Of two lines, one may look like a record by chance.
    short = '\n'.join(['user,item,time,text', *texts, *songs[:2]]) + '"\n'
    assert len(rows(open_(tmp_path, short))) == 51


def test_recbole_has_no_quoting(tmp_path):
    table = open_(tmp_path, 'user_id:token\titem_id:token\nu\t"a"\n"u\t"b\n', 'x.inter')
    assert rows(table) == [['u', '"a"'], ['"u', '"b']] and not table.notes


@pytest.mark.parametrize('block', [1, 2, 3, 5, 16])
@pytest.mark.parametrize('quoted', [False, True])
def test_scan_by_blocks(quoted, block, monkeypatch):
    """Widths and lines by hand, with records and quotes across the borders of blocks."""
    text = b'a,b\n"x,\ny",""\n\n,\n"""",z'
    monkeypatch.setattr(records, 'BLOCK', block)
    layout = records.scan(text, ',', quoted)
    widths = [2, 2, 1, 2, 2] if quoted else [2, 2, 2, 1, 2, 2]
    assert layout.widths.tolist() == widths
    assert list(layout.lines) == ([0, 1, 3, 4, 5] if quoted else [0, 1, 2, 3, 4, 5])
    assert layout.empty.tolist() == [False] * (len(widths) - 3) + [True, True, False]
    assert layout.fault == -1 and layout.blanks.tolist() == []


@pytest.mark.parametrize(
    ('text', 'fault'),
    [
        (b'a"b,c', 1),
        (b'"a"b,c', 2),
        (b'"a', 0),
        (b'"a","', 4),
        (b'"a"  ,b', 2),
        (b'"a""b",""', -1),
        (b'"a" ,"b"\n "c"', -1),
    ],
)
def test_scan_finds_the_first_quote_out_of_place(text, fault):
    assert records.scan(text, ',', quoted=True).fault == fault


def test_millions_of_bytes_with_quotes_read_as_the_csv_module_does(tmp_path):
    """Long enough that polars divides the text among threads."""
    draw = random.Random(0)
    parts = ['a', 'é', ' ', '"', ',', '\n', '\n\n', 'word ', '1']
    texts = [''.join(draw.choices(parts, k=draw.randrange(60))) + '.' for _ in range(30_000)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator='\n')
    writer.writerows([['user', 'item', 'text'], *([n, n, text] for n, text in enumerate(texts))])
    table = open_(tmp_path, file.getvalue())
    (read,) = table.read(['text'])
    assert read.equals(pl.Series(texts), null_equal=True)
    lines = file.getvalue().split('\n')
    for record in (0, 1, 777, 29_999):
        number = int(table.locate(record).removeprefix('line '))
        assert lines[number - 1].startswith(f'{record},{record},')


@pytest.mark.parametrize('name', ['x.csv', 'x.tsv', 'x.txt'])
@pytest.mark.parametrize('separator', SEPARATORS.values(), ids=SEPARATORS)
def test_separators_are_found(separator, name, tmp_path):
    content = 'user;item;time\nu1;a;10\nu2;b;20\n'.replace(';', separator)
    assert rows(open_(tmp_path, content, name), 'item', 'time') == [['a', '10'], ['b', '20']]


def test_the_commonest_separator_of_a_csv_header_counts(tmp_path):
    table = open_(tmp_path, 'user;item;price, EUR\nu;a;1,5\n')
    assert rows(table) == [['u', 'a', '1,5']]


@pytest.mark.parametrize(
    ('header', 'record', 'user', 'item', 'time'),
    [
        # retailrocket, diginetica, h-and-m, MIND with names
        ('timestamp,visitorid,event,itemid,transactionid', '1433221332117,257597,view,355908,',
         'visitorid', 'itemid', 'timestamp'),
        ('sessionId;userId;itemId;timeframe;eventdate', '1;NA;81766;526309;2016-05-09',
         'sessionId', 'itemId', 'eventdate'),
        ('t_dat,customer_id,article_id,price,sales_channel_id',
         '2018-09-20,000058a12d5b43e67d225668fa1f8d618c13dc232,0663713001,0.0508,2',
         'customer_id', 'article_id', 't_dat'),
    ],
)  # fmt: skip
def test_public_data_sets_by_their_own_columns(header, record, user, item, time, tmp_path):
    table = open_(tmp_path, f'{header}\n{record}\n{record}\n')
    fields = dict(zip(*(line.split(';' if ';' in line else ',') for line in (header, record))))
    assert rows(table, user, item, time) == [[fields[c] for c in (user, item, time)]] * 2


LINES = 'u1,a,5,10\nu1,b,4,30\nu2,a,3,20\n'


@pytest.mark.parametrize('name', ['x.csv', 'x.tsv', 'x.dat', 'x.txt'])
def test_columns_by_position(name, tmp_path):
    content = LINES if name in ('x.csv', 'x.txt') else LINES.replace(',', '\t')
    table = open_(tmp_path, content, name, user='1', item='2', time='4')
    assert not table.has_header and table.columns == ['1', '2', '3', '4']
    assert rows(table, '1', '2', '4') == [['u1', 'a', '10'], ['u1', 'b', '30'], ['u2', 'a', '20']]
    assert table.locate(0) == 'line 1' and table.lines == 3


def test_ids_alone_by_position(tmp_path):
    assert rows(open_(tmp_path, 'ann,tea\nbob,cup\n', **POSITIONS)) == [
        ['ann', 'tea'],
        ['bob', 'cup'],
    ]
    # The first record has the names of positions.
    assert rows(open_(tmp_path, '1,2\n1,3\n', **POSITIONS)) == [['1', '2'], ['1', '3']]


@pytest.mark.parametrize('name', ['x.csv', 'x.tsv', 'x.txt'])
@pytest.mark.parametrize(
    'line', ['u1,a,5,10', '196,242,3,881250949', 'u1,a,2020-01-02', '1,2014-04-07T10:51:09.277Z,2']
)
@pytest.mark.parametrize('names', [{}, {'user': 'u1', 'item': '10'}, {'user': 'who', 'item': '1'}])
def test_a_first_record_is_no_header(line, names, name, tmp_path):
    line = line if name == 'x.csv' else line.replace(',', '\t')
    message = refusal(tmp_path, f'{line}\n{line}\n', name, **names)
    assert message.startswith(', line 1: looks like data, not like names of columns')
    assert '--columns=user:1,item:2,time:4' in message


@pytest.mark.parametrize(
    ('content', 'columns', 'expected'),
    [
        ('user_id,item_id\nu,a\n', POSITIONS, 'looks like names of columns; use them: --columns='),
        ('who,what,when\nu,a,10\n', POSITIONS, 'looks like names of columns'),
        ('0,1,2\n4,5,6\n', POSITIONS, 'numbers that may be data or names'),
        ('1,2,3\n4,5,6\n', POSITIONS, 'numbers that may be data or names'),
        (
            LINES,
            {'user': '0', 'item': '1', 'time': '3'},
            'looks like data, not like names of columns; columns are numbered from 1: --columns=',
        ),
        (LINES, {'user': '196', 'item': '242'}, 'there is no column 242 among 4; count from 1'),
        (
            LINES,
            {'user': '1', 'item': '2', 'time': '5'},
            'there is no column 5 among 4; count from 1: --columns=',
        ),
    ],
)
def test_positions_are_refused_where_line_1_may_be_a_header(content, columns, expected, tmp_path):
    assert refusal(tmp_path, content, **columns).startswith(f', line 1: {expected}')


def test_names_that_are_numbers(tmp_path):
    assert rows(open_(tmp_path, '0,1\nu,a\n', user='0', item='1')) == [['u', 'a']]
    assert rows(open_(tmp_path, 'user,item,2020\nu,a,7\n')) == [['u', 'a', '7']]
    assert rows(open_(tmp_path, 'who,what,2020\nu,a,7\n', user='who', item='what'))[0][0] == 'u'


@pytest.mark.parametrize(
    ('name', 'content'),
    [
        ('ratings.dat', 'u1::a::5::10\nu1::b::4::30\n'),
        ('u.data', 'u1\ta\t5\t10\nu1\tb\t4\t30\n'),
        ('ml-1m.train.rating', 'u1\ta\t5\t10\nu1\tb\t4\t30\n'),
        ('x.rating', 'u1 a 5 10\nu1 b 4 30\n'),
        ('x.txt', 'u1::a::5::10\nu1::b::4::30\n'),
    ],
)
def test_movielens_forms_have_known_columns(name, content, tmp_path):
    table = open_(tmp_path, content, name)
    assert table.columns == ['userId', 'movieId', 'rating', 'timestamp']
    assert rows(table) == [['u1', 'a', '5', '10'], ['u1', 'b', '4', '30']]
    assert table.locate(1) == 'line 2'


def test_a_dat_file_may_have_a_header(tmp_path):
    table = open_(tmp_path, 'userID\tartistID\tweight\n2\t51\t13\n', 'user_artists.dat')
    assert rows(table, 'userID', 'artistID') == [['2', '51']]


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ('user,item,ts,ts\nu,a,1,2\n', ", line 1: two columns are called 'ts', numbers 3 and 4"),
        ('user,item,"ts",ts\nu,a,1,2\n', ", line 1: two columns are called 'ts', numbers 3 and 4"),
        ('user,ts,item,ts \nu,1,a,2\n', ", line 1: two columns are called 'ts', numbers 2 and 4"),
    ],
)
def test_a_column_that_occurs_twice_is_refused_where_it_is_read(content, expected, tmp_path):
    assert rows(open_(tmp_path, content), 'user', 'item') == [['u', 'a']]
    assert refusal(tmp_path, content).startswith(expected)


@pytest.mark.parametrize(
    ('content', 'line', 'width'),
    [
        ('user,item,time\nu,a\n', 2, 2),
        ('user,item,time\nu,a,1\n\nu,b,1,\n', 4, 4),
        ('user,item,time\nu,a,1\n \nu\n', 4, 1),
        ('user,item,time\nu,a,1\n,,,,\n', 3, 5),
    ],
)
def test_a_line_of_another_width_is_refused(content, line, width, tmp_path):
    fields = 'field' if width == 1 else 'fields'
    expected = f', line {line}: {width} {fields} where line 1 has 3; correct the line'
    assert refusal(tmp_path, content) == expected


def test_a_sample_is_the_first_records(tmp_path):
    content = 'user,item\n\nu,a\n,\nv,"b"\nw,c\n'
    table = open_(tmp_path, content)
    for count in (1, 2, 3, 10):
        sample = [series.to_list() for series in table.sample(['item', 'user'], count)]
        expected = [['a', 'b', 'c'][:count], ['u', 'v', 'w'][:count]]
        # Empty records count, but no record is taken for another.
        assert all(part == whole[: len(part)] for part, whole in zip(sample, expected))
    assert sample == expected


def test_empty_lines_are_no_records(tmp_path):
    table = open_(tmp_path, 'user,item\n\nu,a\n \n,\n\t\nv,b\n')
    assert rows(table) == [['u', 'a'], ['v', 'b']]
    assert [table.locate(n) for n in (0, 1)] == ['line 3', 'line 7']


@pytest.mark.parametrize('first', ['', ' ', ',', ',,', '\t'])
@pytest.mark.parametrize('name', ['x.csv', 'x.tsv', 'x.dat'])
def test_an_empty_first_line_is_refused(first, name, tmp_path):
    message = refusal(tmp_path, f'{first}\nuser,item\nu,a\n', name)
    assert message == ', line 1: blank; put the names of the columns there'
