"""Tables of results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

BENCHMARKS = ("MMSearch", "HR-MMSearch", "FVQA-test", "InfoSeek", "SimpleVQA", "LiveVQA", "MAT-Search")
"""The benchmarks in the paper's order; others follow by name."""


def order(benchmarks: Iterable[str]) -> list[str]:
    """Benchmarks as the paper's table has them, however they are written."""
    ranks = {_letters(name): rank for rank, name in enumerate(BENCHMARKS)}
    return sorted(benchmarks, key=lambda name: (ranks.get(_letters(name), len(ranks)), name))


def _letters(name: str) -> str:
    letters = "".join(filter(str.isalnum, name.lower()))
    return letters.removesuffix("test")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(value: float | None) -> str:
    """A share, in per cent."""
    return "–" if value is None else f"{100 * value:.2f}"
