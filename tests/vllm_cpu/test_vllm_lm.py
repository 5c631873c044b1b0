"""``rollout.name=vllm`` with a real language model, SmolLM2-135M-Instruct, which is fetched by package name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from run import train
from run_lm import LanguageRun
from test_quickstart_lm import (
    BFLOAT16,
    assert_learned,
    assert_parsed_as_executed,
    assert_recorded,
    assert_rounded,
    model,
    tokenizer,
    witnessed,
)

pytest.importorskip("vllm", reason="`make test-vllm` runs this, in an environment of its own")

from vllm_cpu.vllm_runs import VllmRun, assert_trained_on_what_was_sampled, read_trajectories

__all__ = ["model", "tokenizer"]

pytestmark = pytest.mark.timeout(1800)

# Its embedding has 108 MiB, and vLLM takes no weight that does not fit into one part.
WHOLE_WEIGHTS = "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=128"


@dataclass
class VllmLanguageRun(VllmRun, LanguageRun):
    """The example's, with vLLM."""


def finish(folder, advantage, loop, *overrides):
    """Two steps; returns the run, its metrics and its trajectories."""
    chosen = [*witnessed(folder, loop), WHOLE_WEIGHTS, *overrides]
    run = VllmLanguageRun("vllm", advantage, out=folder, overrides=chosen)
    metrics = train(run)
    return run, metrics, read_trajectories(run.trajectories_file)


def test_tapo_with_recorded_calls(model, tokenizer, tmp_path):
    run, metrics, trajectories = finish(tmp_path, "tapo", "tapo_tool_agent")
    assert_trained_on_what_was_sampled(metrics)
    assert all(step["tapo/recorded_rollouts"] == 1 for step in metrics)
    assert_recorded(trajectories, tokenizer)
    assert_parsed_as_executed(trajectories, tokenizer)
    assert_learned(run, metrics)


@pytest.mark.long
def test_grpo_with_the_stock_loop_in_bfloat16(model, tokenizer, tmp_path):
    run, metrics, trajectories = finish(tmp_path, "grpo", "tool_agent", *BFLOAT16)
    assert_rounded(metrics)
    assert all(trajectory["record"] is None for trajectory in trajectories)
    assert_parsed_as_executed(trajectories, tokenizer)
    assert_learned(run, metrics)
