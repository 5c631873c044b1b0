"""Tables and plots from the study's raw results, whatever of it is there.

    python examples/credit_lab/report.py       # results/tables.md, results/*.png, and the tables in docs/evidence.md

Differences are paired by seed: two runs of a seed see the same prompts and the same random numbers. `±` is half the
95 % interval of the mean (Student's t over seeds).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from scipy import stats
from study import HERE, KEYS, KNOWN, LEARNING_RATES, LOSSES, RESULTS, STUDIED, load, sweeps

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WINDOW = 5  # steps that a point of a smoothed curve averages
LEVELS = (50, 70, 90)
LATE = 5  # last steps that "final" averages
COLOURS = {"grpo": "tab:gray", "tapo": "tab:blue", "clamp": "tab:orange", "step_groups": "tab:green"}
LEGEND = """`to p`: steps until the mean of the last 5 steps reaches p % of the best (the better of GRPO's and TAPO's
mean highest value in that world and loss), a run that never does counting one step more than it has; `early`: mean over
the first half of the steps; `final`: over the last 5. Success and tool proficiency (the share of rollouts whose whole
chain of calls is right) are of training rollouts, whose prompts are always new, before the step's update; `held out` is
on the same 64 prompts in all runs of a world.
"""


def _mean(values: Sequence[float] | np.ndarray, digits: int = 3, sign: bool = False) -> str:
    """Mean and half the 95 % interval."""
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    if not len(known):
        return "-"
    mean = f"{known.mean():{'+' if sign else ''}.{digits}f}"
    if len(known) < 2:
        return mean
    half = stats.t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / np.sqrt(len(known))
    interval = f"{mean} ± {half:.{digits}f}"
    return f"**{interval}**" if sign and abs(known.mean()) > half else interval


def _smooth(curves: np.ndarray) -> np.ndarray:
    """(R, S) curves, each point the mean of the last `WINDOW`."""
    return pd.DataFrame(curves.T).rolling(WINDOW, min_periods=1).mean().to_numpy().T


def _early(run: pd.DataFrame) -> pd.DataFrame:
    """The first half of a run's steps."""
    return run.head((len(run) + 1) // 2)


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """One row a run: its keys and its figures, steps to a level included."""
    runs = []
    for keys, run in results.drop_duplicates([*KEYS, "step"]).groupby(KEYS, sort=False):
        run = run.sort_values("step")
        late, early = run.tail(LATE), _early(run)
        figures: dict[str, object] = dict(zip(KEYS, keys, strict=True))
        for name in ("success", "proficiency"):
            figures |= {f"{name}_start": run[name].iloc[0], f"{name}_early": early[name].mean()}
            figures |= {f"{name}_final": late[name].mean(), f"{name}_curve": run[name].to_numpy(dtype=float)}
        figures |= {f"{name}_final": late[name].mean() for name in ("entropy", "calls", "lucky_steps")}
        figures["held_out_final"] = run["held_out_success"].dropna().iloc[-1]
        figures |= {f"{name}_early": early[name].mean() for name in ("agreement", "push_right", "push_right_sd")}
        figures |= {
            f"{name}_early": early[name].mean()
            for name in ("push_wrong", "misassigned_steps", "corrected_steps", "lucky_steps", "lift", "entropy")
        }
        runs.append(figures | {"clipped": run["clipped"].mean()})
    summary = pd.DataFrame(runs)
    for name in ("success", "proficiency"):
        for _, rows in summary.groupby(["world", "loss", "learning_rate", "steps"]):
            smooth = {index: _smooth(rows.loc[index, f"{name}_curve"][None])[0] for index in rows.index}
            usual = rows[rows["rule"].isin(["grpo", "tapo"])]
            if usual.empty:
                continue
            best = max(np.mean([smooth[index].max() for index in of.index]) for _, of in usual.groupby("rule"))
            for level in LEVELS:
                for index, curve in smooth.items():
                    summary.loc[index, f"{name}_to_{level}"] = _first(curve, best * level / 100)
    return summary


def _first(curve: np.ndarray, level: float) -> float:
    """The step, between steps by interpolation, at which a curve reaches a level; its length if it does not."""
    reached = np.flatnonzero(curve >= level)
    if not len(reached):
        return float(len(curve))
    step = int(reached[0])
    return float(step if step == 0 else step - (curve[step] - level) / (curve[step] - curve[step - 1]))


def _cell(summary: pd.DataFrame, world: str, loss: str) -> pd.DataFrame:
    """The runs in a world under a loss."""
    return summary[(summary["world"] == world) & (summary["loss"] == loss)]


def paired(summary: pd.DataFrame, rule: str, against: str, figure: str) -> np.ndarray:
    """Differences of a figure between two rules under one loss, by world and seed."""
    columns = summary.pivot(index=["world", "seed"], columns="rule", values=figure)
    if rule not in columns or against not in columns:
        return np.zeros(0)
    return (columns[rule] - columns[against]).dropna().to_numpy()


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def against_grpo(summary: pd.DataFrame, worlds: Sequence[str], figures: dict[str, int]) -> str:
    """A table of GRPO, TAPO and their paired difference: figures with their digits after the point."""
    rows = []
    for world in worlds:
        for loss in LOSSES:
            cell = _cell(summary, world, loss)
            pairs = len(paired(cell, "tapo", "grpo", "success_final"))
            for figure, digits in figures.items() if pairs else ():
                values = [cell.loc[cell["rule"] == rule, figure].to_numpy() for rule in ("grpo", "tapo")]
                difference = _mean(paired(cell, "tapo", "grpo", figure), digits, sign=True)
                rows.append(
                    [world, loss, str(pairs), figure.replace("_", " "), *(_mean(v, digits) for v in values), difference]
                )
    return _markdown(["world", "loss", "seeds", "figure", "GRPO", "TAPO", "TAPO - GRPO"], rows)


def overview(summary: pd.DataFrame, worlds: Sequence[str]) -> str:
    """Returns a row for each world and loss: GRPO's mean, and what TAPO adds to it, paired by seed."""
    figures = {"proficiency_to_70": 1, "proficiency_to_90": 1, "success_early": 3, "success_final": 3}
    rows = []
    for world in worlds:
        for loss in LOSSES:
            cell = _cell(summary, world, loss)
            pairs = len(paired(cell, "tapo", "grpo", "success_final"))
            if pairs:
                row = [world, loss, str(pairs)]
                for figure, digits in figures.items():
                    mean = cell.loc[cell["rule"] == "grpo", figure].mean()
                    row.append(f"{mean:.{digits}f}, {_mean(paired(cell, 'tapo', 'grpo', figure), digits, sign=True)}")
                rows.append(row)
    return _markdown(["world", "loss", "seeds", *(figure.replace("_", " ") for figure in figures)], rows)


def added(summary: pd.DataFrame, worlds: Sequence[str]) -> str:
    """A row for each world: what TAPO adds to GRPO under each loss, early and at the end."""
    figures = ("success_early", "success_final")
    head = [f"{figure.removeprefix('success_')}, {loss}" for figure in figures for loss in LOSSES]
    rows = []
    for world in worlds:
        row = [world]
        for figure in figures:
            for loss in LOSSES:
                cell = _cell(summary, world, loss)
                row.append(_mean(paired(cell, "tapo", "grpo", figure), sign=True))
        rows.append(row)
    return _markdown(["world", *head], rows)


def rules_table(summary: pd.DataFrame, worlds: Sequence[str | None], rules: Sequence[str]) -> str:
    """Rules under the vanilla loss: their difference from GRPO, and from TAPO; None for all worlds together."""
    figures = {"success_early": 3, "success_final": 3, "proficiency_to_70": 1, "entropy_early": 3}
    rows = []
    for world in worlds:
        cell = summary[(summary["loss"] == "vanilla") & ((summary["world"] == world) | (world is None))]
        for rule in rules:
            pairs = len(paired(cell, rule, "grpo", "success_final"))
            if pairs:
                row = [world or "all", rule, str(pairs)]
                for against in ("grpo", "tapo"):
                    row += [
                        "" if rule == against else _mean(paired(cell, rule, against, figure), digits, sign=True)
                        for figure, digits in figures.items()
                    ]
                rows.append(row)
    names = [figure.replace("_", " ") for figure in figures]
    head = ["world", "rule", "runs", *(f"{name} - GRPO" for name in names), *(f"{name} - TAPO" for name in names)]
    return _markdown(head, rows)


def tuning_table(results: pd.DataFrame) -> str:
    """Early and final success of GRPO by learning rate, on seeds of their own."""
    summary = summarise(results)
    rows = [
        [
            *(loss, f"{rate:g}", str(len(of))),
            *(_mean(of[figure]) for figure in ("success_early", "success_final", "clipped")),
        ]
        for (loss, rate), of in summary.groupby(["loss", "learning_rate"])
    ]
    return _markdown(["loss", "learning rate", "runs", "success early", "success final", "clipped tokens"], rows)


def plot_curves(results: pd.DataFrame, worlds: Sequence[str], figure: str, file: Path) -> None:
    """A grid of learning curves, worlds by losses: mean over seeds and its 95 % interval."""
    grid, axes = plt.subplots(len(worlds), len(LOSSES), figsize=(11, 2.5 * len(worlds)), squeeze=False, sharex=True)
    for row, world in enumerate(worlds):
        for column, loss in enumerate(LOSSES):
            axis = axes[row][column]
            axis.set_title(f"{world}, {loss}", fontsize=9)
            axis.grid(alpha=0.3)
            cell = results[(results["world"] == world) & (results["loss"] == loss)]
            for rule in ("grpo", "tapo"):
                curves = cell[cell["rule"] == rule].pivot(index="seed", columns="step", values=figure).to_numpy(float)
                if not len(curves):
                    continue
                smooth = _smooth(curves)
                mean = smooth.mean(0)
                axis.plot(mean, color=COLOURS[rule], label=rule)
                if len(smooth) > 1:
                    half = stats.t.ppf(0.975, len(smooth) - 1) * smooth.std(0, ddof=1) / np.sqrt(len(smooth))
                    axis.fill_between(range(len(mean)), mean - half, mean + half, color=COLOURS[rule], alpha=0.2)
    axes[0][0].legend()
    grid.suptitle(f"{figure} over steps (mean of the last {WINDOW} steps; 95 % interval over seeds)", fontsize=10)
    grid.tight_layout()
    grid.savefig(file, dpi=90)
    plt.close(grid)


def plot_rules(summary: pd.DataFrame, worlds: Sequence[str], file: Path) -> None:
    """Plots what each rule adds to GRPO's early success, with its 95 % interval."""
    grid, axes = plt.subplots(1, len(worlds), figsize=(4 * len(worlds), 5), squeeze=False, sharey=True)
    vanilla = summary[summary["loss"] == "vanilla"]
    shown = vanilla[vanilla["world"].isin(worlds) & (vanilla["rule"] != "grpo")]["rule"]
    rules = sorted(shown.unique(), reverse=True)
    for axis, world in zip(axes[0], worlds, strict=True):
        cell = vanilla[vanilla["world"] == world]
        for height, rule in enumerate(rules):
            values = paired(cell, rule, "grpo", "success_early")
            if len(values) > 1:
                half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
                axis.errorbar(values.mean(), height, xerr=half, fmt="o", color=COLOURS.get(rule, "tab:blue"))
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=world, xlabel="early success - GRPO", yticks=range(len(rules)), yticklabels=rules)
        axis.grid(alpha=0.3)
    grid.tight_layout()
    grid.savefig(file, dpi=90)
    plt.close(grid)


MARK = re.compile(r"(<!-- (\w+): report\.py -->\n).*?(<!-- end -->)", re.DOTALL)
DOCUMENT = HERE.parent.parent / "docs" / "evidence.md"
SWITCHES = "grounding.witnesses=true,grounding.own=true,grounding.luck=true"
TRAINER = {
    "trainer": ["quickstart/results/grounded.csv"],
    "trainer_switches": ["quickstart/results/grounded.csv", "quickstart/results/switches.csv"],
    "guessing": ["quickstart/results/guessing.csv"],
    "from_memory": ["quickstart_lm/results/from-memory.csv"],
}
"""Tables of veRL's own trainer, and the files in `examples` that `compare.py` and `compare_lm.py` wrote for them."""


def grounding_table(summary: pd.DataFrame, rules: Sequence[str], cells: Sequence[tuple[str, str]]) -> str:
    """Rules by world and loss: success, and its paired difference from GRPO and from TAPO."""
    rows = []
    for world, loss in cells:
        cell = _cell(summary, world, loss)
        for rule in rules:
            final = cell.loc[cell["rule"] == rule, "success_final"]
            if final.empty:
                continue
            row = [world, loss, rule, str(len(final)), _mean(cell.loc[cell["rule"] == rule, "success_early"])]
            row += [_mean(final), str(int((final > 0.5).sum()))]
            for against in ("grpo", "tapo"):
                row += [
                    "" if rule in ("grpo", against) else _mean(paired(cell, rule, against, figure), sign=True)
                    for figure in ("success_early", "success_final")
                ]
            rows.append(row)
    head = ["world", "loss", "rule", "seeds", "early", "final", "above .5", "early - GRPO", "final - GRPO"]
    return _markdown([*head, "early - TAPO", "final - TAPO"], rows)


def cure_table(summary: pd.DataFrame, cells: Sequence[tuple[str, str]]) -> str:
    """Final success of the usual rules by world and loss, in brackets the runs above .5, and what grounding adds."""
    rows = []
    for world, loss in cells:
        cell = _cell(summary, world, loss)
        finals = [cell.loc[cell["rule"] == rule, "success_final"] for rule in ("grpo", "tapo", "grounded")]
        if not any(final.empty for final in finals):
            row = [world, loss, str(len(finals[-1]))]
            row += [f"{final.mean():.3f} ({int((final > 0.5).sum())})" for final in finals]
            against = (_mean(paired(cell, "grounded", rule, "success_final"), sign=True) for rule in ("grpo", "tapo"))
            rows.append([*row, *against])
    return _markdown(["world", "loss", "seeds", "GRPO", "TAPO", "grounded", "grounded - GRPO", "grounded - TAPO"], rows)


def grounding_tables(results: pd.DataFrame) -> dict[str, str]:
    """The tables of grounded credit, of the sweep ``grounding`` alone: its seeds ran on one machine."""
    own = results[results["sweep"] == "grounding"]
    if own.empty:
        return {}
    summary = summarise(own)
    # A grounding that errs is compared with rules that do not look at it.
    wrong = summary["world"].str.extract(r"^\w+,((?:chance|reworded).+)$")[0]
    summary["rule"] = summary["rule"].where(wrong.isna(), summary["rule"] + ", " + wrong.fillna(""))
    summary["world"] = summary["world"].where(wrong.isna(), summary["world"].str.partition(",")[0])
    rules = list(summary["rule"].unique())
    switches = [
        rule for rule in rules if rule not in ("grpo", "tapo", "grounded") and not rule.startswith("grounded, ")
    ]
    erring = [rule for rule in rules if rule.startswith("grounded, ")]
    known = ("lucky", "memory", KNOWN, "one_hop", "two_hops", "flaky", "plain")
    worlds = [world for world in known if world in set(summary["world"])]
    vanilla = [(world, "vanilla") for world in worlds]
    guessing = [(world, loss) for world in ("lucky", "memory") for loss in LOSSES]
    others = [(world, loss) for world in worlds for loss in LOSSES[1:]]
    usual = ("grpo", "tapo", "grounded")
    return {
        "cure": cure_table(summary, guessing),
        "grounding": grounding_table(summary, usual, vanilla),
        "grounding_losses": grounding_table(summary, usual, others),
        "switches": grounding_table(summary, switches, guessing),
        "switches_elsewhere": grounding_table(summary, switches, [cell for cell in vanilla if cell not in guessing]),
        "errors": grounding_table(summary, ["grpo", *erring], [("memory", "vanilla"), ("one_hop", "vanilla")]),
    }


def trainer_table(steps: pd.DataFrame) -> str:
    """Of `compare.py`, in veRL's own trainer: percentages, and paired differences from GRPO and TAPO.

    Args:
        steps: Its CSV. Seeds that some arm has not completed are left out.
    """
    steps = steps.assign(advantage=steps["advantage"].replace(f"tapo/{SWITCHES}", "grounded")).sort_values(
        "step", kind="stable"
    )
    last = steps.groupby(["advantage", "seed"])["step"].max().unstack("advantage")
    steps = steps[steps["seed"].isin(last.index[(last == steps["step"].max()).all(axis=1)])]
    runs = steps.dropna(subset="success").groupby(["advantage", "seed"])[["success"]]
    figures = {
        "early": runs.apply(lambda run: _early(run)["success"].mean()),
        "final": runs.apply(lambda run: run.tail(LATE)["success"].mean()),
        "held out": steps.groupby(["advantage", "seed"])["held_out"].last(),
    }
    rows, arms = [], steps["advantage"].unique()
    for arm in arms:
        row = [arm, str(len(figures["final"][arm])), *(_mean(100 * figure[arm], 1) for figure in figures.values())]
        row.append(str(int((figures["final"][arm] > 0.5).sum())))
        for against in ("grpo", "tapo"):
            if arm in ("grpo", against) or against not in arms:
                row += [""] * len(figures)
            else:
                row += [_mean(100 * (figure[arm] - figure[against]), 1, sign=True) for figure in figures.values()]
        rows.append(row)
    against = [f"{name} - {other}" for other in ("GRPO", "TAPO") for name in figures]
    head = ["rule", "seeds", *figures, "above 50", *against]
    return _markdown(head, rows)


_SUCCESS = ["early", "final", "held out"]
TRAINED = ["rule", "seeds", *_SUCCESS, *(f"{name} - GRPO" for name in _SUCCESS)]
COLUMNS = {
    "main": ["world", "early, vanilla", "early, gspo", "early, sapo", "final, vanilla"],
    "cure": ["world", "loss", "seeds", "GRPO", "TAPO", "grounded", "grounded - GRPO", "grounded - TAPO"],
    "switches": ["world", "rule", "seeds", "final", "above .5"],
    "errors": ["world", "rule", "final", "above .5", "early - GRPO"],
    "trainer": [*TRAINED, "final - TAPO"],
    "trainer_switches": ["rule", "seeds", *_SUCCESS, *(f"{name} - TAPO" for name in _SUCCESS)],
    "guessing": ["rule", "seeds", "final", "above 50", "held out", "final - GRPO", "held out - GRPO"],
    "from_memory": TRAINED,
}
"""What of each table stands in the document; ``tables.md`` has all of it."""


def narrowed(table: str, columns: Sequence[str]) -> str:
    """A table with these columns only."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    kept = [rows[0].index(column) for column in columns]
    return _markdown(columns, [[row[place] for place in kept] for row in rows[2:]])


def fill(text: str, tables: dict[str, str]) -> str:
    """Writes each table between its marks in a document. Marks without a table keep their content."""

    def filled(mark: re.Match[str]) -> str:
        name = mark[2]
        return f"{mark[1]}{narrowed(tables[name], COLUMNS[name])}{mark[3]}" if name in tables else mark[0]

    return MARK.sub(filled, text)


def write(folder: Path) -> tuple[str, dict[str, str]]:
    """All tables and plots of the results in ``folder``; returns the tables, and those of the document by name."""
    everything = load(folder)
    grounding = grounding_tables(everything)
    results = everything[everything["sweep"] != "grounding"].drop_duplicates([*KEYS, "step"])
    documented = dict(grounding)
    tuning = results[results["sweep"] == "tuning"]
    tuned = results["learning_rate"] == results["loss"].map(LEARNING_RATES)
    studied = results[(results["sweep"] != "tuning") & tuned]
    parts = [LEGEND]
    if len(tuning):
        parts += ["## Learning rates (GRPO, worlds one_hop and two_hops together)", tuning_table(tuning)]
    if len(studied):
        summary = summarise(studied)
        order = [run.world for sweep in ("main", "dials") for run in sweeps()[sweep]]
        worlds = [world for world in dict.fromkeys(order) if world in set(summary["world"])]
        plain = [world for world in worlds if "," not in world]
        steps = {f"{name}_to_{level}": 1 for name in ("success", "proficiency") for level in LEVELS}
        rewards = {"success_start": 3, "success_early": 3, "success_final": 3, "held_out_final": 3}
        habits = {"entropy_early": 3, "entropy_final": 3, "calls_final": 3}
        gradient = {"agreement_early": 3, "push_right_early": 3, "push_right_sd_early": 3, "push_wrong_early": 3}
        warning = {"misassigned_steps_early": 3, "corrected_steps_early": 3, "lift_early": 3, "lucky_steps_early": 3}
        titles = {
            "Steps to a level": steps,
            "Reward": rewards,
            "Exploration and tool use": habits,
            "The gradient on calls": gradient,
            "TAPO's own metrics (of GRPO's runs: what TAPO would have done)": warning,
        }
        documented["main"] = added(summary, plain)
        parts += ["## What TAPO adds", documented["main"], "## GRPO, and what TAPO adds", overview(summary, plain)]
        for title, figures in titles.items():
            parts += [f"## {title}", against_grpo(summary, plain, figures)]
        dialled = [world for world in worlds if "," in world]
        if dialled:
            figures = {"misassigned_steps_early": 3, "success_early": 3, "proficiency_to_70": 1, "success_final": 3}
            parts += ["## Dials (vanilla)", against_grpo(summary, ["one_hop", *dialled], figures)]
        slower = results[(results["sweep"] != "tuning") & ~tuned]
        if len(slower):
            rates = "learning rate " + slower["learning_rate"].map("{:g}".format)
            of_rates = summarise(slower.assign(world=slower["world"] + ", " + rates))
            figures = {"success_early": 3, "success_final": 3, "proficiency_to_70": 1}
            worlds_of_rates = sorted(of_rates["world"].unique())
            parts += ["## Smaller learning rates (vanilla)", against_grpo(of_rates, worlds_of_rates, figures)]
        rivals, ablations = (
            list(dict.fromkeys(run.rule for run in sweeps()[name])) for name in ("rivals", "ablations")
        )
        parts += ["## Rivals and gates (vanilla)", rules_table(summary, plain, ["tapo", *rivals])]
        ablated = [world for world in plain if world in STUDIED]
        together = summary[summary["world"].isin(ablated)]
        parts += ["## Ablations (vanilla)", rules_table(together, [None, *ablated], ["tapo", *ablations])]
        for figure in ("success", "proficiency", "entropy", "agreement"):
            plot_curves(studied, plain, figure, folder / f"{figure}.png")
        plot_rules(summary, plain, folder / "rules.png")
    for name, table in grounding.items():
        parts += [f"## Grounded credit: {name.replace('_', ' ')}", table]
    for name, files in TRAINER.items():
        if all((HERE.parent / file).is_file() for file in files):
            documented[name] = trainer_table(pd.concat(pd.read_csv(HERE.parent / file) for file in files))
            parts += [f"## In veRL's trainer: {', '.join(files)} (%)", documented[name]]
    return "\n".join(parts), documented


def main() -> int:
    """Writes and prints."""
    tables, documented = write(RESULTS)
    (RESULTS / "tables.md").write_text(tables)
    DOCUMENT.write_text(fill(DOCUMENT.read_text(), documented))
    print(tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
