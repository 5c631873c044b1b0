"""Addresses that must not be read, whatever they are dressed up as."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from typing import Any

import httpcore
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_backends.errors import InfrastructureError, ModelError
from search_backends.fetch import SafeFetcher
from search_backends.fetch.guard import GuardedBackend, SystemResolver, check_url, is_public

# In whose way nothing but the guard's own rules must stand: every name has a public address, and any connection opened
# is a failure of the guard.
NOT_READ = [
    # this machine
    "http://127.0.0.1/",
    "http://127.8.9.10/",
    "http://localhost/",
    "http://LOCALHOST/",
    "http://localhost./",
    "http://localhost.localdomain/",
    "http://app.localhost/",
    "http://0.0.0.0/",
    "http://0/",
    "http://[::1]/",
    "http://[::]/",
    "http://[0:0:0:0:0:0:0:1]/",
    # other spellings of it
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.0.0.1/",
    "http://0x7f.1/",
    "http://017700000001/",
    "http://0177.0.0.1/",
    "http://0177.0.0.0x1/",
    "http://127.1/",
    "http://127.0.1/",
    "http://127.0.0.1./",
    "http://127.0.0.01/",
    "http://%31%32%37.0.0.1/",
    "http://１２７.0.0.1/",
    "http://①②⑦.⓪.⓪.①/",
    "http://127。0。0。1/",
    "http://127．0．0．1/",
    "http://ｌｏｃａｌｈｏｓｔ/",
    "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/",
    "http://local\u00adhost/",
    "http://localhost%00.example.com/",
    "http://example.com%2f@127.0.0.1/",
    "http://256.256.256.256/",
    "http://1.2.3.4.5/",
    "http://example.0x7f/",
    # IPv4 inside IPv6
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[::ffff:10.0.0.1]/",
    "http://[::ffff:8.8.8.8]/",
    "http://[::127.0.0.1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[64:ff9b::a9fe:a9fe]/",
    "http://[64:ff9b:1::a00:1]/",
    "http://[2002:7f00:1::]/",
    "http://[2002:a00:1::1]/",
    "http://[2001:0:7f00:1::80ff:fffe]/",
    "http://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/",
    # private, shared and link-local networks
    "http://10.0.0.1/",
    "http://10.255.255.255/",
    "http://172.16.0.1/",
    "http://172.31.255.255/",
    "http://192.168.1.1/",
    "http://100.64.0.1/",
    "http://100.127.255.254/",
    "http://169.254.1.1/",
    "http://[fe80::1]/",
    "http://[fe80::1%25eth0]/",
    "http://[2606:4700::1111%25eth0]/",
    "http://[fec0::1]/",
    "http://[fc00::1]/",
    "http://[fd12:3456:789a::1]/",
    # metadata services
    "http://169.254.169.254/latest/meta-data/",
    "http://[::ffff:169.254.169.254]/latest/meta-data/",
    "http://2852039166/",
    "http://100.100.100.200/",
    "http://192.0.0.192/",
    "http://168.63.129.16/",
    "http://[fd00:ec2::254]/",
    "http://metadata.google.internal/",
    "http://metadata/",
    # multicast, broadcast, reserved, examples
    "http://224.0.0.1/",
    "http://239.255.255.250/",
    "http://255.255.255.255/",
    "http://240.0.0.1/",
    "http://192.0.2.1/",
    "http://198.18.0.1/",
    "http://198.51.100.1/",
    "http://203.0.113.1/",
    "http://192.88.99.1/",
    "http://[ff02::1]/",
    "http://[2001:db8::1]/",
    "http://[3fff::1]/",
    "http://[100::1]/",
    "http://[5f00::1]/",
    "http://[4000::1]/",
    # names of private networks
    "http://intranet/",
    "http://kubernetes.default.svc.cluster.local/",
    "http://printer.local/",
    "http://git.corp/",
    "http://router.lan/",
    "http://nas.home.arpa/",
    "http://example.com./",
    "http://exa_mple..com/",
    "http://-example.com/",
    "http://" + "a" * 64 + ".com/",
    "http://" + "a." * 130 + "com/",
    # not http, not plain, not an address
    "ftp://example.com/",
    "file:///etc/passwd",
    "file://example.com/etc/passwd",
    "gopher://example.com/",
    "data:text/html,hello",
    "javascript:alert(1)",
    "unix:///var/run/docker.sock",
    "//example.com/",
    "example.com",
    "example.com:80",
    "",
    " ",
    "http:///",
    "http://",
    "http:example.com",
    "http://user@example.com/",
    "http://user:password@example.com/",
    "http://:@example.com/",
    "http://example.com:password@127.0.0.1/",
    "http://example.com\\@127.0.0.1/",
    "http://127.0.0.1\\.example.com/",
    "http://example.com%23@127.0.0.1:22/x:80@127.0.0.1/",
    "http://[::1",
    "http://[example.com]/",
    "http://exa mple.com/",
    "http://example.com\n.evil.com/",
    "http://example.com\x00/",
    "http://*.example.com/",
    "http://example.com:99999/",
    "http://example.com:-1/",
    "http://example.com:port/",
    # ports
    "http://example.com:22/",
    "http://example.com:6379/",
    "http://example.com:8080/",
    "http://example.com:0/",
    "https://example.com:25/",
]
PUBLIC = "93.184.215.14"
PUBLIC_V6 = "2606:2800:21f:cb07:6820:80da:af6b:8b2c"


class _NeverConnects(httpcore.AsyncNetworkBackend):
    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    async def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        self.asked.append((host, port))
        raise httpcore.ConnectError("not in this test")


def _resolver(*addresses: str) -> Any:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return addresses

    return resolve


def _fetcher(connector: httpcore.AsyncNetworkBackend, resolver: Any) -> SafeFetcher:
    return SafeFetcher(
        timeout_s=30,
        max_bytes=1000,
        max_redirects=3,
        user_agent="test",
        attempts=1,
        resolver=resolver,
        connector=connector,
    )


@pytest.mark.parametrize("url", NOT_READ, ids=ascii)
def test_not_read(url: str) -> None:
    connector = _NeverConnects()
    with pytest.raises(ModelError) as caught:
        asyncio.run(_fetcher(connector, _resolver(PUBLIC)).fetch(url))
    assert not connector.asked
    assert len(str(caught.value)) < 120
    host = url.split("//")[-1].split("/")[0]
    assert len(host) < 3 or host not in str(caught.value)


@pytest.mark.parametrize("value", [None, 5, b"http://example.com/", ["http://example.com/"], {}, True])
def test_what_is_no_text_is_not_read(value: Any) -> None:
    with pytest.raises(ModelError):
        check_url(value, (80,))


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("http://example.com/", PUBLIC, 80),
        ("https://example.com", PUBLIC, 443),
        ("HTTPS://EXAMPLE.COM:443/a?b#c", PUBLIC, 443),
        ("http://example.com:443/", PUBLIC, 443),
        ("http://bücher.example/", PUBLIC, 80),
        ("http://xn--bcher-kva.example/", PUBLIC, 80),
        ("http://my_shop.example.co.uk/", PUBLIC, 80),
        ("http://1.2.3.4.nip.io/", PUBLIC, 80),
        ("http://localhost.example.com/", PUBLIC, 80),
        ("http://8.8.8.8/", "8.8.8.8", 80),
        (f"http://[{PUBLIC_V6}]/", PUBLIC_V6, 80),
    ],
)
def test_public_addresses_are_connected_to(url: str, host: str, port: int) -> None:
    connector = _NeverConnects()
    with pytest.raises(InfrastructureError):
        asyncio.run(_fetcher(connector, _resolver(PUBLIC)).fetch(url))
    assert connector.asked == [(host, port)]


@pytest.mark.parametrize(
    "addresses",
    [
        [],
        ["127.0.0.1"],
        [PUBLIC, "10.0.0.1"],
        ["10.0.0.1", PUBLIC],
        [PUBLIC, PUBLIC_V6, "fd00::1"],
        [PUBLIC, PUBLIC, PUBLIC, PUBLIC, PUBLIC, "169.254.169.254"],
        ["::ffff:93.184.215.14"],
        ["64:ff9b::5db8:d70e"],
        ["fe80::1%eth0"],
        ["localhost"],
        [""],
    ],
)
def test_all_of_a_hosts_addresses_must_be_public(addresses: list[str]) -> None:
    connector = _NeverConnects()
    with pytest.raises(ModelError, match="its host is unknown or not part of the public web"):
        asyncio.run(_fetcher(connector, _resolver(*addresses)).fetch("http://example.com/"))
    assert not connector.asked


def test_answers_that_change_do_not_help() -> None:
    """What was resolved and checked is what is connected to; another connection is another question and check."""
    answers = [[PUBLIC], ["127.0.0.1"]]
    asked = []

    async def rebinding(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return answers[min(len(asked), 2) - 1]

    connector = _NeverConnects()
    backend = GuardedBackend(rebinding, connector)

    async def connect_twice() -> None:
        with pytest.raises(httpcore.ConnectError):
            await backend.connect_tcp("example.com", 80)
        assert asked == ["example.com"]
        with pytest.raises(ModelError):
            await backend.connect_tcp("example.com", 80)

    asyncio.run(connect_twice())
    assert connector.asked == [(PUBLIC, 80)]


def test_further_addresses_are_tried() -> None:
    addresses = [PUBLIC_V6, PUBLIC, "8.8.8.8", "8.8.4.4", "1.1.1.1"]
    connector = _NeverConnects()
    with pytest.raises(httpcore.ConnectError):
        asyncio.run(GuardedBackend(_resolver(*addresses), connector).connect_tcp("example.com", 80))
    assert [host for host, _ in connector.asked] == addresses[:4]


def test_unix_sockets_are_not_opened() -> None:
    with pytest.raises(NotImplementedError):
        asyncio.run(GuardedBackend(_resolver(PUBLIC), _NeverConnects()).connect_unix_socket("/run/docker.sock"))


@pytest.mark.long
@settings(max_examples=2000)
@given(st.ip_addresses(v=4) | st.ip_addresses(v=6))
def test_public_addresses_are_global(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    if is_public(str(address)):
        assert address.is_global
        assert not any((address.is_multicast, address.is_reserved, address.is_unspecified, address.is_link_local))


@settings(max_examples=500)
@given(st.ip_addresses(v=4))
def test_ipv4_inside_ipv6_is_never_public(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    for network, shift in (("::", 0), ("::ffff:0:0", 0), ("64:ff9b::", 0), ("2002::", 80), ("2001::", 0)):
        assert not is_public(str(ipaddress.IPv6Address(int(ipaddress.IPv6Address(network)) | number << shift)))


@settings(max_examples=1000)
@given(st.text(max_size=30) | st.from_regex(r"https?://[\w.:@\[\]/\\%#?-]{0,30}", fullmatch=True))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        url = check_url(text, (80, 443))
    except ModelError:
        return
    host = url.raw_host.decode()
    assert is_public(host) or ("." in host and not host.endswith((".", ".localhost", ".local")))
    with pytest.raises(OSError):  # nothing that the C library takes for a number, unless it was checked as one
        socket.inet_aton(host if not is_public(host) else "name")


def test_names_are_resolved_without_search_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def getaddrinfo(host: str, port: int, **kwargs: Any) -> Any:
        asked.append(host)
        if host == "unknown.example.":
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        if host == "failing.example.":
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        four = (socket.AF_INET, socket.SOCK_STREAM, 6, "", (PUBLIC, port))
        return [four, four, (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (PUBLIC_V6, port, 0, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    resolver = SystemResolver()
    assert asyncio.run(resolver("example.com", 80)) == [PUBLIC, PUBLIC_V6]
    assert asyncio.run(resolver("unknown.example", 80)) == []
    with pytest.raises(InfrastructureError, match=r"failing\.example: the name could not be resolved"):
        asyncio.run(resolver("failing.example", 80))
    assert asked == ["example.com.", "unknown.example.", "failing.example."]
