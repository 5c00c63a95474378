"""The queue in front of the device, without a server."""

import asyncio
import threading

import pytest
from service_fixtures import IDS, make_exact

from fame_jax.serving.recommender import HistoryRequest
from fame_jax.serving.service.batching import Batcher, batch_rows
from fame_jax.serving.service.errors import Refused


def request_of(recommender, history, k=5):
    return HistoryRequest(
        *recommender.to_indices(history), k, True, recommender.candidate_mask()[0]
    )


def make_waiting(recommender, batches, release, entered):
    """The recommender, which waits for `release` and notes the histories of each batch."""
    plain = recommender.recommend_each

    def recommend_each(requests):
        entered.set()
        assert release.wait(20)
        batches.append([request.k for request in requests])
        return plain(requests)

    recommender.recommend_each = recommend_each
    return recommender


def test_batches_are_as_large_as_pays_off():
    recommender = make_exact()
    assert recommender.batch_size == 64
    sizes = {n: batch_rows(recommender, n) for n in (1, 2, 8, 9, 51, 52, 64, 500)}
    assert sizes == {1: 1, 2: 2, 8: 8, 9: 8, 51: 8, 52: 52, 64: 64, 500: 64}


def test_two_versions_answer_their_own_requests():
    """A request that waits while the version changes is answered by the version it came under."""
    batches, counted, release, entered = [], [], threading.Event(), threading.Event()
    versions = [make_waiting(make_exact(seed), batches, release, entered) for seed in range(2)]
    batcher = Batcher(100, counted.append)

    async def ask():
        tasks = []
        for n in range(12):
            recommender = versions[n % 2]
            request = request_of(recommender, [IDS[1 + n]])
            tasks.append(asyncio.create_task(batcher.answer(recommender, [request] * (1 + n % 3))))
            await asyncio.sleep(0.01)
        release.set()
        return await asyncio.gather(*tasks)

    answers = asyncio.run(ask())
    batcher.close()
    for n, found in enumerate(answers):
        assert found == [make_exact(n % 2).recommend([IDS[1 + n]], 5)] * (1 + n % 3)
    assert sum(counted) == sum(map(len, batches)) == 24 and len(batches) < 12


def test_a_full_queue_refuses_and_a_large_request_alone_is_taken():
    batches, release, entered = [], threading.Event(), threading.Event()
    recommender = make_waiting(make_exact(), batches, release, entered)
    batcher = Batcher(10, lambda rows: None)
    request = request_of(recommender, ['i1'])

    async def ask():
        first = asyncio.create_task(batcher.answer(recommender, [request]))
        assert await asyncio.to_thread(entered.wait, 20)  # the first one is with the device
        large = asyncio.create_task(batcher.answer(recommender, [request] * 30))
        await asyncio.sleep(0)
        assert batcher.waiting == 30
        with pytest.raises(Refused) as refused:
            await batcher.answer(recommender, [request])
        gone = asyncio.create_task(batcher.answer(recommender, []))
        large.cancel()
        await asyncio.sleep(0)
        release.set()
        gone.cancel()
        return refused.value, await first

    refused, first = asyncio.run(ask())
    batcher.close()
    assert (refused.status, refused.code) == (503, 'queue_full')
    assert len(first) == 1 and batches == [[5]]  # nothing for the request that was cancelled
