"""``rollout.name=vllm`` with a text-only model and several turns of tool calls."""

from __future__ import annotations

import prepare
import pytest
import yaml
from cpu_runs import REWARD
from run import train
from test_quickstart_run import same, weights

pytest.importorskip("vllm", reason="`make test-vllm` runs this, in an environment of its own")

from transformers import AutoTokenizer
from vllm_cpu.text_world import end_turns_with_the_call, save_text_model, write_questions, write_tools
from vllm_cpu.vllm_runs import (
    CALL_END,
    VllmRun,
    assert_masked_by_author,
    assert_trained_on_what_was_sampled,
    decoded_call,
    read_trajectories,
    runs_of,
)

from verl_tapo.parsing import parse_steps
from verl_tapo.trainer.verl_parser import cached_parser

pytestmark = pytest.mark.timeout(1200)

SHORT = 70  # tokens of a response: the second call does not always fit
SMALL = [
    "data.custom_cls.path=null",
    "data.train_batch_size=4",
    "actor_rollout_ref.rollout.n=4",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.save_freq=1",
]


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "model")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    prepare.prepare(folder / "data", {"train": 32, "val": 4, "heldout": 4})
    write_questions(folder / "data" / "train.parquet", folder / "questions.parquet")
    write_tools(folder / "tools.yaml")
    save_text_model(folder / "model")
    return folder


def finish(world, name, advantage, loss, loop, *overrides):
    """A run, its metrics and its trajectories."""
    agents = world / f"{name}.yaml"
    agents.write_text(yaml.safe_dump([{"name": loop, "_target_": f"vllm_cpu.witnessed_loops.Witnessed{LOOPS[loop]}"}]))
    settings = {
        "actor_rollout_ref.model.path": world / "model",
        "actor_rollout_ref.rollout.agent.default_agent_loop": loop,
        "actor_rollout_ref.rollout.agent.agent_loop_config_path": agents,
        "actor_rollout_ref.rollout.multi_turn.tool_config_path": world / "tools.yaml",
        "data.train_files": world / "questions.parquet",
        "data.val_files": world / "questions.parquet",
    }
    settings = [f"{key}={value}" for key, value in settings.items()]
    run = VllmRun(name, advantage, loss, out=world, overrides=[*SMALL, *settings, *overrides])
    metrics = train(run)
    return run, metrics, read_trajectories(run.trajectories_file)


LOOPS = {"tapo_tool_agent": "TapoToolAgentLoop", "tool_agent": "ToolAgentLoop"}


def test_beta_0_ends_in_the_weights_of_grpo(world, tokenizer):
    beta_0 = ["algorithm.tapo.beta=0"]
    grpo, grpo_metrics, expected = finish(world, "grpo", "grpo", "vanilla", "tapo_tool_agent")
    zero, zero_metrics, trajectories = finish(world, "beta-0", "tapo", "vanilla", "tapo_tool_agent", *beta_0)
    for metrics in (grpo_metrics, zero_metrics):
        assert_trained_on_what_was_sampled(metrics)
        assert all(step["tapo/recorded_rollouts"] == 1 for step in zero_metrics)
    assert not any(key.startswith("tapo/") for step in grpo_metrics for key in step)
    for one, other in zip(trajectories, expected, strict=True):
        for part in ("rollout", "prompt", "response", "mask", "executed"):
            assert one[part] == other[part]
    assert same(weights(zero), weights(grpo))
    check_records(trajectories, tokenizer)


def check_records(trajectories, tokenizer):
    """What was recorded is what was said and what was executed."""
    turns = 0
    for trajectory in trajectories:
        assert_masked_by_author(trajectory, tokenizer)
        steps = [step for step in trajectory["record"]["steps"] if step["status"] in ("ok", "error")]
        said = [decoded_call(trajectory, step["call"], tokenizer) for step in steps]
        assert said == [[step["tool"], step["arguments"]] for step in steps] == trajectory["executed"]
        turns = max(turns, len(steps))
    assert turns > 1


def test_stock_loop_and_parsed_steps(world, tokenizer):
    """Calls are found in the tokens: of turns that end with the call itself, and of one that is cut within."""
    model = save_text_model(world / "ends_with_the_call")
    end_turns_with_the_call(model)
    reward = world / "reward.py"
    reward.write_text(REWARD)
    run, metrics, trajectories = finish(
        world,
        "stock",
        "tapo",
        "gspo",
        "tool_agent",
        f"actor_rollout_ref.model.path={model}",
        f"data.max_response_length={SHORT}",
        f"reward.custom_reward_function.path={reward}",
    )
    assert_trained_on_what_was_sampled(metrics)
    parser = cached_parser("hermes", tokenizer)
    cut = ended = 0
    for trajectory in trajectories:
        assert_masked_by_author(trajectory, tokenizer)
        response, mask = trajectory["response"], trajectory["mask"]
        parsed = parse_steps(parser, response, mask, [0, len(response)], [0])
        steps = [step for step in parsed.steps if step.tool in ("image_search", "text_search")]
        executed = [decoded_call(trajectory, step.call, tokenizer) for step in steps][: len(trajectory["executed"])]
        assert executed == trajectory["executed"]
        assert not any(step.ok for step in steps[len(executed) :])
        said = [tokenizer.decode(response[start:end]) for start, end in runs_of(mask, 1)]
        ended += sum(text.endswith(CALL_END) for text in said)
        cut += len(response) == SHORT and mask[-1] == 1 and parsed.unclosed > 0
    assert ended > 0
    assert cut > 0
    for step in metrics:
        assert step["tapo/recorded_rollouts"] == 0
    assert sum(step["tapo/corrected_steps"] for step in metrics) > 0
    assert not same(weights(run, 1), weights(run))
