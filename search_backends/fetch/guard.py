"""Decides which addresses may be read: those of the public web, and none of the machine, its
network or its cloud."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import httpcore
import httpx

from search_backends.errors import InfrastructureError, ModelError

Resolver: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]
"""Finds the addresses of a host, none if it does not exist. Raises InfrastructureError if the lookup fails."""

NOT_PUBLIC = "this address cannot be read: its host is unknown or not part of the public web"
"""One message for both, which does not say which names a private network knows."""

_PORTS = {"http": 80, "https": 443}
_MAX_ADDRESSES = 4  # of a host's are tried
_CONNECT_S = 5.0  # for one of several
_RESERVED_V4 = [
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 "
        "192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 "
        "203.0.113.0/24 224.0.0.0/3 168.63.129.16/32"  # the last is Azure's host, at an address that looks public
    ).split()
]
# Of IPv6, all but global unicast is refused: loopback, link-local, unique local, multicast, mapped and NAT64 addresses
# lie outside of it. Inside are Teredo and other protocols' (2001::/23), 6to4 and examples.
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_RESERVED_V6 = [ipaddress.IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")]

_NAME = re.compile(r"(?=.{1,253}$)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)+[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
# C libraries read a host with such a last label as a number.
_NUMERIC = re.compile(r"\d+|0x[0-9a-f]*")
_PRIVATE_NAMES = "localhost localdomain local internal intranet private corp lan home home.arpa".split()


def is_public(address: str) -> bool:
    """Returns whether the text is an IP address of the public internet; False if it is not an
    address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _RESERVED_V4)
    return ip.scope_id is None and ip in _GLOBAL_V6 and not any(ip in network for network in _RESERVED_V6)


def check_url(url: str | httpx.URL, allowed_ports: Collection[int]) -> httpx.URL:
    """Parses an address that may be read, as far as is known without resolving its host.

    Raises:
        ModelError: It may not.
    """
    try:
        parsed = httpx.URL(url)
        host, port = parsed.raw_host.decode("ascii"), parsed.port
    except (httpx.InvalidURL, TypeError, ValueError):
        raise ModelError("url is not a valid address") from None
    if parsed.scheme not in _PORTS or not host:
        raise ModelError("url must be a full address that begins with http:// or https://")
    if parsed.userinfo:
        raise ModelError("url must not contain a user name or password")
    if (_PORTS[parsed.scheme] if port is None else port) not in allowed_ports:
        raise ModelError(f"only these ports are allowed: {', '.join(map(str, sorted(allowed_ports)))}")
    if not is_public(host) and not _is_public_name(host):
        raise ModelError(NOT_PUBLIC)
    return parsed


def _is_public_name(host: str) -> bool:
    """Returns whether the host is a plain domain name that is not reserved for private networks."""
    if not _NAME.fullmatch(host) or _NUMERIC.fullmatch(host.rpartition(".")[2]):
        return False
    return not any(host.endswith(f".{name}") for name in _PRIVATE_NAMES)


class SystemResolver:
    """The system's resolver in its own threads, so that a hanging lookup blocks nothing else."""

    def __init__(self, threads: int = 16) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="search-resolve")

    async def __call__(self, host: str, port: int) -> list[str]:
        # The dot at the end makes the name absolute: a cluster's search domains are not tried.
        name = f"{host}."
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(
                self._threads, lambda: socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
            )
        except socket.gaierror as error:
            if error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)):
                return []
            raise InfrastructureError(f"{host}: the name could not be resolved: {error.strerror}") from None
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Opens connections to public addresses only. It resolves a host, checks all of its addresses
    and connects to one of these, so a later answer of the resolver has no effect. TLS still checks
    the certificate by the host's name.

    Args:
        resolver: resolves hosts.
        connector: opens the connections; its hosts are addresses that were checked.
    """

    def __init__(self, resolver: Resolver, connector: httpcore.AsyncNetworkBackend) -> None:
        self._resolver, self._connector = resolver, connector

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = [host] if is_public(host) else await self._resolver(host, port)
        if not addresses or not all(is_public(address) for address in addresses):
            raise ModelError(NOT_PUBLIC)
        addresses = addresses[:_MAX_ADDRESSES]
        if len(addresses) > 1:
            timeout = _CONNECT_S if timeout is None else min(_CONNECT_S, timeout / len(addresses))
        for address in addresses[:-1]:
            try:
                return await self._connector.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await self._connector.connect_tcp(addresses[-1], port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
