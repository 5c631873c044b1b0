"""What callers of a provider see when its back end misbehaves, over real sockets; and that nothing wrong is cached."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
import raw_server
from raw_server import RawServer, response

from search_backends.cache import Cache
from search_backends.errors import InfrastructureError, ModelError
from search_backends.http import JsonClient
from search_backends.providers import CachedText, make_text_provider
from search_backends.results import Passage

KEY = "tvly-5ecret-k3y"
GOOD = response({"results": [{"title": "Eiffel Tower", "url": "https://e.org", "content": "330 m", "score": 0.9}]})
PASSAGES = [Passage("330 m", "Eiffel Tower", "https://e.org", 0.9)]
ATTEMPTS = 3


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    monkeypatch.setenv("TAVILY_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    caplog.set_level(logging.DEBUG)
    yield
    assert KEY not in caplog.text


async def silence(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def half(writer: asyncio.StreamWriter) -> None:
    writer.write(GOOD[:-20])
    await writer.drain()


async def hang_up(writer: asyncio.StreamWriter) -> None:
    pass


class Flood:
    """50 MB of JSON without a stated length."""

    sent = 0

    async def __call__(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n[")
        for _ in range(50):
            writer.write(b'"%b",' % (b"x" * 1_000_000))
            self.sent += 1_000_000
            await writer.drain()


def provider(url: str, **settings: object):
    return make_text_provider({"provider": "tavily", "base_url": url, "attempts": ATTEMPTS, "timeout_s": 20} | settings)


async def ask(url: str, file: Path, **settings: object) -> tuple[list[Passage], bool]:
    tavily, cache = provider(url, **settings), Cache(file)
    try:
        return await CachedText(tavily, cache).search("height of the Eiffel Tower", 3)
    finally:
        await tavily.close()
        await cache.close()


def kept(file: Path) -> int:
    with contextlib.closing(sqlite3.connect(file)) as database:
        return database.execute("SELECT count(*) FROM answers").fetchone()[0]


REFUSED_QUERY = response({"detail": {"error": "Query is too long. Max query length is 400 characters."}}, 400)
OUT_OF_CREDITS = response({"detail": {"error": f"{KEY} has used its plan's credits."}}, 400)

FAULTS = {
    # name: what the server does, the caller sees, in words, requests that the server got
    "slow": (silence, InfrastructureError, "no answer within 4 s", 2),
    "429": (response({}, 429), InfrastructureError, "429", ATTEMPTS),
    "429 for an hour": (response({}, 429, Retry_After="3600"), InfrastructureError, "429", 1),
    "429 until a date": (response({}, 429, Retry_After=formatdate(4e9)), InfrastructureError, "429", 1),
    "500": (response(b"<h1>oh</h1>", 500, "text/html"), InfrastructureError, "500", ATTEMPTS),
    "503 that flickers": (response({}, 503, Retry_After="soon"), InfrastructureError, "503", ATTEMPTS),
    "half an answer": (half, InfrastructureError, "RemoteProtocolError", ATTEMPTS),
    "hangs up": (hang_up, InfrastructureError, "RemoteProtocolError", ATTEMPTS),
    "invalid JSON": (response(b'{"results": [}'), InfrastructureError, "not valid JSON", 1),
    "deep JSON": (response(b"[" * 200_000), InfrastructureError, "not valid JSON", 1),
    "HTML": (response(b"<html>", content_type="text/html"), InfrastructureError, "text/html, not JSON", 1),
    "no content": (b"HTTP/1.1 204 X\r\n\r\n", InfrastructureError, "not JSON", 1),
    "broken gzip": (response(b"{}", Content_Encoding="gzip"), InfrastructureError, "DecodingError", 1),
    "redirect": (response({}, 302, Location="/search2"), InfrastructureError, "redirect", 1),
    "404": (response({"detail": "Not Found"}, 404), InfrastructureError, "404 Not Found", 1),
    "401": (response({"detail": {"error": "Unauthorized"}}, 401), InfrastructureError, "check TAVILY_API_KEY", 1),
    "402": (response({}, 402), InfrastructureError, "check TAVILY_API_KEY", 1),
    "403": (response({}, 403), InfrastructureError, "check TAVILY_API_KEY", 1),
    "query refused": (REFUSED_QUERY, ModelError, "Query is too long", 1),
    "out of credits": (OUT_OF_CREDITS, InfrastructureError, "plan's credits", 1),
    "no results key": (response({"answer": None}), InfrastructureError, "results", 1),
    "wrong type": (response({"results": [{"title": "t", "url": "u", "content": 1, "score": 1}]}),
                   InfrastructureError, "results.0.content", 1),
    "a list": (response([]), InfrastructureError, "documented form", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_told_counted_and_never_cached(name: str, tmp_path: Path) -> None:
    answer, kind, words, requests = FAULTS[name]
    file = tmp_path / "cache.sqlite"

    async def main() -> None:
        async with RawServer(answer) as server:
            settings = {"timeout_s": 4} if name == "slow" else {}
            with pytest.raises((ModelError, InfrastructureError)) as caught:
                await ask(server.url, file, **settings)
            assert isinstance(caught.value, kind)
            assert words in str(caught.value)
            assert KEY not in str(caught.value)
            assert len(server.requests) == requests
            assert kept(file) == 0
            server.answers = [GOOD]
            assert await ask(server.url, file) == (PASSAGES, False)
            assert await ask(server.url, file) == (PASSAGES, True)
            assert len(server.requests) == requests + 1

    asyncio.run(main())


@pytest.mark.parametrize("fault", ["slow", "429", "500", "half an answer", "hangs up"])
def test_a_fault_that_passes_is_not_seen(fault: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with RawServer(FAULTS[fault][0], GOOD) as server:
            assert await ask(server.url, tmp_path / "cache", timeout_s=4) == (PASSAGES, False)
            assert len(server.requests) == 2

    asyncio.run(main())


def test_retry_after_is_waited_for(tmp_path: Path) -> None:
    async def main() -> None:
        async with RawServer(response({}, 429, Retry_After="1"), GOOD) as server:
            assert await ask(server.url, tmp_path / "cache") == (PASSAGES, False)
            first, second = server.requests
            assert second.at - first.at >= 1.0

    asyncio.run(main())


def test_a_flood_is_cut_off(tmp_path: Path) -> None:
    async def main() -> None:
        flood = Flood()
        async with RawServer(flood) as server:
            with pytest.raises(InfrastructureError, match="longer than 2000000 bytes"):
                await ask(server.url, tmp_path / "cache", max_bytes=2_000_000)
            assert len(server.requests) == 1
        assert flood.sent < 40_000_000
        assert kept(tmp_path / "cache") == 0

    asyncio.run(main())


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_nobody_there(host: str, tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match=rf"{host}:\d+: .*\(2 attempts\)"):
        asyncio.run(ask(f"http://{host}:{free_port()}", tmp_path / "cache", attempts=2))
    assert kept(tmp_path / "cache") == 0


def test_calls_in_flight_outlive_a_server_that_is_killed_and_restarted(tmp_path: Path) -> None:
    port = free_port()

    def start(delay_s: float) -> subprocess.Popen[bytes]:
        command = [sys.executable, raw_server.__file__, str(port), str(delay_s)]
        return subprocess.Popen(command, stdout=subprocess.PIPE)

    def wait(process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"

    async def main() -> list[tuple[list[Passage], bool]]:
        tavily, cache = provider(f"http://127.0.0.1:{port}", attempts=12, timeout_s=50), Cache(tmp_path / "cache")
        calls = [asyncio.create_task(CachedText(tavily, cache).search(f"query {i}", 3)) for i in range(20)]
        await asyncio.sleep(0.5)
        assert not any(call.done() for call in calls)
        processes[0].kill()
        processes.append(start(0.0))
        answers = await asyncio.gather(*calls)
        await tavily.close()
        await cache.close()
        return answers

    processes = [start(30.0)]
    try:
        wait(processes[0])
        answers = asyncio.run(main())
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert answers == [([Passage("c", "t", "u", 1.0)], False)] * 20
    assert processes[0].returncode == -signal.SIGKILL
    assert kept(tmp_path / "cache") == 20


def test_concurrency_is_limited_and_waiting_counts_as_time() -> None:
    async def main() -> None:
        busy = most = 0

        async def slow(writer: asyncio.StreamWriter) -> None:
            nonlocal busy, most
            busy += 1
            most = max(most, busy)
            await asyncio.sleep(0.02)
            busy -= 1
            writer.write(response(1))
            await writer.drain()

        async with RawServer(slow) as server:
            client = JsonClient(server.url, timeout_s=20, attempts=1, concurrency=3, max_bytes=1000)
            assert await asyncio.gather(*(client.get("/") for _ in range(20))) == [1] * 20
            assert most == 3
            await client.close()
        async with RawServer(silence) as server:
            # Long enough for one to arrive on a busy machine.
            client = JsonClient(server.url, timeout_s=2, attempts=1, concurrency=1, max_bytes=1000)
            failures = await asyncio.gather(*(client.get("/") for _ in range(5)), return_exceptions=True)
            assert all(isinstance(failure, InfrastructureError) for failure in failures)
            assert len(server.requests) == 1
            await client.close()

    asyncio.run(main())


def test_a_cancelled_call_gives_its_place_back() -> None:
    async def main() -> None:
        async with RawServer(silence, GOOD) as server:
            client = JsonClient(server.url, timeout_s=20, attempts=2, concurrency=1, max_bytes=1000)
            call = asyncio.create_task(client.get("/"))
            while not server.requests:
                await asyncio.sleep(0.01)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert (await client.get("/"))["results"]
            await client.close()

    asyncio.run(main())


def test_one_client_serves_several_event_loops() -> None:
    port = free_port()
    client = JsonClient(f"http://127.0.0.1:{port}", timeout_s=20, attempts=1, concurrency=2, max_bytes=1000)

    async def main() -> None:
        async with RawServer(GOOD, port=port):
            for _ in range(3):
                assert (await client.get("/"))["results"]

    for _ in range(3):
        asyncio.run(main())
    assert len(client._sessions) == 1  # those of loops that are gone are not kept


@pytest.mark.parametrize(
    "url", ["", "ftp://x", "127.0.0.1:80", "http://", "http://user:pass@host", "http://h:port", None]
)
def test_addresses_are_checked(url: object) -> None:
    with pytest.raises(ValueError, match="must be an http or https address"):
        JsonClient(url, timeout_s=1, attempts=1, concurrency=1, max_bytes=1000)  # type: ignore[arg-type]
