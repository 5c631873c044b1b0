"""Rollouts as veRL's tool agent writes them: tokens, mask, and what a recorder would have noted."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch

from verl_tapo.calls.call import CallStatus
from verl_tapo.records import CallRecord, TrajectoryRecord

Call: TypeAlias = tuple[str, dict[str, Any]]


@dataclass
class FakeRollout:
    """One trajectory, in the making."""

    tokenizer: Any
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    record: TrajectoryRecord = field(default_factory=TrajectoryRecord)

    def _add(self, text: str, policy: int) -> tuple[int, int]:
        start = len(self.ids)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        self.ids += ids
        self.mask += [policy] * len(ids)
        return start, len(self.ids)

    def turn(
        self, thought: str, calls: Sequence[Call], answers: Sequence[str] | None = None, failed: Collection[int] = ()
    ) -> FakeRollout:
        """An assistant turn with calls, and the observation with their answers."""
        start, _ = self._add(thought, 1)
        spans = []
        for tool, arguments in calls:
            text = json.dumps({"name": tool, "arguments": arguments}, ensure_ascii=False)
            spans.append(self._add(f"<tool_call>\n{text}\n</tool_call>", 1))
        _, end = self._add("<|im_end|>", 1)
        answers = ["It is so."] * len(calls) if answers is None else answers
        for number, ((tool, arguments), span) in enumerate(zip(calls, spans, strict=True)):
            status: CallStatus = "not_executed" if number >= len(answers) else "error" if number in failed else "ok"
            self.record.steps.append(CallRecord(tool, arguments, (start, end), span, status))
        if answers:
            blocks = "\n".join(f"<tool_response>\n{answer}\n</tool_response>" for answer in answers)
            self._add(f"\n<|im_start|>user\n{blocks}<|im_end|>\n<|im_start|>assistant\n", 0)
        return self

    def answer(self, text: str) -> FakeRollout:
        """An assistant turn without calls."""
        self._add(f"{text}<|im_end|>", 1)
        return self


Row: TypeAlias = tuple[FakeRollout, bool, str]
"""A rollout, its success, and its prompt group."""

SEARCH: Call = ("text_search", {"query": "capital of France"})
SIMILAR: Call = ("text_search", {"query": "the capital of France"})
OTHER: Call = ("text_search", {"query": "river in Peru"})
LOOK: Call = ("zoom", {"image": "photo", "bbox_2d": [10, 20, 300, 400]})


def fake_group(tokenizer: Any) -> list[tuple[FakeRollout, bool]]:
    """Eight trajectories of one prompt: three succeed, five fail, four of these made a call that a success made."""

    def new() -> FakeRollout:
        return FakeRollout(tokenizer)

    error = "Error executing tool 'text_search': no answer"
    return [
        (new().turn("Look.", [SEARCH]).turn("Closer.", [LOOK]).answer("Paris"), True),
        (new().turn("First the city.", [SIMILAR]).answer("Paris"), True),
        (new().answer("Paris, I know"), True),
        (new().turn("Hm.", [SIMILAR]).turn("And then", [OTHER]).answer("Lima"), False),
        (new().turn("Hm.", [SEARCH], [error], failed={0}).turn("Zoom.", [LOOK]).answer("Rome"), False),
        (new().turn("Both.", [SEARCH, OTHER]).answer("no idea"), False),
        (new().turn("Both.", [SEARCH, LOOK]).answer("none"), False),
        (new().turn("Again", [SEARCH]).turn("cut", [SEARCH], []), False),
    ]


def fake_batch(tokenizer: Any) -> list[Row]:
    """Rows of three prompts, not in order: a group of eight, one of two without tools, and one of one."""
    rows = [(rollout, ok, "u0") for rollout, ok in fake_group(tokenizer)]
    plain = [(FakeRollout(tokenizer).answer(text), text == "yes", "u1") for text in ("yes", "no")]
    alone = [(FakeRollout(tokenizer).turn("Look.", [SEARCH]).answer("?"), False, "u2")]
    order = [3, 8, 0, 10, 5, 1, 9, 2, 7, 4, 6]
    everything = rows + plain + alone
    return [everything[i] for i in order]


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are single bytes, made here: no model is needed to check the adapters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def padded(sequences: Sequence[Sequence[Any]], value: float = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """(B, L) right-padded."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(s, dtype=dtype) for s in sequences], True, value)


def rewards_of(rows: Sequence[Row], lengths: Sequence[int], width: int) -> torch.Tensor:
    """(B, L): the outcome on each row's last token."""
    rewards = torch.zeros(len(rows), width)
    for row, (_, ok, _) in enumerate(rows):
        rewards[row, lengths[row] - 1] = float(ok)
    return rewards


def data_proto(rows: Sequence[Row], tokenizer: Any, recorded: bool = True, **columns: Any) -> Any:
    """The rows as veRL's V0 trainers hold them."""
    from tensordict import TensorDict
    from verl import DataProto

    lengths = [len(rollout.ids) for rollout, _, _ in rows]
    responses = padded([rollout.ids for rollout, _, _ in rows], tokenizer.pad_token_id)
    mask = padded([rollout.mask for rollout, _, _ in rows])
    prompts = torch.full((len(rows), 3), tokenizer.eos_token_id)
    valid = (torch.arange(mask.shape[1]) < torch.tensor(lengths)[:, None]).long()
    rewards = rewards_of(rows, lengths, mask.shape[1])
    tensors = {
        "prompts": prompts,
        "responses": responses,
        "response_mask": mask,
        "attention_mask": torch.cat([torch.ones_like(prompts), valid], 1),
        "token_level_scores": rewards,
        "token_level_rewards": rewards.clone(),
        "old_log_probs": torch.full_like(rewards, -1.0),
    }
    objects: dict[str, Sequence[Any]] = {
        "uid": [uid for _, _, uid in rows],
        "acc": [float(ok) for _, ok, _ in rows],
        **columns,
    }
    if recorded:
        objects["tapo_steps"] = [rollout.record.to_dict() for rollout, _, _ in rows]
    arrays = {}
    for name, values in objects.items():
        arrays[name] = np.empty(len(rows), dtype=object)
        arrays[name][:] = values
    return DataProto(batch=TensorDict(tensors, batch_size=len(rows)), non_tensor_batch=arrays)
