"""The rule of the specification, written a second time: loops, no sharing with the fast code but the data types."""

import unicodedata

import torch
from rapidfuzz import fuzz


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
    if isinstance(x, float) and x == int(x):
        return int(x)
    if isinstance(x, dict):
        return tuple(sorted((k, str(exact_form(v))) for k, v in x.items()))
    if isinstance(x, list):
        return tuple(exact_form(v) for v in x)
    return x


def iou(x, y):
    boxes = []
    for box in (x, y):
        if not isinstance(box, list) or len(box) != 4 or not all(type(v) in (int, float) for v in box):
            return 0.0
        a, b, c, d = box
        boxes.append((min(a, c), min(b, d), max(a, c), max(b, d)))
        if (boxes[-1][2] - boxes[-1][0]) * (boxes[-1][3] - boxes[-1][1]) <= 0:
            return 0.0
    (a, b, c, d), (e, f, g, h) = boxes
    inter = max(0, min(c, g) - max(a, e)) * max(0, min(d, h) - max(b, f))
    return inter / ((c - a) * (d - b) + (g - e) * (h - f) - inter)


def kernel(spec, x, y):
    name = spec["kernel"] if isinstance(spec, dict) else spec
    if name == "exact":
        return float(exact_form(x) == exact_form(y))
    if name == "text":
        return fuzz.token_sort_ratio(normalise(x), normalise(y)) / 100
    if name == "iou":
        return iou(x, y)
    if name == "number":
        return max(0.0, 1 - abs(x - y) / spec["scale"])
    raise AssertionError(name)


def similarity(tools, u, v):
    kernels = {name: spec for name, spec in tools[u.tool].items()}
    values = [1.0]
    for name in set(u.arguments) | set(v.arguments):
        spec = kernels.get(name, "exact")
        if spec == "ignore":
            continue
        if name not in u.arguments or name not in v.arguments:
            values.append(0.0)
        else:
            values.append(kernel(spec, u.arguments[name], v.arguments[name]))
    return min(values)


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
        if step.tool in cfg.tools and step.ok:
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
                near = [j for j in left if similarity(cfg.tools, steps[k], steps[j]) >= cfg.theta]
                left = [j for j in left if j not in near]
                frontier += near
            groups.append(group)
        ranked = []
        for group in groups:
            m = max(similarity(cfg.tools, steps[number], steps[k]) for k in group)
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
        record["witnesses"] = {k for k in among if similarity(cfg.tools, steps[number], steps[k]) == m}
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
