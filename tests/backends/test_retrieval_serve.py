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
from PIL import Image

from search_backends.retrieval.batching import Batcher
from search_backends.retrieval.build import Plan, build
from search_backends.retrieval.manifest import MANIFEST
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
