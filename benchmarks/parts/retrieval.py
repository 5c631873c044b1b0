"""The retrieval service over HTTP, against bm25s in the process."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bm25s
from measuring import Part, sweep
from workload import build_index

from search_backends.retrieval.bm25 import words
from search_backends.retrieval.load_test import drive, running, sample_queries


def measure(quick: bool) -> Part:
    repeats = 2 if quick else 5
    sizes = [500] if quick else [1000, 10_000, 100_000]
    requests = 64 if quick else 512

    def compared(url: str, index: Path, at_a_time: int) -> dict[str, Callable[[], Any]]:
        queries = sample_queries(index)[:requests]
        library = bm25s.BM25.load(index / "bm25", mmap=True)

        def in_process() -> None:
            for first in range(0, requests, at_a_time):
                found = [words(query) for query in queries[first : first + at_a_time]]
                library.retrieve(found, k=3, show_progress=False)

        return {
            "service, over HTTP": lambda: asyncio.run(drive(url, queries, at_a_time, requests)),
            "bm25s in the process": in_process,
        }

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        indexes = {size: build_index(folder / str(size), size) for size in sizes}
        urls = {size: stack.enter_context(running(index))[0] for size, index in indexes.items()}
        largest = sizes[-1]
        sweeps = [
            sweep(
                "requests at a time",
                f"milliseconds a query, {largest:,} passages of 100 words",
                [1, 16] if quick else [1, 4, 16, 64, 256],
                lambda size: compared(urls[largest], indexes[largest], size),
                repeats,
                lambda _: requests,
            ),
            sweep(
                "passages",
                "milliseconds a query, 16 at a time",
                sizes,
                lambda size: compared(urls[size], indexes[size], 16),
                repeats,
                lambda _: requests,
            ),
        ]
    text = (
        "The retrieval service, asked over HTTP from the same machine, against bm25s itself on the same index "
        "in the process that asks, in batches of as many queries."
    )
    return Part("Retrieval", text, sweeps)
