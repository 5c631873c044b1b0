"""``verl-tapo selftest`` passes here, and fails where something is broken: a hook, the rule, an estimator, a model."""

import dataclasses
import subprocess
import sys

import pytest
import torch

pytest.importorskip("verl")

from verl.trainer.ppo import core_algos, ray_trainer

from verl_tapo import cli, plugin
from verl_tapo.rule import credit
from verl_tapo.selftest import check, hook_checks, rule_checks, run, trainer_checks
from verl_tapo.selftest.check import Check, Failed, Skipped, outcome
from verl_tapo.selftest.trainer_checks import V0
from verl_tapo.trainer import estimator

PATCHED = hasattr(ray_trainer, "ADV_CONTEXT_VERSION")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(estimator, "MONITOR", estimator.RunMonitor())


def verdicts(checks):
    return {result.name: (result.verdict, result.detail) for result in map(outcome, checks)}


def failed(checks):
    return {name: detail for name, (verdict, detail) in verdicts(checks).items() if verdict == "FAIL"}


def test_all_is_well():
    for checks in (rule_checks.rule_checks(), hook_checks.hook_checks(), trainer_checks.trainer_checks(V0())):
        found = verdicts(checks)
        assert len(found) >= 2
        assert {verdict for verdict, _ in found.values()} == {"ok"}, found


def unclipped(*batch):
    return REAL(*batch[:-1], dataclasses.replace(batch[-1], clip=False))


def without_support(*batch):
    return REAL(*batch[:-1], dataclasses.replace(batch[-1], use_support=False))


def a_little_off(*batch):
    advantages, report = REAL(*batch)
    return torch.where(advantages < 0, advantages + 1e-5, advantages), report


def without_gates(*batch):
    return REAL(*batch[:-1], dataclasses.replace(batch[-1], theta=0.0, alpha_min=0.0))


REAL = credit.transfer_credit


@pytest.mark.parametrize(
    ("broken", "says"),
    [(unclipped, "never past zero"), (without_support, "support"), (a_little_off, ""), (without_gates, "support")],
)
def test_a_broken_rule(monkeypatch, broken, says):
    monkeypatch.setattr(credit, "transfer_credit", broken)
    found = failed(rule_checks.rule_checks())
    assert found["the rule: batches computed by hand"].startswith(says)
    assert " is " in found["the rule: batches computed by hand"]
    assert found["the rule: random batches, against the plain loops of rule/reference.py"].startswith("seed ")


def test_a_rule_that_does_nothing(monkeypatch):
    monkeypatch.setattr(credit, "transfer_credit", lambda base, *rest: (base.clone(), REAL(base, *rest)[1]))
    assert len(failed(rule_checks.rule_checks())) == 2


@pytest.mark.skipif(PATCHED, reason="nothing is hooked")
def test_a_hook_that_is_not_in_place(monkeypatch):
    monkeypatch.setattr(plugin.HOOKS[0], "status", "FAILED: TypeError: it has no parameter x")
    assert failed(hook_checks.hook_checks()) == {
        "hook verl.trainer.ppo.core_algos": "FAILED: TypeError: it has no parameter x"
    }


def test_a_hook_into_what_this_verl_has_not(monkeypatch):
    for module, verdict, detail in (
        ("verl.no.such.module", "skip", "this veRL has no verl.no"),
        ("no_such_package", "FAIL", "no_such_package is not installed: pip install 'verl-tapo[verl]'"),
    ):
        monkeypatch.setattr(hook_checks, "HOOKS", [plugin.Hook(module, "f", "a:b", (), "a reason")])
        assert verdicts(hook_checks.hook_checks())[f"hook {module}.f"] == (verdict, detail)


def test_an_estimator_of_another(monkeypatch):
    monkeypatch.setitem(core_algos.ADV_ESTIMATOR_REGISTRY, "tapo", core_algos.ADV_ESTIMATOR_REGISTRY["grpo"])
    found = failed([*hook_checks.hook_checks(), *trainer_checks.trainer_checks(V0())])
    assert found["veRL's registry has this estimator under the name tapo"] == (
        "it is registered by verl.trainer.ppo.core_algos"
    )
    # What is grpo passes for grpo, and is not what the rule says.
    assert {name for name in found if name.startswith("V0")} == {
        f"V0: tapo is what the rule makes of grpo, from calls {where}" for where in ("recorded", "found in tokens")
    }


@pytest.mark.skipif(PATCHED, reason="nothing is hooked")
def test_a_trainer_whose_hook_is_gone(monkeypatch):
    monkeypatch.setattr(ray_trainer, "compute_advantage", ray_trainer.compute_advantage.__wrapped__)
    found = failed(trainer_checks.trainer_checks(V0()))
    assert len(found) == 5
    for detail in found.values():
        assert "its hook into this trainer is not in place" in detail


def test_advantages_that_are_off_by_a_bit(monkeypatch):
    real = estimator.transfer_credit

    def off(base, *rest, **options):
        advantages, report = real(base, *rest, **options)
        return torch.nextafter(advantages, torch.full_like(advantages, 9.0)), report

    monkeypatch.setattr(estimator, "transfer_credit", off)
    found = failed(trainer_checks.trainer_checks(V0()))
    assert len(found) == 5
    assert "advantages are wrong; the first, at (0, 0), is" in found["V0: tapo with beta=0 is grpo, bit for bit"]


def test_calls_that_are_not_found(monkeypatch):
    real = estimator.find_steps
    monkeypatch.setattr(estimator, "find_steps", lambda *given: real(*given)[1:])
    found = failed(trainer_checks.trainer_checks(V0()))
    assert found
    assert all("is what the rule makes of grpo" in name for name in found)


def test_a_verl_without_the_trainer(monkeypatch):
    def gone(name):
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(trainer_checks.importlib, "import_module", gone)
    for trainer, why in ((V0(), "this veRL has no V0 trainer"), (trainer_checks.V1(), "this veRL has no V1 trainer")):
        found = verdicts(trainer_checks.trainer_checks(trainer))
        assert {verdict for verdict, _ in found.values()} == {"skip"}
        assert all(detail.startswith(why) for _, detail in found.values())

    def missing(name):
        raise ModuleNotFoundError("No module named 'cachetools'", name="cachetools")

    monkeypatch.setattr(trainer_checks.importlib, "import_module", missing)
    found = failed(trainer_checks.trainer_checks(trainer_checks.V1()))
    assert set(found.values()) == {"cachetools is not installed: pip install 'verl-tapo[verl]'"}


def test_what_a_check_raises_is_a_line():
    def broken():
        raise RuntimeError("two\nlines")

    def raises(error):
        def run():
            raise error

        return run

    assert outcome(Check("a", lambda: "fine")) == ("a", "ok", "fine")
    assert outcome(Check("a", broken)) == ("a", "FAIL", "RuntimeError: two lines")
    assert outcome(Check("a", raises(Failed("no")))) == ("a", "FAIL", "no")
    assert outcome(Check("a", raises(Skipped("none")))) == ("a", "skip", "none")
    with pytest.raises(Failed, match=r"shape \(1,\), expected \(2,\)"):
        check.require_equal(torch.zeros(1), torch.zeros(2))
    with pytest.raises(Failed, match="1 of 2 advantages are wrong"):
        check.require_equal(torch.tensor([0.0, float("nan")]), torch.zeros(2), 1e-6)


def test_the_command(capsys, monkeypatch, tmp_path):
    """But for the checks in veRL, which are made above, and in test_trainer_v1.py."""
    lines = [Check("one", lambda: "fine"), Check("two", lambda: "too")]
    monkeypatch.setattr(run, "checks_of_verl", lambda: iter(lines))
    assert cli.main(["selftest"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("ok    the rule: batches computed by hand: ")
    assert out[2:5] == ["ok    veRL loads the plug-in: yes", "ok    one: fine", "ok    two: too"]
    assert out[-1].startswith("5 checks, none failed, in ")

    def broken():
        print("noise")
        raise Failed("no")

    lines[1] = Check("two", broken)
    assert cli.main(["selftest", "--model", str(tmp_path)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[4] == "FAIL  two: no"
    assert out[5].startswith(f"FAIL  the model {tmp_path} fits the configuration: --model {tmp_path} has no tokenizer")
    assert out[-1].startswith("6 checks, 2 failed, in ")
    assert "noise" not in out


@pytest.mark.long
def test_without_verl():
    code = "import sys\nsys.modules['verl'] = None\nfrom verl_tapo.cli import main\nsys.exit(main(['selftest']))\n"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 1
    rule, loops, verl, summary = process.stdout.splitlines()
    assert rule.startswith("ok    the rule: batches computed by hand")
    assert loops.startswith("ok    the rule: random batches")
    assert verl.startswith("FAIL  veRL loads the plug-in: veRL cannot be imported (")
    assert summary.startswith("3 checks, 1 failed")
