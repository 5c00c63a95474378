"""Exports of a folder: the newest whole one is served, and a newer one replaces it without a pause.

The folder is an export, or has exports as its subfolders, under any names. The newest is the one
whose SHA256SUMS, which an export gets last, has the latest time; so `touch v1/SHA256SUMS` goes back
to v1. A new one is checked, loaded and warmed up beside the one that answers. Requests keep the
version that was current when they came.
"""

import hashlib
import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fame_jax.errors import UserError
from fame_jax.serving import export
from fame_jax.serving.demo.server import Demo
from fame_jax.serving.recommender import Recommender

# Some programs of versions that are gone stay in JAX's caches: those of other numbers of items.
# Linux lets a process have 65,530 mappings, of which a program takes dozens; before that the caches
# are cleared.
MAX_MAPPINGS = 30_000


class Version(NamedTuple):
    """An export that is served.

    Fields:
      name: of its folder.
      digest: the first 8 digits of the SHA-256 of its SHA256SUMS.
      recommender: answers its requests.
      demo: answers those of the page; None where the page is off.
      all_V: bool [V + 1], the candidates where a request names none; one array for all requests.
    """

    name: str
    digest: str
    recommender: Recommender
    demo: Demo | None
    all_V: np.ndarray


class Found(NamedTuple):
    """A folder that has an export's checksums.

    Fields:
      path: of the folder.
      name: its last part.
      written: nanoseconds, the time of SHA256SUMS.
      stamp: names, sizes and times of all files; it differs after any change.
    """

    path: Path
    name: str
    written: int
    stamp: tuple[tuple[str, int, int, int], ...]


class Versions:
    """The version that is served, and the search for a newer one.

    `current` may be read from any thread at any time.
    """

    def __init__(
        self,
        folder: Path,
        max_k: int,
        has_demo: bool,
        say: Callable[[str], None],
    ):
        """Loads the newest whole export.

        Args:
          folder: an export or a folder of exports.
          max_k: the longest list, for which programs are compiled.
          has_demo: whether the page is served too.
          say: prints a line.

        Raises:
          UserError: if there is none; the line says what is wrong with the newest.
        """
        self.folder, self._max_k, self._has_demo, self._say = folder, max_k, has_demo, say
        self.loaded, self.refused = 0, 0
        self._said: set[str] = set()
        self._failed: set[tuple[str, tuple]] = set()
        self._before: dict[str, tuple] = {}
        self._stamp: tuple = ()
        first_fault = ''
        for found in find(folder):
            try:
                self.current = self._load(found)
                break
            except UserError as error:
                self._refuse(found, error)
                first_fault = first_fault or str(error)
        else:
            if first_fault:
                raise UserError(first_fault)
            raise UserError(
                f'{folder} is no export and has none as a subfolder; name the folder that '
                '--stages=export wrote, or one that holds such folders'
            )
        self._before = {found.name: found.stamp for found in find(folder)}

    def scan(self) -> bool:
        """Looks for a newer export, and serves it if it is whole; returns whether it was changed.

        A folder is read once two scans in a row have found the same files in it: before, it may
        still be being copied.
        """
        present = find(self.folder)
        before, self._before = self._before, {found.name: found.stamp for found in present}
        if self.current.name in before and self.current.name not in self._before:
            return False  # it may be being replaced at this moment
        for found in present:
            is_current = found.name == self.current.name
            if is_current and found.stamp == self._stamp:
                return False
            if before.get(found.name) == found.stamp and self._is_new(found):
                try:
                    version = self._load(found, self.current if is_current else None)
                except UserError as error:
                    self._refuse(found, error)
                else:
                    changed = version is not self.current
                    self.current = version
                    return changed
            if is_current:
                return False  # what is in memory is whole, whatever is in the folder now
        return False

    def watch(self, seconds: float, stopped: threading.Event) -> None:
        """Scans every so many seconds until `stopped` is set."""
        while not stopped.wait(seconds):
            try:
                self.scan()
            except Exception:  # such as an exhausted memory: the current version goes on
                self._say('error: looking for a newer export failed')
                traceback.print_exc()

    def _is_new(self, found: Found) -> bool:
        return (found.name, found.stamp) not in self._failed

    def _refuse(self, found: Found, error: UserError) -> None:
        """Says once for each version what is wrong with it."""
        self.refused += 1
        self._failed.add((found.name, found.stamp))
        line = f'warning: {found.name} is not served: {error}'
        if line not in self._said:
            self._said.add(line)
            self._say(line)

    def _load(self, found: Found, same: Version | None = None) -> Version:
        """A version whose programs are compiled.

        Args:
          found: the folder.
          same: the version that is returned if the folder has the same content.

        Raises:
          UserError: if a file is missing or was changed, also while it was being read, or if a
            number of its model is not finite.
        """
        digest = read_digest(found.path)
        if same and same.digest == digest:
            export.verify(found.path)
            self._stamp = found.stamp
            return same
        if self.loaded:
            self._say(f'loading {found.name} ({digest})')
        recommender = export.load(found.path)
        # All files are those of one export, even if the folder was replaced during the reading.
        export.verify(found.path)
        if read_digest(found.path) != digest:
            raise UserError(f'{found.path} was replaced while it was being read')
        if count_mappings() > MAX_MAPPINGS:
            self._say('clearing compiled programs of former versions; some are compiled again')
            jax.clear_caches()
        began = time.monotonic()
        recommender.warm_up(self._max_k, explain=self._has_demo)
        check_numbers(recommender, found.path)
        demo = Demo(recommender) if self._has_demo else None
        all_V, _ = recommender.candidate_mask()
        self.loaded += 1
        self._stamp = found.stamp
        self._say(
            f'serving {found.name} ({digest}): {recommender.card.get("model", "a model")}, '
            f'{recommender.num_items:,} items; compiled in {time.monotonic() - began:.0f} s'
        )
        return Version(found.name, digest, recommender, demo, all_V)


def find(folder: Path) -> list[Found]:
    """The exports of a folder, whole or not, the newest first; hidden folders are skipped.

    Raises:
      UserError: if the folder cannot be read.
    """
    if (folder / export.SUMS).is_file():
        candidates: Iterable[Path] = [folder]
    else:
        try:
            candidates = [path for path in folder.iterdir() if not path.name.startswith('.')]
        except FileNotFoundError:
            candidates = []  # an export that is being replaced, or a wrong name
        except OSError as error:
            raise UserError(f'reading {folder}: {error.strerror}') from error
    found = []
    for path in candidates:
        try:
            if not path.is_dir():
                continue
            written = (path / export.SUMS).stat().st_mtime_ns
            with os.scandir(path) as entries:
                stamp = tuple(sorted(_stamp(entry) for entry in entries))
        except OSError:
            continue  # without checksums it is not an export yet, or it was just replaced
        found.append(Found(path, path.resolve().name, written, stamp))
    return sorted(found, key=lambda one: (one.written, one.name), reverse=True)


def read_digest(folder: Path) -> str:
    """The first 8 digits of the SHA-256 of SHA256SUMS, which stands for the whole export.

    Raises:
      UserError: if it cannot be read.
    """
    try:
        content = (folder / export.SUMS).read_bytes()
    except OSError as error:
        raise UserError(f'reading {folder / export.SUMS}: {error.strerror}') from error
    return hashlib.sha256(content).hexdigest()[:8]


def check_numbers(recommender: Recommender, path: Path) -> None:
    """Checks the item vectors, and queries and scores of a few histories of one item.

    Raises:
      UserError: if a number is not finite. Its item would never be recommended, or always.
    """
    items = np.unique(np.linspace(1, recommender.num_items, 16).astype(int))
    histories = [[recommender.item_ids[item]] for item in items]
    is_finite = bool(jnp.isfinite(recommender.model.item_VD).all())
    try:
        for history in histories:
            is_finite &= bool(np.isfinite(recommender.query(history)).all())
            answer = recommender.recommend(history, 1, filter_seen=False)
            is_finite &= all(map(math.isfinite, answer.scores))
    except FloatingPointError:
        is_finite = False
    if not is_finite:
        raise UserError(f'{path}: numbers of its model are not finite; train and export again')


def count_mappings() -> int:
    """Memory mappings of this process; 0 where the system does not say."""
    try:
        return Path('/proc/self/maps').read_bytes().count(b'\n')
    except OSError:
        return 0


def _stamp(entry: os.DirEntry) -> tuple[str, int, int, int]:
    about = entry.stat()
    return entry.name, about.st_ino, about.st_size, about.st_mtime_ns
