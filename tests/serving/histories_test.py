"""Files of histories and of item ids: what is read and what is refused."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fame_jax.errors import UserError
from fame_jax.serving import histories
from fame_jax.serving.histories import History


def test_both_forms_blank_lines_and_integers(tmp_path):
    path = tmp_path / 'h.jsonl'
    text = '{"user": " ann ", "items": ["7", 12, 12.0, " 7\\t"]}\n\n["ü", "007"]\n{"items": []}\n[]'
    path.write_text(text)
    expected = [History('ann', ['7', '12', '12', '7']), History('', ['ü', '007'])]
    assert list(histories.read(path)) == [*expected, History('', []), History('', [])]
    assert histories.count(path) == 5


@settings(max_examples=30)
@given(st.lists(st.lists(st.text(st.characters(codec='utf-8'), max_size=5), max_size=4)))
def test_any_ids_come_back_without_blanks_around_them(tmp_path_factory, lists):
    path = tmp_path_factory.mktemp('h') / 'h.jsonl.gz'
    with gzip.open(path, 'wt', encoding='utf-8') as file:
        file.writelines(
            json.dumps(items, ensure_ascii=n % 2 == 0) + '\n' for n, items in enumerate(lists)
        )
    expected = [[item.strip() for item in items] for items in lists]
    assert [history.items for history in histories.read(path)] == expected


@pytest.mark.parametrize(
    ('line', 'words'),
    [
        (b'junk', 'not JSON'),
        (b'\xff\xfe["a"]', 'not JSON'),
        (b'[' * 100_000, 'not JSON'),
        (b'7', 'no list of items'),
        (b'{"user": "ann"}', 'no list of items'),
        (b'{"items": {"a": 1}}', 'no list of items'),
        (b'[1.5]', '1.5 is not an id'),
        (b'[true]', 'true is not an id'),
        (b'[["a"]]', '["a"] is not an id'),
        (b'{"user": 1.5, "items": []}', '1.5 is not an id'),
        (b'{"user": null, "items": []}', 'null is not an id'),
        (b'[9007199254740993.0]', 'is not an id'),
        (b'[NaN]', 'NaN is not an id'),
        (b'["a", "\\ud83d"]', r"'\ud83d' is half a character"),
        (b'{"user": "x\\udc00", "items": []}', 'half a character'),
        (b'["\xed\xa0\xbd"]', 'half a character'),
        (b'{"items": ["a"], "items": ["b"]}', "'items' stands twice"),
    ],
)
def test_a_faulty_line_is_named_when_it_is_reached(tmp_path, line, words):
    path = tmp_path / 'h.jsonl'
    path.write_bytes(b'["a"]\n\n' + line + b'\n')
    stream = histories.read(path)
    assert next(stream).items == ['a']
    with pytest.raises(UserError) as refusal:
        next(stream)
    message = str(refusal.value)
    assert f'{path}, line 3: ' in message and words in message and '\n' not in message


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match='No such file'):
        list(histories.read(tmp_path / 'nowhere.jsonl'))
    (tmp_path / 'plain.jsonl.gz').write_text('["a"]')
    with pytest.raises(UserError, match='ot a gzipped file'):
        list(histories.read(tmp_path / 'plain.jsonl.gz'))
    whole = gzip.compress(b'["a"]\n' * 10_000)
    (tmp_path / 'cut.jsonl.gz').write_bytes(whole[:-20])
    for read in (histories.read, lambda path: [histories.count(path)]):
        with pytest.raises(UserError, match='cut short'):
            list(read(tmp_path / 'cut.jsonl.gz'))


def test_a_file_of_item_ids(tmp_path):
    path = tmp_path / 'items.txt'
    path.write_text('\ufeffa\n  b \n\nü x\n', encoding='utf-8')
    assert histories.read_ids(path) == ['a', 'b', 'ü x']
    path.write_text('a\u2028b\r\n\x0bc\x1cd\n', encoding='utf-8')
    assert histories.read_ids(path) == ['a\u2028b', 'c\x1cd']
    for content, words in ((b'', 'holds no item id'), (b'\xff\xff', 'not UTF-8')):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            histories.read_ids(path)
