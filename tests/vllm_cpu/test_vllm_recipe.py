"""The recipe's own configuration with vLLM: images in prompts and from tools, a search service, prefix caching."""

from __future__ import annotations

import pytest
import yaml

pytest.importorskip("vllm", reason="`make test-vllm` runs this, in an environment of its own")

from recipe.test_recipe_run import MODEL, train
from transformers import AutoTokenizer
from vllm_cpu.vllm_runs import (
    OVERRIDES,
    assert_recorded_as_executed,
    assert_trained_on_what_was_sampled,
    environment,
    read_trajectories,
)

pytestmark = pytest.mark.timeout(1800)


def test_the_recipe_trains(recipe, service, data, tmp_path):
    url, _ = service
    loop = yaml.safe_load((recipe / "config" / "agent_loop.yaml").read_text())
    loop[0]["_target_"] = "vllm_cpu.witnessed_loops.WitnessedTapoToolAgentLoop"
    agents = tmp_path / "agent_loop.yaml"
    agents.write_text(yaml.safe_dump(loop))
    file = tmp_path / "trajectories.jsonl"
    code, said, metrics = train(
        recipe,
        data,
        tmp_path / "out",
        {"SEARCH_URL": url, **environment(file, recipe)},
        *OVERRIDES,
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={agents}",
        loss="sapo",
    )
    assert code == 0, said[-6000:]
    assert_trained_on_what_was_sampled(metrics)
    assert sum(step["tapo/corrected_steps"] for step in metrics) > 0
    for step in metrics:
        assert step["tapo/recorded_rollouts"] == 1
        assert step["tools/infrastructure_faults"] == 0
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    trajectories = read_trajectories(file)
    assert_recorded_as_executed(trajectories, tokenizer)
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert all(image in trajectory["prompt"] for trajectory in trajectories)
    shown = [trajectory for trajectory in trajectories if image in trajectory["response"]]
    assert shown
    for trajectory in shown:  # only tools show images, none is made up
        produced = [number for step in trajectory["record"]["steps"] for number in step["produced"]]
        assert produced
        places = [place for place, token in enumerate(trajectory["response"]) if token == image]
        assert not any(trajectory["mask"][place] for place in places)
    assert sum(max(trajectory["cached"]) for trajectory in trajectories) > 0
