"""Through veRL's own V0 path, ``compute_advantage(DataProto)``, as the asynchronous experiments use it."""

import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rollouts import (
    GROUNDED_ADVANTAGES,
    GROUNDING_METRICS,
    LUXEMBOURG,
    NLL_METRICS,
    grounded_group,
    log_probs_of,
    silent_group,
    token_shares,
)

from verl_tapo import TapoConfig, TapoSettings, ToolStep, transfer_credit
from verl_tapo.audit import audit
from verl_tapo.records import recorded_steps
from verl_tapo.selftest.rollouts import FakeRollout, data_proto, fake_batch, padded
from verl_tapo.trainer import estimator, v0
from verl_tapo.trainer.rollout import RolloutBatch
from verl_tapo.trainer.verl_parser import declared_tools

ray_trainer = pytest.importorskip("verl.trainer.ppo.ray_trainer")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(estimator, "MONITOR", estimator.RunMonitor())
    v0._pending.clear()


@pytest.fixture
def trainer(qwen_like_tokenizer, monkeypatch):
    """Stands for the trainer that the constructor's hook would have noted."""
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"multi_turn": {"format": "hermes"}}}})
    noted = types.SimpleNamespace(tokenizer=qwen_like_tokenizer, config=config)
    monkeypatch.setattr(v0, "_trainer", lambda: noted)
    return noted


def algorithm(**tapo):
    return OmegaConf.create(
        {"gamma": 1.0, "lam": 1.0, "norm_adv_by_std_in_grpo": True, "adv_estimator": "tapo", "tapo": tapo}
    )


PATCHED = hasattr(ray_trainer, "ADV_CONTEXT_VERSION")
"""One of our patches is applied: the trainer itself hands over what the hooks otherwise fetch (see test_patches.py)."""


def context():
    noted = v0._trainer() if v0._trainer is not None else None
    given = {name: getattr(noted, name, None) for name in ("tokenizer", "config")}
    given["step"] = getattr(noted, "global_steps", None)
    return {"adv_context": {**given, "metrics": v0._pending, "fields": {}}} if PATCHED else {}


def step_metrics(data):
    """The step's metrics, as the trainer puts them together."""
    metrics = ray_trainer.compute_data_metrics(batch=data, use_critic=False)
    if PATCHED:
        metrics.update(v0._pending)
        v0._pending.clear()
    return metrics


def compute(data, estimator_name="tapo", **tapo):
    return ray_trainer.compute_advantage(
        data, estimator_name, norm_adv_by_std_in_grpo=True, config=algorithm(**tapo), **context()
    )


def test_corrects_what_the_rule_says(qwen_like_tokenizer, trainer):
    rows = fake_batch(qwen_like_tokenizer)
    base = compute(data_proto(rows, qwen_like_tokenizer), "grpo").batch
    data = compute(data_proto(rows, qwen_like_tokenizer))
    steps = []
    for row, (rollout, _, _) in enumerate(rows):
        steps += recorded_steps(rollout.record.to_dict(), row, len(rollout.ids), (), None)
    expected, report = transfer_credit(
        base["advantages"], base["response_mask"], [r[2] for r in rows], [r[1] for r in rows], steps, TapoConfig()
    )
    assert torch.equal(data.batch["advantages"], expected)
    assert torch.equal(data.batch["returns"], base["returns"])
    gates = [s.gate for s in report.steps]
    assert (gates.count("corrected"), gates.count("below_theta")) == (6, 2)
    changed = data.batch["advantages"] != base["advantages"]
    assert 0 < int(changed.sum()) < changed.numel()


def test_recorded_and_parsed_steps_give_the_same(qwen_like_tokenizer, trainer):
    rows = fake_batch(qwen_like_tokenizer)
    recorded = compute(data_proto(rows, qwen_like_tokenizer))
    parsed = compute(data_proto(rows, qwen_like_tokenizer, recorded=False))
    ignored = compute(data_proto(rows, qwen_like_tokenizer), step_source="parsed")
    for other in (parsed, ignored):
        assert torch.equal(recorded.batch["advantages"], other.batch["advantages"])
        assert torch.equal(recorded.batch["tapo_tool_mask"], other.batch["tapo_tool_mask"])
    # a mix: half of the rows have a record
    mixed = data_proto(rows, qwen_like_tokenizer)
    mixed.non_tensor_batch["tapo_steps"][::2] = None
    assert torch.equal(compute(mixed).batch["advantages"], recorded.batch["advantages"])
    mixed = data_proto(rows, qwen_like_tokenizer)
    mixed.non_tensor_batch["tapo_steps"][::2] = None
    with pytest.raises(ValueError, match="6 of 11 rollouts have no record"):
        compute(mixed, step_source="recorded")


def test_grounding_from_record_and_from_tokens(qwen_like_tokenizer, trainer):
    """All three switches: what they do to each row, by hand."""
    rows = grounded_group(qwen_like_tokenizer)
    results = []
    for recorded in (True, False):
        data = data_proto(rows, qwen_like_tokenizer, recorded=recorded, reward_model=[LUXEMBOURG] * len(rows))
        switches = {"witnesses": True, "own": True, "luck": True}
        data = compute(data, alpha_min=1.0, grounding=switches)
        result, metrics = data.batch["advantages"], step_metrics(data)
        done = {"tapo/grounding/forgiven_steps": 1 / 5, "tapo/grounding/withheld_trajectories": 2 / 6}
        told = {key: value for key, value in metrics.items() if "grounding" in key}
        assert told == pytest.approx({**GROUNDING_METRICS, **done})
        results.append(result)
    assert torch.equal(*results)
    mask = data.batch["response_mask"] == 1
    values = [sorted(set(result[row][mask[row]].tolist())) for row in range(len(rows))]
    assert values == [pytest.approx(of_row, abs=1e-5) for of_row in GROUNDED_ADVANTAGES]


@pytest.mark.parametrize("recorded", [True, False])
def test_luck_reaches_prompts_whose_rollouts_call_nothing(qwen_like_tokenizer, trainer, recorded):
    rows, switches = silent_group(qwen_like_tokenizer), {"luck": True}
    data = data_proto(rows, qwen_like_tokenizer, recorded=recorded, reward_model=[LUXEMBOURG] * len(rows))
    data = compute(data, grounding=switches)
    assert data.batch["advantages"].count_nonzero() == 0
    assert step_metrics(data)["tapo/grounding/withheld_trajectories"] == 1 / 2


def _nothing(case, rows):
    if case == "beta=0":
        return rows, {"beta": 0.0}
    if case == "no tools":
        return rows, {"tools": {"another_tool": {}}}
    # no witness: nobody succeeds but those without tools
    return [(r, ok and not r.record.steps, uid) for r, ok, uid in rows], {}


@pytest.mark.parametrize("case", ["beta=0", "no tools", "no witness"])
@pytest.mark.parametrize("base", ["grpo", "grpo_vectorized", "rloo", "reinforce_plus_plus_baseline", "opo", "gpg"])
def test_nothing_to_transfer_is_the_base_bit_for_bit(qwen_like_tokenizer, trainer, case, base):
    rows, settings = _nothing(case, fake_batch(qwen_like_tokenizer))
    stock = compute(data_proto(rows, qwen_like_tokenizer), base).batch
    ours = compute(data_proto(rows, qwen_like_tokenizer), base_estimator=base, **settings).batch
    if base == "rloo" and not torch.isfinite(stock["advantages"]).all():
        pytest.skip("the stock estimator itself yields NaN here")
    assert torch.equal(stock["advantages"], ours["advantages"])
    assert torch.equal(stock["returns"], ours["returns"])


@pytest.mark.parametrize("loss_mode", ["vanilla", "gspo", "sapo"])
def test_policy_losses_and_gradients_equal_grpo_where_nothing_is_transferred(qwen_like_tokenizer, trainer, loss_mode):
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    rows = fake_batch(qwen_like_tokenizer)
    batches = [
        compute(data_proto(rows, qwen_like_tokenizer), "grpo").batch,
        compute(data_proto(rows, qwen_like_tokenizer), beta=0.0).batch,
        compute(data_proto(rows, qwen_like_tokenizer)).batch,
    ]
    config = FSDPActorConfig(
        strategy="fsdp",
        rollout_n=8,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=0.2,
        tau_pos=1.0,
        tau_neg=1.05,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
    )
    config.global_batch_info.update(
        dp_size=1, batch_num_tokens=int(batches[0]["response_mask"].sum()), global_batch_size=len(rows)
    )
    outcomes = []
    for batch in batches:
        torch.manual_seed(0)
        old = -torch.rand(batch["advantages"].shape)
        new = (old + 0.1 * torch.randn_like(old)).requires_grad_()
        mode = "seq-mean-token-mean" if loss_mode != "vanilla" else "token-mean"
        loss, _ = get_policy_loss_fn(loss_mode)(
            old, new, batch["advantages"], batch["response_mask"], mode, config, None
        )
        loss.backward()
        outcomes.append((loss.detach(), new.grad))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    assert not torch.equal(outcomes[0][1], outcomes[2][1])  # and with a transfer the loss does see it


def test_metrics_and_tool_mask_reach_the_trainer(qwen_like_tokenizer, trainer):
    rows = fake_batch(qwen_like_tokenizer)
    data = compute(data_proto(rows, qwen_like_tokenizer))
    metrics = step_metrics(data)
    assert metrics["tapo/corrected_steps"] == pytest.approx(6 / 8)
    assert metrics["tapo/successes_per_group"] == pytest.approx(4 / 3)
    assert metrics["tapo/recorded_rollouts"] == 1.0
    assert metrics["critic/rewards/mean"] == pytest.approx(4 / 11)  # veRL's own are still there
    assert not any(np.isnan(value) for name, value in metrics.items() if name.startswith("tapo/"))
    assert not any(name.startswith("tapo/") for name in step_metrics(data))
    mask = data.batch["tapo_tool_mask"]
    assert mask.shape == data.batch["responses"].shape
    assert mask.max() == 2
    assert not (mask.bool() & ~data.batch["response_mask"].bool()).any()


def test_step_records(qwen_like_tokenizer, trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(estimator._RecorderCache, "recorder", None)
    monkeypatch.setattr(estimator._RecorderCache, "step", 0)
    rows = fake_batch(qwen_like_tokenizer)
    logged = []
    for step in (5, 6):
        trainer.global_steps = step
        data = compute(data_proto(rows, qwen_like_tokenizer), record_dir=str(tmp_path))
        logged.append(step_metrics(data))
    estimator._RecorderCache.recorder.flush()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000005.jsonl.gz", "000006.jsonl.gz"]
    for figures, metrics in zip(audit(tmp_path).result["steps"], logged, strict=True):
        assert figures["corrected_steps"] / figures["failing_steps"] == metrics["tapo/corrected_steps"]
        assert figures["token_share"] == pytest.approx(metrics["tapo/token_share"])


def test_the_aggregator_of_the_trainer_averages_every_metric(qwen_like_tokenizer, trainer):
    aggregators = pytest.importorskip("verl.trainer.ppo.v1.utils")
    data = compute(data_proto(fake_batch(qwen_like_tokenizer), qwen_like_tokenizer))
    names = [n for n in step_metrics(data) if n.startswith("tapo/")]
    tools = ["summarise", "MAX_search", "minimum", "total_recall", "sum", "terminal", "a b/c", "search_lr"]
    from verl_tapo.rule.report import metric_word

    names += [f"tapo/tool/{metric_word(tool)}/corrected_steps" for tool in tools]
    aggregator = aggregators.MetricsAggregator()
    assert {name: aggregator._get_aggregation_type(name) for name in names} == dict.fromkeys(names, "weighted_avg")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_no_number_poisons_nothing(qwen_like_tokenizer, trainer, bad, caplog):
    rows = fake_batch(qwen_like_tokenizer)
    data = data_proto(rows, qwen_like_tokenizer)
    data.batch["token_level_rewards"][2, 0] = bad
    data.batch["token_level_scores"][2, 0] = bad
    data.non_tensor_batch["acc"][2] = bad
    result = compute(data).batch["advantages"]
    assert step_metrics(data)["tapo/dropped_rows"] == 1.0
    assert torch.isfinite(result).all()
    assert (result[2] == 0).all()
    without = [row for number, row in enumerate(rows) if number != 2]
    expected = compute(data_proto(without, qwen_like_tokenizer)).batch["advantages"]
    kept = [number for number in range(len(rows)) if number != 2]
    assert torch.equal(result[kept][:, : expected.shape[1]], expected)
    assert "1 rows have a reward" in caplog.text


def test_no_finite_reward_at_all_stops_the_run(qwen_like_tokenizer, trainer):
    data = data_proto(fake_batch(qwen_like_tokenizer), qwen_like_tokenizer)
    data.batch["token_level_rewards"][:] = float("nan")
    with pytest.raises(ValueError, match="no row of the batch has a finite reward"):
        compute(data)


def test_success(qwen_like_tokenizer, trainer):
    rows = fake_batch(qwen_like_tokenizer)
    plain = compute(data_proto(rows, qwen_like_tokenizer)).batch["advantages"]
    # without the key the score decides
    without_key = data_proto(rows, qwen_like_tokenizer)
    del without_key.non_tensor_batch["acc"]
    assert torch.equal(compute(without_key).batch["advantages"], plain)
    # a key of one's own; a threshold
    graded = data_proto(rows, qwen_like_tokenizer, f1=[0.7 if ok else 0.6 for _, ok, _ in rows])
    assert torch.equal(compute(graded, success_key="f1", success_threshold=0.65).batch["advantages"], plain)
    graded = data_proto(rows, qwen_like_tokenizer, f1=[0.7 if ok else 0.6 for _, ok, _ in rows])
    base = compute(data_proto(rows, qwen_like_tokenizer), "grpo").batch["advantages"]
    assert torch.equal(compute(graded, success_key="f1").batch["advantages"], base)  # all succeed: nothing fails
    with pytest.raises(ValueError, match="success_key='acuracy' is in no row's reward info"):
        compute(data_proto(rows, qwen_like_tokenizer), success_key="acuracy")


def test_rejected_tokens_and_rows(qwen_like_tokenizer, trainer):
    rows = fake_batch(qwen_like_tokenizer)
    stock, data = data_proto(rows, qwen_like_tokenizer), data_proto(rows, qwen_like_tokenizer)
    for batch in (stock, data):
        batch.batch["response_mask"][0] = 0
        batch.batch["response_mask"][4, ::3] = 0
    result, base = compute(data).batch["advantages"], compute(stock, "grpo").batch["advantages"]
    rejected = data.batch["response_mask"] == 0
    assert torch.equal(result[rejected], base[rejected])
    assert (result >= base).all()
    assert (result != base).any()


def test_single_rejected_tokens_cannot_be_parsed_round_in_v0(qwen_like_tokenizer, trainer):
    rows = fake_batch(qwen_like_tokenizer)
    config = algorithm()
    config.rollout_correction = {"rollout_rs": "token_k1", "rollout_rs_threshold": 2.0}
    data = data_proto(rows, qwen_like_tokenizer, recorded=False)
    with pytest.raises(ValueError, match="rejects single tokens"):
        ray_trainer.compute_advantage(data, "tapo", config=config, **context())
    ray_trainer.compute_advantage(data_proto(rows, qwen_like_tokenizer), "tapo", config=config, **context())


def test_no_rollout_data_is_an_error_not_plain_grpo(qwen_like_tokenizer):
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    data = data_proto(fake_batch(qwen_like_tokenizer), qwen_like_tokenizer)
    tapo = get_adv_estimator_fn("tapo")
    with pytest.raises(RuntimeError, match="called without rollout data"):
        tapo(data.batch["token_level_rewards"], data.batch["response_mask"], index=data.non_tensor_batch["uid"])
    nothing = data_proto(fake_batch(qwen_like_tokenizer), qwen_like_tokenizer, recorded=False)
    with pytest.raises(ValueError, match="handed over no tokenizer"):
        compute(nothing)


def test_shape_of_pr_7473(qwen_like_tokenizer):
    """A veRL that hands batch and columns to the estimator itself, without any hook."""
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    rows = fake_batch(qwen_like_tokenizer)
    data = data_proto(rows, qwen_like_tokenizer)
    advantages, _ = get_adv_estimator_fn("tapo")(
        token_level_rewards=data.batch["token_level_rewards"],
        response_mask=data.batch["response_mask"],
        index=data.non_tensor_batch["uid"],
        config=algorithm(),
        non_tensor_batch=data.non_tensor_batch,
        batch=data.batch,
        something_new=None,
    )
    assert torch.equal(advantages, compute(data_proto(rows, qwen_like_tokenizer)).batch["advantages"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_the_model_wrote_never_stops_a_run(qwen_like_tokenizer, trainer, data):
    """Garbage tokens, markers anywhere, masks with holes, unicode, a call at the very last token."""
    pieces = [
        "<tool_call>",
        "</tool_call>",
        "<tool_response>",
        "</tool_response>",
        "<|im_end|>",
        "<|vision_start|>",
        '{"name": "text_search", "arguments": {"query": "capital of France"}}',
        '{"name": "zoom", "arguments": {"bbox_2d": [1, 2, 1e400, null], "image": -3}}',
        '{"name": "text_search", "arguments": {"query": ["a", {"b": NaN}]}}',
        '{"name": 7, "arguments": "x"}',
        '{"name": "text_search", "arguments": ' + '{"a":' * 300 + "1" + "}" * 300 + "}",
        "北京 😀 \x00",
        '"""\\',
    ]
    rows = []
    for number in range(4):
        rollout = FakeRollout(qwen_like_tokenizer)
        for piece in data.draw(st.lists(st.sampled_from(pieces), max_size=8)):
            rollout._add(piece, data.draw(st.integers(0, 1)))
        ids = data.draw(st.lists(st.integers(0, len(qwen_like_tokenizer) + 50), min_size=1, max_size=5))
        rollout.ids += ids
        rollout.mask += [data.draw(st.integers(0, 1))] * len(ids)
        rows.append((rollout, number % 2 == 0, "u"))
    batch = data_proto(rows, qwen_like_tokenizer, recorded=False)
    stock = compute(data_proto(rows, qwen_like_tokenizer, recorded=False), "grpo").batch["advantages"]
    result = compute(batch).batch["advantages"]
    assert torch.isfinite(result).all()
    assert (result >= stock).all()
    assert torch.equal(result[::2], stock[::2])


def test_ten_megabytes_of_arguments(qwen_like_tokenizer, trainer):
    rows = fake_batch(qwen_like_tokenizer)
    huge = "x" * 10_000_000
    ids = qwen_like_tokenizer.encode("<tool_call>")
    long = qwen_like_tokenizer.encode("xxxxxxxxxx" * 20)
    rows[0][0].ids[:0] = ids + long * 2000
    rows[0][0].mask[:0] = [1] * len(ids + long * 2000)
    for rollout, _, _ in rows[2:4]:
        for step in rollout.record.steps:
            step.arguments = {"query": huge}
    data = data_proto(rows, qwen_like_tokenizer)
    data.non_tensor_batch["tapo_steps"][0] = None
    assert torch.isfinite(compute(data).batch["advantages"]).all()


def test_what_is_reported_once(qwen_like_tokenizer, trainer, caplog):
    rows = fake_batch(qwen_like_tokenizer)
    for _ in range(4):
        compute(data_proto(rows, qwen_like_tokenizer))
    assert caplog.text.count("'text_search' takes part, compared by query=text") == 1
    assert caplog.text.count("'zoom' takes part, compared by image=exact, bbox_2d=iou") == 1
    assert "without a parameter that counts" not in caplog.text
    caplog.clear()
    tools = {"text_search": {"query": "text"}, "image_serach": {}}
    for _ in range(4):
        compute(data_proto(rows, qwen_like_tokenizer), tools=tools, patience=6)
    assert caplog.text.count("the tool 'image_serach' of algorithm.tapo.tools was never called in 6 batches") == 1


@pytest.mark.parametrize("finds", [0, 1, 4])
def test_luck_that_leaves_hardly_any_reward_is_reported(qwen_like_tokenizer, trainer, caplog, finds):
    """Of two lucky successes in each of four batches, and the ones that found the answer in the last ``finds``."""
    rows = grounded_group(qwen_like_tokenizer)
    for batch in range(4):
        chosen = rows if batch >= 4 - finds else rows[1:]
        compute(data_proto(chosen, qwen_like_tokenizer), grounding={"luck": True}, patience=4)
    told = "grounding.luck made failures of 8 of 8 successes in 4 batches, so hardly anything is rewarded"
    assert (told in caplog.text) == (finds == 0)
    assert ("hardly anything" in caplog.text) == (finds == 0)


def test_who_takes_part_and_what_became_of_each_step(qwen_like_tokenizer, trainer, caplog):
    rows = fake_batch(qwen_like_tokenizer)
    tools = {"text_search": {"query": "text"}, "zoom": {"bbox_2d": {"kernel": "iou"}, "image": "exact"}, "fetch": None}
    for step in (11, 12):
        trainer.global_steps = step
        compute(data_proto(rows, qwen_like_tokenizer), tools=tools)
    lines = [record.getMessage() for record in caplog.records if record.name == "verl_tapo"]
    kernels = "text_search (query=text), zoom (bbox_2d=iou, image=exact), fetch"
    assert lines == [
        f"TAPO: tools that take part: {kernels}; parameters not named: exact",
        "TAPO: of 11 rollouts, success is the reward's 'acc' in 11 and the score in 0 (at 0.5 or above); "
        "calls were recorded in 11 and are read from the tokens in 0",
        "TAPO: step 11: 14 calls, 8 failing, 6 misassigned, 6 corrected",
        "TAPO: step 12: 14 calls, 8 failing, 6 misassigned, 6 corrected",
    ]
    del trainer.global_steps
    caplog.clear()
    compute(data_proto(rows, qwen_like_tokenizer), tools=tools, alpha_min=0.5)
    assert "TAPO: batch 3: 14 calls, 8 failing, 6 misassigned, 4 corrected" in caplog.text


def test_the_console_shows_it_where_nothing_was_configured():
    """As in veRL's Ray processes, in which no logger has a handler."""
    code = """
from verl_tapo import TapoConfig, transfer_credit
from verl_tapo.trainer.monitor import RunMonitor
import torch
report = transfer_credit(torch.ones(1, 1), torch.ones(1, 1), ["u"], [True], [], TapoConfig())[1]
monitor = RunMonitor()
monitor.sum_up(report, 7, 0)
monitor.sum_up(report, 7, 1)
monitor.tell("key", "a warning")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = [f"TAPO: step 7{part}: 0 calls, 0 failing, 0 misassigned, 0 corrected" for part in ("", ", batch 2")]
    assert done.stderr.splitlines() == [*said, "TAPO: a warning"]


def test_a_parameter_that_no_call_has_is_reported(qwen_like_tokenizer, trainer, caplog):
    rows = fake_batch(qwen_like_tokenizer)
    for _ in range(3):
        compute(data_proto(rows, qwen_like_tokenizer), tools={"text_search": {"querry": "text"}}, patience=2)
    message = (
        "no call of 'text_search' in 2 batches had the parameter 'querry' of algorithm.tapo.tools; they had: query"
    )
    assert caplog.text.count(message) == 1


def test_a_tool_that_is_called_no_more_leaves_no_gap(qwen_like_tokenizer, trainer):
    rows = fake_batch(qwen_like_tokenizer)
    before = step_metrics(compute(data_proto(rows, qwen_like_tokenizer)))
    for rollout, _, _ in rows:
        rollout.record.steps = [step for step in rollout.record.steps if step.tool != "zoom"]
    after = step_metrics(compute(data_proto(rows, qwen_like_tokenizer)))
    assert before["tapo/tool/zoom/steps_per_trajectory"] == pytest.approx(3 / 11)
    assert before["tools/zoom/calls_per_trajectory"] == pytest.approx(3 / 11)
    assert before["tapo/tool/zoom/corrected_steps"] > 0
    zoom = {name.rpartition("/")[2]: value for name, value in after.items() if name.startswith("tapo/tool/zoom/")}
    assert zoom == dict.fromkeys(["steps_per_trajectory", "failed_calls", "misassigned_steps", "corrected_steps"], 0.0)
    assert after["tools/zoom/calls_per_trajectory"] == 0.0
    assert after["tapo/tool/text_search/steps_per_trajectory"] == before["tapo/tool/text_search/steps_per_trajectory"]


AGENT_LOOP = "actor_rollout_ref.rollout.agent.default_agent_loop=tapo_tool_agent"


@pytest.mark.parametrize(
    ("default", "column", "warning"),
    [
        (
            "tapo_tool_agent",
            "tool_agent",
            "the data set's rows name the agent loop 'tool_agent' in their column agent_name",
        ),
        ("tapo_tool_agent", None, "is set, but another agent loop ran"),
        ("tool_agent", "tool_agent", None),
        (None, None, None),
    ],
)
def test_a_recording_that_is_overridden_is_warned_of(qwen_like_tokenizer, trainer, caplog, default, column, warning):
    trainer.config.actor_rollout_ref.rollout.agent = {"default_agent_loop": default}
    rows = fake_batch(qwen_like_tokenizer)
    columns = {} if column is None else {"agent_name": [column] * len(rows)}
    recorded = data_proto(rows, qwen_like_tokenizer, **columns)
    compute(recorded)
    assert "without a record" not in caplog.text
    for missing in (len(rows), 1):
        caplog.clear()
        estimator.MONITOR = estimator.RunMonitor()  # the fixture puts the old one back
        for _ in range(2):
            data = data_proto(rows, qwen_like_tokenizer, **columns)
            data.non_tensor_batch["tapo_steps"][:missing] = None
            compute(data)
        if warning is None:
            assert "without a record" not in caplog.text
        else:
            assert caplog.text.count(f"{missing} of 11 rollouts came without a record. {AGENT_LOOP}") == 1
            assert warning in caplog.text


@pytest.mark.parametrize(
    ("yes", "no"),
    [
        (True, False),
        ("1.0", "0.0"),
        ("True", "false"),
        (" true ", "False"),
        (np.float32(1), np.bool_(False)),
        (np.array([1.0]), np.array(0)),
        (torch.tensor(1), torch.tensor([0.0])),
        (10**400, -(10**400)),
        (float("inf"), float("-inf")),
        (10**5000, "0"),
    ],
    ids=type,
)
def test_success_values_of_every_kind(qwen_like_tokenizer, trainer, yes, no):
    rows = fake_batch(qwen_like_tokenizer)
    expected = compute(data_proto(rows, qwen_like_tokenizer)).batch["advantages"]
    data = compute(data_proto(rows, qwen_like_tokenizer, acc=[yes if ok else no for _, ok, _ in rows]))
    assert torch.equal(data.batch["advantages"], expected)
    metrics = step_metrics(data)
    assert (metrics["tapo/success_rate"], metrics["tapo/success_unreadable"]) == (pytest.approx(4 / 11), 0.0)


class Unwilling:
    def __float__(self):
        raise RuntimeError("no number")

    def __repr__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    "odd", ["maybe", "", b"x", {}, [1, 0], object(), Unwilling(), 1j, float("nan"), np.array([1.0, 2.0])], ids=type
)
def test_success_values_that_are_none_are_counted_and_named(qwen_like_tokenizer, trainer, caplog, odd):
    rows = fake_batch(qwen_like_tokenizer)
    base = compute(data_proto(rows, qwen_like_tokenizer), "grpo").batch["advantages"]
    for _ in range(2):
        data = compute(data_proto(rows, qwen_like_tokenizer, acc=[odd] * len(rows)))
    assert torch.equal(data.batch["advantages"], base)  # nobody succeeds
    metrics = step_metrics(data)
    assert (metrics["tapo/success_rate"], metrics["tapo/success_unreadable"]) == (0.0, 1.0)
    assert caplog.text.count("in 100% of the rollouts the reward's 'acc' is no number (") == 1


def test_names_that_never_occur_are_reported_with_those_that_did(qwen_like_tokenizer, trainer, caplog):
    rows = fake_batch(qwen_like_tokenizer)
    tools = {
        "text_serch": {"query": "text"},
        "text_search": {"querry": "text"},
        "zoom": {"image": "exact", "xyz": "iou"},
    }
    for _ in range(5):
        compute(data_proto(rows, qwen_like_tokenizer), tools=tools, patience=3)
    told = [record.message for record in caplog.records if "of algorithm.tapo.tools" in record.message]
    assert len(told) == 3
    assert "the tool 'text_serch' of algorithm.tapo.tools was never called in 3 batches; tools that were: " in told[0]
    assert told[0].endswith("; did you mean 'text_search'?")
    querry = "no call of 'text_search' in 3 batches had the parameter 'querry' of algorithm.tapo.tools; they had: query"
    assert told[1].endswith(f"{querry}; did you mean 'query'?")
    assert "no call of 'zoom' in 3 batches had the parameter 'xyz' of algorithm.tapo.tools; they had: bbox" in told[2]
    caplog.clear()
    for _ in range(2):
        compute(data_proto(rows, qwen_like_tokenizer), tools=tools, patience=0)
    assert "never called" not in caplog.text


def test_what_tools_are_left_out_by_default_is_logged(caplog):
    monitor, settings = estimator.RunMonitor(), TapoSettings()
    calls = {"finish": {"answer": "x"}, "next_page": {}, "zoom": {"bbox": [0, 0, 1, 1], "label": "dog"}}
    for _ in range(2):
        monitor.look([ToolStep(0, tool, given, (0, 1), (0, 1)) for tool, given in calls.items()], settings)
    finish, next_page, zoom = (record.message for record in caplog.records)
    assert "the tool 'finish' is left out: its name says that it ends the rollout" in finish
    assert "'next_page' takes part" in next_page
    assert "calls like this one, without a parameter that counts, do not" in next_page
    assert "compared by bbox=iou, label=ignore (others: exact)" in zoom


def test_a_run_without_any_call_is_reported(qwen_like_tokenizer, trainer, caplog):
    rows = [row for row in fake_batch(qwen_like_tokenizer) if not row[0].record.steps]
    for _ in range(5):
        compute(data_proto(rows, qwen_like_tokenizer))
    assert caplog.text.count("not a single tool call was found in 3 batches") == 1


@pytest.mark.parametrize(
    ("tapo", "rollout", "message"),
    [
        ({"betta": 1}, {}, "algorithm.tapo.betta: unknown setting; did you mean 'beta'?"),
        ({"theta": 2}, {}, "algorithm.tapo.theta must be a number in"),
        ({"base_estimator": "gae"}, {}, "base_estimator=gae is no group estimator; known: "),
        ({"tool_format": "hermez"}, {}, "the tool format 'hermez' is not known; known: "),
        ({"record_dir": "/dev/null"}, {}, "algorithm.tapo.record_dir=/dev/null cannot be written to"),
        ({"record_dir": "FOREIGN"}, {}, "holds 00001.parquet, .* move it away"),
        ({"tools": {}}, {}, "algorithm.tapo.tools names no tool"),
    ],
)
def test_a_bad_configuration_stops_the_trainer_in_its_constructor(tapo, rollout, message, tmp_path):
    if tapo.get("record_dir") == "FOREIGN":
        (tmp_path / "00001.parquet").write_bytes(b"rows")
        tapo = {"record_dir": str(tmp_path)}
    config = OmegaConf.create(
        {
            "algorithm": algorithm(**tapo),
            "actor_rollout_ref": {"rollout": {"n": 8, "multi_turn": {"format": "hermes"}, **rollout}},
        }
    )
    with pytest.raises(ValueError, match=message):
        ray_trainer.RayPPOTrainer(config, None, {}, None)


TOOLS_YAML = """
tools:
  - class_name: some.Search
    config: {type: native}
    tool_schema: {type: function, function: {name: search, parameters: {type: object, required: [query]}}}
  - class_name: some.Ping
    config: {type: native}
    tool_schema: {type: function, function: {name: ping, parameters: {type: object, properties: {}}}}
"""


@pytest.mark.parametrize(
    ("text", "more", "known"),
    [
        (TOOLS_YAML, {}, {"search": ("query",), "ping": ()}),
        (TOOLS_YAML, {"function_tool_path": "tools.py"}, None),
        ("tools: [{class_name: some.Search, config: {type: native}}]", {}, None),
        ("tools: 3", {}, None),
        ("- [", {}, None),
    ],
)
def test_tools_are_those_that_the_configuration_declares(text, more, known, tmp_path, qwen_like_tokenizer):
    path = tmp_path / "tools.yaml"
    path.write_text(text)
    multi_turn = OmegaConf.create({"format": "kimi", "tool_config_path": str(path), **more})
    assert declared_tools(multi_turn) == known
    rollout = RolloutBatch(
        *[None] * 8, tokenizer=qwen_like_tokenizer, tool_format="kimi", tools=declared_tools(multi_turn)
    )
    call = '<|tool_calls_section_begin|><|tool_call_begin|>0<|tool_call_argument_begin|>{"query": 1}<|tool_call_end|>'
    (found,) = estimator.make_parser(rollout, TapoSettings()).calls(qwen_like_tokenizer.encode(call))
    assert found.tool == ("search" if known else "0")


def test_no_tools_are_known_without_a_configuration_of_them():
    assert declared_tools(OmegaConf.create({"format": "kimi"})) is None
    assert declared_tools(OmegaConf.create({"tool_config_path": "/does/not/exist.yaml"})) is None


def kinds(metrics):
    return {name: value for name, value in metrics.items() if name.startswith(("tapo/nll/", "tapo/tokens/"))}


@pytest.mark.parametrize("recorded", [True, False])
def test_log_probs_by_kind_of_token(qwen_like_tokenizer, trainer, recorded):
    rows = fake_batch(qwen_like_tokenizer)
    values = [log_probs_of(rollout) for rollout, _, _ in rows]
    expected = {**NLL_METRICS, **token_shares(values)}
    # What stands in the padding of a row is no token.
    log_probs = padded(values, -1000.0, torch.float32)
    for columns in (
        {"old_log_probs": log_probs, "rollout_log_probs": torch.full_like(log_probs, -7.0)},
        {"rollout_log_probs": log_probs},
    ):
        data = data_proto(rows, qwen_like_tokenizer, recorded=recorded)
        del data.batch["old_log_probs"]
        for name, value in columns.items():
            data.batch[name] = value
        assert kinds(step_metrics(compute(data))) == pytest.approx(expected)


def test_log_probs_of_padding_rows_and_rows_without_a_reward(qwen_like_tokenizer, trainer):
    """Padding rows do not count; a rollout whose reward is NaN was sampled all the same."""
    rows = fake_batch(qwen_like_tokenizer)
    values = [log_probs_of(rollout) for rollout, _, _ in rows]
    data = data_proto([*rows, rows[0]], qwen_like_tokenizer, is_padding=[False] * len(rows) + [True])
    data.batch["old_log_probs"] = padded([*values, [-50.0] * len(values[0])], 0.0, torch.float32)
    data.batch["token_level_rewards"][3] = float("nan")
    assert kinds(step_metrics(compute(data))) == pytest.approx({**NLL_METRICS, **token_shares(values)})


def test_a_batch_without_log_probs_is_told_of_once(qwen_like_tokenizer, trainer, caplog):
    rows = fake_batch(qwen_like_tokenizer)
    shares = token_shares([log_probs_of(rollout) for rollout, _, _ in rows])
    for _ in range(2):
        data = data_proto(rows, qwen_like_tokenizer)
        del data.batch["old_log_probs"]
        assert kinds(step_metrics(compute(data))) == pytest.approx(shares)
    assert caplog.text.count("there are no metrics tapo/nll: the batch has neither old_log_probs nor rollout_") == 1
