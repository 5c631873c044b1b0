"""The V1 trainer's ``_compute_advantage`` on a real TransferQueue, in a real Ray, for every trainer mode."""

import types
from pathlib import Path

import numpy as np
import pytest
import torch
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

from verl_tapo.audit import audit
from verl_tapo.records import TrajectoryRecord
from verl_tapo.selftest.check import outcome
from verl_tapo.selftest.rollouts import SEARCH, FakeRollout, fake_batch, fake_group
from verl_tapo.selftest.trainer_checks import V1, trainer_checks
from verl_tapo.step_records import read_step_records
from verl_tapo.trainer import estimator
from verl_tapo.trainer.tool_metrics import RolloutOutage, ToolOutage

pytest.importorskip("transfer_queue")
pytest.importorskip("verl.trainer.ppo.v1")

from verl.trainer.ppo import ray_trainer

PATCHED = hasattr(ray_trainer, "ADV_CONTEXT_VERSION")
"""One of our patches is applied (see test_patches.py)."""
MODES = ["sync", "colocate_async", "separate_async"]


@pytest.fixture(scope="module")
def config():
    return V1().config


@pytest.fixture(scope="module")
def queue(config):
    import ray
    import transfer_queue as tq

    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False)
    tq.init(config.transfer_queue)
    yield tq
    tq.close()
    ray.shutdown()


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(estimator, "MONITOR", estimator.RunMonitor())


@pytest.fixture
def make_trainer(config, qwen_like_tokenizer):
    """A trainer without its workers: what `_compute_advantage` itself uses."""
    from verl.trainer.ppo.v1 import get_trainer_cls

    def make(name="tapo", mode="sync", **tapo):
        cls = get_trainer_cls(mode)
        trainer = object.__new__(cls)
        trainer.config = config.copy()
        trainer.config.algorithm.adv_estimator = name
        for key, value in tapo.items():
            trainer.config.algorithm.tapo[key] = value
        trainer.tokenizer = qwen_like_tokenizer
        trainer.global_steps = 1
        return trainer

    return make


_batches = iter(range(10**6))


def put(tq, rows, recorded=True, outputs=None, pad_to=None, tokenizer=None, extra=None, flat=False):
    """Writes rows as `AgentLoopWorkerTQ` does; returns the batch's meta.

    ``outputs``: (session, output) of each row. ``flat``: as uni-agent does, a column for each of the extra fields.
    """
    from transfer_queue import KVBatchMeta
    from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    prefix = f"batch{next(_batches)}"
    fields, keys, tags = [], [], []
    for number, (rollout, ok, uid) in enumerate(rows):
        session, output = (number, 0) if outputs is None else outputs[number]
        extra_fields = {"reward_extra_info": {"acc": float(ok), "score": float(ok)}, "min_global_steps": 0}
        if recorded:
            extra_fields["tapo_steps"] = rollout.record.to_dict()
        scores = torch.zeros(len(rollout.ids))
        scores[-1:] = float(ok)
        fields.append(
            {
                "uid": f"{prefix}{uid}",
                "prompts": torch.tensor([1, 2, 3]),
                "responses": torch.tensor(rollout.ids, dtype=torch.int64),
                "input_ids": torch.tensor([1, 2, 3, *rollout.ids]),
                "attention_mask": torch.ones(3 + len(rollout.ids), dtype=torch.int64),
                "position_ids": torch.arange(3 + len(rollout.ids)),
                "response_mask": torch.tensor(rollout.mask, dtype=torch.int64),
                "loss_mask": torch.tensor(rollout.mask, dtype=torch.int64),
                "rm_scores": scores,
                "rollout_log_probs": torch.full((len(rollout.ids),), -1.0),
                "old_log_probs": torch.full((len(rollout.ids),), -1.0),
                "num_turns": 2,
                **({**extra_fields, "session_id": session} if flat else {"extra_fields": extra_fields}),
                **(extra[number] if isinstance(extra, list) else extra or {}),
            }
        )
        keys.append(f"{prefix}{uid}_{session}_{output}")
        length = len(rollout.ids)
        tags.append({"status": "success", "prompt_len": 3, "response_len": length, "seq_len": 3 + length})
    tq.kv_batch_put(keys=keys, partition_id="train", fields=list_of_dict_to_tensordict(fields), tags=tags)
    batch = KVBatchMeta(partition_id="train", keys=keys, tags=tags)
    if pad_to:
        batch = upsample_batch_to_divisible_size(batch, pad_to, tokenizer.eos_token_id)
    return batch


def advantages(tq, trainer, batch, metrics=None):
    """(B, L) advantages, after the trainer computed them."""
    metrics = {} if metrics is None else metrics
    batch = trainer._compute_advantage(batch, metrics)
    data = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["advantages", "returns"])
    assert torch.isfinite(data["advantages"].values()).all()
    return data["advantages"].to_padded_tensor(0.0)


@pytest.mark.parametrize("mode", MODES)
def test_corrects_in_every_trainer_mode(queue, make_trainer, qwen_like_tokenizer, mode):
    rows = fake_batch(qwen_like_tokenizer)
    batch = put(queue, rows)
    base = advantages(queue, make_trainer("grpo", mode), batch)
    metrics = {}
    result = advantages(queue, make_trainer("tapo", mode), batch, metrics)
    assert (result >= base).all()
    assert metrics["tapo/corrected_steps"] == pytest.approx(6 / 8)
    assert metrics["tapo/recorded_rollouts"] == 1.0
    assert int((result != base).sum()) == round(metrics["tapo/token_share"] * sum(sum(r.mask) for r, _, _ in rows))
    fields = queue.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["tapo_tool_mask", "responses"])
    assert fields["tapo_tool_mask"].offsets().tolist() == fields["responses"].offsets().tolist()
    assert int(fields["tapo_tool_mask"].values().max()) == 2


def test_how_far_apart_a_prompts_weights_are(queue, make_trainer, qwen_like_tokenizer):
    """Witnesses count alike, whatever weights they come from."""
    rows = fake_batch(qwen_like_tokenizer)
    batch, metrics = put(queue, rows, pad_to=12, tokenizer=qwen_like_tokenizer), {}
    expected = advantages(queue, make_trainer(mode="separate_async"), batch, metrics)
    assert "tapo/weights_apart" not in metrics
    for number, tag in enumerate(batch.tags):
        tag.update(min_global_steps=3, max_global_steps=3 + 100 * tag.get("is_padding", False))
        if number < len(rows) and rows[number][2] == "u0":
            tag["max_global_steps"] = 3 + number % 7  # of its eight rows: 0, 2, 4, 5, 0, 1, 2 and 3 more
    assert torch.equal(advantages(queue, make_trainer(mode="separate_async"), batch, metrics), expected)
    if not PATCHED:
        assert metrics["tapo/weights_apart"] == pytest.approx(5 / 3)  # three prompts


@pytest.mark.parametrize("name", ["grpo", "tapo"])
def test_tools_are_watched_under_any_estimator(queue, make_trainer, qwen_like_tokenizer, name):
    if PATCHED and name != "tapo":
        pytest.skip("the hook that watches for others is not installed where veRL is patched")
    rows = fake_batch(qwen_like_tokenizer)
    batch = put(queue, rows, pad_to=8, tokenizer=qwen_like_tokenizer)
    metrics = {}
    advantages(queue, make_trainer(name, max_fault_rate=0.6), batch, metrics)
    calls = [step for rollout, _, _ in rows for step in rollout.record.steps]
    assert metrics["tools/calls_per_trajectory"] == pytest.approx(len(calls) / len(rows))  # of padding rows: none

    assert metrics["reward/acc"] == pytest.approx(sum(ok for _, ok, _ in rows) / len(rows))
    group = [(rollout, ok, "u0") for rollout, ok in fake_group(qwen_like_tokenizer)]
    group[0][0].record.steps[0].status = "timeout"
    with pytest.raises(ToolOutage, match=r"text_search.*max_fault_rate allows 0%"):
        advantages(queue, make_trainer(name, max_fault_rate=0.0), put(queue, group))
    silent = {}
    trainer = make_trainer("grpo")
    trainer.config.algorithm.tapo = None
    advantages(queue, trainer, put(queue, rows), silent)
    assert not any(key.startswith("tools/") for key in silent)


@pytest.mark.parametrize("name", ["grpo", "tapo"])
def test_a_recording_that_the_data_set_overrides_is_warned_of(queue, make_trainer, qwen_like_tokenizer, caplog, name):
    """As veRL's own data scripts write it: their column is consumed before rollouts come to the trainer."""
    from datasets import Dataset

    if PATCHED and name != "tapo":
        pytest.skip("the hook that watches for others is not installed where veRL is patched")
    rows = fake_batch(qwen_like_tokenizer)
    trainer = make_trainer(name)
    trainer.config.actor_rollout_ref.rollout.agent.default_agent_loop = "tapo_tool_agent"
    frame = Dataset.from_dict({"prompt": ["a", "b"], "agent_name": ["tool_agent", "tool_agent"]})
    trainer.train_dataset = types.SimpleNamespace(dataframe=frame)
    advantages(queue, trainer, put(queue, rows))
    assert "without a record" not in caplog.text
    for _ in range(2):
        advantages(queue, trainer, put(queue, rows, recorded=False, pad_to=8, tokenizer=qwen_like_tokenizer))
    assert caplog.text.count("11 of 11 rollouts came without a record. ") == 1
    cause = "rows name the agent loop 'tool_agent' in their column agent_name"
    assert (cause in caplog.text) == (not PATCHED)


@pytest.mark.parametrize("name", ["grpo", "tapo"])
def test_rewards_of_every_kind_end_no_run(queue, make_trainer, qwen_like_tokenizer, caplog, name):
    if PATCHED and name != "tapo":
        pytest.skip("the hook that watches for others is not installed where veRL is patched")
    rows = fake_batch(qwen_like_tokenizer)
    batch = put(queue, rows)
    odd = [10**400, float("nan"), "text", None, [1], {"a": 1}, 1j, np.float32(2), True, "True", -(10**400)]
    infos = [{"acc": value, "part": value} for value in odd]
    for number, info in enumerate((None, [], "text", 3)):
        infos[number + 3] = info
    extra = [
        {"reward_extra_info": info, "tapo_steps": row[0].record.to_dict()}
        for info, row in zip(infos, rows, strict=True)
    ]
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    fields = list_of_dict_to_tensordict([{"extra_fields": value} for value in extra])
    queue.kv_batch_put(keys=batch.keys, partition_id="train", fields=fields)
    metrics = {}
    advantages(queue, make_trainer(name), batch, metrics)
    assert metrics["reward/part"] == 1.5  # of 2.0 and True
    assert "'part' is no finite number in 3 of 11 rollouts" in caplog.text
    if name == "tapo":
        assert metrics["tapo/success_unreadable"] == pytest.approx(2 / 11)  # NaN and a text


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("base", ["grpo", "rloo", "grpo_vectorized"])
def test_beta_zero_is_the_base_bit_for_bit(queue, make_trainer, qwen_like_tokenizer, mode, base):
    batch = put(queue, fake_batch(qwen_like_tokenizer), pad_to=8, tokenizer=qwen_like_tokenizer)
    stock = advantages(queue, make_trainer(base, mode), batch)
    assert torch.equal(stock, advantages(queue, make_trainer(mode=mode, beta=0.0, base_estimator=base), batch))


def test_an_estimator_that_yields_nan_for_padding_is_mended(queue, make_trainer, qwen_like_tokenizer):
    """The stock opo divides by the length of the padding rows, 0; `advantages` asserts that ours is finite."""
    batch = put(queue, fake_batch(qwen_like_tokenizer), pad_to=8, tokenizer=qwen_like_tokenizer)
    metrics = {}
    result = advantages(queue, make_trainer(base_estimator="opo"), batch, metrics)
    assert metrics["tapo/dropped_rows"] == 0.0  # padding is no loss
    assert (result[:11] != 0).any()


def test_parsed_is_recorded(queue, make_trainer, qwen_like_tokenizer):
    rows = fake_batch(qwen_like_tokenizer)
    recorded = advantages(queue, make_trainer(), put(queue, rows))
    metrics = {}
    parsed = advantages(queue, make_trainer(), put(queue, rows, recorded=False), metrics)
    assert torch.equal(recorded, parsed)
    assert metrics["tapo/recorded_rollouts"] == 0.0
    assert metrics["tapo/unanswered_calls_per_trajectory"] == pytest.approx(1 / 11)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", ["grpo", "tapo"])
def test_what_was_found_is_told_under_any_estimator(queue, make_trainer, qwen_like_tokenizer, name, recorded):
    """From the record, or from the tokens and the data set's ground truth."""
    if PATCHED and name != "tapo":
        pytest.skip("the hook that watches for others is not installed where veRL is patched")
    if PATCHED and not recorded:
        pytest.skip("the patch does not hand over the data set's ground truth, see patches/README.md")
    batch = put(queue, grounded_group(qwen_like_tokenizer), recorded=recorded, extra={"reward_model": LUXEMBOURG})
    metrics = {}
    advantages(queue, make_trainer(name), batch, metrics)
    # The switches are off.
    done = dict.fromkeys(("tapo/grounding/forgiven_steps", "tapo/grounding/withheld_trajectories"), 0.0)
    told = {key: value for key, value in metrics.items() if "grounding" in key}
    assert told == pytest.approx({**GROUNDING_METRICS, **(done if name == "tapo" else {})})


@pytest.mark.parametrize("recorded", [True, False])
def test_luck_lowers_rewards_before_the_base(queue, make_trainer, qwen_like_tokenizer, recorded):
    """A lucky success of two outputs, its reward at the last one, and padding that copies the batch's first row."""
    if PATCHED and not recorded:
        pytest.skip("the patch does not hand over the data set's ground truth, see patches/README.md")
    rows = grounded_group(qwen_like_tokenizer)
    rows.insert(1, (rows[1][0], False, "u0"))
    outputs = [(0, 0), (1, 0), (1, 1), *((session, 0) for session in range(2, 6))]
    extra = {"reward_model": LUXEMBOURG}
    batch = put(queue, rows, recorded, outputs, pad_to=8, tokenizer=qwen_like_tokenizer, extra=extra)
    metrics = {}
    switches = {"witnesses": True, "own": True, "luck": True}
    result = advantages(queue, make_trainer(alpha_min=1.0, grounding=switches), batch, metrics)
    assert (len(batch), result[7:].count_nonzero()) == (8, 0)
    policy = [torch.tensor(rollout.mask, dtype=torch.bool) for rollout, _, _ in rows]
    values = [sorted(set(row[: len(own)][own].tolist())) for row, own in zip(result, policy, strict=False)]
    expected = [GROUNDED_ADVANTAGES[session] for session, _ in outputs]
    assert values == [pytest.approx(of_row, abs=1e-5) for of_row in expected]
    assert metrics["tapo/grounding/withheld_trajectories"] == pytest.approx(2 / 6)
    assert metrics["tapo/success_rate"] == pytest.approx(1 / 2)


@pytest.mark.parametrize("recorded", [True, False])
def test_luck_reaches_prompts_whose_rollouts_call_nothing(queue, make_trainer, qwen_like_tokenizer, recorded):
    """All of them answer from memory: there is nothing to learn. Where no tool could have told, all is as before."""
    if PATCHED and not recorded:
        pytest.skip("the patch does not hand over the data set's ground truth, see patches/README.md")
    rows = silent_group(qwen_like_tokenizer)

    def with_luck(batch, loop):
        trainer, metrics = make_trainer(grounding={"luck": True}), {}
        trainer.config.actor_rollout_ref.rollout.agent.default_agent_loop = loop
        return advantages(queue, trainer, batch, metrics), metrics["tapo/grounding/withheld_trajectories"]

    batch = put(queue, rows, recorded, extra={"reward_model": LUXEMBOURG})
    plain = advantages(queue, make_trainer(), batch)
    assert plain.count_nonzero() > 0
    result, withheld = with_luck(batch, "tool_agent")
    assert (result.count_nonzero(), withheld) == (0, 1 / 2)
    if recorded:
        for rollout, _, _ in rows:
            rollout.record.recognisable = False
        batch = put(queue, rows, recorded, extra={"reward_model": LUXEMBOURG})
    result, withheld = with_luck(batch, "single_turn_agent")
    assert torch.equal(result, plain)
    assert withheld == 0


@pytest.mark.parametrize("recorded", [True, False])
def test_padding_rows_neither_give_nor_receive(queue, make_trainer, qwen_like_tokenizer, recorded):
    """The real padding: a copy of the first row's fields, its tool calls included."""
    rows = fake_batch(qwen_like_tokenizer)
    rows.insert(0, rows.pop(2))  # a success with calls comes first, to be copied
    assert rows[0][1]
    plain, padded_metrics = {}, {}
    expected = advantages(queue, make_trainer(), put(queue, rows, recorded), plain)
    batch = put(queue, rows, recorded, pad_to=8, tokenizer=qwen_like_tokenizer)
    assert len(batch) == 16
    result = advantages(queue, make_trainer(), batch, padded_metrics)
    assert torch.equal(result[:11], expected)
    assert (result[11:] == 0).all()
    for name in plain:
        if name.startswith("tapo/") and not name.startswith("tapo/ms"):
            assert padded_metrics[name] == pytest.approx(plain[name]), name


@pytest.mark.parametrize("recorded", [True, False])
def test_several_outputs_per_session(queue, make_trainer, qwen_like_tokenizer, recorded):
    """Only the last output is scored, its advantage goes to all; a session is one trajectory of the rule."""
    group = fake_group(qwen_like_tokenizer)
    rows = [(rollout, ok, "u0") for rollout, ok in group]
    rows.insert(1, (rows[0][0], True, "u0"))  # session 0 again: the same calls in two outputs
    outputs = [(0, 1), (0, 0)] + [(session, 0) for session in range(1, 8)]
    batch = put(queue, rows, recorded, outputs)
    stock = advantages(queue, make_trainer("grpo"), batch)
    assert torch.equal(stock, advantages(queue, make_trainer(beta=0.0), batch))
    metrics = {}
    result = advantages(queue, make_trainer(), batch, metrics)
    assert (result >= stock).all()
    # 2 of the 3 successful *sessions* hold the search, and 1 of 3 the zoom
    single_metrics = {}
    advantages(queue, make_trainer(), put(queue, [(r, ok, "u0") for r, ok in group], recorded), single_metrics)
    assert metrics["tapo/support"] == pytest.approx(single_metrics["tapo/support"])
    assert metrics["tapo/successes_per_group"] == 3.0


@pytest.mark.parametrize("recorded", [True, False])
def test_step_records(queue, make_trainer, qwen_like_tokenizer, tmp_path, monkeypatch, recorded):
    """An audit of them finds what the step logged; padding rows and a session's other outputs are no trajectories."""
    if PATCHED:
        pytest.skip("a patched trainer does not tell which batch of the step it is")
    monkeypatch.setattr(estimator._RecorderCache, "recorder", None)
    rows = fake_batch(qwen_like_tokenizer)
    rows.append((rows[0][0], rows[0][1], rows[0][2]))  # a second output of the first session
    outputs = [(0, 1), *((number, 0) for number in range(1, 11)), (0, 0)]
    batch = put(queue, rows, recorded, outputs, pad_to=8, tokenizer=qwen_like_tokenizer)
    trainer = make_trainer(record_dir=str(tmp_path))
    trainer.global_steps, trainer.local_trigger_step = 12, 1
    metrics = {}
    advantages(queue, trainer, batch, metrics)
    estimator._RecorderCache.recorder.flush()
    assert metrics["tapo/records_lost"] == 0.0
    header, lines, problems = read_step_records(tmp_path / "000012_1.jsonl.gz")
    assert (header["step"], len(lines), problems) == (12, 12, [])
    assert {line["key"] for line in lines} == set(batch.keys[:12])
    assert {call["status"] is None for line in lines for call in line["calls"]} == {not recorded}
    result = audit(tmp_path).result
    (figures,) = result["steps"]
    assert "records_disagree" not in [warned["code"] for warned in result["warnings"]]
    assert figures["trajectories"] == 11
    assert figures["misassigned_steps"] / figures["failing_steps"] == metrics["tapo/misassigned_steps"]
    assert figures["corrected_steps"] / figures["failing_steps"] == metrics["tapo/corrected_steps"]
    for name in ("token_share", "similarity", "support", "alpha", "transfer", "lift", "success_rate"):
        assert figures[name] == pytest.approx(metrics[f"tapo/{name}"], abs=1e-7), name


@pytest.mark.parametrize("name", ["grpo", "tapo"])
def test_missing_rollouts_end_the_run(queue, make_trainer, qwen_like_tokenizer, name):
    """Where an inference server dies, veRL trains on whatever rollouts came before, filled up with rows of nothing."""
    if PATCHED:
        pytest.skip("the hook is not installed where veRL is patched")
    group = [(rollout, ok, "u0") for rollout, ok in fake_group(qwen_like_tokenizer)]
    left = put(queue, group[:3], pad_to=8, tokenizer=qwen_like_tokenizer)
    with pytest.raises(RolloutOutage, match=r"62% of the rollouts .* \(3 of 8 did\).*max_fault_rate allows 20%"):
        advantages(queue, make_trainer(name, max_fault_rate=0.2), left)
    advantages(queue, make_trainer(name), left)  # no limit is set
    advantages(queue, make_trainer(name, max_fault_rate=0.2), put(queue, group))
    twice = [(number, output) for number in range(8) for output in range(2)]
    both = put(queue, [row for row in group for _ in range(2)], outputs=twice)
    advantages(queue, make_trainer(name, max_fault_rate=0.2), both)  # outputs of a session are no more rollouts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recorded", [True, False])
def test_extra_fields_as_columns_are_read(queue, make_trainer, qwen_like_tokenizer, mode, recorded, caplog):
    """As uni-agent writes them: success is `acc`, not the score, and calls come from the records, where there are."""
    if PATCHED:
        pytest.skip("the patch knows extra_fields only, see patches/README.md")
    caplog.set_level("INFO", "verl_tapo")
    rows = fake_batch(qwen_like_tokenizer)
    expected = advantages(queue, make_trainer(mode=mode), put(queue, rows, recorded))
    batch = put(queue, rows, recorded, flat=True, pad_to=8, tokenizer=qwen_like_tokenizer)
    metrics = {}
    result = advantages(queue, make_trainer(mode=mode), batch, metrics)
    assert torch.equal(result[:11], expected)
    assert (metrics["tapo/success_from_score"], metrics["tapo/recorded_rollouts"]) == (0.0, float(recorded))
    assert metrics["reward/acc"] == pytest.approx(sum(ok for _, ok, _ in rows) / len(rows))
    sources = "calls were recorded in 11 and are read from the tokens in 0"
    if not recorded:
        sources = "calls were recorded in 0 and are read from the tokens in 11"
    assert f"of 11 rollouts, success is the reward's 'acc' in 11 and the score in 0 (at 0.5 or above); {sources}" in (
        caplog.text
    )


def test_success_is_not_the_score_where_acc_is_a_column(queue, make_trainer, qwen_like_tokenizer):
    """Scores with parts lie on one side of the threshold; the score alone would make successes of all."""
    if PATCHED:
        pytest.skip("the patch knows extra_fields only, see patches/README.md")
    rows = fake_batch(qwen_like_tokenizer)
    batch = put(queue, rows, flat=True)
    data = queue.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["rm_scores"])
    values = data["rm_scores"].values() + 0.0
    values[data["rm_scores"].offsets()[1:] - 1] += 0.6
    data["rm_scores"] = torch.nested.nested_tensor_from_jagged(values, data["rm_scores"].offsets())
    queue.kv_batch_put(keys=batch.keys, partition_id="train", fields=data)
    metrics = {}
    advantages(queue, make_trainer(), batch, metrics)
    assert metrics["tapo/success_rate"] == pytest.approx(sum(ok for _, ok, _ in rows) / len(rows))
    assert metrics["tapo/corrected_steps"] == pytest.approx(6 / 8)


@pytest.mark.parametrize("recorded", [True, False])
def test_trajectories_of_a_session_that_share_its_reward(queue, make_trainer, qwen_like_tokenizer, recorded):
    """A session is one rollout in the rule and in every mean, whatever the number of its trajectories; a trajectory
    whose mask is 0 throughout, of an episode that was cut off, and one without a token neither give nor receive."""
    if PATCHED:
        pytest.skip("the patch knows extra_fields only, see patches/README.md")
    group = [(rollout, ok, "u0") for rollout, ok in fake_group(qwen_like_tokenizer)]
    expected = {}
    plain = advantages(queue, make_trainer(), put(queue, group, recorded, flat=True), expected)
    empty = types.SimpleNamespace(ids=[], mask=[], record=TrajectoryRecord())
    rows, outputs = [], []
    for session, row in enumerate(group):
        # An earlier trajectory that is not trained on, one of no tokens, and the one that carries the calls.
        cut = types.SimpleNamespace(ids=row[0].ids, mask=[0] * len(row[0].ids), record=TrajectoryRecord())
        rows += [(row[0], row[1], "u0"), (empty, row[1], "u0"), (cut, row[1], "u0")]
        outputs += [(session, 2), (session, 1), (session, 0)]
    batch = put(queue, rows, recorded, outputs, flat=True)
    metrics = {}
    result = advantages(queue, make_trainer(), batch, metrics)
    assert torch.equal(result[::3], plain)
    assert (result[1::3] == 0).all()
    assert (result[2::3] == 0).all()
    for name in expected:
        if name.startswith(("tapo/", "tools/", "reward/")) and not name.startswith("tapo/ms"):
            assert metrics[name] == pytest.approx(expected[name]), name


def test_a_column_of_some_rows_only_is_warned_of(queue, make_trainer, qwen_like_tokenizer, caplog):
    """TransferQueue leaves it out of all rows, without a word."""
    if PATCHED:
        pytest.skip("the patch knows extra_fields only, see patches/README.md")
    rows = fake_batch(qwen_like_tokenizer)
    half, rest = put(queue, rows[:6], flat=True), put(queue, rows[6:], recorded=False, flat=True)
    batch = type(half)(partition_id="train", keys=half.keys + rest.keys, tags=half.tags + rest.tags)
    trainer = make_trainer()
    for _ in range(2):
        advantages(queue, trainer, batch)
    assert caplog.text.count("some rollouts have the column 'tapo_steps' and some have not") == 1
    assert "reward_extra_info" not in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"column": "rm_scores"}, r"without the column rm_scores; its first row has: attention_mask, "),
        ({"column": "uid"}, r"without the column uid; its first row has: "),
        ({"keys": lambda key: key.replace("_", "/")}, r"the key 'batch.*/0', which is not {uid}_{session}_{output}"),
        ({"keys": lambda key: key + "x"}, r"which is not {uid}_{session}_{output}"),
        ({"keys": lambda key: "other" + key}, r"the key 'otherbatch.* of the prompt uid='batch"),
        ({"tag": "is_padding"}, r"the padding row 'pad\w+_0_0' without the tag is_padding; its tags: prompt_len, "),
        ({"gone": True}, r"a batch of 16 keys and 16 tags with data of 15 rows"),
    ],
)
@pytest.mark.parametrize("name", ["grpo", "tapo"])
def test_a_verl_that_differs_is_told_loudly(queue, make_trainer, qwen_like_tokenizer, name, change, message):
    """What is relied on here is no interface of veRL's: TransferQueue leaves out what it does not have, in silence."""
    if PATCHED:
        pytest.skip("a patched veRL hands the rollout data over itself")
    rows = fake_batch(qwen_like_tokenizer)
    batch = put(queue, rows, pad_to=8, tokenizer=qwen_like_tokenizer)
    names = change.get("keys")
    if "column" in change or names is not None:
        data = queue.kv_batch_get(keys=batch.keys, partition_id="train")
        keep = {key: data[key] for key in data.keys() if key != change.get("column")}  # noqa: SIM118
        keys = [(names or "other".__add__)(key) for key in batch.keys]
        fields = data.select(*keep)
        queue.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=batch.tags)
        batch = type(batch)(partition_id="train", keys=keys, tags=batch.tags)
    if "tag" in change:
        batch.tags[:] = [{key: value for key, value in tag.items() if key != change["tag"]} for tag in batch.tags]
    if "gone" in change:
        queue.kv_clear(keys=batch.keys[3], partition_id="train")
    with pytest.raises(ValueError, match=message):
        make_trainer(name)._compute_advantage(batch, {})


def test_records_under_another_estimator_are_warned_of(config, caplog):
    from verl_tapo.trainer.check import check_run

    other = config.copy()
    other.algorithm.adv_estimator = "grpo"
    other.algorithm.tapo.record_dir = "records"
    check_run(other)
    assert "records are written by the estimator tapo only" in caplog.text


def test_rollout_correction_takes_rows_and_tokens_out(queue, make_trainer, qwen_like_tokenizer):
    """Turns are found on the mask as the rollout left it, credit goes to what rejection left of it."""
    rows = fake_batch(qwen_like_tokenizer)
    results = []
    for recorded in (True, False):
        batch = put(queue, rows, recorded)
        data = queue.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["rollout_log_probs"])
        torch.manual_seed(0)
        values = data["rollout_log_probs"].values()
        data["rollout_log_probs"] = torch.nested.nested_tensor_from_jagged(
            values - 3.0 * (torch.rand(values.shape) < 0.2), data["rollout_log_probs"].offsets()
        )
        queue.kv_batch_put(keys=batch.keys, partition_id="train", fields=data)
        trainers = [make_trainer("grpo"), make_trainer()]
        pair = []
        for trainer in trainers:
            trainer.config.algorithm.rollout_correction.rollout_rs = "token_k1"
            trainer.config.algorithm.rollout_correction.rollout_rs_threshold = "0.5_2.0"
            original = queue.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["response_mask"])
            pair.append(advantages(queue, trainer, batch))
            mask = queue.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["response_mask"])
            rejected = original["response_mask"].values() != mask["response_mask"].values()
            assert rejected.any()
            queue.kv_batch_put(keys=batch.keys, partition_id="train", fields=original)
        results.append(pair)
    (stock, recorded), (_, parsed) = results
    assert torch.equal(recorded, parsed)
    assert (recorded >= stock).all()
    assert (recorded != stock).any()


def test_a_colocated_reward_model_writes_its_info_as_fields(queue, make_trainer, qwen_like_tokenizer):
    from verl.utils import tensordict_utils as tu

    if PATCHED:
        pytest.skip("the patch does not hand over fields it cannot know the names of, see patches/README.md")
    rows = fake_batch(qwen_like_tokenizer)
    batch = put(queue, rows)
    expected = advantages(queue, make_trainer(), batch)
    queue.kv_batch_put(
        keys=batch.keys, partition_id="train", fields=tu.get_tensordict({"judge": [bool(ok) for _, ok, _ in rows]})
    )
    assert torch.equal(advantages(queue, make_trainer(success_key="judge"), batch), expected)


def test_image_arguments_are_resolved_with_the_prompt(queue, make_trainer, qwen_like_tokenizer):
    rows = fake_batch(qwen_like_tokenizer)
    for rollout, _, _ in rows:
        for step in rollout.record.steps:
            if step.tool == "zoom":
                step.arguments["image"] = 0
    assert torch.isfinite(advantages(queue, make_trainer(), put(queue, rows, recorded=False))).all()


def test_a_failed_hook_stops_tapo_and_nothing_else(queue, make_trainer, qwen_like_tokenizer):
    """Without the hook the estimator finds no rollout data: an error, never silently plain GRPO."""
    if PATCHED:
        pytest.skip("a patched veRL needs no hook")
    batch = put(queue, fake_batch(qwen_like_tokenizer))
    trainer = make_trainer()
    stock_method = type(trainer)._compute_advantage.__wrapped__
    with pytest.raises((ValueError, RuntimeError), match="TAPO"):
        stock_method(trainer, batch, {})


def test_the_constructor_refuses_a_bad_configuration(config):
    from verl.trainer.ppo.v1 import get_trainer_cls

    bad = config.copy()
    bad.algorithm.tapo.theta = 1.2
    with pytest.raises(ValueError, match=r"algorithm.tapo.theta must be a number in \[0, 1\], got 1.2"):
        get_trainer_cls("sync")(bad)


def test_shipped_yaml_states_the_defaults(config):
    from omegaconf import OmegaConf

    from verl_tapo import TapoSettings

    shipped = OmegaConf.to_container(config.algorithm.tapo)
    assert TapoSettings.from_mapping(shipped) == TapoSettings()
    assert set(shipped) == set(OmegaConf.to_container(OmegaConf.create(_all_knobs())))
    assert config.algorithm.adv_estimator == "tapo"


def test_shipped_yaml_is_made_from_the_settings():
    import verl_tapo.conf
    from verl_tapo.settings import as_yaml

    assert (Path(verl_tapo.conf.__file__).parent / "tapo.yaml").read_text() == as_yaml()


def _all_knobs():
    from dataclasses import fields

    from verl_tapo import TapoConfig, TapoSettings

    names = [f.name for f in fields(TapoConfig) if f.init] + [f.name for f in fields(TapoSettings) if f.name != "rule"]
    return dict.fromkeys(names, 0)


def test_a_knob_added_on_the_command_line_composes():
    from hydra import compose, initialize_config_module

    from verl_tapo.settings import load_settings

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            overrides=[
                "algorithm.adv_estimator=tapo",
                "+algorithm.tapo.beta=0.5",
                "+algorithm.tapo.tools.search.q=text",
            ],
        )
    settings = load_settings(config.algorithm)
    assert settings.rule.beta == 0.5
    assert settings.rule.tools == {"search": {"q": "text"}}
    assert load_settings(types.SimpleNamespace(tapo=None)).rule.beta == 0.8
    assert np.isclose(settings.success_threshold, 0.5)


@pytest.mark.skipif(PATCHED, reason="nothing is hooked")
def test_the_selftest_looks_into_this_trainer(queue, monkeypatch):
    """And sees a hook that is gone."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    def outcomes():
        return [outcome(check) for check in trainer_checks(V1())]

    assert [(found.verdict, found.detail) for found in outcomes() if found.verdict != "ok"] == []
    monkeypatch.setattr(PPOTrainer, "_compute_advantage", PPOTrainer._compute_advantage.__wrapped__)
    found = outcomes()
    assert [each.verdict for each in found] == ["FAIL"] * 5
    assert "`verl-tapo doctor` shows the hooks" in found[0].detail


def kinds(metrics):
    return {name: value for name, value in metrics.items() if name.startswith(("tapo/nll/", "tapo/tokens/"))}


def log_prob_columns(values):
    """For `put`. Padding rows have no `old_log_probs` yet, so that with them the other column is read."""
    return [{name: torch.tensor(row) for name in ("old_log_probs", "rollout_log_probs")} for row in values]


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", ["grpo", "tapo"])
def test_log_probs_by_kind_of_token_under_any_estimator(queue, make_trainer, qwen_like_tokenizer, name, recorded):
    if PATCHED and name != "tapo":
        pytest.skip("the hook that watches for others is not installed where veRL is patched")
    rows = fake_batch(qwen_like_tokenizer)
    values = [log_probs_of(rollout) for rollout, _, _ in rows]
    columns = log_prob_columns(values)
    batch = put(queue, rows, recorded=recorded, pad_to=8, tokenizer=qwen_like_tokenizer, extra=columns)
    metrics = {}
    advantages(queue, make_trainer(name), batch, metrics)
    assert kinds(metrics) == pytest.approx({**NLL_METRICS, **token_shares(values)})


def test_log_probs_that_are_no_numbers(queue, make_trainer, qwen_like_tokenizer):
    rows = fake_batch(qwen_like_tokenizer)
    values = [log_probs_of(rollout) for rollout, _, _ in rows]
    shares = token_shares(values)
    for row in values[::2]:
        row[0] = row[-1] = float("nan")
    batch = put(queue, rows, extra=log_prob_columns(values))
    metrics = {}
    advantages(queue, make_trainer(), batch, metrics)
    assert kinds(metrics) == pytest.approx({**NLL_METRICS, **shares})


def test_log_probs_of_several_outputs_of_a_session(queue, make_trainer, qwen_like_tokenizer):
    """What an earlier output says is thought where a later one calls."""
    early, late = (FakeRollout(qwen_like_tokenizer) for _ in range(2))
    early.turn("Look.", [SEARCH]).answer("So far.")
    late.turn("Again.", [SEARCH]).answer("Paris")
    other = FakeRollout(qwen_like_tokenizer).answer("Rome")
    rows = [(late, True, "u0"), (early, True, "u0"), (other, False, "u0")]
    values = [log_probs_of(late), log_probs_of(early, whole=True), log_probs_of(other)]
    batch = put(queue, rows, outputs=[(0, 1), (0, 0), (1, 0)], extra=log_prob_columns(values))
    metrics = {}
    advantages(queue, make_trainer(), batch, metrics)
    assert kinds(metrics) == pytest.approx({**NLL_METRICS, **token_shares(values)})


def test_log_probs_of_rollouts_of_one_length(queue, make_trainer, qwen_like_tokenizer):
    rows = [(FakeRollout(qwen_like_tokenizer).turn("Look.", [SEARCH]).answer("Rome"), ok, "u0") for ok in (True, False)]
    values = [log_probs_of(rollout) for rollout, _, _ in rows]
    metrics = {}
    advantages(queue, make_trainer(), put(queue, rows, extra=log_prob_columns(values)), metrics)
    assert kinds(metrics) == pytest.approx({**NLL_METRICS, **token_shares(values)})


@pytest.mark.parametrize("name", ["grpo", "tapo"])
def test_a_batch_without_log_probs_is_told_of_once(queue, make_trainer, qwen_like_tokenizer, caplog, monkeypatch, name):
    if PATCHED:
        pytest.skip("there the estimator has what the trainer hands over")
    monkeypatch.setattr("verl_tapo.trainer.v1.LOG_PROBS", ("no_log_probs", "none_either"))
    rows = fake_batch(qwen_like_tokenizer)
    for _ in range(2):
        metrics = {}
        advantages(queue, make_trainer(name), put(queue, rows), metrics)
        assert kinds(metrics) == pytest.approx(token_shares([log_probs_of(rollout) for rollout, _, _ in rows]))
    assert caplog.text.count("there are no metrics tapo/nll: the batch has neither old_log_probs nor rollout_") == 1
