"""What to run first on a GPU, in the environment that you train in: a line a check, exit code 1 where one failed.

    python tests/gpu/first_run.py                                      # the rule on the GPU's tensors, and its cost
    python tests/gpu/first_run.py --model Qwen/Qwen3-4B-Instruct-2507  # also two steps of GRPO, and of TAPO, on vLLM
    python tests/gpu/first_run.py --model ... trainer.n_gpus_per_node=8    # whatever else veRL's command line takes

The steps train a text model on questions about countries (examples/quickstart_lm), with veRL's own `main_ppo`. Where
flash-attn is not installed they compute attention with torch (sdpa). `--device cpu` goes as far as a CPU can.
docs/tested.md says what this has been run on: please report what it says on yours.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from verl_tapo import TapoConfig, transfer_credit
from verl_tapo.selftest.check import Check, Failed, Skipped, outcome
from verl_tapo.selftest.random_batches import random_batch, random_config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
EXAMPLES = ROOT / "examples"
BATCHES = 200
STEPS = 2
ROWS, LENGTH = 1024, 8192


def rule_equals_the_cpus(device: str) -> str:
    """Random batches, on both."""
    corrected = 0
    for seed in range(BATCHES):
        (base, mask, *rest), config = random_batch(seed), random_config(seed)
        expected, _ = transfer_credit(base, mask, *rest, config)
        result, report = transfer_credit(base.to(device), mask.to(device), *rest, config)
        if result.device.type != device or result.dtype != base.dtype:
            raise Failed(f"seed {seed}: the result is {result.dtype} on {result.device}")
        off = float((result.cpu() - expected).abs().max())
        if off > 1e-6:
            raise Failed(f"seed {seed}: advantages differ by up to {off:.3g}")
        corrected += sum(step.gate == "corrected" for step in report.steps)
    if not corrected:
        raise Failed("not a step was corrected in any of them")
    return f"{BATCHES} batches, {corrected} steps corrected"


def nothing_to_transfer_is_bit_for_bit(device: str) -> str:
    """`beta=0`, in the precisions that advantages come in."""
    for dtype in (torch.float32, torch.bfloat16):
        base, mask, *rest = random_batch(1, rows=64)
        base = base.to(device, dtype)
        result, _ = transfer_credit(base, mask.to(device), *rest, TapoConfig(beta=0.0))
        if not torch.equal(result, base):
            raise Failed(f"beta=0 changes advantages in {dtype}")
    return "float32 and bfloat16"


def cost(device: str) -> str:
    """Milliseconds of the rule at a training step's size."""
    base, mask, *rest = random_batch(0, rows=ROWS, length=LENGTH, group_size=8)
    found = {
        where: _milliseconds(partial(transfer_credit, base.to(where), mask.to(where), *rest))
        for where in {device, "cpu"}
    }
    return f"{ROWS} x {LENGTH}: " + ", ".join(f"{value:.0f} ms on {where}" for where, value in sorted(found.items()))


def _milliseconds(function: Callable[[], object]) -> float:
    times = []
    for _ in range(6):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 1e3 * sorted(times[1:])[2]


class Training:
    """Two steps under each estimator.

    Args:
        model: folder or name.
        device: "cuda" or "cpu".
        out: a new folder.
        overrides: further ones.
    """

    def __init__(self, model: str, device: str, out: Path, overrides: Sequence[str]) -> None:
        self.model, self.device, self.out, self.overrides = model, device, out, list(overrides)

    def metrics(self, estimator: str) -> list[dict[str, float]]:
        """Those of each step.

        Raises:
            Failed: where the run does not end well, with the end of what it said.
        """
        folder = self.out / estimator
        if folder.exists():
            return self._logged(folder)
        folder.mkdir(parents=True)
        environment = {**os.environ, "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"), "HYDRA_FULL_ERROR": "1"}
        paths = [str(EXAMPLES / name) for name in ("quickstart_lm", "quickstart")]
        environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
        if self.device == "cpu":
            environment["VERL_PLATFORM"] = "cpu"
        with (folder / "train.log").open("w") as log:
            code = subprocess.run(
                self.command(estimator, folder), env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
            ).returncode
        if code:
            last = (folder / "train.log").read_text(errors="replace").strip().splitlines()[-1:]
            raise Failed(f"main_ppo ended with {code}: {' '.join(last)[:300]}; see {folder / 'train.log'}")
        return self._logged(folder)

    def _logged(self, folder: Path) -> list[dict[str, float]]:
        file = folder / "metrics.jsonl"
        if not file.is_file():
            raise Failed(f"its run did not end well; see {folder / 'train.log'}")
        return [json.loads(line)["data"] for line in file.read_text().splitlines()]

    def command(self, estimator: str, folder: Path) -> list[str]:
        """What is run."""
        import told

        data = self.out / "data"
        if not data.is_dir():
            told.prepare(data, {"train": 64, "heldout": 8})
        rollout = "actor_rollout_ref.rollout"
        settings = {
            "algorithm.adv_estimator": estimator,
            "+algorithm.tapo.tools.text_search.query": "text",
            "actor_rollout_ref.model.path": self.model,
            "actor_rollout_ref.actor.ppo_mini_batch_size": 8,
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 2,
            f"{rollout}.log_prob_micro_batch_size_per_gpu": 2,
            f"{rollout}.n": 8,
            f"{rollout}.agent.default_agent_loop": "tapo_tool_agent",
            f"{rollout}.multi_turn.enable": "true",
            f"{rollout}.multi_turn.format": "hermes",
            f"{rollout}.multi_turn.max_assistant_turns": 3,
            f"{rollout}.multi_turn.max_tool_response_length": 500,
            f"{rollout}.multi_turn.tool_config_path": EXAMPLES / "quickstart_lm" / "tools.yaml",
            "data.train_files": data / "train.parquet",
            "data.val_files": data / "heldout.parquet",
            "data.train_batch_size": 8,
            "data.max_prompt_length": 1024,
            "data.max_response_length": 1024,
            "reward.custom_reward_function.path": "pkg://flags_and_facts.reward",
            "reward.custom_reward_function.name": "compute_score",
            "trainer.logger": "[console,file]",
            "trainer.nnodes": 1,
            "trainer.n_gpus_per_node": 1,
            "trainer.total_training_steps": STEPS,
            "trainer.val_before_train": "false",
            "trainer.test_freq": -1,
            "trainer.save_freq": -1,
            "trainer.default_local_dir": folder / "checkpoints",
            "hydra.run.dir": folder / "hydra",
        }
        if self.device != "cpu":
            settings |= {f"{rollout}.name": "vllm", f"{rollout}.tensor_model_parallel_size": 1}
            if find_spec("flash_attn") is None:
                # VeRL's default, which packs rows without padding, is made for flash attention.
                settings |= {
                    "++actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
                    "actor_rollout_ref.model.use_remove_padding": "false",
                }
        name = "cpu" if self.device == "cpu" else "tapo"
        start = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-name", name]
        return [*start, *(f"{key}={value}" for key, value in settings.items()), *self.overrides]

    def trains(self, estimator: str) -> str:
        """Whether both steps are sound."""
        steps = self.metrics(estimator)
        if len(steps) != STEPS:
            raise Failed(f"{len(steps)} steps were logged, not {STEPS}")
        odd = sorted({name for step in steps for name, value in step.items() if not math.isfinite(value)})
        if odd:
            raise Failed(f"not finite: {', '.join(odd)}")
        faults = max(step.get("tools/infrastructure_faults", 0.0) for step in steps)
        if faults:
            raise Failed(f"{faults:.0%} of the tools' calls failed")
        if not any(step["actor/grad_norm"] > 0 for step in steps):
            score = _mean(steps, "critic/score/mean")
            raise Skipped(
                f"no gradient: all rollouts of each prompt succeed, or all fail (mean score {score:.2g}): the steps "
                "ran, but nothing was learned; try more rollouts (actor_rollout_ref.rollout.n), or another model"
            )
        shown = ("critic/score/mean", "tools/calls_per_trajectory", *_DIFFERENCES)
        return ", ".join(f"{name} {_mean(steps, name):.3g}" for name in shown)

    def corrects(self) -> str:
        """Whether TAPO had records, and something to correct."""
        steps = self.metrics("tapo")
        recorded = min(step["tapo/recorded_rollouts"] for step in steps)
        if recorded < 1:
            raise Failed(f"only {recorded:.0%} of the rollouts have a record")
        if not any(step["tapo/corrected_steps"] > 0 for step in steps):
            raise Skipped("no failing call had a witness in two steps, so nothing was seen; try more rollouts")
        return ", ".join(f"{name} {_mean(steps, name):.3g}" for name in ("tapo/corrected_steps", "tapo/token_share"))

    def samples_as_the_actor_does(self) -> str:
        """Whether the engine's probabilities differ from the actor's with TAPO as with GRPO: of the first step, whose
        weights are the same."""
        grpo, tapo = (self.metrics(estimator)[0] for estimator in ("grpo", "tapo"))
        name = "training/rollout_probs_diff_mean"
        if tapo[name] > 2 * grpo[name] + 1e-4:
            raise Failed(f"{name} is {tapo[name]:.3g} with TAPO, {grpo[name]:.3g} with GRPO")
        limit = 1e-4 if self.device == "cpu" else math.inf
        if tapo["training/rollout_probs_diff_max"] > limit:
            raise Failed(f"training/rollout_probs_diff_max is {tapo['training/rollout_probs_diff_max']:.3g}")
        return f"{name} {grpo[name]:.3g} with GRPO, {tapo[name]:.3g} with TAPO"


_DIFFERENCES = ("training/rollout_probs_diff_max", "training/rollout_probs_diff_mean")


def _mean(steps: Sequence[dict[str, float]], name: str) -> float:
    return sum(step.get(name, math.nan) for step in steps) / len(steps)


def checks(device: str, model: str | None, out: Path, overrides: Sequence[str]) -> Iterator[Check]:
    """All of them, in order."""
    yield Check("device", partial(_device, device))
    yield Check("the rule is the CPU's", partial(rule_equals_the_cpus, device))
    yield Check("beta=0 is the base bit for bit", partial(nothing_to_transfer_is_bit_for_bit, device))
    yield Check("cost of the rule", partial(cost, device))
    if model is not None:
        training = Training(model, device, out, overrides)
        for estimator in ("grpo", "tapo"):
            yield Check(f"two steps of {estimator}", partial(training.trains, estimator))
        yield Check("TAPO corrects", training.corrects)
        yield Check("rollouts are sampled as the actor would", training.samples_as_the_actor_does)


def _device(device: str) -> str:
    if device != "cuda":
        return f"{device}, torch {torch.__version__}: nothing below says anything of a GPU"
    if not torch.cuda.is_available():
        raise Failed("torch sees no GPU")
    found = torch.cuda.get_device_properties(0)
    attention = "flash-attn" if find_spec("flash_attn") else "no flash-attn: attention by torch"
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, torch {torch.__version__}, {attention}"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line a check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", help="a text model with hermes calls (Qwen3, say): a folder, or a name of the hub")
    parser.add_argument("--out", type=Path, default=Path("first_run"), help="a new folder for what the steps write")
    parser.add_argument("overrides", nargs="*")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.model is not None and arguments.out.exists():
        parser.error(f"{arguments.out} is there already; --out names another")
    sys.path += [str(EXAMPLES / name) for name in ("quickstart_lm", "quickstart")]
    failed = 0
    for check in checks(arguments.device, arguments.model, arguments.out.resolve(), [*arguments.overrides, *rest]):
        result = outcome(check)
        print(f"{result.verdict:4}  {result.name}: {result.detail}", flush=True)
        failed += result.verdict == "FAIL"
        if check.name == "device" and failed:
            break
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
