"""The benchmarks, at sizes at which their figures mean nothing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from measuring import Fact, Part, Sweep, medians, sweep
from PIL import Image
from rendering import markdown, write_readme

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run():
    """The command's ``main``, in this process: importing veRL once more takes longer than what is tested."""
    spec = importlib.util.spec_from_file_location("run_benchmarks", BENCHMARKS / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


@pytest.mark.long
def test_parts_are_measured_and_kept(run, tmp_path):
    run("--quick", "--only", "credit", "parsing", "--out", tmp_path)
    first = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert list(first) == ["credit", "parsing"]
    for part in first.values():
        for costs in (costs for each in part["sweeps"] for costs in each["costs"].values()):
            assert all(cost > 0 for cost in costs)
    for name in first:
        assert Image.open(tmp_path / f"{name}.png").size[0] > 300
    run("--quick", "--only", "auditing", "--out", tmp_path)
    second = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert list(second) == ["credit", "parsing", "auditing"]
    assert second["credit"] == first["credit"]
    memory = second["auditing"]["sweeps"][1]
    assert memory["unit"] == "MB"
    assert all(50 < size < 2000 for size in memory["costs"]["audit"])


@pytest.mark.long
def test_what_the_recipe_needs_is_measured(run, tmp_path):
    run("--quick", "--only", "tool_path", "retrieval", "--out", tmp_path)
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert [len(part["sweeps"]) for part in parts.values()] == [2, 2]


@pytest.mark.long
def test_the_plug_in_s_own_import_is_found():
    from parts.importing import import_times

    own, whole = import_times()
    assert 0 < own < whole


def test_quick_results_are_never_published(run):
    before = (BENCHMARKS / "README.md").read_bytes()
    with pytest.raises(SystemExit):
        run("--quick")
    assert (BENCHMARKS / "README.md").read_bytes() == before


def test_functions_take_turns():
    turns = []
    assert len(medians(lambda: turns.append("a"), lambda: turns.append("b"), repeats=2)) == 2
    assert turns == ["a", "b"] * 3


def test_a_sweep_is_divided_by_what_it_did():
    made = sweep("things", "nothing", [1, 10], lambda size: {"ours": int, "theirs": list}, 1, lambda size: 10**9)
    assert all(cost < 1e-3 for costs in made.costs.values() for cost in costs)


def test_tables_hold_figures_ratios_and_bounds(tmp_path):
    found = Sweep("rows", "all else", "ms", [1, 2000], {"ours": [1.0, 512.4], "theirs": [2.0, 0.012345]})
    text = markdown("speed", Part("Speed", "Of us.", [found], [Fact("all", "3 ms", "5 ms")]))
    assert "| rows | ours (ms) | theirs (ms) | ours / theirs |\n| --- | --- | --- | --- |\n| 1 | 1 | 2 | 0.50 |" in text
    assert "| 2,000 | 512 | 0.0123 | 41506.68 |" in text
    assert "| all | 3 ms | 5 ms |" in text
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results: made by run.py -->\nold\n<!-- end of results -->\nafter\n")
    for _ in range(2):
        write_readme(readme, "a machine", {"speed": text})
    lines = readme.read_text().splitlines()
    assert (lines[0], lines[3], lines[-1]) == ("before", "a machine", "after")
    assert "old" not in lines
    assert lines.count("## Speed") == 1
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the lines"):
        write_readme(readme, "a machine", {})


def test_the_readme_shows_the_results_that_are_there():
    results = json.loads((BENCHMARKS / "results" / "results.json").read_text())
    text = (BENCHMARKS / "README.md").read_text()
    assert results["machine"] in text
    for name, part in results["parts"].items():
        assert markdown(name, Part(part["title"], part["text"], *_read(part))) in text
        assert not part["sweeps"] or (BENCHMARKS / "results" / f"{name}.png").exists()


def _read(part):
    return [Sweep(**each) for each in part["sweeps"]], [Fact(**fact) for fact in part["facts"]]
