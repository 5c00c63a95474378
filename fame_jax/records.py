"""A run's folder on disk, in plain Python, so that what reads it needs neither jax nor us.

flags.cfg        repeats the run
dataset/         the prepared data
metrics.jsonl    one JSON object a line: stage, step, epoch, split, values, seconds
results.json     the protocol card and the figures
ranks.npz        the rank of each user's target, by stage, split and protocol
checkpoints/     by stage
text/            what FAME+ starts from; heads.svg and items.svg beside it: what became of that
tensorboard/     event files
"""

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fame_jax.errors import UserError, explain_os_errors


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of `path` once it is whole on disk, and never before.

    Raises:
      UserError: when it cannot be written; what was there is then untouched.
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
    """Writes a text file whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + '\n')


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      UserError: when it is not there or is not JSON.
    """
    with explain_os_errors(f'reading {path}'):
        text = path.read_text(encoding='utf-8', errors='replace')
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f'{path} is not JSON ({error}); remove it and run again') from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in the folder; a killed process lets go of it.

    Raises:
      UserError: when another process does.
    """
    with explain_os_errors(f'writing {folder / ".lock"}'):
        file = (folder / '.lock').open('w')
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f'{folder}: another process is training there; wait for it, or choose another '
                '--workdir'
            ) from error
        yield


class Metrics:
    """metrics.jsonl, appended to line by line."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, **values: Any) -> None:
        """Adds one line; floats that are no numbers become null."""
        line = json.dumps({k: _finite(v) for k, v in values.items()}) + '\n'
        with explain_os_errors(f'writing {self.path}'), self.path.open('a', encoding='utf-8') as f:
            f.write(line)

    def read(self) -> list[dict[str, Any]]:
        """The whole lines; a last one that was cut short by a kill is passed over."""
        if not self.path.exists():
            return []
        with explain_os_errors(f'reading {self.path}'):
            lines = self.path.read_text(encoding='utf-8', errors='replace').splitlines()
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict)]

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drops the lines that a resumed run is going to write again."""
        kept = [json.dumps(line) + '\n' for line in self.read() if wanted(line)]
        write_text(self.path, ''.join(kept))


class Unwritten(Metrics):
    """Of a process that is not the one which writes."""

    def append(self, **values: Any) -> None:
        """Adds nothing."""

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Keeps all."""


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and value - value != 0 else value
