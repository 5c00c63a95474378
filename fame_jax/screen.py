"""What a person sees while a run goes on, and at its end."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from tqdm import tqdm


class Screen:
    """A progress bar on a terminal, one line an epoch elsewhere; everything goes to stderr."""

    def __init__(self, mode: str, file: TextIO | None = None):
        """mode: 'bar', 'lines', 'none', or 'auto': a bar if the file is a terminal."""
        self.file = file or sys.stderr
        terminal = self.file.isatty()
        self.mode = {'auto': 'bar' if terminal else 'lines'}.get(mode, mode)
        self._bar: tqdm | None = None

    def say(self, line: str) -> None:
        """One line, above the bar if there is one."""
        if self.mode != 'none':
            tqdm.write(line, file=self.file)

    def begin(self, stage: str, epoch: int, epochs: int, steps: int, done: int) -> None:
        """An epoch begins; epochs count from 0."""
        if self.mode == 'bar':
            self._bar = tqdm(
                total=steps,
                initial=done,
                desc=f'{stage} {epoch + 1}/{epochs}',
                file=self.file,
                unit='step',
                leave=False,
                mininterval=0.2,
                bar_format='{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} '
                '[{elapsed}<{remaining}{postfix}]',
            )

    def step(self, **values: Any) -> None:
        """A step is done; the values stand behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update()

    def end(self, line: str) -> None:
        """An epoch is done; its line stays."""
        self.close()
        self.say(line)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def duration(seconds: float) -> str:
    """Seconds as 4.2 s, 3 min 05 s or 2 h 07 min."""
    if round(seconds, 1) < 60:
        return f'{seconds:.1f} s'
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f'{minutes} min {rest:02d} s'
    return f'{minutes // 60} h {minutes % 60:02d} min'


def table(results: Mapping[str, Mapping[str, Mapping[str, float]]], columns: Sequence[str]) -> str:
    """The figures of results, name -> protocol -> column -> value, as lines for a terminal."""
    head = ['', *(column.upper() for column in columns)]
    lines = []
    for protocol in dict.fromkeys(p for of_model in results.values() for p in of_model):
        rows = [
            [name, *(f'{of_model[protocol][column]:.4f}' for column in columns)]
            for name, of_model in results.items()
        ]
        widths = [
            max(len(row[i]) for row in [[protocol], *rows, head][1:]) for i in range(len(head))
        ]
        widths[0] = max(widths[0], len(protocol))
        for i, row in enumerate([[protocol, *head[1:]], *rows]):
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
            lines.append('  '.join(cells).rstrip())
            if i == 0:
                lines.append('-' * len(lines[-1]))
        lines.append('')
    return '\n'.join(lines).rstrip()
