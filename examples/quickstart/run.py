"""Trains the quickstart's model with veRL's own trainer, shows the progress, and summarizes the
result.

    python examples/quickstart/run.py                                # TAPO, 10 steps
    python examples/quickstart/run.py --advantage grpo --loss gspo --steps 40 --seed 2
    python examples/quickstart/run.py algorithm.tapo.beta=0.5        # whatever else veRL's command line takes

The command that it runs is the first line of `train.log`, and can be run by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SUCCESS = re.compile(r"val-core/flags_and_facts/(\w+)/acc/mean@\d+")
WARNING = re.compile(r"VERL_PLATFORM=cpu: (.+)")  # of verl_tapo.cpu.check: too little memory
# VeRL picks a free port, and another process may take it before veRL does.
PORT_TAKEN = re.compile(r"EADDRINUSE|[Aa]ddress already in use")


class Failure(Exception):
    """A problem that the user can fix; the message says how."""


def quoted(path: Path) -> str:
    """A path as Hydra's grammar takes it, whatever characters it holds.

    Raises:
        Failure: It holds an interpolation, which OmegaConf would resolve wherever the configuration is read.
    """
    text = str(path)
    if "${" in text:
        raise Failure(f"{text}: a path with ${{ in it cannot stand in a configuration; rename that folder")
    # Backslashes count only before a quotation mark.
    inner = re.sub(r"(\\*)'", r"\1\1\\'", text)
    ending = len(inner) - len(inner.rstrip("\\"))
    return f"'{inner}{inner[len(inner) - ending :]}'"


@dataclass
class Run:
    """One training run, in a folder of its own. An example of its own kind overrides the class's values and methods."""

    here: ClassVar[Path] = HERE
    """The folder of the configuration, the tools, and by default of what is written."""
    configuration: ClassVar[str] = "quickstart"
    extra: ClassVar[str] = "quickstart"
    """Of setup.cfg."""
    modules: ClassVar[tuple[str, ...]] = ("verl", "transfer_queue", "bm25s", "PIL")
    """That must be there."""

    name: str
    advantage: str = "tapo"
    loss: str = "vanilla"
    steps: int = 10
    seed: int = 1
    out: Path = HERE / "out"
    overrides: list[str] = field(default_factory=list)

    @property
    def model(self) -> Path:
        return HERE / "flags_and_facts" / "model"

    def fetch(self) -> None:
        """Gets what is not in the repository; raises `Failure` where it cannot."""

    def prepare(self) -> None:
        """Writes the questions."""
        from prepare import COUNTS, prepare

        prepare(self.out / "data", COUNTS)

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def log_file(self) -> Path:
        return self.folder / "train.log"

    def setting(self, key: str) -> str | None:
        """Returns the value that the overrides give to a setting."""
        values = [value.split("=", 1)[1] for value in self.overrides if value.lstrip("+").split("=", 1)[0] == key]
        return values[-1] if values else None

    def command(self) -> list[str]:
        data = self.out / "data"
        settings = {
            "algorithm.adv_estimator": self.advantage,
            "actor_rollout_ref.actor.policy_loss.loss_mode": self.loss,
            "actor_rollout_ref.model.path": self.model,
            "actor_rollout_ref.rollout.multi_turn.tool_config_path": self.here / "tools.yaml",
            "data.train_files": data / "train.parquet",
            "data.val_files": data / "heldout.parquet",
            "data.seed": self.seed,
            "actor_rollout_ref.rollout.seed": self.seed,
            "trainer.total_training_steps": self.steps,
            "trainer.test_freq": self.steps,
            "trainer.save_freq": self.steps,
            "trainer.experiment_name": self.name,
            "trainer.default_local_dir": self.folder / "checkpoints",
            "trainer.rollout_data_dir": self.folder / "rollouts",
            "trainer.validation_data_dir": self.folder / "validation",
        }
        start = [
            sys.executable,
            "-m",
            "verl.trainer.main_ppo",
            "--config-dir",
            str(self.here),
            "--config-name",
            self.configuration,
        ]
        written = {key: quoted(value) if isinstance(value, Path) else value for key, value in settings.items()}
        return [*start, *(f"{key}={value}" for key, value in written.items()), *self.overrides]

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        own = {"VERL_PLATFORM": "cpu", "VERL_FILE_LOGGER_PATH": str(self.metrics_file), "PYTHONPATH": path}
        return {**os.environ, **own, "HYDRA_FULL_ERROR": "1", "PYTHONUNBUFFERED": "1"}


def check(run: Run) -> None:
    """Makes the data if it is missing, and reports problems before minutes are spent.

    Raises:
        Failure: With what to do.
    """
    install = f"{sys.executable} -m pip install -e '{ROOT}[{run.extra}]'"
    missing = [name for name in run.modules if find_spec(name) is None]
    if missing:
        raise Failure(f"{', '.join(missing)} cannot be imported by {sys.executable}.\n  {install}")
    if "tapo" not in entry_points(group="verl.plugins").names:
        raise Failure(f"verl-tapo is not installed, veRL would not see it.\n  {install}")
    run.command()  # refuses paths that no configuration can hold
    run.fetch()
    model = Path(run.setting("actor_rollout_ref.model.path") or run.model)
    if not (model / "config.json").is_file():
        raise Failure(f"no model at {model} (actor_rollout_ref.model.path): there is no config.json in it")
    if not (run.out / "data" / "train.parquet").is_file():
        run.prepare()
    for key in ("data.train_files", "data.val_files"):
        file = run.setting(key)
        if file is not None and not Path(file).is_file():
            raise Failure(f"{key}: there is no file {file}")


def train(run: Run) -> list[dict[str, Any]]:
    """Runs it, with a line for each step; returns veRL's metrics, one dict for each logged step.

    Raises:
        Failure: The trainer ended early.
    """
    check(run)
    for attempt in (1, 2):
        shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir(parents=True)
        command = run.command()
        start = time.monotonic()
        with run.log_file.open("w") as log:
            print(f"VERL_PLATFORM=cpu PYTHONPATH={HERE} {shlex.join(command)}", file=log, flush=True)
            process = subprocess.Popen(command, env=run.environment(), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            for line in _progress(run, process, start):
                print(line, flush=True)
        finally:
            process.terminate()
            process.wait()
        if process.returncode == 0:
            return read_metrics(run.metrics_file)
        log_text = run.log_file.read_text(errors="replace")
        if attempt == 1 and PORT_TAKEN.search(log_text):
            print("a port was taken by someone else in the meantime, once more ...", flush=True)
            continue
        raise Failure(
            f"the trainer ended with code {process.returncode}; the end of {run.log_file}:\n{_tail(log_text)}"
        )
    raise AssertionError("unreachable")


def _tail(log: str, lines: int = 15) -> str:
    telling = [line for line in log.splitlines() if re.search(r"Error|error|Exception|\[verl-tapo\]", line)]
    return "\n".join(f"  {line[:300]}" for line in (telling or log.splitlines())[-lines:])


def _progress(run: Run, process: subprocess.Popen[bytes], start: float) -> Iterator[str]:
    """Yields progress messages until the process ends."""
    yield f"{run.name}: {run.advantage}, {run.loss} loss, {run.steps} steps; log: {run.log_file}"
    shown, quiet_since, warned = 0, start, False
    while True:
        ended = process.poll() is not None
        if not warned and (warnings := dict.fromkeys(WARNING.findall(run.log_file.read_text(errors="replace")))):
            warned = True
            yield from (f"warning: {text}" for text in warnings)
        lines = read_metrics(run.metrics_file)
        for entry in lines[shown:]:
            yield f"{time.monotonic() - start:5.0f} s  {describe(entry)}"
            quiet_since = time.monotonic()
        if ended:
            return
        if time.monotonic() - quiet_since > 15:
            quiet_since = time.monotonic()
            yield f"{quiet_since - start:5.0f} s  ... {_phase(run, shown=len(lines))}"
        shown = len(lines)
        time.sleep(0.5)


def _phase(run: Run, shown: int) -> str:
    if shown:
        return "validating" if shown > run.steps - 1 else f"step {shown}"
    log = run.log_file.read_text(errors="replace")
    if "ready to fit" in log:
        return "first rollouts"
    return "starting the workers" if "Started a local Ray instance" in log else "starting"


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """VeRL's file logger: one line a step, the step among the values."""
    if not file.is_file():
        return []
    whole = file.read_text().rpartition("\n")[0]
    return [{"step": entry["step"], **entry["data"]} for entry in map(json.loads, filter(None, whole.split("\n")))]


def validation(entry: dict[str, Any]) -> float | None:
    """The success rate on the validation questions, if this step has one."""
    return next((float(value) for key, value in entry.items() if SUCCESS.fullmatch(key)), None)


def describe(entry: dict[str, Any]) -> str:
    parts = [f"step {entry['step']:3d}"]
    if "critic/score/mean" in entry:
        parts.append(f"success in training {entry['critic/score/mean']:4.0%}")
    if "tapo/corrected_steps" in entry:
        parts.append(f"failing steps corrected {entry['tapo/corrected_steps']:4.0%}")
    if validation(entry) is not None:
        parts.append(f"held-out countries {validation(entry):4.0%}")
    return "   ".join(parts)


def summary(run: Run, metrics: list[dict[str, Any]]) -> str:
    validated = [rate for entry in metrics if (rate := validation(entry)) is not None]
    steps = [entry for entry in metrics if "critic/score/mean" in entry]
    lines = ["", f"{run.name}: {run.advantage} with the {run.loss} loss, {len(steps)} steps"]
    if len(validated) > 1:
        lines.append(f"  success on held-out countries   {validated[0]:.0%} before, {validated[-1]:.0%} after")
    corrected = [entry["tapo/corrected_steps"] for entry in steps if "tapo/corrected_steps" in entry]
    if corrected:
        lines.append(f"  failing steps with corrected credit   {sum(corrected) / len(corrected):.0%}")
    timings = [entry["timing_s/step"] for entry in steps if "timing_s/step" in entry]
    if timings:
        lines.append(f"  seconds per step   {sum(timings) / len(timings):.1f}")
    for what in ("metrics.jsonl", "rollouts", "validation", "checkpoints", "train.log"):
        lines.append(f"  {run.folder / what}")
    return "\n".join(lines)


def parser(description: str, out: Path = HERE / "out") -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--loss", choices=["vanilla", "gspo", "sapo"], default="vanilla", help="policy loss")
    made.add_argument("--steps", type=int, default=10, help="training steps")
    made.add_argument("--seed", type=int, default=1, help="of the data's order and of sampling")
    made.add_argument("--out", type=Path, default=out, help="where everything is written")
    made.add_argument("overrides", nargs="*", help="settings of veRL, as key=value")
    return made


def stop_with_me() -> None:
    """A terminated run ends its trainer too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def main(kind: type[Run] = Run, description: str = __doc__ or "") -> int:
    """Trains once, as the command line says."""
    stop_with_me()
    arguments = parser(description, kind.here / "out")
    arguments.add_argument("--advantage", default="tapo", help="advantage estimator: tapo, or any of veRL's")
    arguments.add_argument("--name", help="of the run's folder")
    args = arguments.parse_args()
    name = args.name or f"{args.advantage}-{args.loss}"
    run = kind(name, args.advantage, args.loss, args.steps, args.seed, args.out.resolve(), args.overrides)
    try:
        print(summary(run, train(run)))
    except Failure as failure:
        print(f"\n{failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
