"""Measures the cost of each part of verl-tapo against its alternative in the same run, on growing
work.

python benchmarks/run.py                         # all parts; writes results/ and the tables of README.md
python benchmarks/run.py --only credit parsing   # these parts; the others' results stay
python benchmarks/run.py --quick --out /tmp/b    # small sizes, to see whether it works
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for folder in (ROOT / "tests", ROOT):
    sys.path.insert(0, str(folder))
# The retrieval service is a process of its own.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

from measuring import Fact, Part, Sweep  # noqa: E402
from rendering import markdown, plot, write_readme  # noqa: E402

PARTS = ("credit", "parsing", "auditing", "tool_path", "retrieval", "importing")


def machine() -> str:
    """Returns the place, the time and the load from other processes."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, verl {version('verl')}"
    return (
        f"Medians, taken in turn, on {os.cpu_count()} cores ({platform.machine()}; load before it began: {load}), "
        f"{torch.get_num_threads()} threads, {versions}, {time.strftime('%B %Y')}."
    )


def load(file: Path) -> dict[str, Part]:
    """Returns earlier measurements, by part."""
    if not file.exists():
        return {}
    parts = json.loads(file.read_text(encoding="utf-8"))["parts"]
    return {
        name: Part(
            part["title"],
            part["text"],
            [Sweep(**sweep) for sweep in part["sweeps"]],
            [Fact(**fact) for fact in part["facts"]],
        )
        for name, part in parts.items()
        if name in PARTS
    }


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts")
    parser.add_argument("--quick", action="store_true", help="small sizes; the figures mean nothing")
    parser.add_argument("--out", type=Path, help="where to write (default: results/ and README.md beside this file)")
    arguments = parser.parse_args(argv)
    if arguments.quick and arguments.out is None:
        parser.error("--quick measures nothing worth keeping: say where to with --out")
    out = arguments.out or HERE / "results"
    out.mkdir(parents=True, exist_ok=True)
    where = machine()
    parts = load(out / "results.json")
    for name in arguments.only:
        start = time.monotonic()
        parts[name] = import_module(f"parts.{name}").measure(arguments.quick)
        print(f"{markdown(name, parts[name])}\n\n({name}: {time.monotonic() - start:.0f} s)\n", flush=True)
        if parts[name].sweeps:
            plot(parts[name], out / f"{name}.png")
    parts = {name: parts[name] for name in PARTS if name in parts}
    results = {"machine": where, "parts": {name: asdict(part) for name, part in parts.items()}}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if arguments.out is None:
        write_readme(HERE / "README.md", where, {name: markdown(name, part) for name, part in parts.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
