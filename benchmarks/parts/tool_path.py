"""The agent loop that records, against the stock one; a call that the cache knows, against one that it does not."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
from agent_loops import call, run_scripted, schema
from conftest import TOOL_TOKENS, _byte_level
from measuring import Part, Sweep, sweep
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.tools.function_tool import FunctionTool
from workload import build_index

from search_backends.cache import Cache
from search_backends.providers.cached import CachedText
from search_backends.providers.service import ServiceText
from search_backends.retrieval.load_test import running, sample_queries
from verl_tapo.rollout.tool_agent import TapoToolAgentLoop


def search(query: str) -> str:
    return f"what there is to know of {query}"


def loops(repeats: int, sizes: list[int]) -> Sweep:
    tokenizer = _byte_level(TOOL_TOKENS)
    tools = [FunctionTool("search", search, schema("search", query="string"))]

    def make(calls: int) -> dict[str, Callable[[], Any]]:
        turns = [f"Let me look. {call('search', query=f'the river of place {number}')}" for number in range(calls)]

        def run(loop: type) -> None:
            limits = {"response_length": 100_000, "prompt_length": 100_000}
            output, _ = run_scripted(loop, tokenizer, tools, [*turns, "It is so."], **limits)
            assert output.num_turns == 2 * calls + 2

        return {
            "tapo_tool_agent": lambda: run(TapoToolAgentLoop),
            "veRL's tool_agent": lambda: run(ToolAgentLoop),
        }

    fixed = "a whole trajectory: a scripted model, a tool in the process that answers at once"
    return sweep("calls of a trajectory", fixed, sizes, make, repeats)


def calls(repeats: int, sizes: list[int], passages: int) -> Sweep:
    costs: dict[str, list[float]] = {"known to the cache": [], "without a cache": [], "new to the cache": []}

    async def compare(url: str, queries: list[str], folder: Path, size: int) -> None:
        service = ServiceText({"url": url})
        cache = Cache(folder / f"{size}.sqlite")
        cached = CachedText(service, cache)
        numbers = itertools.count()

        async def ask(search: Callable[[str, int], Awaitable[Any]], new: bool) -> float:
            # Different queries, so that equal ones at the same time do not share an answer.
            asked = [f"{query} {next(numbers)}" if new else query for query in queries[: max(size, 32)]]
            limit = asyncio.Semaphore(size)

            async def one(query: str) -> None:
                async with limit:
                    await search(query, 3)

            start = time.perf_counter()
            await asyncio.gather(*(one(query) for query in asked))
            return 1000 * (time.perf_counter() - start) / len(asked)

        ways: list[tuple[Callable[[str, int], Awaitable[Any]], bool]] = [
            (cached.search, False),
            (service.search, True),
            (cached.search, True),
        ]
        taken = [[await ask(*way) for way in ways] for _ in range(repeats + 1)][1:]
        for name, column in zip(costs, zip(*taken, strict=True), strict=True):
            costs[name].append(float(np.median(column)))
        await cached.close()
        await cache.close()

    with tempfile.TemporaryDirectory() as folder:
        index = build_index(Path(folder), passages)
        queries = list(dict.fromkeys(sample_queries(index)))
        with running(index) as (url, _):
            for size in sizes:
                asyncio.run(compare(url, queries, Path(folder), size))
    fixed = f"milliseconds a call; the retrieval service on the same machine, {passages:,} passages"
    return Sweep("calls at a time", fixed, "ms", sizes, costs)


def measure(quick: bool) -> Part:
    repeats = 2 if quick else 7
    text = (
        "A trajectory through `tapo_tool_agent`, which records every call, against veRL's own `tool_agent` with the "
        "same tool; then the text search of `search_backends` over HTTP, with and without its cache on the disk."
    )
    return Part(
        "Tool path",
        text,
        [
            loops(repeats, [1, 4] if quick else [1, 4, 16, 64]),
            calls(repeats, [1, 16] if quick else [1, 4, 16, 64], 1000 if quick else 100_000),
        ],
    )
