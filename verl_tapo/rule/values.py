"""Values of call arguments: their canonical form, the numbers and boxes in them, and a short text for a message.

Models write values of any type and size. Nothing here raises over one, or takes long.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
import unicodedata
from collections.abc import Hashable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch

MAX_DEPTH = 64
"""The deepest nesting of an argument value that is parsed or recorded; no information tool needs more [ours]."""
MAX_ITEMS = 100_000
"""The maximal number of parts of an argument value that is compared by content; no model writes
more in one response [ours]."""
_FLOAT_BITS = 1024  # of the largest finite float


def fold_text(text: str) -> str:
    """NFKC-normalised text, stripped, inner white space folded to single spaces."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.split())


def canonical(value: Any) -> Hashable:
    """The canonical, hashable form of an argument value (the spec's ``exact`` kernel). It never raises.

    Strings are NFKC-normalised, stripped, inner white space folded; -0.0 is 0.0; integral floats equal their ints;
    mappings compare by sorted key, sequences by order, sets without order. Booleans are not numbers, and NaN equals
    NaN [ours]. Bytes, arrays, tensors and images compare by type and content, values of other types by type and text.
    A value with more than `MAX_ITEMS` parts, or one that cannot be read, equals only itself.

    The form of a container is flat, so that hashing and printing it do not depend on its depth.
    """
    if isinstance(value, str):
        return fold_text(value)
    try:
        return tuple(_parts(value)) if isinstance(value, _CONTAINERS) else _scalar(value)
    except Exception:  # foreign containers and objects may raise anything
        return (type(value).__name__, "unreadable", id(value))


_CONTAINERS = (Mapping, list, tuple, set, frozenset)


def _parts(value: Any) -> list[Hashable]:
    """A container as a flat list: each container as a head that tells its size, then its members."""
    parts: list[Hashable] = []
    waiting, expected = [value], 1
    while waiting:
        item = waiting.pop()
        if not isinstance(item, _CONTAINERS):
            parts.append(fold_text(item) if isinstance(item, str) else _scalar(item))
            continue
        expected += len(item)
        if expected > MAX_ITEMS:
            return [(type(value).__name__, f"more than {MAX_ITEMS} items", id(value))]
        if isinstance(item, Mapping):
            # Keys that fold to the same text come in an order of their own, whatever the mapping's.
            named = [(fold_text(text := _key_text(key)), text, type(key).__name__, key) for key in item]
            named.sort(key=lambda entry: entry[:3])
            parts.append(("mapping", tuple([folded for folded, *_ in named])))
            waiting += [item[key] for *_, key in reversed(named)]
        elif isinstance(item, list | tuple):
            parts.append(("sequence", len(item)))
            waiting += reversed(item)
        else:
            parts.append(("set", tuple(sorted((canonical(member) for member in item), key=repr))))
    return parts


def prints(number: float) -> bool:
    """Returns whether Python can print a number: it refuses integers of thousands of digits, which
    exceed any float."""
    return not isinstance(number, int) or number.bit_length() <= _FLOAT_BITS


def _key_text(key: Any) -> str:
    return str(key) if prints(key) else hex(key)


def _scalar(value: Any) -> Hashable:
    if value is None or isinstance(value, bool | np.bool_):
        return ("const", value if value is None else bool(value))
    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
        value = value.item()
    if isinstance(value, int):
        return ("number", int(value) if prints(value) else hex(value))
    if isinstance(value, float):
        if math.isnan(value):
            return ("number", "nan")
        return ("number", int(value) if value.is_integer() else float(value))
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return ("ndarray", canonical(value.tolist()))
    if isinstance(value, bytes | bytearray | torch.Tensor) or hasattr(value, "tobytes"):
        return (type(value).__name__, content_hash(value))
    return (type(value).__name__, str(value))


def content_hash(image: Any) -> str:
    """An identity of an image's content: equal pixels of equal size and mode give equal identities.

    Accepts what veRL's loops carry as images: PIL images, bytes, mappings with ``bytes``, arrays and tensors; anything
    else is identified by its text.
    """
    digest = hashlib.blake2b(digest_size=12)
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("image") or sorted((str(k), str(v)) for k, v in image.items())
    if isinstance(image, bytes | bytearray | memoryview):
        digest.update(image)
    elif hasattr(image, "tobytes") and hasattr(image, "size"):
        digest.update(
            f"{getattr(image, 'mode', getattr(image, 'dtype', ''))} {getattr(image, 'shape', image.size)}".encode()
        )
        digest.update(image.tobytes())
    elif hasattr(image, "numpy"):
        tensor = image.detach().cpu().contiguous()
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        array = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
        digest.update(array.tobytes())
    else:
        digest.update(str(image).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def deeper_than(value: Any, levels: int) -> bool:
    """Returns whether a JSON value is nested deeper than ``levels``."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return False
    return levels <= 0 or any(deeper_than(item, levels - 1) for item in value)


_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?")
_NUMBER_IN_TEXT = re.compile(r"(?<![\w.])" + _NUMBER.pattern)  # not the digit of `x1` or `bbox_2d`
_NUMBER_CHARS = 100


def read_number(value: Any) -> float | None:
    """A finite number, or the text of one; None for anything else, truth values included."""
    if isinstance(value, str):
        if len(value) > _NUMBER_CHARS or not _NUMBER.fullmatch(value.strip()):
            return None
    elif isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


_BOX_NESTING = 3
_BOX_CHARS = 300
_BOX_RANGE = 1e100  # of coordinates: areas stay finite
_PLAIN_NUMBERS = {int, float}
_BOX_NAMES = ("bbox", "bbox_2d", "box", "box_2d")
_CORNERS = (
    ("x1", "y1", "x2", "y2"),
    ("x0", "y0", "x1", "y1"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("left", "top", "right", "bottom"),
)
_SIDES = (("x", "y", "width", "height"), ("x", "y", "w", "h"), ("left", "top", "width", "height"))


def finite_number(value: Any) -> float | None:
    """A number that a tool or a reward function returned, as a float.

    None if it is not a number, complex, NaN, infinite or beyond a float.
    """
    try:
        if hasattr(value, "item") and not isinstance(value, str | bytes | Mapping):
            value = value.item()  # of NumPy, of torch, or an array of one number
        number = float(value) if isinstance(value, Real) else math.nan
    except Exception:  # 10**400, or whatever a foreign object raises
        return None
    return number if math.isfinite(number) else None


def success_number(value: Any) -> float:
    """Reads a success value as a number, also from text; NaN if it is neither a number nor a truth
    value.

    Beyond the range of floats it is infinite.
    """
    try:
        if isinstance(value, str):
            value = {"true": 1.0, "false": 0.0}.get(value.strip().lower(), value)
        elif hasattr(value, "item"):
            value = value.item()  # of NumPy, of torch, or an array of one number
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except Exception:  # no number, or whatever a foreign object raises
        return math.nan


def read_box(value: Any, nested: int = 0) -> tuple[float, float, float, float] | None:
    """``(left, top, right, bottom)`` of a box in one of the forms that models write and tools take, else None.

    Four numbers, or texts of numbers, in a list: two opposite corners, in either order. The same as two pairs, in a
    list of one, in a mapping with the usual names, or in a text, with or without words around them.
    """
    if nested > _BOX_NESTING:
        return None
    if isinstance(value, str):
        if len(value) > _BOX_CHARS:
            return None
        try:
            return read_box(json.loads(value), nested + 1)
        except ValueError:
            if re.search("nan|inf", value, re.IGNORECASE):
                return None
            return plain_box(_NUMBER.findall(value)) or plain_box(_NUMBER_IN_TEXT.findall(value))
    if isinstance(value, Mapping):
        names = {name.lower(): name for name in value if isinstance(name, str)}
        for corners in _CORNERS:
            if names.keys() >= set(corners):
                return plain_box([value[names[corner]] for corner in corners])
        for sides in _SIDES:
            if names.keys() >= set(sides):
                numbers = [read_number(value[names[side]]) for side in sides]
                x, y, width, height = (math.inf if number is None else number for number in numbers)
                return plain_box([x, y, x + width, y + height])
        inner = [value[names[name]] for name in _BOX_NAMES if name in names]
        return read_box(inner[0], nested + 1) if len(inner) == 1 else None
    if isinstance(value, np.ndarray) and value.size == 4:
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return None
    if len(value) == 1:
        return read_box(value[0], nested + 1)
    if len(value) == 2 and all(isinstance(corner, list | tuple) for corner in value):
        return plain_box([*value[0], *value[1]]) if len(value[0]) == len(value[1]) == 2 else None
    return plain_box(value)


def plain_box(corners: Sequence[Any]) -> tuple[float, float, float, float] | None:
    """The box of four numbers, or texts of such: two opposite corners, in either order."""
    if len(corners) != 4:
        return None
    numbers: Any = corners if set(map(type, corners)) <= _PLAIN_NUMBERS else list(map(read_number, corners))
    for number in numbers:
        if number is None or not -_BOX_RANGE <= number <= _BOX_RANGE:
            return None
    x1, y1, x2, y2 = numbers
    return (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))


def shown(value: Any, longest: int = 200) -> str:
    """A short text of any value for a message; it never raises, and never takes long."""
    try:
        text = _REPR.repr(value)
    except Exception:  # a number of more digits than Python prints, an object whose own text fails
        text = f"<{type(value).__name__}>"
    return text if len(text) <= longest else text[: longest - 3] + "..."


class _Repr(reprlib.Repr):
    """Shortens texts and containers at every level, also containers of a custom class, whose own
    text would be whole."""

    def repr_instance(self, x: Any, level: int) -> str:
        if isinstance(x, Mapping):
            return self.repr_dict(dict(x), level)
        if isinstance(x, tuple | list):
            return self.repr_tuple(tuple(x), level)
        return super().repr_instance(x, level)


_REPR = _Repr()
