"""GET of an address that a model chose: guarded at every hop, bounded in time, hops and bytes."""

from __future__ import annotations

import logging
import re
import ssl
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass

import anyio
import httpcore
import httpx
from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from search_backends.errors import InfrastructureError, ModelError
from search_backends.fetch.guard import GuardedBackend, Resolver, SystemResolver, check_url

logger = logging.getLogger(__name__)

_REDIRECTS = (301, 302, 303, 307, 308)
_TRANSIENT = (408, 425, 429)  # and 5xx
_ACCEPT = "text/html,text/plain,*/*;q=0.5"
_KIND = re.compile(r"[\w.+-]{1,40}/[\w.+-]{1,60}", re.ASCII)


@dataclass(frozen=True)
class Fetched:
    """The content of an address."""

    url: str
    """The address after redirects."""
    status: int
    content_type: str
    """The header, as sent."""
    body: bytes
    """Decompressed."""


class SafeFetcher:
    """Reads public http and https addresses. One object serves any number of tasks and event loops.

    Hosts are resolved here, all their addresses must be public, and the connection goes to one of these; each redirect
    is checked anew, and none leads from https to http. No cookies, no credentials; proxies of the environment are not
    used. Tried again, with random growing pauses: 408, 425, 429, 5xx, lost and refused connections, timeouts.

    Args:
        timeout_s: seconds for a fetch, with all hops, attempts and pauses. An attempt gets half of it at most.
        max_bytes: the maximal size of a body, compressed or not; a longer one is refused.
        max_redirects: the maximal number of redirects of a fetch.
        user_agent: the User-Agent header.
        allowed_ports: the ports that addresses may have.
        attempts: the maximal number of attempts of a fetch.
        resolver: resolves hosts; the system's by default.
        connector: opens connections to addresses that were checked; plain TCP.
        proxy: an http or https address through which all is fetched. The proxy then resolves the names: it, and not
            this class, must keep requests out of private networks.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        max_bytes: int,
        max_redirects: int,
        user_agent: str,
        allowed_ports: Collection[int] = (80, 443),
        attempts: int = 3,
        resolver: Resolver | None = None,
        connector: httpcore.AsyncNetworkBackend | None = None,
        proxy: str | None = None,
    ) -> None:
        if not (timeout_s > 0 and max_bytes > 0 and max_redirects >= 0 and attempts > 0):
            raise ValueError("timeout_s, max_bytes and attempts must be positive, max_redirects not negative")
        if not allowed_ports or not all(0 < port < 1 << 16 for port in allowed_ports):
            raise ValueError(f"allowed_ports must be numbers of ports, got {allowed_ports!r}")
        if not user_agent.strip() or not user_agent.isascii() or not user_agent.isprintable():
            raise ValueError("user_agent must be printable ASCII")
        self._timeout_s, self._max_bytes, self._max_redirects = timeout_s, max_bytes, max_redirects
        self._ports, self._attempts = tuple(allowed_ports), attempts
        self._headers = [("User-Agent", user_agent), ("Accept", _ACCEPT), ("Accept-Encoding", "gzip")]
        self._ssl = httpx.create_ssl_context()
        self._connector = connector or httpcore.AnyIOBackend()
        self._guarded = GuardedBackend(resolver or SystemResolver(), self._connector)
        self._proxy = proxy
        if proxy is not None:
            _require_proxy(proxy)
            logger.warning("pages are fetched through %s: it must keep requests out of private networks", proxy)

    async def fetch(self, url: str, *, accepts: Callable[[str], bool] | None = None) -> Fetched:
        """Fetches the content of ``url``.

        Args:
            url: http or https.
            accepts: whether a body of this content type ("text/html") is wanted; others are refused unread.

        Raises:
            ModelError: The address must not be read, or there is nothing at it that can be: choose another.
            InfrastructureError: It did not answer, or not as it should.
        """
        start = check_url(url, self._ports)
        limit_s = self._timeout_s / min(self._attempts, 2)
        try:
            with anyio.fail_after(self._timeout_s):
                retrying = AsyncRetrying(
                    retry=retry_if_exception_type(InfrastructureError),
                    stop=stop_after_attempt(self._attempts) | stop_before_delay(self._timeout_s),
                    wait=wait_random_exponential(multiplier=0.5, max=8),
                    reraise=True,
                )
                return await retrying(self._attempt, start, limit_s, accepts)
        except TimeoutError:
            raise InfrastructureError(f"{start.host}: no answer within {self._timeout_s:g} s") from None

    async def _attempt(self, url: httpx.URL, limit_s: float, accepts: Callable[[str], bool] | None) -> Fetched:
        host = url.host
        try:
            with anyio.fail_after(limit_s):
                # Every fetch has its own pool: fetches share nothing.
                async with self._pool() as pool:
                    for _ in range(self._max_redirects + 1):
                        found = await self._hop(pool, url, limit_s, accepts)
                        if isinstance(found, Fetched):
                            return found
                        url = found
            raise ModelError("too many redirects; choose another page")
        except TimeoutError:
            raise InfrastructureError(f"{host}: no answer within {limit_s:g} s") from None
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError) as error:
            if _is_certificate_error(error):
                raise ModelError("the page cannot be read: its certificate is not valid; choose another") from None
            raise InfrastructureError(f"{host}: {type(error).__name__}: {error}") from None

    def _pool(self) -> httpcore.AsyncConnectionPool:
        if self._proxy is not None:
            return httpcore.AsyncHTTPProxy(self._proxy, ssl_context=self._ssl, network_backend=self._connector)
        return httpcore.AsyncConnectionPool(ssl_context=self._ssl, network_backend=self._guarded)

    async def _hop(
        self,
        pool: httpcore.AsyncConnectionPool,
        url: httpx.URL,
        limit_s: float,
        accepts: Callable[[str], bool] | None,
    ) -> Fetched | httpx.URL:
        """Returns the content of an address, or the address it redirects to."""
        # In parts, as it was checked: httpcore would parse a text again, and otherwise.
        address = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        timeouts = dict.fromkeys(("connect", "read", "write", "pool"), limit_s)
        async with pool.stream("GET", address, headers=self._headers, extensions={"timeout": timeouts}) as response:
            headers = {name.decode("latin-1").lower(): value for name, value in response.headers}
            status = response.status
            if status in _REDIRECTS and "location" in headers:
                return self._redirected(url, headers["location"])
            if status in _TRANSIENT or status >= 500:
                raise InfrastructureError(f"{url.host}: answered {status}")
            if not 200 <= status < 300:
                raise ModelError(f"the page cannot be read: its server answered {status}; choose another")
            content_type = headers.get("content-type", b"").decode("latin-1")
            kind = content_type.partition(";")[0].strip().lower()
            if accepts is not None and not accepts(kind):
                shown = kind if _KIND.fullmatch(kind) else "something unknown"
                raise ModelError(f"this is {shown}, which cannot be read; choose a web page or a text")
            body = await self._body(response, headers.get("content-encoding", b"").decode("latin-1").strip().lower())
        return Fetched(str(url), status, content_type, body)

    def _redirected(self, url: httpx.URL, location: bytes) -> httpx.URL:
        try:
            target = url.join(location.decode("utf-8", "replace"))
        except (httpx.InvalidURL, ValueError):
            raise ModelError("the page redirects to an invalid address; choose another") from None
        if url.scheme == "https" and target.scheme == "http":
            raise ModelError("the page redirects from https to http, which is not followed; choose another")
        return check_url(target, self._ports)

    async def _body(self, response: httpcore.Response, encoding: str) -> bytes:
        if encoding not in ("", "identity", "gzip", "x-gzip"):
            raise ModelError("the page's compression is not supported; choose another")
        unpack = zlib.decompressobj(16 + zlib.MAX_WBITS) if encoding.endswith("gzip") else None
        body, received = bytearray(), 0
        async for chunk in response.aiter_stream():
            received += len(chunk)
            try:
                # Never more than one byte too many is unpacked.
                body += chunk if unpack is None else unpack.decompress(chunk, self._max_bytes + 1 - len(body))
            except zlib.error:
                raise InfrastructureError("a page's compressed body is broken") from None
            if max(received, len(body)) > self._max_bytes:
                raise ModelError(f"the page is larger than {self._max_bytes} bytes; choose another")
        if unpack is not None and received and not unpack.eof:
            raise InfrastructureError("a page's compressed body is cut off")
        return bytes(body)


def _is_certificate_error(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


def _require_proxy(proxy: str) -> None:
    try:
        url = httpx.URL(proxy)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host or url.userinfo:
        raise ValueError("proxy must be an http or https address without user and password")
