"""Runs of veRL's ``main_ppo`` with vLLM on a CPU."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from run import Run
from vllm_cpu.witnessed_loops import FILE_VARIABLE

HERE = Path(__file__).parent
OVERRIDES = [
    "actor_rollout_ref.rollout.name=vllm",
    # Both give the GPU's memory back between steps.
    "actor_rollout_ref.rollout.free_cache_engine=false",
    "+actor_rollout_ref.rollout.enable_sleep_mode=false",
    # Compiling takes longer than these runs.
    "actor_rollout_ref.rollout.enforce_eager=true",
]
STEPS = 2
# Of the quickstart's chat template; they are not what a policy says.
TURN_END, CALL_END = "<|im_end|>", "</tool_call>"
ANSWER_START = "<|im_start|>user\n<tool_response>\n"
ANSWER_END = "\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


def environment(trajectories: Path, *folders: Path) -> dict[str, str]:
    """What a run gets besides: where to write its trajectories, and our modules, after those of other folders."""
    return {
        "PYTHONPATH": os.pathsep.join(map(str, [*folders, HERE.parent, HERE.parent / "support"])),
        FILE_VARIABLE: str(trajectories),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",  # some of vLLM's functions are compiled even then
    }


@dataclass
class VllmRun(Run):
    """One of the quickstart's, with vLLM."""

    steps: int = STEPS

    @property
    def trajectories_file(self) -> Path:
        return self.folder / "trajectories.jsonl"

    def command(self) -> list[str]:
        return [*super().command(), *OVERRIDES]

    def environment(self) -> dict[str, str]:
        folders = [Path(folder) for folder in super().environment()["PYTHONPATH"].split(os.pathsep)]
        return {**super().environment(), **environment(self.trajectories_file, *folders)}


def read_trajectories(file: Path) -> list[dict[str, Any]]:
    """See `witnessed_loops`; in the order of steps and rollouts."""
    trajectories = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(trajectories, key=lambda trajectory: (trajectory["step"], trajectory["rollout"]))


def assert_trained_on_what_was_sampled(metrics: list[dict[str, Any]]) -> None:
    """The actor gives every token the probability with which vLLM drew it: masks, spans, pixels and weights are right.

    Weights above all: vLLM starts with random ones, and in the second step it has those of the first update.
    """
    assert len(metrics) == STEPS
    assert metrics[0]["actor/grad_norm"] > 0
    for step in metrics:
        assert step["training/rollout_probs_diff_valid"] == 1
        assert step["training/rollout_probs_diff_max"] < 1e-4
        assert all(math.isfinite(value) for value in step.values() if isinstance(value, float)), step


def runs_of(mask: list[int], value: int) -> list[tuple[int, int]]:
    """Half-open spans of the mask's maximal runs of a value."""
    edges = [0, *(place for place in range(1, len(mask)) if mask[place] != mask[place - 1]), len(mask)]
    return [(start, end) for start, end in pairwise(edges) if mask[start] == value]


def assert_masked_by_author(trajectory: dict[str, Any], tokenizer: Any) -> None:
    """Mask 0 on whole answers of tools and what the template puts round them; 1 on what the model said."""
    response, mask = trajectory["response"], trajectory["mask"]
    assert len(response) == len(mask)
    assert mask[0] == 1
    for start, end in runs_of(mask, 0):
        text = tokenizer.decode(response[start:end])
        assert text.removeprefix("\n").startswith(ANSWER_START)  # no line ends where a stop token ended the turn
        assert text.endswith(ANSWER_END)
    for _, end in runs_of(mask, 1)[:-1]:
        assert tokenizer.decode(response[end - 1]) in (TURN_END, CALL_END)


def decoded_call(trajectory: dict[str, Any], span: Sequence[int], tokenizer: Any) -> list[Any]:
    """Tool and arguments that the tokens of a span spell, in the hermes format."""
    text = tokenizer.decode(trajectory["response"][slice(*span)])
    call = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert all(trajectory["mask"][slice(*span)])
    return [call["name"], call["arguments"]]


def assert_recorded_as_executed(trajectories: list[dict[str, Any]], tokenizer: Any) -> None:
    """What was recorded is what was said and what was executed, in several turns."""
    turns = 0
    for trajectory in trajectories:
        assert_masked_by_author(trajectory, tokenizer)
        steps = [step for step in trajectory["record"]["steps"] if step["status"] in ("ok", "error")]
        said = [decoded_call(trajectory, step["call"], tokenizer) for step in steps]
        assert said == [[step["tool"], step["arguments"]] for step in steps] == trajectory["executed"]
        turns = max(turns, len(steps))
    assert turns > 1
