"""Genuine runs of veRL's ``main_ppo`` on the CPU platform, as subprocesses."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from PIL import Image

COLOURS = ("red", "green", "blue", "white", "black", "yellow", "orange", "purple")
# Varies among the rollouts of a prompt, whatever a random model says.
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    score = sum(map(ord, solution_str)) % 7 / 6
    return {"score": score, "acc": float(score > 0.5)}
"""
# What a run logs of TAPO's under any estimator.
OBSERVED = ("tapo/grounding/", "tapo/nll/", "tapo/tokens/")
PROCESS_OVERHEAD = {"RAY_DEDUP_LOGS": "0", "TOKENIZERS_PARALLELISM": "false", "HYDRA_FULL_ERROR": "1"}


def assert_observed_alone(metrics):
    """Of another estimator's steps: what their calls are like is told, by each kind of figure, and nothing else."""
    told = {name for step in metrics for name in step if name.startswith("tapo/")}
    for kind in OBSERVED:
        assert any(name.startswith(kind) for name in told), kind
    assert not [name for name in told if not name.startswith(OBSERVED)]


@dataclass
class Run:
    """What a run left behind."""

    metrics: list[dict[str, float]]
    """Of each step, from veRL's file logger."""
    stdout: str
    folder: Path

    def weights(self):
        """Of the last checkpoint: (name, tensor) pairs of every rank's shards."""
        import torch

        step = (self.folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()
        files = sorted((self.folder / "checkpoints" / f"global_step_{step}" / "actor").glob("model_*.pt"))
        return [
            (f"{file.name}/{name}", getattr(value, "_local_tensor", value))
            for file in files
            for name, value in torch.load(file, weights_only=False).items()
        ]


def write_prompts(path: Path, count: int, images: bool = True) -> Path:
    """A parquet file of prompts as veRL's `RLHFDataset` reads it, with an image each.

    No two are equally long: veRL 0.9.1 fails on a vision model's batch whose rows all are (docs/tested.md).
    """
    rows = []
    for index in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (60 + 4 * index, 60), COLOURS[index % len(COLOURS)]).save(buffer, format="PNG")
        text = f"{'<image>' if images else ''}Which colour is number {index}?{' Please!' * index}"
        row = {
            "data_source": "colours",
            "prompt": [{"role": "user", "content": text}],
            "reward_model": {"style": "rule", "ground_truth": COLOURS[index % len(COLOURS)]},
            "extra_info": {"index": index},
        }
        rows.append(row | ({"images": [{"bytes": buffer.getvalue()}]} if images else {}))
    pd.DataFrame(rows).to_parquet(path)
    return path


def run_main_ppo(
    overrides: list[str],
    folder: Path,
    env: dict[str, str] | None = None,
    timeout: float = 1700,
    killed_after: int | None = None,
) -> Run:
    """Runs ``python -m verl.trainer.main_ppo --config-name cpu`` in a folder.

    Args:
        overrides: Hydra's; ``actor_rollout_ref.model.path`` must be among them. Data and reward function are made here
            unless ``data.train_files`` is given.
        folder: for whatever the run writes; made if it does not exist.
        env: further environment variables.
        timeout: seconds.
        killed_after: the step whose checkpoint, once it is there, ends the run: its processes are killed (kill -9).

    Raises:
        AssertionError: if the run fails, with the end of what it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not any(override.startswith("data.train_files=") for override in overrides):
        prompts = write_prompts(folder / "prompts.parquet", 8)
        reward = folder / "reward.py"
        reward.write_text(REWARD)
        overrides = [
            f"data.train_files={prompts}",
            f"data.val_files={prompts}",
            f"reward.custom_reward_function.path={reward}",
            *overrides,
        ]
    log = folder / "metrics.jsonl"
    command = [
        sys.executable,
        "-m",
        "verl.trainer.main_ppo",
        "--config-name",
        "cpu",
        "trainer.logger=[console,file]",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        f"hydra.run.dir={folder / 'hydra'}",
        *overrides,
    ]
    environment = os.environ | PROCESS_OVERHEAD | {"VERL_PLATFORM": "cpu", "VERL_FILE_LOGGER_PATH": str(log)}
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command,
            env=environment | (env or {}),
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    with killed_at_the_end(process):
        if killed_after is None:
            code = process.wait(timeout)
        else:
            code = wait_for_checkpoint(process, folder / "checkpoints", killed_after, timeout)
    said = (folder / "output.txt").read_text()
    assert code == 0, f"main_ppo ended with {code}:\n{said[-6000:]}"
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    return Run([step["data"] for step in steps], said, folder)


@contextmanager
def killed_at_the_end(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kills (kill -9) all processes of its session where it has not ended by then."""
    try:
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for_checkpoint(process: subprocess.Popen[bytes], checkpoints: Path, step: int, timeout: float) -> int:
    """0 once it is there, or a later one; the exit code of a run that ended before."""
    written = checkpoints / "latest_checkpointed_iteration.txt"
    until = time.monotonic() + timeout
    # It is empty for a moment.
    while not written.is_file() or int(written.read_text() or -1) < step:
        if process.poll() is not None:
            return process.returncode
        assert time.monotonic() < until, f"no checkpoint of step {step}"
        time.sleep(0.05)
    return 0
