"""The rule itself: batches computed by hand, and random ones against plain loops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from verl_tapo.rule import credit
from verl_tapo.rule.config import TapoConfig
from verl_tapo.rule.reference import Reference
from verl_tapo.rule.steps import ToolStep
from verl_tapo.selftest.check import Check, Failed, require_equal
from verl_tapo.selftest.random_batches import random_batch, random_config

RANDOM_BATCHES = 100
_CLOSE = 1e-6
_TOOLS: dict[str, Any] = {"search": {"query": "text"}}


class _ByHand(NamedTuple):
    """A batch of one prompt whose rows have four tokens and one advantage each."""

    says: str
    base: list[float]
    """(B,) advantage of each row; above 0 for its successes."""
    steps: list[ToolStep]
    expected: list[list[float]]
    """(B, 4) advantages after the correction."""
    settings: Mapping[str, Any] = {}


def _step(row: int, query: str = "capital of France", ok: bool = True, start: int = 0, end: int = 2) -> ToolStep:
    return ToolStep(row, "search", {"query": query}, (start, end), (start, end), ok)


_BY_HAND = (
    # similarity 1, support 1/1: -1 + 0.8 * 1 * 1
    _ByHand("an equal call", [1, -1], [_step(0), _step(1)], [[1, 1, 1, 1], [-0.2, -0.2, -1, -1]]),
    # -0.5 + 0.8 * 1 * 2 is above 0
    _ByHand("never past zero", [2, -0.5], [_step(0), _step(1)], [[2, 2, 2, 2], [0, 0, -0.5, -0.5]]),
    # two of four successes hold it: -2 + 0.8 * (2 / 4) * (1 + 2) / 2
    _ByHand(
        "support",
        [1, 2, 1, 1, -2],
        [_step(0), _step(1), _step(2, "river in Peru"), _step(4)],
        [[1] * 4, [2] * 4, [1] * 4, [1] * 4, [-1.4, -1.4, -2, -2]],
    ),
    _ByHand("theta", [1, -1], [_step(0), _step(1, "river in Peru")], [[1] * 4, [-1] * 4]),
    _ByHand(
        "alpha_min",
        [1, 1, 1, -1],
        [_step(0), _step(3)],
        [[1] * 4, [1] * 4, [1] * 4, [-1] * 4],
        {"alpha_min": 0.34},
    ),
    _ByHand("calls that failed", [1, -1], [_step(0), _step(1, ok=False)], [[1] * 4, [-1] * 4]),
    # a turn is corrected only as far as its weakest call
    _ByHand("parallel calls", [1, -1], [_step(0), _step(1), _step(1, "river in Peru")], [[1] * 4, [-1] * 4]),
)


def rule_checks() -> Iterator[Check]:
    """Checks of `verl_tapo.rule`."""
    yield Check("the rule: batches computed by hand", _by_hand)
    yield Check("the rule: random batches, against the plain loops of rule/reference.py", _at_random)


def _by_hand() -> str:
    for case in _BY_HAND:
        mask = torch.ones(len(case.base), 4, dtype=torch.int64)
        base = torch.tensor(case.base, dtype=torch.float32)[:, None] * mask
        success = [value > 0 for value in case.base]
        config = TapoConfig(tools=_TOOLS, **case.settings)
        result, _ = credit.transfer_credit(base, mask, ["prompt"] * len(success), success, case.steps, config)
        try:
            require_equal(result, torch.tensor(case.expected, dtype=torch.float32), _CLOSE)
        except Failed as why:
            raise Failed(f"{case.says}: {why}") from None
    return f"{len(_BY_HAND)} batches"


def _at_random() -> str:
    corrected = 0
    for seed in range(RANDOM_BATCHES):
        batch, config = random_batch(seed), random_config(seed)
        result, report = credit.transfer_credit(*batch, config)
        expected, outcomes = Reference(*batch, config).transfer()
        try:
            require_equal(result, expected, _CLOSE)
        except Failed as why:
            raise Failed(f"seed {seed}: {why}") from None
        gates = [step.gate for step in report.steps]
        if gates != [step.gate for step in outcomes]:
            raise Failed(f"seed {seed}: the gates are {gates}, should be {[step.gate for step in outcomes]}")
        corrected += gates.count("corrected")
    if not corrected:
        raise Failed("not a step was corrected in any of them")
    return f"{RANDOM_BATCHES} batches, {corrected} steps corrected"
