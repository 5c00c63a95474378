"""Files on the disk: packed, several at once, other encodings; hashes and places in messages."""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import zipfile

import polars as pl
import pytest

from fame_jax.data import prepare, sources
from fame_jax.data.readers import read_log
from fame_jax.data.sources import open_source, read_text
from fame_jax.data.tables import open_table
from fame_jax.errors import UserError

CSV = b'user,item,time\nu1,a,1\nu1,b,2\n'
MORE = b'user,item,time\nu2,a,3\n'


def archive(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as writer:
        for name, content in files.items():
            writer.writestr(name, content)
    return file.getvalue()


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name.replace('_dot_', '.')).write_bytes(content)
    return folder


def actions(path, **columns):
    log = read_log(path, columns)
    return [(log.user_ids[u], log.item_ids[i]) for u, i in zip(log.users, log.items)]


def refusal(path, **columns):
    with pytest.raises(UserError) as caught:
        read_log(path, columns)
    message = str(caught.value)
    assert message.startswith(str(path)) and '\n' not in message
    return message.removeprefix(str(path))


@pytest.mark.parametrize(
    ('name', 'pack'),
    [('x.csv.gz', gzip.compress), ('x.csv.bz2', bz2.compress), ('x.csv.xz', lzma.compress)],
)
def test_packed_files(name, pack, tmp_path):
    path, packed = tmp_path / name, pack(CSV)  # gzip packs the time of packing too
    path.write_bytes(packed)
    assert actions(path) == [('u1', 'a'), ('u1', 'b')]
    assert read_log(path, {}).card['sha256'] == hashlib.sha256(packed).hexdigest()
    path.write_bytes(packed[:-9])
    assert ': cut short' in refusal(path)
    # Known by its first bytes too.
    path = tmp_path / 'x.csv'
    path.write_bytes(pack(CSV))
    assert actions(path) == [('u1', 'a'), ('u1', 'b')]


def test_zstd_is_refused_with_advice(tmp_path):
    path = write(tmp_path, x_dot_csv=b'\x28\xb5\x2f\xfd\x20\x00') / 'x.csv'
    assert refusal(path) == ': packed by zstd; unpack it with `zstd -d`'


@pytest.mark.parametrize('folder', ['', 'data/', 'My data/'])
def test_a_zip_of_macos(folder, tmp_path):
    files = {
        f'{folder}log.csv': CSV,
        f'__MACOSX/{folder}._log.csv': b'\0\5\x16\7',
        f'__MACOSX/{folder}other.csv': b'\0\5\x16\7',
        f'{folder}.DS_Store': b'\0\0',
        f'{folder}._log.csv': b'\0\5\x16\7',
    }
    path = tmp_path / 'x.zip'
    path.write_bytes(archive(files))
    assert actions(path) == [('u1', 'a'), ('u1', 'b')]


def test_a_zip_with_two_logs_is_refused(tmp_path):
    path = tmp_path / 'x.zip'
    path.write_bytes(archive({'a.csv': CSV, 'b.csv': MORE}))
    assert refusal(path).startswith(': 2 readable files in the archive')


def test_a_folder_of_parts_is_one_log(tmp_path):
    """Parts in the order of their names; what systems add is ignored."""
    folder = write(
        tmp_path / 'log', part_1_dot_csv=MORE, part_0_dot_csv=CSV, _SUCCESS=b'', _dot_DS_Store=b'\0'
    )
    assert actions(folder) == [('u1', 'a'), ('u1', 'b'), ('u2', 'a')]
    assert actions(tmp_path / 'log' / 'part_?.csv') == actions(folder)
    hashes = sorted(hashlib.sha256(content).hexdigest() for content in (CSV, MORE))
    expected = hashlib.sha256('\n'.join(hashes).encode()).hexdigest()
    assert open_source(folder).sha256 == expected
    table = open_table(open_source(folder), {})
    assert table.lines == 5
    table.read(['user'])
    assert [table.locate(n) for n in range(3)] == [
        'line 2 of part_0.csv', 'line 3 of part_0.csv', 'line 2 of part_1.csv',
    ]  # fmt: skip


def test_the_hash_of_parts_does_not_depend_on_their_names(tmp_path):
    one = write(tmp_path / 'one', a_dot_csv=CSV, b_dot_csv=MORE)
    two = write(tmp_path / 'two', x_dot_csv=MORE, y_dot_csv=CSV)
    assert open_source(one).sha256 == open_source(two).sha256
    assert open_source(one / 'a.csv').sha256 == hashlib.sha256(CSV).hexdigest()


@pytest.mark.parametrize('pattern', ['part-*.csv.gz', 'part-[01].csv.gz', '*'])
def test_a_pattern_of_packed_parts(pattern, tmp_path):
    for number, content in enumerate((CSV, MORE)):
        (tmp_path / f'part-{number}.csv.gz').write_bytes(gzip.compress(content))
    assert actions(tmp_path / pattern) == [('u1', 'a'), ('u1', 'b'), ('u2', 'a')]
    assert prepare.find_file(str(tmp_path / pattern)) == tmp_path / pattern


def test_parts_without_a_header_by_position(tmp_path):
    folder = write(tmp_path / 'log', a_dot_csv=b'u1,a,1\nu1,b,2\n', b_dot_csv=b'u2,a,3\n')
    assert actions(folder, user='1', item='2') == [('u1', 'a'), ('u1', 'b'), ('u2', 'a')]
    assert ', line 1: looks like data' in refusal(folder / '*.csv'.replace('*', 'a'))


@pytest.mark.parametrize(
    ('name', 'one', 'two'),
    [
        ('txt', b'1 7 8 9\n', b'2 7 9 8\n'),
        ('jsonl', b'{"user": 1, "item": 7}\n', b'{"user": "x", "item": 8}\n'),
        ('inter', b'user_id:token\titem_id:token\n1\t7\n', b'user_id:token\titem_id:token\n1\t8\n'),
        ('parquet', None, None),
    ],
)
def test_parts_of_other_kinds(name, one, two, tmp_path):
    if name == 'parquet':
        for number, item in enumerate((7, 8)):
            frame = pl.DataFrame({'user': [1], 'item': [item]})
            frame.write_parquet(tmp_path / f'{number}.parquet')
    else:
        (tmp_path / f'0.{name}').write_bytes(one)
        (tmp_path / f'1.{name}').write_bytes(two)
    expected = {
        'txt': [('1', '7'), ('1', '8'), ('1', '9'), ('2', '7'), ('2', '9'), ('2', '8')],
        'jsonl': [('1', '7'), ('x', '8')],
    }
    assert actions(tmp_path) == expected.get(name, [('1', '7'), ('1', '8')])


def test_a_fault_in_a_part_names_the_part_and_its_line(tmp_path):
    write(tmp_path / 'csv', a_dot_csv=CSV, b_dot_csv=MORE + b'u3,a\n')
    with pytest.raises(UserError, match=r'b\.csv, line 3: 2 fields where line 1 has 3'):
        read_log(tmp_path / 'csv', {})
    write(tmp_path / 'json', a_dot_jsonl=b'{"user": 1}\n\n{"user": 2}\n', b_dot_jsonl=b'\n{}\n3\n')
    with pytest.raises(UserError, match=r'json, line 3 of b\.jsonl: not a JSON object'):
        read_log(tmp_path / 'json', {})
    write(tmp_path / 'txt', a_dot_txt=b'1 7 8\n', b_dot_txt=b'2 7\n1 8 9\n')
    with pytest.raises(UserError, match=r"txt, line 2 of b\.txt: user '1' is on line 1 already"):
        read_log(tmp_path / 'txt', {})


@pytest.mark.parametrize(
    ('files', 'expected'),
    [
        ({'a_dot_csv': CSV, 'b_dot_tsv': CSV}, ': a.csv and b.tsv are of different kinds'),
        ({'a_dot_csv': CSV, 'b_dot_csv': CSV.replace(b'time', b'date')}, '/b.csv has other colu'),
        ({'a_dot_csv': CSV, 'b_dot_csv': b'user,item\nu,a\n'}, '/b.csv has other columns'),
        ({'readme_dot_md': b'hello'}, ': this is a folder without a log'),
        ({}, ': this is a folder without a log'),
    ],
)
def test_folders_that_are_refused(files, expected, tmp_path):
    assert expected in refusal(write(tmp_path / 'log', **files))


def test_a_folder_of_movielens_stands_for_its_log(tmp_path):
    folder = write(
        tmp_path / 'ml', ratings_dot_csv=CSV, movies_dot_csv=b'movieId,title\n', tags_dot_csv=b'x\n'
    )
    assert actions(folder) == [('u1', 'a'), ('u1', 'b')]


def test_a_pattern_without_a_file_is_refused(tmp_path):
    assert refusal(tmp_path / 'part-*.csv') == ': no file has such a name; check the pattern'
    with pytest.raises(UserError, match='no such file'):
        prepare.find_file(str(tmp_path / 'part-*.csv'))


def test_a_name_with_brackets_is_a_name_first(tmp_path):
    assert len(actions(write(tmp_path, **{'log[1]_dot_csv': CSV}) / 'log[1].csv')) == 2


@pytest.mark.parametrize('name', ['x.csv', 'x.txt', 'x.parquet'])
def test_what_is_no_plain_file_is_refused_without_waiting(name, tmp_path):
    os.mkfifo(tmp_path / name)
    assert refusal(tmp_path / name) == ': not a plain file; copy its content to one'


@pytest.mark.parametrize('encoding', ['utf-16', 'utf-16-le', 'utf-16-be', 'utf-8-sig'])
@pytest.mark.parametrize('newline', ['\n', '\r\n'])
def test_encodings_with_a_mark(encoding, newline, tmp_path):
    text = 'user,item\nu,\u00e9\nu,\U0001f600\n'.replace('\n', newline)
    mark = '\ufeff' if encoding[-3:] in ('-le', '-be') else ''
    path = tmp_path / 'x.csv'
    path.write_bytes((mark + text).encode(encoding))
    assert actions(path) == [('u', '\u00e9'), ('u', '\U0001f600')]


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ('caf\u00e9'.encode('latin-1'), "4: 0xe9 is not UTF-8 (in Latin-1 it is '\u00e9'); save"),
        (b'\x80', '1: 0x80 is not UTF-8; save'),
        (b'\xf0\x9f\x98', '1: 0xf0 is not UTF-8'),  # a character cut short
        (b'\xed\xa0\x80', '1: 0xed is not UTF-8'),  # half of a pair of UTF-16
        (b'a\0b', '2: a NUL byte'),
        (b'a\0\xff', '2: a NUL byte'),
        (b'a\xff\0', '2: 0xff is not UTF-8'),
    ],
)
@pytest.mark.parametrize('before', [0, 7])
def test_other_bytes_are_refused_with_line_and_byte(
    content, expected, before, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources, 'BLOCK', 16)
    path = tmp_path / 'x.csv'
    path.write_bytes(b'user,item\n' + b'u,a\n' * before + content + b',a\nu,a\n')
    assert refusal(path).startswith(f', line {before + 2}, byte {expected}')


def test_content_is_read_when_it_is_needed(tmp_path, monkeypatch):
    """A Parquet file never is as bytes, and its hash is made of blocks."""
    path = tmp_path / 'x.parquet'
    pl.DataFrame({'user': [1], 'item': [2]}).write_parquet(path)
    source = open_source(path)
    monkeypatch.setattr(sources.Source, 'text', property(lambda self: 1 / 0))
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert open_table(source, {}).read(['item'])[0].to_list() == [2]


def test_text_is_read_once(tmp_path):
    path = write(tmp_path, x_dot_csv=CSV) / 'x.csv'
    source = open_source(path)
    first = read_text(source)
    path.write_bytes(MORE)
    assert read_text(source) is first
