"""JSON over HTTP: limited in time and size, repeated if that may help, with a fault for every failure."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

import anyio
import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from search_backends.errors import InfrastructureError, ModelError

_DETAIL_BYTES = 4096  # of an error's body are read
_DETAIL_CHARS = 200  # of its message are shown


# A shorter key is a placeholder (such as "EMPTY"), and may be part of any word.
_SHORTEST_SECRET = 8


class _HiddenKeys(logging.Filter):
    """Takes keys out of httpx's own log lines, which show addresses with their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self._keys: set[str] = set()

    def add(self, key: str) -> None:
        if len(key) >= _SHORTEST_SECRET:
            self._keys |= {key, quote(key, safe="")}

    def hide(self, text: str) -> str:
        for key in self._keys:
            text = text.replace(key, "***")
        return text

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self.hide(record.getMessage()), ()
        return True


_hidden = _HiddenKeys()
logging.getLogger("httpx").addFilter(_hidden)


@dataclass(frozen=True)
class ApiKey:
    """A secret, and the environment variable it came from."""

    variable: str
    value: str = field(repr=False)

    def __post_init__(self) -> None:
        _hidden.add(self.value)

    @classmethod
    def from_environment(cls, variable: str) -> ApiKey:
        """The key in ``variable``.

        Raises:
            ValueError: It is not set, or holds what cannot be a key.
        """
        value = os.environ.get(variable, "").strip()
        if not value:
            raise ValueError(f"the environment variable {variable} is not set: put the provider's API key there")
        if not value.isascii() or not value.isprintable() or " " in value:
            raise ValueError(f"the environment variable {variable} holds spaces or odd characters: it is no API key")
        return cls(variable, value)


class BackendError(InfrastructureError):
    """A back end that did not answer, or not with JSON and a status of 2xx."""

    def __init__(
        self, message: str, status: int | None = None, *, transient: bool = False, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(message)
        self.status = status
        """The status of the answer; None without an answer."""
        self.transient = transient
        """True if another attempt may succeed."""
        self.retry_after_s = retry_after_s
        """Not before, says the back end."""


def checked_address(url: str) -> httpx.URL:
    """``url``, which must be http or https, with a host, without user and password.

    Raises:
        ValueError
    """
    try:
        address = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        address = httpx.URL()
    if address.scheme not in ("http", "https") or not address.host or address.userinfo:
        raise ValueError("must be an http or https address without user and password")
    return address


@dataclass(frozen=True)
class _Session:
    client: httpx.AsyncClient
    places: asyncio.Semaphore


class JsonClient:
    """A back end. May be made anywhere; connections are opened in the event loop that asks, one pool for each.

    Tried again, with random growing pauses (or the one that Retry-After names): 429, 5xx, lost and refused connections,
    timeouts. Redirects are not followed.

    Args:
        base_url: http or https.
        timeout_s: of a call, with waiting for a place, attempts and pauses. An attempt gets half of it at most, so that
            there is time for another.
        attempts: the maximal number of attempts of a call.
        concurrency: attempts at a time, in one event loop.
        max_bytes: the maximal size of an answer; a longer one is an error.
        headers: sent with every request.
        key: the secret among headers or parameters: it appears in no message, and 401, 402 and 403 name its variable.
        query_fault: a refusal (400, 413, 422) that it matches is the query's fault, and a ModelError.

    Raises:
        ValueError: ``base_url`` is no such address.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float,
        attempts: int,
        concurrency: int,
        max_bytes: int,
        headers: Mapping[str, str] | None = None,
        key: ApiKey | None = None,
        query_fault: re.Pattern[str] | None = None,
    ) -> None:
        self.name = checked_address(base_url).netloc.decode()
        """Host and port."""
        self.losses = 0
        """How often there was no answer at all; the back end may have been replaced since."""
        self._base_url, self._headers, self._key, self._query_fault = base_url, dict(headers or {}), key, query_fault
        self._timeout_s, self._attempts = timeout_s, attempts
        self._concurrency, self._max_bytes = concurrency, max_bytes
        self._sessions: dict[asyncio.AbstractEventLoop, _Session] = {}
        self._lock = threading.Lock()

    async def post(self, path: str, body: Any) -> Any:
        """The JSON that ``path`` answers to the JSON ``body``.

        Raises:
            ModelError: The back end blames the query, or it cannot even be sent: it holds half of a surrogate pair.
            BackendError: Anything else.
        """
        return await self._call("POST", path, json=body)

    async def get(self, path: str, params: Mapping[str, str | int] | None = None) -> Any:
        """The JSON that ``path`` answers; raises as `post` does."""
        return await self._call("GET", path, params=params)

    async def close(self) -> None:
        """Closes this event loop's connections; the client can be used again."""
        with self._lock:
            session = self._sessions.pop(asyncio.get_running_loop(), None)
        if session is not None:
            await session.client.aclose()

    def _session(self) -> _Session:
        loop = asyncio.get_running_loop()
        with self._lock:
            for other in [other for other in self._sessions if other.is_closed()]:
                del self._sessions[other]
            if loop not in self._sessions:
                limits = httpx.Limits(max_keepalive_connections=self._concurrency, keepalive_expiry=30.0)
                client = httpx.AsyncClient(
                    base_url=self._base_url, headers=self._headers, limits=limits, timeout=None, follow_redirects=False
                )
                self._sessions[loop] = _Session(client, asyncio.Semaphore(self._concurrency))
            return self._sessions[loop]

    async def _call(self, method: str, path: str, **content: Any) -> Any:
        session, tries = self._session(), 0
        try:
            with anyio.fail_after(self._timeout_s):
                async for attempt in AsyncRetrying(
                    retry=retry_if_exception(lambda error: isinstance(error, BackendError) and error.transient),
                    stop=stop_after_attempt(self._attempts) | stop_before_delay(self._timeout_s),
                    wait=_pause_s,
                    reraise=True,
                ):
                    with attempt:
                        tries += 1
                        async with session.places:
                            return await self._attempt(session.client, method, path, content)
        except TimeoutError:
            self.losses += 1
            error = BackendError(f"no answer within {self._timeout_s:g} s")
        except BackendError as failure:
            error = failure
        text = f"{self.name}: {error} ({tries} attempt{'s' if tries > 1 else ''})"
        raise BackendError(_hidden.hide(text), error.status) from None

    async def _attempt(self, client: httpx.AsyncClient, method: str, path: str, content: Mapping[str, Any]) -> Any:
        limit_s = self._timeout_s / min(self._attempts, 2)
        try:
            with anyio.fail_after(limit_s):
                async with client.stream(method, path, **content) as response:
                    if not response.is_success:
                        raise self._status_error(response, await _read(response, _DETAIL_BYTES, cut=True))
                    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
                    if kind != "application/json" and not kind.endswith("+json"):
                        raise BackendError(f"answered {kind or 'something'}, not JSON", response.status_code)
                    body = await _read(response, self._max_bytes)
        except TimeoutError:
            self.losses += 1
            raise BackendError(f"no answer within {limit_s:g} s", transient=True) from None
        except UnicodeEncodeError:
            raise ModelError("the text contains an unpaired surrogate, which is not valid") from None
        except httpx.TransportError as error:
            self.losses += 1
            raise BackendError(f"{type(error).__name__}: {error}", transient=True) from None
        except httpx.HTTPError as error:  # an encoding that is broken
            raise BackendError(f"{type(error).__name__}: {error}") from None
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise BackendError("the answer is not valid JSON", response.status_code) from None

    def _status_error(self, response: httpx.Response, body: bytes) -> Exception:
        status, text = response.status_code, body.decode("utf-8", "replace")
        said = _hidden.hide(_message(text))
        if status == 429 or status >= 500:
            after = _retry_after_s(response.headers.get("retry-after", ""))
            return BackendError(f"{status} {said}".rstrip(), status, transient=True, retry_after_s=after)
        if status in (400, 413, 422) and self._query_fault is not None and self._query_fault.search(text):
            return ModelError(f"the request was refused: {said}")
        if status in (401, 402, 403) and self._key is not None:
            return BackendError(f"{status} {said}; check {self._key.variable}", status)
        if response.is_redirect:
            return BackendError(f"{status}, a redirect, which is not followed: check the address", status)
        return BackendError(f"{status} {said}".rstrip(), status)


async def _read(response: httpx.Response, max_bytes: int, cut: bool = False) -> bytes:
    """The body, decoded; one that is longer is an error or, with ``cut``, only read so far."""
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > max_bytes:
            if cut:
                break
            raise BackendError(f"the answer is longer than {max_bytes} bytes", response.status_code)
    return bytes(body[:max_bytes])


def _message(text: str) -> str:
    """Returns the message in an error's body, in one line."""
    try:
        value = json.loads(text)
        while isinstance(value, dict):
            value = next((value[name] for name in ("message", "error", "detail") if value.get(name)), text)
        text = str(value)
    except (ValueError, RecursionError):
        pass
    return " ".join(text.split())[:_DETAIL_CHARS]


def _retry_after_s(value: str) -> float:
    """Returns the seconds of a Retry-After header, given as seconds or as a date; 0 if it is
    neither."""
    try:
        return max(
            0.0, float(value) if value.strip().isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
        )
    except (ValueError, TypeError, OverflowError):
        return 0.0


_jitter = wait_random_exponential(multiplier=0.5, max=8)


def _pause_s(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    return _jitter(state) + (error.retry_after_s if isinstance(error, BackendError) else 0.0)
