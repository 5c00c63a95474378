"""Logs of objects: keys that differ from line to line, exact values, Python dicts, arrays."""

import json

import polars as pl
import pytest

from fame_jax.data import json_lines
from fame_jax.data.readers import read_log
from fame_jax.data.sources import open_source
from fame_jax.data.tables import open_table
from fame_jax.errors import UserError
from fame_jax.text import items as item_text


@pytest.fixture(params=[1, 2, 1024])
def block(request, monkeypatch):
    """Lines are parsed in blocks; the borders between them make no difference."""
    monkeypatch.setattr(json_lines, 'BLOCK', request.param)


def write(folder, content, name='x.jsonl'):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def open_(folder, content, name='x.jsonl'):
    return open_table(open_source(write(folder, content, name)), {})


def refusal(folder, content, **columns):
    path = write(folder, content)
    with pytest.raises(UserError) as caught:
        read_log(path, columns)
    message = str(caught.value)
    assert message.startswith(str(path)) and '\n' not in message
    return message.removeprefix(str(path))


def test_columns_are_the_keys_of_all_lines(tmp_path, block):
    table = open_(
        tmp_path, '{"user": 1, "item": 2}\n{"item": 3, "user": 1, "ts": 5}\n\n{"user": 2, "b": 1}\n'
    )
    assert table.columns == ['user', 'item', 'ts', 'b'] and table.lines == 4
    user, item, ts, b = (series.to_list() for series in table.read(table.columns))
    assert (user, item) == ([1, 1, 2], [2, 3, None])
    assert (ts, b) == ([None, 5, None], [None, None, 1])
    assert [table.locate(n) for n in range(3)] == ['line 1', 'line 2', 'line 4']


@pytest.mark.parametrize(
    ('lines', 'columns', 'expected'),
    [
        # The time is in every line but the first, in every line but one, in the last alone.
        ('{U}\n{U, T}\n{U, T}\n', {}, ", line 1: 'timestamp' is empty"),
        ('{U, T}\n{U, T}\n{U}\n', {}, ", line 3: 'timestamp' is empty"),
        ('{U}\n{U, "date": "2020-01-01"}\n{U, T}\n', {'time': 'timestamp'}, ', line 1: '),
        ('{U, T}\n{"user": "u", T}\n', {}, ", line 2: 'item' is empty"),
        ('{U, T}\n{U, "timestamp": null}\n', {}, ", line 2: 'timestamp' is empty"),
        ('{U, T}\n{}\n', {}, ", line 2: 'user' is empty"),
    ],
)
def test_a_line_without_a_wanted_key_is_named(lines, columns, expected, tmp_path, block):
    lines = lines.replace('U', '"user": "u", "item": "a"').replace('T', '"timestamp": 3')
    assert refusal(tmp_path, lines, **columns).startswith(expected)


@pytest.mark.parametrize(
    ('values', 'expected', 'dtype'),
    [
        ('1 2', [1, 2], pl.Int64),
        ('1 null', [1, None], pl.Int64),
        ('-9223372036854775808 9223372036854775807', [-(2**63), 2**63 - 1], pl.Int64),
        ('1 9223372036854775808', ['1', str(2**63)], pl.String),
        ('1 123456789012345678901234567890', ['1', '123456789012345678901234567890'], pl.String),
        ('12.0 12', ['12.0', '12'], pl.String),
        ('1 "1"', ['1', '1'], pl.String),
        ('1 "007"', ['1', '007'], pl.String),
        ('0.1 1e-7', ['0.1', '1e-07'], pl.String),
        ('"" "a"', ['', 'a'], pl.String),
        ('"\\u00e9\\n" "\\ud83d\\ude00"', ['\u00e9\n', '\U0001f600'], pl.String),
    ],
)
def test_values_are_exact(values, expected, dtype, tmp_path, block):
    (series,) = open_(tmp_path, ''.join(f'{{"v": {v}}}\n' for v in values.split(' '))).read(['v'])
    assert series.dtype == dtype and series.to_list() == expected


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        ('[1]', "'item' is [1], not text or a number; correct it or choose another column"),
        ('{"a": 1}', "'item' is {'a': 1}, not text"),
        ('true', "'item' is True, not text"),
        ('"\\ud83d"', "'item' contains half a character"),
        ('"a\\udfff"', "'item' contains half a character"),
    ],
)
def test_other_values_are_refused_where_they_are_read(value, expected, tmp_path, block):
    lines = f'{{"user": 1, "item": 2}}\n{{"user": 1, "item": {value}}}\n'
    assert refusal(tmp_path, lines).startswith(f', line 2: {expected}')
    table = open_(tmp_path, lines)
    (user,) = table.read(['user'])
    assert user.to_list() == [1, 1]
    # A sample serves to look at all columns.
    item, user = table.sample(['item', 'user'], 1)
    assert (item.to_list(), user.to_list()) == ([None], [1])


@pytest.mark.parametrize('name', ['"\\ud83d"', '"a\\udfff"', "'b\\ud800'"])
def test_a_name_with_half_a_character_is_refused(name, tmp_path, block):
    """Neither the screen nor a file can show it."""
    lines = f'{{"user": 1, "item": 2}}\n{{"user": 1, "item": 2, {name}: 3}}\n'
    with pytest.raises(UserError, match=r', line 2: the name .* contains half a character'):
        open_(tmp_path, lines)


STEAM = (
    "{u'user_id': u'7656', u'item': u'D\\xf6ner \"x\"', u'hours': 2.5, u'early': False}\n"
    "{'user_id': '8', 'item': \"It's\", 'hours': None, 'tags': ('a', 'b')}\n"
    '{"user_id": "9", "item": "json", "hours": 1}\n'
)


@pytest.mark.parametrize('name', ['x.json', 'x.jsonl', 'x.ndjson', 'x.txt'])
def test_python_dicts_are_read(name, tmp_path, block):
    log = read_log(write(tmp_path, STEAM, name), {})
    assert log.user_ids == ['7656', '8', '9']
    assert log.item_ids == ['D\xf6ner "x"', "It's", 'json']


def test_python_dicts_are_read_as_item_texts(tmp_path):
    path = write(tmp_path, "{u'id': 7, u'title': u'A'}\n{'id': 8, 'title': \"B's\"}\n", 'x.json')
    assert item_text.read(path, ['', '7', '8']).titles == ['', 'A', "B's"]


@pytest.mark.parametrize(
    'line',
    [
        '{"user": exit()}', "{'user': __import__('os')}", "{'a': 1} if 1 else 2", '{' * 5000,
        "{'a': " + '9' * 5000 + '}', "{'a': 1", "{'a': '\\ud83d\\", 'user', '{"a": 1}, {"a": 2}',
        '{"a": 1} {"a": 2}', "{1: 2}", "{'a', 'b'}", '{"a": 1}]', '[{"a": 1}]',
    ],
)  # fmt: skip
def test_lines_that_are_no_objects_are_refused(line, tmp_path, block):
    message = refusal(tmp_path, '{"user": 1, "item": 2}\n' + line + '\n{"user": 1, "item": 2}\n')
    assert message.startswith((', line 2: not JSON: ', ', line 2: not a JSON object; write each'))


def test_a_number_without_end_is_refused(tmp_path):
    """Python reads a hexadecimal number of any length, and does not print it."""
    lines = "{'user': 1, 'item': 2}\n{'user': 1, 'item': 0x" + 'f' * 5000 + '}\n'
    assert refusal(tmp_path, lines).startswith(', line 2: not JSON')


@pytest.mark.parametrize('newline', ['', '\n', '\r\n'])
def test_arrays_are_read(newline, tmp_path):
    rows = [{'user': 'u', 'item': n} for n in (3, 1)] + [{'user': 'v', 'item': 2, 'time': 9}]
    text = f'[{newline}' + f',{newline}'.join(map(json.dumps, rows)) + f'{newline}]'
    table = open_(tmp_path, text, 'x.json')
    assert table.columns == ['user', 'item', 'time'] and table.lines is None
    assert table.read(['item'])[0].to_list() == [3, 1, 2]
    with pytest.raises(UserError, match=r"x\.json, object 1: 'time' is empty"):
        read_log(tmp_path / 'x.json', {})


def test_arrays_are_read_as_item_texts(tmp_path):
    path = write(tmp_path, '[{"id": 7, "title": "A"},\n {"id": 8, "title": "B"}]', 'x.json')
    assert item_text.read(path, ['', '7', '8']).titles == ['', 'A', 'B']


@pytest.mark.parametrize(
    'text',
    [
        '{"user": 1, "item": [{}\n{}]}\n{"user": 2, "item": 3},{"user": 2, "item": 3}\n',
        '{"user": 1, "item": "a}\n{b"}\n{"user": 2, "item": 3},{"user": 2, "item": 3}\n',
        '{"user": 1, "item": [{}\n{}]}\n' + '{"user": 2, "item": 3},{}\n' * 2,
        '{"user": 1,\n"item": 2}\n{"user": 2, "item": 3},{"user": 2, "item": 3}\n',
    ],
)
def test_lines_that_only_together_are_objects_are_refused(text, tmp_path):
    """Lines are parsed many at once: there may be as many objects, and still others."""
    assert refusal(tmp_path, text).startswith(', line 1: not JSON')
