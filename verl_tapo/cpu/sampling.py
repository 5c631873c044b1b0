"""Draws the next token as veRL asks of a rollout engine, row by row and reproducibly."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """The sampling settings of one request; names and meanings are vLLM's."""

    max_tokens: int
    temperature: float = 1.0
    """0 samples greedily."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 or 0 turns it off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    """The model's own end tokens among them."""

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("max_tokens", self.max_tokens >= 1, ">= 1"),
            ("temperature", self.temperature >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= -1, ">= -1"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "> 0"),
            ("min_tokens", self.min_tokens >= 0, ">= 0"),
        ):
            if not good:
                raise ValueError(f"sampling parameter {name} must be {expected}, got {getattr(self, name)!r}")

    @classmethod
    def from_verl(cls, params: dict[str, Any], max_tokens: int, end_tokens: frozenset[int]) -> Sampling:
        """Out of the dict that veRL's agent loops hand to a rollout engine.

        Args:
            params: ``logprobs`` and ``seed`` are no business of this class; None counts as not given.
            max_tokens: that there is room for.
            end_tokens: the model's end tokens.

        Raises:
            ValueError: for a parameter that is out of range, or not known here: a run that silently samples otherwise
                than it was told to is worse.
        """
        given = {name: value for name, value in params.items() if value is not None}
        given.pop("logprobs", None)
        given.pop("seed", None)
        ignore_eos = given.pop("ignore_eos", False)
        stop = frozenset(given.pop("stop_token_ids", ()))
        known = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_tokens"}
        if unknown := given.keys() - known:
            raise ValueError(f"the transformers rollout does not know the sampling parameters {sorted(unknown)}")
        return cls(max_tokens, **given, stop_token_ids=stop if ignore_eos else stop | end_tokens)


def request_seed(*parts: int | bytes | Sequence[int]) -> int:
    """Returns a seed from what distinguishes a request: the same in every run and on every machine."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
        digest.update(b"|")
    return int.from_bytes(digest.digest()[:8], "big")


def token_log_probs(logits: Tensor, tokens: Tensor, temperatures: Tensor) -> Tensor:
    """Log-probabilities as veRL's actor computes them: of logits over temperature, with nothing left out.

    Args:
        logits: (rows, vocabulary), of the model, float32.
        tokens: (rows,)
        temperatures: (rows,); 0 counts as 1.

    Returns:
        (rows,)
    """
    scale = torch.where(temperatures > 0, temperatures, 1.0)
    return (logits / scale[:, None]).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def draw(logits: Tensor, rows: Sequence[Sampling], seen: Sequence[Sequence[int]], noise: Sequence[float]) -> Tensor:
    """The next token of every row; a row's depends on no other row.

    Args:
        logits: (rows, vocabulary), float32; tokens that must not be drawn are -inf.
        rows: the sampling settings of each row.
        seen: each row's tokens so far, prompt included.
        noise: a uniform number in [0, 1) for each row.

    Returns:
        (rows,)
    """
    tokens = []
    for values, row, before, uniform in zip(logits, rows, seen, noise, strict=True):
        if row.repetition_penalty != 1:
            index = torch.tensor(sorted(set(before)))
            old = values[index]
            penalised = torch.where(old > 0, old / row.repetition_penalty, old * row.repetition_penalty)
            values = values.index_copy(0, index, penalised)
        if row.temperature == 0:
            tokens.append(values.argmax())
            continue
        probabilities = (values.double() / row.temperature).softmax(-1)
        keep = probabilities >= row.min_p * probabilities.max()
        if 0 < row.top_k < len(probabilities):
            keep &= probabilities >= probabilities.topk(row.top_k).values[-1]
        if row.top_p < 1:
            ordered, order = probabilities.where(keep, 0.0).sort(descending=True, stable=True)
            above = ordered.cumsum(-1) - ordered  # of more probable tokens
            keep &= torch.zeros_like(keep).scatter(0, order, above < row.top_p * ordered.sum())
        bounds = probabilities.where(keep, 0.0).cumsum(-1)
        # The last bound is never reached, so that no rounding draws a token behind it.
        tokens.append(torch.searchsorted(bounds, bounds[-1] * uniform, right=True))
    return torch.stack(tokens)
