"""A vLLM engine that dies while rollouts are generated."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress

import psutil
import pytest

pytest.importorskip("vllm", reason="`make test-vllm` runs this, in an environment of its own")

from run import HERE
from vllm_cpu.text_world import text_run

pytestmark = pytest.mark.timeout(1800)

# Nothing ends by itself, and a whole response takes many seconds.
ENDLESS = ["actor_rollout_ref.rollout.ignore_eos=true", "data.max_response_length=1800"]


@pytest.mark.long
def test_an_engine_that_dies_ends_the_run(text_world):
    """With a clear message. Where some rollouts had been complete, veRL 0.9.1 would train on them: docs/tested.md."""
    run = text_run(text_world, "killed", "tapo", "vanilla", "tapo_tool_agent", *ENDLESS)
    run.folder.mkdir()
    with run.log_file.open("w") as log:
        command, environment = run.command(), run.environment()
        trainer = subprocess.Popen(command, env=environment, cwd=HERE, stdout=log, stderr=log, start_new_session=True)
    try:
        while not run.trajectories_file.is_file():
            assert trainer.poll() is None, run.log_file.read_text()[-3000:]
            time.sleep(0.1)
        time.sleep(1)
        processes = psutil.Process(trainer.pid).children(recursive=True)
        [engine] = [process for process in processes if process.name().startswith("VLLM::EngineCor")]
        engine.kill()
        code = trainer.wait(300)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(trainer.pid, signal.SIGKILL)
    said = run.log_file.read_text()
    assert run.trajectories_file.read_text() == ""  # or the test proves nothing
    assert code != 0
    assert "EngineDeadError" in said
    assert "no materializable trajectories" in said
    assert not run.metrics_file.exists() or run.metrics_file.read_text() == ""
    assert not (run.folder / "checkpoints").exists()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []
