"""The terminal: a progress bar, lines, tables."""

import contextlib
import dataclasses
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from tqdm import tqdm

# A screen without a bar has a line at least so often, in seconds, while something goes on.
QUIET = 8.0


@dataclasses.dataclass(eq=False)
class Wait:
    """What goes on, and how much of it is done where that is counted."""

    doing: str
    total: int = 0
    done: int = 0
    has_bar: bool = False
    began: float = dataclasses.field(default_factory=time.monotonic)

    def __str__(self) -> str:
        """The name, with the count where there is one."""
        return f'{self.doing}: {self.done:,} of {self.total:,}' if self.total else self.doing


class Screen:
    """Prints progress to stderr: a bar with lines above it, or lines alone."""

    def __init__(self, mode: str, file: TextIO | None = None):
        """Prints nothing yet.

        Args:
          mode: 'bar', 'lines', 'none', or 'auto': a bar on a terminal or in a notebook, else lines.
          file: where it prints; None: stderr.
        """
        self.file = file or sys.stderr
        shows_bar = self.file.isatty() or 'ipykernel' in sys.modules
        self.mode = {'auto': 'bar' if shows_bar else 'lines'}.get(mode, mode)
        self._bar: tqdm | None = None  # of an epoch
        self._clock: tqdm | None = None  # the line of something that is not counted
        self._epoch: Wait | None = None
        self._waits: list[Wait] = []  # the innermost is last
        self._said = time.monotonic()
        self._lock = threading.RLock()

    def say(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self.mode != 'none':
            tqdm.write(line, file=self.file)
            self._said = time.monotonic()

    @contextlib.contextmanager
    def waiting(self, doing: str, total: int = 0, *, has_bar: bool = False) -> Iterator[Wait]:
        """Says what goes on inside the block, so that the screen is never silent for long.

        A terminal shows it at once, with the time that it has taken. Elsewhere a line appears after
        each QUIET seconds without another one.

        Args:
          doing: what goes on, such as 'prepare: reading log.csv'.
          total: what there is to count; 0: nothing.
          has_bar: whether a bar of its own shows it on a terminal.

        Yields:
          The record of it, whose `done` may be counted up.
        """
        wait = Wait(doing, total, has_bar=has_bar)
        with self._beats():
            self._change(self._waits.append, wait)
            try:
                yield wait
            finally:
                self._change(self._waits.remove, wait)

    @contextlib.contextmanager
    def _beats(self) -> Iterator[None]:
        """A thread that keeps the screen alive; the outermost block starts and ends it."""
        if self._waits or self.mode == 'none':
            yield
            return
        stop = threading.Event()
        thread = threading.Thread(target=self._beat, args=(stop,), name='screen', daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(min(0.5, QUIET / 8)):
            with self._lock:
                if self._clock is not None:
                    self._clock.refresh()
                elif self.mode == 'lines' and self._waits and self._quiet() >= QUIET:
                    wait = self._waits[-1]
                    self.say(f'{wait}, {duration(time.monotonic() - wait.began)} so far')

    def _quiet(self) -> float:
        return time.monotonic() - self._said

    def _change(self, change: Callable[[Wait], None], wait: Wait) -> None:
        """Changes the list of waits, and the line that shows the innermost."""
        with self._lock:
            change(wait)
            if self.mode != 'bar':
                return
            top = self._waits[-1] if self._waits else None
            if self._bar is not None and top is not None and top is not self._epoch:
                self._bar.set_postfix_str(top.doing)
            if self._clock is not None:
                self._clock.close()
                self._clock = None
            if self._bar is None and top is not None and not top.has_bar:
                self._clock = tqdm(
                    desc=str(top), file=self.file, leave=False, bar_format='{desc} [{elapsed}]'
                )

    def begin(self, stage: str, epoch: int, epochs: int, steps: int, done: int) -> None:
        """Begins the bar of an epoch.

        Args:
          stage: the bar's name.
          epoch: from 0.
          epochs: the greatest number of epochs.
          steps: of the epoch.
          done: steps of the epoch that are done already.
        """
        name = f'{stage} {epoch + 1}/{epochs}'
        self._epoch = Wait(f'{name}, steps', steps, done, has_bar=True)
        self._change(self._waits.append, self._epoch)
        if self.mode == 'bar':
            self._bar = tqdm(
                total=steps,
                initial=done,
                desc=name,
                file=self.file,
                unit='step',
                leave=False,
                mininterval=0.2,
                bar_format='{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} '
                '[{elapsed}<{remaining}{postfix}]',
            )

    def steps(self, count: int, **values: Any) -> None:
        """Moves the bar by `count` steps and shows the values after it."""
        if self._epoch is not None:
            self._epoch.done += count
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(count)

    def count(self, name: str, values: Iterable[Any], total: int) -> Iterator[Any]:
        """Yields the values, and counts them with a bar."""
        off = self.mode != 'bar'
        bar = {'desc': name, 'total': total, 'file': self.file, 'leave': False, 'disable': off}
        with self.waiting(name, total, has_bar=True) as wait:
            for value in tqdm(values, **bar):
                yield value
                wait.done += 1

    def end(self, line: str) -> None:
        """Removes the bar and prints a line in its place."""
        self.close()
        self.say(line)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._epoch is not None:
            epoch, self._epoch = self._epoch, None
            self._change(self._waits.remove, epoch)


def duration(seconds: float) -> str:
    """Seconds as 4.2 s, 3 min 05 s or 2 h 07 min."""
    if round(seconds, 1) < 60:
        return f'{seconds:.1f} s'
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f'{minutes} min {rest:02d} s'
    return f'{minutes // 60} h {minutes % 60:02d} min'


def size(count: int) -> str:
    """Bytes as 812 B, 4.2 kB, 3.1 MB or 1.2 GB."""
    for unit, least in (('GB', 10**9), ('MB', 10**6), ('kB', 10**3)):
        if count >= least:
            return f'{count / least:.1f} {unit}'
    return f'{count} B'


def table(results: Mapping[str, Mapping[str, Mapping[str, float]]], columns: Sequence[str]) -> str:
    """A text table of results, name -> protocol -> column -> value, a block for each protocol."""
    parts = []
    for protocol in dict.fromkeys(p for of_model in results.values() for p in of_model):
        rows = [
            [name, *(f'{of_model[protocol][column]:.4f}' for column in columns)]
            for name, of_model in results.items()
        ]
        head = [protocol, *(column.upper() for column in columns)]
        parts.append(grid(head, rows, right=range(1, len(head))))
    return '\n\n'.join(parts)


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Cells in columns below a head and a rule; columns in `right` are right-aligned."""
    right = set(right)
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = []
    for cells in (head, *rows):
        set_cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths))
        ]
        lines.append('  '.join(set_cells).rstrip())
    return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:]])


def short(value: float, sign: str = '') -> str:
    """Four digits without a leading 0, such as .0691; with `sign` '+', a sign before all values."""
    return re.sub(r'^([+-]?)0\.', r'\1.', f'{value:{sign}.4f}')


def one_line(name: str, max_length: int) -> str:
    """A one-line copy of a name: non-printables removed, blanks collapsed, cut with an ellipsis."""
    line = ' '.join(''.join(c if c.isprintable() else ' ' for c in str(name)).split())
    return line if len(line) <= max_length else line[: max_length - 1].rstrip() + '…'
