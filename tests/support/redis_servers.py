"""Real Redis servers on free ports, for tests of the shared cache."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

_STARTED_S = 30.0


class RedisServer:
    """A Redis server that can be killed, stopped and started again on its port.

    It is the program that ``$REDIS_SERVER`` names, ``valkey-server`` for example, and `redis-server` otherwise.

    ``options``: of its command line. ``host``, ``inside``: its address, and what stands before its command.
    """

    def __init__(self, folder: Path, *options: str, host: str = "127.0.0.1", inside: Sequence[str] = ()) -> None:
        self.program = shutil.which(os.environ.get("REDIS_SERVER", "redis-server"))
        if self.program is None:
            pytest.skip("needs the program redis-server (Debian: apt-get install redis-server)")
        pytest.importorskip("redis")
        self.folder, self.options, self.host, self.inside = folder, list(options), host, list(inside)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"redis://{host}:{self.port}/0"
        self.start()

    def start(self) -> None:
        command = [*self.inside, self.program, "--bind", self.host, "--port", str(self.port), "--save", ""]
        log = self.folder / "server.log"
        with log.open("w") as said:
            command += ["--dir", str(self.folder), *self.options]
            self.process = subprocess.Popen(command, stdout=said, stderr=said)
        until = time.monotonic() + _STARTED_S
        while "Ready to accept connections" not in log.read_text():
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.02)

    def kill(self) -> None:
        """As `kill -9` does; whatever is not on the disk is lost."""
        self.process.kill()
        self.process.wait()

    def hang(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def speak_tls(self) -> str:
        """Starts again with a certificate of its own; returns the address with it, which alone is accepted then."""
        openssl = shutil.which("openssl") or pytest.skip("needs the program openssl")
        key, certificate = self.folder / "key.pem", self.folder / "certificate.pem"
        what = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        what += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
        subprocess.run([openssl, *what], check=True, capture_output=True)
        self.kill()
        self.options += ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
        self.options += ["--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
        self.start()
        return f"rediss://127.0.0.1:{self.port}/0?ssl_ca_certs={certificate}"

    def client(self, password=None):
        import redis

        return redis.Redis(port=self.port, password=password, protocol=2)
