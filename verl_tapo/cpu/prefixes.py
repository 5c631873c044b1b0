"""Keys and values of token sequences that were computed already, for prompts that begin alike.

The rollouts of a prompt share all of it, questions share the system prompt and worked examples, and the prompt of a
rollout's next turn is its last one with some tokens more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer: (heads, tokens, size of a head)."""

WORTH_KEEPING = 16
"""Tokens that a sequence must add to those kept already: fewer are computed as fast as they are copied."""


class Prefixes:
    """The sequences used last, as many as fit.

    Args:
        max_tokens: of all sequences together.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._layers: OrderedDict[tuple[int, ...], Layers] = OrderedDict()
        self._arrays: dict[tuple[int, ...], npt.NDArray[np.int64]] = {}

    def longest(self, tokens: Sequence[int]) -> tuple[int, Layers]:
        """The longest beginning of ``tokens`` that is known.

        Returns:
            The number of its tokens, and keys and values of at least as many; 0 and an empty list if there is none.
        """
        wanted = np.asarray(tokens, dtype=np.int64)
        lengths = {key: common(array, wanted) for key, array in self._arrays.items()}
        key = max(lengths, key=lengths.__getitem__, default=())
        if not lengths.get(key):
            return 0, []
        self._layers.move_to_end(key)
        return lengths[key], self._layers[key]

    def worth_keeping(self, tokens: Sequence[int]) -> bool:
        """True if `keep` would add more than a few tokens that are not known."""
        return len(tokens) <= self.max_tokens and len(tokens) - self.longest(tokens)[0] >= WORTH_KEEPING

    def keep(self, tokens: Sequence[int], layers: Layers) -> None:
        """Adds a sequence; those that were used longest ago make room for it."""
        key = tuple(tokens)
        self._layers[key], self._arrays[key] = layers, np.asarray(key, dtype=np.int64)
        while sum(map(len, self._layers)) > self.max_tokens:
            oldest, _ = self._layers.popitem(last=False)
            del self._arrays[oldest]

    def clear(self) -> None:
        """Forgets all, which a change of weights makes wrong."""
        self._layers.clear()
        self._arrays.clear()


def common(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> int:
    """The number of tokens at which two sequences begin alike."""
    size = min(len(first), len(second))
    different = np.flatnonzero(first[:size] != second[:size])
    return int(different[0]) if len(different) else size
