"""The doctor, in this process for configurations, in others for what is not installed or switched off."""

import json
import os
import re
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
        (["trainer.project_name=${oc.env:NO_SUCH}"], "Environment variable 'NO_SUCH' not found"),
        (["--config", "no_such_file.yaml"], "the configuration does not compose: "),
        (["--config", "no_such_name"], "the configuration does not compose: "),
        (["algorithm.adv_estimator=grpo"], "algorithm.adv_estimator=grpo, not tapo"),
        (["+algorithm.tapo.base_estimator=gae"], "base_estimator=gae is no group estimator"),
        (["+algorithm.tapo.tool_format=nope"], "the tool format 'nope' is not known"),
        (["+algorithm.tapo.tools.search.query=fuzzy"], "unknown kernel 'fuzzy'"),
        (["+algorithm.tapo.tools={}"], "algorithm.tapo.tools names no tool"),
        (["+algorithm.tapo.record_dir=/dev/null"], "algorithm.tapo.record_dir=/dev/null cannot be written to"),
        (["+algorithm.tapo.record_dir=/proc/no/where"], "algorithm.tapo.record_dir=/proc/no/where cannot be written"),
        (["+algorithm.tapo.error_markers=null"], "algorithm.tapo.error_markers must be a list of non-empty strings"),
    ],
)
def test_bad_configurations(capsys, arguments, problem):
    code, out = doctor(capsys, *arguments)
    assert code == 1
    assert problem in out.split("Problems:")[1]
    assert "TAPO would not run." in out


def test_the_command_line_of_main_ppo_as_it_is(capsys, tmp_path):
    (tmp_path / "own.yaml").write_text("defaults: [tapo, _self_]\nalgorithm: {tapo: {theta: 0.7}}\n")
    override = "actor_rollout_ref.rollout.n=8"
    for given in (
        ["--config-name", "tapo", override, "algorithm.tapo.theta=0.7"],
        [override, "-cn", "tapo", "algorithm.tapo.theta=0.7"],
        [override, "--config-dir", str(tmp_path), "--config-name", "own", "hydra.run.dir=out"],
        ["--config-path", str(tmp_path), override, "--config-name=own.yaml", "trainer.nnodes=1"],
        ["--config-dir", str(tmp_path), "--config-name=tapo", override, "algorithm.tapo.theta=0.7"],
    ):
        code, out = doctor(capsys, *given)
        assert code == 0, out
        assert "algorithm.tapo.theta              0.7" in out
        assert "rollout.n                         8" in out


def test_the_platform_that_is_missing_on_a_cpu(capsys, monkeypatch):
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    code, out = doctor(capsys, "--config-name", "cpu")
    assert code == 1
    assert "'VERL_PLATFORM' not found\"; put VERL_PLATFORM=cpu before the command" in out.split("Problems:")[1]


def test_an_option_that_there_is_not(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "trainer.nnodes=1", "--confg-name", "tapo"])
    assert "unrecognized arguments: --confg-name" in capsys.readouterr().err


def test_a_record_dir_with_files_of_others(capsys, tmp_path):
    (tmp_path / "1.jsonl.gz").write_bytes(b"dumps")
    code, out = doctor(capsys, f"+algorithm.tapo.record_dir={tmp_path}")
    assert code == 1
    assert f"record_dir={tmp_path} holds 1.jsonl.gz, " in out.split("Problems:")[1]
    code, out = doctor(capsys, f"+algorithm.tapo.record_dir={tmp_path / 'new'}")
    assert code == 0, out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.jsonl.gz"]  # looking leaves no trace


def test_gspo_in_a_form_that_is_not_the_paper_s(capsys):
    gspo = "actor_rollout_ref.actor.policy_loss.loss_mode=gspo"
    code, out = doctor(capsys, gspo)
    assert code == 0, out
    assert "loss_mode=gspo with veRL's default loss_agg_mode=token-mean" in out.split("Warnings:")[1]
    for arguments in ([gspo, "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"], []):
        assert "paper's GSPO" not in doctor(capsys, *arguments)[1]


def test_a_filter_of_groups_that_luck_comes_after(capsys):
    filtered, luck = "algorithm.filter_groups.enable=true", "+algorithm.tapo.grounding.luck=true"
    code, out = doctor(capsys, filtered, luck)
    assert code == 0, out
    assert "before grounding.luck tells guesses from answers that were found" in out.split("Warnings:")[1]
    for arguments in ([filtered], [luck], ["~algorithm.filter_groups", luck]):
        code, out = doctor(capsys, *arguments)
        assert code == 0, out
        assert "filter_groups" not in out


TOOLS = """
import sys
from verl.tools.base_tool import BaseTool

class Search(BaseTool):
    def __init__(self, config, tool_schema):
        if config.get("fail") == "raise":
            raise ConnectionError("the index is not there")
        if config.get("fail") == "exit":
            sys.exit("no key")
        super().__init__(config, tool_schema)

class Own(BaseTool):
    def get_openai_tool_schema(self):
        from verl.tools.schemas import OpenAIFunctionToolSchema
        properties = {"url": {"type": "string"}}
        function = {"name": "fetch", "description": "f", "parameters": {"type": "object", "properties": properties}}
        return OpenAIFunctionToolSchema.model_validate({"type": "function", "function": function})
"""
FUNCTIONS = '''
from verl.tools.function_tool import function_tool

@function_tool
def python_{number}(code: str) -> str:
    """Runs code.

    Args:
        code: what to run.
    """
    return code
'''
SCHEMA = """
    tool_schema:
      type: function
      function:
        name: search
        description: searches
        parameters:
          type: object
          properties:
            query: {type: string, description: q}
            n: {type: integer, description: how many}
          required: [query]
"""


@pytest.fixture
def tools_file(tmp_path, monkeypatch):
    """Writes a file of tools; gives the override that names it. The tools' module is `tools_of_<number>`."""
    made = []

    def write(text):
        number = f"{os.getpid()}_{id(made)}_{len(made)}"
        (tmp_path / f"tools_of_{number}.py").write_text(TOOLS)
        path = tmp_path / f"tools_{number}.yaml"
        path.write_text(text.replace("MODULE", f"tools_of_{number}"))
        made.append(path)
        return f"actor_rollout_ref.rollout.multi_turn.tool_config_path={path}"

    monkeypatch.syspath_prepend(tmp_path)
    return write


GOOD = "tools:\n  - class_name: MODULE.Search\n    config: {type: native}" + SCHEMA


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        # as veRL's documentation has it
        (
            "tools:\n  - class_name: MODULE.Search\n    config: {}" + SCHEMA,
            "tools[0] (MODULE.Search) has no config.type",
        ),
        ("tools:\n  - class_name: MODULE.Search" + SCHEMA, "tools[0] (MODULE.Search) has no config.type"),
        (GOOD.replace("native", "mcp"), "config.type='mcp' is not known; known: native"),
        (GOOD.replace("MODULE", "nowhere_at_all"), "there is no module 'nowhere_at_all'; is its folder on PYTHONPATH?"),
        (GOOD.replace("MODULE", "nowhere_at.all"), "there is no module 'nowhere_at.all'; is its folder on PYTHONPATH?"),
        (GOOD.replace("MODULE.Search", "Search"), "there is no module 'Search'; is its folder on PYTHONPATH?"),
        (GOOD.replace("MODULE.Search", "MODULE.Serach"), "veRL cannot load the tools of "),
        (GOOD.replace("        name: search\n", ""), "tools[0] (MODULE.Search): its tool_schema is invalid: "),
        (GOOD.replace("type: native", "type: native, fail: raise"), "ConnectionError: the index is not there"),
        (GOOD.replace("type: native", "type: native, fail: exit"), "SystemExit: no key"),
        ("tools:\n  - config: {type: native}", "tools[0] has no class_name"),
        ("tools: search", "has no list `tools`"),
        ("- tools", "has no list `tools`"),
        ("tools: [", "cannot be read: "),
    ],
)
def test_tools_that_verl_cannot_load(capsys, tools_file, text, problem):
    code, out = doctor(capsys, tools_file(text))
    assert code == 1, out
    assert "Problems:" in out
    told = out.split("Problems:")[1]
    for part in problem.split("MODULE"):
        assert part in told
    assert told.count("  - ") == 1, told


def test_a_file_of_tools_that_is_not_there(capsys):
    code, out = doctor(capsys, "actor_rollout_ref.rollout.multi_turn.tool_config_path=nowhere.yaml")
    assert code == 1
    assert "tool_config_path=nowhere.yaml cannot be read: " in out.split("Problems:")[1]


def test_which_tools_take_part(capsys, tools_file, tmp_path):
    override = tools_file(GOOD + "  - class_name: MODULE.Own\n    config: {type: native}\n")
    functions = tmp_path / "functions.py"
    functions.write_text(FUNCTIONS.replace("{number}", "a"))
    overrides = [override, f"actor_rollout_ref.rollout.multi_turn.function_tool_path={functions}"]
    code, out = doctor(capsys, *overrides)
    assert code == 0, out
    shown = out.split("Tools:\n")[1].split("\n\n")[0].splitlines()
    assert [line.split(maxsplit=1) for line in shown] == [
        ["search", "takes part: query=text, n=exact"],
        ["fetch", "takes part: url=exact"],
        ["python_a", "left out: its name says that it acts"],
    ]
    code, out = doctor(capsys, *overrides, "+algorithm.tapo.tools.search={n:{kernel:number,scale:4}}")
    assert code == 0, out
    shown = out.split("Tools:\n")[1].split("\n\n")[0].splitlines()
    assert [line.split(maxsplit=1) for line in shown] == [
        ["search", "takes part: query=exact, n=number"],
        ["fetch", "left out: not in algorithm.tapo.tools"],
        ["python_a", "left out: not in algorithm.tapo.tools"],
    ]


DECLARING = """
class Calculator(BaseTool):
    schema = {"name": "calculator", "description": "c", "parameters": {"type": "object", "properties": {"term": {}}}}
    kernels = {"term": "text"}
    def get_openai_tool_schema(self):
        from verl.tools.schemas import OpenAIFunctionToolSchema
        properties = {"term": {"type": "string"}}
        function = {**self.schema, "parameters": {"type": "object", "properties": properties}}
        return OpenAIFunctionToolSchema.model_validate({"type": "function", "function": function})

class Clock(Calculator):
    schema = {**Calculator.schema, "name": "clock"}
    kernels = None
"""


@pytest.mark.parametrize("with_code", [False, pytest.param(True, marks=pytest.mark.long)])
def test_what_a_tool_s_class_declares_takes_part(capsys, tools_file, monkeypatch, with_code):
    """Where ``tools`` is null; what stands there counts alone."""
    from verl_tapo.trainer.check import check_run

    monkeypatch.setattr(sys.modules[__name__], "TOOLS", TOOLS + DECLARING)
    classes = ["Calculator", "Clock", *(["Own"] if with_code else [])]
    text = GOOD + "".join(f"  - class_name: MODULE.{name}\n    config: {{type: native}}\n" for name in classes)
    expected = {"search": {"query": "text", "n": "exact"}, "calculator": {"term": "text"}}
    if with_code:  # a class that only says in code what it takes
        expected["fetch"] = {"url": "exact"}
    override = tools_file(text)
    config = composed([override])
    assert check_run(config).rule.tools == expected
    assert config.algorithm.tapo.tools == expected  # as the estimator will read it
    code, out = doctor(capsys, override)
    assert code == 0, out
    shown = dict(line.split(maxsplit=1) for line in out.split("Tools:\n")[1].split("\n\n")[0].splitlines())
    assert shown["calculator"] == "takes part: term=text"
    assert shown["clock"] == "left out: not in algorithm.tapo.tools"
    alone = composed([override, "+algorithm.tapo.tools.search.query=text"])
    assert check_run(alone).rule.tools == {"search": {"query": "text"}}
    if not with_code:  # else the parameters are known once the tools are loaded
        with pytest.raises(ValueError, match=r"calculator\.trem: the tool has no such parameter; did you mean 'term'"):
            check_run(composed([override, "+algorithm.tapo.tools.calculator.trem=text"]))


@pytest.mark.parametrize("with_code", [False, True])
@pytest.mark.parametrize(
    ("tool", "problem"),
    [
        ("search.querry", "algorithm.tapo.tools.search.querry: the tool has no such parameter; did you mean 'query'?"),
        ("serach.query", "algorithm.tapo.tools.serach: no configured tool has that name; did you mean 'search'?"),
        ("zoom.bbox", "algorithm.tapo.tools.zoom: no configured tool has that name; known: "),
    ],
)
def test_tools_of_the_rule_that_are_none_of_the_run(capsys, tools_file, with_code, tool, problem):
    """By the file alone, as the trainers' constructors look, or with tools whose schema only their class knows."""
    from verl_tapo.trainer.check import check_run

    override = tools_file(GOOD + ("  - class_name: MODULE.Own\n    config: {type: native}\n" if with_code else ""))
    overrides = [override, f"+algorithm.tapo.tools.{tool}=text"]
    code, out = doctor(capsys, *overrides)
    assert code == 1
    assert out.split("Problems:")[1].count(problem) == 1
    if not with_code:
        with pytest.raises(ValueError, match=re.escape(problem)):
            check_run(composed(overrides))


def composed(overrides):
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=["algorithm.adv_estimator=tapo", *overrides])


def test_tools_that_only_an_agent_loop_of_its_own_knows_are_not_judged(capsys):
    code, out = doctor(capsys, "+algorithm.tapo.tools.anything.query=text")
    assert code == 0, out
    assert "Tools:" not in out


def data_file(path, names):
    """Rows of veRL's form; ``names``: of agent loops, None for rows without any."""
    rows = [{"agent_name": name} for name in names] if names else [{}, {}]
    rows = [{"prompt": [{"role": "user", "content": "?"}], **row} for row in rows]
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.long
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_rows_that_override_the_recording_loop(capsys, tmp_path, suffix):
    recording = "actor_rollout_ref.rollout.agent.default_agent_loop=tapo_tool_agent"
    warning = "rows name the agent loop 'single_turn_agent', 'tool_agent' in their column agent_name"
    other = data_file(tmp_path / f"b{suffix}", ["single_turn_agent", "tool_agent", "tapo_tool_agent"])
    plain = data_file(tmp_path / f"a{suffix}", None)
    right = data_file(tmp_path / f"c{suffix}", ["tapo_tool_agent"])
    for files, expected in ((other, True), (f"[{plain},{other}]", True), (plain, False), (right, False)):
        code, out = doctor(capsys, recording, f"data.train_files={files}")
        assert code == 0, out
        assert (warning in out) == expected
    _, out = doctor(capsys, f"data.train_files={other}")
    assert "agent_name" not in out  # nothing is lost that was asked for
    loops = tmp_path / "loops.yaml"
    targets = "_target_: verl_tapo.rollout.tool_agent.TapoToolAgentLoop"
    loops.write_text(f"- name: tool_agent\n  {targets}\n- name: single_turn_agent\n  {targets}\n")
    given = f"actor_rollout_ref.rollout.agent.agent_loop_config_path={loops}"
    _, out = doctor(capsys, recording, given, f"data.train_files={other}")
    assert "agent_name" not in out


@pytest.mark.long
@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"{", b'[{"agent_name": "tool_agent"}]', b"\xff\xfe{}", b'"text"\n3']
)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_data_files_that_are_none_are_not_the_doctor_s_affair(capsys, tmp_path, suffix, content):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    recording = "actor_rollout_ref.rollout.agent.default_agent_loop=tapo_tool_agent"
    code, out = doctor(capsys, recording, f"data.train_files={path}", "actor_rollout_ref.rollout.n=4")
    assert code == 0, out
    assert "agent_name" not in out


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
def test_a_plugin_that_cannot_load_says_so_on_stderr():
    """veRL itself would log it at DEBUG, and fail later with an unknown estimator."""
    done = run("import sys\nsys.modules['wrapt'] = None\nimport verl\nprint('verl is there')")
    assert "verl is there" in done.stdout
    assert "[verl-tapo] the plug-in failed to load:" in done.stderr


def test_rollouts_of_another_manager(capsys):
    """Uni-agent's, say: neither veRL's agent loops nor our recording one run then."""
    manager = "uni_agent.framework.entry.AgentFrameworkRolloutAdapter"
    code, out = doctor(
        capsys,
        "--config",
        "tapo",
        "actor_rollout_ref.rollout.n=8",
        f"+actor_rollout_ref.rollout.agent.agent_loop_manager_class={manager}",
        "algorithm.tapo.success_key=solved",
        "actor_rollout_ref.rollout.multi_turn.format=qwen3_coder",
    )
    assert code == 0
    assert re.search(rf"rollouts from +{manager}\n", out)
    assert re.search(r"success from +the reward's 'solved', else the score; 0.5 or above\n", out)
    assert re.search(r"calls from +the records \(tapo_steps\), else the tokens \(qwen3_coder\)\n", out)
    (warning,) = out.split("Warnings:\n")[1].strip().splitlines()[:-1]
    assert f"agent_loop_manager_class={manager} makes the rollouts" in warning
    _, out = doctor(capsys, "--config", "tapo", "algorithm.tapo.step_source=recorded")
    assert re.search(r"rollouts from +veRL's agent loops \(single_turn_agent by default\)\n", out)
    assert re.search(r"calls from +the records \(tapo_steps\)\n", out)


WITHOUT_V0 = """
import importlib.abc, importlib.util, sys

class WithoutV0(importlib.abc.MetaPathFinder):
    # A veRL to come: V0's trainer is gone from its module, and what was built on it cannot be imported.
    def find_spec(self, name, path, target=None):
        if name != "verl.trainer.ppo.ray_trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            for gone in ("RayPPOTrainer", "compute_response_mask", "compute_data_metrics"):
                delattr(module, gone)
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, WithoutV0())
"""


@pytest.mark.long
def test_where_v0_is_gone_its_hooks_say_nothing_and_v1_trains():
    code = """
import numpy as np, torch
import verl.trainer.ppo.v1.trainer_base
from omegaconf import OmegaConf
from verl_tapo.plugin import HOOKS
from verl_tapo.settings import TapoSettings
from verl_tapo.trainer.v1 import base_advantages
print(*sorted({hook.status for hook in HOOKS if ".v0:" in hook.handler}), sep="|")
print(*[hook.status for hook in HOOKS if ".v1:" in hook.handler], sep="|")
try:
    import verl.experimental.separation.ray_trainer
except ImportError as error:
    print("gone:", error.name)
batch = {"token_level_rewards": torch.tensor([[0.0, 1.0], [0.0, 0.0]]), "response_mask": torch.ones(2, 2)}
columns = {"uid": np.array(["a", "a"], dtype=object), "keys": ["a_0_0", "a_1_0"]}
print(base_advantages(TapoSettings(), OmegaConf.create({}), batch, columns, np.arange(2))[0].sign().tolist())
"""
    done = run(WITHOUT_V0 + code)
    assert "[verl-tapo]" not in done.stderr
    v0, v1, gone, advantages = done.stdout.splitlines()[-4:]
    assert v0 == "not needed: this veRL has no V0 trainer|waiting for import"
    assert v1 == "active|active"
    assert gone == "gone: verl.trainer.ppo.ray_trainer"
    assert advantages == "[[1.0, 1.0], [-1.0, -1.0]]"


def test_a_hook_that_changed_says_so_and_leaves_other_runs_alone():
    code = """
import types, sys
import verl_tapo.plugin as plugin
hook = plugin.HOOKS[3]
module = types.ModuleType("changed")
class PPOTrainer:
    def _compute_advantage(self, data): return "stock"
module.PPOTrainer = PPOTrainer
plugin._install(hook, module)
print(hook.status, PPOTrainer()._compute_advantage(1))
"""
    done = run(code)
    assert "FAILED: TypeError: PPOTrainer._compute_advantage has no parameter batch, metrics stock" in done.stdout
    assert "[verl-tapo] cannot hook into" in done.stderr


BROKEN_RAPIDFUZZ = """
import pathlib, sys, tempfile
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "rapidfuzz.py").write_text("raise RuntimeError('built for another machine')")
sys.path.insert(0, str(folder))
"""


@pytest.mark.long
def test_a_broken_rapidfuzz_ends_runs_with_tapo_only():
    code = """
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
import verl.experimental.agent_loop.tool_agent_loop, verl.trainer.ppo.v1.trainer_base, verl.trainer.ppo.ray_trainer
from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
from verl.trainer.ppo import core_algos
from verl_tapo.plugin import HOOKS
import verl_tapo.trainer.v0, verl_tapo.trainer.v1
from verl_tapo.trainer.check import check_run
from verl_tapo.settings import load_settings
from verl_tapo.trainer.estimator import rollout_metrics
print(sorted({hook.status for hook in HOOKS if hook.module in sys.modules}))
print("tapo_tool_agent" in _agent_loop_registry, "tapo" in core_algos.ADV_ESTIMATOR_REGISTRY)
for overrides in (["algorithm.adv_estimator=grpo", "+algorithm.tapo.beta=0.5"],
                  ["algorithm.adv_estimator=tapo", "+algorithm.tapo.tools.zoom.bbox=iou"],
                  ["algorithm.adv_estimator=tapo"]):
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    try:
        print("fine", check_run(config) is not None)
    except ValueError as error:
        print("ValueError", error)
"""
    done = run(BROKEN_RAPIDFUZZ + code)
    assert done.returncode == 0, done.stderr
    statuses, registered, grpo, without_text, by_default = done.stdout.splitlines()[-5:]
    assert "FAILED" not in statuses
    assert registered == "True True"
    assert (grpo, without_text) == ("fine False", "fine True")
    assert "the kernel 'text' would fail" in by_default
    assert "built for another machine" in by_default


@pytest.mark.long
def test_a_kernel_whose_package_is_missing_is_a_problem_before_the_run(capsys, monkeypatch):
    code, out = doctor(capsys, "+algorithm.tapo.tools.search.query=embedding")
    assert code == 0, out
    monkeypatch.setattr("verl_tapo.rule.similarity.find_spec", lambda name: None)
    code, out = doctor(capsys, "+algorithm.tapo.tools.search.query=embedding")
    assert code == 1
    problem = "algorithm.tapo.tools: the kernel 'embedding' would fail: kernel 'embedding' needs sentence-transformers"
    assert problem in out.split("Problems:")[1]


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

    folder = Path(__file__).parents[2] / "examples" / "recorded_batch"
    done = subprocess.run([sys.executable, str(folder / "demo.py")], capture_output=True, text=True, check=True)
    shown = (folder / "README.md").read_text().split("```\n")[-2]
    assert shown in done.stdout
