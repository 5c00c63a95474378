"""What a person sees while a run goes on, and at its end."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from tqdm import tqdm

from fame_jax.letters import plain


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

    def steps(self, count: int, **values: Any) -> None:
        """So many steps are done; the values stand behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(count)

    def count(self, name: str, values: Iterable[Any], total: int) -> Iterator[Any]:
        """Passes values on, with a bar for them on a terminal."""
        off = self.mode != 'bar'
        yield from tqdm(values, desc=name, total=total, file=self.file, leave=False, disable=off)

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
    """Cells in columns under a head and a rule; the columns in `right` are set to the right."""
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


def explanation(found: Mapping[str, Any]) -> str:
    """What `explain.explain` found, as lines for a terminal."""
    parts = [_recommended(found)]
    if found['unknown'] or found['too_old']:
        parts.append(
            f'Of the history {len(found["unknown"])} items are not in the catalogue, and '
            f'{found["too_old"]} lie before what the model sees.'
        )
    if found['target']:
        rank = found['target']['rank']
        place = f'rank {rank:,}' if rank else 'which may not be recommended'
        parts.append(f'Next came {title(found["target"], 60)}: {place}.')
    if 'heads' in found:
        parts += [_heads(found), _history(found)]
        parts.append(
            f'The gated heads add up to each score, to {found["identity"]:.1g} at the most.'
        )
    return '\n\n'.join(parts)


def title(entry: Mapping[str, Any], most: int = 34) -> str:
    """An item as a person knows it, by its title or else its id, in one line."""
    return plain(entry['title'] or entry['item'], most)


def _recommended(found: Mapping[str, Any]) -> str:
    """The list, and what each item owes to the history."""
    rows = []
    for place, entry in enumerate(found['recommended'], 1):
        rows.append([str(place), title(entry, 44), f'{entry["score"]:.2f}', ''])
        if entry.get('without'):
            least, item = min(zip(entry['without'], range(len(entry['without']))))
            rows[-1][3] = f'{title(found["history"][item])} ({least:+.2f})'
    if found['fallback']:
        return grid(['', 'most popular', 'actions'], [row[:3] for row in rows], right=(0, 2))
    head = ['', 'recommended', 'score', 'falls most without']
    return grid(head, rows, right=(0, 2))


def _heads(found: Mapping[str, Any]) -> str:
    """Each head's own list, beside the one of equal gates."""
    heads = [f'head {h}: gate {head["share"]:.0%}' for h, head in enumerate(found['heads'], 1)]
    lists = [*(head['top'] for head in found['heads']), found['equal_gates']]
    rows = [
        [str(place), *map(title, entries)]
        for place, entries in enumerate(zip(*lists), 1)  # all of one length: the same may be had
    ]
    return grid(['', *heads, 'equal gates'], rows, right=(0,))


def _history(found: Mapping[str, Any]) -> str:
    """What each item of the history was given: attention, and its router's weights in each head."""
    heads = range(1, 1 + len(found['heads']))
    rows = [
        [
            title(item),
            f'{found["carried"][j]:.0%}',
            *(
                ' '.join(f'{weight:.2f}' for weight in head['positions'][j])
                for head in found['heads']
            ),
        ]
        for j, item in enumerate(found['history'])
    ]
    return grid(['history', 'attended', *(f'experts of head {h}' for h in heads)], rows, right=(1,))
