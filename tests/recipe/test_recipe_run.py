"""The recipe, copied out of the repository, trains through veRL's own trainer and its own retrieval service over HTTP.

On a CPU, with the quickstart's questions, flags, facts and model.
"""

import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import prepare
import pytest
from hosts import two_hosts
from PIL import Image
from recipe.evaluation_server import Server
from recipe.flags_corpus import write_corpus
from redis_servers import RedisServer

pytestmark = pytest.mark.timeout(1800)

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "quickstart" / "flags_and_facts" / "model"
STEPS = 2


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A copy, under another name, of what is in the repository."""
    folder = tmp_path_factory.mktemp("elsewhere") / "my_search"
    shutil.copytree(ROOT / "recipes" / "multimodal_search", folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def environment(recipe, **more):
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(recipe),
        "HYDRA_FULL_ERROR": "1",
        **more,
    }


@pytest.fixture(scope="module")
def index(recipe, tmp_path_factory):
    """Of the quickstart's world."""
    folder = tmp_path_factory.mktemp("retrieval")
    passages, images = write_corpus(folder)
    build = ["--corpus", passages, "--text", "bm25", "--images", images, "--image-encoder", "phash"]
    command = [sys.executable, "-m", "search_backends.retrieval.build", *build, "--out", folder / "index"]
    subprocess.run(command, cwd=recipe, env=environment(recipe), check=True)
    return folder / "index"


@pytest.fixture
def service(recipe, index, tmp_path):
    """A retrieval service: its URL and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serving(recipe, index, tmp_path / "serve.log", "127.0.0.1", port) as process:
        yield f"http://127.0.0.1:{port}", process


@contextmanager
def serving(recipe, index, log, host, port, inside=()):
    command = [*inside, sys.executable, "-m", "search_backends.retrieval.serve", index]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--host", host, "--port", str(port)],
            cwd=recipe,
            env=environment(recipe),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(720):
            assert process.poll() is None, log.read_text()
            if "ready after" in log.read_text():
                break
            time.sleep(0.25)
        else:
            raise AssertionError(log.read_text())
        yield process
    finally:
        process.kill()
        process.wait(30)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare.prepare(folder, {"train": 16, "val": 4, "heldout": 4})
    return folder


def train(recipe, data, out, env, *overrides, meanwhile=None, inside=(), **options):
    """Runs ``train.sh``; its exit code, its output and veRL's metrics. ``meanwhile`` is called with the log's text."""
    out.mkdir(parents=True, exist_ok=True)
    metrics = out / "metrics.jsonl"
    command = [*inside, recipe / "train.sh", "--data", data / "train.parquet", "--val", data / "heldout.parquet"]
    for name, value in options.items():
        command += [f"--{name}", value]
    settings = {
        "actor_rollout_ref.model.path": MODEL,
        "trainer.total_training_steps": STEPS,
        "trainer.save_freq": STEPS,
        "trainer.test_freq": -1,
        "hydra.run.dir": out / "hydra",
    }
    own = {"VERL_PLATFORM": "cpu", "CONFIG": "multimodal_search_cpu", "OUT": out, "VERL_FILE_LOGGER_PATH": metrics}
    with (out / "train.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *(f"{key}={value}" for key, value in settings.items()), *overrides],
            cwd=out,
            env=environment(recipe, **{key: str(value) for key, value in own.items()}, **env),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    while meanwhile and process.poll() is None and not meanwhile((out / "train.log").read_text()):
        time.sleep(0.5)
    code = process.wait(1500)
    said = (out / "train.log").read_text()
    steps = [json.loads(line)["data"] for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return code, said, steps


@pytest.mark.long
def test_trains_through_the_real_service(recipe, service, data, tmp_path):
    cache = tmp_path / "cache.sqlite"
    url, _ = service
    code, said, steps = train(
        recipe, data, tmp_path / "out", {"SEARCH_URL": url, "SEARCH_CACHE": str(cache)}, loss="gspo"
    )
    assert code == 0, said[-6000:]
    assert len(steps) == STEPS
    for step in steps:
        assert all(math.isfinite(value) for value in step.values())
        assert step["training/rollout_probs_diff_max"] < 1e-4
        assert step["tools/infrastructure_faults"] == 0
        assert step["tools/image_search/ok"] > 0
        assert step["tapo/recorded_rollouts"] == 1.0
    assert steps[0]["tools/text_search/ok"] > 0
    assert steps[0]["tools/image_search/cache_hit"] > 0  # rollouts of a prompt search for the same image
    rollouts = (tmp_path / "out" / "tapo-gspo" / "rollouts" / "1.jsonl").read_text()
    assert "This is the flag of" in rollouts
    assert (tmp_path / "out" / "tapo-gspo" / "checkpoints" / f"global_step_{STEPS}" / "actor").is_dir()
    assert cache.stat().st_size > 0


@pytest.mark.long
def test_a_service_that_dies_ends_the_run_with_one_message(recipe, service, data, tmp_path):
    url, process = service
    tools = tmp_path / "tools.yaml"
    text = (recipe / "config" / "tools_train.yaml").read_text()
    tools.write_text(text.replace("provider: service,", "provider: service, timeout_s: 4,"))

    def kill(log):
        if "ready to fit" in log:
            process.kill()
        return process.poll() is not None

    code, said, steps = train(
        recipe,
        data,
        tmp_path / "out",
        {"SEARCH_URL": url},
        f"actor_rollout_ref.rollout.multi_turn.tool_config_path={tools}",
        "algorithm.tapo.max_fault_rate=0.1",
        meanwhile=kill,
    )
    assert code != 0
    assert "ToolOutage" in said
    assert "max_fault_rate allows 10%" in said
    assert steps == []  # nothing was trained on
    assert not (tmp_path / "out" / "tapo-vanilla" / "checkpoints").exists()


@pytest.mark.long
def test_evaluates_with_the_real_tools_and_rewards(recipe, service, tmp_path):
    """The model is a script; tools, service, cache and rewards are the recipe's."""
    url, _ = service
    rows = []
    for number, (play, truth) in enumerate({"search": 2, "zoom": 3, "silly": 6, "unknown": 5}.items()):
        picture = io.BytesIO()
        Image.new("RGB", (96, 64), (number * 50, 40, 90)).save(picture, format="PNG")
        rows.append(
            {
                "data_source": "FVQA-test",
                "prompt": [{"role": "user", "content": f"<image>play {play} number {number}"}],
                "images": [{"bytes": picture.getvalue()}],
                "reward_model": {"style": "rule", "ground_truth": [f"value {truth}"]},
                "extra_info": {
                    "data_id": f"q{number}",
                    "question": f"play {play} number {number}",
                    "category": "search_free",
                },
            }
        )
    data = tmp_path / "fvqa_test.parquet"
    pd.DataFrame(rows).to_parquet(data)
    env = environment(recipe, SEARCH_URL=url, SEARCH_CACHE=str(tmp_path / "cache.sqlite"))
    with Server() as model:
        arguments = ["--data", data, "--tools", recipe / "config" / "tools_train.yaml", "--out", tmp_path / "results"]
        arguments += ["--base-url", model.url, "--model", "player", "--match", "exact,substring"]
        command = [sys.executable, "-m", "search_agent.evaluate", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    entries = [json.loads(line) for line in (tmp_path / "results" / "transcripts.jsonl").read_text().splitlines()]
    assert [entry["acc"] for entry in entries] == [1.0] * 4
    found = {entry["question"].split()[-3]: entry["tapo_steps"]["steps"] for entry in entries}
    assert [(step["tool"], step["status"]) for step in found["search"]] == [("text_search", "ok")]
    assert [step["status"] for step in found["zoom"]] == ["ok", "ok", "ok"]
    assert [step["status"] for step in found["silly"]] == ["error"]
    assert found["silly"][0]["metrics"] == {"fault": "model"}
    assert [step["status"] for step in found["unknown"]] == ["unknown_tool"]
    assert "FVQA-test" in (tmp_path / "results" / "results.md").read_text()


class Node:
    """A host with a home of its own and a folder for Ray."""

    def __init__(self, host, folder, recipe):
        self.host, self.address, self.inside, self.kill = host, host.address, host.inside, host.kill
        self.home, self.recipe = folder / host.name, recipe
        self.folders, self.more = [], {}
        self.home.mkdir()

    def env(self):
        return environment(self.recipe, HOME=str(self.home), VERL_PLATFORM="cpu", OMP_NUM_THREADS="1", **self.more)

    def command(self, *arguments):
        """Of ``ray_cluster.sh``."""
        command = [*self.inside, self.recipe / "ray_cluster.sh", *arguments]
        if arguments[0] in ("head", "join"):
            command += ["--num-cpus", "8", "--num-gpus", "1", "--object-store-memory", "200000000"]
            # A short name: the paths of Ray's sockets may have 107 bytes.
            self.folders.append(Path(tempfile.mkdtemp(prefix="ray")))
            command += ["--temp-dir", self.folders[-1]]
        return command

    def ray(self, *arguments):
        """Runs ``ray_cluster.sh``; its exit code and output."""
        # Into a file: Ray's processes would keep a pipe open.
        log = self.home / "ray.log"
        with log.open("w") as file:
            command = self.command(*arguments)
            done = subprocess.run(command, env=self.env(), stdout=file, stderr=file, timeout=300, check=False)
        return done.returncode, log.read_text()

    def says(self, *command):
        """Runs a program on this host; what it prints."""
        done = subprocess.run(
            [*self.inside, *command], env=self.env(), capture_output=True, text=True, timeout=120, check=True
        )
        return done.stdout

    def close(self):
        self.kill()
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def nodes(recipe, tmp_path):
    with two_hosts() as hosts:
        nodes = [Node(host, tmp_path, recipe) for host in hosts]
        yield nodes
        for node in nodes:
            node.close()


ASK = """
import sys, httpx

asked = {"queries": ["capital of Kenya", "currency Japan", "river"], "topk": 7, "return_scores": True}
try:
    answer = httpx.post(f"{sys.argv[1]}/retrieve", json=asked, timeout=30, trust_env=False)
    print(answer.status_code, answer.text)
except httpx.TransportError as error:
    print(0, repr(error))
"""


@pytest.mark.long
def test_the_retrieval_service_on_both_nodes_of_which_one_is_killed(recipe, index, nodes, tmp_path):
    first, second = nodes
    addresses = [f"http://{node.address}:8111" for node in nodes]

    def ask(address):
        code, _, answer = first.says(sys.executable, "-c", ASK, address).partition(" ")
        return int(code), answer

    with serving(recipe, index, tmp_path / "serve.log", first.address, 8111, first.inside):
        code, expected = ask(addresses[0])
        assert code == 200
        assert "Nairobi" in expected
    first.more = second.more = {"RAY_ADDRESS": f"{first.address}:6379", "RAY_AUTH_MODE": "token"}
    assert first.ray("head")[0] == 0
    shutil.copytree(first.home / ".ray", second.home / ".ray")
    assert second.ray("join", first.address)[0] == 0

    def start(folder, *options):
        """Returns its last line."""
        command = [*first.inside, sys.executable, "-m", "search_backends.retrieval.on_ray", folder, "--port", "8111"]
        command += ["--wait", "280", "--threads", "1", *options]
        done = subprocess.run(command, env=first.env(), capture_output=True, text=True, timeout=300, check=False)
        return done.stderr.splitlines()[-1]

    def until_right(address):
        """What is answered before it is right is an error, never something else."""
        until = time.monotonic() + 300
        while (answer := ask(address)) != (200, expected):
            assert answer[0] in (0, 404, *range(500, 600)), answer
            assert time.monotonic() < until, answer

    # A node has 8 CPUs, and so takes one of two replicas.
    assert start(index, "--replicas", "2", "--cpus", "5").endswith(f"{', '.join(addresses)} answers")
    for address in addresses:
        assert ask(address) == (200, expected)
    second.kill()
    until_right(addresses[0])
    assert second.ray("join", first.address)[0] == 0
    for address in reversed(addresses):
        until_right(address)

    # It takes two of two shards and of what asks them. So without the other node no answer can be whole.
    shards = ["search_backends.retrieval.shards", index, "--count", "2", "--out", tmp_path / "shards"]
    first.says(sys.executable, "-m", *shards)
    assert addresses[0] in start(tmp_path / "shards", "--cpus", "4")
    assert ask(addresses[0]) == (200, expected)
    second.kill()
    codes = [ask(addresses[0])[0] for _ in range(5)]
    assert 200 not in codes
    assert second.ray("join", first.address)[0] == 0
    until_right(addresses[0])


# Of the prompt's own image: later ones have no fixed numbers.
ASKED = r'(\{"name": "text_search", .*?|\{"name": "image_search", "arguments": \{"image": 1\}\})'
SEARCHED = re.compile(rf"<tool_call>\n{ASKED}\n</tool_call>\nuser\n<tool_response>\n(.*?)\n</tool_response>", re.DOTALL)


def answers(folder):
    """What the searches told the model, by the prompt and the call, in veRL's dumps."""
    told = {}
    for file in sorted(folder.glob("*.jsonl")):
        for row in map(json.loads, file.read_text().splitlines()):
            for call, answer in SEARCHED.findall(row["output"]):
                told.setdefault((row["input"], *row["gts"], call), []).append(answer)
    return told


@pytest.mark.long
def test_trains_on_two_nodes_and_goes_on_after_each_has_died(recipe, index, data, nodes, tmp_path):
    first, second = nodes
    # An address with a password is told to each node, where Ray is started, and not to veRL.
    password = "password-of-the-cache"
    (tmp_path / "cache").mkdir()
    server = RedisServer(tmp_path / "cache", "--requirepass", password, host=first.address, inside=first.inside)
    cache = server.address.replace("redis://", f"redis://:{password}@")
    ray_address = f"{first.address}:6379"
    first.more = second.more = {"SEARCH_CACHE": cache, "RAY_ADDRESS": ray_address}
    code, said = first.ray("head")
    assert code == 0, said
    token = (first.home / ".ray" / "auth_token").read_text()
    assert f"ray_cluster.sh join {first.address}" in said
    assert token not in said
    code, said = second.ray("join", first.address)
    assert code == 1
    assert "the first node's token is missing here" in said
    shutil.copytree(first.home / ".ray", second.home / ".ray")
    code, said = second.ray("join", first.address)
    assert code == 0, said

    env = {"HOME": str(first.home), "RAY_ADDRESS": ray_address, "OMP_NUM_THREADS": "1"}
    env["SEARCH_URL"], env["SEARCH_CACHE"] = f"http://{first.address}:8111", cache
    out = tmp_path / "out"
    overrides = [
        "trainer.total_training_steps=5",
        "trainer.save_freq=1",
        "actor_rollout_ref.rollout.agent.num_workers=2",
        f"algorithm.tapo.record_dir={out / 'records'}",
    ]

    def run(kill=None):
        """Until ``kill``, a node, is killed after the run's first step, or to its end."""

        def watch(log):
            if "step:" in log:
                kill.kill()
            return "step:" in log

        meanwhile = watch if kill else None
        return train(recipe, data, out, env, *overrides, meanwhile=meanwhile, inside=first.inside, nodes="2")

    def checkpoints():
        return sorted(path.name for path in (out / "tapo-vanilla" / "checkpoints").glob("global_step_*"))

    def services():
        return serving(recipe, index, tmp_path / "serve.log", first.address, 8111, first.inside)

    def searches():
        """How many searches the service has answered, and how many answers the cache holds."""
        read = f"import urllib.request as r; print(r.urlopen('{env['SEARCH_URL']}/stats').read().decode())"
        stats = first.says("python3", "-c", read)
        found = re.findall(r'^retrieval_requests_total\{endpoint="/retrieve.*status="200"\} (.*)$', stats, re.MULTILINE)
        kept = first.says("python3", "-m", "search_backends.cache", "stats", cache).split()[1]
        return sum(map(float, found)), int(kept)

    with services():
        code, said, _ = run(kill=second)
        assert code != 0
        assert "a node was lost. Once ray_cluster.sh has joined it again" in said, said[-6000:]
        assert second.address in said[-2000:]
        begun = checkpoints()
        assert begun

        code, said, _ = run()
        assert code == 2
        assert "1 of 2 nodes are there" in said

        # The first node, with what runs on it: service, cache, trainer.
        with (second.home / "join.log").open("w") as log:
            joined = subprocess.Popen(
                second.command("join", first.address, "--block"), env=second.env(), stdout=log, stderr=log
            )
        code, said = first.ray("wait", "2", "120")
        assert code == 0, said
        code, said, _ = run(kill=first)
        assert code == -9
        assert f"Resuming from {out / 'tapo-vanilla' / 'checkpoints' / begun[-1]}" in said
        assert joined.wait(200) == 1
        ended = (second.home / "join.log").read_text().splitlines()[-1]
        assert f"the first node is gone: nothing listens at {ray_address}, and Ray has ended here too." in ended
    before = checkpoints()
    assert len(before) > len(begun)

    server.start()
    code, said = first.ray("head")
    assert code == 0, said
    assert (first.home / ".ray" / "auth_token").read_text() == token
    code, said = second.ray("join", first.address)
    assert code == 0, said
    with services():
        asked, kept = searches()
        code, said, steps = run()
        asked_then, kept_then = searches()
    assert code == 0, said[-6000:]
    assert password not in said
    # Each question went to the service once, whoever asked, and had one answer on both nodes.
    assert asked_then - asked == kept_then - kept
    told = answers(out / "tapo-vanilla" / "rollouts")
    assert sum(len(texts) > 1 for texts in told.values()) > 3
    assert all(len(set(texts)) == 1 for texts in told.values())
    assert f"Resuming from {out / 'tapo-vanilla' / 'checkpoints' / before[-1]}" in said
    # Ray names the address of the node that is not the driver's.
    workers = set(re.findall(r"\((WorkerDict|AgentLoopWorkerTQ) pid=\d+(, ip=[0-9.]+)?\)", said))
    assert workers == {
        (name, ip) for name in ("WorkerDict", "AgentLoopWorkerTQ") for ip in ("", f", ip={second.address}")
    }
    assert [step["training/global_step"] for step in steps][-1] == 5
    for step in steps:
        assert step["training/rollout_probs_diff_max"] < 1e-4
        assert step["tools/infrastructure_faults"] == 0
        assert step["tapo/recorded_rollouts"] == 1.0
    assert sum(step["tools/text_search/ok"] for step in steps) > 0
    assert len(list((out / "records").iterdir())) >= 5
