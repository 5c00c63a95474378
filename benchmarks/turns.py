"""Contenders that take turns, so that a noisy neighbour hits all alike; what is kept of each."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from benchmarks import roofline


class Effort(NamedTuple):
    """How much is measured."""

    rounds: int
    seconds: float  # of a turn
    quick: bool = False  # fewer variants


class Contender(Protocol):
    """What can be timed."""

    def take_turn(self, seconds: float) -> None:
        """Runs for so long, and once at the least."""

    def record(self) -> dict[str, Any]:
        """The figures of all its turns, as `spread` and `work` tell them."""


class Program:
    """A function compiled for its data, called again and again."""

    def __init__(self, function: Callable[..., Any], data: tuple, **about: Any):
        """about: goes into the record."""
        began = time.perf_counter()
        self.compiled = jax.jit(function).lower(*data).compile()
        self.about = {**about, 'compile_seconds': time.perf_counter() - began}
        self.data = data
        self.times = []
        jax.block_until_ready(self.compiled(*data))

    def take_turn(self, seconds: float) -> None:
        # On an accelerator the next call is started before the last one ends, as a program does
        # that has something to do. A CPU would run the two at once.
        ahead = jax.default_backend() != 'cpu'
        self.times += time_calls(lambda: self.compiled(*self.data), seconds, ahead)

    def record(self) -> dict[str, Any]:
        return per_second(spread(self.times) | work(self.compiled) | self.about)


class Calls:
    """A call that waits for itself."""

    def __init__(self, call: Callable[[], Any], warm: int = 1, **about: Any):
        """warm: calls that are not timed; about: goes into the record."""
        self.call, self.about, self.times = call, about, []
        for _ in range(warm):
            call()

    def take_turn(self, seconds: float) -> None:
        self.times += time_calls(self.call, seconds, ahead=False)

    def record(self) -> dict[str, Any]:
        return per_second(spread(self.times) | self.about)


def time_calls(call: Callable[[], Any], seconds: float, ahead: bool) -> list[float]:
    """Seconds from one call's end to the next one's, for so long and at least once.

    Args:
      call: gives arrays to wait for.
      seconds: no call begins later.
      ahead: a call begins before the last one has ended, as the training loop has it.
    """
    times, began = [], time.perf_counter()
    last, pending = began, [call()]
    while pending:
        if ahead and last - began < seconds:
            pending.append(call())
        jax.block_until_ready(pending.pop(0))
        now = time.perf_counter()
        times.append(now - last)
        last = now
        if not pending and last - began < seconds:
            pending.append(call())
    return times


def contest(
    makers: Mapping[str, Callable[[], Contender]],
    effort: Effort,
    deadline: float = float('inf'),
) -> list[dict[str, Any]]:
    """A record of each contender, in order; what fails is told in its record and ends nothing.

    Args:
      makers: by name; each compiles what it times.
      effort: rounds and length of the turns.
      deadline: of time.monotonic(); past it no contender is made and no round begun.
    """
    contenders, failed = {}, {}
    for name, make in makers.items():
        if time.monotonic() > deadline:
            failed[name] = 'left out: the time was up'
        else:
            _try(name, failed, lambda name=name, make=make: contenders.update({name: make()}))
    for turn in range(effort.rounds):
        if turn and time.monotonic() > deadline:
            break
        for name in list(contenders):
            if not _try(name, failed, lambda n=name: contenders[n].take_turn(effort.seconds)):
                del contenders[name]
    records = {}
    for name, contender in contenders.items():
        _try(name, failed, lambda n=name, c=contender: records.update({n: c.record()}))
    found = [{'name': n, **records.get(n, {'failed': failed.get(n)})} for n in makers]
    return compare(found)


def _try(name: str, failed: dict[str, str], do: Callable[[], Any]) -> bool:
    """Whether it went well; a failure is kept in a line."""
    try:
        do()
    except Exception as error:  # of any kind: out of memory, not supported, not compiled
        failed[name] = _line(error)
    return name not in failed


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ['']
    return f'{type(error).__name__}: {lines[0]}'[:200]


def compare(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds the time that each takes for the same work, in that of the first that did not fail."""
    done = [record for record in records if 'seconds' in record]
    for record in done:
        if 'per_second' in record and 'per_second' in done[0]:
            record['ratio'] = done[0]['per_second'] / record['per_second']
        else:
            record['ratio'] = record['seconds']['median'] / done[0]['seconds']['median']
    return records


def spread(times: list[float]) -> dict[str, Any]:
    """Median and 10th and 90th percentile of seconds, and how many there were."""
    p10, median, p90 = np.percentile(times, [10, 50, 90]).tolist()
    return {'seconds': {'median': median, 'p10': p10, 'p90': p90}, 'calls': len(times)}


def per_second(record: dict[str, Any]) -> dict[str, Any]:
    """Adds how many of its 'items', where it has any, it does in a second."""
    if 'items' in record:
        record['per_second'] = record['items'] / record['seconds']['median']
    return record


def work(compiled: Any) -> dict[str, Any]:
    """What XLA tells of a program: operations, bytes, loops, temporaries."""
    memory = compiled.memory_analysis()
    found = {'temporaries_bytes': memory.temp_size_in_bytes if memory else None}
    try:
        counts = roofline.count(compiled)
    except Exception as error:  # XLA's text is no interface: a figure of time goes without counts
        return found | {'not_counted': _line(error)}
    return found | {
        'flops': counts.flops,
        'bytes': counts.bytes,
        'loops_counted_once': counts.once,
    }


class CompileClock:
    """Seconds that XLA spends on compiling from now on."""

    EVENT = '/jax/core/compile/backend_compile_duration'

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self) -> 'CompileClock':
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *_: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event: str, seconds: float, **_: Any) -> None:
        self.seconds += seconds if event == self.EVENT else 0
