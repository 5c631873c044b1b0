"""Checks of a run's tools: whether veRL can load them, and whether ``algorithm.tapo.tools`` speaks of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from verl_tapo.rule.checks import hint
from verl_tapo.rule.config import TapoConfig
from verl_tapo.rule.names import acquires_information, default_kernel
from verl_tapo.trainer.monitor import RECORDING_LOOP, shown_kernels, unrecorded
from verl_tapo.trainer.verl_parser import read_yaml

Parameters = Mapping[str, Collection[str]]
"""The parameters of each tool, by its schema."""

_ROWS_LOOKED_AT = 100
_LONGEST_ROW = 1 << 24  # characters


def _paths(config: Any) -> tuple[str | None, str | None]:
    multi_turn = config.actor_rollout_ref.rollout.multi_turn
    return multi_turn.get("tool_config_path", None), multi_turn.get("function_tool_path", None)


def config_problems(config: Any) -> tuple[list[str], Parameters | None]:
    """Returns what in the file ``multi_turn.tool_config_path`` would end the run, without loading
    the tools.

    Returns:
        The problems, and the tools' parameters where the files say all of them: None where some come from code.
    """
    path, functions = _paths(config)
    if path is None:
        return [], None
    setting = f"actor_rollout_ref.rollout.multi_turn.tool_config_path={path}"
    try:
        entries = read_yaml(path)
        listed = entries["tools"] if isinstance(entries, Mapping) else None
    except Exception as error:  # the file system's, YAML's, OmegaConf's
        return [f"{setting} cannot be read: {_line(error)}"], None
    if not isinstance(listed, list):
        return [f"{setting} has no list `tools`"], None
    problems = []
    parameters: dict[str, Collection[str]] = {}
    complete = functions is None
    for number, entry in enumerate(listed):
        problem = _entry_problem(entry)
        if problem is not None:
            problems.append(f"{setting}: tools[{number}] {problem}")
            continue
        known = _function(entry)
        if known is None:
            complete = False
        else:
            parameters[known[0]] = known[1]
    return problems, parameters if complete and not problems else None


def _function(entry: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """Name and parameters of a tool of the file, by its ``tool_schema`` or, without one, its class's ``schema``."""
    function: Any = (entry.get("tool_schema") or {}).get("function") or getattr(_class(entry), "schema", None)
    try:
        properties = (function.get("parameters") or {}).get("properties") or {}
        return (function["name"], list(properties)) if isinstance(function["name"], str) else None
    except (AttributeError, LookupError, TypeError):  # the class is a stranger's
        return None


def _class(entry: Mapping[str, Any]) -> Any:
    """Returns the tool's class. None if it cannot be imported, which veRL reports."""
    module, _, name = entry["class_name"].rpartition(".")
    try:
        return getattr(import_module(module), name, None)
    except (Exception, SystemExit):  # whatever a stranger's module does
        return None


def declared_kernels(config: Any) -> dict[str, dict[str, Any]] | None:
    """Returns ``algorithm.tapo.tools`` as the classes of the run's tools declare it.

    A class may have an attribute ``kernels``: ``{parameter: kernel}``, or None for a tool that
    takes no part. Tools whose classes have no such attribute are decided by name.

    Returns:
        None where no class declares any, or where the tools do not load.
    """
    path, functions = _paths(config)
    if path is None or config_problems(config)[0]:
        return None
    declared: dict[str, Any] = {}
    parameters: Parameters = {}
    complete = functions is None
    for entry in read_yaml(path)["tools"]:
        known, cls = _function(entry), _class(entry)
        complete &= known is not None
        if known is not None:
            parameters = {**parameters, known[0]: known[1]}
            if hasattr(cls, "kernels"):
                declared[known[0]] = cls.kernels
    if not declared:
        return None
    try:
        parameters = parameters if complete else load(config) or {}
    except ValueError:
        return None
    by_name = {
        tool: {name: default_kernel(name, names) for name in names}
        for tool, names in parameters.items()
        if acquires_information(tool)
    }
    return {tool: dict(kernels) for tool, kernels in {**by_name, **declared}.items() if kernels is not None}


def _entry_problem(entry: Any) -> str | None:
    """Returns what is wrong with one tool of the file, read as veRL reads it."""
    from verl.tools.schemas import OpenAIFunctionToolSchema
    from verl.tools.tool_registry import ToolType

    if not isinstance(entry, Mapping) or not isinstance(entry.get("class_name"), str):
        return "has no class_name"
    name = entry["class_name"]
    settings = entry.get("config")
    types = ", ".join(kind.value for kind in ToolType)
    if not isinstance(settings, Mapping) or "type" not in settings:
        return f"({name}) has no config.type, which veRL asks for; known: {types}"
    if settings["type"] not in {kind.value for kind in ToolType}:
        return f"({name}): config.type={settings['type']!r} is not known; known: {types}"
    module = name.rpartition(".")[0]
    try:
        found = bool(module) and find_spec(module) is not None
    except Exception:  # a parent that cannot be imported
        found = False
    if not found:
        return f"({name}): there is no module {module or name!r}; is its folder on PYTHONPATH?"
    if entry.get("tool_schema") is not None:
        try:
            OpenAIFunctionToolSchema.model_validate(entry["tool_schema"])
        except Exception as error:  # pydantic's
            return f"({name}): its tool_schema is invalid: {_line(error)}"
    return None


def load(config: Any) -> Parameters | None:
    """The tools' parameters, see `load_schemas`."""
    schemas = load_schemas(config)
    if schemas is None:
        return None
    return {schema.function.name: list(schema.function.parameters.properties) for schema in schemas}


def load_schemas(config: Any) -> list[Any] | None:
    """Loads the tools as veRL's agent loops do, including their constructors, and returns their
    schemas, veRL's objects; None if none are configured.

    Raises:
        ValueError: veRL cannot load them.
    """
    from verl.tools.tool_registry import load_all_tools
    from verl.utils.import_utils import resolve_config_path

    path, functions = _paths(config)
    if path is None and functions is None:
        return None
    try:
        tools = load_all_tools(*(None if given is None else resolve_config_path(given) for given in (path, functions)))
        return [tool.tool_schema for tool in tools]
    except (Exception, SystemExit) as error:  # whatever a tool's constructor raises
        given = " and ".join(filter(None, (path, functions)))
        raise ValueError(f"veRL cannot load the tools of {given}: {type(error).__name__}: {_line(error)}") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def rule_problems(rule: TapoConfig, tools: Parameters) -> Iterator[str]:
    """Tools and parameters of ``algorithm.tapo.tools`` that no configured tool has."""
    for tool, kernels in (rule.tools or {}).items():
        if tool not in tools:
            yield f"algorithm.tapo.tools.{tool}: no configured tool has that name{hint(tool, tools)}"
            continue
        for parameter in kernels or {}:
            if parameter not in tools[tool]:
                closest = hint(parameter, tools[tool])
                yield f"algorithm.tapo.tools.{tool}.{parameter}: the tool has no such parameter{closest}"


def participation(rule: TapoConfig, tools: Parameters) -> Iterator[tuple[str, str]]:
    """Returns for each configured tool whether it takes part in the rule, and its kernels."""
    for tool, parameters in tools.items():
        if not rule.takes_part(tool):
            why = "its name says that it acts" if rule.tools is None else "not in algorithm.tapo.tools"
            yield tool, f"left out: {why}"
            continue
        given = (rule.tools or {}).get(tool) or {}
        kernels = {
            name: given.get(name, "exact") if rule.tools is not None else default_kernel(name, parameters)
            for name in parameters
        }
        yield tool, "takes part: " + (shown_kernels({"": kernels}).strip(" ()") or "no parameters")


def recording_warning(config: Any) -> str | None:
    """Returns a warning if the data set's column ``agent_name`` overrides the recording agent loop."""
    agent = config.actor_rollout_ref.rollout.get("agent", None) or {}
    if agent.get("default_agent_loop", None) != RECORDING_LOOP:
        return None
    files = config.get("data", {}).get("train_files", None) or []
    named = {name for path in ([files] if isinstance(files, str) else list(files)) for name in _agent_names(str(path))}
    others = sorted(named - {RECORDING_LOOP} - _redefined(agent.get("agent_loop_config_path", None)))
    return unrecorded(others) if others else None


def _redefined(path: str | None) -> set[str]:
    """Names of agent loops that the run gives another loop to, which may record."""
    try:
        return set() if path is None else {entry["name"] for entry in read_yaml(path)}
    except Exception:  # veRL will complain
        return set()


def _agent_names(file: str) -> set[str]:
    """Returns the column ``agent_name`` of a data file's first rows; empty if they cannot be read."""
    try:
        path = Path(file).expanduser()
        if not path.is_file():
            return set()
        rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
        return {str(row["agent_name"]) for row in rows if isinstance(row, dict) and row.get("agent_name") is not None}
    except Exception:  # not such a file after all; veRL will complain
        return set()


def _parquet_rows(path: Path) -> Sequence[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        if "agent_name" not in file.schema_arrow.names:
            return []
        batch = next(file.iter_batches(_ROWS_LOOKED_AT, columns=["agent_name"]), None)
        return [] if batch is None else list(batch.to_pylist())


def _json_rows(path: Path) -> Sequence[Any]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        lines = islice(iter(lambda: file.readline(_LONGEST_ROW), ""), _ROWS_LOOKED_AT)
        return [json.loads(line) for line in lines if line.strip()]
