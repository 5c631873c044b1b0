"""Imports go downwards only: which module may import which, read from the sources."""

import ast
from pathlib import Path

import pytest

import verl_tapo
from verl_tapo.cpu import ROLLOUT_NAME

ROOT = Path(verl_tapo.__file__).parent.parent
FLOORS = [
    {"rule"},
    {"answers"},
    {"settings"},
    {"calls", "text_files"},
    {"records"},
    {"step_records"},
    {"trainer"},
    {"rollout"},
    {"model_check"},
    {"audit"},
    {"plugin"},
    {"selftest"},
    {"cli"},
]
BESIDE = {"cpu"}
TOUCH_VERL = {"trainer", "rollout", "model_check", "selftest", "cpu"}
MODULES = sorted((ROOT / "verl_tapo").rglob("*.py"))


def room_of(name):
    """The part of verl_tapo that a module's dotted name is in."""
    return name.split(".")[1] if "." in name else ""


def imports(path):
    """The dotted names of modules that a file imports, anywhere in it but for type checkers only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from verl_tapo import cpu` names a module, `from verl_tapo import __version__` none.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_imports_go_downwards(path):
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    own = room_of(module_of(path))
    for name in imports(path):
        room = room_of(name)
        if not name.startswith("verl_tapo.") or room == own or own in ("__init__", "conf") or room == "__version__":
            continue
        assert not {own, room} & BESIDE, f"{own} and {room} stand beside each other"
        assert floor[room] < floor[own], f"{own} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_only_adapters_import_verl(path):
    if room_of(module_of(path)) not in TOUCH_VERL:
        assert [name for name in imports(path) if name.split(".")[0] == "verl"] == []


def test_every_room_has_a_floor():
    rooms = {room_of(module_of(path)) for path in MODULES} - {"__init__", "conf"}
    assert rooms == set().union(*FLOORS) | BESIDE


def test_the_agent_loop_knows_the_name_of_the_cpu_s_engine():
    """A literal there, for the agent loop does not import the package for CPUs."""
    text = (ROOT / "verl_tapo" / "rollout" / "tool_agent.py").read_text()
    assert f'_REPRODUCIBLE_ENGINE = "{ROLLOUT_NAME}"' in text
