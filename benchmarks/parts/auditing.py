"""The audit against merely reading the same lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from measuring import Fact, Part, Sweep
from workload import CONFIG, make_batch

CHARACTERS = 8000
OF_A_STEP = 256  # rollouts
READING = """
for file in sorted(__import__("pathlib").Path(folder).glob("*.jsonl")):
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            json.loads(line)
"""
AUDITING = """
audit(folder, settings=settings, keep_calls=False)
"""
CHILD = """
import json, os, re, sys, time
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
from verl_tapo.audit import audit
folder, settings = sys.argv[1], json.loads(sys.argv[2])
start = time.perf_counter()
{code}
seconds = time.perf_counter() - start
status = open("/proc/self/status").read() if os.path.exists("/proc/self/status") else ""
peak = re.search(r"VmHWM:\\s+(\\d+)", status)
print(json.dumps([seconds, int(peak[1]) / 1024 if peak else None]))
"""


def write_dump(folder: Path, trajectories: int) -> None:
    """Writes files as veRL's ``trainer.rollout_data_dir`` gets them: one per step, 5 calls and
    8,000 characters per rollout."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(5000)])
    for step in range(trajectories // OF_A_STEP):
        batch = make_batch(OF_A_STEP, 128, seed=step)
        texts = [""] * OF_A_STEP
        for call in batch.steps:
            arguments = json.dumps({"name": call.tool, "arguments": call.arguments})
            answer = " ".join(rng.choice(words, 160))
            texts[call.row] += (
                f"I should look.\n<tool_call>\n{arguments}\n</tool_call>\nuser\n<tool_response>\n{answer}\n"
                "</tool_response>\nassistant\n"
            )
        with (folder / f"{step + 1}.jsonl").open("w", encoding="utf-8") as file:
            for row, text in enumerate(texts):
                text = (text + "So the answer is as it is. " * 400)[:CHARACTERS]
                line = {"input": f"question {batch.index[row]}", "output": text, "gts": "x", "step": step + 1}
                file.write(json.dumps({**line, "score": float(batch.success[row])}) + "\n")


def in_a_process(code: str, folder: Path) -> tuple[float, float | None]:
    """Returns seconds, without those of imports, and the peak memory in MB, of a separate process on one core."""
    settings = {"tools": {tool: dict(kernels) for tool, kernels in CONFIG.tools.items()}}
    command = [sys.executable, "-c", CHILD.format(code=code), str(folder), json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def measure(quick: bool) -> Part:
    sizes = [256, 512] if quick else [1024, 2048, 4096, 8192]
    repeats = 1 if quick else 3
    seconds: dict[str, list[float]] = {"audit": [], "json.loads": []}
    memory: dict[str, list[float]] = {"audit": [], "json.loads": []}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            dump = Path(folder) / str(size)
            write_dump(dump, size)
            taken = [
                [in_a_process(code, dump) for code in (AUDITING, READING)] for _ in range(repeats)
            ]  # in turn, as `medians` does
            for column, name in enumerate(seconds):
                seconds[name].append(float(np.median([of[column][0] for of in taken])))
                memory[name].append(max(of[column][1] or float("nan") for of in taken))
    fixed = f"{CHARACTERS} characters and 5 calls each, {OF_A_STEP} a training step, one core"
    minute = 60 * sizes[-1] / seconds["audit"][-1]
    facts = [Fact("audit of a dump, on one core", f"{minute:,.0f} rollouts a minute", "20,000 a minute")]
    text = (
        "`verl_tapo.audit.audit` on a dump, against `json.loads` on the same lines, each in a process of its own, "
        "on one core. Memory is that of the whole process; both import the same."
    )
    return Part(
        "Audit",
        text,
        [Sweep("trajectories", fixed, "s", sizes, seconds), Sweep("trajectories", fixed, "MB", sizes, memory)],
        facts,
    )
