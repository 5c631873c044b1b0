"""GRPO and TAPO on the same data, from the same weights, with the same seeds: learning curves as a picture and as CSV.

    python examples/quickstart/compare.py --steps 40 --seeds 1
    python examples/quickstart/compare.py --loss gspo --steps 40 --seeds 1 2 3
    python examples/quickstart/compare.py --variants theta=1.0 beta=0.5     # TAPO with other settings, too
    python examples/quickstart/compare.py --variants grounding.witnesses=true,grounding.luck=true     # two at once

Runs that are complete are not run again.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import matplotlib
import pandas as pd
from run import Failure, Run, parser, read_metrics, stop_with_me, summary, train, validation

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

ARMS = ("grpo", "tapo")
COLOURS = ("tab:gray", "tab:blue", "tab:green", "tab:orange", "tab:purple", "tab:brown")  # of these and of variants
ENTRY = r"\w+(\.\w+)*=\w[\w.-]*"
SMOOTH = 5  # steps that one point of a training curve averages
MORE = {
    "entropy": "actor/entropy",
    "turns": "num_turns/mean",
    "response_tokens": "response_length/mean",
    "misassigned_steps": "tapo/misassigned_steps",
    "corrected_steps": "tapo/corrected_steps",
    "lucky_steps": "tapo/lucky_steps",
    "grounded_successes": "tapo/grounding/grounded_successes",
    "grounded_failures": "tapo/grounding/grounded_failures",
    "forgiven_steps": "tapo/grounding/forgiven_steps",
    "withheld_trajectories": "tapo/grounding/withheld_trajectories",
}
"""Columns beside the success rates, and veRL's names for them."""


def frame(runs: dict[str, list[Run]]) -> pd.DataFrame:
    """Returns one row for each step of a run: the plotted values and some of veRL's metrics; NaN
    for missing ones."""
    rows = [
        {
            "advantage": advantage,
            "seed": run.seed,
            "step": entry["step"],
            "success": entry.get("critic/score/mean"),
            "held_out": validation(entry),
            **{name: entry.get(key) for name, key in MORE.items()},
        }
        for advantage, of in runs.items()
        for run in of
        for entry in read_metrics(run.metrics_file)
    ]
    return pd.DataFrame(rows).astype(dict.fromkeys(["success", "held_out", *MORE], float))


def table(steps: pd.DataFrame, column: str) -> pd.DataFrame:
    """A row for each step that has ``column``, a column for each advantage and seed."""
    return steps.dropna(subset=column).pivot(index="step", columns=["advantage", "seed"], values=column)


def plot(steps: pd.DataFrame, file: Path) -> None:
    """Success over training steps; the mean over seeds, thin lines each seed's."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    training, checks = table(steps, "success").rolling(SMOOTH, min_periods=1).mean(), table(steps, "held_out")
    for advantage, colour in zip(steps["advantage"].unique(), COLOURS, strict=False):
        for axes, lines, marker in ((left, training[advantage], None), (right, checks[advantage], "o")):
            axes.plot(lines, color=colour, alpha=0.3, linewidth=1)
            axes.plot(lines.mean(axis=1), color=colour, label=advantage, linewidth=2, marker=marker)
    left.set(
        title=f"training questions (mean of the last {SMOOTH} steps)", xlabel="step", ylabel="success rate", ylim=(0, 1)
    )
    right.set(title="held-out countries", xlabel="step")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def describe(steps: pd.DataFrame) -> str:
    """Returns the means over seeds, and what TAPO adds to GRPO by seed: equal seeds train on the same questions."""
    training, checks = table(steps, "success"), table(steps, "held_out")
    early, late = training.head(len(training) // 2 or 1), training.tail(len(training) // 4 or 1)
    lines = []
    arms = steps["advantage"].unique()
    for advantage in arms:
        lines += [
            f"{advantage}: success in training {training[advantage].to_numpy().mean():.1%}, "
            f"{late[advantage].to_numpy().mean():.1%} in the last quarter of the steps",
            f"      on held-out countries {checks[advantage].iloc[0].mean():.1%} before, "
            f"{checks[advantage].iloc[-1].mean():.1%} after",
        ]
    differences = {
        "success in training": training.mean(),
        "in the first half of the steps": early.mean(),
        "in the last quarter": late.mean(),
        "held-out countries, after": checks.iloc[-1],
    }
    for arm in arms[1:]:
        for name, values in differences.items():
            added = values[arm] - values["grpo"]
            by_seed = ", ".join(f"{100 * value:+.1f} (seed {seed})" for seed, value in added.items())
            spread = 100 * added.std() / len(added) ** 0.5
            mean = f"; mean {100 * added.mean():+.1f}, standard error {spread:.1f}" if len(added) > 1 else ""
            lines.append(f"{arm} minus grpo, {name}, in points: {by_seed}{mean}")
    return "\n".join(lines)


def _variant(entry: str) -> str:
    """``name=value``, or several with commas between; veRL's command line and the plug-in check the rest."""
    if not re.fullmatch(rf"{ENTRY}(,{ENTRY})*", entry):
        raise argparse.ArgumentTypeError(
            f"{entry!r}: expected an entry of algorithm.tapo, like theta=1.0, or several: "
            "grounding.own=true,grounding.luck=true"
        )
    return entry


def _file_name(arm: str) -> str:
    """Removes the characters that have a meaning to Hydra or a file system."""
    return re.sub("[/=,]", "-", arm)


def main(kind: type[Run] = Run, description: str = __doc__ or "") -> int:
    """Runs what has not been run, and writes the curves."""
    stop_with_me()
    arguments = parser(description, kind.here / "out")
    arguments.set_defaults(steps=40)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[1], help="one pair of runs for each")
    arguments.add_argument(
        "--variants", type=_variant, nargs="+", default=[], help="entries of algorithm.tapo: a further run for each"
    )
    args = arguments.parse_args()
    if len(ARMS) + len(args.variants) > len(COLOURS):
        arguments.error(f"--variants: at most {len(COLOURS) - len(ARMS)}, for the sake of the picture")
    settings = {arm: [] for arm in ARMS} | {
        f"tapo/{variant}": [f"algorithm.tapo.{entry}" for entry in variant.split(",")] for variant in args.variants
    }
    runs: dict[str, list[Run]] = {arm: [] for arm in settings}
    every = max(1, args.steps // 6)
    overrides = [f"trainer.test_freq={every}", f"trainer.save_freq={args.steps}", *args.overrides]
    results = "-".join([f"{args.out / 'compare'}-{args.loss}-{args.steps}", *map(_file_name, args.variants)])
    for seed in args.seeds:
        for arm, own in settings.items():
            name = f"compare-{args.loss}-{args.steps}-{_file_name(arm)}-{seed}"
            advantage = arm.split("/")[0]
            run = kind(name, advantage, args.loss, args.steps, seed, args.out.resolve(), [*overrides, *own])
            runs[arm].append(run)
            done = read_metrics(run.metrics_file)
            if done and done[-1]["step"] == args.steps:
                print(f"{name}: complete already")
                continue
            try:
                print(summary(run, train(run)))
            except Failure as failure:
                print(f"\n{failure}", file=sys.stderr)
                return 1
            frame(runs).to_csv(f"{results}.csv", index=False, float_format="%.6g")  # also of a study that is broken off
    steps = frame(runs)
    steps.to_csv(f"{results}.csv", index=False, float_format="%.6g")
    plot(steps, Path(f"{results}.png"))
    print(f"\n{describe(steps)}\n{results}.csv\n{results}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
