"""The retrieval service: its wire format, its limits, and what it does under load and when it is told to stop."""

import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image

from search_backends.retrieval import on_ray, opensearch, shards
from search_backends.retrieval.batching import Batcher
from search_backends.retrieval.build import Plan, build
from search_backends.retrieval.manifest import MANIFEST, IndexProblem
from search_backends.retrieval.opensearch import OpenSearch
from search_backends.retrieval.pictures import MAX_PIXELS
from search_backends.retrieval.serve import MAX_BODY, MAX_QUERIES, Service, Settings, _listen, make_app

ROOT = Path(__file__).resolve().parents[2]
COLOURS = ["red", "green", "blue", "white", "black", "orange"]


def encoded(image, kind="PNG"):
    out = io.BytesIO()
    image.save(out, format=kind)
    return out.getvalue()


def striped(colour):
    image = Image.new("RGB", (90, 60), "gray")
    image.paste(colour, (0, 20, 90, 40))
    return image


def build_index(folder):
    corpus = folder / "passages.jsonl"
    rows = [
        {"id": f"p{n}", "title": f"Town {n}", "contents": f"Town {n} lies by a river.\nIt is old."} for n in range(20)
    ]
    rows.append(
        {"id": "u", "title": "Ürümqi", "contents": 'A city with a "quoted" name', "url": "http://example.com/u"}
    )
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = [
        {"id": c, "title": f"A {c} stripe", "text": "text", "url": f"http://x/{c}", "image": encoded(striped(c))}
        for c in COLOURS
    ]
    pd.DataFrame(images).to_parquet(folder / "images.parquet")
    build(Plan(folder / "index", (corpus,), images=folder / "images.parquet"))
    return folder / "index"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return build_index(tmp_path_factory.mktemp("retrieval"))


def environment(*paths):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT])), "HF_HUB_OFFLINE": "1"}


@contextmanager
def service(index, *options):
    """The service as users start it."""
    command = [sys.executable, "-m", "search_backends.retrieval.serve", str(index), "--port", "0", *options]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        try:
            url = re.search(r"http://[\d.:]+", process.stderr.readline())[0]
            with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
                process.loading = client.get("/health")
                assert "ready after" in process.stderr.readline()
                yield client, process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def running(index):
    with service(index, "--min-image-score", "0.8") as (client, process):
        yield client, process


@pytest.fixture(scope="module")
def client(running):
    return running[0]


def ask(client, query="river town 3", **more):
    return client.post("/retrieve", json={"queries": [query], **more})


def look(client, image, **more):
    return client.post("/retrieve_images", json={"images": [base64.b64encode(image).decode()], **more})


class TestWireFormat:
    def test_passages_with_scores(self, client):
        answer = client.post(
            "/retrieve", json={"queries": ["Urumqi", "town 3", "zebra"], "topk": 2, "return_scores": True}
        )
        assert answer.status_code == 200
        first, second, third = answer.json()["result"]
        assert first == [
            {
                "document": {
                    "id": "u",
                    "title": "Ürümqi",
                    "contents": 'A city with a "quoted" name',
                    "url": "http://example.com/u",
                },
                "score": first[0]["score"],
            }
        ]
        assert isinstance(first[0]["score"], float)
        assert [hit["document"]["id"] for hit in second] == ["p3", "p0"]  # the others are equal: by position
        assert second[0]["score"] > second[1]["score"]
        assert third == []

    def test_without_scores_the_documents_themselves(self, client):
        [[document]] = ask(client, "Urumqi").json()["result"]
        assert set(document) == {"id", "title", "contents", "url"}

    def test_three_are_found_if_nothing_is_said(self, client):
        for more in ({}, {"topk": None}):
            assert len(ask(client, "river", **more).json()["result"][0]) == 3

    def test_images(self, client):
        for colour in COLOURS:
            answer = look(client, encoded(striped(colour).resize((300, 200)), "JPEG"), topk=1, return_scores=True)
            [[hit]] = answer.json()["result"]
            assert hit["document"] == {
                "id": colour,
                "title": f"A {colour} stripe",
                "contents": "text",
                "url": f"http://x/{colour}",
            }
            assert 0.9 < hit["score"] <= 1

    def test_thumbnails_when_asked(self, client):
        [[document]] = look(client, encoded(striped("blue")), topk=1, return_images=True).json()["result"]
        with Image.open(io.BytesIO(base64.b64decode(document["image"]))) as image:
            red, green, blue = image.convert("RGB").getpixel((45, 30))
        assert blue > 200 > 60 > max(red, green)

    def test_what_looks_like_none_is_not_found(self, client):
        other = Image.new("RGB", (90, 60), "magenta")
        other.paste("cyan", (0, 0, 30, 60))
        assert look(client, encoded(other)).json() == {"result": [[]]}

    def test_health_and_identity(self, client, running, index):
        identity = json.loads((index / MANIFEST).read_text())["identity"]
        assert client.get("/health").json() == {
            "status": "ok",
            "identity": f"{identity}-bm25-0.8",
            "searches": ["bm25", "image"],
            "passages": 21,
            "images": 6,
        }
        assert running[1].loading.status_code == 503
        assert running[1].loading.json() == {"status": "loading"}

    def test_the_same_request_has_the_same_answer_whatever_else_is_asked(self, client):
        bodies = [{"queries": [f"river town {n}", "old"], "topk": n % 5 + 1, "return_scores": True} for n in range(40)]
        alone = [client.post("/retrieve", json=body).content for body in bodies]
        with ThreadPoolExecutor(20) as pool:
            together = list(pool.map(lambda body: client.post("/retrieve", json=body).content, bodies * 3))
        assert together == alone * 3

    def test_stats(self, client):
        def count(what):
            return sum(
                float(value) for value in re.findall(rf"^{re.escape(what)} (\S+)$", client.get("/stats").text, re.M)
            )

        before = count('retrieval_requests_total{endpoint="/retrieve",status="200"}')
        timed = count('retrieval_request_seconds_count{endpoint="/retrieve"}')
        refused = count('retrieval_requests_total{endpoint="/retrieve",status="422"}')
        ask(client)
        ask(client, topk=0)
        client.get("/no/such/path")
        assert count('retrieval_requests_total{endpoint="/retrieve",status="200"}') == before + 1
        assert count('retrieval_requests_total{endpoint="/retrieve",status="422"}') == refused + 1
        assert count('retrieval_request_seconds_count{endpoint="/retrieve"}') == timed + 2
        assert count('retrieval_requests_total{endpoint="other",status="404"}') >= 1
        assert count('retrieval_batch_size_count{search="text"}') >= 1
        assert "retrieval_queue_depth 0.0" in client.get("/stats").text


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ({"queries": "text"}, "queries: "),
            ({}, "queries: "),
            ({"queries": []}, "queries: "),
            ({"queries": [5]}, "queries[0]: "),
            ({"queries": ["x"] * (MAX_QUERIES + 1)}, f"at most {MAX_QUERIES}"),
            ({"queries": ["good", " \n"]}, "queries[1] is empty"),
            ({"queries": ["x" * 5000]}, "queries[0] has 5000 characters, at most 4096"),
            ({"queries": ["x"], "topk": 0}, "topk: "),
            ({"queries": ["x"], "topk": 101}, "topk: "),
            ({"queries": ["x"], "topk": "many"}, "topk: "),
            ([1], "object"),
        ],
    )
    def test_a_request_that_makes_no_sense(self, client, body, message):
        answer = client.post("/retrieve", json=body)
        assert answer.status_code == 422
        assert message in answer.json()["detail"]

    @pytest.mark.parametrize("body", [b"", b"{", b'{"queries": ["\\ud800"]}', b'{"queries": ["\xff"]}', b"\x00" * 100])
    def test_what_is_no_json(self, client, body):
        answer = client.post("/retrieve", content=body)
        assert answer.status_code == 422
        assert "JSON" in answer.json()["detail"]

    def test_a_request_that_is_too_large(self, client):
        for end_point in ("/retrieve", "/retrieve_images"):
            answer = client.post(end_point, content=b" " * (MAX_BODY + 1))
            assert answer.status_code == 413
            assert "32 MiB" in answer.json()["detail"]
        assert ask(client).status_code == 200

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (b"text", "images[0]: this is not an image"),
            (b"", "images[0]: this is not an image"),
            (encoded(striped("red"))[:120], "images[0]: the image cannot be read"),
            (encoded(Image.new("1", (int(MAX_PIXELS**0.5) + 1,) * 2)), "pixels"),
            (encoded(Image.new("RGB", (50, 50)), "TIFF"), "images[0]: this is not an image of a known kind"),
            (encoded(Image.new("RGB", (50, 50)), "PNG").replace(b"IDAT", b"XDAT"), "images[0]: "),
        ],
    )
    def test_an_image_that_is_none(self, client, image, message):
        answer = look(client, image)
        assert answer.status_code == 422
        assert message in answer.json()["detail"]
        assert look(client, encoded(striped("red"))).status_code == 200

    def test_what_is_not_base64(self, client):
        answer = client.post(
            "/retrieve_images", json={"images": [base64.b64encode(encoded(striped("red"))).decode(), "*"]}
        )
        assert answer.status_code == 422
        assert "images[1] is not base64" in answer.json()["detail"]

    def test_one_image_says_nothing_of_texts(self, tmp_path):
        pd.DataFrame([{"id": "1", "title": "t", "image": encoded(striped("red"))}]).to_parquet(tmp_path / "i.parquet")
        build(Plan(tmp_path / "index", images=tmp_path / "i.parquet"))
        with hosted(tmp_path / "index") as (client, _):
            assert ask(client).status_code == 404
            assert "no passages" in ask(client).json()["detail"]
            assert look(client, encoded(striped("red"))).status_code == 200


@contextmanager
def hosted(index, **settings):
    """The application on a real port, in a thread of this process, to hold its searches up."""
    own = Service(Settings(index, **settings))
    server = uvicorn.Server(uvicorn.Config(make_app(own, lambda: None), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while own.index is None or not server.started:
            assert own.problem is None
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        limits = httpx.Limits(max_connections=400)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, limits=limits, trust_env=False) as client:
            yield client, own
    finally:
        server.should_exit = True
        thread.join()


class HeldUp:
    """Takes the place of a search: waits until ``go`` is set, and notes the sizes of batches."""

    def __init__(self, batcher):
        self.go, self.begun, self.sizes = threading.Event(), threading.Semaphore(0), []
        self._search = batcher._search
        batcher._search = self

    def __call__(self, items, topk):
        self.sizes.append(len(items))
        self.begun.release()
        assert self.go.wait(30)
        return self._search(items, topk)


@pytest.mark.long
class TestUnderLoad:
    def test_requests_are_joined_and_health_answers_meanwhile(self, index):
        with hosted(index, threads=2, max_batch=16) as (client, own), ThreadPoolExecutor(42) as pool:
            held = HeldUp(own._texts)
            answers = []
            for n in range(2):
                answers.append(pool.submit(ask, client, f"town {n}", topk=1))
                assert held.begun.acquire(timeout=30)
            answers += [pool.submit(ask, client, f"town {n}", topk=1) for n in range(2, 42)]
            while own.room.taken < 42:
                time.sleep(0.005)
            assert client.get("/health").status_code == 200
            assert "retrieval_queue_depth 42.0" in client.get("/stats").text
            held.go.set()
            results = [answer.result().json()["result"][0][0]["id"] for answer in answers]
            assert results[:20] == [f"p{n}" for n in range(20)]
            assert sorted(held.sizes) == [1, 1, 8, 16, 16]
            assert own.room.taken == 0

    @pytest.mark.parametrize("callers", [1, 5])
    def test_who_was_answered_may_ask_again_at_once(self, callers):
        async def run():
            with ThreadPoolExecutor(1) as pool:
                batcher = Batcher(lambda items, _: [[(item, 0.0)] for item in items], pool, 1, 4, lambda _: None)

                async def caller(number):
                    for item in range(number, 300, callers):
                        assert await batcher.answer([item], 1, lambda found: b"%d" % found[0][0][0]) == b"%d" % item

                await asyncio.wait_for(asyncio.gather(*map(caller, range(callers))), 30)

        asyncio.run(run())

    def test_beyond_the_queue_it_says_when_to_come_back(self, index):
        with hosted(index, threads=1, max_queue=MAX_QUERIES) as (client, own), ThreadPoolExecutor(2) as pool:
            held = HeldUp(own._texts)
            large = pool.submit(client.post, "/retrieve", json={"queries": ["river"] * (MAX_QUERIES - 1)})
            assert held.begun.acquire(timeout=30)
            last = pool.submit(ask, client, "river")
            while own.room.taken < MAX_QUERIES:
                time.sleep(0.005)
            refused = ask(client)
            assert refused.status_code == 503
            assert refused.headers["Retry-After"] == "1"
            assert look(client, encoded(striped("red"))).status_code == 503
            held.go.set()
            assert large.result().status_code == last.result().status_code == ask(client).status_code == 200

    def test_an_error_of_the_search_is_a_500_and_the_next_one_works(self, index):
        with hosted(index) as (client, own):
            search = own._texts._search

            def broken(items, topk):
                raise OSError("the disk is gone")

            own._texts._search = broken
            assert ask(client).status_code == 500
            own._texts._search = search
            assert ask(client).status_code == 200
            assert own.room.taken == 0

    def test_a_client_that_leaves_costs_nothing(self, index):
        with hosted(index, threads=1) as (client, own):
            held = HeldUp(own._texts)
            with pytest.raises(httpx.ReadTimeout):
                client.post("/retrieve", json={"queries": ["river"]}, timeout=0.2)
            with socket.create_connection((client.base_url.host, client.base_url.port)) as half:
                half.sendall(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            held.go.set()
            assert ask(client).status_code == 200
            assert own.room.taken == 0

    def test_sigterm_lets_a_request_finish(self, index):
        with service(index) as (client, process), ThreadPoolExecutor(1) as pool:
            body = {"queries": ["river town old"] * MAX_QUERIES, "topk": 20}
            client.post("/retrieve", json=body)
            sent, signalled = threading.Event(), threading.Event()

            def content():
                data = json.dumps(body).encode()
                yield data[:10]
                sent.set()
                signalled.wait()  # the signal comes while the request does
                yield data[10:]

            answer = pool.submit(client.post, "/retrieve", content=content())
            sent.wait()
            time.sleep(1)  # nothing tells from outside that the server has begun to read
            process.send_signal(signal.SIGTERM)
            signalled.set()
            assert len(answer.result().json()["result"]) == MAX_QUERIES
            assert process.wait(30) == 0
            assert process.stderr.read() == ""

    def test_the_load_test_measures(self):
        options = ["--passages", "500", "--requests", "200", "--concurrency", "8"]
        command = [sys.executable, "-m", "search_backends.retrieval.load_test", *options]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=True)
        assert re.search(r"│ 8 +│ 200 +│", done.stdout)
        assert "built 500 passages" in done.stdout


@pytest.mark.long
class TestStarting:
    def start(self, *arguments, env=None):
        command = [sys.executable, "-m", "search_backends.retrieval.serve", *map(str, arguments)]
        done = subprocess.run(
            command, env=env or environment(), capture_output=True, text=True, timeout=300, check=False
        )
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr.strip().splitlines()

    def test_no_index(self, tmp_path):
        code, said = self.start(tmp_path / "none")
        assert code == 2
        assert said == [said[0]]
        assert "there is no index" in said[0]

    def test_an_unfinished_index(self, tmp_path):
        code, said = self.start(tmp_path)
        assert code == 2
        assert "not finished" in said[0]

    @pytest.mark.long
    def test_an_index_of_another_version(self, tmp_path):
        (tmp_path / MANIFEST).write_text('{"version": 99}')
        code, said = self.start(tmp_path)
        assert code == 2
        assert "version 99" in said[0]

    def test_a_damaged_index(self, tmp_path):
        index = build_index(tmp_path)
        with (index / "passages.data").open("r+b") as file:
            file.truncate(100)
        code, said = self.start(index, "--port", 0)
        assert code == 2
        assert "damaged" in said[-1]

    def test_an_index_with_numbers_out_of_range(self, tmp_path):
        index = build_index(tmp_path)
        numbers = np.load(index / "bm25" / "indices.csc.index.npy")
        np.save(index / "bm25" / "indices.csc.index.npy", numbers + 10**9)
        code, said = self.start(index, "--port", 0)
        assert code == 2
        assert "the index is damaged" in said[-1]

    @pytest.mark.long
    def test_an_index_that_is_damaged_in_another_way(self, tmp_path):
        index = build_index(tmp_path)
        manifest = json.loads((index / MANIFEST).read_text())
        manifest["settings"]["image"] = ["phash"]
        (index / MANIFEST).write_text(json.dumps(manifest))
        code, said = self.start(index, "--port", 0)
        assert code == 2
        assert f"{index} cannot be loaded: TypeError" in said[-1]

    def test_a_search_that_was_not_built(self, index):
        code, said = self.start(index, "--text", "hybrid")
        assert code == 2
        assert "built without dense" in said[0]

    def test_a_port_that_is_taken(self, index):
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            code, said = self.start(index, "--port", other.getsockname()[1])
        assert code == 2
        assert len(said) == 1
        assert "in use" in said[0]

    def test_who_comes_before_the_server_runs_waits(self):
        with _listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname(), timeout=30):
            pass

    def test_no_sentence_transformers(self, index, tmp_path):
        (tmp_path / "sentence_transformers.py").write_text("raise ImportError('not installed here')")
        manifest = json.loads((index / MANIFEST).read_text())
        manifest["settings"]["dense"] = {"encoder": "model", "query_prompt": ""}
        dense = tmp_path / "index"
        dense.mkdir()
        for file in index.iterdir():
            (dense / file.name).symlink_to(file)
        (dense / MANIFEST).unlink()
        (dense / MANIFEST).write_text(json.dumps(manifest))
        code, said = self.start(dense, "--text", "dense", "--port", 0, env=environment(tmp_path))
        assert code == 2
        assert "search-dense" in said[-1]

    @pytest.mark.parametrize("option", [("--threads", 0), ("--max-batch", 0), ("--max-queue", 10)])
    def test_settings_that_cannot_be(self, index, option):
        code, said = self.start(index, *option)
        assert code == 2
        assert option[0] in said[0]

    @pytest.mark.long
    def test_sigterm_while_loading(self, index):
        command = [sys.executable, "-m", "search_backends.retrieval.serve", str(index), "--port", "0"]
        with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
            process.stderr.readline()
            process.terminate()
            assert process.wait(60) == 0
            assert "Traceback" not in process.stderr.read()


@contextmanager
def asked_in_process(own):
    """The application of any service, without a port; it starts once it is loaded."""
    app = make_app(own)

    class Client:
        def __init__(self, loop):
            self._loop = loop
            self._client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x")

        def post(self, *args, **kwargs):
            return self._loop.run_until_complete(self._client.post(*args, **kwargs))

        def get(self, path):
            return self._loop.run_until_complete(self._client.get(path))

    loop = asyncio.new_event_loop()
    span = app.router.lifespan_context(app)
    loop.run_until_complete(span.__aenter__())
    try:
        yield Client(loop)
    finally:
        loop.run_until_complete(span.__aexit__(None, None, None))
        loop.close()


class Handle:
    """A shard as a Serve handle shows it."""

    def __init__(self, shard):
        self.search = self
        self.shard, self.fails = shard, False

    async def remote(self, queries, topk):
        if self.fails:
            raise RuntimeError("the replica died")
        return await self.shard.search(queries, topk)


@pytest.fixture(scope="module")
def shard_folders(index, tmp_path_factory):
    return shards.split(index, 3, tmp_path_factory.mktemp("shards") / "of")


class TestSharded:
    def test_answers_are_those_of_the_whole_index(self, index, shard_folders):
        manifests = shards.shards_in(shard_folders[0].parent)
        handles = [
            Handle(on_ray.Shard(folder, manifest["identity"], 1))
            for folder, manifest in zip(shard_folders, manifests, strict=True)
        ]
        sharded = on_ray.Sharded(Settings(shard_folders[0].parent), "replica", handles, manifests[0])
        with asked_in_process(sharded) as parts, asked_in_process(Service(Settings(index))) as whole:
            for topk in (1, 3, 100):
                for scores in (True, False):
                    asked = {
                        "queries": ["river town 3", "Urumqi", "old", "zebra"],
                        "topk": topk,
                        "return_scores": scores,
                    }
                    assert parts.post("/retrieve", json=asked).content == whole.post("/retrieve", json=asked).content
            # One identity, so that one cache serves both.
            described, known = parts.get("/health").json(), whole.get("/health").json()
            assert described == {**known, "searches": ["bm25"], "images": 0}
            assert look(parts, encoded(striped("red"))).status_code == 404
            assert ask(parts, " ").status_code == 422
            assert 'target_info{origin="replica"}' in parts.get("/stats").text
            handles[1].fails = True
            refused = ask(parts)
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
            assert refused.json() == {"detail": "a shard does not answer: RuntimeError"}

    def test_another_index_on_a_node_is_refused(self, index, shard_folders):
        with pytest.raises(IndexProblem, match=r"on this node is another index \(\w+, not another\)"):
            on_ray.Shard(shard_folders[0], "another", 1)
        with (
            pytest.raises(IndexProblem, match="on this node is another index"),
            asked_in_process(on_ray.Replica(Settings(index), "replica", "another")),
        ):
            pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
class TestOnRayWithoutRay:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "give an index, or --stop"),
            (["x", "--stop"], "give an index, or --stop"),
            (["x", "--replicas", "3:2"], "'3:2' is no number of replicas: 2, or 1:8"),
            (["x", "--replicas", "0"], "'0' is no number of replicas"),
            (["x", "--replicas", "two"], "'two' is no number of replicas"),
            (["x", "--ongoing", "0"], "--ongoing must be at least 1"),
        ],
    )
    def test_options_that_cannot_be(self, arguments, message, capsys):
        with pytest.raises(SystemExit):
            on_ray.main(arguments)
        assert message in capsys.readouterr().err

    def test_without_ray_serve_the_extra_is_named(self, index, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        assert on_ray.main([str(index)]) == 2
        assert "ray is missing: pip install 'verl-tapo[search-ray]'" in capsys.readouterr().err

    def test_no_cluster(self, index, capsys, monkeypatch):
        ray = pytest.importorskip("ray")

        def nothing(*_, **__):
            raise ConnectionError("Could not find any running Ray instance")

        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", nothing)
        assert on_ray.main([str(index)]) == 2
        said = capsys.readouterr().err
        assert (
            "no Ray cluster answers (Could not find any running Ray instance): start one with `ray start --head`"
            in said
        )


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
class TestOnRay:
    """Ray Serve itself, on a cluster of this process."""

    @pytest.fixture(scope="class")
    def port(self):
        ray = pytest.importorskip("ray")
        serve = pytest.importorskip("ray.serve")
        ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        yield port
        serve.shutdown()
        ray.shutdown()

    def start(self, port, folder, *options):
        arguments = [str(folder), "--host", "127.0.0.1", "--port", str(port), "--threads", "1", "--cpus", "0.5"]
        return on_ray.main([*arguments, "--wait", "120", *options])

    def test_replicas_shards_and_their_ends(self, port, index, shard_folders, capsys):
        import ray
        from ray import serve

        asked = {"queries": ["river town 3", "Urumqi", "old"], "topk": 7, "return_scores": True}
        with asked_in_process(Service(Settings(index))) as whole:
            expected, known = whole.post("/retrieve", json=asked).content, whole.get("/health").json()
        assert self.start(port, index, "--replicas", "2") == 0
        assert f"http://127.0.0.1:{port} answers" in capsys.readouterr().err
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            assert client.get("/health").json() == known
            origins = set()
            until = time.monotonic() + 60
            while len(origins) < 2 and time.monotonic() < until:
                assert client.post("/retrieve", json=asked).content == expected
                origins |= set(re.findall(r'target_info{origin="(\w+)"}', client.get("/stats").text))
            assert len(origins) == 2

            # A replica that is killed is replaced; nobody gets a wrong answer meanwhile.
            actors = ray.util.list_named_actors(all_namespaces=True)
            victim = next(each for each in actors if "#service#" in each["name"])
            ray.kill(ray.get_actor(victim["name"], namespace=victim["namespace"]))
            right = 0
            while right < 20:
                answer = client.post("/retrieve", json=asked)
                assert answer.status_code >= 500 or answer.content == expected
                right += answer.status_code == 200

            # Shards take its place.
            assert self.start(port, shard_folders[0].parent) == 0
            assert len(serve.status().applications[on_ray.APPLICATION].deployments) == 4
            assert client.post("/retrieve", json=asked).content == expected
            assert client.get("/health").json() == {**known, "searches": ["bm25"], "images": 0}

            capsys.readouterr()
            assert self.start(port + 1, index) == 2
            assert "Ray Serve was started here before, with another port or host" in capsys.readouterr().err
            assert self.start(port, index, "--cpus", "99", "--wait", "3") == 2
            assert re.search(r"did not start in 3 s; .* CPUs are free", capsys.readouterr().err)
            assert on_ray.main(["--stop"]) == 0
            assert client.get("/health").status_code == 404
        assert on_ray.main(["--stop"]) == 2
        assert "the service does not run on this cluster" in capsys.readouterr().err

    def test_a_replica_is_added_where_calls_wait(self, port, index):
        from ray import serve

        def replicas():
            return serve.status().applications[on_ray.APPLICATION].deployments["service"].replica_states["RUNNING"]

        asked = {"queries": ["river town 3", "Urumqi", "old"], "topk": 7, "return_scores": True}
        with asked_in_process(Service(Settings(index))) as whole:
            expected = whole.post("/retrieve", json=asked).content
        assert self.start(port, index, "--replicas", "1:2", "--ongoing", "1") == 0
        assert replicas() == 1
        enough = threading.Event()

        def call():
            answers = set()
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
                while not enough.is_set():
                    answers.add(client.post("/retrieve", json=asked).content)
            return answers

        with ThreadPoolExecutor(8) as pool:
            callers = [pool.submit(call) for _ in range(8)]
            try:
                until = time.monotonic() + 300  # Ray adds one after half a minute of waiting calls
                while replicas() < 2:
                    assert time.monotonic() < until, "no replica was added"
                    time.sleep(0.5)
            finally:
                enough.set()
            assert [caller.result() for caller in callers] == [{expected}] * 8
        assert on_ray.main(["--stop"]) == 0


class StandIn:
    """Answers as OpenSearch's REST interface is documented to: /INDEX/_settings, /INDEX/_count, /_msearch."""

    documents = (
        {"title": "Eiffel Tower", "contents": "It stands in Paris.", "url": "http://x/e"},
        {"text": "Paris has a museum."},
        {"title": "Fuji", "contents": "A mountain."},
    )

    def __init__(self):
        self.app = FastAPI()
        self.uuid, self.fails, self.asked, self.authorization = "Vx1", None, [], None
        self.app.get("/{index}/_settings")(self.settings)
        self.app.get("/{index}/_count")(self.count)
        self.app.post("/_msearch")(self.search)

    async def settings(self, index: str, request: Request):
        self.authorization = request.headers.get("authorization")
        if index != "wiki":
            return JSONResponse({"error": {"type": "index_not_found_exception"}, "status": 404}, 404)
        return {"wiki_v2": {"settings": {"index": {"uuid": self.uuid, "number_of_shards": "2"}}}}

    async def count(self, index: str):
        return {"count": len(self.documents), "_shards": {"total": 2, "successful": 2, "failed": 0}}

    async def search(self, request: Request):
        assert request.headers["content-type"] == "application/x-ndjson"
        text = (await request.body()).decode()
        assert text.endswith("\n")
        lines = [json.loads(line) for line in text.splitlines()]
        self.asked = list(zip(lines[::2], lines[1::2], strict=True))
        if self.fails == "busy":
            return JSONResponse({"error": {"reason": "too many requests"}, "status": 429}, 429)
        return {"took": 1, "responses": [self.answer(query) for _, query in self.asked]}

    def answer(self, query):
        if self.fails == "query":
            return {"error": {"type": "parsing_exception", "reason": "no such field"}, "status": 400}
        words = set(query["query"]["multi_match"]["query"].lower().split())
        hits = []
        for number, document in enumerate(self.documents):
            score = float(sum(word in json.dumps(document).lower() for word in words))
            if score:
                hits.append({"_index": "wiki_v2", "_id": f"d{number}", "_score": score, "_source": document})
        hits.sort(key=lambda hit: -hit["_score"])
        shards_failed = int(self.fails == "shard")
        return {
            "took": 1,
            "timed_out": False,
            "_shards": {"total": 2, "successful": 2 - shards_failed, "skipped": 0, "failed": shards_failed},
            "hits": {"total": {"value": len(hits), "relation": "eq"}, "hits": hits[: query["size"]]},
            "status": 200,
        }


@contextmanager
def open_search(stand_in, index="wiki"):
    own = OpenSearch("http://search:9200", index, ["title^2", "contents"])
    own._client._transport = httpx.ASGITransport(stand_in.app)
    own._client._mounts = {}
    with asked_in_process(own) as client:
        yield client


class TestOpenSearch:
    def test_the_wire_format_is_the_same(self):
        stand_in = StandIn()
        with open_search(stand_in) as client:
            answer = client.post(
                "/retrieve", json={"queries": ["paris tower", "zebra", "Fuji"], "topk": 2, "return_scores": True}
            )
            assert answer.json()["result"] == [
                [
                    {
                        "document": {
                            "id": "d0",
                            "title": "Eiffel Tower",
                            "contents": "It stands in Paris.",
                            "url": "http://x/e",
                        },
                        "score": 2.0,
                    },
                    {
                        "document": {"id": "d1", "title": "", "contents": "Paris has a museum.", "url": ""},
                        "score": 1.0,
                    },
                ],
                [],
                [{"document": {"id": "d2", "title": "Fuji", "contents": "A mountain.", "url": ""}, "score": 1.0}],
            ]
            assert stand_in.asked[0] == (
                {"index": "wiki", "search_type": "dfs_query_then_fetch", "preference": "retrieval"},
                {"size": 2, "query": {"multi_match": {"query": "paris tower", "fields": ["title^2", "contents"]}}},
            )
            assert set(ask(client, "fuji").json()["result"][0][0]) == {"id", "title", "contents", "url"}
            assert look(client, encoded(striped("red"))).status_code == 404
            assert ask(client, "").status_code == 422

    def test_identity_follows_the_index(self):
        stand_in = StandIn()
        with open_search(stand_in) as client:
            first = client.get("/health").json()
            assert (first["status"], first["passages"], first["searches"]) == ("ok", 3, ["opensearch"])
            assert client.get("/health").json() == first
            stand_in.uuid = "another"
            assert client.get("/health").json()["identity"] != first["identity"]

    @pytest.mark.parametrize(
        ("fails", "status", "message"),
        [("busy", 503, "(429)"), ("shard", 503, "not all shards answered"), ("query", 500, "no such field")],
    )
    def test_failures_are_no_answers(self, fails, status, message):
        stand_in = StandIn()
        stand_in.fails = fails
        with open_search(stand_in) as client:
            answer = ask(client, "paris")
            assert answer.status_code == status
            assert message in answer.json()["detail"]
            assert ("Retry-After" in answer.headers) == (status == 503)

    def test_credentials_come_from_the_environment(self, monkeypatch):
        monkeypatch.setenv("OPENSEARCH_USER", "me")
        monkeypatch.setenv("OPENSEARCH_PASSWORD", "secret")
        stand_in = StandIn()
        with open_search(stand_in):
            assert stand_in.authorization == "Basic " + base64.b64encode(b"me:secret").decode()

    def test_an_index_that_is_not_there(self):
        with (
            pytest.raises(IndexProblem, match=r"nothing: OpenSearch \(404\): .*index_not_found_exception"),
            open_search(StandIn(), "nothing"),
        ):
            pass

    def test_nobody_answers(self, capfd):
        assert opensearch.main(["http://127.0.0.1:1", "wiki", "--port", "0"]) == 2
        assert "search_backends.retrieval.opensearch: wiki: OpenSearch (503): ConnectError" in capfd.readouterr().err
