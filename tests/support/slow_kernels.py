"""The similarity of two calls, written a second time from the specification: no sharing with the kernels."""

import re
import unicodedata

from rapidfuzz import fuzz

from verl_tapo.rule.names import default_kernel


def normalise(x):
    if isinstance(x, list):
        x = " ".join(map(str, x))
    x = unicodedata.normalize("NFKC", str(x)).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in x).split())


def exact_form(x):
    if isinstance(x, str):
        return " ".join(unicodedata.normalize("NFKC", x).split())
    if isinstance(x, bool) or x is None:
        return (type(x).__name__, x)
    if isinstance(x, float) and x != x:
        return "nan as a number", 0
    if isinstance(x, float) and abs(x) != float("inf") and x == int(x):
        return int(x)
    if isinstance(x, dict):
        return "dict", tuple(sorted((k, str(exact_form(v))) for k, v in x.items()))
    if isinstance(x, list):
        return "list", tuple(exact_form(v) for v in x)
    return x


def number(x):
    """A finite number, also as text; else None."""
    if isinstance(x, str) and re.fullmatch(r"[-+]?[0-9]+(\.[0-9]+)?", x.strip()):
        x = float(x)
    if type(x) not in (int, float) or abs(x) > 1e100 or x != x:
        return None
    return x


def box(x):
    """Left, top, right, bottom; None for what is no box."""
    if isinstance(x, str):
        x = re.findall(r"[-+]?[0-9]+(?:\.[0-9]+)?", x)
    if isinstance(x, dict) and set(x) == {"x1", "y1", "x2", "y2"}:
        x = [x["x1"], x["y1"], x["x2"], x["y2"]]
    if isinstance(x, list) and len(x) == 2 and all(isinstance(corner, list) for corner in x):
        x = x[0] + x[1]
    if not isinstance(x, list) or len(x) != 4 or any(number(v) is None for v in x):
        return None
    a, b, c, d = map(number, x)
    return min(a, c), min(b, d), max(a, c), max(b, d)


def area(x):
    return max(0, x[2] - x[0]) * max(0, x[3] - x[1])


def kernel(spec, x, y):
    name = spec["kernel"] if isinstance(spec, dict) else spec
    if exact_form(x) == exact_form(y):
        return 1.0
    if name == "text" and all(isinstance(v, str | list | int | float) for v in (x, y)):
        return fuzz.token_sort_ratio(normalise(x), normalise(y)) / 100
    if name == "iou" and box(x) is not None and box(y) is not None:
        x, y = box(x), box(y)
        if x == y:
            return 1.0
        both = area((max(x[0], y[0]), max(x[1], y[1]), min(x[2], y[2]), min(x[3], y[3])))
        return both / (area(x) + area(y) - both) if both else 0.0
    if name == "number" and number(x) is not None and number(y) is not None:
        return max(0.0, 1 - abs(number(x) - number(y)) / spec["scale"])
    return 0.0


def counting(cfg, step):
    """The kernels of the call's parameters that count, by name."""
    if cfg.tools is None:
        kernels = {name: default_kernel(name, step.arguments) for name in step.arguments}
    else:
        kernels = {name: cfg.tools[step.tool].get(name, "exact") for name in step.arguments}
    return {name: spec for name, spec in kernels.items() if spec != "ignore"}


def similarity(u, v, cfg):
    left, right = counting(cfg, u), counting(cfg, v)
    values = [1.0]
    for name in set(left) | set(right):
        if name not in left or name not in right:
            values.append(0.0)
        else:
            values.append(kernel(left[name], u.arguments[name], v.arguments[name]))
    return min(values)
