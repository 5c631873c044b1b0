"""Puts evaluations side by side, with the probability that they differ by chance.

    python -m search_backends.evaluation.compare OUT_GRPO OUT_TAPO

The others are compared with the first, on the questions that all of them have done.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from search_backends.evaluation.statistics import interval, mcnemar, sign_test
from search_backends.evaluation.store import DONE, read_lines
from search_backends.evaluation.tables import order, percent, table

FEW_QUESTIONS = 30

Scores = dict[str, dict[str, float]]
"""Scores by benchmark, then by question."""


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
        raise ValueError(f"{folder / 'results.json'} is not what an evaluation writes: {error!r}") from None
    scores: Scores = {}
    try:
        for entry in read_lines(folder / DONE, {"id": str, "data_source": str, "acc": (int, float)}):
            scores.setdefault(entry["data_source"], {})[entry["id"]] = float(entry["acc"])
    except OSError as error:
        raise ValueError(f"{folder} holds no evaluation: {error}") from None
    return label, settings, scores


def common(all_scores: Sequence[Scores]) -> dict[str, npt.NDArray[np.float64]]:
    """Returns, by benchmark, scores (evaluations, questions) of the questions that all evaluations
    share.

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
        parts.append(f"**Few questions**: {', '.join(few)}. Only large differences exceed chance there.")
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
        "python -m search_backends.evaluation.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="OUT", help="of an evaluation each, two or more")
    parser.add_argument("--json", action="store_true", help="instead of a table")
    args = parser.parse_args(argv)
    if len(args.folders) < 2:
        parser.error("name two folders or more")
    try:
        found = compare(args.folders)
    except ValueError as error:
        print(f"search_backends.evaluation.compare: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2, ensure_ascii=False) if args.json else markdown(found), end="\n" * args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
