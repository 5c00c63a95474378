"""Damaged files of every form: the right kind of answer is a log or a UserError of one line."""

import bz2
import gzip
import io
import json
import lzma
import random
import zipfile

import polars as pl
import pytest

from fame_jax.data.readers import read_log
from fame_jax.errors import UserError
from fame_jax.text import items as item_text

CSV = (
    b'user,item,rating,time\n"u1","a",5,1500000000\n'
    b'u1,"b ""c""\nd",4,1500000030\nu2,a,3,1500000020\n'
)
OBJECTS = [
    {'user': f'u{n}', 'item': n, 'time': 1_500_000_000 + n, 'text': 'é"\n'} for n in range(3)
]
LINES = b''.join(json.dumps(row).encode() + b'\n' for row in OBJECTS)


def zipped(name, content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as writer:
        writer.writestr(name, content)
        writer.writestr('__MACOSX/._' + name, b'\0')
    return file.getvalue()


def parquet():
    file = io.BytesIO()
    pl.DataFrame(OBJECTS).write_parquet(file)
    return file.getvalue()


FORMS = {
    'x.csv': CSV,
    'semicolons.csv': CSV.replace(b',', b';'),
    'x.tsv': CSV.replace(b',', b'\t'),
    'x.inter': b'user_id:token\titem_id:token\ttimestamp:float\nu\ta\t1\nu\t"b\t2\n',
    'x.jsonl': LINES,
    'array.json': json.dumps(OBJECTS).encode(),
    'dicts.json': b''.join(repr(row).encode() + b'\n' for row in OBJECTS),
    'ratings.dat': b'1::7::5::10\n1::8::4::30\n',
    'u.data': b'1\t7\t5\t10\n1\t8\t4\t30\n',
    'x.rating': b'1\t7\t5\t10\n1\t8\t4\t30\n',
    'histories.txt': b'1 7 8 9\n2 7 9\n',
    'pairs.txt': b'1 7\n1 8\n2 9\n',
    'table.txt': b'event_id user_id item_id timestamp\n1 u a 10\n2 u b 20\n',
    'utf16.csv': CSV.decode().encode('utf-16'),
    'x.csv.gz': gzip.compress(CSV, mtime=0),
    'x.csv.bz2': bz2.compress(CSV),
    'x.csv.xz': lzma.compress(CSV),
    'x.zip': zipped('x.csv', CSV),
    'x.parquet': parquet(),
}
ITEMS = {
    'x_items.csv': b'item_id,title,genres\n7,"A, ""b""\nc",x|y\n8,B,z\n',
    'x_items.jsonl': b'{"item_id": 7, "title": "A", "categories": [["x"]]}\n{"item_id": 8}\n',
    'x_items.json': b"{u'asin': 7, 'title': u'A'}\n{'asin': 8, 'title': 'B'}\n",
    'x.item': b'item_id:token\ttitle:token_seq\n7\tA "b\n8\tC\n',
    'movies.dat': b'7::Heat (1995)::Action\n8::Up (2009)::Comedy\n',
    'ml.zip': zipped('movies.csv', b'movieId,title\n7,Heat\n'),
}
# Bytes that mean something to one of the readers.
TOKENS = [
    *(
        b'"',
        b'""',
        b'"\n',
        b'\n"',
        b',',
        b'\t',
        b';',
        b'|',
        b'::',
        b' ',
        b'\n',
        b'\n\n',
        b'\r',
        b'\r\n',
    ),
    *(b'\0', b'\xff', b'\xe9', b'\xed\xa0\x80', b'\xef\xbb\xbf', b'\xff\xfe', '\u2028'.encode()),
    *(
        b'{',
        b'}',
        b'[',
        b']',
        b'[' * 3000,
        b'{"a":' * 3000,
        b'null',
        b'NaN',
        b'\\',
        b"'",
        b'\\ud800',
    ),
    *(b'9' * 30, b'9' * 5000, b'-1', b'1e999', b'0x' + b'f' * 5000, b'2020-13-45', b'user', b'1:'),
]


def damage(content, draw):
    """Changes a few places: bytes, cuts, copies of a part, and tokens."""
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 4])):
        at = draw.randrange(len(content) + 1)
        end = min(len(content), at + draw.choice([1, 3, 20]))
        match draw.randrange(5):
            case 0:
                content[at:end] = draw.randbytes(end - at)
            case 1:
                del content[at:end]
            case 2:
                del content[at:]
            case 3:
                content[at:at] = content[at:end] * draw.choice([1, 50])
            case 4:
                content[at:end] = draw.choice(TOKENS)
    return bytes(content)


def try_log(path):
    log = read_log(path, {})
    assert len(log.users) == len(log.items) > 0
    assert max(log.users) < len(log.user_ids) and max(log.items) < len(log.item_ids)
    # What is read can be written.
    json.dumps([log.user_ids, log.item_ids, log.card], ensure_ascii=False).encode()


def try_items(path):
    items = item_text.read(path, ['', '7', '8'])
    assert len(items.texts) == 3
    ''.join(items.texts).encode()


def fuzz(folder, name, content, read, times):
    draw, path, refused = random.Random(name), folder / name, 0
    for _ in range(times):
        path.write_bytes(damage(content, draw))
        try:
            read(path)
        except UserError as error:
            assert '\n' not in str(error) and str(error).startswith(str(path)), str(error)
            refused += 1
    assert refused
    if times > 20:
        assert refused < times


TIMES = [20, pytest.param(500, marks=pytest.mark.fuzz)]


@pytest.mark.parametrize('times', TIMES)
@pytest.mark.parametrize('name', FORMS)
def test_damaged_logs(name, times, tmp_path):
    fuzz(tmp_path, name, FORMS[name], try_log, times)


@pytest.mark.parametrize('times', TIMES)
@pytest.mark.parametrize('name', ITEMS)
def test_damaged_item_files(name, times, tmp_path):
    fuzz(tmp_path, name, ITEMS[name], try_items, times)
