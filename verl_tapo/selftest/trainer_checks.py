"""Through the installed veRL's own trainers: ``tapo`` is ``grpo`` bit for bit where it has nothing to transfer, and
what the rule says where it has."""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from omegaconf import OmegaConf

from verl_tapo.plugin import PATCH_MARK
from verl_tapo.records import recorded_steps
from verl_tapo.rule import credit
from verl_tapo.rule.config import TapoConfig
from verl_tapo.rule.steps import ToolStep
from verl_tapo.selftest.check import Check, Failed, Skipped, require_equal
from verl_tapo.selftest.rollouts import FakeRollout, Row, byte_tokenizer, data_proto, fake_batch, padded
from verl_tapo.trainer import v0


class Trainer(Protocol):
    """A trainer of veRL, as far as it computes advantages."""

    name: str

    def advantages(self, rows: Sequence[Row], estimator: str, recorded: bool = True, **tapo: Any) -> torch.Tensor:
        """(B, L) advantages of rollouts.

        Args:
            rows: B rollouts.
            estimator: ``algorithm.adv_estimator``.
            recorded: whether the rollouts bring records of their calls.
            tapo: settings under ``algorithm.tapo``.
        """


def trainer_checks(trainer: Trainer) -> Iterator[Check]:
    """Checks of one trainer."""
    rows = fake_batch(byte_tokenizer())
    plain = [
        (FakeRollout(rollout.tokenizer).answer(f"answer {number}"), ok, uid)
        for number, (rollout, ok, uid) in enumerate(rows)
    ]
    # Nobody succeeds but those who called no tool.
    alone = [(rollout, ok and not rollout.record.steps, uid) for rollout, ok, uid in rows]
    for what, given, settings in (
        ("with beta=0", rows, {"beta": 0.0}),
        ("without tool-use steps", plain, {}),
        ("without witnesses", alone, {}),
    ):
        yield Check(f"{trainer.name}: tapo {what} is grpo, bit for bit", partial(_is_grpo, trainer, given, settings))
    for recorded, where in ((True, "recorded"), (False, "found in tokens")):
        name = f"{trainer.name}: tapo is what the rule makes of grpo, from calls {where}"
        yield Check(name, partial(_is_the_rule, trainer, rows, recorded))


def _is_grpo(trainer: Trainer, rows: Sequence[Row], settings: dict[str, Any]) -> str:
    stock = trainer.advantages(rows, "grpo")
    if not bool((stock != 0).any()):
        raise Failed("grpo itself gives no advantages")
    require_equal(trainer.advantages(rows, "tapo", **settings), stock)
    return f"{len(rows)} rollouts"


def _is_the_rule(trainer: Trainer, rows: Sequence[Row], recorded: bool) -> str:
    stock = trainer.advantages(rows, "grpo")
    steps: list[ToolStep] = []
    for number, (rollout, _, _) in enumerate(rows):
        steps += recorded_steps(rollout.record.to_dict(), number, len(rollout.ids), (), None)
    mask, groups = padded([rollout.mask for rollout, _, _ in rows]), [uid for _, _, uid in rows]
    expected, _ = credit.transfer_credit(stock, mask, groups, [ok for _, ok, _ in rows], steps, TapoConfig())
    changed = int((expected != stock).sum())
    if not changed:
        raise Failed("the rule corrects nothing here")
    require_equal(trainer.advantages(rows, "tapo", recorded), expected)
    return f"{changed} tokens corrected"


class V0:
    """The trainer function that veRL's asynchronous experiments use."""

    name = "V0"

    @cached_property
    def _module(self) -> Any:
        try:
            return importlib.import_module("verl.trainer.ppo.ray_trainer")
        except ImportError as error:
            raise Skipped(f"this veRL has no V0 trainer: {error}") from None

    def advantages(self, rows: Sequence[Row], estimator: str, recorded: bool = True, **tapo: Any) -> torch.Tensor:
        """See `Trainer`."""
        tokenizer = rows[0][0].tokenizer
        config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"multi_turn": {"format": "hermes"}}}})
        settings = {"gamma": 1.0, "lam": 1.0, "norm_adv_by_std_in_grpo": True, "adv_estimator": estimator, "tapo": tapo}
        algorithm = OmegaConf.create(settings)
        noted = types.SimpleNamespace(tokenizer=tokenizer, config=config)
        context = {}
        if hasattr(self._module, PATCH_MARK):
            context["adv_context"] = {**vars(noted), "step": None, "metrics": {}, "fields": {}}
        with _noted(noted):
            data = self._module.compute_advantage(
                data_proto(rows, tokenizer, recorded),
                estimator,
                norm_adv_by_std_in_grpo=True,
                config=algorithm,
                **context,
            )
        advantages: torch.Tensor = data.batch["advantages"]
        return advantages


@contextlib.contextmanager
def _noted(trainer: Any) -> Iterator[None]:
    """Stands for the trainer that the constructor's hook would have noted."""
    before = v0._trainer
    v0._trainer = lambda: trainer  # type: ignore[assignment]
    try:
        yield
    finally:
        v0._trainer = before
        v0._pending.clear()


class V1:
    """VeRL's default trainer, on a real TransferQueue in a Ray of its own."""

    name = "V1"

    def __init__(self) -> None:
        self._batches = 0
        self._stop = contextlib.ExitStack()

    def close(self) -> None:
        """Stops what was started."""
        self._stop.close()

    @cached_property
    def _cls(self) -> Any:
        try:
            v1 = importlib.import_module("verl.trainer.ppo.v1")
        except ModuleNotFoundError as error:
            if str(error.name).startswith("verl."):
                raise Skipped("this veRL has no V1 trainer") from None
            raise Failed(f"{error.name} is not installed: pip install 'verl-tapo[verl]'") from None
        return v1.get_trainer_cls("sync")

    @cached_property
    def config(self) -> Any:
        """The configuration of a run on a CPU, for one trainer and TransferQueue."""
        from hydra import compose, initialize_config_module

        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose(
                "tapo",
                overrides=[
                    "actor_rollout_ref.rollout.n=8",
                    "actor_rollout_ref.rollout.multi_turn.format=hermes",
                    "trainer.device=cpu",
                    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
                ],
            )

    @cached_property
    def _queue(self) -> Any:
        import ray
        import transfer_queue

        if not ray.is_initialized():
            # Never the cluster that RAY_ADDRESS may name.
            ray.init(address="local", num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            self._stop.callback(ray.shutdown)
            transfer_queue.init(self.config.transfer_queue)
            self._stop.callback(transfer_queue.close)
        return transfer_queue

    def advantages(self, rows: Sequence[Row], estimator: str, recorded: bool = True, **tapo: Any) -> torch.Tensor:
        """See `Trainer`."""
        trainer = object.__new__(self._cls)  # without its workers
        trainer.config = self.config.copy()
        trainer.config.algorithm.adv_estimator = estimator
        for key, value in tapo.items():
            trainer.config.algorithm.tapo[key] = value
        trainer.tokenizer, trainer.global_steps = rows[0][0].tokenizer, 1
        batch = trainer._compute_advantage(self._put(rows, recorded), {})
        data = self._queue.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["advantages"])
        advantages: torch.Tensor = data["advantages"].to_padded_tensor(0.0)
        return advantages

    def _put(self, rows: Sequence[Row], recorded: bool) -> Any:
        """Writes rollouts as veRL's agent loop workers do."""
        from verl.utils.tensordict_utils import list_of_dict_to_tensordict

        queue, self._batches = self._queue, self._batches + 1
        keys = [f"selftest{self._batches}{uid}_{number}_0" for number, (_, _, uid) in enumerate(rows)]
        fields = [_columns(row, key.rsplit("_", 2)[0], recorded) for row, key in zip(rows, keys, strict=True)]
        sizes = [len(rollout.ids) for rollout, _, _ in rows]
        tags = [{"status": "success", "prompt_len": 3, "response_len": n, "seq_len": 3 + n} for n in sizes]
        queue.kv_batch_put(keys=keys, partition_id="train", fields=list_of_dict_to_tensordict(fields), tags=tags)
        return queue.KVBatchMeta(partition_id="train", keys=keys, tags=tags)


def _columns(row: Row, uid: str, recorded: bool) -> dict[str, Any]:
    rollout, ok, _ = row
    extra: dict[str, Any] = {"reward_extra_info": {"acc": float(ok)}}
    if recorded:
        extra["tapo_steps"] = rollout.record.to_dict()
    scores = torch.zeros(len(rollout.ids))
    scores[-1] = float(ok)
    whole = [1, 2, 3, *rollout.ids]
    return {
        "uid": uid,
        "prompts": torch.tensor(whole[:3]),
        "responses": torch.tensor(rollout.ids),
        "input_ids": torch.tensor(whole),
        "attention_mask": torch.ones(len(whole), dtype=torch.int64),
        "position_ids": torch.arange(len(whole)),
        "response_mask": torch.tensor(rollout.mask),
        "loss_mask": torch.tensor(rollout.mask),
        "rm_scores": scores,
        "rollout_log_probs": torch.full((len(rollout.ids),), -1.0),
        "old_log_probs": torch.full((len(rollout.ids),), -1.0),
        "num_turns": 2,
        "extra_fields": extra,
    }
