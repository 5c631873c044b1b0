"""The retrieval service on a running Ray cluster, by Ray Serve: replicas on its nodes, or shards of an index.

    python -m search_backends.retrieval.on_ray INDEX --replicas 1:4 --port 8080
    python -m search_backends.retrieval.on_ray SHARDS                # a folder of `search_backends.retrieval.shards`
    python -m search_backends.retrieval.on_ray --stop

It answers as `search_backends.retrieval.serve` does, on every node that runs a replica, and goes on when
the command has ended. The number of replicas follows the requests in work. The folder must be at the
same path on every node; a replica that finds another index there does not start. Answers from shards
are those of the whole index, identity included, or 503: never a part.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, HTTPException

from search_backends.retrieval.index import Index, choose_text_search
from search_backends.retrieval.manifest import IndexProblem, read_manifest, run_main
from search_backends.retrieval.serve import RETRY_AFTER, Service, Settings, body, make_app
from search_backends.retrieval.shards import merge, shards_in

PROGRAM = "search_backends.retrieval.on_ray"
APPLICATION = "retrieval"
_POLL_S = 0.5
_ANSWER_S = 10.0
_ANY = ("0.0.0.0", "::")
_ONGOING_FACTOR = 4
"""Times the requests at which a replica is added, that one takes at most; others wait."""

Found = list[list[tuple[int, float, bytes]]]
"""For each query positions in the whole index, scores and documents."""


def _open(folder: Path, text: Any, identity: str) -> Index:
    index = Index(folder, text)
    if index.manifest["identity"] != identity:
        raise IndexProblem(f"{folder} on this node is another index ({index.manifest['identity']}, not {identity})")
    return index


class Replica(Service):
    """A service that takes no other index than the one it was started with."""

    def __init__(self, settings: Settings, origin: str, identity: str) -> None:
        super().__init__(settings, origin)
        self._wanted = identity

    async def load(self) -> None:
        await super().load()
        if self.index is not None and self.index.manifest["identity"] != self._wanted:
            found = self.index.manifest["identity"]
            self.problem = IndexProblem(f"{self.settings.index} on this node is another index ({found})")


class Shard:
    """One shard, as a deployment of its own."""

    def __init__(self, folder: Path, identity: str, threads: int) -> None:
        self._index = _open(folder, "bm25", identity)
        self._first = self._index.manifest["settings"]["shard"]["first"]
        self._pool = ThreadPoolExecutor(threads, "search")

    async def search(self, queries: Sequence[str], topk: int) -> Found:
        """The best of this shard's passages."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._search, queries, topk)

    def _search(self, queries: Sequence[str], topk: int) -> Found:
        passages = self._index.passages
        assert passages is not None
        return [
            [(self._first + position, score, passages[position]) for position, score in hits]
            for hits in self._index.search_texts(queries, topk)
        ]


class Sharded(Service):
    """Asks all shards and merges their answers.

    Args:
        settings: of the service.
        origin: see `Metrics`.
        shards: the shards' handles: ``search.remote(queries, topk)``.
        manifest: any shard's manifest.
    """

    has_images = False

    def __init__(self, settings: Settings, origin: str, shards: Sequence[Any], manifest: dict[str, Any]) -> None:
        super().__init__(settings, origin)
        self._shards, self._of = shards, manifest["settings"]["shard"]

    async def load(self) -> None:
        """Nothing: the shards load."""

    async def describe(self) -> dict[str, Any]:
        """See `Service.describe`; the answers are the whole index's, and so is the identity."""
        identity, passages = f"{self._of['whole']}-bm25", self._of["passages"]
        return {"identity": identity, "searches": ["bm25"], "passages": passages, "images": 0}

    async def find_texts(self, queries: Sequence[str], topk: int, scores: bool) -> bytes:
        """See `Service.find_texts`. An answer of a part of the shards is none: 503."""
        try:
            answers = await asyncio.gather(*(shard.search.remote(list(queries), topk) for shard in self._shards))
        except Exception as error:  # of many kinds: a replica that died, a full queue
            raise HTTPException(503, f"a shard does not answer: {type(error).__name__}", RETRY_AFTER) from error
        found = []
        for lists in zip(*answers, strict=True):
            documents = {position: document for hits in lists for position, _, document in hits}
            best = merge([[(position, score) for position, score, _ in hits] for hits in lists], topk)
            found.append([(documents[position], score) for position, score in best])
        return body(found, scores)


def application(settings: Settings, options: dict[str, Any]) -> Any:
    """The Serve application of an index, or of a folder of shards; ``options`` are a deployment's.

    Raises:
        IndexProblem: The folder holds neither, or has no such search.
    """
    from ray import serve

    manifests = shards_in(settings.index) if settings.index.is_dir() else None
    names = []
    parts = []
    if manifests is None:
        choose_text_search(settings.index, settings.text)
        identity = read_manifest(settings.index)["identity"]
    elif settings.text not in (None, "bm25"):
        raise IndexProblem(f"--text {settings.text}: shards have bm25 only")
    else:
        for number, manifest in enumerate(manifests):
            names.append(f"shard-{number:03d}")
            folder = settings.index / f"{number:03d}"
            shard = serve.deployment(Shard, name=names[-1], **options)
            parts.append(shard.bind(folder, manifest["identity"], settings.threads))

    def build() -> FastAPI:
        """Makes the replica's application, in its process."""
        origin = serve.get_replica_context().replica_id.unique_id
        service: Service
        if manifests is None:
            service = Replica(settings, origin, identity)
        else:
            handles = [serve.get_deployment_handle(name, APPLICATION) for name in names]
            service = Sharded(settings, origin, handles, manifests[0])
        return make_app(service)

    return serve.deployment(serve.ingress(build)(), name="service", **options).bind(*parts)


def start(settings: Settings, host: str, port: int, options: dict[str, Any], wait_s: float) -> list[str]:
    """Starts the service on the running cluster, or replaces the one that runs, and waits until it answers.

    Returns:
        The addresses at which it answers.

    Raises:
        IndexProblem: There is no cluster, or the service does not start.
    """
    ray, serve = _connected()
    app = application(settings, options)
    serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
    target = serve.RunTarget(app, name=APPLICATION, route_prefix="/")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    until = time.monotonic() + wait_s
    while (state := serve.status().applications.get(APPLICATION)) is None or state.status != "RUNNING":
        failed = state is not None and state.status in ("DEPLOY_FAILED", "UNHEALTHY")
        if failed or time.monotonic() > until:
            deployments = {} if state is None else state.deployments
            said = "; ".join(f"{name}: {' '.join(each.message.split())}" for name, each in deployments.items())
            how = "does not start" if failed else f"did not start in {wait_s:g} s; it goes on trying, --stop ends that"
            free = ray.available_resources().get("CPU", 0)
            raise IndexProblem(f"the service {how} ({free:g} CPUs are free). {said[-1500:]}")
        time.sleep(_POLL_S)
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    hosts = [nodes[node] for node in serve.status().proxies if node in nodes] if host in _ANY else [host]
    addresses = [f"http://{each}:{port}" for each in hosts]
    for address in addresses:
        if not _answers(address, time.monotonic() + _ANSWER_S):
            raise IndexProblem(
                f"the service runs, but not at {address}: Ray Serve was started here before, with another port or "
                f"host, and keeps these; end it (serve shutdown) and try again"
            )
    return addresses


def _answers(address: str, until: float) -> bool:
    while True:
        try:
            if httpx.get(f"{address}/health", trust_env=False).json()["status"] == "ok":
                return True
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            pass
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_S)


def _connected() -> tuple[Any, Any]:
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise IndexProblem(f"{error.name or 'ray'} is missing: pip install 'verl-tapo[search-ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init("auto", log_to_driver=False, logging_level="ERROR")
        except ConnectionError as error:
            raise IndexProblem(
                f"no Ray cluster answers ({error}): start one with `ray start --head`, or name it by RAY_ADDRESS, and "
                f"its token, where it has one, by RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
            ) from None
    # Of several clusters on a machine Ray chooses one.
    _log(f"on the Ray cluster at {ray.get_runtime_context().gcs_address}")
    return ray, serve


def _log(line: str) -> None:
    print(f"{PROGRAM}: {line}", file=sys.stderr, flush=True)


def stop() -> None:
    """Ends the service.

    Raises:
        IndexProblem: There is none.
    """
    _, serve = _connected()
    if APPLICATION not in serve.status().applications:
        raise IndexProblem("the service does not run on this cluster")
    serve.delete(APPLICATION)


def _replicas(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    try:
        numbers = int(least), int(most or least)
    except ValueError:
        numbers = (0, 0)
    if not 1 <= numbers[0] <= numbers[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of replicas: 2, or 1:8")
    return numbers


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("index", type=Path, nargs="?", help="an index, or a folder of its shards")
    parser.add_argument("--stop", action="store_true", help="end the service")
    parser.add_argument("--host", default="0.0.0.0", help="default: %(default)s; there is no authentication")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--replicas", type=_replicas, default=(1, 1), metavar="N[:MOST]", help="of each deployment")
    parser.add_argument("--ongoing", type=int, default=64, help="requests in work beyond which replicas are added")
    parser.add_argument("--cpus", type=float, default=1.0, help="that Ray reserves for a replica")
    parser.add_argument("--wait", type=float, default=600.0, metavar="SECONDS", help="until it must answer")
    parser.add_argument("--text", choices=("bm25", "dense", "hybrid"), help="default: bm25 if the index has it")
    parser.add_argument("--threads", type=int, default=Settings.threads, help="that search, in a replica")
    parser.add_argument("--max-queue", type=int, default=Settings.max_queue, help="queries in work; beyond them 503")
    parser.add_argument("--min-image-score", type=float, default=0.0, help="as of the single service")
    values = parser.parse_args(argv)
    if (values.index is None) != values.stop:
        parser.error("give an index, or --stop")
    if values.ongoing < 1:
        parser.error("--ongoing must be at least 1")

    def run() -> int:
        if values.stop:
            stop()
            return 0
        settings = Settings(
            values.index.resolve(),
            values.text,
            threads=values.threads,
            max_queue=values.max_queue,
            min_image_score=values.min_image_score,
        )
        least, most = values.replicas
        options: dict[str, Any] = {
            "ray_actor_options": {"num_cpus": values.cpus},
            "max_ongoing_requests": _ONGOING_FACTOR * values.ongoing,
            "max_queued_requests": values.max_queue,
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                "target_ongoing_requests": values.ongoing,
            },
        }
        addresses = start(settings, values.host, values.port, options, values.wait)
        _log(f"{', '.join(addresses)} answers")
        return 0

    return run_main(PROGRAM, run)


if __name__ == "__main__":
    # So that what Ray sends to its workers belongs to a module that these can import.
    from search_backends.retrieval import on_ray

    sys.exit(on_ray.main())
