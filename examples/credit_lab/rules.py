"""The rules that are compared: each turns a batch's base advantages into the ones that the policy trains on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from policy import Rollouts
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from verl_tapo import CreditReport, TapoConfig, ToolStep, build_tool_mask, register_kernel, transfer_credit
from verl_tapo.rule.arrays import BoolArray, FloatArray, IntArray, numbered
from verl_tapo.rule.config import Grounding, Scope
from verl_tapo.rule.grounding import earned, found_nothing
from verl_tapo.rule.similarity import Kernel, KernelSpec, make_kernel, similarities
from verl_tapo.rule.steps import SIGHTS, TokenScope

TOOLS: dict[str, dict[str, KernelSpec]] = {
    "image_search": {"image": "exact", "region": "iou"},
    "text_search": {"query": "text", "days": {"kernel": "number", "scale": 20}},
}


class Rule(Protocol):
    """The interface of every rule."""

    def __call__(
        self, base: torch.Tensor, rollouts: Rollouts, index: Sequence[Hashable]
    ) -> tuple[torch.Tensor, CreditReport | None]:
        """Returns (B, L) advantages from (B, L) base advantages and B prompt groups, and TAPO's
        report if it took part."""
        ...


@dataclass(frozen=True)
class Tapo:
    """verl_tapo's rule, with the gate against lucky witnesses that is under study."""

    config: TapoConfig
    gate: Literal["none", "lift", "lucky"] = "none"
    """``lift``: no transfer unless rollouts that hold the call succeed strictly more often than their prompt group;
    ``lucky``: the same, but a call that every rollout of the group holds may give credit (`Lifts.lucky`)."""
    whole: bool = False
    """Compare a call's arguments as one parameter, ``call``."""

    def __call__(
        self, base: torch.Tensor, rollouts: Rollouts, index: Sequence[Hashable]
    ) -> tuple[torch.Tensor, CreditReport]:
        steps = all_steps(rollouts)
        if self.whole:
            steps = [step._replace(arguments={"call": step.arguments}) for step in steps]
        if self.config.grounding.luck:
            base = _without_luck(rollouts, index)
        told = np.ones(len(index), dtype=bool)
        advantages, report = transfer_credit(
            base, rollouts.mask, index, rollouts.success, steps, self.config, recognisable=told
        )
        if self.gate == "none":
            return advantages, report
        lifts = report.lifts()
        barred = lifts.lucky | lifts.universal if self.gate == "lift" else lifts.lucky
        # A turn makes one call at most here, so a failing step that is left out changes nothing else.
        kept = [step for step, group in zip(steps, lifts.of_step, strict=True) if group < 0 or not barred[group]]
        return transfer_credit(base, rollouts.mask, index, rollouts.success, kept, self.config, recognisable=told)


def grpo_advantages(rewards: npt.ArrayLike, rollouts: Rollouts, index: Sequence[Hashable]) -> torch.Tensor:
    """(B, L) veRL's GRPO advantages; each of the B rewards is at the last token."""
    of_tokens = torch.zeros_like(rollouts.mask)
    of_tokens[:, -1] = torch.as_tensor(rewards)
    return compute_grpo_outcome_advantage(of_tokens, rollouts.mask, np.asarray(index))[0]


def _without_luck(rollouts: Rollouts, index: Sequence[Hashable]) -> torch.Tensor:
    """Those of the rewards that ``grounding.luck`` leaves."""
    success = np.asarray(rollouts.success, dtype=bool)
    rewards = earned(success.astype(float), numbered(index)[1], success, _lucky(rollouts, index))
    return grpo_advantages(rewards, rollouts, index)


def _lucky(rollouts: Rollouts, index: Sequence[Hashable]) -> BoolArray:
    """(B,) the successes that are known to have found nothing."""
    steps = all_steps(rollouts)
    holder = np.array([step.row for step in steps], dtype=np.int64)
    seen = np.array([SIGHTS[step.seen] for step in steps], dtype=np.int64)
    nothing = found_nothing(holder, seen, numbered(index)[1], np.ones(len(index), dtype=bool))
    return np.asarray(rollouts.success, dtype=bool) & nothing


def grpo(base: torch.Tensor, rollouts: Rollouts, index: Sequence[Hashable]) -> tuple[torch.Tensor, None]:
    """The base as it is."""
    return base, None


def clamp(base: torch.Tensor, rollouts: Rollouts, index: Sequence[Hashable]) -> tuple[torch.Tensor, None]:
    """No negative advantage on any tool-use step: the plainest rival."""
    mask = build_tool_mask(all_steps(rollouts), rollouts.mask) > 0
    return torch.where(mask, base.clamp(min=0), base), None


@dataclass(frozen=True)
class LuckOfAdvantages:
    """Grounded credit with another `luck`, which leaves rewards as they are: in a success that found nothing positive
    advantages become 0. It is *not* in verl_tapo."""

    without: Tapo
    all_tokens: bool = True
    """False: those of tool-use steps alone, so that answers keep theirs, and rollouts without calls keep all."""

    def __call__(
        self, base: torch.Tensor, rollouts: Rollouts, index: Sequence[Hashable]
    ) -> tuple[torch.Tensor, CreditReport]:
        advantages, report = self.without(base, rollouts, index)
        for row in np.flatnonzero(_lucky(rollouts, index)):
            spans = [(0, None)] if self.all_tokens else [step.turn for step in rollouts.episodes[row].steps]
            for span in spans:
                advantages[row, slice(*span)].clamp_(max=0)
        return advantages, report


def step_groups(base: torch.Tensor, rollouts: Rollouts, index: Sequence[Hashable]) -> tuple[torch.Tensor, None]:
    """GiGPO's step groups (arXiv 2505.10978): turns of a prompt group that saw the same last answer of a tool are
    compared among each other by their discounted success (0.95 a turn); that advantage is added at weight 1.
    """
    groups: dict[Hashable, list[tuple[int, tuple[int, int], float]]] = defaultdict(list)
    for row, episode in enumerate(rollouts.episodes):
        for left, turn in enumerate(reversed(episode.turns)):
            groups[index[row], turn.seen].append((row, turn.span, 0.95**left * float(rollouts.success[row])))
    advantages = base.clone()
    for turns in groups.values():
        returns = np.array([value for _, _, value in turns])
        for (row, (start, end), _), value in zip(turns, returns - returns.mean(), strict=True):
            advantages[row, start:end] += value / (returns.std() + 1e-6)
    return advantages * rollouts.mask, None


def calib_adv(base: torch.Tensor, rollouts: Rollouts, index: Sequence[Hashable]) -> tuple[torch.Tensor, None]:
    """CalibAdv (arXiv 2604.18235). The penalty of a call in a failing rollout is ``A (1 - s)``,
    where s is the share of the tool's answer that tools of successful siblings also gave. The
    penalties of a prompt group's last turns are then scaled to the sum of their rewards; if only
    one of the two exists, both are 0."""
    advantages = base.clone()
    for group in dict.fromkeys(index):
        rows = [row for row, prompt in enumerate(index) if prompt == group]
        siblings = [rollouts.episodes[row] for row in rows if rollouts.success[row]]
        evidence = {entity for episode in siblings for found in episode.found for entity in found}
        last = torch.zeros_like(base, dtype=torch.bool)
        for row in rows:
            episode = rollouts.episodes[row]
            if not rollouts.success[row]:
                for step, found in zip(episode.steps, episode.found, strict=True):
                    share = len(evidence.intersection(found)) / len(set(found))
                    advantages[row, slice(*step.turn)] *= 1 - share
            if episode.turns:
                last[row, slice(*episode.turns[-1].span)] = True
        rewards, penalties = ((advantages * (last & side)) for side in (advantages > 0, advantages < 0))
        given, taken = float(rewards.sum()), -float(penalties.sum())
        if not given or not taken:
            advantages[last] = 0
        else:
            advantages = torch.where(last & (advantages < 0), advantages * (given / taken), advantages)
    return advantages, None


@register_kernel("lab_product")
class Product(Kernel):
    """The product of the parameters' kernels; the project uses their minimum."""

    def __init__(self, kernels: Mapping[str, KernelSpec]) -> None:
        self._kernels = {name: make_kernel(spec) for name, spec in kernels.items()}

    def prepare(self, value: Any) -> Hashable:
        return tuple(kernel.prepare(value[name]) for name, kernel in self._kernels.items())

    def pairs(self, values: Sequence[Any], left: IntArray, right: IntArray) -> FloatArray:
        product = np.ones(len(left))
        for kernel, column in zip(self._kernels.values(), zip(*values, strict=True), strict=True):
            distinct = {value: number for number, value in enumerate(dict.fromkeys(column))}
            number = np.array([distinct[value] for value in column])
            product *= similarities(kernel, list(distinct), number[left], number[right])
        return product


def all_steps(rollouts: Rollouts) -> list[ToolStep]:
    """Every tool-use step of a batch, row by row."""
    return [step for episode in rollouts.episodes for step in episode.steps]


_UNGROUNDED = Grounding()
_GROUNDED = Grounding(witnesses=True, own=True, luck=True)
_NO_LUCK = Grounding(witnesses=True, own=True)


def tapo(
    beta: float = 0.8,
    theta: float = 0.8,
    alpha_min: float = 0.2,
    token_scope: TokenScope = "step",
    scope: Scope = "group",
    use_support: bool = True,
    clip: bool = True,
    grounding: Grounding = _UNGROUNDED,
) -> Tapo:
    """The rule with the project's defaults, or others."""
    return Tapo(TapoConfig(beta, theta, alpha_min, token_scope, scope, use_support, clip, TOOLS, grounding))


_PRODUCT = TapoConfig(tools={tool: {"call": {"kernel": "lab_product", "kernels": of}} for tool, of in TOOLS.items()})

RULES: dict[str, Rule] = {
    "grpo": grpo,
    "tapo": tapo(),
    "grounded": tapo(grounding=_GROUNDED),
    "grounded/scope=batch": tapo(scope="batch", grounding=_GROUNDED),
    "grounded/witnesses": tapo(grounding=Grounding(witnesses=True)),
    "grounded/own": tapo(grounding=Grounding(own=True)),
    "grounded/luck": tapo(grounding=Grounding(luck=True)),
    "grounded/witnesses+luck": tapo(grounding=Grounding(witnesses=True, luck=True)),
    "grounded/witnesses+own": tapo(grounding=_NO_LUCK),
    "grounded/own alone": tapo(beta=0.0, grounding=Grounding(own=True)),
    "grounded/luck alone": tapo(beta=0.0, grounding=Grounding(luck=True)),
    "grounded/luck of advantages": LuckOfAdvantages(tapo(grounding=_NO_LUCK)),
    "grounded/luck of steps": LuckOfAdvantages(tapo(grounding=_NO_LUCK), all_tokens=False),
    "calib_adv": calib_adv,
    "clamp": clamp,
    "step_groups": step_groups,
    "tapo/no_support": tapo(use_support=False),
    "tapo/no_clip": tapo(clip=False),
    **{f"tapo/beta={value}": tapo(beta=value) for value in (0.0, 0.2, 0.5, 1.0)},
    **{f"tapo/theta={value}": tapo(theta=value) for value in (0.6, 0.9, 1.0)},
    **{f"tapo/alpha_min={value}": tapo(alpha_min=value) for value in (0.0, 0.4, 0.6)},
    "tapo/scope=call": tapo(token_scope="call"),
    "tapo/scope=batch": tapo(scope="batch"),
    "tapo/product": Tapo(_PRODUCT, whole=True),
    "tapo/gate=lift": replace(tapo(), gate="lift"),
    "tapo/gate=lucky": replace(tapo(), gate="lucky"),
}


def identical_calls(rollouts: Rollouts, index: Iterable[Hashable]) -> list[list[tuple[int, int]]]:
    """Equal calls of a prompt group, made more than once: (row, last token) of each."""
    prompts = list(index)
    calls: dict[Hashable, list[tuple[int, int]]] = defaultdict(list)
    for step in all_steps(rollouts):
        calls[prompts[step.row], step.tool, str(step.arguments)].append((step.row, step.call[1] - 1))
    return [places for places in calls.values() if len(places) > 1]
