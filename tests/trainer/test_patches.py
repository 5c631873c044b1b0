"""Each patch of ``patches/`` on the unpacked wheel of its version, the adapters' own tests run against the result."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
WHEELS = Path(os.environ.get("VERL_WHEELS", Path(sys.prefix) / "wheels"))
HOOKS = """
import importlib, verl, verl_tapo.plugin as plugin
for hook in plugin.HOOKS:
    try:
        importlib.import_module(hook.module)
    except ImportError:
        continue
    print(verl.__file__, "|", hook.module, "|", hook.target, "|", hook.status)
"""


def patched_tree(tmp_path, patch, version):
    """The wheel's veRL with the patch applied, exactly: no fuzz, no offsets. None: as it is."""
    wheels = list(WHEELS.glob(f"verl-{version}-*.whl"))
    if not wheels:
        message = f"no wheel of verl {version} in {WHEELS}: `make test-all` downloads it, or set VERL_WHEELS"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with zipfile.ZipFile(wheels[0]) as wheel:
        members = [name for name in wheel.namelist() if name.startswith("verl/")]
        wheel.extractall(tmp_path, members)
    if patch is None:
        return tmp_path
    assert shutil.which("patch"), "the test needs the program `patch`"
    command = ["patch", "-p1", "--forward", "--fuzz=0", "-i", str(ROOT / "patches" / patch)]
    applied = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stdout + applied.stderr
    assert "offset" not in applied.stdout
    assert "fuzz" not in applied.stdout
    return tmp_path


def run(tree, *arguments):
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "VERL_USE_EXTERNAL_MODULES": "verl_tapo.plugin",  # how veRL before 0.9 loads a plug-in; harmless later
    }
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("patch", "version", "tests", "least", "status"),
    [
        (
            "verl-0.8.0.patch",
            "0.8.0",
            ["trainer/test_trainer_v0.py", "support/patched_trainers.py"],
            45,
            "not needed: veRL is patched",
        ),
        (
            "verl-0.9.1.patch",
            "0.9.1",
            ["trainer/test_trainer_v0.py", "trainer/test_trainer_v1.py", "support/patched_trainers.py"],
            70,
            "not needed: veRL is patched",
        ),
        ("verl-0.9.1-pr7473.patch", "0.9.1", ["trainer/test_trainer_v0.py"], 35, "active"),
    ],
)
def test_patch(tmp_path, patch, version, tests, least, status):
    tree = patched_tree(tmp_path, patch, version)
    hooks = [line.split(" | ") for line in run(tree, "-c", HOOKS).splitlines() if " | " in line]
    assert {file for file, *_ in hooks} == {str(tree / "verl" / "__init__.py")}
    statuses = {(module, target): state for _, module, target, state in hooks}
    assert statuses["verl.trainer.ppo.ray_trainer", "compute_advantage"] == status
    assert statuses["verl.trainer.ppo.ray_trainer", "RayPPOTrainer.__init__"] == "active"
    if version == "0.9.1":
        assert statuses["verl.trainer.ppo.v1.trainer_base", "PPOTrainer._compute_advantage"] == status
    report = run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in tests))
    passed = int(report.split(" passed")[0].split()[-1])
    assert passed >= least, report[-2000:]


@pytest.mark.parametrize("version", ["0.8.0", "0.9.1"])
def test_other_estimators_are_untouched_by_the_patch(tmp_path, version):
    trees = [
        patched_tree(tmp_path / name, patch, version)
        for name, patch in (("stock", None), ("patched", f"verl-{version}.patch"))
    ]
    script = """
import hashlib, sys, torch
sys.path[:0] = ["tests", "tests/support"]
from verl_tapo.selftest.rollouts import data_proto, fake_batch
import conftest, verl
from omegaconf import OmegaConf
from verl.trainer.ppo.ray_trainer import compute_advantage
tokenizer = conftest._byte_level(conftest.TOOL_TOKENS)
config = OmegaConf.create({"gdpo_reward_keys": ["acc"], "gamma": 1.0, "lam": 1.0})
names = "grpo gdpo rloo rloo_vectorized opo gpg grpo_vectorized reinforce_plus_plus reinforce_plus_plus_baseline"
for name in names.split():
    data = data_proto(fake_batch(tokenizer), tokenizer)
    data.non_tensor_batch["acc"] = data.non_tensor_batch["acc"].astype(float)
    result = compute_advantage(data, name, config=config)
    print(name, sorted(result.batch.keys()), sorted(result.non_tensor_batch))
    print(*(hashlib.sha256(result.batch[k].numpy().tobytes()).hexdigest() for k in ("advantages", "returns")))
"""
    stock, patched = (run(tree, "-c", script) for tree in trees)
    assert stock.count("advantages") == 9
    assert patched == stock
