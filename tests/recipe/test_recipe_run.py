"""The recipe, copied out of the repository, trains through veRL's own trainer and its own retrieval service over HTTP.

On a CPU, with the quickstart's questions, flags, facts and model.
"""

import io
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pandas as pd
import prepare
import pytest
from PIL import Image
from recipe.evaluation_server import Server
from recipe.flags_corpus import write_corpus

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
    command = [sys.executable, "-m", "search_backends.retrieval.serve", index, "--port", str(port)]
    with (tmp_path / "serve.log").open("w") as log:
        process = subprocess.Popen(command, cwd=recipe, env=environment(recipe), stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until_up(f"http://127.0.0.1:{port}", process, tmp_path / "serve.log")
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait(30)


def wait_until_up(url, process, log):
    for _ in range(720):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.25)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare.prepare(folder, {"train": 16, "val": 4, "heldout": 4})
    return folder


def train(recipe, data, out, env, *overrides, meanwhile=None, **options):
    """Runs ``train.sh``; its exit code, its output and veRL's metrics. ``meanwhile`` is called with the log's text."""
    out.mkdir(parents=True, exist_ok=True)
    metrics = out / "metrics.jsonl"
    command = [recipe / "train.sh", "--data", data / "train.parquet", "--val", data / "heldout.parquet"]
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
