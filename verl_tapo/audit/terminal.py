"""An audit as tables in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

Figures: TypeAlias = Mapping[str, Any]

_STEPS_SHOWN = 20
_PROBLEMS_SHOWN = 10
_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def show(result: Mapping[str, Any], console: Console) -> None:
    """Prints an audit's result."""
    totals = result["totals"]
    console.print(_overview(result, totals))
    console.print(_by_step(result["steps"]))
    console.print(_by_tool(result["tools"]))
    console.print(_sweeps(result["sweeps"], result["settings"], totals["failing_steps"]))
    if result["problems"] or result["skipped"]:
        console.print(_problems(result["problems"], result["skipped"]))
    if result["left_out"]:
        names = ", ".join(result["left_out"][:6])
        more = f" and {len(result['left_out']) - 6} more" if len(result["left_out"]) > 6 else ""
        console.print(f"Left out (name one to audit it): {names}{more}", style="dim", markup=False, highlight=False)
    for warned in result["warnings"]:
        console.print(
            Text.assemble((f"{warned['level']}: ", _STYLES[warned["level"]]), _plain(warned["text"])), highlight=False
        )
        console.print(Text(f"  {warned['advice']}", style="dim"), highlight=False)


def _plain(text: str) -> str:
    """Untrusted text without control characters, which a terminal would obey."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _percent(part: float | None, whole: float | None = 1) -> str:
    return "–" if part is None or not whole else f"{part / whole:.1%}"


def _number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)


def _overview(result: Mapping[str, Any], totals: Figures) -> Table:
    settings = result["settings"]
    recorded, steps = settings["recorded_steps"], len(result["steps"])
    how = "from records" if recorded == steps else "from text" if not recorded else f"{recorded} of {steps} recorded"
    used = ", ".join(f"{name} = {settings[name]:g}" for name in ("theta", "alpha_min", "beta"))
    table = Table(
        title=escape(_plain(result["title"])), caption=f"{used}; {how}", show_header=False, title_style="bold"
    )
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    failing, rollouts = totals["failing_steps"], totals["trajectories"]
    wrong, matched = totals["failing_trajectories"], totals["misassigned_steps"]
    groups = totals["prompts"]
    for name, value, note in (
        ("training steps", f"{steps:,}", ""),
        ("rollouts", f"{rollouts:,}", f"of {groups:,} prompts; {_percent(totals['success_rate'])} succeed"),
        ("tool calls", f"{totals['calls']:,}", f"{_percent(totals['failed_calls'], totals['calls'])} failed"),
        ("failing rollouts", f"{wrong:,}", "no success, advantage below 0"),
        (
            "  with a misassigned call",
            _percent(totals["misassigned_trajectories"], wrong),
            "a successful sibling made it too",
        ),
        ("  with a corrected call", _percent(totals["correctable_trajectories"], wrong), "TAPO lifts its advantage"),
        ("failing calls", f"{failing:,}", "calls that worked, in failing rollouts"),
        ("  without any witness", _percent(totals["no_witness_steps"], failing), "no successful sibling uses the tool"),
        ("  stopped by theta", _percent(totals["below_theta_steps"], failing), "no witness is similar enough"),
        ("  misassigned", _percent(matched, failing), "past theta"),
        ("    stopped by alpha_min", _percent(totals["below_alpha_steps"], failing), "too few successes hold the call"),
        ("    corrected", _percent(totals["corrected_steps"], failing), "past both gates"),
        (
            "lucky witnesses",
            _percent(totals["lucky_steps"], matched),
            "of misassigned calls; holders succeed no more often than siblings",
        ),
        (
            "mean lift",
            _number(totals["lift"], "+.3f"),
            "of the reference groups; above 0: they mark what leads to success",
        ),
        ("mean similarity", _number(totals["similarity"]), "of misassigned calls to their best witness"),
        ("  only similar", _percent(totals["inexact_steps"], matched), "of misassigned calls; equal to no witness"),
        ("mean support", _number(totals["support"]), "share of the successes that hold the call"),
        ("tokens affected", _percent(totals["token_share"]), "of all that the policy wrote"),
        ("penalty removed", _percent(totals["penalty_removed"]), "of the negative advantage on failing rollouts"),
        (
            "groups that cannot help",
            _percent(totals["all_right_groups"] + totals["all_wrong_groups"], groups),
            f"{_percent(totals['all_wrong_groups'], groups)} all wrong, "
            f"{_percent(totals['all_right_groups'], groups)} all right",
        ),
    ):
        table.add_row(name, value, note)
    return table


_COLUMNS: tuple[tuple[str, str], ...] = (
    ("calls", "calls"),
    ("failed", "failed_calls"),
    ("failing", "failing_steps"),
    ("misassigned", "misassigned_steps"),
    ("corrected", "corrected_steps"),
    ("lucky", "lucky_steps"),
)


def _figures_table(title: str, first: str) -> Table:
    table = Table(title=title)
    table.add_column(first)
    for name, _ in _COLUMNS:
        table.add_column(name, justify="right")
    for name in ("similarity", "support", "tokens"):
        table.add_column(name, justify="right")
    return table


def _cells(figures: Figures) -> list[str]:
    whole = {"failed_calls": "calls", "failing_steps": "", "calls": "", "lucky_steps": "misassigned_steps"}
    cells = []
    for _, key in _COLUMNS:
        of = whole.get(key, "failing_steps")
        cells.append(_percent(figures[key], figures[of]) if of else f"{figures[key]:,}")
    return [*cells, _number(figures["similarity"]), _number(figures["support"]), _percent(figures["token_share"])]


def _by_step(steps: Sequence[Figures]) -> Table:
    shown: Sequence[Figures] = steps
    title = "By training step"
    if len(steps) > _STEPS_SHOWN:
        chosen = sorted({round(k * (len(steps) - 1) / (_STEPS_SHOWN - 1)) for k in range(_STEPS_SHOWN)})
        shown = [steps[k] for k in chosen]
        title = f"By training step ({len(shown)} of {len(steps)})"
    table = _figures_table(title, "step")
    table.add_column("success", justify="right")
    table.add_column("lift", justify="right")
    for figures in shown:
        table.add_row(
            str(figures["step"]), *_cells(figures), _percent(figures["success_rate"]), _number(figures["lift"], "+.2f")
        )
    return table


def _by_tool(tools: Mapping[str, Figures]) -> Table:
    table = _figures_table("By tool", "tool")
    for tool, figures in list(tools.items())[:_STEPS_SHOWN]:
        table.add_row(escape(_plain(tool[:60])), *_cells(figures))
    if len(tools) > _STEPS_SHOWN:
        table.caption = f"and {len(tools) - _STEPS_SHOWN:,} more"
    return table


def _sweeps(sweeps: Sequence[Figures], settings: Figures, failing: int) -> Table:
    table = Table(title="With other settings")
    for name in ("theta", "alpha_min", "beta", "corrected", "tokens", "their advantage"):
        table.add_column(name, justify="right")
    for row in sweeps:
        used = all(row[name] == settings[name] for name in ("theta", "alpha_min", "beta"))
        table.add_row(
            *(f"{row[name]:g}" for name in ("theta", "alpha_min", "beta")),
            _percent(row["corrected_steps"], failing),
            _percent(row["token_share"]),
            _number(row["mean_lifted_advantage"]),
            style="bold" if used else "",
        )
    return table


def _problems(problems: Sequence[Mapping[str, Any]], skipped: int) -> Table:
    table = Table(title=f"Not read: {skipped:,} lines")
    for name in ("file", "line", "why"):
        table.add_column(name, overflow="fold")
    for problem in problems[:_PROBLEMS_SHOWN]:
        line = problem["line"]
        table.add_row(escape(problem["file"]), "" if line is None else str(line), escape(_plain(problem["reason"])))
    if len(problems) > _PROBLEMS_SHOWN:
        table.caption = f"and {len(problems) - _PROBLEMS_SHOWN:,} more; --json lists them"
    return table
