"""The answers of a run's tools, shared by all its processes: equal calls get equal answers.

TAPO compares trajectories by their calls, and so assumes that an answer depends on the call alone.
Live search breaks that within minutes. This cache restores it and saves the cost of repeated calls.

Among equal calls at the same time, in one process or many, one asks and the others wait for its
answer. It holds a lease, which it renews while it asks. If its process dies, the lease runs out and
another takes over. If the call fails, all waiters get its error, without asking a failing back end
again; if it is cancelled, one takes over. Failures are never stored: the next call asks. An answer
that cannot be read, because it is damaged or from another version, is asked for again and replaced.

    python -m search_backends.cache stats|list|show|purge PLACE

A place is a file, for the processes of one machine, or an address ``redis://HOST:6379/0``, for those of
many (`search_backends.redis_cache`). A file may be on any local disk, not on a network file system:
SQLite's write-ahead log needs shared memory.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import heapq
import json
import logging
import math
import sqlite3
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from uuid import uuid4

from search_backends.errors import InfrastructureError, ModelError, without_secrets

logger = logging.getLogger(__name__)

_APPLICATION_ID = 0x7A90CAC4  # in the file's header: it is one of ours
_VERSION = 1
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, label TEXT NOT NULL, value TEXT NOT NULL, stored_at REAL NOT NULL,
    hits INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS leases (
    key TEXT PRIMARY KEY, token TEXT NOT NULL, expires_at REAL NOT NULL, fault TEXT, message TEXT);
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_VERSION}
"""
# Of a larger file only the head is checked when it is opened; `stats` reads all of it.
_CHECKED_BYTES = 1 << 28
_BUSY_S = 2.0  # for which another process may hold the file
# After a failed write there are none for this long, so that calls do not queue behind a full
# disk.
_PAUSE_S = 10.0
_HITS_S = 1.0  # between two counts that are written
_POLL_S = (0.005, 0.25)  # first and longest pause of a call that waits for another process
_LABEL_CHARS = 300
_LONG_BITS = 4096
_REMAINS_S = 3600.0  # for which the lease of a call that died or failed stays in the file
_WAL_TRIES = 20

T = TypeVar("T")


def cache_key(tool: str, identity: str, arguments: Mapping[str, Any], images: Sequence[bytes] = ()) -> str:
    """Returns the key that a call is stored under: 64 hexadecimal digits.

    Calls that TAPO's exact kernel takes for equal have equal keys: strings are NFKC-normalised, stripped, white space
    folded; 2.0 is 2; the order of keys does not matter.

    Args:
        tool: its name.
        identity: the provider's identity, see `search_backends.results`.
        arguments: JSON.
        images: the encoded images that the call refers to.

    Raises:
        TypeError: An argument is no JSON.
    """
    hashes = [hashlib.sha256(image).hexdigest() for image in images]
    return hashlib.sha256(json.dumps([tool, identity, _canonical(arguments), hashes]).encode()).hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFKC", value).split())
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    # Python refuses to print integers of thousands of digits.
    if isinstance(value, int) and value.bit_length() > _LONG_BITS:
        return {"integer": hex(value)}
    if isinstance(value, Mapping):
        return {"mapping": sorted(([_canonical(str(name)), _canonical(item)] for name, item in value.items()), key=str)}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return value


@dataclass(frozen=True)
class _Found:
    text: str | bytes
    """JSON."""
    value: Any = None
    """The parsed value, for the call that looked it up."""


@dataclass(frozen=True)
class _Failed:
    fault: str
    message: str

    @classmethod
    def of(cls, error: Exception) -> _Failed:
        if isinstance(error, ModelError):
            return cls("model", str(error))
        known = isinstance(error, InfrastructureError)
        return cls("infrastructure", str(error) if known else f"an equal call failed: {type(error).__name__}: {error}")


@dataclass(frozen=True)
class _Lease:
    """The lease of the call with this token: our own, or one to wait for."""

    token: str


_UNCACHED = _Lease("")


def _parse(outcome: _Found | _Failed, read: Callable[[Any], T]) -> T:
    if isinstance(outcome, _Failed):
        raise (ModelError if outcome.fault == "model" else InfrastructureError)(outcome.message)
    return read(json.loads(outcome.text))


def _as_it_is(value: Any) -> Any:
    return value


def is_address(place: str | Path) -> bool:
    """Returns whether a cache's place is the address of a server."""
    return isinstance(place, str) and place.startswith(("redis://", "rediss://"))


class Cache:
    """A file of answers. One object serves any number of tasks; any number of processes may share the file.

    A file that cannot be read or written later on does not stop a run: calls are answered without it, `failures` counts
    them, and a warning is logged. With an address it is a `search_backends.redis_cache.RedisCache`, of which the same
    holds.

    Args:
        path: made where it is missing, with its folders. Or ``redis://HOST:6379/0``.
        max_age_s: answers older than that are asked for again. None: they stay.
        lease_s: after which a call that died with its process is made by another. A living one renews its lease.

    Raises:
        ValueError: The file is damaged, is something else, or cannot be used.
    """

    _errors: tuple[type[Exception], ...] = (sqlite3.Error,)
    """What the file or the server may raise."""

    def __new__(cls, path: str | Path, **settings: Any) -> Cache:
        """Makes a cache of the place's kind."""
        if cls is Cache and is_address(path):
            from search_backends.redis_cache import RedisCache

            return object.__new__(RedisCache)
        return object.__new__(cls)

    def __init__(self, path: str | Path, *, max_age_s: float | None = None, lease_s: float = 15.0) -> None:
        if lease_s <= 0 or (max_age_s is not None and max_age_s <= 0):
            raise ValueError(f"cache: max_age_s and lease_s must be positive, got {max_age_s!r} and {lease_s!r}")
        self.failures = 0
        """Calls that the file could not serve."""
        self.healed = 0
        """Answers that could not be read, and were replaced."""
        self._max_age_s, self._lease_s = max_age_s, lease_s
        self._flights: dict[tuple[asyncio.AbstractEventLoop, str], asyncio.Future[_Found | _Failed | None]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search-cache")
        # What follows is used in that thread alone.
        self._connect(path)
        self._hits: Counter[str] = Counter()
        self._unreadable: set[str] = set()  # keys of such answers that were seen
        self._counted_at = self._no_writes_until = 0.0

    async def get_or_compute(
        self,
        key: str,
        compute: Callable[[], Awaitable[Any]],
        *,
        label: str,
        read: Callable[[Any], T] = _as_it_is,
    ) -> tuple[T, bool]:
        """The answer under ``key``, and whether it was had without ``compute``.

        Args:
            key: see `cache_key`.
            compute: asks for the answer: JSON.
            label: a readable name for listings.
            read: turns that JSON into the return value. An answer at which it raises is asked for again.

        Raises:
            ModelError, InfrastructureError: As ``compute`` does, in this call or in an equal one that it waited for.
            TypeError: ``compute`` gave no JSON.
        """
        place = (asyncio.get_running_loop(), key)
        while (flight := self._flights.get(place)) is not None:
            outcome = await asyncio.shield(flight)
            if outcome is not None:  # else that call was cancelled
                if isinstance(outcome, _Found):
                    self._thread.submit(self._count, key)
                return _parse(outcome, read), True
        flight = self._flights[place] = place[0].create_future()
        outcome = None
        try:
            state = await self._find_or_lease(key, read)
            if isinstance(state, _Lease):
                try:
                    outcome = await self._compute(key, state.token, compute, label, read)
                except Exception as error:
                    outcome = _Failed.of(error)
                    raise
            else:
                outcome = state
        finally:
            del self._flights[place]
            flight.set_result(outcome)
        if isinstance(state, _Found):
            return state.value, True
        return _parse(outcome, read), not isinstance(state, _Lease)

    async def close(self) -> None:
        """Writes the counts of hits and closes the file."""
        await self._run(self._close)
        self._thread.shutdown()

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def _find_or_lease(self, key: str, read: Callable[[Any], Any]) -> _Found | _Failed | _Lease:
        """Returns the answer, or the failure of the call that was waited for, or our lease."""
        token, seen, pause_s = uuid4().hex, "", _POLL_S[0]
        while True:
            state = await self._run(self._look, key, token, seen, read)
            if not isinstance(state, _Lease) or state.token == token or state is _UNCACHED:
                return state
            seen = state.token
            await asyncio.sleep(pause_s)
            pause_s = min(1.5 * pause_s, _POLL_S[1])

    async def _compute(
        self, key: str, token: str, compute: Callable[[], Awaitable[Any]], label: str, read: Callable[[Any], Any]
    ) -> _Found:
        """Makes the call and returns what is stored under ``key`` afterwards; an earlier answer
        stays."""
        renewal = asyncio.create_task(self._renew(key, token))
        try:
            text = json.dumps(await compute())
        except Exception as error:
            self._thread.submit(self._end, key, token, _Failed.of(error))
            raise
        except BaseException:
            self._thread.submit(self._end, key, token)
            raise
        finally:
            renewal.cancel()
        label = label[:_LABEL_CHARS].encode("utf-8", "replace").decode()
        return await self._run(self._store, key, token, label, text, read)

    async def _renew(self, key: str, token: str) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            await self._run(self._extend, key, token)

    def _connect(self, path: str | Path) -> None:
        self.path: Path | str = Path(path)
        self._database = _open(Path(path))

    # In the thread.

    def _look(self, key: str, token: str, seen: str, read: Callable[[Any], Any]) -> _Found | _Failed | _Lease:
        try:
            state = self._state(key, seen, read)
            if state is None:
                if time.monotonic() < self._no_writes_until:
                    self.failures += 1
                    return _UNCACHED
                with self._database:
                    self._database.execute("BEGIN IMMEDIATE")
                    state = self._state(key, seen, read)  # another may have been faster
                    if state is None:
                        values = (key, token, time.time() + self._lease_s)
                        self._database.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, NULL, NULL)", values)
                        state = _Lease(token)
        except sqlite3.Error as error:
            self.failures += 1
            self._report(error)
            return _UNCACHED
        if isinstance(state, _Found):
            self._count(key)
        return state

    def _state(self, key: str, seen: str, read: Callable[[Any], Any]) -> _Found | _Failed | _Lease | None:
        """Returns None if this call may be made; ``seen`` is the token of the call that was waited
        for."""
        found = self._find(key, read)
        if found is not None:
            return found
        query = "SELECT token, expires_at, fault, message FROM leases WHERE key = ?"
        row = self._database.execute(query, (key,)).fetchone()
        if row is None:
            return None
        token, expires_at, fault, message = row
        if fault is not None:
            return _Failed(fault, message) if token == seen else None
        # One that runs for longer than any lease is from before the clock was set back.
        living = isinstance(expires_at, float) and 0 < expires_at - time.time() <= self._lease_s
        return _Lease(token) if living else None

    def _find(self, key: str, read: Callable[[Any], Any]) -> _Found | None:
        since = 0.0 if self._max_age_s is None else time.time() - self._max_age_s
        # As bytes: whatever is there, SQLite can give it.
        query = "SELECT CAST(value AS BLOB) FROM answers WHERE key = ? AND stored_at >= ?"
        row = self._database.execute(query, (key, since)).fetchone()
        if row is None:
            return None
        try:
            return _Found(row[0], read(json.loads(row[0])))
        except Exception:  # of many kinds
            self._unreadable.add(key)
            return None

    def _store(self, key: str, token: str, label: str, text: str, read: Callable[[Any], Any]) -> _Found:
        found = None
        if token:
            with self._tolerant(), self._database:
                self._database.execute("BEGIN IMMEDIATE")
                found = self._find(key, read)
                if found is None:
                    values = (key, label, text, time.time())
                    self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, 0)", values)
                    self._note_healed(key)
                self._database.execute("DELETE FROM leases WHERE key = ? AND token = ?", (key, token))
        return found or _Found(text)

    def _note_healed(self, key: str) -> None:
        if key in self._unreadable:
            self._unreadable.discard(key)
            self.healed += 1
            if self.healed == 1:
                logger.warning(
                    "cache %s: an answer was damaged or another version's; it and others like it are asked for anew",
                    self.path,
                )

    def _end(self, key: str, token: str, failed: _Failed | None = None) -> None:
        """Ends a lease without an answer. A failure is left for those who wait."""
        with self._tolerant():
            if failed is None:
                self._database.execute("DELETE FROM leases WHERE key = ? AND token = ?", (key, token))
            else:
                values = (failed.fault, failed.message, key, token)
                self._database.execute("UPDATE leases SET fault = ?, message = ? WHERE key = ? AND token = ?", values)

    def _extend(self, key: str, token: str) -> None:
        with self._tolerant():
            values = (time.time() + self._lease_s, key, token)
            self._database.execute("UPDATE leases SET expires_at = ? WHERE key = ? AND token = ?", values)

    def _count(self, key: str) -> None:
        self._hits[key] += 1
        if time.monotonic() > max(self._counted_at + _HITS_S, self._no_writes_until):
            self._write_hits()

    def _write_hits(self) -> None:
        self._counted_at = time.monotonic()
        with self._tolerant(), self._database:
            self._database.execute("BEGIN IMMEDIATE")
            counts = [(count, key) for key, count in self._hits.items()]
            self._database.executemany("UPDATE answers SET hits = hits + ? WHERE key = ?", counts)
            self._database.execute("DELETE FROM leases WHERE expires_at < ?", (time.time() - _REMAINS_S,))
            self._hits.clear()

    def _close(self) -> None:
        self._write_hits()
        self._database.close()

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            self._report(error)

    def _report(self, error: Exception) -> None:
        now = time.monotonic()
        if now >= self._no_writes_until:
            logger.warning(
                "cache %s: %s; for %g s answers are not kept (calls without the cache so far: %d)",
                self.path,
                error,
                _PAUSE_S,
                self.failures,
            )
            self._no_writes_until = now + _PAUSE_S


def _open(path: Path, create: bool = True) -> sqlite3.Connection:
    """A checked connection, for whatever thread; makes the file.

    Raises:
        ValueError
    """
    try:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        elif not path.is_file():
            raise ValueError(f"there is no cache {path}")
        database = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            _prepare(database, path)
        except BaseException:
            database.close()
            raise
    except (OSError, sqlite3.Error) as error:
        raise ValueError(f"the cache {path} cannot be used: {error}; delete it or name another file") from None
    return database


def _prepare(database: sqlite3.Connection, path: Path) -> None:
    def number(pragma: str) -> Any:
        return database.execute(f"PRAGMA {pragma}").fetchone()[0]

    database.execute("PRAGMA synchronous = NORMAL")  # what a power cut may cost is asked for again
    if number("application_id") != _APPLICATION_ID:
        with database:
            database.execute("BEGIN IMMEDIATE")
            if database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                for statement in _SCHEMA.split(";"):
                    database.execute(statement)
    if (number("application_id"), number("user_version")) != (_APPLICATION_ID, _VERSION):
        raise ValueError(f"{path} is no cache of this version: delete it or name another file")
    if path.stat().st_size <= _CHECKED_BYTES:
        found = number("quick_check(1)")
        if found != "ok":
            raise ValueError(f"the cache {path} is damaged: {' '.join(found.split())}; delete it or name another file")
    for _ in range(_WAL_TRIES):  # the switch does not wait for others that are just making it
        try:
            if number("journal_mode = WAL") == "wal":
                break
        except sqlite3.OperationalError:
            time.sleep(_BUSY_S / _WAL_TRIES)
    else:
        raise ValueError(f"the cache {path} cannot have a write-ahead log: put it on a local disk")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m search_backends.cache",
        description="Looks into a cache of answers: a file, or redis://HOST:6379/0.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    stats = commands.add_parser("stats", help="how much there is; checks the whole of a file")
    listing = commands.add_parser("list", help="answers, the latest first")
    show = commands.add_parser("show", help="one answer")
    purge = commands.add_parser("purge", help="deletes answers")
    for command in (stats, listing, show, purge):
        command.add_argument("place", metavar="PLACE")
    show.add_argument("key", help="or its first digits")
    which = purge.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true")
    which.add_argument("--older-than", type=float, metavar="SECONDS")
    which.add_argument("--match", metavar="TEXT", help="in the label")
    listing.add_argument("--match", metavar="TEXT", help="in the label")
    listing.add_argument("--limit", type=int, default=50)
    arguments = parser.parse_args(argv)
    errors: tuple[type[Exception], ...] = (ValueError,)
    try:
        with closing(_contents(arguments.place)) as contents:
            errors += contents.errors
            return _COMMANDS[arguments.command](contents, arguments)
    except errors as error:
        print(f"search_backends.cache: {without_secrets(str(error))}", file=sys.stderr)
        return 1


class Answer(NamedTuple):
    """An answer in a listing."""

    key: str
    label: str
    stored_at: float
    size: int
    """In characters."""
    hits: int


class Contents(Protocol):
    """A place as the command line sees it."""

    errors: tuple[type[Exception], ...]
    """What its methods raise where it fails."""

    def answers(self, match: str = "") -> Iterable[Answer]:
        """Returns the answers with that text in their labels."""
        ...

    def value(self, key: str) -> str | bytes:
        """Returns the JSON under a key."""
        ...

    def asking(self) -> int:
        """Returns how many calls are being made."""
        ...

    def health(self) -> tuple[str, bool]:
        """Returns the state of the place in words, and whether all is well."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Deletes answers."""
        ...

    def close(self) -> None:
        """Ends the connection."""
        ...


class _File:
    errors: tuple[type[Exception], ...] = (sqlite3.Error,)

    def __init__(self, path: Path) -> None:
        self._database = _open(path, create=False)

    def answers(self, match: str = "") -> Iterable[Answer]:
        query = "SELECT key, label, stored_at, length(value), hits FROM answers WHERE instr(label, ?)"
        return map(Answer._make, self._database.execute(query, (match,)))

    def value(self, key: str) -> str | bytes:
        query = "SELECT CAST(value AS BLOB) FROM answers WHERE key = ?"
        value: bytes = self._database.execute(query, (key,)).fetchone()[0]
        return value

    def asking(self) -> int:
        query = "SELECT count(*) FROM leases WHERE fault IS NULL AND expires_at > ?"
        count: int = self._database.execute(query, (time.time(),)).fetchone()[0]
        return count

    def health(self) -> tuple[str, bool]:
        damage = self._database.execute("PRAGMA integrity_check(1)").fetchone()[0]
        return f"file {damage}", damage == "ok"

    def delete(self, keys: Sequence[str]) -> None:
        self._database.executemany("DELETE FROM answers WHERE key = ?", [(key,) for key in keys])
        self._database.execute("VACUUM")

    def close(self) -> None:
        self._database.close()


def _contents(place: str) -> Contents:
    if is_address(place):
        from search_backends.redis_cache import Server

        return Server(place)
    return _File(Path(place))


def _print_stats(contents: Contents, arguments: argparse.Namespace) -> int:
    count = size = hits = 0
    oldest = math.inf
    for answer in contents.answers():
        count, size, hits = count + 1, size + answer.size, hits + answer.hits
        oldest = min(oldest, answer.stored_at)
    state, well = contents.health()
    print(f"answers {count}\nhits {hits}\ncharacters {size}\noldest {_age(oldest) if count else '-'}")
    print(f"being asked {contents.asking()}\n{state}")
    return 0 if well else 1


def _print_list(contents: Contents, arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    latest = heapq.nlargest(arguments.limit, contents.answers(arguments.match or ""), key=lambda each: each.stored_at)
    table = Table("key", "label", *(Column(name, justify="right") for name in ("age", "characters", "hits")))
    for key, label, stored_at, size, hits in latest:
        table.add_row(key[:12], Text(label), _age(stored_at), str(size), str(hits))
    Console().print(table)
    return 0


def _print_answer(contents: Contents, arguments: argparse.Namespace) -> int:
    found = [each for each in contents.answers() if each.key.startswith(arguments.key)]
    if len(found) != 1:
        raise ValueError(f"{'no key begins' if not found else 'several keys begin'} with {arguments.key}")
    (key, label, stored_at, _, hits) = found[0]
    print(f"key {key}\nlabel {label}\nage {_age(stored_at)}\nhits {hits}")
    value = contents.value(key)
    try:
        print(json.dumps(json.loads(value), indent=2, ensure_ascii=False))
    except (ValueError, RecursionError):  # damaged: the next call replaces it
        print(value if isinstance(value, str) else value.decode("utf-8", "replace"))
    return 0


def _purge(contents: Contents, arguments: argparse.Namespace) -> int:
    before = time.time() - (arguments.older_than or 0.0)
    answers = contents.answers(arguments.match or "")
    keys = [each.key for each in answers if arguments.older_than is None or each.stored_at <= before]
    contents.delete(keys)
    print(f"deleted {len(keys)}")
    return 0


_COMMANDS = {"stats": _print_stats, "list": _print_list, "show": _print_answer, "purge": _purge}


def _age(stored_at: float) -> str:
    seconds = max(0.0, time.time() - stored_at)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
