"""What a hit of the shared cache costs in a file and in Redis, in turn, and who asks where many processes ask alike.

python benchmarks/shared_cache.py                                 # starts a redis-server of its own
python benchmarks/shared_cache.py --redis redis://HOST:6379/0     # yours; leaves its answers there
python benchmarks/shared_cache.py --two-hosts                     # in another network namespace, as on another host
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from uuid import uuid4

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests" / "support"):
    sys.path.insert(0, str(folder))

from search_backends.cache import Cache  # noqa: E402

ANSWER = "x" * 12_000


async def measure_hits(places: dict[str, str], count: int) -> None:
    """Prints the median and the 99th percentile of hits one after the other."""
    caches = {name: Cache(place) for name, place in places.items()}
    keys = [uuid4().hex for _ in range(100)]
    taken: dict[str, list[float]] = {name: [] for name in caches}

    async def compute() -> str:
        return ANSWER

    for cache in caches.values():
        for key in keys:
            await cache.get_or_compute(key, compute, label="benchmark")
    for number in range(count):
        for name, cache in caches.items():
            start = time.perf_counter()
            _, hit = await cache.get_or_compute(keys[number % len(keys)], compute, label="benchmark")
            taken[name].append(1000 * (time.perf_counter() - start))
            assert hit
    for name, cache in caches.items():
        median, late = np.quantile(taken[name], [0.5, 0.99])
        print(f"{name}: {count} hits of 12 KB, median {median:.2f} ms, 99th percentile {late:.2f} ms")
        await cache.close()
    # Each with the one just before it, so that what else the machine does counts for both.
    ratios = np.divide(taken["Redis"], taken["file"])
    print(f"a hit in Redis takes {np.median(ratios):.2f} times as long as in the file (median of {count} pairs)")


def ask(place: str, prefix: str, questions: int, asked: multiprocessing.Queue[tuple[int, int]]) -> None:
    """One process: every question once, in its own order, 16 at a time; reports its asks and failures."""

    async def run() -> None:
        cache, own, limit = Cache(place), 0, asyncio.Semaphore(16)

        async def compute() -> str:
            nonlocal own
            own += 1
            await asyncio.sleep(0.05)
            return ANSWER

        async def one(question: int) -> None:
            async with limit:
                await cache.get_or_compute(f"{prefix}{question}", compute, label="benchmark")

        order = list(range(questions))
        random.shuffle(order)
        await asyncio.gather(*map(one, order))
        asked.put((own, cache.failures))
        await cache.close()

    asyncio.run(run())


def measure_processes(name: str, place: str, processes: int, questions: int) -> None:
    """Prints how often a question was asked, and how long all of it took."""
    context = multiprocessing.get_context("spawn")
    asked: multiprocessing.Queue[tuple[int, int]] = context.Queue()
    prefix = uuid4().hex
    workers = [context.Process(target=ask, args=(place, prefix, questions, asked)) for _ in range(processes)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        sys.exit(f"{name}: a process failed, see above")
    counts = [asked.get() for _ in workers]
    calls, failures = (sum(column) for column in zip(*counts, strict=True))
    print(
        f"{name}: {processes} processes, {questions} questions each, the same: {calls} calls of the back end, "
        f"{failures} without the cache, {time.perf_counter() - start:.1f} s with the processes' start"
    )


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description="Hits and single flight of the shared cache.")
    parser.add_argument("--redis", metavar="ADDRESS")
    parser.add_argument("--two-hosts", action="store_true", help="needs root and Debian's iproute2")
    parser.add_argument("--hits", type=int, default=3000)
    parser.add_argument("--processes", type=int, default=64)
    parser.add_argument("--questions", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.two_hosts:
            from hosts import two_hosts
            from redis_servers import RedisServer

            with two_hosts() as (first, second):
                server = RedisServer(Path(folder), "--protected-mode", "no", host=first.address, inside=first.inside)
                measured = ["--redis", server.address, "--hits", args.hits]
                measured += ["--processes", args.processes, "--questions", args.questions]
                command = [*second.inside, sys.executable, __file__, *map(str, measured)]
                sys.exit(subprocess.run(command, check=False).returncode)
        server = None
        if args.redis is None:
            from redis_servers import RedisServer

            server = RedisServer(Path(folder))
        try:
            places = {"file": f"{folder}/cache.sqlite", "Redis": args.redis or server.address}
            asyncio.run(measure_hits(places, args.hits))
            for name, place in places.items():
                measure_processes(name, place, args.processes, args.questions)
        finally:
            if server is not None:
                server.kill()


if __name__ == "__main__":
    main()
