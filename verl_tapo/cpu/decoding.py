"""Continuous batching on a transformers model, with a KV cache.

`Decoder.step` generates one token for every request in the batch; finished requests leave, and
waiting ones join. All rows share one cache, padded on the left, and every row has its own
positions.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from verl_tapo.cpu.sampling import Sampling, draw, token_log_probs

StopReason = Literal["completed", "aborted"]


@dataclass
class Request:
    """A prompt and the tokens generated for it."""

    prompt: list[int]
    sampling: Sampling
    noise: random.Random
    """The random numbers of this request alone."""
    positions: Tensor
    """Positions of the prompt's tokens: (tokens,), or (3, tokens) for multimodal rotary positions.
    """
    vision: dict[str, Tensor] = field(default_factory=dict)
    """The model's further inputs: ``pixel_values``, ``image_grid_thw``."""
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    stop_reason: StopReason | None = None

    @property
    def next_position(self) -> int:
        """The position of the next token; rotary positions continue from the largest one."""
        return int(self.positions.max()) + 1 + len(self.tokens)


class Decoder:
    """Generates for many requests at once. Only `submit` is thread-safe.

    Args:
        model: a causal language model of transformers, on the CPU, with full attention in every layer.
        max_rows: requests in a batch, >= 1; with 1 a request's logits do not depend on others to the last bit.
        max_prefill_tokens: prompts that join in one step have together at most as many tokens, one prompt excepted.
        forbidden: tokens that are never drawn: placeholders of images. Log-probabilities know nothing of that.
    """

    def __init__(
        self, model: Any, max_rows: int = 32, max_prefill_tokens: int = 8192, forbidden: Sequence[int] = ()
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows must be >= 1, got {max_rows}")
        self.model = model.eval()
        self.max_rows = max_rows
        self.max_prefill_tokens = max_prefill_tokens
        self.forbidden = torch.tensor(sorted(forbidden), dtype=torch.int64)
        self._waiting: deque[Request] = deque()
        self._rows: list[Request] = []
        self._cache = DynamicCache()
        self._mask = torch.zeros((0, 0), dtype=torch.int64)  # (rows, cached tokens)

    @property
    def busy(self) -> bool:
        """True if `step` has anything to do."""
        return bool(self._rows or self._waiting)

    def submit(self, request: Request) -> None:
        """Queues a request; may be called while `step` runs in another thread."""
        self._waiting.append(request)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Generates one token for every row, and the first one for rows that join.

        Returns:
            The requests that are done now, with ``stop_reason`` set.
        """
        joining = self._next_to_join()
        done = self._decode() if self._rows else []
        if joining:
            done += self._prefill(joining)
        return done

    def abort(self) -> list[Request]:
        """Drops all requests, waiting ones included.

        Returns:
            Them, with what has been generated so far.
        """
        dropped = [*self._rows, *self._waiting]
        self._waiting.clear()
        self._keep([])
        for request in dropped:
            request.stop_reason = "aborted"
        return dropped

    def _next_to_join(self) -> list[Request]:
        joining: list[Request] = []
        tokens = 0
        while self._waiting and len(self._rows) + len(joining) < self.max_rows:
            tokens += len(self._waiting[0].prompt)
            if joining and tokens > self.max_prefill_tokens:
                break
            joining.append(self._waiting.popleft())
        return joining

    def _decode(self) -> list[Request]:
        last = torch.tensor([[request.tokens[-1]] for request in self._rows])
        positions = torch.tensor([[request.next_position - 1] for request in self._rows])
        if self._rows[0].positions.ndim == 2:
            positions = positions.expand(3, -1, -1)
        self._mask = pad(self._mask, (0, 1), value=1)
        output = self.model(
            input_ids=last,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._append(self._rows, output.logits[:, -1])
        done = [request for request in self._rows if request.stop_reason]
        if done:
            self._keep([row for row, request in enumerate(self._rows) if not request.stop_reason])
        return done

    def _prefill(self, joining: list[Request]) -> list[Request]:
        width = max(len(request.prompt) for request in joining)
        ids, mask, positions = [], [], []
        for request in joining:
            left = (width - len(request.prompt), 0)
            ids.append(pad(torch.tensor(request.prompt), left))
            mask.append(pad(torch.ones(len(request.prompt), dtype=torch.int64), left))
            positions.append(pad(request.positions, left))
        vision: dict[str, list[Tensor]] = {}
        for request in joining:
            for name, value in request.vision.items():
                vision.setdefault(name, []).append(value)
        cache = DynamicCache()
        output = self.model(
            input_ids=torch.stack(ids),
            attention_mask=torch.stack(mask),
            position_ids=torch.stack(positions, dim=-2),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **{name: torch.cat(values) for name, values in vision.items()},
        )
        self._append(joining, output.logits[:, -1])
        self._join(joining, cache, torch.stack(mask))
        done = [request for request in joining if request.stop_reason]
        if done:
            self._keep([row for row, request in enumerate(self._rows) if not request.stop_reason])
        return done

    def _append(self, rows: list[Request], logits: Tensor) -> None:
        """Draws the next token of each row. Logits: (rows, vocabulary)."""
        logits = logits.float()
        allowed = logits.index_fill(1, self.forbidden, -torch.inf)
        early = [row for row, request in enumerate(rows) if len(request.tokens) < request.sampling.min_tokens]
        for row in early:
            allowed[row, sorted(rows[row].sampling.stop_token_ids)] = -torch.inf
        tokens = draw(
            allowed,
            [request.sampling for request in rows],
            [[*request.prompt, *request.tokens] for request in rows],
            [request.noise.random() for request in rows],
        )
        temperatures = torch.tensor([request.sampling.temperature for request in rows])
        log_probs = token_log_probs(logits, tokens, temperatures).tolist()
        for request, token, log_prob in zip(rows, tokens.tolist(), log_probs, strict=True):
            request.tokens.append(token)
            request.log_probs.append(log_prob)
            if token in request.sampling.stop_token_ids or len(request.tokens) >= request.sampling.max_tokens:
                request.stop_reason = "completed"

    def _join(self, joining: list[Request], cache: DynamicCache, mask: Tensor) -> None:
        if self._rows:
            width = max(self._mask.shape[1], mask.shape[1])
            old, new = width - self._mask.shape[1], width - mask.shape[1]
            mask = torch.cat([pad(self._mask, (old, 0)), pad(mask, (new, 0))])
            for running, joined in zip(self._cache.layers, cache.layers, strict=True):
                for name in ("keys", "values"):
                    rows = [pad(getattr(running, name), (0, 0, old, 0)), pad(getattr(joined, name), (0, 0, new, 0))]
                    setattr(joined, name, torch.cat(rows))
        self._cache, self._mask = cache, mask
        self._rows = [*self._rows, *joining]

    def _keep(self, rows: list[int]) -> None:
        """Drops all other rows, and columns that are padding in all that stay."""
        self._rows = [self._rows[row] for row in rows]
        if not rows:
            self._cache, self._mask = DynamicCache(), self._mask[:0, :0]
            return
        self._mask = self._mask[rows]
        start = int(self._mask.any(0).int().argmax())
        self._mask = self._mask[:, start:]
        layer: Any
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[rows, :, start:], layer.values[rows, :, start:]
