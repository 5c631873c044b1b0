"""The rule of the specification, written a second time: loops, no sharing with the fast code but the data types."""

import re
import unicodedata

import torch
from rapidfuzz import fuzz

from verl_tapo.config import acquires_information, default_kernel


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


def similarity(cfg, u, v):
    left, right = counting(cfg, u), counting(cfg, v)
    values = [1.0]
    for name in set(left) | set(right):
        if name not in left or name not in right:
            values.append(0.0)
        else:
            values.append(kernel(left[name], u.arguments[name], v.arguments[name]))
    return min(values)


def takes_part(cfg, step):
    if cfg.tools is None:
        return acquires_information(step.tool) and len(counting(cfg, step)) > 0
    return step.tool in cfg.tools


def transfer(base, mask, index, success, steps, cfg):
    """Returns (advantages, one dict per step). Rows are trajectories."""
    rows, length = base.shape
    a = []
    for i in range(rows):
        values = [base[i, t].item() for t in range(length) if mask[i, t]]
        a.append(sum(values) / len(values) if values else 0.0)
    records = []
    for step in steps:
        role = "none"
        if takes_part(cfg, step) and step.ok:
            if success[step.row] and a[step.row] > 0:
                role = "witness"
            elif not success[step.row] and a[step.row] < 0:
                role = "failing"
        records.append(
            {"role": role, "gate": "", "similarity": 0.0, "support": 0.0, "alpha": 0.0, "abar": 0.0, "transfer": 0.0}
            | {"witnesses": {None}}
        )
    for number, (step, record) in enumerate(zip(steps, records, strict=True)):
        if record["role"] != "failing":
            continue

        def comparable(k, step=step):
            same = cfg.scope == "batch" or index[steps[k].row] == index[step.row]
            return records[k]["role"] == "witness" and steps[k].tool == step.tool and same

        witnesses = [k for k in range(len(steps)) if comparable(k)]
        if not witnesses:
            record["gate"] = "no_witness"
            continue
        # connected components by flooding
        groups, left = [], list(witnesses)
        while left:
            group, frontier = [], [left.pop(0)]
            while frontier:
                k = frontier.pop()
                group.append(k)
                near = [j for j in left if similarity(cfg, steps[k], steps[j]) >= cfg.theta]
                left = [j for j in left if j not in near]
                frontier += near
            groups.append(group)
        ranked = []
        for group in groups:
            m = max(similarity(cfg, steps[number], steps[k]) for k in group)
            holders = {steps[k].row for k in group}
            abar = sum(a[i] for i in holders) / len(holders)
            prompts = {index[i] for i in holders}
            winners = [i for i in range(rows) if index[i] in prompts and success[i] and a[i] > 0]
            sup = len(holders) / len(winners) if cfg.use_support else 1.0
            ranked.append((-m, -sup, -abar, min(holders), group))
        m, sup, abar = (-value for value in min(entry[:4] for entry in ranked)[:3])
        record["similarity"] = m
        best = min(entry[:4] for entry in ranked)
        among = witnesses if m < cfg.theta else [k for *rank, group in ranked if tuple(rank) == best for k in group]
        record["witnesses"] = {k for k in among if similarity(cfg, steps[number], steps[k]) == m}
        if m < cfg.theta:
            record["gate"] = "below_theta"
            continue
        record.update(support=sup, abar=abar, alpha=m * sup)
        if m * sup < cfg.alpha_min:
            record["gate"] = "below_alpha"
            continue
        record.update(gate="corrected", transfer=cfg.beta * m * sup * abar)
    result = base.clone()
    for i in range(rows):
        for t in range(length):
            covering = [
                record["transfer"]
                for step, record in zip(steps, records, strict=True)
                if step.row == i and step.span(cfg.token_scope)[0] <= t < step.span(cfg.token_scope)[1]
            ]
            if covering and min(covering) > 0 and mask[i, t] and base[i, t] < 0:
                value = base[i, t] + torch.tensor(min(covering), dtype=base.dtype)
                result[i, t] = min(value, torch.zeros((), dtype=base.dtype)) if cfg.clip else value
    return result, records
