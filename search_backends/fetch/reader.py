"""The provider of pages that fetches them itself."""

from __future__ import annotations

import asyncio
import hashlib
import queue
import threading
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any
from urllib.robotparser import RobotFileParser
from weakref import WeakKeyDictionary, WeakValueDictionary

import anyio
import httpcore
import httpx
from cachetools import TTLCache
from pydantic import Field

from search_backends.errors import InfrastructureError, ModelError
from search_backends.fetch.extract import ExtractionFailed, Extractor, PageAtFault, is_readable
from search_backends.fetch.fetcher import Fetched, SafeFetcher
from search_backends.fetch.guard import Resolver, check_url
from search_backends.providers.base import Settings, settings_of
from search_backends.results import Page

_ROBOTS_BYTES = 512 * 1024  # of a robots.txt are read; RFC 9309 asks for 500 KiB
_ROBOTS_S = 3600.0  # for which its rules are kept
_ROBOTS_HOSTS = 4096
_REFUSED_S = 3600.0  # for which a page that cannot be worked through is not tried again
_REFUSED_PAGES = 4096
_TOO_LARGE = "the page is too large or too complex to read; choose another"


class DirectSettings(Settings):
    """Settings of ``provider: direct``."""

    timeout_s: float = Field(40.0, gt=0)
    """Seconds for a page, from the wait for a place to its last byte."""
    attempts: int = Field(3, ge=1)
    max_bytes: int = Field(5 << 20, ge=1024)
    """The maximal size of a page; longer ones are refused."""
    max_redirects: int = Field(5, ge=0)
    allowed_ports: tuple[int, ...] = (80, 443)
    user_agent: str = "search-agent/1.0"
    """Put an address there under which you can be reached."""
    respect_robots: bool = True
    """If true, pages that the site's robots.txt forbids are not read."""
    proxy: str | None = None
    """Fetch through this; then it, and not this package, must keep requests out of private networks."""
    concurrency: int = Field(32, ge=1)
    """Pages at a time, in one event loop."""
    per_host: int = Field(2, ge=1)
    """Pages of one host at a time, in one event loop."""
    extractors: int = Field(2, ge=1)
    """Processes that turn pages into text."""
    extraction_timeout_s: float = Field(20.0, gt=0)
    """Seconds for extracting a page's text, including the wait for a core."""
    extraction_cpu_s: float = Field(2.0, gt=0)
    """Seconds of a core that a page may use; beyond them the page is at fault."""
    max_chars: int = Field(200_000, ge=1000)
    """The number of characters of a page's text that are kept."""


class DirectReader:
    """Reads the text of web pages, plain texts and JSON. See `SafeFetcher` for the addresses it
    refuses.

    Args:
        config: `DirectSettings`.
        resolver: resolves hosts; the system's by default.
        connector: opens connections; plain TCP.

    Raises:
        ValueError: A setting is unknown or out of range.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        resolver: Resolver | None = None,
        connector: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        self._settings = settings = settings_of(DirectSettings, "direct", config)
        self._fetcher = SafeFetcher(
            timeout_s=settings.timeout_s,
            max_bytes=settings.max_bytes,
            max_redirects=settings.max_redirects,
            user_agent=settings.user_agent,
            allowed_ports=settings.allowed_ports,
            attempts=settings.attempts,
            resolver=resolver,
            connector=connector,
            proxy=settings.proxy,
        )
        self.identity = (
            f"direct trafilatura {version('trafilatura')} {settings.user_agent} {settings.max_bytes} "
            f"{settings.max_chars} {settings.respect_robots}"
        )
        self._robots: TTLCache[str, RobotFileParser] = TTLCache(_ROBOTS_HOSTS, _ROBOTS_S)
        self._refused: TTLCache[str, bool] = TTLCache(_REFUSED_PAGES, _REFUSED_S)  # addresses, and hashes of pages
        self._lock = threading.Lock()  # of the line above
        self._places: WeakKeyDictionary[asyncio.AbstractEventLoop, _Places] = WeakKeyDictionary()
        self._threads = ThreadPoolExecutor(settings.extractors, thread_name_prefix="search-extract")
        self._extractors: queue.SimpleQueue[Extractor] = queue.SimpleQueue()
        for _ in range(settings.extractors):
            self._extractors.put(Extractor())

    async def read(self, url: str) -> Page:
        settings = self._settings
        address = check_url(url, settings.allowed_ports)
        if self._is_hopeless(str(address)):
            raise ModelError(_TOO_LARGE)
        loop = asyncio.get_running_loop()
        places = self._places.setdefault(loop, _Places(settings.concurrency, settings.per_host))
        try:
            with anyio.fail_after(settings.timeout_s):
                async with places.take(address.host):
                    if settings.respect_robots and not await self._allowed(address):
                        raise ModelError("the site does not let programs read this page; choose another")
                    found = await self._fetcher.fetch(url, accepts=is_readable)
        except TimeoutError:
            raise InfrastructureError(f"{address.host}: no answer within {settings.timeout_s:g} s") from None
        title, text = await loop.run_in_executor(self._threads, self._extract, str(address), found)
        if not text.strip():
            raise ModelError("the page has no readable text; choose another")
        return Page(found.url, text, title)

    async def close(self) -> None:
        """Ends the processes; they start again when they are needed."""
        for _ in range(self._settings.extractors):
            await asyncio.get_running_loop().run_in_executor(self._threads, self._close_one)

    async def _allowed(self, address: httpx.URL) -> bool:
        """Returns whether robots.txt allows the requested address; the target of a redirect is not
        checked."""
        site = address.copy_with(path="/robots.txt", query=None, fragment=None)
        rules: RobotFileParser | None = self._robots.get(str(site))
        if rules is None:
            try:
                text = (await self._fetcher.fetch(str(site))).body[:_ROBOTS_BYTES].decode("utf-8", "replace")
            except ModelError:  # the site has no robots.txt
                text = ""
            rules = RobotFileParser()
            await asyncio.to_thread(rules.parse, text.splitlines())
            self._robots[str(site)] = rules
        return rules.can_fetch(self._settings.user_agent, str(address))

    # In a thread.

    def _extract(self, address: str, found: Fetched) -> tuple[str, str]:
        settings = self._settings
        page = hashlib.sha256(found.content_type.encode() + b"\0" + found.body).hexdigest()
        extractor = self._extractors.get()
        try:
            if self._is_hopeless(page):  # under another address
                raise PageAtFault
            return extractor.extract(
                found.body,
                found.content_type,
                max_chars=settings.max_chars,
                timeout_s=settings.extraction_timeout_s,
                cpu_s=settings.extraction_cpu_s,
            )
        except PageAtFault:
            with self._lock:
                self._refused[address] = self._refused[page] = True
            raise ModelError(_TOO_LARGE) from None
        except ExtractionFailed as error:
            raise InfrastructureError(f"a page's text could not be extracted {error}") from None
        finally:
            self._extractors.put(extractor)

    def _is_hopeless(self, page: str) -> bool:
        """Returns whether a page, given by address or hash, recently failed to be processed."""
        with self._lock:
            return page in self._refused

    def _close_one(self) -> None:
        extractor = self._extractors.get()
        extractor.close()
        self._extractors.put(extractor)


class _Places:
    """Limits how many pages are read at a time, in one event loop."""

    def __init__(self, total: int, per_host: int) -> None:
        self._total, self._per_host = asyncio.Semaphore(total), per_host
        self._hosts: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def take(self, host: str) -> AsyncIterator[None]:
        own = self._hosts.setdefault(host, asyncio.Semaphore(self._per_host))
        # The order matters: pages that wait for their host must not block the others.
        async with own, self._total:
            yield
