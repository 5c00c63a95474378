"""The suite's table: every record of every section a row, in columns for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from fame_jax.screen import duration

Record = Mapping[str, Any]

HEAD = ('', 'time (P10-P90)', 'x', '/s', 'FLOP/s', 'B/s', 'MB', 'compile')
LEGEND = """\
time: median of one call; x: time for the same work, the first of its group being 1; /s: what the
section's row names, a second; FLOP/s and B/s: XLA's counts of operations and of bytes read and
written, loops counted as often as they turn (> where XLA does not know), over the time, and their
share of this device's own product of matrices, in the same dtype, and copy; MB: temporaries, or
what is held; compile: seconds, apart from the time."""


def table(sections: Mapping[str, Mapping[str, Any]], rates: Mapping[str, float]) -> str:
    """Markdown; what failed is told below.

    Args:
      sections: by name, 'unit' (of what is told a second) and 'records'.
      rates: of the device, as `roofline.rates` gives them.
    """
    rows, notes = [], {}
    for name, section in sections.items():
        rows.append([f'**{name}**', '', '', section['unit'], '', '', '', ''])
        for record in section['records']:
            if 'failed' in record:
                number = notes.setdefault(record['failed'], len(notes) + 1)
                rows.append([record['name'], f'not measured [{number}]', *[''] * 6])
            else:
                rows.append(cells(record, rates))
    told = [f'[{number}] {why}' for why, number in notes.items()]
    return '\n'.join([*_grid(HEAD, rows), '', LEGEND, *told])


def cells(record: Record, rates: Mapping[str, float]) -> list[str]:
    """One record's row."""
    seconds = record.get('seconds')
    told = share(record, rates)
    memory = record.get('temporaries_bytes')
    mark = '>' if record.get('loops_counted_once') else ''
    return [
        record['name'],
        _spread(seconds, record.get('calls', 1)) if seconds else '',
        _three(record['ratio']) if 'ratio' in record else '',
        prefixed(record['per_second']) if 'per_second' in record else '',
        mark + _rate(told, 'flops_per_second', 'of_products'),
        mark + _rate(told, 'bytes_per_second', 'of_copy'),
        '' if memory is None else f'{memory / 1e6:,.0f}',
        _three(record['compile_seconds']) if 'compile_seconds' in record else '',
    ]


def share(record: Record, rates: Mapping[str, float]) -> dict[str, float]:
    """Operations and bytes a second, and their shares of what the device can do.

    A record that has rates of its own, as the device's have, keeps them and gets no share.
    """
    if 'flops' not in record:
        return {k: v for k, v in record.items() if k in ('flops_per_second', 'bytes_per_second')}
    median = record['seconds']['median']
    flops, moved = record['flops'] / median, record['bytes'] / median
    return {
        'flops_per_second': flops,
        'of_products': flops / rates[record.get('dtype', 'float32')],
        'bytes_per_second': moved,
        'of_copy': moved / rates['copy'],
    }


def _rate(told: Mapping[str, float], rate: str, of: str) -> str:
    part = f' {100 * told[of]:.0f}%' if of in told else ''
    return prefixed(told[rate]) + part if rate in told else ''


def _spread(seconds: Mapping[str, float], calls: int) -> str:
    """Median and percentiles in one unit; a single call has no spread."""
    unit, scale = next(
        (unit, scale)
        for unit, scale in (('s', 1), ('ms', 1e3), ('us', 1e6))
        if seconds['median'] * scale >= 1 or unit == 'us'
    )
    median, low, high = (_three(seconds[p] * scale) for p in ('median', 'p10', 'p90'))
    return f'{median} ({low}-{high}) {unit}' if calls > 1 else f'{median} {unit}'


def prefixed(value: float) -> str:
    """Three digits and k, M, G, T or P."""
    for prefix in ('', 'k', 'M', 'G', 'T'):
        if abs(value) < 999.5:
            return _three(value) + prefix
        value /= 1000
    return _three(value) + 'P'


def _three(value: float) -> str:
    """Three digits, or the whole number where it has more."""
    digits = next((d for d, most in ((2, 9.995), (1, 99.95)) if abs(value) < most), 0)
    return f'{value:,.{digits}f}'


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns stand under one another; all but the first to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]

    def line(row: Sequence[str]) -> str:
        first, *rest = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        )
        return '| ' + ' | '.join([first, *rest]) + ' |'

    rule = ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]
    return [line(head), line(rule), *map(line, rows)]


def about(result: Mapping[str, Any]) -> str:
    """Whose figures they are, in two lines."""
    machine = result['machine']
    device = machine['device']
    held = machine['device_memory_bytes']
    memory = f'{held / 2**30:.0f} GiB of its own, ' if held else ''
    versions = ', '.join(f'{n} {machine["versions"][n]}' for n in ('python', 'jax', 'flax'))
    return (
        f'{device["count"]} x {device["kind"]} ({memory}{machine["cores"]} cores of '
        f'{machine["processor"]}, {machine["memory_bytes"] / 2**30:.0f} GiB), {versions}, '
        f'fame_jax {machine["code"]}, {machine["date"]}, load {machine["load"]:.1f} at the start, '
        f'{duration(result["seconds"])}\n{result["dataset"]}'
    )
