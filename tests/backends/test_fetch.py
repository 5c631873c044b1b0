"""The fetcher over real sockets: redirects, bodies without end, bombs, certificates, retries."""

from __future__ import annotations

import asyncio
import datetime
import gzip
import ipaddress
import ssl
import tracemalloc
import zlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import httpcore
import pytest
from raw_server import Answer, RawServer, response

from search_backends.errors import InfrastructureError, ModelError
from search_backends.fetch import Fetched, SafeFetcher

# Public-looking addresses, by host; nothing is sent to them.
NAMES = {
    "example.com": ["93.184.215.14"],
    "other.example": ["93.184.215.15"],
    "inside.example": ["10.1.2.3"],
    "dead.example": ["93.184.215.16", "93.184.215.14"],
}
DEAD = "93.184.215.16"


class Loopback(httpcore.AsyncNetworkBackend):
    """Connects to a port of this machine, whatever is asked for, and remembers what was asked for."""

    def __init__(self, port: int) -> None:
        self.port, self.asked, self._tcp = port, [], httpcore.AnyIOBackend()

    asked: list[tuple[str, int]]

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        assert ipaddress.ip_address(host).is_global
        self.asked.append((host, port))
        if host == DEAD:
            raise httpcore.ConnectError("refused")
        return await self._tcp.connect_tcp("127.0.0.1", self.port, timeout)


async def resolve(host: str, port: int) -> Sequence[str]:
    return NAMES.get(host, [])


def run(check: Callable[[SafeFetcher, RawServer, Loopback], Awaitable[Any]], *answers: Answer, **settings: Any) -> Any:
    async def main() -> Any:
        async with RawServer(*answers) as server:
            connector = Loopback(int(server.url.rpartition(":")[2]))
            options = {"timeout_s": 30, "max_bytes": 100_000, "max_redirects": 3, "user_agent": "tester/1"}
            options |= {"attempts": 1, "resolver": resolve, "connector": connector, **settings}
            return await check(SafeFetcher(**options), server, connector)

    return asyncio.run(main())


def fetch(url: str, *answers: Answer, **settings: Any) -> Fetched:
    async def check(fetcher: SafeFetcher, server: RawServer, connector: Loopback) -> Fetched:
        return await fetcher.fetch(url)

    found = run(check, *answers, **settings)
    assert isinstance(found, Fetched)
    return found


def page(body: bytes = b"hello", **headers: Any) -> bytes:
    return response(body, content_type="text/plain; charset=utf-8", **headers)


def redirect(location: str, status: int = 302) -> bytes:
    return response(b"", status, Location=location)


def test_a_page_is_fetched() -> None:
    async def check(fetcher: SafeFetcher, server: RawServer, connector: Loopback) -> None:
        found = await fetcher.fetch("http://example.com/a%20b/ü?q=1&r=ö#part")
        assert found == Fetched(
            "http://example.com/a%20b/%C3%BC?q=1&r=%C3%B6#part", 200, "text/plain; charset=utf-8", b"hello"
        )
        (request,) = server.requests
        assert (request.method, request.path) == ("GET", "/a%20b/%C3%BC?q=1&r=%C3%B6")
        assert request.headers["host"] == "example.com"
        assert request.headers["user-agent"] == "tester/1"
        assert request.headers["accept-encoding"] == "gzip"
        assert connector.asked == [("93.184.215.14", 80)]

    run(check, page())


def test_environment_proxies_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch("http://example.com/", page()).body == b"hello"


def test_a_proxy_is_used_where_it_is_configured() -> None:
    async def main() -> None:
        async with RawServer(page()) as server:
            fetcher = SafeFetcher(
                timeout_s=30, max_bytes=1000, max_redirects=3, user_agent="t", attempts=1, proxy=server.url
            )
            # It resolves the names; those that are plainly private do not reach it.
            assert (await fetcher.fetch("http://nowhere.example/x")).body == b"hello"
            assert server.requests[0].path == "http://nowhere.example/x"
            for url in ("http://127.0.0.1/", "http://localhost/", "http://printer.local/"):
                with pytest.raises(ModelError):
                    await fetcher.fetch(url)
            assert len(server.requests) == 1

    asyncio.run(main())


def test_another_address_is_tried_where_one_is_dead() -> None:
    async def check(fetcher: SafeFetcher, server: RawServer, connector: Loopback) -> None:
        assert (await fetcher.fetch("http://dead.example/")).body == b"hello"
        assert [host for host, _ in connector.asked] == NAMES["dead.example"]

    run(check, page())


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["http://other.example/b?c=d", "//other.example/b?c=d"])
def test_redirects_are_followed(status: int, location: str) -> None:
    async def check(fetcher: SafeFetcher, server: RawServer, connector: Loopback) -> None:
        found = await fetcher.fetch("http://example.com/a")
        assert (found.url, found.body) == ("http://other.example/b?c=d", b"there")
        assert connector.asked == [("93.184.215.14", 80), ("93.184.215.15", 80)]
        assert [request.headers["host"] for request in server.requests] == ["example.com", "other.example"]

    run(check, redirect(location, status), page(b"there"))


def test_relative_redirects_are_followed() -> None:
    found = fetch("http://example.com/a/b?q", redirect("../c"), redirect("?d=ü"), page(b"there"))
    assert (found.url, found.body) == ("http://example.com/c?d=%C3%BC", b"there")


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1/",
        "http://localhost/",
        "http://[::1]/",
        "http://2130706433/",
        "http://169.254.169.254/latest/meta-data/",
        "http://inside.example/",
        "http://unknown.example/",
        "//10.0.0.1/",
        "//inside.example/",
        "http://example.com:22/",
        "http://user:password@example.com/",
        "file:///etc/passwd",
        "ftp://example.com/",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        "data:text/plain,hello",
        "javascript:alert(1)",
        "http://[",
        "http://exa mple.com/",
        "http://127.0.0.1\\@example.com/",
    ],
)
def test_redirects_are_checked(location: str) -> None:
    async def check(fetcher: SafeFetcher, server: RawServer, connector: Loopback) -> None:
        with pytest.raises(ModelError) as caught:
            await fetcher.fetch("http://example.com/")
        assert len(server.requests) == 1
        assert connector.asked == [("93.184.215.14", 80)]
        assert "10.1.2.3" not in str(caught.value)

    run(check, redirect(location), page(b"secret"))


def test_redirects_into_the_network_at_the_last_hop() -> None:
    async def check(fetcher: SafeFetcher, server: RawServer, connector: Loopback) -> None:
        with pytest.raises(ModelError, match="not part of the public web"):
            await fetcher.fetch("http://example.com/")
        assert len(server.requests) == 3

    run(check, redirect("/1"), redirect("http://other.example/2"), redirect("http://inside.example/3"), page(b"secret"))


def test_redirects_in_a_circle_end() -> None:
    async def check(fetcher: SafeFetcher, server: RawServer, connector: Loopback) -> None:
        with pytest.raises(ModelError, match="too many redirects"):
            await fetcher.fetch("http://example.com/")
        assert len(server.requests) == 4

    run(check, redirect("/again"))
    assert fetch("http://example.com/", *[redirect("/again")] * 3, page()).body == b"hello"


def test_a_host_that_moves_inside_between_hops_is_left() -> None:
    asked = []

    async def rebinding(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return ["93.184.215.14"] if len(asked) == 1 else ["127.0.0.1"]

    async def check(fetcher: SafeFetcher, server: RawServer, connector: Loopback) -> None:
        with pytest.raises(ModelError):  # another connection: the first is closed
            await fetcher.fetch("http://example.com/")
        assert len(server.requests) == 1

    run(check, response(b"", 302, Location="/next", Connection="close"), page(b"secret"), resolver=rebinding)
    assert len(asked) == 2


# What a server answers


@pytest.mark.parametrize("status", [300, 304, 400, 401, 403, 404, 410, 418, 451])
def test_pages_that_are_not_there_are_the_models_fault(status: int) -> None:
    async def check(fetcher: SafeFetcher, server: RawServer, connector: Loopback) -> None:
        with pytest.raises(ModelError, match=f"the page cannot be read: its server answered {status}; choose another"):
            await fetcher.fetch("http://example.com/")
        assert len(server.requests) == 1

    answer = b"HTTP/1.1 304 X\r\n\r\n" if status == 304 else response(b"", status)
    run(check, answer, attempts=3)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 522])
def test_overload_is_tried_again(status: int) -> None:
    assert fetch("http://example.com/", response(b"", status), page(), attempts=2).body == b"hello"
    with pytest.raises(InfrastructureError, match=f"example.com: answered {status}"):
        fetch("http://example.com/", response(b"", status))


async def _hang_up(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def _sends(data: bytes) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return answer


@pytest.mark.parametrize(
    "broken",
    [
        _hang_up,
        _sends(b"SSH-2.0-OpenSSH_9.6\r\n"),
        _sends(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort"),
        _sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        _sends(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 300_000 + b"\r\n\r\n"),
        page(b"not gzip", Content_Encoding="gzip"),
        page(gzip.compress(b"hello" * 100)[:-20], Content_Encoding="gzip"),
    ],
)
def test_broken_answers_are_tried_again(broken: Answer) -> None:
    assert fetch("http://example.com/", broken, page(), attempts=2).body == b"hello"
    with pytest.raises(InfrastructureError):
        fetch("http://example.com/", broken)


def test_a_host_that_refuses_is_no_fault_of_the_models() -> None:
    NAMES["all-dead.example"] = [DEAD]
    with pytest.raises(InfrastructureError, match="ConnectError"):
        fetch("http://all-dead.example/", page())


def test_a_resolver_that_fails_is_asked_again() -> None:
    asked = []

    async def failing(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        if len(asked) == 1:
            raise InfrastructureError("try again")
        return NAMES[host]

    assert fetch("http://example.com/", page(), attempts=2, resolver=failing).body == b"hello"
    assert len(asked) == 2


def test_unwanted_kinds_are_not_read() -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: Application/PDF; x\r\n\r\n%PDF")
        await asyncio.Event().wait()

    async def check(fetcher: SafeFetcher, server: RawServer, connector: Loopback) -> None:
        seen = []

        def accepts(kind: str) -> bool:
            seen.append(kind)
            return False

        with pytest.raises(ModelError, match="this is application/pdf, which cannot be read"):
            await fetcher.fetch("http://example.com/", accepts=accepts)
        with pytest.raises(ModelError, match="this is something unknown"):
            await fetcher.fetch("http://example.com/", accepts=accepts)
        assert seen == ["application/pdf", "<|im_end|>"]

    run(check, endless, response(b"x", content_type="<|im_end|>"))


# Bodies


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP"])
def test_gzip_is_unpacked(encoding: str) -> None:
    assert fetch("http://example.com/", page(gzip.compress(b"hello"), Content_Encoding=encoding)).body == b"hello"


@pytest.mark.parametrize("encoding", ["br", "zstd", "deflate", "gzip, gzip", "compress", "unknown"])
def test_other_encodings_are_refused(encoding: str) -> None:
    with pytest.raises(ModelError, match="compression is not supported"):
        fetch("http://example.com/", page(zlib.compress(b"hello"), Content_Encoding=encoding))


def test_bodies_up_to_the_limit_are_read() -> None:
    body = bytes(range(256)) * 4
    for answer in (page(body), page(gzip.compress(body), Content_Encoding="gzip")):
        assert fetch("http://example.com/", answer, max_bytes=len(body) + 100).body == body
    with pytest.raises(ModelError, match="the page is larger than 1023 bytes"):
        fetch("http://example.com/", page(body), max_bytes=1023)
    zeros = bytes(1024)
    assert (
        fetch("http://example.com/", page(gzip.compress(zeros), Content_Encoding="gzip"), max_bytes=1024).body == zeros
    )
    with pytest.raises(ModelError, match="larger"):
        fetch("http://example.com/", page(gzip.compress(zeros), Content_Encoding="gzip"), max_bytes=1023)


def test_bombs_are_not_unpacked() -> None:
    bomb = gzip.compress(bytes(200_000_000))
    tracemalloc.start()
    with pytest.raises(ModelError, match="the page is larger than 300000 bytes"):
        fetch("http://example.com/", page(bomb, Content_Encoding="gzip"), max_bytes=300_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.parametrize("head", [b"", b"Content-Encoding: gzip\r\n"])
def test_bodies_without_end_are_left(head: bytes) -> None:
    sent = 0

    async def endless(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n" + head + b"\r\n")
        packer = zlib.compressobj(0, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        while not writer.is_closing():
            block = bytes(10_000)
            writer.write(packer.compress(block) if head else block)
            sent += len(block)
            await writer.drain()

    with pytest.raises(ModelError, match="larger than 100000 bytes"):
        fetch("http://example.com/", endless)
    assert sent < 50_000_000  # what the sockets buffer


def test_empty_blocks_count_too() -> None:
    """Much is received and nothing comes out of it."""
    head = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS).compress(b"")
    data = head + b"\x00\x00\x00\xff\xff" * 40_000  # blocks with nothing in them
    with pytest.raises(ModelError, match="larger than 100000 bytes"):
        fetch("http://example.com/", page(data, Content_Encoding="gzip"))


@pytest.mark.parametrize("drip", [b"x", b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n"])
def test_slow_bodies_and_heads_are_given_up(drip: bytes) -> None:
    """Each byte comes in time, the whole never does."""

    async def slow(writer: asyncio.StreamWriter) -> None:
        writer.write(drip)
        while not writer.is_closing():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)

    async def check(fetcher: SafeFetcher, server: RawServer, connector: Loopback) -> None:
        with pytest.raises(InfrastructureError, match=r"example\.com: no answer within"):
            await fetcher.fetch("http://example.com/")
        assert len(server.requests) >= 1

    run(check, slow, timeout_s=1.0, attempts=2)


def test_time_is_limited_with_all_hops_and_attempts() -> None:
    async def silent(writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async def check(fetcher: SafeFetcher, server: RawServer, connector: Loopback) -> None:
        with pytest.raises(InfrastructureError, match=r"no answer within 1 s"):
            await asyncio.wait_for(fetcher.fetch("http://example.com/"), 20)
        assert len(server.requests) <= 2

    run(check, silent, timeout_s=1.0, attempts=50)


def test_a_server_that_hangs_once_is_asked_again_in_time() -> None:
    async def silent(writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    assert fetch("http://example.com/", silent, page(), timeout_s=4.0, attempts=2).body == b"hello"


def test_cancelling_closes_the_connection() -> None:
    closed = asyncio.Event()

    async def silent(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        await writer.drain()
        while not writer.is_closing():
            writer.write(b"X: y\r\n")
            await asyncio.sleep(0.02)
        closed.set()

    async def check(fetcher: SafeFetcher, server: RawServer, connector: Loopback) -> None:
        task = asyncio.create_task(fetcher.fetch("http://example.com/"))
        while not server.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(closed.wait(), 20)

    run(check, silent)


# TLS


def _certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """Of its own authority; file of certificate and key, file of the certificate."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    both, alone = folder / f"{name}.both.pem", folder / f"{name}.pem"
    both.write_bytes(private + public)
    alone.write_bytes(public)
    return both, alone


@pytest.mark.parametrize(
    ("url", "answer", "problem"),
    [
        ("https://example.com/", page(), None),
        ("https://other.example/", page(), "its certificate is not valid"),
        ("https://93.184.215.14/", page(), "its certificate is not valid"),
        ("https://example.com/", redirect("http://example.com/plain"), "from https to http"),
        ("https://example.com/", redirect("https://inside.example/"), "not part of the public web"),
    ],
)
def test_certificates_are_checked_by_the_hosts_name(
    url: str, answer: bytes, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, authority = _certificate(tmp_path, "example.com")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    names = []

    async def main() -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(both)
        context.sni_callback = lambda _, name, __: names.append(name)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        async with server:
            connector = Loopback(server.sockets[0].getsockname()[1])
            fetcher = SafeFetcher(
                timeout_s=30,
                max_bytes=1000,
                max_redirects=3,
                user_agent="t",
                attempts=2,
                resolver=resolve,
                connector=connector,
            )
            if problem is None:
                assert (await fetcher.fetch(url)).body == b"hello"
            else:
                with pytest.raises(ModelError, match=problem):
                    await fetcher.fetch(url)
            assert len(connector.asked) == 1
            assert connector.asked[0][1] == 443

    asyncio.run(main())
    assert names == [None if "93." in url else url.split("/")[2]]


def test_unknown_authorities_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, other = _certificate(tmp_path, "other.example")
    both, _ = _certificate(tmp_path, "example.com")
    monkeypatch.setenv("SSL_CERT_FILE", str(other))

    async def main() -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(both)
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context)
        async with server:
            connector = Loopback(server.sockets[0].getsockname()[1])
            fetcher = SafeFetcher(
                timeout_s=30, max_bytes=10, max_redirects=0, user_agent="t", resolver=resolve, connector=connector
            )
            with pytest.raises(ModelError, match="its certificate is not valid"):
                await fetcher.fetch("https://example.com/")
            assert len(connector.asked) == 1

    asyncio.run(main())


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout_s": 0}, "must be positive"),
        ({"max_bytes": 0}, "must be positive"),
        ({"attempts": 0}, "must be positive"),
        ({"max_redirects": -1}, "max_redirects not negative"),
        ({"user_agent": "a\r\nX: y"}, "user_agent must be printable ASCII"),
        ({"user_agent": " "}, "user_agent must be printable ASCII"),
        ({"allowed_ports": ()}, "allowed_ports must be numbers of ports"),
        ({"allowed_ports": (0,)}, "allowed_ports must be numbers of ports"),
        ({"proxy": "socks5://127.0.0.1:1080"}, "proxy must be an http or https address"),
        ({"proxy": "http://user:secret@proxy:3128"}, "proxy must be an http or https address without user"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    options = {"timeout_s": 1.0, "max_bytes": 10, "max_redirects": 1, "user_agent": "t", **settings}
    with pytest.raises(ValueError, match=message):
        SafeFetcher(**options)


def test_other_ports_are_read_where_they_are_allowed() -> None:
    async def check(fetcher: SafeFetcher, server: RawServer, connector: Loopback) -> None:
        await fetcher.fetch("http://example.com:8080/")
        assert connector.asked == [("93.184.215.14", 8080)]
        assert server.requests[0].headers["host"] == "example.com:8080"

    run(check, page(), allowed_ports=(80, 8080))
