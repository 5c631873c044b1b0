"""A small HTTP server over raw sockets, for answers that no framework would give."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float = field(default_factory=time.monotonic)

    def json(self) -> Any:
        return json.loads(self.body)


Answer = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]


def response(body: Any, status: int = 200, content_type: str = "application/json", **headers: str) -> bytes:
    """A whole answer; what is not bytes is sent as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Type: {content_type}", f"Content-Length: {len(content)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + content


class RawServer:
    """Answers requests with ``answers``, one after the other, and then with the last one for ever.

    An answer is bytes, or a function that writes and then has the connection closed. Connections are kept alive.
    """

    def __init__(self, *answers: Answer, port: int = 0):
        self.answers: Sequence[Answer] = answers
        self._port = port
        self.requests: list[Request] = []

    async def __aenter__(self) -> RawServer:
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = head[0].split(" ")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                number = len(self.requests)
                self.requests.append(Request(method, path, headers, body))
                answer = self.answers[min(number, len(self.answers) - 1)]
                if not isinstance(answer, bytes):
                    await answer(writer)
                    break
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except asyncio.CancelledError:  # not passed on: the stream's own callback would report it
            pass
        finally:
            self._tasks.discard(task)
            writer.close()


async def _main(port: int, delay_s: float) -> None:
    """A server in a process of its own, that can be killed."""

    async def later(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(delay_s)
        writer.write(response({"results": [{"title": "t", "url": "u", "content": "c", "score": 1.0}]}))
        await writer.drain()

    async with RawServer(later, port=port):
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), float(sys.argv[2])))
