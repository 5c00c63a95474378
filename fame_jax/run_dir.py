"""Files in a run's folder, written atomically. All of them can be read without this package.

flags.cfg        the flags that repeat the run
dataset/         the prepared data
metrics.jsonl    a JSON object per line: stage, step, epoch, split, values, seconds
results.json     the protocol card and the metrics
ranks.npz        the rank of each user's target, by stage, split and protocol
item_graph.npz   those of the item graph, for all runs on the same prepared data
checkpoints/     by stage
text/            item vectors and labels of FAME+; heads.svg and items.svg show them trained
model_source.py  the class, where --model names one outside this package
tensorboard/     event files
tracking.json    ids of the run in MLflow and trackio, where --track names them

The folder of several seeds holds the data of all, and

seed_0/, ...     a run each
seeds.json       means and deviations of their metrics, and tests over all of them

The folder of a sweep holds the data and a folder for each setting, and

sweep.json       the settings and their validation metric, best first
sweep.svg        a panel for each flag

Of a run, several seeds, a sweep and a search (`fame_jax search`) a folder holds one.
"""

import contextlib
import fcntl
import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

from fame_jax.errors import UserError, explain_os_errors

LOCK = '.lock'
SEEDS = 'seeds.json'
SWEEP = 'sweep.json'
STUDY = 'study.log'  # of a search
# Folders of settings are named by their flags; in a sweep of a file they were numbered once.
SETTING = re.compile(r'(setting|trial)_\d+|[a-z_]+=.*', re.DOTALL)
MAKERS = {'text', 'pretrain', 'finetune', 'update'}  # stages that begin a run, given its data
ATTEMPTS = 1000  # to lock a folder that other processes make and remove


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file that replaces `path` when it is complete and on disk.

    Raises:
      UserError: when it cannot be written; an older file is then unchanged.
    """
    with explain_os_errors(f'writing {path}'):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
        try:
            with os.fdopen(handle, 'wb') as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically.

    Raises:
      UserError: when it cannot be written, or the text has half a character (a lone surrogate).
    """
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[max(error.start - 20, 0) : error.end + 20])
        raise UserError(f'writing {path}: half a character in {half}; correct the data') from error
    with atomic_write(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically; NaN is an error."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + '\n')


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      UserError: when it does not exist or is not JSON.
    """
    with explain_os_errors(f'reading {path}'):
        text = path.read_text(encoding='utf-8', errors='replace')
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is not JSON ({error}); remove it and run again') from error


def read_results(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the protocol card and the results of results.json.

    Raises:
      UserError: when it is damaged: a part that the program reads is missing or of another type.
    """
    path = folder / 'results.json'
    stored = read_json(path)
    try:
        card, results = stored['card'], stored['results']
        texts = [card['dataset']['fingerprint'], *(result['model'] for result in results.values())]
        tables = [card[name] for name in ('config', 'evaluated_on') if name in card]
        tables += card.get('stages', {}).values()
        numbers = [
            value
            for result in results.values()
            for split in ('validation', 'test')
            for metrics in result.get(split, {}).values()
            for value in metrics.values()
        ]
        for kind, values in ((str, texts), (dict, tables), ((int, float), numbers)):
            if not all(isinstance(value, kind) for value in values):
                raise TypeError
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f'{path} is damaged; run --stages=evaluate again') from error
    return card, results


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Makes the folder and locks it against other processes that write to it.

    A kill releases the lock. At the end the lock's file is removed, and so are folders that were
    made here and are still empty.

    Raises:
      UserError: when another process has the lock, or the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with explain_os_errors(f'writing in the folder {folder}', 'choose another --workdir'):
            file = _open_locked(folder)
        with file:
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    (folder / LOCK).unlink()
    finally:
        with contextlib.suppress(OSError):  # where a folder is not empty
            for path in made:
                path.rmdir()


def _open_locked(folder: Path) -> IO:
    """The lock's file, open and locked."""
    for attempt in itertools.count(1):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK).open('a')
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                    return file
            except BlockingIOError as error:
                file.close()
                raise UserError(
                    f'{folder}: another process is writing there; wait for it, or choose another '
                    '--workdir'
                ) from error
            file.close()
        except (FileNotFoundError, FileExistsError):
            # Another process may remove its file and folder between any two lines above.
            if attempt == ATTEMPTS:
                raise


class Metrics:
    """A file metrics.jsonl, to which lines are appended."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, **values: Any) -> None:
        """Adds one line; floats that are not finite become null."""
        line = json.dumps({k: _finite(v) for k, v in values.items()}) + '\n'
        with explain_os_errors(f'writing {self.path}'), self.path.open('a', encoding='utf-8') as f:
            f.write(line)

    def read(self) -> list[dict[str, Any]]:
        """The lines; a last one that a kill has cut short is skipped."""
        if not self.path.exists():
            return []
        with explain_os_errors(f'reading {self.path}'):
            lines = self.path.read_text(encoding='utf-8', errors='replace').splitlines()
        found = []
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict)]

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Keeps the wanted lines; a resumed run drops those that it will write again."""
        kept = [json.dumps(line) + '\n' for line in self.read() if wanted(line)]
        write_text(self.path, ''.join(kept))


class NullMetrics(Metrics):
    """The metrics of a process that writes none, since another process does."""

    def append(self, **values: Any) -> None:
        """Writes nothing."""

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Changes nothing."""


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and value - value != 0 else value


def seed_folders(folder: Path) -> list[Path]:
    """The runs in a folder of several seeds, by seed; [] for any other folder."""
    found = [path for path in folder.glob('seed_*') if path.name[5:].isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _seeds(folder: Path) -> list[str]:
    return [path.name.removeprefix('seed_') for path in seed_folders(folder)]


def setting_folders(folder: Path) -> list[Path]:
    """The settings in the folder of a sweep or a search, by name; [] for any other folder."""
    found = [path for path in folder.glob('*') if SETTING.fullmatch(path.name)]
    return sorted(path for path in found if (path / 'flags.cfg').is_file() or seed_folders(path))


def contents(folder: Path) -> dict[str, str]:
    """What a folder holds besides prepared data: 'run', 'seeds', 'sweep', 'search'.

    Each has its description in words. Folders of earlier versions may hold more than one.
    """
    with explain_os_errors(f'looking for runs in {folder}', 'choose another folder'):
        trained = any((folder / 'checkpoints').glob('*/[0-9]*'))
        is_run = trained or (folder / 'results.json').is_file()
        seeds = _seeds(folder)
        is_trial = [path.name.startswith('trial_') for path in setting_folders(folder)]
        is_search = (folder / STUDY).is_file() or any(is_trial)
        is_sweep = not all(is_trial) or ((folder / SWEEP).is_file() and not is_search)
    of_seeds = f'{"runs of the seeds" if len(seeds) > 1 else "the run of seed"} {", ".join(seeds)}'
    found = {'run': (is_run, 'a single run'), 'seeds': (bool(seeds), of_seeds)}
    found |= {'sweep': (is_sweep, 'a sweep'), 'search': (is_search, 'a search')}
    return {kind: words for kind, (holds, words) in found.items() if holds}


def refuse_other_kind(folder: Path, kind: str) -> None:
    """Refuses a command that would add another kind of runs to those that a folder holds.

    Args:
      folder: the command's.
      kind: what the command makes there, a key of `contents`.

    Raises:
      UserError: naming what the folder holds.
    """
    held = contents(folder)
    if not held or kind in held:
        return
    first = next(iter(held))
    seeds = ','.join(_seeds(folder))
    go_on = {
        'run': {'seeds': 'leave --seeds out', 'sweep': 'leave --sweep out'},
        'seeds': {'run': f'add --seeds={seeds}', 'sweep': 'leave --sweep out'},
        'sweep': {'run': 'add its --sweep', 'seeds': 'add its --sweep'},
    }
    advice = go_on.get(first, {}).get(kind)
    advice = f', or {advice}' if advice else ''
    raise UserError(f'{folder} holds {held[first]}; choose another --workdir{advice}')


def several_runs(folder: Path, name: str = '') -> UserError | None:
    """The error for a folder of several runs in the place of one run's; None for any other folder.

    Args:
      folder: that was given.
      name: how the user named it, such as --from=runs/a; '' the folder alone.
    """
    held = contents(folder)
    if not held or 'run' in held:
        return None
    runs = seed_folders(folder)
    if not runs:
        runs = [(seed_folders(path) or [path])[0] for path in setting_folders(folder)]
    what = 'runs of several seeds' if 'seeds' in held else f'runs of {next(iter(held.values()))}'
    example = f', such as {runs[0]}' if runs else ''
    return UserError(f'{name or folder} holds {what}; name one of them{example}')


def check_single(folder: Path, stages: Sequence[str]) -> None:
    """Refuses a folder of several runs in the place of one run's.

    `prepare` alone is not refused, since several runs share the data in their folder.

    Args:
      folder: the --workdir of one run.
      stages: of the command; () for all that make a run.

    Raises:
      UserError: naming what the folder holds, or the one above where this is that of a seed.
    """
    if list(stages) == ['prepare']:
        return
    if stages and not MAKERS & set(stages):
        error, seeds = several_runs(folder), ','.join(_seeds(folder))
        if error and seeds and 'evaluate' in stages:
            raise UserError(f'{error}, or add --seeds={seeds}')
        if error:
            raise error
        return
    refuse_other_kind(folder, 'run')
    if folder.name.startswith('seed_') and folder.name[5:].isdecimal():
        refuse_other_kind(folder.parent, 'seeds')
