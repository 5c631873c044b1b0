"""Rollouts as veRL's tool agent writes them: tokens, mask, and what a recorder would have noted."""

import json
from dataclasses import dataclass, field

import numpy as np
import torch

from verl_tapo.records import CallRecord, TrajectoryRecord


@dataclass
class FakeRollout:
    """One trajectory, in the making."""

    tokenizer: object
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    record: TrajectoryRecord = field(default_factory=TrajectoryRecord)

    def _add(self, text, policy):
        start = len(self.ids)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        self.ids += ids
        self.mask += [policy] * len(ids)
        return start, len(self.ids)

    def turn(self, thought, calls, answers=None, failed=()):
        """An assistant turn with calls, and the observation with their answers."""
        start, _ = self._add(thought, 1)
        spans = []
        for tool, arguments in calls:
            text = json.dumps({"name": tool, "arguments": arguments}, ensure_ascii=False)
            spans.append(self._add(f"<tool_call>\n{text}\n</tool_call>", 1))
        _, end = self._add("<|im_end|>", 1)
        answers = ["It is so."] * len(calls) if answers is None else answers
        for number, ((tool, arguments), span) in enumerate(zip(calls, spans, strict=True)):
            status = "not_executed" if number >= len(answers) else "error" if number in failed else "ok"
            self.record.steps.append(CallRecord(tool, arguments, (start, end), span, status))
        if answers:
            blocks = "\n".join(f"<tool_response>\n{answer}\n</tool_response>" for answer in answers)
            self._add(f"\n<|im_start|>user\n{blocks}<|im_end|>\n<|im_start|>assistant\n", 0)
        return self

    def answer(self, text):
        self._add(f"{text}<|im_end|>", 1)
        return self


SEARCH = ("text_search", {"query": "capital of France"})
SIMILAR = ("text_search", {"query": "the capital of France"})
OTHER = ("text_search", {"query": "river in Peru"})
LOOK = ("zoom", {"image": "photo", "bbox_2d": [10, 20, 300, 400]})


def fake_group(tokenizer):
    """Eight trajectories of one prompt: three succeed, five fail, four of these made a call that a success made."""

    def new():
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


LUXEMBOURG = {"style": "rule", "ground_truth": ["Luxembourg"]}


def grounded_group(tokenizer):
    """Six trajectories of a prompt whose answer is Luxembourg, with what can be told of each call's answer."""
    page, other = "Luxembourg is a country.", "Nothing of it."
    asks = ("text_search", {"query": "is it Luxembourg"})

    def row(ok, *turns):
        rollout = FakeRollout(tokenizer)
        for call, answer in turns:
            rollout.turn("Look.", [call], [answer])
        return rollout.answer("Luxembourg" if ok else "Lima"), ok, "u0"

    rows = [
        row(True, (SEARCH, other), (OTHER, page)),
        row(True, (SEARCH, other)),
        row(True),
        row(False, (SEARCH, page), (OTHER, other)),
        row(False, (SEARCH, other)),
        row(False, (asks, page)),
    ]
    sights = [[False, True], [False], [], [True, False], [False], [None]]
    for (rollout, _, _), seen in zip(rows, sights, strict=True):
        for step, sight in zip(rollout.record.steps, seen, strict=True):
            step.seen = sight
    return rows


GROUNDING_METRICS = {
    "tapo/grounding/told": 4 / 6,
    "tapo/grounding/grounded_successes": 1 / 2,
    "tapo/grounding/grounded_failures": 1 / 2,
    "tapo/grounding/never_found": 2 / 4,
    "tapo/grounding/tool/text_search/found": 2 / 6,
}
"""Of these."""


def fake_batch(tokenizer):
    """Rows of three prompts, not in order: a group of eight, one of two without tools, and one of one."""
    rows = [(rollout, ok, "u0") for rollout, ok in fake_group(tokenizer)]
    plain = [(FakeRollout(tokenizer).answer(text), text == "yes", "u1") for text in ("yes", "no")]
    alone = [(FakeRollout(tokenizer).turn("Look.", [SEARCH]).answer("?"), False, "u2")]
    order = [3, 8, 0, 10, 5, 1, 9, 2, 7, 4, 6]
    everything = rows + plain + alone
    return [everything[i] for i in order]


def padded(sequences, value=0, dtype=torch.int64):
    """(B, L) right-padded."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(s, dtype=dtype) for s in sequences], True, value)


def rewards_of(rows, lengths, width):
    """(B, L): the outcome on each row's last token."""
    rewards = torch.zeros(len(rows), width)
    for row, (_, ok, _) in enumerate(rows):
        rewards[row, lengths[row] - 1] = float(ok)
    return rewards


def data_proto(rows, tokenizer, recorded=True, **columns):
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
    }
    objects = {"uid": [uid for _, _, uid in rows], "acc": [float(ok) for _, ok, _ in rows], **columns}
    if recorded:
        objects["tapo_steps"] = [rollout.record.to_dict() for rollout, _, _ in rows]
    arrays = {}
    for name, values in objects.items():
        arrays[name] = np.empty(len(rows), dtype=object)
        arrays[name][:] = values
    return DataProto(batch=TensorDict(tensors, batch_size=len(rows)), non_tensor_batch=arrays)
