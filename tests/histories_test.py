"""Files of histories: what is read, and what is refused with its line."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fame_jax.data import histories
from fame_jax.data.histories import History
from fame_jax.errors import UserError


def test_both_forms_blank_lines_and_numbers(tmp_path):
    path = tmp_path / 'h.jsonl'
    path.write_text('{"user": "ann", "items": ["7", 12]}\n\n["ü", "007"]\n{"items": []}\n[]')
    expected = [History('ann', ['7', '12']), History('', ['ü', '007'])]
    assert list(histories.read(path)) == [*expected, History('', []), History('', [])]
    assert histories.count(path) == 5


@given(st.lists(st.lists(st.text(st.characters(codec='utf-8'), max_size=5), max_size=4)))
def test_whatever_ids_come_back_as_they_were(tmp_path_factory, lists):
    path = tmp_path_factory.mktemp('h') / 'h.jsonl.gz'
    with gzip.open(path, 'wt', encoding='utf-8') as file:
        file.writelines(
            json.dumps(items, ensure_ascii=n % 2 == 0) + '\n' for n, items in enumerate(lists)
        )
    assert [history.items for history in histories.read(path)] == lists


def test_it_reads_as_it_goes(tmp_path):
    path = tmp_path / 'h.jsonl'
    path.write_text('["a"]\njunk\n')
    stream = histories.read(path)
    assert next(stream).items == ['a']
    with pytest.raises(UserError, match='line 2'):
        next(stream)


@pytest.mark.parametrize(
    ('line', 'told'),
    [
        (b'junk', 'not JSON'),
        (b'\xff\xfe["a"]', 'not JSON'),
        (b'["a"', 'not JSON'),
        (b'[' * 100_000, 'not JSON'),
        (b'7', 'no list of items'),
        (b'"a"', 'no list of items'),
        (b'null', 'no list of items'),
        (b'{"user": "ann"}', 'no list of items'),
        (b'{"items": {"a": 1}}', 'no list of items'),
        (b'[1.5]', '1.5 is no id'),
        (b'[true]', 'true is no id'),
        (b'[null]', 'null is no id'),
        (b'[["a"]]', '["a"] is no id'),
        (b'{"user": 1.5, "items": []}', '1.5 is no id'),
    ],
)
def test_a_line_that_is_no_history_is_named(tmp_path, line, told):
    path = tmp_path / 'h.jsonl'
    path.write_bytes(b'["a"]\n\n' + line + b'\n')
    with pytest.raises(UserError) as refusal:
        list(histories.read(path))
    message = str(refusal.value)
    assert f'{path}, line 3: ' in message and told in message and '\n' not in message


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


def test_lists_of_items(tmp_path):
    path = tmp_path / 'items.txt'
    path.write_text('\ufeffa\n  b \n\nü x\n', encoding='utf-8')
    assert histories.read_ids(path) == ['a', 'b', 'ü x']
    for content, told in ((b'', 'names no item'), (b'\xff\xff', 'not text')):
        path.write_bytes(content)
        with pytest.raises(UserError, match=told):
            histories.read_ids(path)
