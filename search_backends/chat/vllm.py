"""A vLLM server for a checkpoint, as long as it is needed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx

_TERMINATE_S = 30.0
_SAMPLE = 1 << 20  # bytes of a weights file's beginning and end


class ServerFailed(Exception):
    """The server did not come up, or cannot be started at all."""


def find_vllm() -> str:
    """The command ``vllm``: this environment's, or one on the PATH.

    Raises:
        ServerFailed: vLLM is not installed.
    """
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    command = shutil.which("vllm", path=places)
    if command is None:
        raise ServerFailed(
            "--checkpoint needs vLLM, and there is no command 'vllm': pip install vllm, "
            "or start a server elsewhere and name it with --base-url"
        )
    return command


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


@contextlib.contextmanager
def serve(
    checkpoint: Path,
    name: str,
    log: Path,
    *,
    arguments: Sequence[str] = (),
    start_s: float = 1800.0,
    waiting: Callable[[str], None] = lambda line: None,
) -> Iterator[str]:
    """Serves a checkpoint; gives the base URL, up to ``/v1``. The server is stopped however the block ends.

    Args:
        checkpoint: a Hugging Face folder.
        name: the model's name at the server.
        log: receives what the server prints.
        arguments: further ones of ``vllm serve``.
        start_s: seconds it may take to come up.
        waiting: called every second with what the server printed last.

    Raises:
        ServerFailed: with the end of the log.
    """
    port = _free_port()
    command = [find_vllm(), "serve", str(checkpoint), "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    with log.open("wb") as output:
        # In a session of its own: Ctrl-C is for us, who stop it in order.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + start_s
        while not _healthy(port):
            if process.poll() is not None:
                raise ServerFailed(f"vLLM ended with exit code {process.returncode}. {log} ends:\n{_end(log, 20)}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"vLLM is not ready after {start_s:g} s. {log} ends:\n{_end(log, 20)}")
            waiting(_end(log, 1))
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _stop(process)


def _healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _end(log: Path, lines: int) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The server and the processes it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_TERMINATE_S)


def fingerprint(checkpoint: Path) -> str:
    """Tells one checkpoint from another: names, sizes, beginnings and ends of its files.

    Raises:
        ValueError: It is no Hugging Face folder.
    """
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"--checkpoint {checkpoint} has no config.json: merge.sh makes a Hugging Face folder of one")
    digest = hashlib.sha256()
    for file in sorted(path for path in checkpoint.iterdir() if path.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            digest.update(content.read(_SAMPLE))
            content.seek(max(0, size - _SAMPLE))
            digest.update(content.read(_SAMPLE))
    return digest.hexdigest()
