"""The time that the plug-in adds to `import verl`, in every process of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from measuring import Fact, Part

CODE = """
import json, time
start = time.perf_counter()
import verl
between = time.perf_counter()
import verl_tapo.plugin
print(json.dumps([time.perf_counter() - between, between - start]))
"""


def import_times() -> tuple[float, float]:
    """Milliseconds that a fresh process takes to load the plug-in after veRL, and for veRL without it."""
    environment = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none"}
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    own, whole = json.loads(done.stdout.splitlines()[-1])
    return 1000 * own, 1000 * whole


def measure(quick: bool) -> Part:
    taken = [import_times() for _ in range(1 if quick else 7)]
    own, whole = (sorted(column)[len(taken) // 2] for column in zip(*taken, strict=True))
    text = "veRL loads its plug-ins as it is imported; here ours is imported right after a veRL that loads none."
    fact = Fact("the plug-in in `import verl`", f"{own:.0f} ms (veRL itself: {whole / 1000:.1f} s)", "50 ms")
    return Part("Importing", text, facts=[fact])
