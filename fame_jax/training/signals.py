"""SIGTERM and SIGINT during training: save first, then stop."""

import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax

from fame_jax.parallel import processes


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], int]]:
    """Catches SIGTERM and SIGINT inside the block; a second signal ends the process.

    Of several processes all see a signal at the same call, whichever of them received it.

    Yields:
      A function that returns the number of the signal that has come, or 0.
    """
    several = jax.process_count() > 1
    received: list[int] = []
    calls = itertools.count()

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    def pass_on(number: int, frame: Any) -> None:
        # JAX catches SIGTERM and passes it on to the other processes.
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)

    def signal_here() -> int:
        return received[0] if received else 0

    def signal_anywhere() -> int:
        return signal.SIGTERM if processes.is_preempted(next(calls)) else 0

    numbers = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    before = {}
    with contextlib.suppress(ValueError):  # outside the main thread Python allows no handlers
        before = {n: signal.signal(n, pass_on if several else receive) for n in numbers}
    try:
        yield signal_anywhere if several else signal_here
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
