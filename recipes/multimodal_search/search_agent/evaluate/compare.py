"""Puts evaluations side by side, with the probability that they differ by chance.

    python -m search_agent.evaluate.compare OUT_GRPO OUT_TAPO

The first is what the others are compared with, on the questions that all of them have done.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from search_agent.evaluate.report import order, percent, table
from search_agent.evaluate.store import DONE, read_lines

FEW_QUESTIONS = 30
MOST_COMBINATIONS = 1_000_000
RANDOM_SIGNS = 100_000

Scores = dict[str, dict[str, float]]
"""By benchmark, then by question."""


def read_scores(folder: Path) -> tuple[str, dict[str, Any], Scores]:
    """Label, settings and scores of an evaluation.

    Raises:
        ValueError: The folder holds none.
    """
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        label, settings = str(found["label"]), dict(found["settings"])
    except OSError as error:
        raise ValueError(f"{folder} holds no evaluation: {error}") from None
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{folder / 'results.json'} is not what search_agent.evaluate writes: {error!r}") from None
    scores: Scores = {}
    try:
        for entry in read_lines(folder / DONE, {"id": str, "data_source": str, "acc": (int, float)}):
            scores.setdefault(entry["data_source"], {})[entry["id"]] = float(entry["acc"])
    except OSError as error:
        raise ValueError(f"{folder} holds no evaluation: {error}") from None
    return label, settings, scores


def common(all_scores: Sequence[Scores]) -> dict[str, npt.NDArray[np.float64]]:
    """By benchmark: scores (evaluations, questions) of the questions that all evaluations have.

    Raises:
        ValueError: There are none.
    """
    found = {}
    for name in order(set.intersection(*(set(scores) for scores in all_scores))):
        questions = sorted(set.intersection(*(set(scores[name]) for scores in all_scores)))
        if questions:
            found[name] = np.array([[scores[name][question] for question in questions] for scores in all_scores])
    if not found:
        raise ValueError("these evaluations have no question in common")
    return found


def mcnemar(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """Exact two-sided p value of paired scores (N,): as many better as worse, by chance."""
    better, worse = int((second > first).sum()), int((second < first).sum())
    differ = better + worse
    tail = sum(math.comb(differ, number) for number in range(min(better, worse) + 1))
    return min(1.0, float(2 * tail / 2**differ))


def interval(differences: Sequence[npt.NDArray[np.float64]]) -> tuple[float, float]:
    """The 95 % interval of the mean over benchmarks of the mean difference.

    It holds for few questions too: each benchmark counts one more question that got better and one
    that got worse (Bonett and Price 2012).

    Args:
        differences: for each benchmark, its questions' differences (N,), from -1 to 1.
    """
    counted = [np.concatenate([values, [1.0, -1.0]]) for values in differences]
    middle = float(np.mean([values.mean() for values in counted]))
    half = 1.96 * math.sqrt(sum(values.var() / len(values) for values in counted)) / len(counted)
    return max(-1.0, middle - half), min(1.0, middle + half)


def sign_test(differences: Sequence[npt.NDArray[np.float64]], seed: int = 0) -> float:
    """The two-sided p value of the mean over benchmarks of the mean difference.

    By chance, each question's difference might as well have the other sign. For one benchmark this
    is McNemar's exact test.

    Args:
        differences: see `interval`.
        seed: of random signs, where there are too many combinations to count all.
    """
    observed = abs(sum(values.mean() for values in differences))
    # Differences of one size in one benchmark: how many there are, and what one of them adds.
    alike = [
        (int(count), size / len(values))
        for values in differences
        for size, count in zip(*np.unique(np.abs(values), return_counts=True), strict=True)
        if size
    ]
    if math.prod(count + 1 for count, _ in alike) <= MOST_COMBINATIONS:
        totals, chances = np.zeros(1), np.ones(1)
        for count, weight in alike:
            pluses = np.arange(count + 1)
            binomial = np.array([math.comb(count, number) / 2**count for number in pluses.tolist()])
            totals = np.add.outer(totals, (2 * pluses - count) * weight).ravel()
            chances = np.multiply.outer(chances, binomial).ravel()
        return float(min(1.0, chances[np.abs(totals) >= observed - 1e-9].sum()))
    generator = np.random.default_rng(seed)
    drawn = np.zeros(RANDOM_SIGNS)
    for count, weight in alike:
        drawn += (2 * generator.binomial(count, 0.5, RANDOM_SIGNS) - count) * weight
    # One more of each, the sample itself: no p value is 0.
    return float((1 + (np.abs(drawn) >= observed - 1e-9).sum()) / (1 + RANDOM_SIGNS))


def compare(folders: Sequence[Path]) -> dict[str, Any]:
    """Accuracies, differences from the first folder, intervals and p values.

    Raises:
        ValueError: A folder holds no evaluation, or there is no question in common.
    """
    evaluations = [read_scores(folder) for folder in folders]
    scores = common([scores for _, _, scores in evaluations])
    rows: list[dict[str, Any]] = []
    for number, (label, settings, own) in enumerate(evaluations):
        row = {
            "label": label,
            "folder": str(folders[number]),
            "accuracy": {name: float(values[number].mean()) for name, values in scores.items()},
            "average": float(np.mean([values[number].mean() for values in scores.values()])),
            "left_out": sum(map(len, own.values())) - sum(values.shape[1] for values in scores.values()),
        }
        if number:
            row["p"] = {name: mcnemar(values[0], values[number]) for name, values in scores.items()}
            differences = [values[number] - values[0] for values in scores.values()]
            row["difference"] = {
                "average": row["average"] - rows[0]["average"],
                "interval": list(interval(differences)),
                "p": sign_test(differences),
            }
            before = evaluations[0][1]
            row["other_settings"] = sorted(
                name for name in {*before, *settings} - {"model"} if before.get(name) != settings.get(name)
            )
        rows.append(row)
    return {"questions": {name: values.shape[1] for name, values in scores.items()}, "rows": rows}


def markdown(found: Mapping[str, Any]) -> str:
    """`compare` for people."""
    names = list(found["questions"])
    rows = []
    for row in found["rows"]:
        cells = [f"{percent(row['accuracy'][name])}{_p(row['p'][name]) if 'p' in row else ''}" for name in names]
        change = ""
        if "difference" in row:
            low, high = row["difference"]["interval"]
            average = 100 * row["difference"]["average"]
            change = f"{average:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]{_p(row['difference']['p'])}"
        rows.append([row["label"], *cells, f"**{percent(row['average'])}**", change])
    head = ["", *(f"{name} ({found['questions'][name]})" for name in names), "average", "change"]
    first = found["rows"][0]
    parts = [table(head, rows)]
    parts.append(
        f"Accuracy in per cent, on the questions that all have done (their number in brackets). p: against "
        f"{first['label']}, McNemar's exact test for a benchmark; for the average, the same over all (the signs of the "
        "questions' differences are chance). The interval is one of 95 %."
    )
    few = [f"{name} ({count})" for name, count in found["questions"].items() if count < FEW_QUESTIONS]
    if few:
        parts.append(f"**Few questions**: {', '.join(few)}. Only large differences can be told from chance there.")
    for row in found["rows"]:
        if row["left_out"]:
            parts.append(f"{row['label']}: {row['left_out']} question(s) left out, others have not done them.")
        if row.get("other_settings"):
            parts.append(f"**{row['label']} was evaluated with other settings**: {', '.join(row['other_settings'])}.")
    return "\n\n".join(parts) + "\n"


def _p(value: float) -> str:
    return " (p < 0.001)" if value < 0.001 else f" (p = {value:.3f})"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        "python -m search_agent.evaluate.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="OUT", help="of search_agent.evaluate, two or more")
    parser.add_argument("--json", action="store_true", help="instead of a table")
    args = parser.parse_args(argv)
    if len(args.folders) < 2:
        parser.error("name two folders or more")
    try:
        found = compare(args.folders)
    except ValueError as error:
        print(f"search_agent.evaluate.compare: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2, ensure_ascii=False) if args.json else markdown(found), end="\n" * args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
