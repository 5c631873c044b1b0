"""An audit as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TypeAlias

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from verl_tapo.audit.units import file_size
from verl_tapo.rule import figures as meaning

Figures: TypeAlias = Mapping[str, Any]

_STEPS_SHOWN = 20
_PROBLEMS_SHOWN = 10
_NOTES_FROM = 72
"""Columns of a terminal from which the overview says what its figures mean."""
_SPARED = (
    "support",
    "similarity",
    "tokens",
    "their advantage",
    "answer found",
    "lucky",
    "failed",
    "calls",
    "success",
    "lift",
    "failing",
)
"""Columns that a narrow terminal does without, the first first."""
_KEPT = ("misassigned", "corrected")
_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def show(result: Mapping[str, Any], console: Console) -> None:
    """Prints an audit's result."""
    if isinstance(console.file, TextIOWrapper):
        console.file.reconfigure(errors="replace")  # what the output's encoding lacks, as in a tool's name
    totals = result["totals"]
    console.print(_overview(result, totals, console.width))
    console.print(_by_step(result["steps"], console.width))
    console.print(_by_tool(result["tools"], console.width))
    console.print(_sweeps(result["sweeps"], result["settings"], totals["failing_steps"], console.width))
    if result["problems"] or result["skipped"]:
        console.print(_problems(result["problems"], result["skipped"]))
    if result["left_out"]:
        names = plain(", ".join(result["left_out"][:6]))
        more = f" and {len(result['left_out']) - 6} more" if len(result["left_out"]) > 6 else ""
        console.print(f"Left out (name one to audit it): {names}{more}", style="dim", markup=False, highlight=False)
    for warned in result["warnings"]:
        console.print(
            Text.assemble((f"{warned['level']}: ", _STYLES[warned["level"]]), plain(warned["text"])), highlight=False
        )
        console.print(Text(f"  {plain(warned['advice'])}", style="dim"), highlight=False)


def tell_written(path: str, console: Console) -> None:
    """Says where a report lies and how large it is; nothing of what went down a pipe."""
    if Path(path).is_file():
        size = file_size(Path(path).stat().st_size)
        console.print(f"Report: {plain(path)} ({size})", markup=False, highlight=False, soft_wrap=True)


def plain(text: str) -> str:
    """Untrusted text without control characters, which a terminal would obey."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _percent(part: float | None, whole: float | None = 1) -> str:
    return "–" if part is None or not whole else f"{part / whole:.1%}"


def _number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)


def _points(lift: float | None) -> str:
    return "–" if lift is None else f"{100 * lift:+.1f}"


def _written(figure: meaning.Figure, figures: Figures) -> str:
    value = figure.read(figures)
    if figure.unit == "share":
        return _percent(value)
    return _points(value) if figure.unit == "points" else _number(value)


def _overview(result: Mapping[str, Any], totals: Figures, width: int) -> Table:
    settings = result["settings"]
    recorded, steps = settings["recorded_steps"], len(result["steps"])
    how = "from records" if recorded == steps else "from text" if not recorded else f"{recorded} of {steps} recorded"
    used = ", ".join(f"{name} = {settings[name]:g}" for name in ("theta", "alpha_min", "beta"))
    table = Table(title=escape(plain(result["title"])), caption=f"{used}; {how}", show_header=False, title_style="bold")
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    if width >= _NOTES_FROM:
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
            "matches a call of a successful sibling",
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
            "  only one success",
            _percent(totals["only_success_steps"], matched),
            "of misassigned calls; nothing in their group tells luck",
        ),
        (
            "mean lift",
            _points(totals["lift"]),
            "points; above 0: the witnesses mark what leads to success",
        ),
        ("mean similarity", _number(totals["similarity"]), "of misassigned calls to their best witness"),
        ("  only similar", _percent(totals["inexact_steps"], matched), "of misassigned calls; equal to no witness"),
        ("mean support", _number(totals["support"]), "share of the successes that hold the call"),
        ("tokens affected", _percent(totals["token_share"]), "of all that the policy wrote"),
        ("penalty removed", _percent(totals["penalty_removed"]), "of the negative advantage on failing rollouts"),
        *_grounding(totals),
        (
            "groups that cannot help",
            _percent(totals["all_right_groups"] + totals["all_wrong_groups"], groups),
            f"{_percent(totals['all_wrong_groups'], groups)} all wrong, "
            f"{_percent(totals['all_right_groups'], groups)} all right",
        ),
    ):
        table.add_row(name, value, *([note] if width >= _NOTES_FROM else []))
    return table


def _grounding(totals: Figures) -> Iterator[tuple[str, str, str]]:
    """Rows of the overview on whether tools found the answer; none where that cannot be told of any rollout."""
    if totals["told_trajectories"]:
        for figure in meaning.GROUNDING:
            yield figure.label, _written(figure, totals), figure.note


def _fitted(
    title: str, rows: Sequence[Mapping[str, str]], width: int, *, bold: int | None = None, caption: str = ""
) -> Table:
    """A table of as many columns as fit; what is left out is said below it.

    Args:
        title: printed above it.
        rows: cells by column, the same columns in each; the first column is never left out.
        width: of the terminal.
        bold: number of the row to stress.
        caption: printed below it.
    """
    names = list(rows[0]) if rows else []
    first = max(16, width // 3)  # the names of tools may be long, and are folded

    def needed() -> int:
        cells = [max(cell_len(text) for text in (name, *(row[name] for row in rows))) for name in names]
        return sum(min(cell, first) for cell in cells[:1]) + sum(cells[1:]) + 3 * len(cells) + 1

    left_out = []
    new = [figure.column for figure in meaning.columns("terminal") if figure.column not in (*_SPARED, *_KEPT)]
    for name in (*new, *_SPARED):
        if name in names[1:] and needed() > width:
            names.remove(name)
            left_out.append(name)
    if left_out:
        caption = "; ".join(filter(None, (caption, f"in a wider terminal: {', '.join(left_out)}")))
    table = Table(title=title, caption=caption or None)
    for name in names:
        if name == names[0]:
            table.add_column(name, overflow="fold", max_width=first)
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        table.add_row(*(row[name] for name in names), style="bold" if number == bold else "")
    return table


def _cells(figures: Figures) -> dict[str, str]:
    """What is said of a training step and of a tool: `verl_tapo.rule.figures.columns`."""
    cells = {"calls": f"{figures['calls']:,}", "failing": f"{figures['failing_steps']:,}"}
    for figure in meaning.columns("terminal"):
        cells[figure.column] = _written(figure, figures)
    return cells


def _by_step(steps: Sequence[Figures], width: int) -> Table:
    shown: Sequence[Figures] = steps
    title = "By training step"
    if len(steps) > _STEPS_SHOWN:
        chosen = sorted({round(k * (len(steps) - 1) / (_STEPS_SHOWN - 1)) for k in range(_STEPS_SHOWN)})
        shown = [steps[k] for k in chosen]
        title = f"By training step ({len(shown)} of {len(steps)})"
    rows = [
        {
            "step": str(of["step"]),
            **_cells(of),
            "success": _percent(of["success_rate"]),
        }
        for of in shown
    ]
    return _fitted(title, rows, width)


def _by_tool(tools: Mapping[str, Figures], width: int) -> Table:
    rows = [{"tool": escape(plain(tool[:60])), **_cells(of)} for tool, of in list(tools.items())[:_STEPS_SHOWN]]
    more = f"and {len(tools) - _STEPS_SHOWN:,} more" if len(tools) > _STEPS_SHOWN else ""
    return _fitted("By tool", rows, width, caption=more)


def _sweeps(sweeps: Sequence[Figures], settings: Figures, failing: int, width: int) -> Table:
    names = ("theta", "alpha_min", "beta")
    rows = [
        {
            **{name: f"{row[name]:g}" for name in names},
            "corrected": _percent(row["corrected_steps"], failing),
            "tokens": _percent(row["token_share"]),
            "their advantage": _number(row["mean_lifted_advantage"]),
        }
        for row in sweeps
    ]
    used = [all(row[name] == settings[name] for name in names) for row in sweeps]
    return _fitted("With other settings", rows, width, bold=used.index(True) if True in used else None)


def _problems(problems: Sequence[Mapping[str, Any]], skipped: int) -> Table:
    table = Table(title=f"Not read: {skipped:,} line{'s' * (skipped != 1)}")
    for name in ("file", "line", "why"):
        table.add_column(name, overflow="fold")
    for problem in problems[:_PROBLEMS_SHOWN]:
        line = problem["line"]
        where = ("" if line is None else str(line), escape(plain(problem["reason"])))
        table.add_row(escape(plain(problem["file"])), *where)
    if len(problems) > _PROBLEMS_SHOWN:
        table.caption = f"and {len(problems) - _PROBLEMS_SHOWN:,} more; --json lists them"
    return table
