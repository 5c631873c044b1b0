"""Results as tables and pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from measuring import Part, Sweep

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def _figure(value: float) -> str:
    """Three digits that mean something."""
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def sweep_table(sweep: Sweep) -> str:
    """Markdown."""
    names = list(sweep.costs)
    head = [sweep.grows, *(f"{name} ({sweep.unit})" for name in names), f"{names[0]} / {names[1]}"]
    rows = [
        [f"{size:,}", *(_figure(costs[at]) for costs in sweep.costs.values()), f"{ratio:.2f}"]
        for at, (size, ratio) in enumerate(zip(sweep.sizes, sweep.ratios(), strict=True))
    ]
    return f"{sweep.fixed[0].upper()}{sweep.fixed[1:]}:\n\n{_table(head, rows)}"


def markdown(name: str, part: Part) -> str:
    """Returns a part's section: what it compares, its figures, its tables and its picture."""
    blocks = [f"## {part.title}", part.text]
    if part.facts:
        rows = [[fact.name, fact.figure, fact.bound] for fact in part.facts]
        blocks.append(_table(["measured", "figure", "bound we set ourselves"], rows))
    blocks += [sweep_table(sweep) for sweep in part.sweeps]
    if part.sweeps:
        blocks.append(f"![{part.title}: cost on growing work](results/{name}.png)")
    return "\n\n".join(blocks)


def plot(part: Part, file: Path) -> None:
    """Plots how costs grow: one panel per sweep, both axes logarithmic."""
    grid, axes = plt.subplots(1, len(part.sweeps), figsize=(4.2 * len(part.sweeps), 3.4), squeeze=False)
    for axis, sweep in zip(axes[0], part.sweeps, strict=True):
        for name, costs in sweep.costs.items():
            axis.plot(sweep.sizes, costs, marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel=sweep.grows, ylabel=sweep.unit)
        axis.set_xticks(sweep.sizes, [str(size) for size in sweep.sizes], fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    grid.suptitle(part.title)
    grid.tight_layout()
    grid.savefig(file, dpi=80)
    plt.close(grid)


def write_readme(readme: Path, machine: str, sections: Mapping[str, str]) -> None:
    """Puts the sections between the file's two marks.

    Raises:
        ValueError: The marks are not there.
    """
    text = readme.read_text(encoding="utf-8")
    begin, end = "<!-- results: made by run.py -->", "<!-- end of results -->"
    pattern = re.compile(f"(?<={re.escape(begin)}\n).*(?={re.escape(end)})", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{readme} lacks the lines {begin} and {end}")
    made = "\n\n".join([machine, *sections.values()])
    readme.write_text(pattern.sub(lambda _: f"\n{made}\n\n", text), encoding="utf-8")
