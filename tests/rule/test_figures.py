"""A figure is told of in one place, from which the logger, the audit and the documentation have it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from verl_tapo import TapoConfig, transfer_credit
from verl_tapo.audit import audit, terminal
from verl_tapo.rule import figures
from verl_tapo.rule.figures import FIGURES, FOUND, GROUNDING, NLL, TOKEN_SHARES, Figure
from verl_tapo.rule.report import StepCredit
from verl_tapo.selftest.random_batches import random_batch

DOCS = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


def undocumented():
    """Names of figures of which ``docs/metrics.md`` says something else, or nothing."""
    logged = (*FIGURES, *GROUNDING, *NLL.values(), *TOKEN_SHARES.values())
    names = [(figure.name, figure) for figure in logged] + [("grounding/tool/<tool>/found", FOUND)]
    rows = {
        name: f"| `tapo/{name}`{' †' * (of.of_nothing is None and of is not figures.TOLD)} | {of.meaning} | {of.span} |"
        for name, of in names
    }
    return [name for name, row in rows.items() if row not in DOCS]


def test_the_documentation_says_the_same():
    assert undocumented() == []


def test_each_is_made_of_what_is_counted():
    names = [figure.name for figure in FIGURES]
    assert len(set(names)) == len(names)
    misassigned = 0
    for seed in range(10):
        base, mask, index, success, steps = random_batch(seed, rows=20)
        report = transfer_credit(base, mask, index, success, steps, TapoConfig(theta=0.3, alpha_min=0.0))[1]
        counts = figures.counts_of(report.facts)
        by_tool = figures.counts_by_tool(report.facts)
        assert by_tool.keys() == {step.tool for step in steps}
        for name, value in counts.items():
            assert sum(of[name] for of in by_tool.values()) == pytest.approx(value)
        credits = report.steps
        misassigned += counts["misassigned_steps"]
        assert counts["misassigned_steps"] == sum(credit.matched for credit in credits)
        assert counts["misassigned_steps"] == counts["below_alpha_steps"] + counts["corrected_steps"]
        assert counts["similarity_sum"] == pytest.approx(sum(c.similarity for c in credits if c.matched))
        assert counts["calls"] == len(steps)
    assert misassigned > 0


@pytest.mark.parametrize(
    ("gate", "matched", "compared"),
    [("", 0, 0), ("no_witness", 0, 0), ("below_theta", 0, 1), ("below_alpha", 1, 1), ("corrected", 1, 1)],
)
def test_what_a_gate_says(gate, matched, compared):
    credit = StepCredit(0, "search", "failing", gate, 0.0, 0.0, 0.0, 0.0, 0.0, None)
    assert (credit.matched, credit.compared) == (matched, compared)


MADE_UP = Figure(
    "made_up",
    "made_up_steps",
    "misassigned_steps",
    "share of misassigned steps that all successes of the prompt made",
    of_nothing=None,
    by_tool=True,
    column="made up",
)


@pytest.fixture
def made_up(monkeypatch):
    """What it takes to add a figure."""
    counts = {**figures.COUNTS, "made_up_steps": lambda facts: facts.matched & (facts.support == 1)}
    monkeypatch.setattr(figures, "COUNTS", counts)
    FIGURES.append(MADE_UP)
    yield MADE_UP
    FIGURES.remove(MADE_UP)


def test_a_new_figure_is_everywhere(made_up, tmp_path, capsys):
    """In the metrics, also by tool; in the audit's result, frames, tables and page; the docs' check misses it."""
    # All successes of p made the call that fails, and half of those of q.
    calls = ["p Oman 1", "p Oman 1", "p Oman 0", "q Oman 1", "q Peru 1", "q Peru 0"]
    lines = []
    for number, (uid, query, score) in enumerate(map(str.split, calls)):
        said = json.dumps({"name": "search", "arguments": {"query": query}})
        text = f"<tool_call>\n{said}\n</tool_call>\nuser\n<tool_response>\nA\n</tool_response>\nassistant\nend"
        lines.append({"input": "q?", "output": text, "score": score, "step": 1, "uid": f"{uid}_{number}_0"})
    (tmp_path / "1.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = audit(tmp_path / "1.jsonl")
    assert (found.result["totals"]["misassigned_steps"], found.result["totals"]["made_up_steps"]) == (2, 1)
    assert found.tools["made_up_steps"].tolist() == found.steps["made_up_steps"].tolist() == [1]
    terminal.show(found.result, Console(width=200))
    for table in capsys.readouterr().out.split("By t")[1:]:
        head, row = (re.split("[│┃]", table.splitlines()[line]) for line in (2, 4))
        assert dict(zip(map(str.strip, head), map(str.strip, row), strict=True))["made up"] == "50.0%"
    found.write_html(tmp_path / "report.html")
    page = re.search(r'data-kind="columns">(.*?)</script>', (tmp_path / "report.html").read_text())
    assert [column["meaning"] for column in json.loads(page[1]) if column["name"] == "made_up"] == [made_up.meaning]

    base, mask, index, success, steps = random_batch(3, rows=40)
    report = transfer_credit(base, mask, index, success, steps, TapoConfig(theta=0.3, alpha_min=0.0))[1]
    matched = [credit for credit in report.steps if credit.matched]
    expected = sum(credit.support == 1 for credit in matched) / len(matched)
    assert 0 < expected < 1
    metrics = report.metrics()
    assert metrics["tapo/made_up"] == pytest.approx(expected)
    assert {f"tapo/tool/{credit.tool}/made_up" for credit in matched} <= metrics.keys()

    assert undocumented() == ["made_up"]
