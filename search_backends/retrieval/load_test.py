"""Measures the service: throughput, latency and memory on this machine.

    python -m search_backends.retrieval.load_test [--index INDEX] [--passages 100000] [--concurrency 64 1024]

Without --index, passages of 100 words are generated with a realistic word distribution (Zipf's law,
without the 50 most frequent words, as with stop words), and the build is measured too. The service
runs in its own process, but shares the machine with the client, so the latencies include the
client's load. The service's own measurements are listed as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from search_backends.retrieval.documents import Records, text_of
from search_backends.retrieval.manifest import IndexProblem, run_main

PROGRAM = "search_backends.retrieval.load_test"
WORDS, QUERY_WORDS = 100, 6
VOCABULARY, LEFT_OUT = 300_000, 50
QUERIES = 2000
_LOOK_S = 0.1


def write_corpus(file: Path, passages: int, seed: int = 0) -> None:
    """Makes up passages."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(LEFT_OUT + 1, LEFT_OUT + 1 + VOCABULARY)
    words = np.array([f"w{rank}" for rank in range(VOCABULARY)])
    with file.open("w", encoding="utf-8") as out:
        for first in range(0, passages, 1000):
            drawn = rng.choice(words, (min(1000, passages - first), WORDS), p=weights / weights.sum())
            for number, text in enumerate(drawn, first):
                contents = " ".join(text)
                out.write(json.dumps({"id": str(number), "title": f"{text[0]} {text[1]}", "contents": contents}) + "\n")


def sample_queries(index: Path, seed: int = 0) -> list[str]:
    """Words of random passages."""
    rng = np.random.default_rng(seed)
    passages = Records(index / "passages")
    chosen = (text_of(passages[int(position)]).split() for position in rng.integers(0, len(passages), QUERIES))
    return [" ".join(rng.choice(words, QUERY_WORDS)) for words in chosen]


@contextmanager
def running(index: Path, options: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
    """The real service on a free port: its URL and process id.

    Raises:
        IndexProblem: It does not start.
    """
    command = [sys.executable, "-m", "search_backends.retrieval.serve", str(index), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = process.stderr.readline()
        address = re.search(r"http://\S+(?=,)", said)
        while address and "ready after" not in (line := process.stderr.readline()):
            if not line:
                raise IndexProblem(f"the service did not start (exit code {process.wait()})")
        if address is None:
            raise IndexProblem(f"the service did not start: {said.strip()}")
        yield address[0], process.pid
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()


async def drive(url: str, queries: Sequence[str], concurrency: int, requests: int) -> tuple[float, list[float]]:
    """Sends requests, ``concurrency`` at a time: seconds in all, seconds of each.

    Raises:
        IndexProblem: One was not answered.
    """
    taken: list[float] = []
    numbers = iter(range(requests))
    host, port = url.removeprefix("http://").rsplit(":", 1)

    async def caller() -> None:
        # httpx needs more time for a request than the service does, and would be what is measured.
        reader, writer = await asyncio.open_connection(host, int(port))
        for number in numbers:
            body = {"queries": [queries[number % len(queries)]], "topk": 3, "return_scores": True}
            content = json.dumps(body).encode()
            began = time.perf_counter()
            writer.write(
                b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content)
            )
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            taken.append(time.perf_counter() - began)
            if not head.startswith(b"HTTP/1.1 200 "):
                raise IndexProblem(f"the service answered {head.splitlines()[0].decode()}")
        writer.close()
        await writer.wait_closed()

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return time.perf_counter() - started, taken


def _memory(process: int) -> dict[str, float]:
    """Megabytes of a process: VmHWM (the most so far), VmRSS and, of that, RssAnon, which are no mapped files.

    It is empty for a process that has ended, and where there is no /proc.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return {}
    return {name: int(size) / 1024 for name, size in re.findall(r"(VmHWM|VmRSS|RssAnon):\s+(\d+) kB", status)}


def memory(process: int) -> str:
    """Returns a process's resident memory, and the part of it that is not mapped files."""
    sizes = _memory(process)
    return f"{sizes['VmRSS']:,.0f} MB ({sizes['RssAnon']:,.0f} MB without files)" if sizes else "-"


def build(folder: Path, passages: int) -> Path:
    """Makes a corpus and its index, and reports the cost."""
    write_corpus(folder / "passages.jsonl", passages)
    index = folder / "index"
    command = ["--corpus", str(folder / "passages.jsonl"), "--out", str(index)]
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "search_backends.retrieval.build", *command])
    resident = own = 0.0
    while process.poll() is None:
        sizes = _memory(process.pid)
        resident, own = max(resident, sizes.get("VmHWM", 0)), max(own, sizes.get("RssAnon", 0))
        time.sleep(_LOOK_S)
    if process.returncode:
        raise IndexProblem(f"the build ended with exit code {process.returncode}")
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in index.rglob("*") if file.is_file()) / 2**20
    print(
        f"built {passages:,} passages in {seconds:.1f} s, at most {resident:,.0f} MB of memory "
        f"({own:,.0f} MB without files), {size:,.0f} MB on the disk"
    )
    return index


def measure(
    index: Path, concurrencies: Sequence[int], requests: int, options: Sequence[str], url: str | None = None
) -> None:
    """Prints the table, of a service of its own or of the one at ``url``."""
    queries = sample_queries(index)
    table = Table("at a time", "requests", "requests/s", "p50 ms", "p99 ms", "max ms", "service's mean ms", "memory")
    service = running(index, options) if url is None else nullcontext((url.rstrip("/"), 0))
    with service as (url, process):
        for concurrency in concurrencies:
            asyncio.run(drive(url, queries, concurrency, concurrency * 4))
            before = _own_seconds(url)
            seconds, taken = asyncio.run(drive(url, queries, concurrency, requests))
            own = np.subtract(_own_seconds(url), before)
            middle, last = np.percentile(taken, [50, 99]) * 1000
            values = [middle, last, max(taken) * 1000, own[0] / own[1] * 1000]
            table.add_row(
                str(concurrency),
                str(requests),
                f"{requests / seconds:.0f}",
                *(f"{value:.1f}" for value in values),
                memory(process),
            )
    Console(width=140).print(table)
    print(f"{os.cpu_count()} cores; load average {', '.join(f'{load:.1f}' for load in os.getloadavg())}")


def _own_seconds(url: str) -> tuple[float, float]:
    """Returns the service's own count for /retrieve: seconds and requests. Of replicas it is one's."""
    stats = httpx.get(f"{url}/stats", trust_env=False).text
    sums = dict(re.findall(r'retrieval_request_seconds_(sum|count)\{endpoint="/retrieve"\} (\S+)', stats))
    return float(sums["sum"]), float(sums["count"])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", type=Path, help="of passages (default: one is made up)")
    parser.add_argument("--passages", type=int, default=100_000, help="of the index that is made up")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[64, 1024], help="requests at a time")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--url", help="of a service that runs already, with that index (default: one is started)")
    parser.add_argument("--serve", default="", help='options of the service, as in "--threads 2 --text hybrid"')
    arguments = parser.parse_args(argv)
    if arguments.url is not None and arguments.index is None:
        parser.error("--url needs --index, out of which the queries are drawn")

    def run() -> int:
        with tempfile.TemporaryDirectory() as folder:
            index = arguments.index or build(Path(folder), arguments.passages)
            measure(index, arguments.concurrency, arguments.requests, arguments.serve.split(), arguments.url)
        return 0

    return run_main(PROGRAM, run)


if __name__ == "__main__":
    sys.exit(main())
