"""Parameter kernels: how alike two values of one tool parameter are, in [0, 1].

A kernel is a *class*: an instance is made from the options a configuration gives it (``scale`` for ``number``), and it
compares pairs of values, many at a time. Values pass through `Kernel.prepare` first, once each; two values with equal
prepared forms are the same value, so that equal calls are compared only once.
"""

from __future__ import annotations

import math
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from rapidfuzz import fuzz, process

from verl_tapo.steps import IntArray, canonical

FloatArray: TypeAlias = npt.NDArray[np.float64]
KernelSpec: TypeAlias = str | Mapping[str, Any]

TEXT_LIMIT = 16_384
"""Characters (after normalisation) above which ``text`` falls back to equality: one pair of 10 MB strings would
otherwise take minutes [ours]."""


class Kernel(ABC):
    """Similarity of two values of one parameter. Symmetric, in [0, 1]; 1 for equal values, or 0 for values that
    never match anything, themselves included (a malformed box)."""

    identity_only: ClassVar[bool] = False
    """True where the similarity is 1 for equal prepared values and 0 otherwise: `pairs` is not asked then."""
    ignores: ClassVar[bool] = False
    """True where the parameter does not count at all, present or absent."""

    def prepare(self, value: Any) -> Hashable:
        """The value's canonical, hashable form. Default: `verl_tapo.steps.canonical`."""
        return canonical(value)

    @abstractmethod
    def pairs(self, values: Sequence[Any], left: IntArray, right: IntArray) -> FloatArray:
        """(P,) similarities of ``values[left[k]]`` and ``values[right[k]]``: distinct prepared values, (P,) indices."""


_REGISTRY: dict[str, type[Kernel]] = {}
_K = TypeVar("_K", bound=type[Kernel])


def register_kernel(name: str) -> Callable[[_K], _K]:
    """Class decorator: makes a `Kernel` available to ``TapoConfig.tools`` under ``name``.

    Raises:
        ValueError: if another kernel has that name already.
    """

    def register(kernel: _K) -> _K:
        if _REGISTRY.get(name, kernel) is not kernel:
            raise ValueError(f"kernel {name!r} is already registered: {_REGISTRY[name].__qualname__}")
        _REGISTRY[name] = kernel
        return kernel

    return register


def kernel_names() -> list[str]:
    """Names of all registered kernels, sorted."""
    return sorted(_REGISTRY)


def make_kernel(spec: KernelSpec) -> Kernel:
    """A kernel from its configuration: a name (``"iou"``) or a mapping (``{"kernel": "number", "scale": 2.0}``).

    Raises:
        ValueError: for an unknown kernel, unknown or missing options, or an option out of range.
    """
    options: dict[str, Any] = {}
    if isinstance(spec, Mapping):
        options = {str(key): value for key, value in spec.items()}
        name = options.pop("kernel", None)
    else:
        name = spec
    if not isinstance(name, str) or name not in _REGISTRY:
        raise ValueError(f"unknown kernel {name!r}; known kernels: {', '.join(kernel_names())}")
    try:
        return _REGISTRY[name](**options)
    except TypeError as error:
        raise ValueError(f"kernel {name!r}: bad options {sorted(options)}: {error}") from None


def _equality(left: IntArray, right: IntArray) -> FloatArray:
    equal: FloatArray = (left == right).astype(np.float64)  # values are distinct
    return equal


@register_kernel("exact")
class Exact(Kernel):
    """1 where the canonical values are equal, else 0."""

    identity_only = True

    def pairs(self, values: Sequence[Any], left: IntArray, right: IntArray) -> FloatArray:
        return _equality(left, right)


@register_kernel("ignore")
class Ignore(Kernel):
    """1: the parameter does not count."""

    ignores = True

    def pairs(self, values: Sequence[Any], left: IntArray, right: IntArray) -> FloatArray:
        return np.ones(len(left))


# \w is exactly what str.isalnum() accepts, and the underscore.
_WORD = re.compile(r"[^\W_]+")
# The same for ASCII, at a fraction of the time: case folded, everything else a space.
_ASCII = "".join(chr(code).lower() if chr(code).isalnum() else " " for code in range(128))


def words_of(value: Any) -> list[str] | None:
    """The words of the spec's ``n(x)``: NFKC, casefold, split at every character that is not alphanumeric; a list is
    joined by spaces first. None for values that are no text (mappings, null).
    """
    if isinstance(value, str):
        text: str = value
    elif isinstance(value, (list, tuple)):
        text = " ".join([str(item) for item in value])
    elif isinstance(value, (int, float)):
        text = str(value)
    else:
        return None
    if text.isascii():
        return text.translate(_ASCII).split()
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


@register_kernel("text")
class Text(Kernel):
    """``rapidfuzz.fuzz.token_sort_ratio(n(x), n(y)) / 100``; values that are no text, or longer than `TEXT_LIMIT`,
    compare by equality.
    """

    def prepare(self, value: Any) -> Hashable:
        words = words_of(value)
        if words is None:
            return ("no text", canonical(value))
        # With its words sorted once and for all, the token sort ratio is the plain ratio.
        text = " ".join(sorted(words))
        return text if len(text) <= TEXT_LIMIT else ("long text", text)

    def pairs(self, values: Sequence[Any], left: IntArray, right: IntArray) -> FloatArray:
        result = _equality(left, right)
        is_text = np.array([type(value) is str for value in values])
        texts = np.flatnonzero(is_text[left] & is_text[right])
        if len(texts):
            a, b = ([values[i] for i in side[texts].tolist()] for side in (left, right))
            result[texts] = process.cpdist(a, b, scorer=fuzz.ratio, dtype=np.float64) / 100.0
        return result


_NUMBERS = {int, float}


@register_kernel("iou")
class IoU(Kernel):
    """Intersection over union of two ``[x1, y1, x2, y2]`` boxes, corners in either order; 0 for a malformed or
    empty box."""

    def prepare(self, value: Any) -> Hashable:
        if not isinstance(value, (list, tuple)) or len(value) != 4 or not set(map(type, value)) <= _NUMBERS:
            return None
        x1, y1, x2, y2 = value
        try:
            area = float(abs(x2 - x1)) * float(abs(y2 - y1))
        except OverflowError:
            return None
        if not 0 < area < math.inf:
            return None
        return (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))

    def pairs(self, values: Sequence[Any], left: IntArray, right: IntArray) -> FloatArray:
        # An empty box has no area: with itself as with any other the intersection is 0.
        boxes = np.array([box or (0.0,) * 4 for box in values], dtype=np.float64)
        a, b = boxes[left], boxes[right]
        sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
        intersection = np.clip(sides, 0.0, None).prod(1)
        union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - intersection
        ratio: FloatArray = np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)
        return ratio


@register_kernel("number")
class Number(Kernel):
    """``max(0, 1 - abs(x - y) / scale)``; values that are no finite numbers compare by equality."""

    def __init__(self, scale: float) -> None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ValueError(f"kernel 'number': scale must be a positive number, got {scale!r}")
        self.scale = float(scale)

    def prepare(self, value: Any) -> Hashable:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if math.isfinite(number):
                return number
        return ("no number", canonical(value))

    def pairs(self, values: Sequence[Any], left: IntArray, right: IntArray) -> FloatArray:
        numbers = np.array([value if isinstance(value, float) else math.nan for value in values])
        closeness = np.clip(1.0 - np.abs(numbers[left] - numbers[right]) / self.scale, 0.0, 1.0)
        return np.where(np.isnan(closeness), _equality(left, right), closeness)


EMBEDDING_CACHE = 50_000
"""Embeddings kept before the cache starts afresh: a run of days must not fill the driver's memory."""
DEFAULT_EMBEDDING_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


@lru_cache(maxsize=4)
def _sentence_transformer(model: str, device: str | None) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        message = "kernel 'embedding' needs sentence-transformers: pip install 'verl-tapo[embedding]'"
        raise ValueError(message) from error
    return SentenceTransformer(model, device=device)


@register_kernel("embedding")
class Embedding(Kernel):
    """Cosine of sentence-transformers embeddings, cut to [0, 1]. Loads a model on first use: opt-in."""

    def __init__(self, model: str = DEFAULT_EMBEDDING_MODEL, device: str | None = None) -> None:
        self.model, self.device = model, device
        self._vectors: dict[str, FloatArray] = {}

    def prepare(self, value: Any) -> Hashable:
        words = words_of(value)
        return ("no text", canonical(value)) if words is None else " ".join(words)

    def _encode(self, texts: Sequence[str]) -> FloatArray:
        missing = sorted({text for text in texts if text not in self._vectors})
        if missing:
            if len(self._vectors) + len(missing) > EMBEDDING_CACHE:
                self._vectors.clear()
                missing = sorted(set(texts))
            encoder = _sentence_transformer(self.model, self.device)
            vectors = encoder.encode(missing, normalize_embeddings=True, show_progress_bar=False)
            self._vectors.update(zip(missing, np.asarray(vectors, dtype=np.float64), strict=True))
        return np.stack([self._vectors[text] for text in texts])

    def pairs(self, values: Sequence[Any], left: IntArray, right: IntArray) -> FloatArray:
        result = _equality(left, right)
        positions = [i for i, value in enumerate(values) if isinstance(value, str)]
        if positions:
            vectors = self._encode([values[i] for i in positions])
            place = np.full(len(values), -1)
            place[positions] = np.arange(len(positions))
            texts = np.flatnonzero((place[left] >= 0) & (place[right] >= 0))
            cosine = np.einsum("pd,pd->p", vectors[place[left[texts]]], vectors[place[right[texts]]])
            # Equal texts are 1, whatever the rounding of their cosine.
            result[texts] = np.maximum(np.clip(cosine, 0.0, 1.0), result[texts])
        return result
