"""The nodes of a Ray cluster: waits for them, says which lacks what a run needs, and which has gone.

    python -m search_backends.nodes wait 2 --limit 300
    python -m search_backends.nodes check 2 /data/train.parquet /recipe
    python -m search_backends.nodes watch 2                                 # ends when one has gone

The cluster is that of ``$RAY_ADDRESS``, ADDRESS:PORT of the first node. Exit code 1, with a line a problem, where
something is missing.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("verl-tapo", "verl", "torch", "transformers", "ray", "TransferQueue", "vllm", "sglang")
"""A run's processes exchange objects of these, so that all nodes need the same."""
_ANSWER_S = 60.0
_LOOK_S = 5.0
_AWAY_FOR_GOOD = 4
"""Looks in a row."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the problems and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["wait", "check", "watch"])
    parser.add_argument("nodes", type=int, help="how many there should be")
    parser.add_argument("paths", nargs="*", help="files and folders that each node must see")
    parser.add_argument("--limit", type=float, default=_ANSWER_S, help="seconds to wait for them")
    arguments = parser.parse_args(argv)
    problems = list(_problems(arguments))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def _problems(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.command == "watch":
        _watch(arguments.nodes)
        yield _what_is_there(arguments.nodes)
    elif not _wait(arguments.nodes, arguments.limit):
        yield _what_is_there(arguments.nodes)
    elif arguments.command == "check":
        yield from missing(arguments.paths)


def _wait(wanted: int, limit: float) -> bool:
    """Whether they came in time."""
    end = time.monotonic() + limit
    while not (there := _are_there(wanted)) and time.monotonic() < end:
        time.sleep(1)
    return there


def _watch(wanted: int) -> None:
    """Ends once some are away for good: a busy node may fail to answer now and then."""
    away = 0
    while away < _AWAY_FOR_GOOD:
        time.sleep(_LOOK_S)
        away = 0 if _are_there(wanted) else away + 1


def _are_there(wanted: int) -> bool:
    try:
        return _listens() and sum(node["Alive"] for node in nodes()) >= max(wanted, 1)
    except Exception:  # Ray's, while its first node goes down
        return False


def _what_is_there(wanted: int) -> str:
    if not _listens():
        return (
            f"nothing listens at {os.environ.get('RAY_ADDRESS')}: the first node is down, or Ray is not started there"
        )
    here, gone = ({n["NodeManagerAddress"] for n in nodes() if n["Alive"] == alive} for alive in (True, False))
    lost = f"; gone: {', '.join(sorted(gone - here))}" if gone - here else ""
    return f"{len(here)} of {wanted} nodes are there: {', '.join(sorted(here)) or 'none'}{lost}"


def _listens() -> bool:
    """Ray itself would wait for a minute where nobody does."""
    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition(":")
    try:
        socket.create_connection((host, int(port)), 2).close()
    except (OSError, ValueError):
        return False
    return True


def nodes() -> list[Mapping[str, Any]]:
    """All nodes that the cluster has or had, as Ray describes them."""
    import ray

    if not ray.is_initialized():
        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
    found: list[Mapping[str, Any]] = ray.nodes()
    return found


def facts(paths: Iterable[str]) -> dict[str, str]:
    """What there is on this node: versions, and for each path "there" or "missing"."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return {**found, **{path: "there" if os.path.exists(path) else "missing" for path in paths}}


def missing(paths: Sequence[str]) -> Iterator[str]:
    """Yields a line for everything that another node has not as this one has it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # The other node may have no such module.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    here = facts(paths)
    asked = {}
    for node in (node for node in nodes() if node["Alive"]):
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(facts).options(num_cpus=0, scheduling_strategy=where, max_retries=0)
        asked[node["NodeManagerAddress"]] = task.remote(paths)
    end = time.monotonic() + _ANSWER_S
    for address, answer in sorted(asked.items()):
        try:
            there = ray.get(answer, timeout=max(1.0, end - time.monotonic()))
        except Exception as error:  # Ray's, of many kinds
            yield f"node {address} runs no task: {_last_line(error)}"
            continue
        for name, value in here.items():
            if name in paths and there[name] == "missing":
                yield f"node {address}: there is no {name}"
            elif name not in paths and there[name] != value:
                yield f"node {address}: {name} is {there[name]}, {value} on the node that starts the run"


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


if __name__ == "__main__":
    sys.exit(main())
