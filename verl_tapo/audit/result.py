"""The audit of a run: figures as pandas frames, plots, and files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_tapo.audit.analysis import StepAnalysis
from verl_tapo.audit.html import summary_html, write_report
from verl_tapo.step_records import json_value

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

GATE_NAMES = {"corrected": "corrected", "below_alpha": "below alpha_min", "below_theta": "below theta"}
_COLOURS = {"corrected": "#1b7837", "below_alpha": "#c28a00", "below_theta": "#7a7a7a"}


def call_rows(analysis: StepAnalysis) -> list[dict[str, Any]]:
    """A row for each call of a training step, as in `Audit.calls`."""
    rows = []
    for judged in analysis.calls:
        call, credit = judged.call, judged.credit
        compared, matched = credit.compared, credit.matched
        rows.append(
            {
                "step": analysis.batch.step,
                "group": judged.holder.group,
                "trajectory": judged.holder.name,
                "call": judged.place[1],
                "tool": call.tool,
                "arguments": json.dumps(json_value(dict(call.arguments)), ensure_ascii=False),
                "status": call.status,
                "seen": call.seen,
                "success": judged.holder.success,
                "grounded": judged.holder.grounded,
                "role": credit.role,
                "gate": credit.gate,
                "similarity": credit.similarity if compared else None,
                "support": credit.support if matched else None,
                "alpha": credit.alpha if matched else None,
                "reference_advantage": credit.reference_advantage if matched else None,
                "lift": judged.lift,
                "lucky": judged.lucky,
                "transfer": credit.transfer,
                "before": judged.holder.advantage,
                "after": judged.after,
            }
        )
    return rows


@dataclass(repr=False)
class Audit:
    """What an audit found. In a notebook it shows its main figures and findings."""

    result: Mapping[str, Any]
    """Everything, as JSON can hold it (version 1): ``settings``, ``steps`` and ``totals`` and ``tools`` (the figures of
    `verl_tapo.audit.analysis.figures`), ``similarity_histogram``, ``support_alpha``, ``sweeps``, ``warnings``,
    ``problems``, ``skipped``, ``sources``, ``left_out``, and ``groups``, the prompt groups with their texts."""
    _calls: list[dict[str, Any]] | None

    def __repr__(self) -> str:
        totals, codes = self.result["totals"], [warned["code"] for warned in self.result["warnings"]]
        return (
            f"<Audit of {self.result['title']!r:.80}: {len(self.result['steps']):,} training steps, "
            f"{totals['trajectories']:,} rollouts, {totals['calls']:,} calls; of {totals['failing_steps']:,} failing "
            f"calls {totals['misassigned_steps']:,} misassigned, {totals['corrected_steps']:,} corrected; "
            f"findings: {', '.join(codes) or 'none'}>"
        )

    def _repr_html_(self) -> str:
        return summary_html(self.result)

    @property
    def steps(self) -> pandas.DataFrame:
        """Figures by training step."""
        return frame_of(self.result["steps"]).set_index("step")

    @property
    def tools(self) -> pandas.DataFrame:
        """Figures by tool, the most used first."""
        frame = frame_of([{"tool": tool, **figures} for tool, figures in self.result["tools"].items()])
        return frame.set_index("tool") if len(frame) else frame

    @property
    def sweeps(self) -> pandas.DataFrame:
        """What other settings would do."""
        return frame_of(self.result["sweeps"])

    @property
    def calls(self) -> pandas.DataFrame:
        """A row for each call.

        Raises:
            ValueError: where the audit was made with ``keep_calls=False``.
        """
        if self._calls is None:
            raise ValueError("the calls were not kept: audit(..., keep_calls=True)")
        return frame_of(self._calls)

    @property
    def warnings(self) -> pandas.DataFrame:
        """What it warns of: ``code``, ``level``, ``text``, ``advice``; the gravest first."""
        return frame_of(self.result["warnings"], ["code", "level", "text", "advice"])

    def write_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the report, one file that needs no network, see `verl_tapo.audit.html`."""
        write_report(self.result, Path(path))

    def to_json(self) -> bytes:
        """`result` as JSON."""
        text = json.dumps(self.result, ensure_ascii=False, allow_nan=False, indent=1)
        return text.encode("utf-8", "backslashreplace") + b"\n"  # lone surrogates, as JSON escapes them

    def plot_steps(self, ax: Axes | None = None) -> Axes:
        """Shares of failing calls that are misassigned and corrected, success rate and lift, over training steps."""
        ax, steps = _axes(ax), self.steps
        failing = steps["failing_steps"].where(steps["failing_steps"] > 0)
        for label, values, style in (
            ("failing calls misassigned", steps["misassigned_steps"] / failing, "-"),
            ("failing calls corrected", steps["corrected_steps"] / failing, "--"),
            ("success rate", steps["success_rate"], ":"),
            ("lift of the witnesses", steps["lift"], "-."),
        ):
            ax.plot(steps.index, values.astype(float), style, label=label, marker="." if len(steps) < 40 else "")
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set(xlabel="training step", ylabel="share")
        ax.legend()
        return ax

    def plot_similarity(self, ax: Axes | None = None) -> Axes:
        """How similar failing calls are to their best witness, and what became of them."""
        ax, histogram = _axes(ax), self.result["similarity_histogram"]
        edges, below = histogram["edges"], [0] * 20
        for gate, name in GATE_NAMES.items():
            counts = histogram[gate]
            ax.bar(edges[:-1], counts, 0.05, below, align="edge", label=name, color=_COLOURS[gate], edgecolor="white")
            below = [low + count for low, count in zip(below, counts, strict=True)]
        theta = self.result["settings"]["theta"]
        ax.axvline(theta, color="black", linestyle="--", label=f"theta = {theta:g}")
        ax.set(xlabel="similarity to the best witness", ylabel="failing calls")
        ax.legend()
        return ax

    def plot_support(self, ax: Axes | None = None) -> Axes:
        """Similarity and support of matched failing calls, with the gate at ``alpha_min``."""
        ax, settings = _axes(ax), self.result["settings"]
        for gate, marker in (("corrected", "o"), ("below_alpha", "x")):
            points = [(alike, support) for support, alike, of in self.result["support_alpha"] if of == gate]
            if points:
                alike, support = zip(*points, strict=True)
                ax.scatter(alike, support, s=14, c=_COLOURS[gate], marker=marker, alpha=0.5, label=GATE_NAMES[gate])
        similarities = [number / 100 for number in range(1, 101)]
        ax.plot(
            similarities,
            [settings["alpha_min"] / similarity for similarity in similarities],
            "k--",
            label=f"alpha_min = {settings['alpha_min']:g}",
        )
        ax.set(xlabel="similarity", ylabel="support", xlim=(min(settings["theta"], 0.95) - 0.05, 1.02), ylim=(0, 1.05))
        ax.legend()
        return ax

    def plot_tools(self, ax: Axes | None = None) -> Axes:
        """Failing calls by tool, and how many of them are misassigned and corrected."""
        ax, tools = _axes(ax), self.tools
        for offset, (column, label) in enumerate(
            (("failing_steps", "failing"), ("misassigned_steps", "misassigned"), ("corrected_steps", "corrected"))
        ):
            places = [number + 0.27 * (offset - 1) for number in range(len(tools))]
            ax.barh(places, tools[column] if len(tools) else [], 0.27, label=label)
        ax.set_yticks(range(len(tools)), list(tools.index))
        ax.invert_yaxis()
        ax.set(xlabel="calls")
        ax.legend()
        return ax

    def plot_sweep(self, name: str = "theta", ax: Axes | None = None) -> Axes:
        """Corrected calls over one setting, the others as they are.

        Args:
            name: ``beta``, ``theta`` or ``alpha_min``; over ``beta`` the corrected calls' mean advantage.
            ax: to draw on.
        """
        names = ("beta", "theta", "alpha_min")
        if name not in names:
            raise ValueError(f"name must be one of {', '.join(names)}, got {name!r}")
        ax, sweeps, used = _axes(ax), self.sweeps, self.result["settings"]
        for other in names:
            if other != name:
                sweeps = sweeps[sweeps[other] == used[other]]
        column = "mean_lifted_advantage" if name == "beta" else "corrected_steps"
        ax.plot(sweeps[name], sweeps[column].astype(float), "o-")
        ax.axvline(used[name], color="black", linestyle="--", label=f"in use: {used[name]:g}")
        ax.set(xlabel=name, ylabel=column.replace("_", " "))
        ax.legend()
        return ax


def frame_of(rows: Iterable[Mapping[str, Any]], columns: list[str] | None = None) -> pandas.DataFrame:
    """Rows as a frame. A lone surrogate, which a model can write as an escape in JSON, fits into none: it is a "?"."""
    import pandas

    return pandas.DataFrame([{name: _whole(value) for name, value in row.items()} for row in rows], columns=columns)


def _whole(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) and not value.isascii() else value


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    made: Axes = plt.subplots()[1]
    return made
