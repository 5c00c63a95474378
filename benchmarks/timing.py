"""Times alternatives in alternating turns, and describes the machine that they ran on.

The other programs of this folder use it. Other load on the machine slows alternating turns alike,
so the ratio of two alternatives is steadier than either of their times.
"""

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fame_jax import machine

Record = dict[str, Any]


class Case(NamedTuple):
    """Work that can be timed.

    Fields:
      call: starts the work, and returns arrays to wait for.
      items: the amount of work in one call.
      unit: of that amount.
      parts: equal parts of a call; the time of one is reported, such as a step of a dispatch.
      temporaries: bytes, as XLA reports them.
    """

    call: Callable[[], Any]
    items: float
    unit: str
    parts: int = 1
    temporaries: int | None = None


class Row(NamedTuple):
    """A row of the table.

    Fields:
      name: of the row.
      against: the name of the row that it is compared with.
      make: compiles the work.
    """

    name: str
    against: str
    make: Callable[[], Case]


def measure(rows: Sequence[Row], turns: int, seconds: float) -> list[Record]:
    """Times rows in alternating turns.

    Args:
      rows: the alternatives, among them all that `against` names.
      turns: of each row.
      seconds: about how long a turn lasts; it has at least one call.

    Returns:
      A record for each row, in order: seconds (median, min, max), n, per_second, unit, ratio, and
      first_seconds (compilation and the first call). A row that failed has `failed` instead.
    """
    by_name: dict[str, Record] = {r.name: {'name': r.name, 'against': r.against} for r in rows}
    cases: dict[str, tuple[Case, int]] = {}
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    for row in rows:
        with errors_recorded(by_name[row.name]):
            began = time.perf_counter()
            case = row.make()
            time_calls(case.call, 1)
            by_name[row.name]['first_seconds'] = time.perf_counter() - began
            once = time_calls(case.call, 1)
            cases[row.name] = case, max(1, int(seconds / once))
    for _ in range(turns):
        for name, (case, calls) in cases.items():
            if 'failed' not in by_name[name]:
                with errors_recorded(by_name[name]):
                    times[name].append(time_calls(case.call, calls) / case.parts)
    for name, (case, _) in cases.items():
        if 'failed' not in by_name[name]:
            by_name[name] |= spread(times[name]) | {'unit': case.unit}
            median = by_name[name]['seconds']['median']
            by_name[name]['per_second'] = case.items / case.parts / median
            if case.temporaries is not None:
                by_name[name]['temporaries_bytes'] = case.temporaries
    return add_ratios(list(by_name.values()))


@contextlib.contextmanager
def errors_recorded(record: Record) -> Iterator[None]:
    """Writes an error of any type (out of memory, not supported) into the record and goes on."""
    try:
        yield
    except Exception as error:
        record['failed'] = f'{type(error).__name__}: {str(error).strip()}'.split('\n')[0][:200]


def time_calls(call: Callable[[], Any], count: int) -> float:
    """Seconds per call, over several calls.

    On an accelerator a call may start before the last one has ended, as in the training loop. A CPU
    would run two independent calls at once, so each is waited for.
    """
    wait_for_each = jax.default_backend() == 'cpu'
    began = time.perf_counter()
    for _ in range(count):
        out = call()
        if wait_for_each:
            jax.block_until_ready(out)
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / count


def spread(times: Sequence[float]) -> Record:
    """Median, minimum and maximum in seconds, and their number n."""
    seconds = {'median': float(np.median(times)), 'min': min(times), 'max': max(times)}
    return {'seconds': seconds, 'n': len(times)}


def add_ratios(rows: list[Record]) -> list[Record]:
    """Adds to each record its time for an amount of work over that of the row in `against`."""
    by_name = {record['name']: record for record in rows}
    for record in rows:
        other = by_name.get(record['against'], {})
        if 'per_second' in record and 'per_second' in other:
            record['ratio'] = other['per_second'] / record['per_second']
    return rows


def table(sections: Mapping[str, Sequence[Record]]) -> list[str]:
    """The lines of a Markdown table of the records of several sections."""
    lines = [
        '| | median (min - max) | n | against | ratio | a second | first call s | temporaries MB |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for section, rows in sections.items():
        lines.append(f'| **{section}** | | | | | | | |')
        lines += ['| ' + ' | '.join(_cells(record)) + ' |' for record in rows]
    return lines


def _cells(record: Record) -> list[str]:
    if 'failed' in record:
        return [record['name'], f'failed: {record["failed"]}', *[''] * 6]
    scale, unit = next(
        (scale, unit)
        for scale, unit in ((1, 's'), (1e3, 'ms'), (1e6, 'us'))
        if record['seconds']['median'] * scale >= 1 or unit == 'us'
    )
    median, low, high = (f'{record["seconds"][k] * scale:.3g}' for k in ('median', 'min', 'max'))
    temporaries = record.get('temporaries_bytes')
    return [
        record['name'],
        f'{median} ({low} - {high}) {unit}',
        str(record['n']),
        record['against'],
        f'{record["ratio"]:.2f}' if 'ratio' in record else '',
        f'{record["per_second"]:,.{0 if record["per_second"] >= 100 else 3}f} {record["unit"]}',
        f'{record["first_seconds"]:.1f}' if 'first_seconds' in record else '',
        '' if temporaries is None else f'{temporaries / 1e6:,.1f}',
    ]


def describe_machine() -> Record:
    """Versions, device, cores, date, processor, memory in bytes and load average."""
    name = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        name = next((x.split(':')[1].strip() for x in lines if x.startswith('model name')), name)
    return machine.describe() | {
        'processor': name,
        'memory_bytes': os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'),
        'load': round(os.getloadavg()[0], 2),
    }


def headline(about: Mapping[str, Any]) -> str:
    """The machine, the versions and the date in one line."""
    device, versions = about['device'], about['versions']
    return (
        f'{device["count"]} x {device["kind"]}, {about["cores"]} cores of {about["processor"]}, '
        f'Python {versions["python"]}, jax {versions["jax"]}, fame_jax {about["code"]}, '
        f'{about["date"]}, load {about["load"]} at the start'
    )


def peak_bytes() -> dict[str, int]:
    """The peak memory of this process in bytes, and of its device where it reports one."""
    device = (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')
    return {'process': machine.peak_memory()} | ({} if device is None else {'device': device})
