"""Serves an index over HTTP, in the format of Search-R1's retriever.

    python -m search_backends.retrieval.serve INDEX --port 8080

- ``POST /retrieve`` {"queries": [text], "topk": 3, "return_scores": true}
- ``POST /retrieve_images`` {"images": [base64], "topk": 3, "return_scores": true, "return_images": false}
- ``GET /health``: status, identity of the index, searches; 503 while it loads
- ``GET /stats``: metrics for Prometheus
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, Field, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from search_backends.retrieval.batching import Batcher, Full, Room, SearchFailed
from search_backends.retrieval.bm25 import Hits
from search_backends.retrieval.index import Index, TextSearch, choose_text_search
from search_backends.retrieval.manifest import IndexProblem, run_main
from search_backends.retrieval.pictures import read_image, thumbnail

PROGRAM = "search_backends.retrieval.serve"
END_POINTS = ("/retrieve", "/retrieve_images", "/health", "/stats")
MAX_BODY = 32 << 20
BACKLOG = 2048  # connections that wait to be accepted
"""Bytes of a request."""
MAX_QUERIES, MAX_QUERY, MAX_IMAGES, MAX_TOPK = 256, 4096, 16, 100
"""Queries of a request, characters of a query, images of a request, results of a query."""
DEFAULT_TOPK = 3
RETRY_AFTER = {"Retry-After": "1"}


class TextRequest(BaseModel):
    """The request body of ``/retrieve``."""

    queries: list[str] = Field(min_length=1, max_length=MAX_QUERIES)
    topk: int | None = Field(None, ge=1, le=MAX_TOPK)
    return_scores: bool = False


class ImageRequest(BaseModel):
    """The request body of ``/retrieve_images``."""

    images: list[str] = Field(min_length=1, max_length=MAX_IMAGES)
    topk: int | None = Field(None, ge=1, le=MAX_TOPK)
    return_scores: bool = False
    return_images: bool = False


AnyRequest = TypeVar("AnyRequest", bound=BaseModel)


@dataclass(frozen=True)
class Settings:
    """Settings of the service.

    Args:
        text: None for BM25 if the index has it, else dense.
        threads: that search; the event loop has its own.
        max_batch: queries that are searched together.
        max_queue: queries and images in work; beyond them the answer is 503.
        min_image_score: images less like the one asked about are not found.
    """

    index: Path
    text: TextSearch | None = None
    threads: int = min(4, os.cpu_count() or 1)
    max_batch: int = 64
    max_queue: int = 4096
    min_image_score: float = 0.0

    def __post_init__(self) -> None:
        if self.threads < 1 or self.max_batch < 1:
            raise IndexProblem("--threads and --max-batch must be at least 1")
        if self.max_queue < MAX_QUERIES:
            raise IndexProblem(f"--max-queue must be at least {MAX_QUERIES}, which is what one request may hold")


class Metrics:
    """Metrics of one service."""

    def __init__(self, room: Room, origin: str = ""):
        # `target_info` says whose metrics these are, where there are several services.
        self.registry = registry = CollectorRegistry(target_info={"origin": origin} if origin else None)
        self.requests = Counter("retrieval_requests", "Requests answered", ["endpoint", "status"], registry=registry)
        fine = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
        self.seconds = Histogram(
            "retrieval_request_seconds", "Time to answer", ["endpoint"], buckets=fine, registry=registry
        )
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        self.batches = Histogram(
            "retrieval_batch_size", "Searched together", ["search"], buckets=sizes, registry=registry
        )
        depth = Gauge("retrieval_queue_depth", "Queries and images in work", registry=registry)
        depth.set_function(lambda: room.taken)


class Service:
    """The state behind the end points. ``index`` is None until it is loaded. Others that search by
    other means override `load`, `describe` and `find_texts`."""

    has_images = True

    def __init__(self, settings: Settings, origin: str = ""):
        self.settings = settings
        self.index: Index | None = None
        self.problem: IndexProblem | None = None
        self.room = Room(settings.max_queue)
        self.metrics = Metrics(self.room, origin)
        self._pool = ThreadPoolExecutor(settings.threads, "search")

    async def load(self) -> None:
        """Opens the index; ``problem`` says why it could not."""
        started = time.monotonic()
        try:
            index = await asyncio.to_thread(Index, self.settings.index, self.settings.text)
        except IndexProblem as problem:
            self.problem = problem
            return
        except Exception as error:  # of files that are damaged in some other way
            self.problem = IndexProblem(f"{self.settings.index} cannot be loaded: {type(error).__name__}: {error}")
            return
        self._texts = self._batcher("text", index.search_texts)
        self._images = self._batcher("image", index.search_images)
        gc.collect()
        # The index stays, and searching it for garbage again and again would cause pauses.
        gc.freeze()
        self.index = index
        _log(f"ready after {time.monotonic() - started:.1f} s: {', '.join(index.loaded)}, identity {self.identity}")

    def _batcher(self, name: str, search: Callable[[Sequence[Any], int], list[Hits]]) -> Batcher[Any]:
        observe = self.metrics.batches.labels(name).observe
        return Batcher(search, self._pool, self.settings.threads, self.settings.max_batch, observe)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def identity(self) -> str:
        """The identity of the index and of the settings that change answers."""
        assert self.index is not None
        least = self.settings.min_image_score
        return self.index.identity + (f"-{least:g}" if least else "")

    def ready(self) -> Index:
        """The index.

        Raises:
            HTTPException: 503, it is still loading.
        """
        if self.index is None:
            raise HTTPException(503, "the index is loading", RETRY_AFTER)
        return self.index

    async def describe(self) -> dict[str, Any] | None:
        """What ``/health`` says besides the status; None while loading."""
        if self.index is None:
            return None
        counts = self.index.manifest["counts"]
        return {
            "identity": self.identity,
            "searches": self.index.loaded,
            "passages": counts["passages"],
            "images": counts["images"],
        }

    async def texts(self, request: TextRequest) -> bytes:
        """The answer to ``/retrieve``.

        Raises:
            HTTPException
        """
        for number, query in enumerate(request.queries):
            if len(query) > MAX_QUERY:
                raise HTTPException(
                    422, f"queries[{number}] has {len(query)} characters, at most {MAX_QUERY} are taken"
                )
            if not query.strip():
                raise HTTPException(422, f"queries[{number}] is empty")
        with self._admitted(len(request.queries)):
            return await self.find_texts(request.queries, request.topk or DEFAULT_TOPK, request.return_scores)

    async def find_texts(self, queries: Sequence[str], topk: int, scores: bool) -> bytes:
        """The body of the answer to queries that were found valid.

        Raises:
            HTTPException
        """
        passages = self.ready().passages
        if passages is None:
            raise HTTPException(404, "this index has no passages")
        return await self._texts.answer(queries, topk, partial(_render, document=passages.__getitem__, scores=scores))

    async def images(self, request: ImageRequest) -> bytes:
        """The answer to ``/retrieve_images``.

        Raises:
            HTTPException
        """
        if not self.has_images or (index := self.ready()).images is None:
            raise HTTPException(404, "this index has no images")
        document = partial(_shown, index) if request.return_images else index.images.__getitem__
        render = partial(_render, document=document, scores=request.return_scores, least=self.settings.min_image_score)
        with self._admitted(len(request.images)):
            try:
                images = await asyncio.get_running_loop().run_in_executor(self._pool, _read_images, request.images)
            except ValueError as error:
                raise HTTPException(422, str(error)) from error
            return await self._images.answer(images, request.topk or DEFAULT_TOPK, render)

    @contextmanager
    def _admitted(self, items: int) -> Any:
        try:
            self.room.take(items)
        except Full as error:
            raise HTTPException(503, f"more than {self.room.limit} queries are waiting", RETRY_AFTER) from error
        try:
            yield
        finally:
            self.room.free(items)


def _render(
    found: Sequence[Hits], document: Callable[[int], bytes], scores: bool, least: float = float("-inf")
) -> bytes:
    """The body of an answer. Documents are kept as JSON, so nothing is parsed."""
    return body([[(document(position), score) for position, score in hits if score >= least] for hits in found], scores)


def body(found: Sequence[Sequence[tuple[bytes, float]]], scores: bool) -> bytes:
    """The answer to queries with these documents and their scores."""

    def one(document: bytes, score: float) -> bytes:
        return b'{"document":%b,"score":%b}' % (document, repr(round(score, 6)).encode()) if scores else document

    lists = (b",".join(one(*hit) for hit in hits) for hits in found)
    return b'{"result":[%b]}' % b",".join(b"[%b]" % hits for hits in lists)


def _shown(index: Index, position: int) -> bytes:
    """An image's document with its thumbnail."""
    assert index.images is not None
    return b'%b,"image":"%b"}' % (index.images[position][:-1], base64.b64encode(index.thumbnail(position)))


def _read_images(encoded: Sequence[str]) -> list[Image.Image]:
    """Thumbnails of base64 images.

    Raises:
        ValueError: One is not an image; the message says which.
    """
    images = []
    for number, text in enumerate(encoded):
        try:
            images.append(thumbnail(read_image(base64.b64decode(text, validate=True))))
        except binascii.Error as error:
            raise ValueError(f"images[{number}] is not base64: {error}") from error
        except ValueError as error:
            raise ValueError(f"images[{number}]: {error}") from error
    return images


async def _parse(request: Request, kind: type[AnyRequest]) -> AnyRequest:
    """The body.

    Raises:
        HTTPException: 413 or 422.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"the request has more than {MAX_BODY >> 20} MiB", {"Connection": "close"})
    try:
        return kind.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f"{part}" for part in first["loc"])
        raise HTTPException(422, f"{where}: {first['msg']}" if where else first["msg"]) from error


class _Measured:
    """Counts and times requests."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started = 500, time.perf_counter()

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            end_point = scope["path"] if scope["path"] in END_POINTS else "other"
            self._metrics.requests.labels(end_point, status).inc()
            self._metrics.seconds.labels(end_point).observe(time.perf_counter() - started)


def make_app(service: Service, failed: Callable[[], None] | None = None) -> FastAPI:
    """Returns the application. It calls ``failed`` if the index cannot be loaded; with None it starts
    only when the index is loaded, and raises what `Service.problem` says."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async def load() -> None:
            try:
                await service.load()
            finally:
                if failed is not None and await service.describe() is None:
                    failed()

        loading = asyncio.create_task(load())
        if failed is None:
            await loading
            if service.problem is not None:
                raise service.problem
        yield
        loading.cancel()
        service.close()

    app = FastAPI(title="search_backends.retrieval", lifespan=lifespan)
    app.add_middleware(_Measured, metrics=service.metrics)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=400)

    @app.exception_handler(SearchFailed)
    async def defect(_: Request, error: Exception) -> Response:
        return JSONResponse({"detail": str(error)}, 500)

    # Plain routes: FastAPI's way to an end point takes longer than most searches do.
    async def retrieve(request: Request) -> Response:
        return _json(await service.texts(await _parse(request, TextRequest)))

    async def retrieve_images(request: Request) -> Response:
        return _json(await service.images(await _parse(request, ImageRequest)))

    app.router.add_route("/retrieve", retrieve, methods=["POST"])
    app.router.add_route("/retrieve_images", retrieve_images, methods=["POST"])

    @app.get("/health")
    async def health() -> Response:
        described = await service.describe()
        if described is None:
            return JSONResponse({"status": "loading"}, 503, RETRY_AFTER)
        return JSONResponse({"status": "ok", **described})

    @app.get("/stats")
    async def stats() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def _log(line: str) -> None:
    print(f"{PROGRAM}: {line}", file=sys.stderr, flush=True)


def serve(settings: Settings, host: str, port: int) -> int:
    """Serves until SIGTERM or SIGINT, then finishes the requests it has begun; returns 0.

    Raises:
        IndexProblem: The index cannot be served, or the port cannot be had.
    """
    # Certain failures are reported before anything is loaded.
    choose_text_search(settings.index, settings.text)
    return run(Service(settings), host, port, f"loading {settings.index}")


def run(service: Service, host: str, port: int, doing: str) -> int:
    """Runs a service as `serve` does; ``doing`` is for the log.

    Raises:
        IndexProblem: It cannot be loaded, or the port cannot be had.
    """

    def stop() -> None:
        server.should_exit = True

    listener = _listen(host, port)
    config = uvicorn.Config(
        make_app(service, stop),
        log_level="warning",
        access_log=False,
        backlog=BACKLOG,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=30,
    )
    server = uvicorn.Server(config)
    # uvicorn has handlers of its own while it runs. Before, a signal must not be lost; afterwards uvicorn raises it
    # once more, which must not end the process as if it had been killed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())
    _log(f"http://{host}:{listener.getsockname()[1]}, {doing}")
    server.run([listener])
    if service.problem is not None:
        raise service.problem
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Listen now, so that requests wait while uvicorn starts, and are not refused.
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        raise IndexProblem(f"cannot listen on {host}:{port}: {error}") from error
    return listener


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("index", type=Path)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for other machines; there is no authentication")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--text", choices=("bm25", "dense", "hybrid"), help="default: bm25 if the index has it")
    parser.add_argument("--threads", type=int, default=Settings.threads, help="that search (default: %(default)s)")
    parser.add_argument("--max-batch", type=int, default=Settings.max_batch, help="queries searched together")
    parser.add_argument("--max-queue", type=int, default=Settings.max_queue, help="queries in work; beyond them 503")
    parser.add_argument(
        "--min-image-score", type=float, default=0.0, help="less similar images are not found; 0.87 for phash"
    )
    values = vars(parser.parse_args(argv))
    host, port = values.pop("host"), values.pop("port")
    return run_main(PROGRAM, lambda: serve(Settings(**values), host, port))


if __name__ == "__main__":
    sys.exit(main())
