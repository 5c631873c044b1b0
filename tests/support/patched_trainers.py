"""What a patched veRL's own trainer methods do; `test_patches.py` runs this against each patched tree.

TransferQueue is a dictionary here: veRL 0.8's synchronous trainer (`main_ppo_sync`) and 0.9's V1 are fed alike this
way, and what is asked of the queue can be counted. `test_trainer_v1.py` runs on the real one.
"""

import types

import numpy as np
import pytest
import torch
import verl
from omegaconf import OmegaConf
from verl.experimental.separation.ray_trainer import SeparateRayPPOTrainer

from verl_tapo.selftest.rollouts import data_proto, fake_batch, fake_group
from verl_tapo.step_records import read_step_records
from verl_tapo.trainer import estimator

if verl.__version__.startswith("0.8"):
    from verl.trainer import main_ppo_sync as trainer_module
else:
    from verl.trainer.ppo.v1 import trainer_base as trainer_module

REJECTION = {"rollout_is": None, "rollout_rs": "token_k1", "rollout_rs_threshold": "0.5_2.0"}


def configuration(name, correction=None, **tapo):
    algorithm = {"gamma": 1.0, "lam": 1.0, "use_kl_in_reward": False, "adv_estimator": name, "tapo": tapo}
    rollout = {"n": 8, "multi_turn": {"format": "hermes"}}
    return OmegaConf.create(
        {
            "algorithm": {**algorithm, "rollout_correction": correction},
            "actor_rollout_ref": {"rollout": rollout},
        }
    )


def odd_rollout_log_probs(shape):
    """Such that rejection takes out single tokens."""
    torch.manual_seed(0)
    return -1.0 - 3.0 * (torch.rand(shape) < 0.2)


class Batch(types.SimpleNamespace):
    def __len__(self):
        return len(self.keys)


class Store:
    """In place of ``transfer_queue``, with one batch."""

    def __init__(self, rows, recorded=True, correction=None, outputs=None, **columns):
        from verl.utils.tensordict_utils import list_of_dict_to_tensordict

        outputs = [(row, 0) for row in range(len(rows))] if outputs is None else outputs
        fields = []
        for row, (rollout, ok, uid) in enumerate(rows):
            extra = {"reward_extra_info": {"acc": float(ok)}, "turn_scores": [], "tool_rewards": [0.5]}
            extra |= {"tapo_steps": rollout.record.to_dict()} if recorded else {}
            extra |= {"rare": row} if row == 1 else {}
            scores = torch.zeros(len(rollout.ids))
            scores[-1] = float(ok)
            stored = {
                "uid": uid,
                "prompts": torch.arange(2 + row % 3),
                "responses": torch.tensor(rollout.ids),
                "response_mask": torch.tensor(rollout.mask),
                "rm_scores": scores,
                "extra_fields": extra,
            }
            if correction:
                stored["old_log_probs"] = torch.full(scores.shape, -1.0)
                stored["rollout_log_probs"] = odd_rollout_log_probs(scores.shape)
            fields.append(stored | {name: values[row] for name, values in columns.items()})
        self.data = list_of_dict_to_tensordict(fields)
        keys = [f"{uid}_{session}_{output}" for (_, _, uid), (session, output) in zip(rows, outputs, strict=True)]
        self.batch = Batch(keys=keys, tags=[{}] * len(keys), partition_id="train")
        self.asked = []

    def kv_batch_get(self, keys, partition_id, select_fields):
        self.asked.append(select_fields)
        return self.data.select(*[name for name in select_fields if name in self.data])

    def kv_batch_put(self, keys, partition_id, fields):
        self.data.update(fields)
        return self.batch


@pytest.fixture
def queue_run(monkeypatch, qwen_like_tokenizer):
    """`_compute_advantage` on a new store; gives advantages, metrics and the store."""
    cls = trainer_module.PPOTrainer
    monkeypatch.setattr(cls, "__abstractmethods__", frozenset(), raising=False)  # 0.8's is concrete

    def run(name, rows, recorded=True, correction=None, outputs=None, columns=None, **tapo):
        store = Store(rows, recorded, correction, outputs, **(columns or {}))
        monkeypatch.setattr(trainer_module, "tq", store)
        trainer = object.__new__(cls)
        trainer.config = configuration(name, correction, **tapo)
        trainer.tokenizer, trainer.global_steps = qwen_like_tokenizer, 12
        trainer.reward_extra_keys = list(columns or {})  # as a colocated reward model would have left it
        metrics = {}
        trainer._compute_advantage(store.batch, metrics)
        return store.data["advantages"].to_padded_tensor(0.0), metrics, store

    return run


def outputs_of_one_session(tokenizer):
    """A group whose first session has two outputs, the last one first; the others have one each."""
    rows = [(rollout, ok, "u0") for rollout, ok in fake_group(tokenizer)]
    return [rows[0], *rows], [(0, 1), (0, 0), *((session, 0) for session in range(1, 8))]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("correction", [None, REJECTION])
def test_transfer_queue_trainer(queue_run, qwen_like_tokenizer, tmp_path, monkeypatch, several, correction):
    monkeypatch.setattr(estimator._RecorderCache, "recorder", None)
    rows, outputs = outputs_of_one_session(qwen_like_tokenizer) if several else (fake_batch(qwen_like_tokenizer), None)
    given = {"outputs": outputs, "correction": correction}
    base, metrics, store = queue_run("grpo", rows, **given)
    assert not any(name.startswith("tapo/") for name in metrics)
    assert "tapo_tool_mask" not in store.data
    recorded, metrics, store = queue_run("tapo", rows, **given)
    parsed, parsed_metrics, _ = queue_run("tapo", rows, recorded=False, **given)
    assert torch.equal(recorded, parsed)
    assert (metrics["tapo/recorded_rollouts"], parsed_metrics["tapo/recorded_rollouts"]) == (1.0, 0.0)
    assert (recorded >= base).all()
    assert (recorded != base).any()
    assert len(store.asked) == 1
    assert store.data["tapo_tool_mask"].offsets().tolist() == store.data["responses"].offsets().tolist()
    assert int(store.data["tapo_tool_mask"].values().max()) == 2
    assert not {"rollout_mask", "attention_mask"} & set(store.data.keys())
    off, _, _ = queue_run("tapo", rows, beta=0.0, **given)
    assert torch.equal(off, base)
    queue_run("tapo", rows, record_dir=str(tmp_path), **given)
    estimator._RecorderCache.recorder.flush()
    assert read_step_records(tmp_path / "000012.jsonl.gz").header["step"] == 12  # the trainer's, not a count


@pytest.mark.parametrize("name", ["grpo", "rloo", "opo", "grpo_vectorized"])
def test_no_more_is_fetched_for_other_estimators(queue_run, qwen_like_tokenizer, name):
    _, _, store = queue_run(name, fake_batch(qwen_like_tokenizer))
    assert len(store.asked) == 1
    assert not {"responses", "prompts", "extra_fields"} & set(store.asked[0])


@pytest.mark.skipif(trainer_module.__name__.endswith("main_ppo_sync"), reason="0.8.0 does not store its extra info")
def test_extra_info_of_a_colocated_reward_model(queue_run, qwen_like_tokenizer):
    rows = fake_batch(qwen_like_tokenizer)
    plain, _, _ = queue_run("tapo", rows)
    judged, metrics, _ = queue_run(
        "tapo", rows, columns={"judge": [bool(ok) for _, ok, _ in rows]}, success_key="judge"
    )
    assert torch.equal(plain, judged)
    assert metrics["tapo/success_from_score"] == 0.0


@pytest.mark.parametrize("correction", [None, REJECTION])
def test_v0_trainer(qwen_like_tokenizer, correction):
    """The asynchronous experiments' own method; with the mask from before rejection, parsing needs no record."""
    rows = fake_batch(qwen_like_tokenizer)

    def run(name, recorded=True, **tapo):
        trainer = object.__new__(SeparateRayPPOTrainer)
        trainer.config = configuration(name, correction, **tapo)
        trainer.tokenizer, trainer.global_steps = qwen_like_tokenizer, 12
        trainer.metrics, trainer.timing_raw = {}, {}
        trainer.reward_extra_infos_dict = {"acc": [float(ok) for _, ok, _ in rows]}
        data = data_proto(rows, qwen_like_tokenizer, recorded=recorded)
        trainer.reward_tensor = data.batch.pop("token_level_scores")
        data.batch["old_log_probs"] = torch.full(trainer.reward_tensor.shape, -1.0)
        data.batch["rollout_log_probs"] = odd_rollout_log_probs(trainer.reward_tensor.shape)
        return trainer._fit_compute_advantage(data), trainer.metrics

    base, metrics = run("grpo")
    assert not any(name.startswith("tapo/") for name in metrics)
    recorded, metrics = run("tapo")
    assert np.isclose(metrics["tapo/corrected_steps"], 6 / 8)
    parsed, _ = run("tapo", recorded=False)
    off, _ = run("tapo", beta=0.0)
    assert torch.equal(recorded.batch["advantages"], parsed.batch["advantages"])
    assert torch.equal(recorded.batch["tapo_tool_mask"], parsed.batch["tapo_tool_mask"])
    assert torch.equal(off.batch["advantages"], base.batch["advantages"])
    assert (recorded.batch["advantages"] != base.batch["advantages"]).any()
    assert "rollout_mask" not in recorded.batch.keys()  # noqa: SIM118 (a TensorDict)
    assert set(recorded.batch.keys()) - set(base.batch.keys()) == {"tapo_tool_mask"}
