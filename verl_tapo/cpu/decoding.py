"""Continuous batching on a transformers model, with a KV cache.

`Decoder.step` generates one token for every request in the batch; finished requests leave, and
waiting ones join. All rows share one cache, padded on the left, and every row has its own
positions. What prompts without images have in common is computed once (`prefixes.py`).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from verl_tapo.cpu.prefixes import WORTH_KEEPING, Layers, Prefixes, common
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
    may_be_kept: bool = True
    """False for one that began before the weights changed."""

    @property
    def next_position(self) -> int:
        """The position of the next token; rotary positions continue from the largest one."""
        return int(self.positions.max()) + 1 + len(self.tokens)

    @property
    def is_text(self) -> bool:
        """True if keys and values depend on nothing but the tokens."""
        return not self.vision and self.positions.ndim == 1


class Decoder:
    """Generates for many requests at once. Only `submit` is thread-safe.

    Args:
        model: a causal language model of transformers, on the CPU, with full attention in every layer.
        max_rows: requests in a batch, >= 1; with 1 a request's logits do not depend on others to the last bit, and
            nothing is computed once for several.
        max_prefill_tokens: prompts that join in one step have together at most as many tokens, one prompt excepted; as
            many are kept for later prompts.
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
        self._prefixes = Prefixes(max_prefill_tokens) if max_rows > 1 else None

    @property
    def busy(self) -> bool:
        """True if `step` has anything to do."""
        return bool(self._rows or self._waiting)

    def submit(self, request: Request) -> None:
        """Queues a request; may be called while `step` runs in another thread."""
        self._waiting.append(request)

    def forget(self) -> None:
        """Drops what is kept for later prompts. Call it when the weights change."""
        if self._prefixes is not None:
            self._prefixes.clear()
        for request in self._rows:
            request.may_be_kept = False

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
        return self._dismiss()

    def _prefill(self, joining: list[Request]) -> list[Request]:
        self._compute_common(joining)
        known = [self._known(request) for request in joining]
        cache, cached = _joined_past(known)
        width = max(len(request.prompt) - length for request, (length, _) in zip(joining, known, strict=True))
        ids, mask, positions = [], [], []
        for request, (length, _) in zip(joining, known, strict=True):
            new = len(request.prompt) - length
            left = (width - new, 0)
            ids.append(pad(torch.tensor(request.prompt[length:]), left))
            mask.append(pad(torch.ones(new, dtype=torch.int64), left))
            positions.append(pad(request.positions[..., length:], left))
        vision: dict[str, list[Tensor]] = {}
        for request in joining:
            for name, value in request.vision.items():
                vision.setdefault(name, []).append(value)
        whole = torch.cat([cached, torch.stack(mask)], dim=1)
        output = self.model(
            input_ids=torch.stack(ids),
            attention_mask=whole,
            position_ids=torch.stack(positions, dim=-2),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **{name: torch.cat(values) for name, values in vision.items()},
        )
        self._append(joining, output.logits[:, -1])
        self._join(joining, cache, whole)
        for row in range(len(self._rows) - len(joining), len(self._rows)):
            self._remember(row, self._rows[row].prompt)
        return self._dismiss()

    def _compute_common(self, joining: list[Request]) -> None:
        """Computes what several prompts begin with alone, once."""
        if self._prefixes is None or len(joining) < 2 or not all(request.is_text for request in joining):
            return
        first, *others = (np.asarray(request.prompt) for request in joining)
        shared = joining[0].prompt[: min(common(first, other) for other in others)][: len(first) - 1]
        if len(shared) < WORTH_KEEPING or not self._prefixes.worth_keeping(shared):
            return
        length, layers = self._prefixes.longest(shared)
        cache, _ = _joined_past([(length, layers)])
        self.model(
            input_ids=torch.tensor([shared[length:]]),
            position_ids=torch.arange(length, len(shared))[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._prefixes.keep(shared, [(layer.keys[0], layer.values[0]) for layer in cache.layers])

    def _known(self, request: Request) -> tuple[int, Layers]:
        """The tokens of a prompt that need not be computed; its last one must be, for its logits."""
        if self._prefixes is None or not request.is_text:
            return 0, []
        return self._prefixes.longest(request.prompt[:-1])

    def _remember(self, row: int, tokens: list[int]) -> None:
        """Keeps keys and values of a row, which holds ``tokens``."""
        request = self._rows[row]
        if self._prefixes is None or not (request.is_text and request.may_be_kept):
            return
        if not self._prefixes.worth_keeping(tokens):
            return
        columns = self._mask[row].bool()
        layers = [(layer.keys[row][:, columns], layer.values[row][:, columns]) for layer in self._cache.layers]
        self._prefixes.keep(tokens, layers)

    def _dismiss(self) -> list[Request]:
        """Lets the rows go that are done."""
        done = [request for request in self._rows if request.stop_reason]
        for row, request in enumerate(self._rows):
            if request.stop_reason:
                self._remember(row, [*request.prompt, *request.tokens[:-1]])
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


def _joined_past(known: list[tuple[int, Layers]]) -> tuple[DynamicCache, Tensor]:
    """A cache of the first tokens of rows, padded on the left.

    Args:
        known: for each row the number of tokens, and keys and values of at least as many.

    Returns:
        The cache, and its mask, (rows, tokens).
    """
    cache = DynamicCache()
    width = max(length for length, _ in known)
    mask = torch.stack([pad(torch.ones(length, dtype=torch.int64), (width - length, 0)) for length, _ in known])
    if not width:
        return cache, mask
    shapes = next(layers for _, layers in known if layers)
    for number, both in enumerate(shapes):
        rows: tuple[list[Tensor], list[Tensor]] = ([], [])
        for length, layers in known:
            for side, example in enumerate(both):
                own = layers[number][side][:, :length] if length else example[:, :0]
                rows[side].append(pad(own, (0, 0, width - length, 0)))
        cache.update(torch.stack(rows[0]), torch.stack(rows[1]), number)
    return cache, mask
