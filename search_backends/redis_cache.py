"""The shared cache in a Redis or Valkey server: equal calls get equal answers on all machines of a run.

What `search_backends.cache` says of a file holds here too: one call among equal ones, failures never
kept, the first answer stays, answers that cannot be read are replaced. Each step is one Lua script,
so that it happens whole or not at all, and time is the server's. The lease of a call is a key that
expires.

A server that is down, refuses to write or hangs costs one waiting time of `_WAIT_S` for each pause of
`cache._PAUSE_S`; in between, calls are answered without it. A full one (`maxmemory`, `noeviction`)
still gives the answers that it has.

    cache: redis://HOST:6379/0
    cache: rediss://:PASSWORD@HOST:6380/0?ssl_ca_certs=/etc/ssl/own.pem      # TLS

The password is in no message: `without_secrets` is for whatever may hold an address.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search_backends import cache
from search_backends.cache import Answer, Cache
from search_backends.errors import without_secrets

if TYPE_CHECKING:
    from redis import Redis

_PREFIX = "search-cache:1:"  # counted up where the form of what is stored changes
_WAIT_S = 2.0  # for the server, before it counts as down
_FIRST_WAITS = 5  # of these, at the start: where all of a run's processes start at once, machines are busy
_LONGEST = 1 << 24  # bytes of an answer that is kept or taken
_MESSAGE_CHARS = 2000
_REMAINS_MS = 60_000  # for which the failure of a call stays for those who wait
_SCANNED = 1000

# In each the write that a full server refuses comes first: it lets a script go on that has written.
# KEYS of all: the answer, the lease. An answer is {value, id, label, stored_at, hits}, a lease
# {token, fault, message}. `bad` is the id of an answer that the caller could not read.
_FIND = f"""
local function find(bad, max_age)
  if redis.call('HSTRLEN', KEYS[1], 'value') > {_LONGEST} then return nil end
  local found = redis.call('HMGET', KEYS[1], 'value', 'id', 'stored_at')
  if not found[1] or (found[2] or '') == bad then return nil end
  local now = redis.call('TIME')
  if max_age ~= '' and now[1] - (tonumber(found[3] or '') or 0) > tonumber(max_age) then return nil end
  return {{'found', found[1], found[2] or ''}}
end
"""
# ARGV: token, the token that was waited for, bad, max_age_s, lease in ms; 0: without a lease.
_LOOK = (
    _FIND
    + """
local found = find(ARGV[3], ARGV[4])
if found then return found end
local lease = redis.call('HMGET', KEYS[2], 'token', 'fault', 'message')
if lease[1] and not lease[2] then return {'lease', lease[1]} end
if lease[1] and lease[1] == ARGV[2] then return {'failed', lease[2], lease[3]} end
if ARGV[5] == '0' then return {'none'} end
redis.call('HSET', KEYS[2], 'token', ARGV[1])
redis.call('HDEL', KEYS[2], 'fault', 'message')
redis.call('PEXPIRE', KEYS[2], ARGV[5])
return {'lease', ARGV[1]}
"""
)
# ARGV: token, id, bad, max_age_s, value, label.
_STORE = (
    _FIND
    + """
local found = find(ARGV[3], ARGV[4])
if not found then
  local now = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'value', ARGV[5], 'id', ARGV[2], 'label', ARGV[6], 'hits', 0,
             'stored_at', now[1] .. string.format('.%06d', now[2]))
  if redis.call('HGET', KEYS[2], 'token') == ARGV[1] then redis.call('DEL', KEYS[2]) end
end
return found or {'stored'}
"""
)
# ARGV: token, fault, message. Where a failure cannot be left, the lease ends without.
_END = f"""
if redis.call('HGET', KEYS[2], 'token') ~= ARGV[1] then return end
local left = ARGV[2] ~= '' and redis.pcall('HSET', KEYS[2], 'fault', ARGV[2], 'message', ARGV[3])
if type(left) == 'number' then
  redis.call('PEXPIRE', KEYS[2], {_REMAINS_MS})
else
  redis.call('DEL', KEYS[2])
end
"""
# ARGV: token, lease in ms.
_EXTEND = "if redis.call('HGET', KEYS[2], 'token') == ARGV[1] then redis.call('PEXPIRE', KEYS[2], ARGV[2]) end"
# ARGV: count.
_HIT = "if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HINCRBY', KEYS[1], 'hits', ARGV[1]) end"


def _keys(key: str) -> list[str]:
    # Braces: where a proxy spreads keys over servers, the two stay together.
    return [f"{_PREFIX}{{{key}}}:answer", f"{_PREFIX}{{{key}}}:lease"]


def _connected(address: str) -> Redis:
    """Returns a client of a server that answers.

    Raises:
        ValueError: It does not, refuses us, or the address is none; the message holds no password.
    """
    shown = without_secrets(address)
    try:
        from redis import ConnectionError, Redis, RedisError, TimeoutError
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError:
        raise ValueError(f"the cache {shown} needs redis-py: pip install 'verl-tapo[search-redis]'") from None
    try:
        # One attempt more: a connection that was idle while the server restarted is dead.
        client = Redis.from_url(
            address,
            protocol=2,  # all servers speak it, and its refusals read better
            socket_timeout=_WAIT_S,
            socket_connect_timeout=_WAIT_S,
            retry=Retry(NoBackoff(), 1, supported_errors=(ConnectionError,)),
        )
    except ValueError:
        # What was wrong may be the password's part, so that the message is not repeated.
        raise ValueError(
            "the cache's address is not of the form redis://[[USER]:PASSWORD@]HOST[:PORT][/NUMBER]; characters like "
            "/ @ : # in a password are written %2F %40 %3A %23"
        ) from None
    try:
        patient = Retry(NoBackoff(), _FIRST_WAITS - 1, supported_errors=(TimeoutError,))
        patient.call_with_retry(client.ping, lambda _: None)
        client.eval("return 1", 0)
    except (RedisError, OSError, TypeError) as error:
        client.close()
        raise ValueError(f"the cache {shown} cannot be used: {without_secrets(str(error))}") from None
    return client


class RedisCache(Cache):
    """A cache on a server. See `Cache`, which makes one for an address.

    Raises:
        ValueError: The server does not answer or refuses us, the address is none, or redis-py is not installed.
    """

    def _connect(self, path: str | Path) -> None:
        self.path = without_secrets(str(path))
        self._client = _connected(str(path))
        from redis import ConnectionError, RedisError, TimeoutError

        self._errors = (RedisError, OSError)
        self._gone = (ConnectionError, TimeoutError, OSError)
        self._down_until = 0.0
        self._scripts = {source: self._client.register_script(source) for source in (_LOOK, _STORE, _END, _EXTEND)}
        self._age = "" if self._max_age_s is None else repr(float(self._max_age_s))
        self._lease_ms = max(1, round(1000 * self._lease_s))

    @property
    def _down(self) -> bool:
        return time.monotonic() < self._down_until

    def _run_script(self, source: str, key: str, *arguments: str | bytes | int) -> Any:
        return self._scripts[source](keys=_keys(key), args=list(arguments))

    def _look(
        self, key: str, token: str, seen: str, read: Callable[[Any], Any]
    ) -> cache._Found | cache._Failed | cache._Lease:
        bad: str | bytes = "nothing"
        try:
            while not self._down:
                lease = self._lease_ms if time.monotonic() >= self._no_writes_until else 0
                kind, *reply = self._run_script(_LOOK, key, token, seen, bad, self._age, lease)
                if kind == b"lease":
                    return cache._Lease(reply[0].decode())
                if kind == b"failed":
                    return cache._Failed(reply[0].decode(), reply[1].decode("utf-8", "replace"))
                if kind == b"none":
                    break
                found = self._read(key, reply[0], read)
                if found is not None:
                    self._count(key)
                    return found
                bad = reply[1]
        except self._errors as error:
            self._report(error)
        self.failures += 1
        return cache._UNCACHED

    def _read(self, key: str, text: bytes, read: Callable[[Any], Any]) -> cache._Found | None:
        try:
            return cache._Found(text, read(json.loads(text)))
        except Exception:  # of many kinds
            self._unreadable.add(key)
            return None

    def _store(self, key: str, token: str, label: str, text: str, read: Callable[[Any], Any]) -> cache._Found:
        value, bad = text.encode(), b"nothing"
        if not token or self._down:
            return cache._Found(text)
        if len(value) > _LONGEST:
            self.failures += 1
            self._end(key, token)
            return cache._Found(text)
        try:
            while True:
                kind, *reply = self._run_script(_STORE, key, token, token, bad, self._age, value, label)
                if kind == b"stored":
                    self._note_healed(key)
                    return cache._Found(text)
                found = self._read(key, reply[0], read)
                if found is not None:
                    self._end(key, token)
                    return found
                bad = reply[1]
        except self._errors as error:
            self.failures += 1
            self._report(error)
            self._end(key, token)
            return cache._Found(text)

    def _end(self, key: str, token: str, failed: cache._Failed | None = None) -> None:
        fault, message = ("", "") if failed is None else (failed.fault, failed.message[:_MESSAGE_CHARS])
        with self._tolerant():
            if not self._down:
                self._run_script(_END, key, token, fault, message.encode("utf-8", "replace"))

    def _extend(self, key: str, token: str) -> None:
        with self._tolerant():
            if not self._down:
                self._run_script(_EXTEND, key, token, self._lease_ms)

    def _write_hits(self) -> None:
        self._counted_at = time.monotonic()
        if not self._down:
            with self._tolerant():
                pipeline = self._client.pipeline(transaction=False)
                for key, count in self._hits.items():
                    pipeline.eval(_HIT, 1, _keys(key)[0], count)
                pipeline.execute()
                self._hits.clear()

    def _report(self, error: Exception) -> None:
        super()._report(type(error)(without_secrets(str(error))))
        if isinstance(error, self._gone):
            self._down_until = self._no_writes_until

    def _close(self) -> None:
        self._write_hits()
        self._client.close()


class Server:
    """A server as `search_backends.cache`'s command line sees it; its `Contents`."""

    def __init__(self, address: str) -> None:
        self._client = _connected(address)
        from redis import RedisError

        self.errors: tuple[type[Exception], ...] = (RedisError, OSError)

    def _scan(self, kind: str) -> Iterable[list[bytes]]:
        names = self._client.scan_iter(match=f"{_PREFIX}*:{kind}", count=_SCANNED)
        while batch := list(islice(names, _SCANNED)):
            yield batch

    def answers(self, match: str = "") -> Iterable[Answer]:
        """See `Contents`. An answer that a scan meets twice is given once."""
        seen = set()
        for names in self._scan("answer"):
            pipeline = self._client.pipeline(transaction=False)
            for name in names:
                pipeline.hmget(name, "label", "stored_at", "hits")
                pipeline.hstrlen(name, "value")
            replies = pipeline.execute()
            for name, (label, stored_at, hits), size in zip(names, replies[::2], replies[1::2], strict=True):
                label = (label or b"").decode("utf-8", "replace")
                if name not in seen and stored_at is not None and match in label:
                    seen.add(name)
                    key = name.decode()[len(_PREFIX) + 1 : -len("}:answer")]
                    yield Answer(key, label, float(stored_at), size, int(hits or 0))

    def value(self, key: str) -> bytes:
        """See `Contents`."""
        return self._client.hget(_keys(key)[0], "value") or b""  # type: ignore[return-value]

    def asking(self) -> int:
        """See `Contents`."""
        return sum(not self._client.hexists(name, "fault") for names in self._scan("lease") for name in names)

    def health(self) -> tuple[str, bool]:
        """See `Contents`."""
        info: Any = self._client.info()
        limit = info.get("maxmemory_human", "0B") if info.get("maxmemory") else "no limit"
        used, policy = info.get("used_memory_human", "?"), info.get("maxmemory_policy", "?")
        # Valkey names itself, and the version of Redis that it is like beside its own.
        name = info.get("server_name", "redis")
        version = info.get(f"{name}_version", "?")
        return f"server {name} {version}, memory {used} of {limit}, {policy}", True

    def delete(self, keys: Sequence[str]) -> None:
        """See `Contents`."""
        for start in range(0, len(keys), _SCANNED):
            self._client.unlink(*(_keys(key)[0] for key in keys[start : start + _SCANNED]))

    def close(self) -> None:
        """See `Contents`."""
        self._client.close()
