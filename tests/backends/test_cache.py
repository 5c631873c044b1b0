"""The shared cache: one call among equal ones, in one process and many; no failure is kept; damage is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

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


@contextlib.asynccontextmanager
async def caches(file: Path, count: int, **settings: Any) -> Any:
    """Several on one file, as in several processes."""
    opened = [Cache(file, **settings) for _ in range(count)]
    try:
        yield opened
    finally:
        for each in opened:
            await each.close()


async def get(cache: Cache, compute: Any, key: str = "key") -> tuple[Any, bool]:
    return await cache.get_or_compute(key, compute, label=f"label of {key}")


@pytest.mark.parametrize("count", [1, 3])
def test_equal_calls_ask_once_and_agree(count: int, tmp_path: Path) -> None:
    async def run() -> None:
        backend = Backend()
        async with caches(tmp_path / "new" / "cache", count) as opened:
            found = await asyncio.gather(*(get(opened[i % count], backend) for i in range(30)))
            assert backend.asked == 1
            assert [value for value, _ in found] == [{"answer": 0}] * 30
            assert Counter(hit for _, hit in found) == {False: 1, True: 29}
            found[0][0]["answer"] = "changed"  # by one caller, not for the others
            assert [await get(each, backend) for each in opened] == [({"answer": 0}, True)] * count
            assert await get(opened[0], backend, "another key") == ({"answer": 1}, False)
        async with caches(tmp_path / "new" / "cache", 1) as (later,):
            assert await get(later, backend) == ({"answer": 0}, True)
        assert backend.asked == 2

    asyncio.run(run())


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("error", [ModelError("too long"), InfrastructureError("down"), KeyError("a defect")])
def test_those_who_wait_fail_alike_and_the_next_call_asks(error: Exception, count: int, tmp_path: Path) -> None:
    async def run() -> None:
        backend = Backend(error, "fine", delay_s=0.6)
        async with caches(tmp_path / "cache", count) as opened:
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
def test_when_the_asking_call_is_cancelled_another_asks(count: int, tmp_path: Path) -> None:
    async def run() -> None:
        backend = Backend(delay_s=0.3)
        async with caches(tmp_path / "cache", count) as opened:
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


def test_a_living_call_keeps_its_lease(tmp_path: Path) -> None:
    async def run() -> None:
        backend = Backend(delay_s=2.5)
        async with caches(tmp_path / "cache", 2, lease_s=1.0) as opened:
            found = await asyncio.gather(*(get(each, backend) for each in opened))
        assert sorted(found, key=str) == [({"answer": 0}, False), ({"answer": 0}, True)]

    asyncio.run(run())


def test_the_first_answer_stays_where_two_asked(tmp_path: Path) -> None:
    async def run() -> None:
        async with caches(tmp_path / "cache", 2) as (slow, fast):
            backend = Backend("slow", "fast", delay_s=0.3)
            call = asyncio.create_task(get(slow, backend))
            while not backend.asked:
                await asyncio.sleep(0.01)
            with contextlib.closing(sqlite3.connect(tmp_path / "cache")) as database, database:
                database.execute("DELETE FROM leases")  # as if it had run out
            backend.delay_s = 0.0
            assert await get(fast, backend) == ("fast", False)
            assert await call == ("fast", False)

    asyncio.run(run())


def test_old_answers_are_asked_for_again(tmp_path: Path) -> None:
    async def run() -> None:
        backend = Backend(delay_s=0.0)
        async with (
            caches(tmp_path / "cache", 1) as (patient,),
            caches(tmp_path / "cache", 1, max_age_s=60) as (strict,),
        ):
            assert await get(strict, backend) == ({"answer": 0}, False)
            assert await get(strict, backend) == ({"answer": 0}, True)
            with contextlib.closing(sqlite3.connect(tmp_path / "cache")) as database, database:
                database.execute("UPDATE answers SET stored_at = stored_at - 61")
            assert await get(patient, backend) == ({"answer": 0}, True)
            assert await get(strict, backend) == ({"answer": 1}, False)
            assert await get(patient, backend) == ({"answer": 1}, True)

    asyncio.run(run())


def test_what_is_no_json_is_a_defect_and_not_kept(tmp_path: Path) -> None:
    async def run() -> None:
        async with caches(tmp_path / "cache", 1) as (cache,):
            with pytest.raises(TypeError):
                await get(cache, Backend({1, 2}))
            assert await get(cache, Backend([1, 2])) == ([1, 2], False)

    asyncio.run(run())


# Answers that cannot be read.


def overwrite(file: Path, value: Any) -> None:
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        assert database.execute("UPDATE answers SET value = ?", (value,)).rowcount == 1


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
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        provider, healed = Provider(), 0
        async with caches(tmp_path / "cache", 2) as (cache, other):

            async def ask(cache: Cache) -> tuple[Any, bool]:
                if kind == "text":
                    return await CachedText(provider, cache).search("query", 3)
                if kind == "images":
                    return await CachedImages(provider, cache).search(b"image", 3)
                return await CachedPages(provider, cache).read("url")

            right, _ = await ask(cache)
            for wrong in wrong_forms(kind):
                overwrite(tmp_path / "cache", wrong)
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


def test_a_fresh_answer_that_cannot_be_read_is_a_defect(tmp_path: Path) -> None:
    def read(value: Any) -> Any:
        raise ValueError("no such form")

    async def run() -> None:
        backend = Backend(delay_s=0.0)
        async with caches(tmp_path / "cache", 1) as (cache,):
            for asked in (1, 2):
                with pytest.raises(ValueError, match="no such form"):
                    await cache.get_or_compute("key", backend, label="", read=read)
                assert backend.asked == asked

    asyncio.run(run())


def test_labels_may_be_anything(tmp_path: Path) -> None:
    async def run() -> None:
        async with caches(tmp_path / "cache", 1) as (cache,):
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
from search_backends.cache import Cache

async def run(file, log, keys):
    cache = Cache(file)
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


def spawn(script: str, *args: object) -> subprocess.Popen[str]:
    environment = {"PYTHONPATH": str(Path(module.__file__).parents[1])}
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def test_four_processes_ask_once_for_each_of_many_keys(tmp_path: Path) -> None:
    keys = 60
    workers = [spawn(WORKER, tmp_path / "cache", tmp_path / "log", keys) for _ in range(4)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    printed = [worker.communicate(timeout=300)[0].splitlines() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4
    assert Counter((tmp_path / "log").read_text().splitlines()) == {f"key {i}": 1 for i in range(keys)}
    assert all(len(lines) == 4 * keys for lines in printed)
    assert len({line for lines in printed for line in lines}) == keys  # all were told the same
    assert len({line.rpartition(" ")[2] for line in printed[0]}) > 1  # and several did the asking


HOLDER = """
import asyncio, sys
from search_backends.cache import Cache

async def compute():
    print("asking", flush=True)
    await asyncio.sleep(60)

asyncio.run(Cache(sys.argv[1], lease_s=2.0).get_or_compute("key", compute, label=""))
"""


@pytest.mark.long
def test_another_asks_when_the_process_that_did_is_killed(tmp_path: Path) -> None:
    holder = spawn(HOLDER, tmp_path / "cache")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "asking\n"

    async def run() -> None:
        backend = Backend()
        async with caches(tmp_path / "cache", 1, lease_s=2.0) as (cache,):
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


def test_the_command_line_shows_and_purges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "cache")

    async def run() -> None:
        async with caches(Path(file), 1) as (cache,):
            for query in ("[red] castle", "tower"):
                key = cache_key("text_search", "i", {"query": query})
                for _ in range(3):
                    await cache.get_or_compute(key, Backend({"found": query}, delay_s=0.0), label=query)

    asyncio.run(run())

    def says(*args: str) -> str:
        assert main(args) == 0
        return capsys.readouterr().out

    assert says("stats", file).splitlines()[:2] == ["answers 2", "hits 4"]
    assert "file ok" in says("stats", file)
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
    assert main(["stats", file + "2"]) == 1
    assert "there is no cache" in capsys.readouterr().err
    assert not Path(file + "2").exists()
