"""Epochs laid out ahead of the training loop."""

import concurrent.futures
from collections.abc import Callable

from fame_jax.batch import Batch
from fame_jax.training.loop import Epoch


class Prefetch:
    """Epoch number -> Epoch; while one epoch trains, a thread lays out the next one.

    `peek` looks at an epoch's first batch before the loop takes the epoch; it is laid out once.
    """

    def __init__(self, make_epoch: Callable[[int], Epoch]):
        """Lays out nothing yet; `make_epoch` is called in a thread."""
        self._make_epoch = make_epoch
        self._thread = concurrent.futures.ThreadPoolExecutor(1, 'epoch layout')
        self._waiting: dict[int, concurrent.futures.Future[Epoch]] = {}

    def __call__(self, epoch: int) -> Epoch:
        """The epoch; the next one is begun."""
        data = self._future(epoch).result()
        self._waiting = {epoch + 1: self._future(epoch + 1)}
        return data

    def peek(self, epoch: int) -> tuple[Batch, int]:
        """The epoch's first batch and its number of steps; the loop still gets the whole epoch."""
        data = self._future(epoch).result()
        beginning = data.batches.get_state()
        first = next(data.batches)
        data.batches.set_state(beginning)
        return first, data.num_steps

    def _future(self, epoch: int) -> concurrent.futures.Future[Epoch]:
        if epoch not in self._waiting:
            self._waiting[epoch] = self._thread.submit(self._make_epoch, epoch)
        return self._waiting[epoch]
