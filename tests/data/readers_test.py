"""Forms of files that are read, and faults that are one-line errors."""

import gzip
import io
import json
import zipfile
from datetime import timedelta
from decimal import Decimal

import polars as pl
import pytest

from fame_jax.data.readers import read_log
from fame_jax.errors import UserError

CSV = b'user_id,item_id,rating,timestamp\n'
ROWS = b'u1,a,5,10\nu1,b,4,30\nu2,a,3,20\n'
TSV, PLAIN = CSV.replace(b',', b'\t'), b'1 7 8 9\n2 7 9 8\n'
INTER = b'user_id:token\titem_id:token\trating:float\ttimestamp:float\n'


def read(path, needs_rating=False, **columns):
    return read_log(path, columns, needs_rating)


def actions(log):
    return [(log.user_ids[u], log.item_ids[i]) for u, i in zip(log.users, log.items)]


def parquet(**columns):
    file = io.BytesIO()
    pl.DataFrame(columns, strict=False).write_parquet(file)
    return file.getvalue()


def archive(**files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as writer:
        for name, content in files.items():
            writer.writestr(name.replace('__', '/').replace('_dot_', '.'), content)
    return file.getvalue()


def review(**changes):
    record = {'reviewerID': 'u1', 'asin': 'a', 'overall': 5.0, 'unixReviewTime': 10} | changes
    return json.dumps(record).encode() + b'\n'


# Name of the case: (file, content, options, the start of the message after the path)
MISTAKES = {
    'empty': ('x.csv', b'', {}, ': empty file'),
    'empty gzip': ('x.csv.gz', gzip.compress(b''), {}, ': nothing inside'),
    'only blank lines': ('x.txt', b'\n \r\n\t\n', {}, ': only blank lines'),
    'junk': ('x.txt', b'1 2 3\n4 5 \xf3\xa0\xff', {}, ', line 2, byte 5: 0xf3 is not UTF-8'),
    'junk csv': ('x.csv', bytes(range(256)), {}, ', line 1, byte 1: a NUL byte'),
    'nul': ('x.csv', CSV + b'u1,a,5,1\nu1,\0,5,1\n', {}, ', line 3, byte 4: a NUL byte'),
    'latin-1': ('x.csv', CSV + b'caf\xe9,a,5,1\n', {}, ', line 2, byte 4: 0xe9 is not UTF-8'),
    'half utf-16': ('x.csv', CSV.decode().encode('utf-16')[:-1], {}, ': UTF-16 text, cut short'),
    'no items': ('x.txt', PLAIN + b'3\n4 7 8 9\n', {}, ", line 3: user '3' has no items"),
    'user twice': ('x.txt', PLAIN + b'1 8 9\n', {}, ", line 3: user '1' is on line 1 already"),
    'long line': ('x.txt', PLAIN + b'3' + b' 7' * 2**21 + b'\n', {}, ', line 3: longer than 4 MB'),
    'columns of txt': ('x.txt', PLAIN, {'user': 'who'}, ': a sequence file'),
    'ratings of txt': ('x.txt', PLAIN, {'needs_rating': True}, ': a sequence file'),
    'gzip cut short': ('x.csv.gz', gzip.compress(CSV + ROWS)[:-9], {}, ': cut short'),
    'not gzip': ('x.csv.gz', CSV + ROWS, {}, ': not gzip'),
    'gzip damaged': ('x.csv.gz', b'\x1f\x8b\x08\0aaaaaaaaaaaaaaaa', {}, ': not gzip'),
    'not zip': ('x.zip', b'PK\3\4 and no more', {}, ': not a zip archive'),
    'zip cut short': ('x.zip', archive(ratings_dot_csv=CSV + ROWS)[:-30], {}, ': not a zip'),
    'zip without a log': ('x.zip', archive(readme_dot_md=b'hi'), {}, ': 0 readable files'),
    'unknown kind': ('x.xls', b'hi', {}, ': unknown kind of file'),
    'no kind': ('x', b'hi', {}, ': unknown kind of file'),
    'no such column': ('x.csv', CSV + ROWS, {'user': 'who'}, ", line 1: there is no column"),
    'no guess': ('x.csv', b'who,what\nu1,a\n', {}, ", line 1: no column looks like the user"),
    'no rating': ('x.csv', b'user,item\nu,a\n', {'needs_rating': True}, ', line 1: no column'),
    'no time': ('x.csv', CSV + ROWS, {'time': 'when'}, ", line 1: there is no column 'when'"),
    'no header': ('x.csv', b'\n' + CSV + ROWS, {}, ', line 1: blank; put'),
    'header alone': ('x.csv', CSV, {}, ': no records after the header'),
    'time is text': ('x.csv', CSV + ROWS + b'u2,b,5,late\n', {}, ", line 5: 'timestamp' is 'late'"),
    'time is nan': ('x.csv', CSV + ROWS + b'u2,b,5,nan\n', {}, ", line 5: 'timestamp' is 'nan'"),
    'time is missing': ('x.csv', CSV + ROWS + b'u2,b,5,\n', {}, ", line 5: 'timestamp' is empty"),
    'time is no date': (
        'x.csv', CSV + b'u1,a,5,2020-01-31\nu1,b,5,2020-02-31\n', {},
        ", line 3: 'timestamp' is '2020-02",
    ),
    'date is missing': (
        'x.csv', CSV + b'u1,a,5,2020-01-31\nu1,b,5,\n', {}, ", line 3: 'timestamp' is empty",
    ),
    'another time': (
        'x.csv', b'user_id,item_id,x\nc,a,2020-01-03\nc,b,2020-01-02\n', {},
        ", line 1: column 'x' looks like a time",
    ),
    'two times': (
        'x.csv', b'user,item,time,ts\nu,a,3,1577836800\nu,b,9,1577836801\n', {},
        ", line 1: 'time' and 'ts' may be the time",
    ),
    'two units': (
        'x.csv', CSV + b'u1,a,5,1577836800\nu1,b,5,1577836801000\n', {},
        ", line 3: 'timestamp' is 1577836801000, not a time in seconds",
    ),
    'time is the order of a sequence file': (
        'x.txt', PLAIN, {'time': '-', 'user': '1'}, ': a sequence file',
    ),
    'user is missing': ('x.csv', CSV + ROWS + b',b,5,1\n', {}, ", line 5: 'user_id' is empty"),
    'item is blank': ('x.csv', CSV + ROWS + b'u2,  ,5,1\n', {}, ", line 5: 'item_id' is empty"),
    'rating is text': (
        'x.csv', CSV + b'\n' + ROWS + b'u2,b,good,1\n', {'needs_rating': True},
        ", line 6: 'rating' is 'good'",
    ),
    'too many fields': ('x.csv', CSV + ROWS + b'u2,b,5,1,9\n', {}, ', line 5: 5 fields where'),
    'too few fields': ('x.csv', CSV + b'u2,b,5\n' + ROWS, {}, ', line 2: 3 fields where'),
    'ragged and quoted': ('x.csv', CSV + b'u1,"a\nb",5,1\nu2,b\n', {}, ', line 4: 2 fields where'),
    'open quote': (
        'x.csv', CSV + ROWS + b'u2,"b,c",5,1\nu3,"b,,5,1\n', {}, ', line 6: text after a',
    ),
    'ragged tsv': ('x.tsv', TSV + b'u1\ta\n', {}, ', line 2: 2 fields where'),
    'ragged inter': ('x.inter', INTER + b'u1\ta\t5\t1\t1\n', {}, ', line 2: 5 fields where'),
    'lists in inter': (
        'x.inter', b'user_id:token\titem_id_list:token_seq\n1\t2 3\n', {}, ', line 1: column',
    ),
    'ratings.dat ragged': ('r.dat', b'1::7::5::10\n1::8::5\n', {}, ', line 2: 3 fields where'),
    'ratings.dat text': ('r.dat', b'1::7::5::10\n1::8::5::x\n', {}, ", line 2: 'timestamp' is 'x'"),
    'not ratings.dat': ('r.dat', b'hello\n', {}, ', line 1: looks like data, not like names'),
    'json malformed': ('x.jsonl', review() + b'{"asin": \n', {}, ', line 2: not JSON'),
    'json cut short': ('x.json.gz', gzip.compress((review() * 3)[:-9]), {}, ', line 3: not JSON'),
    'json array': ('x.json', b'[' + review() + b', 3]', {}, ', object 2: 3 is not a JSON obj'),
    'json array cut': ('x.json', b'[' + review() + b', {', {}, ', line 2: not JSON'),
    'json array, empty': ('x.json', b'[]', {}, ': an empty array'),
    'json number': ('x.jsonl', review() + b'3\n', {}, ', line 2: not a JSON object'),
    'json null id': ('x.jsonl', review() + review(asin=None), {}, ", line 2: 'asin' is empty"),
    'json list id': ('x.jsonl', review() + review(asin=['a']), {}, ", line 2: 'asin' is ['a']"),
    'json half letter': ('x.jsonl', review() + review(asin='\ud800'), {}, ", line 2: 'asin' con"),
    'json nan': ('x.jsonl', review() + review(unixReviewTime=float('nan')), {}, ', line 2: '),
    'json deep': ('x.jsonl', review() + b'[' * 100_000 + b'\n', {}, ', line 2: not JSON'),
    'parquet junk': ('x.parquet', b'PAR1 and no more', {}, ': not a Parquet file'),
    'parquet cut short': ('x.parquet', parquet(user=[1], item=[2])[:-20], {}, ': not a Parquet'),
    'parquet null': ('x.parquet', parquet(user=[1, None], item=[1, 2]), {}, ", row 2: 'user' is"),
    'parquet nan': (
        'x.parquet', parquet(user=[1, 2], item=[1, 2], time=[1.0, float('nan')]), {},
        ", row 2: 'time' is empty",
    ),
    'parquet durations': (
        'x.parquet', parquet(user=[1], item=[2], time=[timedelta(1)]), {},
        ": column 'time' contains Duration",
    ),
    'parquet lists': ('x.parquet', parquet(user=[1], item=[[2]]), {}, ": column 'item' contains"),
}  # fmt: skip


@pytest.mark.parametrize('case', MISTAKES)
def test_a_faulty_file_is_a_one_line_error(case, tmp_path):
    name, content, options, expected = MISTAKES[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert '\n' not in message and message.isprintable()
    assert message.startswith(str(path))
    assert message.removeprefix(str(path)).startswith(expected)
    assert len(message.removeprefix(str(path))) < 250


def test_a_path_without_a_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match='this is a folder'):
        read(tmp_path)
    with pytest.raises(UserError, match=r'none\.csv: No such file or directory; check the path'):
        read(tmp_path / 'none.csv')


def test_a_parquet_file_cut_anywhere_is_an_error(tmp_path):
    content, path = parquet(user=list(range(50)), item=list(range(50))), tmp_path / 'x.parquet'
    for size in range(1, len(content), 37):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match='cut short'):
            read(path)


LOG = [('u1', 'a'), ('u1', 'b'), ('u2', 'a')]
REVIEWS = review() + review(asin='b', unixReviewTime=30, overall=4) + review(reviewerID='u2')
MOVIES = b'u1::a::5::10\nu1::b::4::30\nu2::a::3::20\n'
# All forms of LOG.
FORMS = {
    'csv': ('x.csv', CSV + ROWS),
    'csv with semicolons': ('x.csv', (CSV + ROWS).replace(b',', b';')),
    'crlf': ('x.csv', (CSV + ROWS).replace(b'\n', b'\r\n')),
    'old mac': ('x.csv', (CSV + ROWS).replace(b'\n', b'\r')),
    'bom': ('x.csv', b'\xef\xbb\xbf' + CSV + ROWS),
    'no last newline': ('x.csv', (CSV + ROWS)[:-1]),
    'blank lines': ('x.csv', CSV + b'\n' + ROWS + b'\n \n\t\n'),
    'empty records': ('x.csv', CSV + ROWS + b',,,\n'),
    'blanks around': ('x.csv', (CSV + ROWS).replace(b',', b' , ')),
    'quotes': (
        'x.csv', b'"user_id","item_id","note"\n"u1","a","x,\n\ny"\nu1,b,\nu2,"a","say ""hi"""\n',
    ),
    'inner quotes': ('x.csv', b'user,item,note\nu1,a,12" disc\nu1,b,\nu2,a,7" disc\n'),
    'gzip': ('x.csv.gz', gzip.compress(CSV + ROWS)),
    'gzip by content': ('x.csv', gzip.compress(CSV + ROWS)),
    'tsv': ('x.tsv', (CSV + ROWS).replace(b',', b'\t')),
    'inter': ('x.inter', INTER + ROWS.replace(b',', b'\t')),
    'inter with a lone quote': (
        'x.inter', b'user_id:token\titem_id:token\tnote:token\nu1\ta\t"x\nu1\tb\t\nu2\ta\t\n',
    ),
    'ratings.dat': ('ratings.dat', MOVIES),
    'u.data': ('u.data', MOVIES.replace(b'::', b'\t')),
    'movielens zip': ('m.zip', archive(ml__ratings_dot_dat=MOVIES, ml__users_dot_dat=b'1::F')),
    'zip of one': ('m.zip', archive(log_dot_csv=CSV + ROWS, readme_dot_md=b'hi')),
    'jsonl': ('x.jsonl', REVIEWS),
    'amazon': ('reviews.json.gz', gzip.compress(REVIEWS)),
    'parquet': ('x.parquet', parquet(user=['u1', 'u1', 'u2'], item=['a', 'b', 'a'])),
}  # fmt: skip


@pytest.mark.parametrize('form', FORMS)
def test_every_form_of_a_log_reads_the_same(form, tmp_path):
    name, content = FORMS[form]
    path = tmp_path / name
    path.write_bytes(content)
    assert actions(read(path)) == LOG


@pytest.mark.parametrize(
    'content',
    [PLAIN, b'\xef\xbb\xbf' + PLAIN, PLAIN.replace(b'\n', b'\r\n'), PLAIN[:-1], b'\n' + PLAIN],
)
def test_sequence_files_keep_their_order(content, tmp_path):
    path = tmp_path / 'x.txt'
    path.write_bytes(content + b'\n \n')
    log = read(path)
    assert actions(log) == [('1', i) for i in '789'] + [('2', i) for i in '798']
    assert log.times is None and log.card['reader'] == 'sequences'


def test_ids_of_text_files_are_text(tmp_path):
    ids = ['7', '007', '1e3', 'a', 'é', '東京', '-1', '7.0', 'NA', 'null', '\u2028']
    path = tmp_path / 'x.csv'
    path.write_text('user,item\n' + ''.join(f'u,{i}\n' for i in ids[:-1]), encoding='utf-8')
    assert read(path).item_ids == ids[:-1]
    path = tmp_path / 'x.txt'
    path.write_text('u ' + ' '.join(ids), encoding='utf-8')
    assert read(path).item_ids == ids


def test_a_file_without_a_header_in_its_own_order(tmp_path):
    (tmp_path / 'x.csv').write_text('c,a,1577836803\nc,b,1577836802\nc,d,1577836801\n')
    log = read(tmp_path / 'x.csv', user='1', item='2', time='-')
    assert log.times is None and [item for _, item in actions(log)] == ['a', 'b', 'd']
    assert read(tmp_path / 'x.csv', user='1', item='2', time='3').times.argsort()[0] == 2
    with pytest.raises(UserError, match=r"column '3' looks like a time.*time:3.*time:-"):
        read(tmp_path / 'x.csv', user='1', item='2')


@pytest.mark.parametrize(
    ('name', 'content'),
    [
        ('x.jsonl', b'{"user": "u", "item": "a", "liked": [0, 1], "ts": 3}\n'
                    b'{"user": "u", "item": "b", "text": "\\ud800", "ts": 2}\n'),
        ('x.parquet', parquet(user=['u', 'u'], item=['a', 'b'], liked=[[0], [1]], ts=[3, 2])),
        ('x.csv', b'user,item,note,note,ts\nu,a,,x,3\nu,b,y,,2\n'),
        ('x.csv', b'user,item,ts,note\nu,a,3,"x,\ny"\nu,b,2,\n'),
    ],
)  # fmt: skip
def test_unused_columns_of_any_kind_are_no_obstacle(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    log = read(tmp_path / name)
    assert log.card['columns']['time'] == 'ts' and log.times.tolist() == [3, 2]


def test_an_unused_column_is_seen_after_blank_lines_and_in_all_parts(tmp_path):
    for name, rows in (('a', '\n\nc,a,2020-01-03\n'), ('b', 'c,b,2020-01-02\n\nc,d,2020-01-01\n')):
        (tmp_path / f'part-{name}.csv').write_text('user,item,x\n' + rows)
    with pytest.raises(UserError, match="column 'x' looks like a time"):
        read(tmp_path / 'part-*.csv')
    log = read(tmp_path / 'part-*.csv', time='x')
    assert log.times.argsort().tolist() == [2, 1, 0]


def test_whole_floats_are_integers_that_met_a_missing_value(tmp_path):
    path = tmp_path / 'x.parquet'
    path.write_bytes(parquet(user=[1.0, 2.0], item=[1.5, 2.0]))
    log = read(path)
    assert (log.user_ids, log.item_ids) == (['1', '2'], ['1.5', '2.0'])
    assert log.card['id_kinds'] == {'user': 'int', 'item': 'str'}


@pytest.mark.parametrize(
    ('name', 'content'),
    [
        ('x.csv', b'user,item\nu,12\nu,12.0\nu,-3.00\nu, 0.0 \nu,12\n'),
        ('x.tsv', b'user\titem\nu\t12.0\nu\t12\nu\t-3\nu\t0\nu\t12.00\n'),
        ('x.parquet', parquet(user=['u'] * 5, item=[12.0, 12.0, -3.0, 0.0, 12.0])),
        (
            'x.parquet',
            parquet(user=['u'] * 5, item=[Decimal(n) for n in ('12.0', '12', '-3', '0', '12')]),
        ),
        ('x.jsonl', b''.join(b'{"user": "u", "item": %b}\n' % n for n in
                             (b'12', b'12.0', b'-3', b'0.0', b'12'))),
    ],
)  # fmt: skip
def test_whole_numbers_are_one_id_in_all_their_forms(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert [item for _, item in actions(read(tmp_path / name))] == ['12', '12', '-3', '0', '12']


@pytest.mark.parametrize('ids', [['1.0', '2.5'], ['1.0', '01'], ['7.0', 'x'], ['1.0', '1e3']])
def test_ids_with_points_stay_where_not_all_are_whole_numbers(ids, tmp_path):
    (tmp_path / 'x.csv').write_text('user,item\n' + ''.join(f'u,{i}\n' for i in ids))
    assert read(tmp_path / 'x.csv').item_ids == ids


def test_a_placeholder_is_refused_with_another_column(tmp_path):
    """Diginetica: nearly all users are NA, and sessions are known."""
    header = 'sessionId;userId;itemId;timeframe;eventdate\n'
    rows = [f'{n};NA;{n % 7};{n};2016-05-09\n' for n in range(50)]
    rows += [f'{n};{n};3;{n};2016-05-10\n' for n in range(9)]
    (tmp_path / 'views.csv').write_text(header + ''.join(rows))
    with pytest.raises(UserError, match=r"50 of 59 records have the user 'NA'.*user:sessionId"):
        read(tmp_path / 'views.csv')
    log = read(tmp_path / 'views.csv', user='sessionId')
    assert log.card['columns']['user'] == 'sessionId' and log.card['notes'] == []
    (tmp_path / 'views.csv').write_text(header + ''.join(rows).replace('NA', ''))
    with pytest.raises(UserError, match=r"line 2: 'userId' is empty.*user:sessionId"):
        read(tmp_path / 'views.csv')


def test_the_card_says_which_columns_were_guessed_and_which_are_unused(tmp_path):
    (tmp_path / 'x.csv').write_text('customer,sku,price,bought_at\nu,a,9,2020-01-03\n')
    card = read(tmp_path / 'x.csv', item='sku').card
    assert card['columns'] == {'user': 'customer', 'item': 'sku', 'time': 'bought_at'}
    assert card['guessed'] == ['user', 'time'] and card['unused'] == ['price']
    assert card['time'] == {'unit': 'days', 'first': '2020-01-03', 'last': '2020-01-03'}


def test_decimals_in_parquet_are_exact(tmp_path):
    stars, times = (
        [Decimal(n) for n in texts] for texts in (('3.5', '3.9', '3'), ('2.9', '2.1', '2.5'))
    )
    content = parquet(user=['u'] * 3, item=['a', 'b', 'c'], rating=stars, time=times)
    (tmp_path / 'x.parquet').write_bytes(content)
    log = read(tmp_path / 'x.parquet', needs_rating=True)
    assert log.ratings.tolist() == [3.5, 3.9, 3.0]
    assert log.times.argsort().tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    'times, steps',
    [
        (['10', '-3', '9007199254740993'], [10, -3, 9007199254740993]),
        (['10', '2.5', '1e3'], [10, 2.5, 1000]),
        (['1970-01-01', '1970-01-01T00:00:01.5', '1969-12-31'], [0, 1_500_000, -86400e6]),
        # All with a zone: some with and some without are refused, see times_test.py.
        (
            ['1970-01-01 01:00:00+01:00', '1970-01-01 00:00:02 UTC', '1970-01-01T00:00:01Z'],
            [0, 2e6, 1e6],
        ),
    ],
)
def test_times_are_numbers_or_dates(times, steps, tmp_path):
    path = tmp_path / 'x.csv'
    path.write_text('user,item,time\n' + ''.join(f'u,a,{time}\n' for time in times))
    assert read(path).times.tolist() == steps


def test_parquet_dates_and_columns_by_any_case(tmp_path):
    frame = pl.DataFrame({'USER_ID': [1, 1], 'Item': [3, 4], 'Date': ['2020-01-02', '2020-01-01']})
    frame.with_columns(pl.col('Date').str.to_date()).write_parquet(tmp_path / 'x.parquet')
    log = read(tmp_path / 'x.parquet')
    assert log.times[0] - log.times[1] == 86400 * 10**6
    assert log.card['columns'] == {'user': 'USER_ID', 'item': 'Item', 'time': 'Date'}


def test_recbole_columns_answer_without_their_type(tmp_path):
    path = tmp_path / 'x.inter'
    path.write_bytes(INTER.replace(b'user_id', b'who') + ROWS.replace(b',', b'\t'))
    for name in ('who', 'who:token'):
        assert read(path, user=name).card['columns']['user'] == 'who:token'


@pytest.mark.parametrize(
    ('name', 'content', 'user', 'item'),
    [
        ('x.csv', b'user,item\n1,2\n', 'str', 'str'),
        ('x.txt', b'1 2 3 4\n', 'str', 'str'),
        ('x.parquet', parquet(user=[1], item=['2']), 'int', 'str'),
        ('x.jsonl', b'{"user": 1, "item": 2}\n{"user": 3, "item": "4"}\n', 'int', 'str'),
        ('x.jsonl', b'{"user": 1, "item": 123456789012345678901234567890}\n', 'int', 'str'),
    ],
)
def test_the_card_has_the_kinds_of_ids(name, content, user, item, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name).card['id_kinds'] == {'user': user, 'item': item}


@pytest.mark.parametrize(
    ('name', 'advice'),
    [
        ('custmer', "did you mean 'Customer'?"),
        ('xyz', "choose one of 'Customer', 'sku'"),
    ],
)
def test_the_message_about_a_wrong_column_suggests_one(name, advice, tmp_path):
    path = tmp_path / 'x.csv'
    path.write_text('Customer,sku\nu,a\n')
    with pytest.raises(UserError) as caught:
        read(path, user=name, item='sku')
    what = f'there is no column {name!r} (--columns=user:NAME'
    assert str(caught.value).startswith(f'{path}, line 1: {what}')
    assert str(caught.value).endswith(advice)
