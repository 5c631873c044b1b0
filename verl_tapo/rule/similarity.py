"""Parameter kernels: the similarity of two values of one tool parameter, in [0, 1].

A kernel is a *class*: an instance is made from the options a configuration gives it (``scale`` for ``number``), and it
compares pairs of values, many at a time. Values pass through `Kernel.prepare` first; two values with equal prepared
forms are the same value, whatever the kernel, so that equal calls are compared only once.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np

from verl_tapo.rule.arrays import FloatArray, IntArray, numbered
from verl_tapo.rule.values import canonical, plain_box, prints, read_box, read_number, shown

logger = logging.getLogger("verl_tapo")
KernelSpec: TypeAlias = str | Mapping[str, Any]
TEXT_LIMIT = 2_048
"""Characters (after normalisation) above which ``text`` compares by equality. The time for a pair grows with the
square of its length: 5,000 pairs of this length take half a second, of 16,000 characters a minute [ours]."""
_DENSE = 2  # times as many pairs of texts may be compared as were asked for
_ROUNDING = 1e-6  # of single precision: a kernel's result may be so far out of [0, 1]
ABSENT = object()
"""Stands for the value of a parameter that a call lacks."""


class Kernel(ABC):
    """Similarity of two different values of one parameter, symmetric, in [0, 1].

    Equal values have similarity 1 under every kernel: a kernel is only asked about values that differ.
    """

    name: str = ""
    """Under which it was made, see `make_kernel`."""
    identity_only: ClassVar[bool] = False
    """True if different values always have similarity 0: then `pairs` is not called."""
    ignores: ClassVar[bool] = False
    """True if the parameter does not count at all, present or absent."""

    def prepare(self, value: Any) -> Hashable:
        """The value's canonical, hashable form: values with equal forms are equal. Default:
        `verl_tapo.rule.values.canonical`.

        None for a value that is not of the kernel's kind, or for which `prepare` raises. Such a
        value is equal to those with the same canonical form, and unlike all others. Models write
        values of any type.
        """
        return canonical(value)

    @abstractmethod
    def pairs(self, values: Sequence[Any], left: IntArray, right: IntArray) -> FloatArray:
        """(P,) similarities of ``values[left[k]]`` and ``values[right[k]]``, which differ.

        Args:
            values: distinct prepared values, none of them None.
            left, right: (P,) positions in ``values``.
        """

    def check(self) -> None:
        """Looks whether all is there that the kernel needs; asked before a run.

        Raises:
            ValueError: saying what is missing.
        """
        return None


def number_values(kernel: Kernel, given: Sequence[Any]) -> tuple[list[Hashable], IntArray]:
    """The distinct values of one parameter as the kernel prepared them, and N values as numbers.

    Equal numbers are equal values. From 0: positions in the distinct values; -1: `ABSENT`; below: values that are not
    of the kernel's kind.

    Raises:
        ValueError: what `Kernel.prepare` returns is not hashable.
    """
    # In a batch the same texts come again and again, and some are long: each is prepared once.
    only_texts = set(map(type, given)) == {str}
    keys = given if only_texts else [value if type(value) is str else id(value) for value in given]
    position, which = numbered(keys)
    distinct = position if only_texts else dict(zip(keys, given, strict=True)).values()
    known: dict[Hashable, int] = {}
    others: dict[Hashable, int] = {}
    numbers = []
    for value in distinct:
        if value is ABSENT:
            numbers.append(-1)
            continue
        try:
            form = kernel.prepare(value)
        except Exception as error:
            _tell(kernel, value, error)
            form = None
        if form is None:
            numbers.append(others.setdefault(canonical(value), -2 - len(others)))
            continue
        try:
            numbers.append(known.setdefault(form, len(known)))
        except TypeError:
            message = f"kernel {kernel.name!r}: prepare must return something hashable, got {shown(form)}"
            raise ValueError(message) from None
    return list(known), np.array(numbers, dtype=np.int64)[which]


_told: set[tuple[str, str]] = set()


def _tell(kernel: Kernel, value: Any, error: Exception) -> None:
    """Warns once about values that a kernel does not take."""
    if (kernel.name, type(error).__name__) not in _told:
        _told.add((kernel.name, type(error).__name__))
        logger.warning(
            "TAPO: kernel %r cannot prepare %s (%s: %s): such values equal only themselves. Said once",
            kernel.name,
            shown(value),
            type(error).__name__,
            shown(error),
        )


def similarities(kernel: Kernel, values: Sequence[Any], left: IntArray, right: IntArray) -> FloatArray:
    """(P,) similarities of pairs of numbered values (see `number_values`). Here, and nowhere else, equal is 1.

    Raises:
        ValueError: naming the kernel, where it fails, or what it returns are not P numbers in [0, 1].
    """
    result: FloatArray = (left == right).astype(np.float64)
    if kernel.identity_only:
        return result
    asked = np.flatnonzero((left != right) & (left >= 0) & (right >= 0))
    if not len(asked):
        return result
    try:
        answer = np.asarray(kernel.pairs(values, left[asked], right[asked]))
    except Exception as error:
        raise ValueError(f"kernel {kernel.name!r} failed: {type(error).__name__}: {error}") from error
    expected = f"kernel {kernel.name!r}: pairs must return {len(asked)} numbers in [0, 1]"
    if answer.shape != asked.shape or answer.dtype.kind not in "fiub":
        raise ValueError(f"{expected}, got {answer.dtype} of shape {answer.shape}")
    within = (answer >= -_ROUNDING) & (answer <= 1 + _ROUNDING)
    if not within.all():
        raise ValueError(f"{expected}, got {answer[~within][0]}")
    result[asked] = np.clip(answer, 0.0, 1.0)
    return result


_REGISTRY: dict[str, type[Kernel]] = {}
_K = TypeVar("_K", bound=type[Kernel])


def register_kernel(name: str) -> Callable[[_K], _K]:
    """Class decorator: makes a `Kernel` available to ``TapoConfig.tools`` under ``name``.

    Raises:
        ValueError: if another kernel has that name already, or it is no `Kernel`.
    """

    def register(kernel: _K) -> _K:
        if not isinstance(name, str) or not isinstance(kernel, type) or not issubclass(kernel, Kernel):
            raise ValueError(f"kernel {shown(name)}: a kernel is a class derived from Kernel, got {shown(kernel)}")
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
        raise ValueError(f"unknown kernel {shown(name)}; known kernels: {', '.join(kernel_names())}")
    try:
        kernel = _REGISTRY[name](**options)
    except TypeError as error:
        raise ValueError(f"kernel {name!r}: bad options {sorted(options)}: {error}") from None
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"kernel {name!r} cannot be made: {type(error).__name__}: {error}") from error
    kernel.name = name
    return kernel


@register_kernel("exact")
class Exact(Kernel):
    """1 if the canonical values are equal, else 0."""

    identity_only = True

    def pairs(self, values: Sequence[Any], left: IntArray, right: IntArray) -> FloatArray:
        return np.zeros(len(left))


@register_kernel("ignore")
class Ignore(Kernel):
    """Always 1: the parameter does not count."""

    ignores = True

    def pairs(self, values: Sequence[Any], left: IntArray, right: IntArray) -> FloatArray:
        return np.ones(len(left))


# \w is exactly what str.isalnum() accepts, and the underscore.
_WORD = re.compile(r"[^\W_]+")
# The same for ASCII, at a fraction of the time: case folded, everything else a space.
_ASCII = "".join(chr(code).lower() if chr(code).isalnum() else " " for code in range(128))


def words_of(value: Any) -> list[str] | None:
    """The words of the spec's ``n(x)``: NFKC, casefold, split at every character that is not
    alphanumeric. A list is joined by spaces first. None if the value is not a text, a number or a
    list of these."""
    if isinstance(value, str):
        text: str = value
    else:
        items = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(item, str) or (isinstance(item, int | float) and prints(item)) for item in items):
            return None
        text = " ".join(map(str, items))
    if text.isascii():
        return text.translate(_ASCII).split()
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


@register_kernel("text")
class Text(Kernel):
    """``rapidfuzz.fuzz.token_sort_ratio(n(x), n(y)) / 100``; texts longer than `TEXT_LIMIT` compare by equality."""

    def prepare(self, value: Any) -> Hashable:
        words = words_of(value)
        if words is None:
            return None
        # With its words sorted once and for all, the token sort ratio is the plain ratio.
        text = " ".join(sorted(words))
        return text if len(text) <= TEXT_LIMIT else (text,)

    def pairs(self, values: Sequence[Any], left: IntArray, right: IntArray) -> FloatArray:
        fuzz, process = _rapidfuzz()
        result = np.zeros(len(left))
        short = np.array([type(value) is str for value in values])
        asked = np.flatnonzero(short[left] & short[right])
        (rows, row), (columns, column) = (_positions(side[asked], len(values)) for side in (left, right))
        if len(rows) * len(columns) <= _DENSE * len(asked):
            # Nearly all of some texts with all of others, as in one large prompt group: several times faster.
            a, b = ([values[i] for i in side.tolist()] for side in (rows, columns))
            ratios = process.cdist(a, b, scorer=fuzz.ratio, dtype=np.float64)[row, column]
        else:
            a, b = ([values[i] for i in side[asked].tolist()] for side in (left, right))
            ratios = process.cpdist(a, b, scorer=fuzz.ratio, dtype=np.float64)
        result[asked] = ratios / 100.0
        return result

    def check(self) -> None:
        _rapidfuzz()


def _positions(numbers: IntArray, size: int) -> tuple[IntArray, IntArray]:
    """The distinct ones among P numbers below ``size``, and (P,) the position of each among them."""
    there = np.zeros(size, dtype=bool)
    there[numbers] = True
    return np.flatnonzero(there), (np.cumsum(there) - 1)[numbers]


def _rapidfuzz() -> tuple[Any, Any]:
    """Imports the library only when texts are compared, so that a broken one does not stop runs
    without TAPO."""
    try:
        from rapidfuzz import fuzz, process
    except Exception as error:  # of a broken installation, whatever its import raises
        raise ValueError(
            f"kernel 'text' needs rapidfuzz, whose import fails: {type(error).__name__}: {error}"
        ) from error
    return fuzz, process


@register_kernel("iou")
class IoU(Kernel):
    """Intersection over union of two boxes, see `read_box`. A malformed box is like no other, nor is an empty one."""

    def prepare(self, value: Any) -> Hashable:
        return plain_box(value) if type(value) is list and len(value) == 4 else read_box(value)

    def pairs(self, values: Sequence[Any], left: IntArray, right: IntArray) -> FloatArray:
        boxes = np.array(values, dtype=np.float64)
        a, b = boxes[left], boxes[right]
        sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
        intersection = np.clip(sides, 0.0, None).prod(1)
        union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - intersection
        ratio: FloatArray = np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)
        return ratio


@register_kernel("number")
class Number(Kernel):
    """``max(0, 1 - abs(x - y) / scale)`` of numbers and texts of numbers."""

    def __init__(self, scale: float) -> None:
        number = read_number(scale) if isinstance(scale, int | float) else None
        if number is None or number <= 0:
            raise ValueError(f"kernel 'number': scale must be a positive number, got {shown(scale)}")
        self.scale = number

    def prepare(self, value: Any) -> Hashable:
        return read_number(value)

    def pairs(self, values: Sequence[Any], left: IntArray, right: IntArray) -> FloatArray:
        numbers = np.array(values, dtype=np.float64)
        with np.errstate(over="ignore"):  # numbers far apart
            distance: FloatArray = np.abs(numbers[left] - numbers[right]) / self.scale
        return np.clip(1.0 - distance, 0.0, 1.0)


EMBEDDING_CACHE = 50_000
"""Embeddings kept before the cache starts afresh: a run of days must not fill the driver's memory."""
DEFAULT_EMBEDDING_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


@lru_cache(maxsize=4)
def _sentence_transformer(model: str, device: str | None) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError(_NO_EMBEDDINGS) from error
    return SentenceTransformer(model, device=device)


_NO_EMBEDDINGS = "kernel 'embedding' needs sentence-transformers: pip install 'verl-tapo[embedding]'"


@register_kernel("embedding")
class Embedding(Kernel):
    """Cosine of sentence-transformers embeddings, cut to [0, 1]. Loads a model on first use: opt-in.

    Of longer texts the first `TEXT_LIMIT` characters are embedded; most models read fewer.
    """

    def __init__(self, model: str = DEFAULT_EMBEDDING_MODEL, device: str | None = None) -> None:
        if not isinstance(model, str) or not model:
            raise ValueError(f"kernel 'embedding': model must be a name or a folder, got {shown(model)}")
        if device is not None and not isinstance(device, str):
            raise ValueError(f"kernel 'embedding': device must be a name or null, got {shown(device)}")
        self.model, self.device = model, device
        self._vectors: dict[str, FloatArray] = {}

    def prepare(self, value: Any) -> Hashable:
        words = words_of(value)
        return None if words is None else " ".join(words)

    def _encode(self, texts: Sequence[str]) -> FloatArray:
        missing = sorted({text for text in texts if text not in self._vectors})
        if missing:
            if len(self._vectors) + len(missing) > EMBEDDING_CACHE:
                self._vectors.clear()
                missing = sorted(set(texts))
            encoder = _sentence_transformer(self.model, self.device)
            # Tokenizers refuse halves of surrogate pairs, which models can write in JSON.
            plain = [text.encode("utf-8", "replace").decode() for text in missing]
            vectors = encoder.encode(plain, normalize_embeddings=True, show_progress_bar=False)
            self._vectors.update(zip(missing, np.asarray(vectors, dtype=np.float64), strict=True))
        return np.stack([self._vectors[text] for text in texts])

    def pairs(self, values: Sequence[Any], left: IntArray, right: IntArray) -> FloatArray:
        vectors = self._encode([value[:TEXT_LIMIT] for value in values])
        cosine: FloatArray = np.einsum("pd,pd->p", vectors[left], vectors[right])
        # Some models return no vector for an empty text.
        return np.clip(np.nan_to_num(cosine), 0.0, 1.0)

    def check(self) -> None:
        if find_spec("sentence_transformers") is None:  # importing it takes seconds
            raise ValueError(_NO_EMBEDDINGS)
