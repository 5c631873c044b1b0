"""``docs/metrics.md`` names every metric that is logged, and no other, with ranges that hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_tapo import transfer_credit
from verl_tapo.selftest.random_batches import random_batch, random_config
from verl_tapo.selftest.rollouts import data_proto, fake_batch
from verl_tapo.trainer import estimator
from verl_tapo.trainer.estimator import compute_tapo_advantage

pytest.importorskip("verl.trainer.ppo.ray_trainer")

TEXT = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `([a-z]+/[^`]+)`( †)? \| .+? \| ([^|]+?) \|", re.MULTILINE)
RANGES = {"0 to 1": (0, 1), "-1 to 1": (-1, 1), "0 or more": (0, float("inf")), "any": (-float("inf"), float("inf"))}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(estimator, "MONITOR", estimator.RunMonitor())


def explained():
    """Of every row of the tables: whether the metric may be left out, and its range."""
    rows = ROW.findall(TEXT)
    assert len({name for name, _, _ in rows}) == len(rows)
    return {name: (bool(mark), RANGES[span]) for name, mark, span in rows}


def placeholders(name):
    """A metric's name as the document has it."""
    name = re.sub(r"^(tapo/tool|tapo/grounding/tool|tools)/[^/]+/", r"\1/<tool>/", name)
    name = re.sub(r"^reward/.+", "reward/<part>", name)
    return name.replace("<tool>/cache_hit", "<tool>/<number>")


def logged(tokenizer, calls=True, log_probs=True, **tapo):
    """The metrics of a training step of recorded rollouts whose tools return a number; or of one without calls."""
    rows = fake_batch(tokenizer)
    for rollout, _, _ in rows:
        if not calls:
            rollout.record.steps.clear()
        for step in rollout.record.steps:
            step.metrics, step.seen = {"cache_hit": True}, step.tool == "zoom"
    data, metrics = data_proto(rows, tokenizer), {}
    if not log_probs:
        del data.batch["old_log_probs"]
    compute_tapo_advantage(
        data.batch["token_level_rewards"],
        data.batch["response_mask"],
        data.non_tensor_batch["uid"],
        OmegaConf.create({"norm_adv_by_std_in_grpo": True, "tapo": tapo}),
        non_tensor_batch=data.non_tensor_batch,
        batch=data.batch,
        adv_context={"metrics": metrics},
    )
    return metrics


def assert_within(metrics):
    table = explained()
    for name, value in metrics.items():
        low, high = table[placeholders(name)][1]
        assert low <= value <= high, name


def test_every_metric_is_explained_and_exists(qwen_like_tokenizer, tmp_path):
    metrics = logged(qwen_like_tokenizer, record_dir=str(tmp_path / "records"))
    # Of V1's tags; test_trainer_v1.py has it.
    assert {placeholders(name) for name in metrics} == set(explained()) - {"tapo/weights_apart"}
    assert_within(metrics)


def test_what_the_text_names_stands_in_a_table():
    named = set(re.findall(r"`((?:tapo|tools|reward)/[^`]+)`", TEXT))
    assert named - set(explained()) == set()


def test_the_marked_ones_are_left_out_where_they_would_be_of_nothing(qwen_like_tokenizer):
    everything = logged(qwen_like_tokenizer)
    others = [
        logged(qwen_like_tokenizer, tools={"another_tool": {}}),
        logged(qwen_like_tokenizer, calls=False),
        logged(qwen_like_tokenizer, log_probs=False),
    ]
    missing = {placeholders(name) for other in others for name in everything.keys() - other.keys()}
    assert missing == {name for name, (may_be_left_out, _) in explained().items() if may_be_left_out}
    assert all(not value for name, value in others[1].items() if name.startswith(("tools/", "tapo/tool/")))


def test_verl_averages_what_it_has_of_several_batches():
    aggregator = pytest.importorskip("verl.trainer.ppo.v1.utils").MetricsAggregator()
    assert {name: aggregator._get_aggregation_type(name) for name in explained()} == dict.fromkeys(
        explained(), "weighted_avg"
    )


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_the_ranges_hold(seed):
    *batch, steps = random_batch(seed)
    _, report = transfer_credit(*batch, steps, random_config(seed))
    assert_within(report.metrics())
