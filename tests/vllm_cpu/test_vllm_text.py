"""``rollout.name=vllm`` with a text-only model and several turns of tool calls."""

from __future__ import annotations

import pytest
from cpu_runs import REWARD, assert_observed_alone
from run import train
from test_quickstart_run import same, weights

pytest.importorskip("vllm", reason="`make test-vllm` runs this, in an environment of its own")

from transformers import AutoTokenizer
from vllm_cpu.text_world import end_turns_with_the_call, save_text_model, text_run
from vllm_cpu.vllm_runs import (
    CALL_END,
    assert_masked_by_author,
    assert_recorded_as_executed,
    assert_trained_on_what_was_sampled,
    decoded_call,
    read_trajectories,
    runs_of,
)

from verl_tapo.calls.parsing import parse_steps
from verl_tapo.trainer.verl_parser import cached_parser

pytestmark = pytest.mark.timeout(1800)

SHORT = 70  # tokens of a response: the second call does not always fit


@pytest.fixture(scope="module")
def tokenizer(text_world):
    return AutoTokenizer.from_pretrained(text_world / "model")


def finish(*arguments):
    """A run as `text_run` describes it, its metrics and its trajectories."""
    run = text_run(*arguments)
    metrics = train(run)
    return run, metrics, read_trajectories(run.trajectories_file)


def test_beta_0_ends_in_the_weights_of_grpo(text_world, tokenizer):
    beta_0 = ["algorithm.tapo.beta=0"]
    grpo, grpo_metrics, expected = finish(text_world, "grpo", "grpo", "vanilla", "tapo_tool_agent")
    zero, zero_metrics, trajectories = finish(text_world, "beta-0", "tapo", "vanilla", "tapo_tool_agent", *beta_0)
    for metrics in (grpo_metrics, zero_metrics):
        assert_trained_on_what_was_sampled(metrics)
    assert all(step["tapo/recorded_rollouts"] == 1 for step in zero_metrics)
    assert_observed_alone(grpo_metrics)
    for one, other in zip(trajectories, expected, strict=True):
        for part in ("rollout", "prompt", "response", "mask", "executed"):
            assert one[part] == other[part]
    assert same(weights(zero), weights(grpo))
    assert_recorded_as_executed(trajectories, tokenizer)


@pytest.mark.long
def test_stock_loop_and_parsed_steps(text_world, tokenizer):
    """Calls are found in the tokens: of turns that end with the call itself, and of one that is cut within."""
    model = save_text_model(text_world / "ends_with_the_call")
    end_turns_with_the_call(model)
    reward = text_world / "reward.py"
    reward.write_text(REWARD)
    run, metrics, trajectories = finish(
        text_world,
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
