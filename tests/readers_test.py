"""What a file may look like, what it may not, and what its owner is told then."""

import gzip
import io
import json
import zipfile

import polars as pl
import pytest

from fame_jax.data.readers import read_log
from fame_jax.errors import UserError

GUESS = dict.fromkeys(('user', 'item', 'time', 'rating'), '')
CSV = b'user_id,item_id,rating,timestamp\n'
ROWS = b'u1,a,5,10\nu1,b,4,30\nu2,a,3,20\n'
TSV, PLAIN = CSV.replace(b',', b'\t'), b'1 7 8 9\n2 7 9 8\n'
INTER = b'user_id:token\titem_id:token\trating:float\ttimestamp:float\n'


def read(path, rated=False, **columns):
    return read_log(path, GUESS | columns, rated)


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


# name of the case: (file, content, options, what the message must say after the file's name)
MISTAKES = {
    'empty': ('x.csv', b'', {}, ': empty file'),
    'empty gzip': ('x.csv.gz', gzip.compress(b''), {}, ': nothing inside'),
    'only blank lines': ('x.txt', b'\n \r\n\t\n', {}, ': only blank lines'),
    'junk': ('x.txt', b'1 2 3\n4 5 \xf3\xa0\xff', {}, ', line 2, byte 5: 0xf3 is not UTF-8'),
    'junk csv': ('x.csv', bytes(range(256)), {}, ', line 1, byte 1: a NUL byte'),
    'nul': ('x.csv', CSV + b'u1,a,5,1\nu1,\0,5,1\n', {}, ', line 3, byte 4: a NUL byte'),
    'latin-1': ('x.csv', CSV + b'caf\xe9,a,5,1\n', {}, ', line 2, byte 4: 0xe9 is not UTF-8'),
    'utf-16': ('x.csv', CSV.decode().encode('utf-16'), {}, ', line 1: UTF-16 text'),
    'no items': ('x.txt', PLAIN + b'3\n4 7 8 9\n', {}, ", line 3: user '3' has no items"),
    'log as txt': ('x.txt', CSV + ROWS, {}, ', line 1: '),
    'user twice': ('x.txt', PLAIN + b'1 8 9\n', {}, ", line 3: user '1' is on line 1 already"),
    'long line': ('x.txt', PLAIN + b'3' + b' 7' * 2**21 + b'\n', {}, ', line 3: longer than 4 MB'),
    'columns of txt': ('x.txt', PLAIN, {'user': 'who'}, ': a sequence file'),
    'ratings of txt': ('x.txt', PLAIN, {'rated': True}, ': a sequence file'),
    'gzip cut short': ('x.csv.gz', gzip.compress(CSV + ROWS)[:-9], {}, ': cut short'),
    'not gzip': ('x.csv.gz', CSV + ROWS, {}, ': not gzip'),
    'gzip damaged': ('x.csv.gz', b'\x1f\x8b\x08\0aaaaaaaaaaaaaaaa', {}, ': not gzip, or damaged'),
    'not zip': ('x.zip', b'PK\3\4 and no more', {}, ': not a zip archive'),
    'zip cut short': ('x.zip', archive(ratings_dot_csv=CSV + ROWS)[:-30], {}, ': not a zip'),
    'zip without a log': ('x.zip', archive(readme_dot_md=b'hi'), {}, ': 0 readable files'),
    'unknown kind': ('x.xls', b'hi', {}, ': unknown kind of file'),
    'no kind': ('x', b'hi', {}, ': unknown kind of file'),
    'no such column': ('x.csv', CSV + ROWS, {'user': 'who'}, ", line 1: no column 'who'; found"),
    'no guess': ('x.csv', b'who,what\nu1,a\n', {}, ", line 1: no column looks like the user"),
    'no rating': ('x.csv', b'user,item\nu,a\n', {'rated': True}, ', line 1: no column looks like'),
    'no time': ('x.csv', CSV + ROWS, {'time': 'when'}, ", line 1: no column 'when'"),
    'no header': ('x.csv', b'\n' + CSV + ROWS, {}, ', line 1: blank, where'),
    'header alone': ('x.csv', CSV, {}, ': a header and no records'),
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
    'user is missing': ('x.csv', CSV + ROWS + b',b,5,1\n', {}, ", line 5: 'user_id' is empty"),
    'item is blank': ('x.csv', CSV + ROWS + b'u2,  ,5,1\n', {}, ", line 5: 'item_id' is empty"),
    'rating is text': (
        'x.csv', CSV + b'\n' + ROWS + b'u2,b,good,1\n', {'rated': True},
        ", line 6: 'rating' is 'good'",
    ),
    'too many fields': ('x.csv', CSV + ROWS + b'u2,b,5,1,9\n', {}, ', line 5: 5 fields where'),
    'too few fields': ('x.csv', CSV + b'u2,b,5\n' + ROWS, {}, ', line 2: 3 fields where'),
    'ragged and quoted': ('x.csv', CSV + b'u1,"a\nb",5,1\nu2,b\n', {}, ', line 4: 2 fields where'),
    'open quote': ('x.csv', CSV + ROWS + b'u2,"b,5,1\nu3,b,5,1\n', {}, ', line 5: a quoted field'),
    'ragged tsv': ('x.tsv', TSV + b'u1\ta\n', {}, ', line 2: 2 fields where'),
    'ragged inter': ('x.inter', INTER + b'u1\ta\t5\t1\t1\n', {}, ', line 2: 5 fields where'),
    'lists in inter': (
        'x.inter', b'user_id:token\titem_id_list:token_seq\n1\t2 3\n', {}, ', line 1: column',
    ),
    'ratings.dat ragged': ('r.dat', b'1::7::5::10\n1::8::5\n', {}, ', line 2: 3 fields where'),
    'ratings.dat text': ('r.dat', b'1::7::5::10\n1::8::5::x\n', {}, ", line 2: 'timestamp' is 'x'"),
    'not ratings.dat': ('r.dat', b'hello\n', {}, ", line 1: expected 'user::item"),
    'json malformed': ('x.jsonl', review() + b'{"asin": \n', {}, ', line 2: not JSON'),
    'json cut short': ('x.json.gz', gzip.compress((review() * 3)[:-9]), {}, ', line 3: not JSON'),
    'json array': ('x.json', b'[' + review() + b']', {}, ', line 1: a JSON array'),
    'json number': ('x.jsonl', review() + b'3\n', {}, ', line 2: not a JSON object'),
    'json null id': ('x.jsonl', review() + review(asin=None), {}, ", line 2: 'asin' is empty"),
    'json list id': ('x.jsonl', review() + review(asin=['a']), {}, ", line 2: 'asin' is ['a']"),
    'json half letter': ('x.jsonl', review() + review(asin='\ud800'), {}, ", line 2: 'asin' holds"),
    'json nan': ('x.jsonl', review() + review(unixReviewTime=float('nan')), {}, ', line 2: '),
    'json deep': ('x.jsonl', review() + b'[' * 100_000 + b'\n', {}, ', line 2: not JSON'),
    'parquet junk': ('x.parquet', b'PAR1 and no more', {}, ': not Parquet'),
    'parquet cut short': ('x.parquet', parquet(user=[1], item=[2])[:-20], {}, ': not Parquet'),
    'parquet null': ('x.parquet', parquet(user=[1, None], item=[1, 2]), {}, ", row 2: 'user' is"),
    'parquet nan': (
        'x.parquet', parquet(user=[1, 2], item=[1, 2], time=[1.0, float('nan')]), {},
        ", row 2: 'time' is empty",
    ),
    'parquet lists': ('x.parquet', parquet(user=[1], item=[[2]]), {}, ": column 'item' holds List"),
}  # fmt: skip


@pytest.mark.parametrize('case', MISTAKES)
def test_mistakes_are_told_in_one_line(case, tmp_path):
    name, content, options, said = MISTAKES[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert '\n' not in message and message.isprintable()
    assert message.startswith(str(path))
    assert said in message.removeprefix(str(path))
    assert len(message.removeprefix(str(path))) < 250


def test_places_without_a_file_are_told(tmp_path):
    with pytest.raises(UserError, match='a folder, where a file belongs'):
        read(tmp_path)
    with pytest.raises(UserError, match=r'none\.csv: No such file or directory; check the path'):
        read(tmp_path / 'none.csv')


def test_a_parquet_file_cut_anywhere_is_told(tmp_path):
    content, path = parquet(user=list(range(50)), item=list(range(50))), tmp_path / 'x.parquet'
    for size in range(1, len(content), 37):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match='cut short'):
            read(path)


LOG = [('u1', 'a'), ('u1', 'b'), ('u2', 'a')]
REVIEWS = review() + review(asin='b', unixReviewTime=30, overall=4) + review(reviewerID='u2')
MOVIES = b'u1::a::5::10\nu1::b::4::30\nu2::a::3::20\n'
# Every way to write LOG.
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


def test_ids_are_opaque_tokens(tmp_path):
    ids = ['7', '007', '1e3', 'a', 'é', '東京', '-1', '7.0', 'NA', 'null', '\u2028']
    path = tmp_path / 'x.csv'
    path.write_text('user,item\n' + ''.join(f'u,{i}\n' for i in ids[:-1]), encoding='utf-8')
    assert read(path).item_ids == ids[:-1]
    path = tmp_path / 'x.txt'
    path.write_text('u ' + ' '.join(ids), encoding='utf-8')
    assert read(path).item_ids == ids


def test_whole_floats_are_integers_that_met_a_missing_value(tmp_path):
    path = tmp_path / 'x.parquet'
    path.write_bytes(parquet(user=[1.0, 2.0], item=[1.5, 2.0]))
    log = read(path)
    assert (log.user_ids, log.item_ids) == (['1', '2'], ['1.5', '2.0'])


@pytest.mark.parametrize(
    'times, steps',
    [
        (['10', '-3', '9007199254740993'], [10, -3, 9007199254740993]),
        (['10', '2.5', '1e3'], [10, 2.5, 1000]),
        (['1970-01-01', '1970-01-01T00:00:01.5', '1970-01-01 01:00:00+01:00'], [0, 1_500_000, 0]),
        (['1970-01-01 00:00:02 UTC', '1970-01-01T00:00:01Z', '1969-12-31'], [2e6, 1e6, -86400e6]),
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
