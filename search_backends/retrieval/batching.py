"""Joins requests into batches and computes them in threads, so that the event loop stays free."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from search_backends.retrieval.bm25 import Hits

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


class Full(RuntimeError):
    """The queue is full."""


class SearchFailed(RuntimeError):
    """The search raised something else than it may: a defect, or a disk that is gone."""


class Room:
    """Counts the items that are being processed or wait; all batchers of a service share it."""

    def __init__(self, limit: int):
        self.limit, self.taken = limit, 0

    def take(self, items: int) -> None:
        """Raises Full: There is no room."""
        if self.taken + items > self.limit:
            raise Full
        self.taken += items

    def free(self, items: int) -> None:
        self.taken -= items


@dataclass
class _Job(Generic[Item]):
    items: Sequence[Item]
    topk: int
    render: Callable[[list[Hits]], bytes]
    answer: asyncio.Future[bytes]


class Batcher(Generic[Item]):
    """Searches for many requests at once. A request never waits for others to arrive; those that
    come while all threads work are batched.

    Args:
        search: items and topk to hits of each item; runs in ``pool``. The best k must be the first k of the best k + 1.
        threads: batches at a time.
        max_batch: items of a batch, unless a single request has more.
        observe: called with the items of each batch.
    """

    def __init__(
        self,
        search: Callable[[Sequence[Item], int], list[Hits]],
        pool: ThreadPoolExecutor,
        threads: int,
        max_batch: int,
        observe: Callable[[int], Any],
    ):
        self._search, self._pool, self._threads, self._max_batch = search, pool, threads, max_batch
        self._observe = observe
        self._waiting: deque[_Job[Item]] = deque()
        self._running = 0
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio itself keeps none alive

    async def answer(self, items: Sequence[Item], topk: int, render: Callable[[list[Hits]], bytes]) -> bytes:
        """Returns what ``render`` makes of the items' hits; it runs in a thread too.

        Raises:
            SearchFailed
        """
        job = _Job(items, topk, render, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        if self._running < self._threads:
            self._running += 1
            task = asyncio.create_task(self._run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await job.answer

    async def _run(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft()]
            size = len(batch[0].items)
            while self._waiting and size + len(self._waiting[0].items) <= self._max_batch:
                batch.append(self._waiting.popleft())
                size += len(batch[-1].items)
            self._observe(size)
            try:
                answers = await asyncio.get_running_loop().run_in_executor(self._pool, self._work, batch)
            except Exception as error:
                logger.exception("a search failed")
                for job in batch:
                    if not job.answer.done():
                        job.answer.set_exception(SearchFailed(f"the search failed: {error!r}"))
            else:
                for job, answer in zip(batch, answers, strict=True):
                    if not job.answer.done():  # its client may have gone
                        job.answer.set_result(answer)
        # This must happen at once: a client may ask again before this task counts as done.
        self._running -= 1

    def _work(self, batch: Sequence[_Job[Item]]) -> list[bytes]:
        hits = iter(self._search([item for job in batch for item in job.items], max(job.topk for job in batch)))
        return [job.render([next(hits)[: job.topk] for _ in job.items]) for job in batch]
