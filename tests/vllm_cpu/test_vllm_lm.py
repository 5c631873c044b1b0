"""``rollout.name=vllm`` with a real language model, SmolLM2-135M-Instruct, which is fetched by package name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import told
import yaml
from cpu_runs import REWARD
from run import train
from run_lm import LanguageRun
from test_quickstart_lm import (
    LOOPS,
    SMALL,
    assert_learned,
    assert_parsed_as_executed,
    assert_recorded,
    model,
    tokenizer,
)

pytest.importorskip("vllm", reason="`make test-vllm` runs this, in an environment of its own")

from vllm_cpu.vllm_runs import VllmRun, assert_trained_on_what_was_sampled, read_trajectories

__all__ = ["model", "tokenizer"]

pytestmark = pytest.mark.timeout(1800)


@dataclass
class VllmLanguageRun(VllmRun, LanguageRun):
    """The example's, with vLLM."""


def test_two_steps_of_tapo(model, tokenizer, tmp_path):
    told.prepare(tmp_path / "data", {"train": 16, "heldout": 4})
    (tmp_path / "reward.py").write_text(REWARD)
    agents = tmp_path / "agents.yaml"
    loop = "tapo_tool_agent"
    agents.write_text(yaml.safe_dump([{"name": loop, "_target_": f"vllm_cpu.witnessed_loops.{LOOPS[loop]}"}]))
    overrides = [
        *SMALL,
        f"reward.custom_reward_function.path={tmp_path / 'reward.py'}",
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={agents}",
    ]
    run = VllmLanguageRun("vllm", out=tmp_path, overrides=overrides)
    metrics = train(run)
    trajectories = read_trajectories(run.trajectories_file)
    assert_trained_on_what_was_sampled(metrics)
    assert all(step["tapo/recorded_rollouts"] == 1 for step in metrics)
    assert_recorded(trajectories, tokenizer)
    assert_parsed_as_executed(trajectories, tokenizer)
    assert_learned(run, metrics)
