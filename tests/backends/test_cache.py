"""The shared cache: one call among equal ones, in one process and many; no failure is kept; damage is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import re
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hosts import two_hosts
from hypothesis import assume, given
from hypothesis import strategies as st
from redis_servers import RedisServer

from search_backends import cache as module
from search_backends.cache import Cache, cache_key, main
from search_backends.errors import InfrastructureError, ModelError
from search_backends.providers import CachedImages, CachedPages, CachedText
from search_backends.results import ImageHit, Page, Passage
from verl_tapo.rule.values import canonical

# Keys.

words = st.text("aA １1", max_size=3)
scalars = st.none() | st.booleans() | st.integers(-1, 2) | st.sampled_from([0.0, -0.0, 1.0, 1.5]) | words
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2), max_leaves=4
)
arguments = st.dictionaries(words, values, max_size=2)


def folds_apart(value: Any) -> bool:
    """Whether no two keys of a mapping in ``value`` mean the same."""
    if isinstance(value, dict):
        distinct = len({canonical(key) for key in value}) == len(value)
        return distinct and all(map(folds_apart, value.values()))
    return all(map(folds_apart, value)) if isinstance(value, list) else True


@given(arguments, arguments)
def test_keys_are_equal_exactly_where_tapo_takes_the_arguments_for_equal(a: Any, b: Any) -> None:
    assume(folds_apart(a) and folds_apart(b))
    assert (cache_key("t", "i", a) == cache_key("t", "i", b)) == (canonical(a) == canonical(b))


def rewritten(value: Any, draw: random.Random) -> Any:
    """Another way to write ``value``."""
    if isinstance(value, str):
        return " " * draw.randrange(3) + value.replace(" ", "\n ").replace("1", "１") + " " * draw.randrange(3)
    if isinstance(value, int) and not isinstance(value, bool):
        return draw.choice([value, float(value)])
    if isinstance(value, dict):
        items = list(value.items())
        draw.shuffle(items)
        return {key: rewritten(item, draw) for key, item in items}
    return [rewritten(item, draw) for item in value] if isinstance(value, list) else value


@given(arguments, st.randoms(use_true_random=False))
def test_how_arguments_are_written_does_not_matter(value: Any, draw: random.Random) -> None:
    assert cache_key("t", "i", value) == cache_key("t", "i", rewritten(value, draw))


parts = st.tuples(words, words, st.lists(st.binary(max_size=2), max_size=2))


@given(parts, parts)
def test_tool_identity_and_images_matter_as_they_are(a: Any, b: Any) -> None:
    key_a, key_b = (cache_key(tool, identity, {}, images) for tool, identity, images in (a, b))
    assert (key_a == key_b) == (a == b)


def test_arguments_must_be_json() -> None:
    with pytest.raises(TypeError):
        cache_key("t", "i", {"x": object()})
    assert cache_key("t", "i", {"q": "\ud800"}) != cache_key("t", "i", {"q": "\udfff"})
    long = [cache_key("t", "i", {"n": number}) for number in (10**5000, -(10**5000), 10**5000 + 1, "1" + "0" * 5000)]
    assert len(set(long)) == 4


# Calls.


class Backend:
    """Something to ask, that counts."""

    def __init__(self, *outcomes: Any, delay_s: float = 0.05):
        self.outcomes, self.delay_s, self.asked = outcomes, delay_s, 0

    async def __call__(self) -> Any:
        number, self.asked = self.asked, self.asked + 1
        await asyncio.sleep(self.delay_s)
        outcome = self.outcomes[min(number, len(self.outcomes) - 1)] if self.outcomes else {"answer": number}
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


class File:
    """A place for answers, and hands to tamper with them."""

    def __init__(self, folder: Path) -> None:
        self.at = str(folder / "new" / "cache")

    def _do(self, statement: str, *values: Any) -> int:
        with contextlib.closing(sqlite3.connect(self.at)) as database, database:
            return database.execute(statement, values).rowcount

    def forget_leases(self) -> None:
        assert self._do("DELETE FROM leases")

    def make_older(self, seconds: float) -> None:
        assert self._do("UPDATE answers SET stored_at = stored_at - ?", seconds)

    def overwrite(self, value: Any) -> None:
        assert self._do("UPDATE answers SET value = ?", value) == 1


class Server:
    """A Redis server as such a place."""

    def __init__(self, redis_server: RedisServer) -> None:
        self.at, self._client = redis_server.address, redis_server.client()
        self.name = Path(redis_server.program).name.removesuffix("-server")
        self._client.flushall()

    def _each(self, kind: str) -> list[bytes]:
        names = self._client.keys(f"*:{kind}")
        assert names
        return names

    def forget_leases(self) -> None:
        self._client.delete(*self._each("lease"))

    def make_older(self, seconds: float) -> None:
        for name in self._each("answer"):
            self._client.hset(name, "stored_at", str(float(self._client.hget(name, "stored_at")) - seconds))

    def overwrite(self, value: Any) -> None:
        (name,) = self._each("answer")
        self._client.hset(name, "value", value)


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(params=["file", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> File | Server:
    return File(tmp_path) if request.param == "file" else Server(request.getfixturevalue("redis_server"))


@contextlib.asynccontextmanager
async def caches(file: Path | str, count: int, **settings: Any) -> Any:
    """Several on one file or server, as in several processes."""
    opened = [Cache(file, **settings) for _ in range(count)]
    try:
        yield opened
    finally:
        for each in opened:
            await each.close()


async def get(cache: Cache, compute: Any, key: str = "key") -> tuple[Any, bool]:
    return await cache.get_or_compute(key, compute, label=f"label of {key}")


@pytest.mark.parametrize("count", [1, 3])
def test_equal_calls_ask_once_and_agree(count: int, place: File | Server) -> None:
    async def run() -> None:
        backend = Backend()
        async with caches(place.at, count) as opened:
            found = await asyncio.gather(*(get(opened[i % count], backend) for i in range(30)))
            assert backend.asked == 1
            assert [value for value, _ in found] == [{"answer": 0}] * 30
            assert Counter(hit for _, hit in found) == {False: 1, True: 29}
            found[0][0]["answer"] = "changed"  # by one caller, not for the others
            assert [await get(each, backend) for each in opened] == [({"answer": 0}, True)] * count
            assert await get(opened[0], backend, "another key") == ({"answer": 1}, False)
        async with caches(place.at, 1) as (later,):
            assert await get(later, backend) == ({"answer": 0}, True)
        assert backend.asked == 2

    asyncio.run(run())


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("error", [ModelError("too long"), InfrastructureError("down"), KeyError("a defect")])
def test_those_who_wait_fail_alike_and_the_next_call_asks(error: Exception, count: int, place: File | Server) -> None:
    async def run() -> None:
        backend = Backend(error, "fine", delay_s=0.6)
        async with caches(place.at, count) as opened:
            calls = [asyncio.create_task(get(opened[i % count], backend)) for i in range(6)]
            failures = await asyncio.gather(*calls, return_exceptions=True)
            assert backend.asked == 1
            (asking,) = (number for number, failure in enumerate(failures) if failure is error)
            others = [failure for number, failure in enumerate(failures) if number != asking]
            kind = ModelError if isinstance(error, ModelError) else InfrastructureError
            assert all(type(failure) is kind and error.args[0] in str(failure) for failure in others)
            assert await get(opened[-1], backend) == ("fine", False)
            assert await get(opened[0], backend) == ("fine", True)

    asyncio.run(run())


@pytest.mark.parametrize("count", [1, 2])
def test_when_the_asking_call_is_cancelled_another_asks(count: int, place: File | Server) -> None:
    async def run() -> None:
        backend = Backend(delay_s=0.3)
        async with caches(place.at, count) as opened:
            first = asyncio.create_task(get(opened[0], backend))
            while not backend.asked:
                await asyncio.sleep(0.01)
            others = [asyncio.create_task(get(opened[-1], backend)) for _ in range(3)]
            await asyncio.sleep(0.05)
            others[2].cancel()  # a waiting one: nobody minds
            first.cancel()
            assert (await asyncio.gather(*others[:2])) == [({"answer": 1}, False), ({"answer": 1}, True)]
            assert first.cancelled()
            assert others[2].cancelled()

    asyncio.run(run())


@pytest.mark.long
def test_a_living_call_keeps_its_lease(place: File | Server) -> None:
    async def run() -> None:
        backend = Backend(delay_s=2.5)
        async with caches(place.at, 2, lease_s=1.0) as opened:
            found = await asyncio.gather(*(get(each, backend) for each in opened))
        assert sorted(found, key=str) == [({"answer": 0}, False), ({"answer": 0}, True)]

    asyncio.run(run())


def test_the_first_answer_stays_where_two_asked(place: File | Server) -> None:
    async def run() -> None:
        async with caches(place.at, 2) as (slow, fast):
            backend = Backend("slow", "fast", delay_s=0.3)
            call = asyncio.create_task(get(slow, backend))
            while not backend.asked:
                await asyncio.sleep(0.01)
            place.forget_leases()  # as if it had run out
            backend.delay_s = 0.0
            assert await get(fast, backend) == ("fast", False)
            assert await call == ("fast", False)

    asyncio.run(run())


def test_old_answers_are_asked_for_again(place: File | Server) -> None:
    async def run() -> None:
        backend = Backend(delay_s=0.0)
        async with (
            caches(place.at, 1) as (patient,),
            caches(place.at, 1, max_age_s=60) as (strict,),
        ):
            assert await get(strict, backend) == ({"answer": 0}, False)
            assert await get(strict, backend) == ({"answer": 0}, True)
            place.make_older(61)
            assert await get(patient, backend) == ({"answer": 0}, True)
            assert await get(strict, backend) == ({"answer": 1}, False)
            assert await get(patient, backend) == ({"answer": 1}, True)

    asyncio.run(run())


def test_what_is_no_json_is_a_defect_and_not_kept(place: File | Server) -> None:
    async def run() -> None:
        async with caches(place.at, 1) as (cache,):
            with pytest.raises(TypeError):
                await get(cache, Backend({1, 2}))
            assert await get(cache, Backend([1, 2])) == ([1, 2], False)

    asyncio.run(run())


# Answers that cannot be read.


class Provider:
    """Of texts, images and pages, that counts."""

    identity = "stub"
    asked = 0

    async def search(self, *arguments: Any) -> Any:
        self.asked += 1
        if isinstance(arguments[0], bytes):
            return [ImageHit("title", "text", "url", b"png", 0.5), ImageHit("title")]
        return [Passage("text", "title", "url", 1.0), Passage("text")]

    async def read(self, url: str) -> Any:
        self.asked += 1
        return Page(url, "text", "title")

    async def close(self) -> None:
        pass


RIGHT = {
    "text": {"text": "t", "title": "", "url": "", "score": None},
    "images": {"text": "t", "title": "", "url": "", "score": 1, "image": "aaaa"},
    "pages": {"text": "t", "title": "", "url": ""},
}


def wrong_forms(kind: str) -> Iterator[Any]:
    """What may stand in the file in place of an answer."""
    yield from ("", "{", "nonsense", "[" * 100_000, b"\xff\xfe[]", b"\0", "null", "5", '"text"', "{}", "[1]", "[null]")
    right = RIGHT[kind]
    changed = [
        {**right, name: value} for name in right for value in ({}, True, [], "ä" if name in "score image" else 5)
    ]
    changed += [{key: value for key, value in right.items() if key != name} for name in right]
    for form in changed:
        yield json.dumps(form if kind == "pages" else [right, form])
    yield json.dumps([right] if kind == "pages" else right)


@pytest.mark.parametrize("kind", ["text", "images", "pages"])
def test_answers_of_another_form_are_asked_for_anew(
    kind: str, place: File | Server, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        provider, healed = Provider(), 0
        async with caches(place.at, 2) as (cache, other):

            async def ask(cache: Cache) -> tuple[Any, bool]:
                if kind == "text":
                    return await CachedText(provider, cache).search("query", 3)
                if kind == "images":
                    return await CachedImages(provider, cache).search(b"image", 3)
                return await CachedPages(provider, cache).read("url")

            right, _ = await ask(cache)
            for wrong in wrong_forms(kind):
                place.overwrite(wrong)
                asked = provider.asked
                found = await asyncio.gather(*(ask(each) for each in (cache, other, cache, other)))
                assert [value for value, _ in found] == [right] * 4, wrong
                assert sorted(hit for _, hit in found) == [False, True, True, True]
                assert provider.asked == asked + 1
                healed += 1
                assert cache.healed + other.healed == healed
                assert await ask(other) == (right, True)
            assert cache.failures == other.failures == 0

    caplog.set_level(logging.WARNING)
    asyncio.run(run())
    assert "damaged or another version's" in caplog.text
    assert len(caplog.records) <= 2  # of each cache one


def test_a_fresh_answer_that_cannot_be_read_is_a_defect(place: File | Server) -> None:
    def read(value: Any) -> Any:
        raise ValueError("no such form")

    async def run() -> None:
        backend = Backend(delay_s=0.0)
        async with caches(place.at, 1) as (cache,):
            for asked in (1, 2):
                with pytest.raises(ValueError, match="no such form"):
                    await cache.get_or_compute("key", backend, label="", read=read)
                assert backend.asked == asked

    asyncio.run(run())


def test_labels_may_be_anything(place: File | Server) -> None:
    async def run() -> None:
        async with caches(place.at, 1) as (cache,):
            for hit in (False, True):
                assert await cache.get_or_compute("key", Backend("fine"), label="\ud800 \0") == ("fine", hit)

    asyncio.run(run())


def test_a_lease_from_before_the_clock_was_set_back_blocks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process dies while it asks; then the clock is set back by an hour."""
    file, now = tmp_path / "cache", time.time
    holder = spawn(HOLDER, file)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "asking\n"
    finally:
        holder.kill()
        holder.communicate()
    monkeypatch.setattr(time, "time", lambda: now() - 3600)

    async def run() -> None:
        async with caches(file, 1, lease_s=2.0) as (cache,):
            assert await asyncio.wait_for(get(cache, Backend()), 60) == ({"answer": 0}, False)
            assert await get(cache, Backend()) == ({"answer": 0}, True)

    asyncio.run(run())


# Processes.

WORKER = """
import asyncio, os, random, sys
from pathlib import Path
from search_backends import redis_cache
from search_backends.cache import Cache

# 64 processes on busy cores: none may take the server, or one that asks, for dead.
redis_cache._WAIT_S = 60.0

async def run(file, log, keys):
    cache = Cache(file, lease_s=120.0)
    async def ask(key):
        async def compute():
            with open(log, "a") as out:
                out.write(key + "\\n")
            await asyncio.sleep(0.02)
            return f"{key} by {os.getpid()}"
        await asyncio.sleep(0.5 * random.random())
        return key, (await cache.get_or_compute(key, compute, label=key))[0]
    order = [f"key {i}" for i in range(keys)] * 4
    random.Random(os.getpid()).shuffle(order)
    for key, value in await asyncio.gather(*map(ask, order)):
        print(key, "=", value)
    assert cache.failures == 0
    await cache.close()

print("ready", flush=True)
input()
asyncio.run(run(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


def spawn(script: str, *args: object, inside: Sequence[str] = ()) -> subprocess.Popen[str]:
    environment = {"PYTHONPATH": str(Path(module.__file__).parents[1]), "PATH": os.environ["PATH"]}
    command = [*inside, sys.executable, "-c", script, *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def said(workers: list[subprocess.Popen[str]], last: str) -> list[str]:
    """What all of them have said, each until ``last``."""
    lines = []
    for worker in workers:
        assert worker.stdout is not None
        while (line := worker.stdout.readline().rstrip("\n")) != last:
            assert line, "a process ended early"
            lines.append(line)
    return lines


def go_on(workers: list[subprocess.Popen[str]]) -> None:
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()


def all_ask_alike(at: str, log: Path, insides: Sequence[Sequence[str]], keys: int = 60) -> None:
    """Processes on hosts, one for each of ``insides``, ask the same questions; each is asked once."""
    workers = [spawn(WORKER, at, log, keys, inside=inside) for inside in insides]
    assert said(workers, "ready") == []
    go_on(workers)
    printed = [worker.communicate(timeout=900)[0].splitlines() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(workers)
    assert Counter(log.read_text().splitlines()) == {f"key {i}": 1 for i in range(keys)}
    assert all(len(lines) == 4 * keys for lines in printed)
    assert len({line for lines in printed for line in lines}) == keys  # all were told the same
    assert len({line.rpartition(" ")[2] for line in printed[0]}) > 1  # and several did the asking


def test_four_processes_ask_once_for_each_of_many_keys(place: File | Server, tmp_path: Path) -> None:
    all_ask_alike(place.at, tmp_path / "log", [()] * 4)


HOLDER = """
import asyncio, sys
from search_backends.cache import Cache

async def compute():
    print("asking", flush=True)
    await asyncio.sleep(60)

asyncio.run(Cache(sys.argv[1], lease_s=2.0).get_or_compute("key", compute, label=""))
"""


@pytest.mark.long
def test_another_asks_when_the_process_that_did_is_killed(place: File | Server) -> None:
    holder = spawn(HOLDER, place.at)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "asking\n"

    async def run() -> None:
        backend = Backend()
        async with caches(place.at, 1, lease_s=2.0) as (cache,):
            call = asyncio.create_task(get(cache, backend))
            await asyncio.sleep(2.5)  # longer than a lease: the living one renews it
            assert not backend.asked
            holder.kill()
            assert await call == ({"answer": 0}, False)

    try:
        asyncio.run(run())
    finally:
        holder.kill()
        holder.communicate()


# Files.


def filled(file: Path, answers: int = 200) -> None:
    async def run() -> None:
        async with caches(file, 1) as (cache,):
            for i in range(answers):
                await get(cache, Backend("x" * 2000, delay_s=0.0), f"key {i}")

    asyncio.run(run())


def garbage(file: Path) -> None:
    file.write_bytes(b"no database" * 1000)


def truncated(file: Path) -> None:
    filled(file)
    file.write_bytes(file.read_bytes()[: 100 * 1024])


def damaged_inside(file: Path) -> None:
    filled(file)
    content = bytearray(file.read_bytes())
    content[8192:65536] = random.Random(0).randbytes(65536 - 8192)
    file.write_bytes(content)


def foreign(file: Path) -> None:
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute("CREATE TABLE someone (s TEXT)")


def folder(file: Path) -> None:
    file.mkdir()


@pytest.mark.parametrize("make", [garbage, truncated, damaged_inside, foreign, folder])
def test_a_file_that_is_no_sound_cache_is_refused_and_left_alone(make: Any, tmp_path: Path) -> None:
    file = tmp_path / "cache"
    make(file)
    before = file.read_bytes() if file.is_file() else None
    with pytest.raises(ValueError, match=r"cache.* (delete it|name another file)"):
        Cache(file)
    if before is not None:
        assert file.read_bytes() == before


@pytest.mark.parametrize("settings", [{"max_age_s": 0}, {"lease_s": -1}])
def test_settings_are_checked(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_age_s and lease_s"):
        Cache(tmp_path / "cache", **settings)


def test_a_locked_file_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_BUSY_S", 0.1)
    monkeypatch.setattr(module, "_PAUSE_S", 2.0)
    caplog.set_level(logging.WARNING)

    async def run() -> None:
        async with caches(tmp_path / "cache", 1) as (cache,):
            assert await get(cache, Backend("kept"), "kept") == ("kept", False)
            with contextlib.closing(sqlite3.connect(tmp_path / "cache", isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                backend = Backend(delay_s=0.0)
                assert await get(cache, backend) == ({"answer": 0}, False)
                assert await get(cache, backend) == ({"answer": 1}, False)
                assert await get(cache, backend, "kept") == ("kept", True)
                assert cache.failures == 2
            assert [record.levelname for record in caplog.records] == ["WARNING"]
            assert "locked" in caplog.text
            await asyncio.sleep(2.1)
            assert await get(cache, backend) == ({"answer": 2}, False)
            assert await get(cache, backend) == ({"answer": 2}, True)
            assert cache.failures == 2

    asyncio.run(run())


FULL = """
import asyncio, logging, resource, sys
from search_backends.cache import Cache

async def run(file):
    cache = Cache(file)
    async def compute():
        return "x" * 100_000
    assert await cache.get_or_compute("small", compute, label="") == ("x" * 100_000, False)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))  # of any file
    for i in range(20):
        assert await cache.get_or_compute(f"key {i}", compute, label="") == ("x" * 100_000, False)
    assert await cache.get_or_compute("small", compute, label="") == ("x" * 100_000, True)
    print(cache.failures)

logging.basicConfig(stream=sys.stdout)
asyncio.run(run(sys.argv[1]))
"""


def test_a_full_disk_does_not_stop_the_run(tmp_path: Path) -> None:
    worker = spawn(FULL, tmp_path / "cache")
    *warnings, failures = worker.communicate(timeout=300)[0].splitlines()
    assert worker.returncode == 0
    assert warnings[0].startswith("WARNING:search_backends.cache:cache ")
    assert int(failures) > 0
    Cache(tmp_path / "cache")  # is sound


# The command line.


def test_the_command_line_shows_and_purges(place: File | Server, capsys: pytest.CaptureFixture[str]) -> None:
    file = place.at

    async def run() -> None:
        async with caches(file, 1) as (cache,):
            for query in ("[red] castle", "tower"):
                key = cache_key("text_search", "i", {"query": query})
                for _ in range(3):
                    await cache.get_or_compute(key, Backend({"found": query}, delay_s=0.0), label=query)

    asyncio.run(run())

    def says(*args: str) -> str:
        assert main(args) == 0
        return capsys.readouterr().out

    assert says("stats", file).splitlines()[:2] == ["answers 2", "hits 4"]
    if isinstance(place, File):
        assert "file ok" in says("stats", file)
    else:
        assert re.search(rf"server {place.name} \d+\.\S+, memory \S+ of no limit, noeviction", says("stats", file))
    assert "being asked 0" in says("stats", file)
    assert "[red] castle" in says("list", file)
    assert "castle" not in says("list", file, "--match", "tower")
    key = cache_key("text_search", "i", {"query": "tower"})
    shown = says("show", file, key[:8])
    assert json.loads(shown[shown.index("{") :]) == {"found": "tower"}
    assert says("purge", file, "--older-than", "3600") == "deleted 0\n"
    assert says("purge", file, "--match", "castle") == "deleted 1\n"
    assert main(["show", file, "zz"]) == 1
    assert says("purge", file, "--all") == "deleted 1\n"
    assert "answers 0" in says("stats", file)


def test_the_command_line_makes_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(tmp_path / "cache")]) == 1
    assert "there is no cache" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Servers.


def test_a_server_that_is_down_is_asked_once_in_a_pause_and_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed, its answers lost, and started again: calls are answered throughout, and kept afterwards."""
    monkeypatch.setattr(module, "_PAUSE_S", 1.0)
    server = RedisServer(tmp_path)

    async def run() -> None:
        async with caches(server.address, 1) as (cache,):
            backend = Backend(delay_s=0.0)
            assert await get(cache, backend) == ({"answer": 0}, False)
            assert await get(cache, backend) == ({"answer": 0}, True)
            server.kill()
            tried = 0
            connect = type(cache._client.connection_pool).get_connection

            def counted(pool: Any, *args: Any, **kwargs: Any) -> Any:
                nonlocal tried
                tried += 1
                return connect(pool, *args, **kwargs)

            monkeypatch.setattr(type(cache._client.connection_pool), "get_connection", counted)
            assert [await get(cache, backend, f"key {i}") for i in range(50)] == [
                ({"answer": 1 + i}, False) for i in range(50)
            ]
            assert cache.failures == 50
            assert tried == 1
            assert [record.levelname for record in caplog.records] == ["WARNING"]
            server.start()
            while not (await get(cache, backend))[1]:
                await asyncio.sleep(0.1)
            failures = cache.failures
            assert await get(cache, backend, "another") == ({"answer": backend.asked - 1}, False)
            assert await get(cache, backend, "another") == ({"answer": backend.asked - 1}, True)
            assert cache.failures == failures

    try:
        asyncio.run(run())
    finally:
        server.kill()


def test_a_server_that_hangs_costs_one_wait_in_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from search_backends import redis_cache

    monkeypatch.setattr(redis_cache, "_WAIT_S", 0.3)
    server = RedisServer(tmp_path)

    async def run() -> None:
        async with caches(server.address, 1) as (cache,):
            server.hang()
            backend = Backend(delay_s=0.0)
            # 200 waits would take a minute.
            await asyncio.wait_for(asyncio.gather(*(get(cache, backend, f"key {i}") for i in range(200))), 30)
            assert (backend.asked, cache.failures) == (200, 200)

    try:
        asyncio.run(run())
    finally:
        server.go_on()
        server.kill()


@pytest.mark.parametrize("slow", [4, 5])
def test_a_server_that_is_slow_at_the_start_is_waited_for(
    slow: int, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from redis import Redis, TimeoutError

    ping, waits = Redis.ping, [TimeoutError("Timeout reading from socket")] * slow

    def late(client: Any) -> Any:
        if waits:
            raise waits.pop()
        return ping(client)

    monkeypatch.setattr(Redis, "ping", late)
    if slow == 5:
        with pytest.raises(ValueError, match="cannot be used: Timeout reading from socket"):
            Cache(redis_server.address)
    else:
        asyncio.run(Cache(redis_server.address).close())
    assert not waits


def test_a_full_server_gives_what_it_has_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_PAUSE_S", 0.0)
    server = RedisServer(tmp_path, "--maxmemory", "4mb", "--maxmemory-policy", "noeviction")

    async def run() -> None:
        async with caches(server.address, 2) as (cache, other):
            backend = Backend("x" * 300_000, delay_s=0.0)
            for i in range(30):
                assert await get(cache, backend, f"key {i}") == ("x" * 300_000, False)
            assert 0 < cache.failures < 30
            assert "maxmemory" in caplog.text
            assert await get(other, backend, "key 0") == ("x" * 300_000, True)
            # Nobody is left waiting for an answer that could not be kept.
            found = await asyncio.wait_for(asyncio.gather(get(cache, backend, "y"), get(other, backend, "y")), 10)
            assert [value for value, _ in found] == ["x" * 300_000] * 2
            server.client().execute_command("FLUSHALL", "SYNC")  # in the background by default, in Valkey
            failures = cache.failures
            assert await get(cache, backend, "key 29") == ("x" * 300_000, False)
            assert await get(cache, backend, "key 29") == ("x" * 300_000, True)
            assert cache.failures == failures

    try:
        asyncio.run(run())
    finally:
        server.kill()


def test_an_answer_that_is_too_long_is_not_kept(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from search_backends import redis_cache

    place = Server(redis_server)
    monkeypatch.setattr(redis_cache, "_LONGEST", 1000)

    async def run() -> None:
        async with caches(place.at, 1) as (cache,):
            backend = Backend("x" * 2000, "short", delay_s=0.0)
            assert await get(cache, backend) == ("x" * 2000, False)
            assert cache.failures == 1
            assert await asyncio.wait_for(get(cache, backend), 5) == ("short", False)
            assert await get(cache, backend) == ("short", True)

    asyncio.run(run())


def test_a_long_answer_of_another_is_not_taken(redis_server: RedisServer) -> None:
    place = Server(redis_server)

    async def run() -> None:
        async with caches(place.at, 1) as (cache,):
            backend = Backend(delay_s=0.0)
            await get(cache, backend)
            place.overwrite(b'"' + b"x" * (1 << 24) + b'"')
            assert await get(cache, backend) == ({"answer": 1}, False)
            assert await get(cache, backend) == ({"answer": 1}, True)

    asyncio.run(run())


@pytest.fixture(scope="module")
def locked_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("locked"), "--requirepass", PASSWORD)
    yield server
    server.kill()


PASSWORD = "s/e@cret"
WRITTEN = "s%2Fe%40cret"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("redis://127.0.0.1:{port}/0", "Authentication required"),
        ("redis://:s%2Fe%40cretX@127.0.0.1:{port}/0", "invalid username-password pair|invalid password"),
        ("redis://nobody:s%2Fe%40cret@127.0.0.1:{port}/0", "invalid username-password pair"),
        ("redis://:s/e@cret@127.0.0.1:{port}/0", "is not of the form redis://.* are written %2F %40"),
        ("redis://:s%2Fe%40cret@127.0.0.1:{port}/99", "DB index is out of range"),
        ("redis://:s%2Fe%40cret@127.0.0.1:{port}/0?no_such=1", "unexpected keyword argument 'no_such'"),
        ("redis://:s%2Fe%40cret@127.0.0.1:1/0", "127.0.0.1:1/0 cannot be used: .*Connection refused"),
        ("redis://:s%2Fe%40cret@no.host.invalid:1/0", "cannot be used: .*no.host.invalid"),
        ("redis://:s%2Fe%40cret@127.0.0.1:port/0", "is not of the form"),
        ("rediss://:s%2Fe%40cret@127.0.0.1:{port}/0", "rediss://127.0.0.1:.* cannot be used: "),
    ],
)
def test_a_wrong_address_is_told_at_once_and_without_the_password(
    address: str,
    message: str,
    locked_server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from search_backends import redis_cache

    monkeypatch.setattr(redis_cache, "_WAIT_S", 0.5)
    address = address.replace("{port}", str(locked_server.port))
    with pytest.raises(ValueError, match=message) as raised:
        Cache(address)
    assert main(["stats", address]) == 1
    for told in (str(raised.value), capsys.readouterr().err):
        assert "cret" not in told
        assert "s/e" not in told
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


def test_a_password_is_in_no_message(
    locked_server: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_PAUSE_S", 0.1)

    async def run() -> None:
        async with caches(f"redis://:{WRITTEN}@127.0.0.1:{locked_server.port}/0", 1) as (cache,):
            assert await get(cache, Backend("kept")) == ("kept", False)
            assert cache.path == locked_server.address
            client = locked_server.client(PASSWORD)
            client.config_set("requirepass", "another")  # and cut the connections
            client.client_kill_filter(skipme=True, _type="normal")
            assert await get(cache, Backend("asked")) == ("asked", False)
            client.config_set("requirepass", PASSWORD)

    asyncio.run(run())
    assert "for 0.1 s answers are not kept" in caplog.text
    assert "cret" not in caplog.text


def test_a_tool_s_wrong_settings_are_told_without_the_password() -> None:
    from search_agent.tools.text_search import TextSearch

    with pytest.raises(ValueError, match=r"cach: .* got 'redis://host:6379/0'") as raised:
        TextSearch({"type": "native", "cach": f"redis://me:{WRITTEN}@host:6379/0?password={WRITTEN}"}, None)
    assert "cret" not in str(raised.value)


def test_tls_by_address(tmp_path: Path) -> None:
    """With the server's certificate, without it, and without TLS."""
    server = RedisServer(tmp_path, "--requirepass", PASSWORD)
    try:
        address = server.speak_tls().replace("rediss://", f"rediss://:{WRITTEN}@")

        async def run() -> None:
            async with caches(address, 2) as (cache, other):
                assert await get(cache, Backend("kept")) == ("kept", False)
                assert await get(other, Backend("asked")) == ("kept", True)
                assert cache.path == server.address.replace("redis:", "rediss:")

        asyncio.run(run())
        with pytest.raises(ValueError, match="certificate verify failed") as raised:
            Cache(address.partition("?")[0])
        assert "cret" not in str(raised.value)
        with pytest.raises(ValueError, match="cannot be used: "):
            Cache(address.partition("?")[0].replace("rediss:", "redis:"))
    finally:
        server.kill()


def test_without_redis_py_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(
        ValueError, match=r"redis://host:6379/0 needs redis-py: pip install 'verl-tapo\[search-redis\]'"
    ):
        Cache(f"redis://:{WRITTEN}@host:6379/0")


def killed_under_load(server: RedisServer, insides: Sequence[Sequence[str]], keys: int = 60) -> None:
    """Processes on hosts ask many questions while the server is killed with `kill -9` and started again."""
    pause_s = 0.0125 * len(insides)  # or they would only wait for the processor
    workers = [spawn(LOAD, server.address, keys, pause_s, inside=inside) for inside in insides]
    lines = said(workers, "ready")
    go_on(workers)
    lines += said(workers, "half")
    server.kill()
    lines += said(workers, "gone")
    server.start()
    go_on(workers)
    ends = [worker.communicate(timeout=900)[0].splitlines() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(workers)
    lines += [line for end in ends for line in end[:-1]]
    assert set(lines) == {"right"}
    assert len(lines) > 20 * keys * len(workers)
    assert all(int(end[-1]) > 0 for end in ends)  # calls without the cache were counted


LOAD = """
import asyncio, sys
from search_backends import cache
from search_backends.cache import Cache

cache._PAUSE_S = 0.5

async def run(address, keys, pause_s):
    opened = Cache(address, lease_s=2.0)
    async def ask(key):
        async def compute():
            await asyncio.sleep(0.02)
            return f"the answer to {key}"
        value, hit = await opened.get_or_compute(key, compute, label=key)
        print("right" if value == f"the answer to {key}" else "wrong")
        return hit
    async def ask_all():
        await asyncio.sleep(pause_s)
        return await asyncio.gather(*(ask(f"question {i}") for i in range(keys)))
    for _ in range(10):
        await ask_all()
    print("half", flush=True)
    while not opened.failures:
        await ask_all()
    print("gone", flush=True)
    back = asyncio.create_task(asyncio.to_thread(input))
    while not back.done():
        await ask_all()
    for _ in range(10):
        await ask_all()
    while not all(await ask_all()):  # until the server is used again
        pass
    await opened.close()
    print(opened.failures)

print("ready", flush=True)
input()
asyncio.run(run(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
"""


@pytest.mark.long
def test_a_server_killed_under_load_gives_no_wrong_answer_and_no_hang(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    try:
        killed_under_load(server, [()] * 8)
    finally:
        server.kill()


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_sixty_four_processes_on_two_hosts(tmp_path: Path) -> None:
    """One call of the back end for each question, whoever asks; then the server is killed."""
    with two_hosts() as (first, second):
        server = RedisServer(tmp_path, "--protected-mode", "no", host=first.address, inside=first.inside)
        insides = [first.inside, second.inside] * 32
        all_ask_alike(server.address, tmp_path / "log", insides, keys=20)
        killed_under_load(server, insides, keys=20)
