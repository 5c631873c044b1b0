"""The doctor, in this process for configurations, in others for what is not installed or switched off."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("verl")

from verl_tapo.cli import main

BLOCK_VERL = "import sys\nsys.modules['verl'] = None\n"


def doctor(capsys, *arguments):
    code = main(["doctor", *arguments])
    return code, capsys.readouterr().out


def test_a_good_configuration(capsys):
    code, out = doctor(capsys, "actor_rollout_ref.rollout.n=8", "+algorithm.tapo.beta=0.5")
    assert code == 0, out
    assert "TAPO would run." in out
    assert "PPOTrainer._compute_advantage  active" in out
    assert "algorithm.tapo.beta               0.5" in out
    assert "single_turn_agent, calls no tools" in out
    code, out = doctor(
        capsys,
        "--config",
        "tapo",
        "actor_rollout_ref.rollout.n=8",
        "actor_rollout_ref.rollout.agent.default_agent_loop=tapo_tool_agent",
    )
    assert code == 0
    assert "Warnings" not in out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--config", "tapo", "algorithm.tapo.theta=3"], "algorithm.tapo.theta must be a number in [0, 1], got 3"),
        (["+algorithm.tapo.bta=1"], "algorithm.tapo.bta: unknown setting; did you mean 'beta'?"),
        (["algorithm.tapo.beta=1"], "To append to your config use +algorithm.tapo.beta=1"),
        (["actor_rollout_ref.rollout.n=${oc.env:NO_SUCH}"], "Environment variable 'NO_SUCH' not found"),
        (["--config", "no_such_file.yaml"], "the configuration does not compose: "),
        (["--config", "no_such_name"], "the configuration does not compose: "),
        (["algorithm.adv_estimator=grpo"], "algorithm.adv_estimator=grpo, not tapo"),
        (["+algorithm.tapo.base_estimator=gae"], "base_estimator=gae is no group estimator"),
        (["+algorithm.tapo.tool_format=nope"], "the tool format 'nope' is not known"),
        (["+algorithm.tapo.tools.search.query=fuzzy"], "unknown kernel 'fuzzy'"),
    ],
)
def test_bad_configurations(capsys, arguments, problem):
    code, out = doctor(capsys, *arguments)
    assert code == 1
    assert problem in out.split("Problems:")[1]
    assert "TAPO would not run." in out


def test_files(capsys, tmp_path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("algorithm:\n  adv_estimator: tapo\n  tapo:\n    beta: 0.7\n")
    code, out = doctor(capsys, "--config", str(overlay), "+algorithm.tapo.theta=0.9")
    assert code == 0, out
    assert "beta               0.7" in out
    assert "theta              0.9" in out
    composed = tmp_path / "composed.yaml"
    composed.write_text("defaults:\n  - tapo\n  - _self_\nalgorithm:\n  tapo:\n    beta: 0.6\n")
    code, out = doctor(capsys, "--config", str(composed))
    assert code == 0, out
    assert "beta               0.6" in out
    for number, text in enumerate(["a: [1\n", "- 1\n", "algorithm: 3\n"]):
        broken = tmp_path / f"broken{number}.yaml"
        broken.write_text(text)
        code, out = doctor(capsys, "--config", str(broken))
        assert code == 1
        assert "  - the configuration " in out.split("Problems:")[1]


def install(folder, package, version):
    """What ``importlib.metadata`` reads of a package."""
    metadata = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


@pytest.fixture
def extras(monkeypatch):
    """Of a veRL that names versions of its own."""
    named = ["vllm==0.24.0; extra == 'vllm'", "flash-attn==2.8.3; extra == 'flash'", "numpy"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: named if name == "verl" else None)


@pytest.mark.parametrize(
    ("vllm", "flash", "expected"),
    [
        (None, None, ["vllm is not installed; veRL", "flash-attn is not installed; veRL"]),
        ("0.27.1+cpu", "2.8.4", ["vllm is 0.27.1+cpu; veRL", "flash-attn is 2.8.4; veRL"]),
        ("0.24.0", "2.8.3+cu130", []),
    ],
)
def test_packages_that_a_gpu_run_needs(capsys, monkeypatch, tmp_path, extras, vllm, flash, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.syspath_prepend(tmp_path)
    for package, version in {"vllm": vllm, "flash-attn": flash}.items():
        if version:
            install(tmp_path, package, version)
    code, out = doctor(capsys, "actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.rollout.n=8")
    assert code == 0, out  # the machine that is asked need not be the one that trains
    for text in expected:
        assert text in out
    assert out.count("; veRL") == len(expected)
    assert f"vllm                   {vllm or 'not installed'}" in out


def test_without_a_gpu_or_vllm_their_packages_are_not_asked_for(capsys, extras):
    code, out = doctor(capsys, "actor_rollout_ref.rollout.name=transformers", "actor_rollout_ref.rollout.n=8")
    assert code == 0, out
    assert "; veRL" not in out


def run(code, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_a_plugin_that_is_switched_off():
    done = run("from verl_tapo.cli import main; raise SystemExit(main(['doctor']))", VERL_USE_EXTERNAL_PLUGINS="none")
    assert done.returncode == 1
    assert "VERL_USE_EXTERNAL_PLUGINS  none" in done.stdout
    assert "veRL does not load the plug-in" in done.stdout


def test_without_verl():
    done = run(BLOCK_VERL + "from verl_tapo.cli import main; raise SystemExit(main(['doctor']))")
    assert done.returncode == 1
    assert "veRL cannot be imported" in done.stdout
    assert "pip install 'verl-tapo[verl]'" in done.stdout


def test_a_package_that_v1_needs_is_missing():
    code = "import sys\nsys.modules['transfer_queue'] = None\n"
    code += "from verl_tapo.cli import main; raise SystemExit(main(['doctor', *sys.argv[1:]]))"
    done = run(code)
    assert done.returncode == 1
    problems = done.stdout.split("Problems:")[1]
    assert "PPOTrainer._compute_advantage: not there: import of transfer_queue halted" in problems
    assert "pip install 'verl-tapo[verl]'" in problems
    assert done.stderr == ""


def test_wrong_usage():
    with pytest.raises(SystemExit, match="2"):
        main(["doktor"])


def test_a_plugin_that_cannot_load_says_so_on_stderr():
    """veRL itself would log it at DEBUG, and fail later with an unknown estimator."""
    done = run("import sys\nsys.modules['wrapt'] = None\nimport verl\nprint('verl is there')")
    assert "verl is there" in done.stdout
    assert "[verl-tapo] the plug-in failed to load:" in done.stderr


def test_a_seam_that_changed_says_so_and_leaves_other_runs_alone():
    code = """
import types, sys
import verl_tapo.plugin as plugin
seam = plugin.SEAMS[3]
module = types.ModuleType("changed")
class PPOTrainer:
    def _compute_advantage(self, data): return "stock"
module.PPOTrainer = PPOTrainer
plugin._install(seam, module)
print(seam.status, PPOTrainer()._compute_advantage(1))
"""
    done = run(code)
    assert "FAILED: TypeError: PPOTrainer._compute_advantage has no parameter batch, metrics stock" in done.stdout
    assert "[verl-tapo] cannot hook into" in done.stderr


def test_the_rule_needs_no_verl():
    code = BLOCK_VERL + (
        "import torch, verl_tapo as t\n"
        "base = torch.tensor([[1.0], [-1.0]])\n"
        "steps = [t.ToolStep(r, 'search', {'query': 'a'}, (0, 1), (0, 1)) for r in (0, 1)]\n"
        "print(t.transfer_credit(base, torch.ones(2, 1), [0, 0], [True, False], steps)[0].tolist())\n"
    )
    done = run(code)
    assert "[[1.0], [-0.19999" in done.stdout, done.stderr


def test_the_demonstration_prints_what_its_readme_shows():
    from pathlib import Path

    folder = Path(__file__).parent.parent / "examples" / "recorded_batch"
    done = subprocess.run([sys.executable, str(folder / "demo.py")], capture_output=True, text=True, check=True)
    shown = (folder / "README.md").read_text().split("```\n")[-2]
    assert shown in done.stdout
