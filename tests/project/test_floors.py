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


def everything_of(module, trainer):
    """The modules that an adapter may load, its own package's transitively."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        path = ROOT / (name.replace(".", "/") + ".py")
        if name in found or not path.exists():
            continue
        found.add(name)
        for full in imports(path):
            # `from verl_tapo.trainer.v0 import name`: the module, and what may be one.
            waiting += [part for part in (full, full.rpartition(".")[0]) if not _other_adapter(name, part, trainer)]
            found.add(full)
    return found


def _other_adapter(importer, name, trainer):
    """The estimator hands a patched veRL's batch to the adapter of the trainer that it came from."""
    return importer == "verl_tapo.trainer.estimator" and name in {"verl_tapo.trainer.v0", "verl_tapo.trainer.v1"} - {
        f"verl_tapo.trainer.{trainer}"
    }


@pytest.mark.parametrize(
    ("trainer", "foreign"),
    [
        ("v0", ("verl_tapo.trainer.v1", "verl.trainer.ppo.v1", "transfer_queue", "verl.trainer.main_ppo_sync")),
        ("v1", ("verl_tapo.trainer.v0", "verl.trainer.ppo.ray_trainer", "verl.experimental.separation")),
    ],
)
def test_an_adapter_imports_nothing_of_the_other_trainer(trainer, foreign):
    """VeRL may drop either: what is shared imports neither."""
    loaded = everything_of(f"verl_tapo.trainer.{trainer}", trainer)
    assert f"verl_tapo.trainer.{trainer}" in loaded
    assert "verl_tapo.trainer.batch" in loaded
    assert "verl.protocol.DataProto" in loaded
    assert [name for name in sorted(loaded) if name.startswith(foreign)] == []


def test_every_room_has_a_floor():
    rooms = {room_of(module_of(path)) for path in MODULES} - {"__init__", "conf"}
    assert rooms == set().union(*FLOORS) | BESIDE


def test_the_agent_loop_knows_the_name_of_the_cpu_s_engine():
    """A literal there, for the agent loop does not import the package for CPUs."""
    text = (ROOT / "verl_tapo" / "rollout" / "tool_agent.py").read_text()
    assert f'_REPRODUCIBLE_ENGINE = "{ROLLOUT_NAME}"' in text
