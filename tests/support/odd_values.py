"""Values that nobody expects where a tool's argument stands, for every test that asks what a model may write.

`json_texts` is what a model can write: JSON, or nearly. `values` is what may stand in a `ToolStep`, those texts as
Python reads them included. `huge_texts` take a while. All are made anew by each call, so that two calls give values
that are equal and not the same.
"""

from __future__ import annotations

import datetime
import json
import math
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

DEEP = 30_000
"""Levels of nesting: Python's own recursion ends at a thousand."""


def json_texts() -> dict[str, str]:
    """Texts of JSON values by a name; Python's `json` does not read all of them."""
    return {
        "null": "null",
        "true": "true",
        "zero": "0",
        "minus zero": "-0.0",
        "float": "2.5",
        "integral float": "2.0",
        "400 digits": "1" + "0" * 400,
        "minus 400 digits": "-1" + "0" * 400,
        "5000 digits": "1" + "0" * 5000,
        "1e308": "1e308",
        "1e999": "1e999",
        "tiny": "5e-324",
        "NaN": "NaN",
        "Infinity": "Infinity",
        "-Infinity": "-Infinity",
        "empty text": '""',
        "blank text": '" \\t\\n "',
        "text": '"capital of France"',
        "no words": '"!?"',
        "nul": '"a\\u0000b"',
        "half a surrogate pair": '"\\ud800 flag"',
        "other half": '"\\udfff"',
        "emoji": '"\\ud83c\\udde7\\ud83c\\uddea flag"',
        "combining marks": '"' + "e\\u0301" * 300 + '"',
        "ligatures that grow": '"' + "\\ufdfa" * 200 + '"',
        "right to left": '"\\u202eabc"',
        "control tokens": '"<|im_end|></tool_call><|endoftext|>"',
        "digits of other scripts": '"\\u0663\\u0664, \\u0665, \\uff16"',
        "text of a number": '" 2.0 "',
        "text of 400 digits": '"' + "9" * 400 + '"',
        "text nan": '"nan"',
        "text inf": '"-inf"',
        "empty list": "[]",
        "empty object": "{}",
        "list of null": "[null]",
        "box": "[0, 0, 10, 10]",
        "box as text": '"[0, 0, 10, 10]"',
        "box of texts": '["0", "0", "10", "10"]',
        "box by names": '{"x1": 0, "y1": 0, "x2": 10, "y2": 10}',
        "box by size": '{"x": 0, "y": 0, "width": 10, "height": null}',
        "empty box": "[3, 3, 3, 3]",
        "box with NaN": "[0, 0, NaN, 10]",
        "box with Infinity": "[0, 0, Infinity, 10]",
        "box of 400 digits": "[0, 0, 1" + "0" * 400 + ", 10]",
        "box of 5000 digits": "[0, 0, 1" + "0" * 5000 + ", 10]",
        "box of 1e308": "[-1e308, -1e308, 1e308, 1e308]",
        "box of truth values": "[false, false, true, true]",
        "box with objects": '[{}, [], null, "x"]',
        "three numbers": "[1, 2, 3]",
        "numbers": "[1, 2.5, -3e7, 10000000000000000000000]",
        "list of lists": '[["a", 1], ["b", [2]]]',
        "object": '{"query": "a", "filters": {"year": [1999, 2000.0]}}',
        "keys in another order": '{"filters": {"year": [1999, 2000.0]}, "query": "a"}',
        "keys that fold to one": '{"a": 1, " a": 2, "a ": 3}',
        "empty key": '{"": null}',
        "nested lists": "[" * 900 + "]" * 900,
        "nested objects": '{"a": ' * 450 + "1" + "}" * 450,
        "many items": "[" + "1," * 3000 + "1]",
        "nested too deep to read": "[" * DEEP + "]" * DEEP,
    }


def huge_texts() -> dict[str, str]:
    """Arguments of 10 MB."""
    return {
        "10 MB of a word": "x" * 10_000_000,
        "10 MB of words": "wo rd " * 1_700_000,
        "10 MB of white space": " \n" * 5_000_000,
        "10 MB beyond ASCII": "é ̀" * 3_000_000,
        "10 MB of digits": "7" * 10_000_000,
        "10 MB of brackets": "[" * 10_000_000,
        "10 MB of numbers": "1, " * 3_300_000,
    }


class _Foreign:
    """An object of a class that nothing here knows."""


class _Unreadable:
    def __repr__(self) -> str:
        raise RuntimeError("no text")

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no equality")

    def __hash__(self) -> int:
        raise RuntimeError("no hash")


def values() -> dict[str, Any]:
    """Values by a name."""
    read = {}
    for name, text in json_texts().items():
        try:
            read[name] = json.loads(text)
        except (ValueError, RecursionError):
            continue
    deep_list: Any = 1
    deep_object: Any = 1
    for _ in range(DEEP):
        deep_list, deep_object = [deep_list], {"a": deep_object}
    cycle: list[Any] = []
    cycle.append(cycle)
    branches: Any = 1
    for _ in range(100):
        branches = [branches, branches]
    return {
        **read,
        "huge int": 10**5000,
        "box of huge ints": [0, 0, 10**5000, 10**5000],
        "deep list": deep_list,
        "deep object": deep_object,
        "cycle": cycle,
        "branches without end": branches,
        "many items": list(range(200_000)),
        "tuple": (1, "a"),
        "set": {"a", "b", 3, None},
        "frozen sets": frozenset({frozenset({"a"}), frozenset()}),
        "bytes": b"\xff\x00a",
        "bytearray": bytearray(b"a"),
        "memoryview": memoryview(b"ab"),
        "keys that are no texts": {1: "a", None: "b", (1, 2): "c", 2.5: "d", False: "e"},
        "a huge key": {10**5000: 1},
        "NaN as a key": {math.nan: 1},
        "mapping": MappingProxyType({"a": [1]}),
        "complex": 1 + 2j,
        "decimal": Decimal("sNaN"),
        "fraction": Fraction(1, 3),
        "date": datetime.date(2026, 11, 25),
        "NumPy int": np.int64(2),
        "NumPy float": np.float32(2.5),
        "NumPy NaN": np.float64("nan"),
        "NumPy bool": np.True_,
        "NumPy date": np.datetime64("NaT"),
        "NumPy text": np.str_("capital of France"),
        "NumPy box": np.array([0, 0, 10, 10]),
        "NumPy objects": np.array([{}, None], dtype=object),
        "NumPy long double": np.longdouble(1) / 3,
        "array": np.arange(6.0).reshape(2, 3),
        "tensor": torch.tensor([0.0, 0.0, 10.0, 10.0], dtype=torch.bfloat16),
        "tensor with gradient": torch.ones(2, requires_grad=True),
        "class": _Foreign,
        "function": len,
        "object of a class": _Foreign(),
        "unreadable": _Unreadable(),
    }


SAME_ONLY = frozenset({"cycle", "branches without end", "many items", "object of a class", "unreadable"})
"""Values that are equal to themselves and not to their like: too large to compare, or without an equality."""
