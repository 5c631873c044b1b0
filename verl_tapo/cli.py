"""The command ``verl-tapo``. ``doctor``: would TAPO run here, with this configuration? ``selftest``: does it compute
what it should? ``audit``: `verl_tapo.audit`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from verl_tapo import __version__

if TYPE_CHECKING:
    from verl_tapo.rule.config import TapoConfig

_PACKAGES = (
    "verl",
    "torch",
    "transformers",
    "ray",
    "tensordict",
    "TransferQueue",
    "hydra-core",
    "numpy",
    "rapidfuzz",
    "wrapt",
    "sentence-transformers",
    "vllm",
    "flash-attn",
)
_MODEL_SECONDS = 300.0
"""A model is examined in some 20 seconds. A chat template, which is a stranger's program, may never end."""
_POLICY_VARIABLES = ("VERL_USE_EXTERNAL_PLUGINS", "VERL_USE_EXTERNAL_MODULES")


@dataclass
class Findings:
    """The doctor's findings. A problem keeps TAPO from running; a warning may do so."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command ``verl-tapo``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="verl-tapo", description="TAPO for veRL.")
    parser.add_argument("--version", action="version", version=f"verl-tapo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="show whether TAPO would run",
        description="Shows versions, whether veRL sees the plug-in, which of its hooks are in place, and what would be "
        "wrong in a configuration. Exit code 1 where TAPO would not run.",
    )
    selftest = commands.add_parser(
        "selftest",
        help="check in the installed veRL that TAPO computes what it should",
        description="Checks the rule, the hooks, and in veRL's own trainers that tapo is grpo bit for bit where it has "
        "nothing to transfer. For CI: a line a check, no GPU, under a minute. Exit code 1 if a check failed.",
    )
    for command in (doctor, selftest):
        _add_run_arguments(command)
    given = sys.argv[1:] if argv is None else list(argv)
    audit = commands.add_parser("audit", help="show where a run punishes good tool calls, and what TAPO changes there")
    if given[:1] == ["audit"]:
        return _audit(parser, audit, given)
    # Overrides may stand before and behind options, as Hydra has it.
    arguments, rest = parser.parse_known_args(given)
    if unknown := [argument for argument in rest if argument.startswith("-")]:
        commands.choices[arguments.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    config = _config_of(arguments.config, arguments.config_dir)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # tokens of a model may be of any script
    run = run_doctor if arguments.command == "doctor" else run_selftest
    return run(config, [*arguments.overrides, *rest], arguments.verbose, arguments.model)


def _add_run_arguments(command: argparse.ArgumentParser) -> None:
    """The options that name a run's configuration and model."""
    command.add_argument(
        "--config",
        "--config-name",
        "-cn",
        default="ppo_trainer",
        metavar="NAME_OR_FILE",
        help="a configuration by name (veRL's ppo_trainer, our tapo), or a YAML file: composed where it has "
        "`defaults`, else laid over ppo_trainer",
    )
    command.add_argument(
        "--config-dir",
        "-cd",
        "--config-path",
        "-cp",
        type=Path,
        metavar="FOLDER",
        help="where that configuration is, as on the command line of main_ppo",
    )
    command.add_argument(
        "--model",
        metavar="FOLDER_OR_NAME",
        help="also examine this model's tokenizer and chat template: a conversation with calls of the run's tools is "
        "rendered by veRL's own agent loop, and the calls are looked for in its tokens. A folder, without a look at "
        "the network, or a name of the Hugging Face hub; code that comes with the model is not run",
    )
    command.add_argument("overrides", nargs="*", help="Hydra overrides, as on the command line of main_ppo")
    command.add_argument(
        "-v", "--verbose", action="store_true", help="do not hide what veRL prints while it is imported"
    )


def _config_of(name: str, folder: Path | None) -> str:
    """Returns the configuration that main_ppo's options name: the file if it is in the folder, else
    the name."""
    file = Path(f"{name.removesuffix('.yaml')}.yaml")
    return str(folder / file) if folder is not None and (folder / file).is_file() else name


def _audit(parser: argparse.ArgumentParser, audit: argparse.ArgumentParser, given: Sequence[str]) -> int:
    try:
        from verl_tapo.audit import command

        command.add_arguments(audit)
        return command.run(parser.parse_args(given))
    except ModuleNotFoundError as error:
        audit.error(f"{error.name} is not installed: pip install 'verl-tapo[audit]'")
    except KeyboardInterrupt:
        print("verl-tapo audit: interrupted", file=sys.stderr)
        return 130


def run_doctor(config: str, overrides: Sequence[str], verbose: bool = False, model: str | None = None) -> int:
    """Prints the examination, of a model too if one is named; returns 0 if TAPO would run, else 1."""
    findings = Findings()
    _show("Versions", [("python", sys.version.split()[0]), ("verl-tapo", __version__), *_versions()])
    with contextlib.nullcontext() if verbose else _quiet():
        rows, loaded = _examine_plugin(findings)
    _show("Plug-in", rows)
    if loaded:
        with contextlib.nullcontext() if verbose else _quiet():
            composed = _compose(config, overrides, findings)
            hooks = _examine_hooks(composed, findings)
            settings, tools = ([], []) if composed is None else _examine_config_safely(composed, findings)
            sections = [] if composed is None or model is None else _examine_model(model, composed, findings)
        _show("Hooks", hooks)
        _show("Configuration", settings)
        _show("Tools", tools)
        for title, rows in sections:
            _show(title, rows)
    for title, messages in (("Warnings", findings.warnings), ("Problems", findings.problems)):
        if messages:
            print(f"{title}:")
            for message in messages:
                print(f"  - {message}")
    print("TAPO would not run." if findings.problems else "TAPO would run.")
    return 1 if findings.problems else 0


def run_selftest(config: str, overrides: Sequence[str], verbose: bool = False, model: str | None = None) -> int:
    """Prints a line for each check; returns 0 if none failed, else 1."""
    from verl_tapo.selftest.check import Check, Outcome, outcome
    from verl_tapo.selftest.rule_checks import rule_checks

    started, findings = time.perf_counter(), Findings()
    quiet = contextlib.nullcontext if verbose else _quiet
    with quiet():
        # Before anything else imports the plug-in, which veRL is to load by itself.
        _, loaded = _examine_plugin(findings)

    def checks() -> Iterator[Check]:
        yield from rule_checks()
        yield Check("veRL loads the plug-in", lambda: _summary(findings))
        if loaded:
            from verl_tapo.selftest.run import checks_of_verl

            yield from checks_of_verl()
            if model is not None:
                yield Check(f"the model {model} fits the configuration", lambda: _fits(model, config, overrides))

    failed = count = 0
    remaining = checks()
    while True:
        with quiet():
            check = next(remaining, None)
            result: Outcome | None = outcome(check) if check else None
        if result is None:
            break
        print(f"{result.verdict:4}  {result.name}: {result.detail}", flush=True)
        count, failed = count + 1, failed + (result.verdict == "FAIL")
    print(f"{count} checks, {failed or 'none'} failed, in {time.perf_counter() - started:.0f} s")
    return 1 if failed else 0


def _summary(findings: Findings) -> str:
    """What a check says of findings: their warnings, or, raised, their problems."""
    from verl_tapo.selftest.check import Failed

    if findings.problems:
        raise Failed("; ".join(findings.problems))
    return "; ".join(findings.warnings) or "yes"


def _fits(model: str, config: str, overrides: Sequence[str]) -> str:
    findings = Findings()
    composed = _compose(config, overrides, findings)
    if composed is not None:
        _examine_model(model, composed, findings)
    return _summary(findings)


def _show(title: str, rows: Sequence[tuple[str, str]]) -> None:
    if not rows:
        return
    width = max(len(name) for name, _ in rows)
    print(f"{title}:")
    for name, value in rows:
        print(f"  {name:{width}}  {value}")
    print()


@contextlib.contextmanager
def _ended_after(seconds: float, because: str) -> Iterator[None]:
    """Ends the whole process with code 1 if the block takes longer: nothing else ends a thread that is at work."""

    def end() -> None:
        for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
            stream.flush()
        os.write(2, f"verl-tapo: after {seconds:.0f} s {because}\n".encode(errors="backslashreplace"))
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what importing veRL prints and logs; our own warnings become findings."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(logging.NOTSET)


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"


def _examine_plugin(findings: Findings) -> tuple[list[tuple[str, str]], bool]:
    """Checks that veRL loads the plug-in by itself."""
    names = [point.name for point in importlib.metadata.entry_points(group="verl.plugins") if point.name == "tapo"]
    rows = [("entry point verl.plugins", "tapo" if names else "missing: reinstall verl-tapo")]
    rows += [(name, os.environ[name]) for name in _POLICY_VARIABLES if name in os.environ]
    try:
        verl = importlib.import_module("verl")
    except Exception as error:
        findings.problems.append(
            f"veRL cannot be imported ({type(error).__name__}: {error}); install it, for example with "
            f"pip install 'verl-tapo[verl]'"
        )
        return rows, False
    by_verl = "verl_tapo.plugin" in sys.modules
    rows.append(("loaded by veRL", "yes" if by_verl else "no"))
    if not by_verl:
        findings.problems.append(
            "veRL does not load the plug-in. veRL before 0.9 has no plug-ins: set VERL_USE_EXTERNAL_MODULES="
            "verl_tapo.plugin. Later ones: check VERL_USE_EXTERNAL_PLUGINS (it must be unset, `auto`, or name `tapo`)"
        )
        importlib.import_module("verl_tapo.plugin")
    from verl_tapo.plugin import TESTED_VERSIONS

    version = str(verl.__version__)
    rows.append(("veRL", f"{version}, {Path(str(verl.__file__)).parent}; tested: {', '.join(TESTED_VERSIONS)}"))
    if not version.startswith(TESTED_VERSIONS):
        findings.warnings.append(f"veRL {version} was not tested; tested: {', '.join(TESTED_VERSIONS)}")
    return rows, True


def _examine_hooks(config: Any, findings: Findings) -> list[tuple[str, str]]:
    """Imports every hooked module, and shows the state of the hooks."""
    from verl_tapo.plugin import HOOKS, PATCH_MARK

    v1 = config is None or bool(config.trainer.get("use_v1", False))
    needed = {
        "verl.trainer.ppo.core_algos",
        "verl.trainer.ppo.v1.trainer_base" if v1 else "verl.trainer.ppo.ray_trainer",
    }
    rows = []
    for hook in HOOKS:
        try:
            importlib.import_module(hook.module)
            status = hook.status
        except ImportError as error:
            status = f"not there: {error}"
        except Exception as error:  # an import that dies of another version of what it imports
            status = f"FAILED: {type(error).__name__}: {error}"
        failed = status.startswith(("FAILED", "not there"))
        name = f"{hook.module}.{hook.target}" if hook.target else hook.module
        if failed and hook.module in needed:
            findings.problems.append(f"{name}: {status}. For a missing package: pip install 'verl-tapo[verl]'")
        rows.append((name, status))
    mark = getattr(sys.modules.get("verl.trainer.ppo.ray_trainer"), PATCH_MARK, None)
    rows.append(("a patch of patches/ in veRL", "no" if mark is None else f"yes, {PATCH_MARK} = {mark}"))
    return rows


def _compose(name: str, overrides: Sequence[str], findings: Findings) -> Any:
    """Composes the configuration as the trainer would get it. If that fails, adds a problem and
    returns None."""
    from hydra import compose, initialize_config_dir, initialize_config_module
    from omegaconf import OmegaConf

    # Those of Hydra itself, its output folder for one, are none of the trainer's.
    chosen = [override for override in overrides if not override.lstrip("+~").startswith("hydra.")]
    if name == "ppo_trainer" and not any(o.lstrip("+").startswith("algorithm.adv_estimator=") for o in chosen):
        chosen.append("algorithm.adv_estimator=tapo")
    path = Path(name)
    try:
        if path.suffix not in (".yaml", ".yml"):
            with initialize_config_module("verl.trainer.config", version_base=None):
                return compose(name, overrides=chosen)
        loaded = OmegaConf.load(path)
        if "defaults" in loaded:
            with initialize_config_dir(str(path.resolve().parent), version_base=None):
                return compose(path.stem, overrides=[*chosen, "hydra.searchpath=[pkg://verl.trainer.config]"])
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose("ppo_trainer")
        OmegaConf.set_struct(config, False)
        return OmegaConf.merge(config, loaded, OmegaConf.from_dotlist([o.lstrip("+") for o in chosen]))
    except Exception as error:  # Hydra's, OmegaConf's, YAML's, the file system's
        findings.problems.append(f"the configuration does not compose: {_one_line(error)}")
        return None


def _one_line(error: BaseException) -> str:
    """Returns an error's first paragraph; Hydra and OmegaConf append their position in the object tree."""
    lines = [line.strip() for line in str(error).strip().partition("\n\n")[0].splitlines()]
    lines = [line for line in lines if line and not line.startswith(("full_key:", "object_type=", "reference_type="))]
    return " ".join(lines) or type(error).__name__


_Rows: TypeAlias = list[tuple[str, str]]


def _examine_config_safely(config: Any, findings: Findings) -> tuple[_Rows, _Rows]:
    """A configuration may have any shape: whatever is raised over it is a problem of its own."""
    from omegaconf import OmegaConf

    try:
        OmegaConf.to_container(config, resolve=True)  # as the trainer does first
        return _examine_config(config, findings)
    except Exception as error:
        hint = "; put VERL_PLATFORM=cpu before the command" if "'VERL_PLATFORM' not found" in str(error) else ""
        findings.problems.append(f"the configuration cannot be used: {_one_line(error)}{hint}")
        return [], []


def _examine_config(config: Any, findings: Findings) -> tuple[_Rows, _Rows]:
    """Checks TAPO's settings in a configuration and the run's tools; problems go to ``findings``."""
    from verl_tapo.settings import load_settings
    from verl_tapo.trainer.check import declare_tools, find_problems, find_warnings, sources

    rows = [("algorithm.adv_estimator", str(config.algorithm.adv_estimator))]
    if config.algorithm.adv_estimator != "tapo":
        findings.problems.append(f"algorithm.adv_estimator={config.algorithm.adv_estimator}, not tapo")
        return rows, []
    rollout = config.actor_rollout_ref.rollout
    try:
        declare_tools(config)
        settings = load_settings(config.algorithm)
    except ValueError as error:
        findings.problems.append(_one_line(error))
        return rows, []
    findings.problems += find_problems(config, settings)
    findings.warnings += find_warnings(config, settings)
    findings.warnings += _unlike_verls_own(config)
    for part in (settings.rule, settings):
        rows += [
            (f"algorithm.tapo.{f.name}", str(getattr(part, f.name)))
            for f in fields(part)
            if f.init and f.name != "rule"
        ]
    rows += [
        ("rollout.agent.default_agent_loop", str(rollout.agent.default_agent_loop)),
        ("rollout.multi_turn.format", str(rollout.multi_turn.format)),
        ("rollout.n", str(rollout.n)),
        *sources(config, settings),
        ("trainer", f"V1, {config.trainer.v1.trainer_mode}" if config.trainer.get("use_v1", False) else "V0"),
    ]
    return rows, _examine_tools(config, settings.rule, findings)


def _examine_tools(config: Any, rule: TapoConfig, findings: Findings) -> _Rows:
    """The tools, loaded as veRL's agent loops load them, and which of them take part."""
    from verl_tapo.trainer.tools_check import config_problems, load, participation, rule_problems

    if config_problems(config)[0]:
        return []  # already reported
    try:
        tools = load(config)
    except ValueError as error:
        findings.problems.append(str(error))
        return []
    if tools is None:
        return []
    findings.problems += [problem for problem in rule_problems(rule, tools) if problem not in findings.problems]
    return list(participation(rule, tools))


def _examine_model(model: str, config: Any, findings: Findings) -> list[tuple[str, _Rows]]:
    """Examines the model that ``--model`` names; returns the sections to show."""
    from verl_tapo.model_check.examine import examine
    from verl_tapo.trainer.tools_check import load_schemas

    try:
        schemas = load_schemas(config)
    except Exception:  # already reported, with all that is wrong with the configuration
        schemas = None
    with _ended_after(_MODEL_SECONDS, f"{model} is still being examined: its chat template or tokenizer does not end"):
        report = examine(model, config, schemas)
    findings.problems += report.problems
    findings.warnings += report.warnings
    return report.sections


def _unlike_verls_own(config: Any) -> Iterator[str]:
    """Names what the rollouts or a GPU need and is missing here, or whose version veRL's extras
    exclude."""
    import torch
    from packaging.requirements import Requirement

    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    needs = {}
    if rollout.get("name") == "vllm":
        needs["vllm"] = "actor_rollout_ref.rollout.name=vllm"
    attention = model.override_config.get("attn_implementation", "flash_attention_2")  # veRL's default
    if torch.cuda.is_available() and attention.startswith("flash"):
        needs["flash-attn"] = f"actor_rollout_ref.model.override_config.attn_implementation={attention}"
    extras = {asked.name: asked for asked in map(Requirement, importlib.metadata.requires("verl") or ())}
    for package, setting in needs.items():
        specifier = extras.get(package, Requirement(package)).specifier
        named = f"veRL {importlib.metadata.version('verl')} names {package}{specifier}"
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield f"{setting}: {package} is not installed; {named}"
            continue
        if not specifier.contains(version, prereleases=True):
            yield f"{setting}: {package} is {version}; {named}. Keep an eye on training/rollout_probs_diff_max"


if __name__ == "__main__":
    sys.exit(main())
