"""Files of a run that were cut short or changed: the right answer, or one line and exit code 2."""

import contextlib
import json
import random
import shutil

import pytest

from fame_jax import run_dir
from fame_jax.config import flags
from fame_jax.data.dataset import Dataset
from fame_jax.errors import UserError
from fame_jax.main import main
from fame_jax.report import collect
from fame_jax.training import loop
from fame_jax.training.checkpoint import Checkpoints

VALUES = (None, True, -1, 0, 2**70, 1e308, '', 'x', '\ud83d', [], [[]], {}, {'a': None})


def damage(content, draw):
    """A copy of a file's bytes that is cut short, changed, or of other values where it is JSON."""
    kind = draw.choice(('cut', 'flip', 'insert', 'json', 'json', 'lines'))
    at = draw.randrange(len(content) + 1)
    if kind == 'cut':
        return content[:at]
    if kind == 'flip':
        return content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
    if kind == 'insert':
        return (
            content[:at]
            + draw.choice((b'\0', b'\xff\xfe', b'[' * 9999, b'--', b'\n'))
            + content[at:]
        )
    if kind == 'lines':
        lines = content.splitlines(keepends=True)
        draw.shuffle(lines)
        return b''.join(lines[: draw.randrange(len(lines) + 1)])
    try:
        value = json.loads(content)
    except ValueError:
        return damage(content, draw)
    return json.dumps(change(value, draw)).encode()


def change(value, draw):
    """A JSON value in which one place, at any depth, has another value or is missing."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        name = draw.choice(sorted(value))
        kept = {key: one for key, one in value.items() if key != name}
        return kept if draw.random() < 0.2 else value | {name: change(value[name], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        return [*value[:place], change(value[place], draw), *value[place + 1 :]]
    return draw.choice(VALUES)


def read_flags(run):
    flags.complete(flags.Given({}), flags.read(run / 'flags.cfg'), {})


def read_progress(run):
    with Checkpoints(run / 'checkpoints' / 'pretrain') as checkpoints:
        progress = loop.read_progress(checkpoints)
        loop.is_finished(vars(progress), loop.Limits(3, 3))


def progress_file(run):
    (path,) = (run / 'checkpoints' / 'pretrain').glob('*/progress/metadata')
    return path.relative_to(run)


# The files, and what reads them.
READERS = {
    'flags.cfg': read_flags,
    'dataset/dataset.json': lambda run: Dataset.load(run / 'dataset'),
    'dataset/ids.json': lambda run: Dataset.load(run / 'dataset'),
    'results.json': lambda run: collect.collect(run, Dataset.load(run / 'dataset')),
    'ranks.npz': lambda run: collect.collect(run, Dataset.load(run / 'dataset')),
    'metrics.jsonl': lambda run: collect.collect(run),
}


@pytest.fixture(scope='module')
def copy(trained, tmp_path_factory):
    """A copy of a run."""
    return shutil.copytree(trained, tmp_path_factory.mktemp('damaged') / 'run')


def check_reader(name, read, run, seeds):
    content = (run / name).read_bytes()
    try:
        check_damages(name, read, run, content, seeds)
    finally:
        (run / name).write_bytes(content)


def check_damages(name, read, run, content, seeds):
    for seed in seeds:
        (run / name).write_bytes(damage(content, random.Random(seed)))
        try:
            read(run)
        except UserError as error:
            assert '\n' not in str(error) and len(str(error)) < 1000, (seed, error)
        except Exception as error:
            raise AssertionError(f'{name}, seed {seed}: {error!r}') from error


@pytest.mark.parametrize('name', READERS)
def test_a_damaged_file_is_read_or_refused(name, copy):
    check_reader(name, READERS[name], copy, range(150))


@pytest.mark.fuzz
@pytest.mark.parametrize('name', READERS)
def test_a_file_that_is_damaged_in_thousands_of_ways(name, copy):
    check_reader(name, READERS[name], copy, range(150, 2000))


def test_damaged_progress_of_a_checkpoint(copy):
    check_reader(str(progress_file(copy)), read_progress, copy, range(20))


@pytest.mark.fuzz
@pytest.mark.parametrize('seed', range(60))
def test_a_command_on_a_damaged_run(seed, trained, tmp_path, capsys):
    """Each command with one damaged file; the exit code is 0, or 2 with one line."""
    draw = random.Random(seed)
    run = shutil.copytree(trained, tmp_path / 'run')
    name = draw.choice([*READERS, str(progress_file(run))])
    (run / name).write_bytes(damage((run / name).read_bytes(), draw))
    stage = draw.choice(('prepare', 'pretrain', 'evaluate', 'recommend', 'report', 'export'))
    capsys.readouterr()
    code = main([f'--workdir={run}', f'--stages={stage}', '--progress=none'])
    error = capsys.readouterr().err
    assert code in (0, 2), (name, stage)
    if code:
        assert error.startswith('error: ') and error.count('\n') == 1, error


@pytest.mark.parametrize('seed', range(200))
def test_lines_of_flags_are_read_or_refused(seed, tmp_path):
    draw = random.Random(seed)
    words = (
        '--',
        'seed',
        '=',
        '1',
        'width',
        'é',
        '\0',
        '"',
        ',',
        ' ',
        'no',
        'columns',
        'user:a',
        '#',
    )
    lines = [''.join(draw.choices(words, k=draw.randrange(6))) for _ in range(draw.randrange(4))]
    (tmp_path / 'a.cfg').write_text('\n'.join(lines))
    with contextlib.suppress(UserError):
        flags.parse([f'--flagfile={tmp_path / "a.cfg"}'])
    run_dir.write_text(tmp_path / 'flags.cfg', '\n'.join(lines))
    with contextlib.suppress(UserError):
        flags.read(tmp_path / 'flags.cfg')
