"""Requests that wait become one batch; no request waits for others that have not come yet.

A thread takes what waits as soon as the device is free, up to 8 histories, or 64 where nearly so
many wait; a single request is answered at once. Requests with different lists, filters and allowed
items share a batch; those of two versions of the model do not.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence

from fame_jax.serving.recommender import HistoryRequest, Recommendation, Recommender
from fame_jax.serving.service.errors import Refused


class Job:
    """Histories of one request.

    Fields:
      recommender: the version that answers all of them.
      histories: the histories, with their options.
      answers: of the histories so far, in their order.
      taken: histories that were given to the device.
      future: of the event loop; `answers` once all are there.
    """

    def __init__(
        self,
        recommender: Recommender,
        histories: Sequence[HistoryRequest],
        future: asyncio.Future[list[Recommendation]],
    ):
        self.recommender, self.histories, self.future = recommender, histories, future
        self.answers: list[Recommendation] = []
        self.taken = 0


Part = tuple[Job, Sequence[HistoryRequest]]


class Batcher:
    """A queue in front of the device. `answer` is called in the event loop."""

    def __init__(self, max_waiting: int, count_batch: Callable[[int], None]):
        """Starts the thread.

        Args:
          max_waiting: histories that may wait.
          count_batch: is called with the number of histories of each batch, in the event loop.
        """
        self.waiting = 0
        self._max_waiting, self._count_batch = max_waiting, count_batch
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name='batches', daemon=True)
        self._thread.start()

    async def answer(
        self, recommender: Recommender, histories: Sequence[HistoryRequest]
    ) -> list[Recommendation]:
        """The recommendations to all histories, by one version of the model.

        Raises:
          Refused: 503 if too many histories wait.
          FloatingPointError: if a score of these histories is NaN.
        """
        job = Job(recommender, histories, asyncio.get_running_loop().create_future())
        with self._changed:
            # A request larger than the whole queue is taken when nothing else waits.
            if self.waiting and self.waiting + len(histories) > self._max_waiting:
                line = f'{self.waiting:,} histories wait already; send the request again later'
                raise Refused(503, 'queue_full', line)
            self.waiting += len(histories)
            self._jobs.append(job)
            self._changed.notify()
        return await job.future

    def close(self, seconds: float | None = None) -> bool:
        """Ends the thread after the batch that it computes.

        Returns:
          Whether it has ended within so many seconds.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._jobs or self._is_closed):
                    self._changed.wait()
                if self._is_closed:
                    return
                parts = self._take()
            if parts:
                self._compute(parts)

    def _take(self) -> list[Part]:
        """The histories of the next batch, all of one version, from the oldest jobs on.

        Every job gets an equal share, so that one of many histories does not delay others.
        """
        # Nothing is computed for clients that are gone or whose time is over.
        self._jobs = deque(job for job in self._jobs if not job.future.done())
        self.waiting = sum(len(job.histories) - job.taken for job in self._jobs)
        if not self._jobs:
            return []
        recommender = self._jobs[0].recommender
        same = [job for job in self._jobs if job.recommender is recommender]
        places = batch_rows(recommender, sum(len(job.histories) - job.taken for job in same))
        starts = {job: job.taken for job in same}
        equal = max(1, places // len(same))
        for share in (equal, places):  # and then what is left, to the oldest
            for job in same:
                count = min(share, places, len(job.histories) - job.taken)
                job.taken += count
                places -= count
        parts = [
            (job, job.histories[start : job.taken])
            for job, start in starts.items()
            if job.taken > start
        ]
        self.waiting -= sum(len(histories) for _, histories in parts)
        # Jobs that had their share go behind the others.
        taken = [job for job, _ in parts]
        others = [job for job in self._jobs if job not in set(taken)]
        self._jobs = deque(others + [job for job in taken if job.taken < len(job.histories)])
        return parts

    def _compute(self, parts: list[Part]) -> None:
        """Computes a batch, and hands each job its answers in the event loop."""
        recommender = parts[0][0].recommender
        together = [history for _, histories in parts for history in histories]
        outcomes: list[list[Recommendation] | Exception] = []
        try:
            answers = iter(recommender.recommend_each(together))
            outcomes = [[next(answers) for _ in histories] for _, histories in parts]
        except Exception as error:
            if len(parts) == 1:
                outcomes = [error]
            else:  # the fault of one request is not the others'
                outcomes = [_alone(recommender, histories) for _, histories in parts]
        loop = parts[0][0].future.get_loop()
        with contextlib.suppress(RuntimeError):  # the loop was closed: no client is left
            loop.call_soon_threadsafe(self._deliver, parts, outcomes, len(together))

    def _deliver(
        self, parts: list[Part], outcomes: list[list[Recommendation] | Exception], rows: int
    ) -> None:
        self._count_batch(rows)
        for (job, _), outcome in zip(parts, outcomes):
            if job.future.done():
                continue
            if isinstance(outcome, Exception):
                job.future.set_exception(outcome)
                continue
            job.answers += outcome
            if len(job.answers) == len(job.histories):
                job.future.set_result(job.answers)


def batch_rows(recommender: Recommender, waiting: int) -> int:
    """Histories of the next batch where so many wait."""
    return min(waiting, recommender.rows_for(waiting))


def _alone(
    recommender: Recommender, histories: Sequence[HistoryRequest]
) -> list[Recommendation] | Exception:
    try:
        return recommender.recommend_each(histories)
    except Exception as error:
        return error
