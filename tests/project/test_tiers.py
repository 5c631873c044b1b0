"""When tests are run: the order of the long ones, and which of them are skipped where no time is left."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import rotated

SUITE = """
import pytest

def test_short():
    pass

@pytest.mark.long
def test_long():
    pass
"""


@pytest.mark.parametrize("count", range(1, 14))
@pytest.mark.parametrize("day", [0, 1, 739_581])
def test_what_is_skipped_today_runs_tomorrow(count, day):
    units = list(range(count))
    today, tomorrow = rotated(units, day), rotated(units, day + 1)
    assert sorted(today) == sorted(tomorrow) == units
    time_for = count // 2 + 1
    assert not set(today[time_for:]) & set(tomorrow[time_for:])


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 6, 7, 8, 11])
def test_each_comes_first_some_day_however_often_tests_run(count, every):
    units = list(range(count))
    assert {rotated(units, day)[0] for day in range(0, 20 * every, every)} == set(units)


@pytest.mark.long
@pytest.mark.parametrize(("until", "skipped"), [(None, False), ("1", True), ("99999999999", False)])
def test_long_tests_come_last_and_are_skipped_by_name_after_the_deadline(tmp_path, until, skipped):
    for name in ("test_a.py", "test_b.py"):
        (tmp_path / name).write_text(SUITE)
    (tmp_path / "conftest.py").write_text((Path(__file__).parents[1] / "conftest.py").read_text(encoding="utf-8"))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = long\naddopts = --import-mode=importlib\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TESTS_", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment | ({} if until is None else {"TESTS_UNTIL": until}),
        capture_output=True,
        text=True,
        check=True,
    )
    order = [line.split("::")[1].split()[0] for line in done.stdout.splitlines() if "::" in line and "%]" in line]
    assert order == ["test_short", "test_short", "test_long", "test_long"]
    assert ("no time was left" in done.stdout) is skipped
    assert ("2 skipped" in done.stdout) is skipped


@pytest.mark.long
def test_output_that_is_no_text_passes_between_test_processes(tmp_path):
    (tmp_path / "test_a.py").write_text(
        "import logging\n\ndef test_a():\n    logging.warning('half a \\ud83d pair')\n    raise ValueError('\\udc00')\n"
    )
    (tmp_path / "conftest.py").write_text((Path(__file__).parents[1] / "conftest.py").read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--numprocesses", "1", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "INTERNALERROR" not in done.stdout
    assert "1 failed" in done.stdout
    assert "half a \\ud83d pair" in done.stdout
