"""The study: cells x seeds, run in a pool of processes, each run once.

    python examples/credit_lab/study.py                       # what is done, what is left, and how long that takes
    python examples/credit_lab/study.py run                   # everything that is left, the important cells first
    python examples/credit_lab/study.py run main --workers 4  # one sweep, on four cores

Results are in results/<sweep>.parquet, one row per step. A run that is in any of these files is not
run again. Stop the study when you like: at most the runs under way are lost.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from rules import RULES
from training import Run, train
from world import WORLDS, world_of

HERE = Path(__file__).resolve().parent
RESULTS, WARM_STARTS = HERE / "results", HERE / "warm_starts"
KEYS = [field.name for field in fields(Run)]
LOSSES = ("vanilla", "gspo", "sapo")
SEEDS = range(10)
MANY_SEEDS = range(100, 140)
"""Seeds for telling one rule from another. They are separate, so that all of them ran on one
machine."""
TUNING_SEEDS = (1000,)
TUNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
LEARNING_RATES = {"vanilla": 4e-3, "gspo": 4e-3, "sapo": 4e-3}
"""The best for GRPO's advantages in the sweep ``tuning``; TAPO's runs take the same."""
STUDIED = ("one_hop", "two_hops")
"""Worlds of the ablations and rivals."""
FLAKY = [f"one_hop,flaky={rate}" for rate in (0.2, 0.6)]
WRONG_ANSWER = [f"one_hop,wrong_answer={rate}" for rate in (0.0, 0.6)]
KNOWN = "memory,popular=0.5"
"""A world in which half of the answers are known by heart."""
GROUPS = [f"one_hop,group={group}" for group in (4, 16)]


def _runs(
    worlds: Iterable[str],
    losses: Iterable[str],
    rules: Iterable[str],
    slower: Iterable[float] = (1,),
    seeds: Iterable[int] = SEEDS,
) -> list[Run]:
    """Returns all cells for the first seed, then all for the second, so that partial results are balanced."""
    cells = list(product(worlds, losses, rules, slower))
    return [
        Run(world, loss, rule, LEARNING_RATES[loss] / by, seed) for seed in seeds for world, loss, rule, by in cells
    ]


def sweeps() -> dict[str, list[Run]]:
    """Runs by sweep, the most important first."""
    gates = ("tapo/gate=lift", "tapo/gate=lucky")
    rivals = ("clamp", "step_groups")
    grounded = ("grpo", "tapo", "grounded")
    others = ("grounded/luck of steps", "grounded/luck of advantages")
    switches = [name for name in RULES if name not in others and (name.startswith("grounded/") or name == "calib_adv")]
    apart = (*grounded, *switches, *others, "tapo/beta=0.0", *gates, *rivals)
    ablations = [name for name in RULES if name not in apart]
    worlds = ("one_hop", "two_hops", "flaky")
    usual = [world for world in WORLDS if world != "memory"]
    cells = product(("memory", "one_hop"), (0.2, 0.4), ("chance", "reworded"))
    errors = [f"{world},{dial}={rate}" for world, rate, dial in cells]
    errors.append("memory,chance=0.2,reworded=0.2")
    tuning = [
        Run(world, loss, "grpo", rate, seed)
        for seed in TUNING_SEEDS
        for world in STUDIED
        for loss in LOSSES
        for rate in TUNING_RATES
    ]
    return {
        "tuning": tuning,
        "main": [run for loss in LOSSES for run in _runs(usual, (loss,), ("grpo", "tapo"))],
        "rivals": _runs(usual, ("vanilla",), (*rivals, *gates)),
        "rates": _runs(STUDIED, ("vanilla",), ("grpo", "tapo"), slower=(2, 4)),
        "dials": _runs([*FLAKY, *WRONG_ANSWER, *GROUPS], ("vanilla",), ("grpo", "tapo")),
        "ablations": _runs(STUDIED, ("vanilla",), ablations),
        "grounding": [
            *_runs(("lucky",), ("vanilla",), grounded, seeds=MANY_SEEDS),
            *_runs(("memory",), ("vanilla",), [*grounded, *others], seeds=MANY_SEEDS[:20]),
            *_runs(("lucky",), ("vanilla",), others, seeds=MANY_SEEDS[:20]),
            *_runs(("lucky",), ("vanilla",), [*switches, "clamp", "step_groups"], seeds=MANY_SEEDS[:20]),
            *_runs(errors, ("vanilla",), ("grounded",), seeds=MANY_SEEDS[:20]),
            *_runs(("lucky",), ("gspo", "sapo"), grounded, seeds=MANY_SEEDS),
            *_runs(worlds, ("vanilla",), grounded, seeds=MANY_SEEDS),
            *_runs(("plain",), ("vanilla",), grounded, seeds=MANY_SEEDS[:10]),
            *_runs(("memory",), ("gspo", "sapo"), grounded, seeds=MANY_SEEDS[:20]),
            *_runs(("flaky",), ("gspo", "sapo"), grounded, seeds=MANY_SEEDS[:20]),
            *_runs((KNOWN,), ("vanilla",), (*grounded, others[1]), seeds=MANY_SEEDS[:20]),
        ],
    }


def load(folder: Path) -> pd.DataFrame:
    """All results, a row a step, with the column ``sweep``; the columns of `Run` say which run a row is of.

    Runs in worlds whose dials have changed since are left out.
    """
    frames = [pd.read_parquet(file).assign(sweep=file.stem) for file in sorted(folder.glob("*.parquet"))]
    if not frames:
        return pd.DataFrame(columns=[*KEYS, "step", "seconds", "sweep"])
    results = pd.concat(frames, ignore_index=True)
    present = {world: world_of(world).dials for world in results["world"].unique()}
    return results[results["dials"] == results["world"].map(present)].reset_index(drop=True)


def done(results: pd.DataFrame) -> set[Run]:
    """The runs in ``results``."""
    rows = results[KEYS].drop_duplicates()
    return {Run(*row) for row in rows.astype(object).itertuples(index=False)}


def append(file: Path, frame: pd.DataFrame) -> None:
    """Adds a run to a file of results, all of it or nothing."""
    if file.exists():
        frame = pd.concat([pd.read_parquet(file), frame], ignore_index=True)
    temporary = file.with_suffix(".partial")
    frame.to_parquet(temporary, index=False)
    os.replace(temporary, file)


def timed(run: Run, warm_starts: Path) -> pd.DataFrame:
    """`train`, with the processor time it took in the column ``seconds``."""
    begin = time.process_time()
    frame = train(run, warm_starts)
    return frame.assign(seconds=np.float32(time.process_time() - begin))


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Exits if another study writes to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another study is writing to {folder}")
        yield
    finally:
        os.close(handle)


def run_all(wanted: dict[str, list[Run]], results: Path, warm_starts: Path, workers: int) -> None:
    """Does the runs of ``wanted`` that are missing, and appends each to its sweep's file as it
    ends."""
    with _only_one(results):
        known = done(load(results))
        left: dict[Run, str] = {}
        for sweep, runs in wanted.items():
            for run in runs:
                if run not in known:
                    left.setdefault(run, sweep)
        packages = {name: version(name) for name in ("verl-tapo", "verl", "torch", "numpy")}
        versions = {"python": platform.python_version(), **packages}
        (results / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
        begin = time.monotonic()
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            try:
                futures = {pool.submit(timed, run, warm_starts): run for run in left}
                for number, future in enumerate(as_completed(futures), 1):
                    run = futures[future]
                    append(results / f"{left[run]}.parquet", future.result())
                    minutes = (time.monotonic() - begin) / number * (len(left) - number) / 60
                    print(f"{number}/{len(left)} {left[run]}: {asdict(run)}; {minutes:.0f} minutes left", flush=True)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def table(wanted: dict[str, list[Run]], results: pd.DataFrame, workers: int) -> str:
    """Cells with the number of seeds done and left, and how long the rest takes."""
    known = done(results)
    lines = [f"{'sweep':10} {'world':28} {'loss':8} {'rule':18} {'rate':>7}  done left"]
    left = 0
    for sweep, runs in wanted.items():
        cells: dict[Run, list[bool]] = {}
        for run in runs:
            cells.setdefault(replace(run, seed=0), []).append(run in known)
        for cell, ran in cells.items():
            left += ran.count(False)
            lines.append(
                f"{sweep:10} {cell.world:28} {cell.loss:8} {cell.rule:18} {cell.learning_rate:7g}  "
                f"{sum(ran):4} {ran.count(False):4}"
            )
    each = float(results.drop_duplicates(KEYS)["seconds"].median()) if known else 15.0
    lines.append(
        f"{left} runs left: {left * each / 60 / workers:.0f} minutes on {workers} core(s) of its own, "
        f"at {each:.1f} s a run ({'measured' if known else 'a guess'})"
    )
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("status", "run"), default="status")
    parser.add_argument("sweeps", nargs="*", help=f"of {', '.join(sweeps())}; all where none is named")
    parser.add_argument("--workers", type=int, default=1, help="processes, one core each (default: 1)")
    parser.add_argument("--seeds", type=int, help="only so many seeds a cell (default: all)")
    parser.add_argument("--worlds", nargs="+", help="only these worlds (default: all)")
    args = parser.parse_args()
    every = sweeps()
    if unknown := set(args.sweeps) - every.keys():
        parser.error(f"unknown sweep {min(unknown)!r}; known: {', '.join(every)}")

    def asked(run: Run) -> bool:
        few = run.seed in TUNING_SEEDS or args.seeds is None or run.seed < args.seeds
        return few and (not args.worlds or run.world in args.worlds)

    wanted = {name: list(filter(asked, runs)) for name, runs in every.items() if name in (args.sweeps or every)}
    if args.command == "run":
        run_all(wanted, RESULTS, WARM_STARTS, args.workers)
    print(table(wanted, load(RESULTS), args.workers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
