"""A run's files are whole or not there, and what a kill cut short is read as far as it goes."""

import errno
import json
import os

import pytest

from fame_jax import records
from fame_jax.errors import UserError


def names(folder):
    return sorted(os.listdir(folder))


def one_line(error):
    message = str(error.value)
    assert '\n' not in message
    return message


def test_replacing_puts_a_file_in_place(tmp_path):
    path = tmp_path / 'a.bin'
    with records.replacing(path) as file:
        file.write(b'one')
        assert not path.exists()
    assert path.read_bytes() == b'one'
    with records.replacing(path) as file:
        file.write(b'two')
        file.flush()
        assert path.read_bytes() == b'one'
    assert path.read_bytes() == b'two'
    assert names(tmp_path) == ['a.bin']
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize('fault', [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize('there', [True, False])
def test_replacing_leaves_what_was_there_when_the_writer_fails(tmp_path, fault, there):
    path = tmp_path / 'a.json'
    if there:
        path.write_text('old')
    with pytest.raises(fault), records.replacing(path) as file:
        file.write(b'half')
        raise fault
    assert names(tmp_path) == (['a.json'] if there else [])
    assert not there or path.read_text() == 'old'


def test_replacing_tells_of_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / 'a.json'
    path.write_text('old')

    def full(handle):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError) as error:
        records.write_json(path, {'new': 1})
    message = one_line(error)
    assert str(path) in message and 'No space left' in message and 'free some space' in message
    assert names(tmp_path) == ['a.json']
    assert path.read_text() == 'old'


def test_replacing_tells_of_a_folder_that_is_missing_or_in_the_way(tmp_path):
    with pytest.raises(UserError) as error:
        records.write_text(tmp_path / 'missing' / 'a', 'x')
    assert 'No such file or directory' in one_line(error)
    (tmp_path / 'folder').mkdir()
    with pytest.raises(UserError) as error:
        records.write_text(tmp_path / 'folder', 'x')
    assert str(tmp_path / 'folder') in one_line(error)
    assert names(tmp_path) == ['folder']
    assert names(tmp_path / 'folder') == []


def test_json_round_trip(tmp_path):
    path = tmp_path / 'a.json'
    value = {'a': [1, 2.5, None, True], 'é': {'x': 'ü'}}
    records.write_json(path, value)
    assert records.read_json(path) == value
    assert path.read_text().endswith('}\n')


def test_json_that_holds_no_number_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / 'a.json'
    records.write_json(path, 1)
    with pytest.raises(ValueError):
        records.write_json(path, {'loss': float('nan')})
    assert records.read_json(path) == 1
    assert names(tmp_path) == ['a.json']


@pytest.mark.parametrize('content', [b'', b'{"a": 1', b'\x00\x00', b'\xff\xfe{}'])
def test_a_file_that_is_no_json_is_told(tmp_path, content):
    path = tmp_path / 'a.json'
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        records.read_json(path)
    assert str(path) in one_line(error) and 'not JSON' in str(error.value)


def test_a_json_file_that_is_missing_is_told(tmp_path):
    for path in (tmp_path / 'a.json', tmp_path):
        with pytest.raises(UserError) as error:
            records.read_json(path)
        assert str(path) in one_line(error)


@pytest.fixture
def metrics(tmp_path):
    return records.Metrics(tmp_path / 'metrics.jsonl')


def test_metrics_are_read_as_they_were_appended(metrics):
    assert metrics.read() == []
    lines = [{'stage': 'pretrain', 'step': i, 'loss': 1 / (i + 1)} for i in range(3)]
    for line in lines:
        metrics.append(**line)
    assert metrics.read() == lines
    assert metrics.path.read_text().count('\n') == 3
    assert records.Metrics(metrics.path).read() == lines


def test_what_is_no_number_becomes_null(metrics):
    metrics.append(loss=float('nan'), high=float('inf'), low=-float('inf'), fine=0.5, name='nan')
    text = metrics.path.read_text()
    assert 'NaN' not in text and 'Infinity' not in text
    (line,) = metrics.read()
    assert line == {'loss': None, 'high': None, 'low': None, 'fine': 0.5, 'name': 'nan'}


def test_a_line_cut_short_anywhere_is_passed_over(metrics):
    first, second = {'stage': 'pretrain', 'epoch': 1}, {'stage': 'pretrain', 'epoch': 23}
    metrics.append(**first)
    whole = len(metrics.path.read_bytes())
    metrics.append(**second)
    content = metrics.path.read_bytes()
    for size in range(whole, len(content) + 1):
        metrics.path.write_bytes(content[:size])
        # Without its line's end alone, the last line is whole.
        lines = [first, second] if size >= len(content) - 1 else [first]
        assert metrics.read() == lines, content[:size]
    metrics.path.write_bytes(content[:whole] + b'\x00\xff\xfe')
    assert metrics.read() == [first]


def test_a_resumed_run_writes_on_after_a_cut_line(metrics):
    metrics.append(epoch=1)
    metrics.append(epoch=2)
    metrics.path.write_bytes(metrics.path.read_bytes()[:-3])
    metrics.keep(lambda line: True)
    assert metrics.path.read_text() == '{"epoch": 1}\n'
    metrics.append(epoch=2)
    assert metrics.read() == [{'epoch': 1}, {'epoch': 2}]


def test_keep_drops_what_is_not_wanted(metrics):
    for stage in ('pretrain', 'finetune'):
        for epoch in range(3):
            metrics.append(stage=stage, epoch=epoch, loss=float('nan'))
    metrics.keep(lambda line: line['stage'] != 'finetune' or line['epoch'] <= 1)
    kept = [(line['stage'], line['epoch']) for line in metrics.read()]
    assert kept == [('pretrain', e) for e in range(3)] + [('finetune', e) for e in range(2)]
    for line in metrics.path.read_text().splitlines():
        assert json.loads(line)['loss'] is None
    assert names(metrics.path.parent) == ['metrics.jsonl']


def test_keep_makes_the_file(metrics):
    metrics.keep(lambda line: True)
    assert metrics.path.read_text() == ''


def test_metrics_that_cannot_be_written_are_told(tmp_path):
    metrics = records.Metrics(tmp_path / 'missing' / 'metrics.jsonl')
    with pytest.raises(UserError) as error:
        metrics.append(step=1)
    assert str(metrics.path) in one_line(error)


def test_one_process_trains_in_a_folder(tmp_path):
    with (
        records.locked(tmp_path),
        pytest.raises(UserError, match='another process'),
        records.locked(tmp_path),
    ):
        pass
    with records.locked(tmp_path):
        pass
