"""Hosts of the tests' own: network namespaces of this machine, joined by a virtual cable."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


@dataclass
class Host:
    """A network namespace with one address."""

    name: str
    address: str

    @property
    def inside(self) -> list[str]:
        """What stands before a command so that it runs there."""
        return ["ip", "netns", "exec", self.name]

    def kill(self) -> None:
        """All its processes, as `kill -9` does."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False).stdout
        subprocess.run(["kill", "-9", *pids.split()], capture_output=True, check=False)


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Two, without a route to anywhere else. The test is skipped where this process may make none."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` (Debian's iproute2), which makes network namespaces")
    hosts = [Host(f"tapo-{os.getpid()}-{number}", f"10.99.0.{number}") for number in (1, 2)]
    names = [host.name for host in hosts]
    made = [["netns", "add", name] for name in names]
    made += [["link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "eth0", "netns", names[1]]]
    for host in hosts:
        made += [
            ["-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0"],
            ["-n", host.name, "link", "set", "eth0", "up"],
            ["-n", host.name, "link", "set", "lo", "up"],
        ]
    try:
        for arguments in made:
            done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"this process may make no network namespaces: ip {' '.join(arguments)}: {done.stderr}")
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)
