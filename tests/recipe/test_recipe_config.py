"""The recipe's YAMLs and scripts: they compose with the real veRL, and pass its own checks and shellcheck."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pandas as pd
import pytest

pytest.importorskip("verl.utils.config")

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from search_agent.check import _compare_prompts, _credit_problems
from search_agent.prompts import system_prompt
from search_agent.tools import ImageSearch, TextSearch, Visit, Zoom
from search_agent.tools.base import SearchTool
from verl.tools.tool_registry import initialize_tools_from_config
from verl.utils.config import omega_conf_to_dataclass, validate_config

from search_backends.tools import Answer
from verl_tapo.calls.limits import with_own_limits
from verl_tapo.rollout.tool_agent import TapoToolAgentLoop
from verl_tapo.trainer.check import check_run, declare_tools

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "multimodal_search"
POLICIES = sorted(file.stem for file in (RECIPE / "config" / "policy").glob("*.yaml"))
LOSSES = sorted(file.stem for file in (RECIPE / "config" / "loss").glob("*.yaml"))


def composed(*overrides, name="multimodal_search"):
    with initialize_config_dir(str(RECIPE / "config"), version_base=None):
        data = ["data.train_files=T", "data.val_files=V", "hydra.searchpath=[pkg://verl.trainer.config]"]
        return compose(name, overrides=[*data, *overrides])


@pytest.fixture(autouse=True)
def _recipe(monkeypatch):
    monkeypatch.setenv("RECIPE", str(RECIPE))


def test_what_the_issue_names_is_there():
    assert {"qwen2_5_vl_7b", "qwen3_vl_4b", "qwen3_vl_8b"} <= set(POLICIES)  # and whatever a team puts beside them
    assert {"grpo", "gspo", "sapo"} <= set(LOSSES)


@pytest.mark.parametrize(
    ("policy", "loss"),
    [
        pytest.param(policy, loss, marks=[] if (policy == POLICIES[0] or loss == LOSSES[0]) else pytest.mark.long)
        for policy, loss in itertools.product(POLICIES, LOSSES)
    ],
)
def test_composes_and_passes_verl_s_checks(policy, loss):
    for advantage, nodes in (("tapo", 8), ("grpo", 1)):
        config = composed(
            f"policy={policy}", f"loss={loss}", f"algorithm.adv_estimator={advantage}", f"trainer.nnodes={nodes}"
        )
        validate_config(config, use_reference_policy=False, use_critic=False)
        check_run(config)
        rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
        assert rollout.n == 8
        assert config.actor_rollout_ref.actor.policy_loss.loss_mode == {"grpo": "vanilla"}.get(loss, loss)
        assert config.data.train_batch_size == 128
        assert config.trainer.experiment_name == f"{advantage}-{config.actor_rollout_ref.actor.policy_loss.loss_mode}"
    assert config.actor_rollout_ref.actor.optim.lr == 1e-6


def test_the_cpu_s_differs_where_it_must(monkeypatch):
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    config = composed(name="multimodal_search_cpu")
    validate_config(config, use_reference_policy=False, use_critic=False)
    rollout = config.actor_rollout_ref.rollout
    assert (rollout.name, rollout.agent.default_agent_loop) == ("transformers", "tapo_tool_agent")
    assert rollout.multi_turn.tool_config_path == composed().actor_rollout_ref.rollout.multi_turn.tool_config_path


@pytest.mark.parametrize(
    ("name", "tools"),
    [("tools_train", (TextSearch, ImageSearch, Zoom)), ("tools_eval", (TextSearch, ImageSearch, Zoom, Visit))],
)
def test_tapo_knows_every_tool_by_the_kernels_that_it_declares(monkeypatch, name, tools):
    monkeypatch.setenv("IMAGE_RESULTS", "results.sqlite")
    config = composed(f"actor_rollout_ref.rollout.multi_turn.tool_config_path={RECIPE}/config/{name}.yaml")
    check_run(config)
    assert OmegaConf.to_container(config.algorithm.tapo.tools) == {cls.schema["name"]: cls.kernels for cls in tools}


def test_coordinates_are_the_policy_s():
    zoom = Zoom({"type": "native"})
    for policy, what in {"qwen2_5_vl_7b": "bbox is in pixels", "qwen3_vl_4b": "bbox is in thousandths"}.items():
        settings = composed(f"policy={policy}").data.tool_settings
        assert what in system_prompt([zoom], settings)


def test_limits_of_calls_are_the_tools_own():
    (loop,) = OmegaConf.load(RECIPE / "config" / "agent_loop.yaml")
    tools = [cls({"type": "native"}) for cls in (TextSearch, ImageSearch, Zoom, Visit)]
    expected = {"text_search": 8, "image_search": 3, "zoom": 6, "all": 12}
    assert with_own_limits(loop.max_calls, {tool.name: tool for tool in tools}) == expected
    assert Zoom({"type": "native", "max_calls": 2}).max_calls == 2


@pytest.mark.parametrize(
    ("name", "tools"),
    [
        ("tools_train", ["text_search", "image_search", "zoom"]),
        ("tools_eval", ["text_search", "image_search", "zoom", "visit"]),
    ],
)
def test_tools_are_made(monkeypatch, tmp_path, name, tools):
    from search_backends.providers.precomputed import write

    results = tmp_path / "results.sqlite"
    write(results, [])
    monkeypatch.setenv("SERPER_API_KEY", "k")  # too short to be hidden: it may be part of any word
    monkeypatch.setenv("IMAGE_RESULTS", str(results))
    made = initialize_tools_from_config(str(RECIPE / "config" / f"{name}.yaml"))
    assert [tool.name for tool in made] == tools
    multi_turn = composed().actor_rollout_ref.rollout.multi_turn
    assert all(tool.settings.limit_chars <= multi_turn.max_tool_response_length for tool in made)
    (loop,) = OmegaConf.load(RECIPE / "config" / "agent_loop.yaml")
    assert loop._target_.endswith(TapoToolAgentLoop.__name__)
    assert all(tool.settings.timeout_s < loop.tool_timeout_s for tool in made)
    assert composed().actor_rollout_ref.rollout.limit_images >= max(getattr(t.settings, "max_images", 0) for t in made)


def test_qwen2_5_vl_hears_of_the_tools():
    """Its own chat template is silent about them."""
    from transformers import AutoTokenizer

    model = RECIPE.parents[1] / "examples" / "quickstart" / "flags_and_facts" / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = composed("policy=qwen2_5_vl_7b").actor_rollout_ref.model.custom_chat_template
    tool = Zoom({"type": "native"})
    schema = tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True)
    call = {"type": "function", "function": {"name": "zoom", "arguments": {"image": 1, "bbox": [0, 0, 5, 5]}}}
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    answer = {"role": "tool", "content": [{"type": "text", "text": "Image 2:"}, {"type": "image"}]}
    system = {"role": "system", "content": "Be brief."}
    messages = [system, question, {"role": "assistant", "content": "I look.", "tool_calls": [call]}, answer]

    def render(messages, **options):
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)

    image = "<|vision_start|><|image_pad|><|vision_end|>"
    text = render(messages, tools=[schema], add_generation_prompt=True)
    head, _, rest = text.partition("<|im_end|>\n")
    assert head.startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    assert '"name": "zoom"' in head
    assert "<tool_call>" in head
    assert rest == (
        f"<|im_start|>user\n{image}What is it?<|im_end|>\n<|im_start|>assistant\nI look.\n<tool_call>\n"
        '{"name": "zoom", "arguments": {"image": 1, "bbox": [0, 0, 5, 5]}}\n</tool_call><|im_end|>\n'
        f"<|im_start|>user\n<tool_response>\nImage 2:{image}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert render([question]).startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user")
    assert render([system, question]) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{image}What is it?<|im_end|>\n"
    )
    # veRL renders answers alone and appends them: turns must not depend on what stands before them
    assert text.endswith(render([question, answer], add_generation_prompt=True).partition("What is it?<|im_end|>\n")[2])


def script(name, *arguments, **env):
    return subprocess.run(
        ["bash", RECIPE / name, *arguments], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "qwen9"], f"--policy qwen9 is none of: {' '.join(POLICIES)}"),
        (["--loss", "ppo"], f"--loss ppo is none of: {' '.join(LOSSES)}"),
        (["--los", "grpo"], "unknown option --los"),
        (["--loss"], "--loss needs a value"),
        ([], "--data is missing"),
        (["--data", "/no/such"], "there is no file /no/such"),
        (["--data", __file__, "--val", __file__, "--nodes", "two"], "--nodes must be a number"),
        (["--data", __file__, "--val", __file__, "--nodes", "2"], "needs RAY_ADDRESS"),
    ],
)
def test_train_sh_says_what_is_wrong(arguments, message):
    done = script("train.sh", *arguments, RAY_ADDRESS="")
    assert done.returncode == 2
    assert message in done.stderr


def test_other_scripts_say_what_they_want(tmp_path):
    assert "global_step_100 merged" in script("merge.sh").stderr
    assert "has no folder 'actor'" in script("merge.sh", str(tmp_path), "out").stderr
    assert "join FIRST_ADDRESS" in script("ray_cluster.sh").stderr
    assert "join needs the first node's address" in script("ray_cluster.sh", "join", "--block").stderr
    assert f"--policy: {POLICIES[0]}" in script("train.sh", "--help").stdout


def stand_in(folder, text):
    """A ``python3`` that does this; the PATH with it."""
    folder.mkdir()
    file = folder / "python3"
    file.write_text(f"#!{sys.executable}\nimport json, os, shutil, sys\nfrom pathlib import Path\n{text}")
    file.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


ODD_NAMES = ["a=b", "a,b", "(a) [b]", "#a ~b", "it's", 'say "a"', "Größe 北京", "\\", "a\\'b\\", "$a {b}", "null"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_train_sh_gives_hydra_paths_as_they_are(tmp_path, name):
    """Of the recipe, which is called through a symbolic link, of data and of what workers are told."""
    path = stand_in(tmp_path / "bin", "print(json.dumps(sys.argv[1:]))")
    recipe = tmp_path / name / "recipe"
    shutil.copytree(RECIPE, recipe)
    link = tmp_path / "train"
    link.symlink_to(recipe / "train.sh")
    for file in ("train data", "val data"):
        (tmp_path / name / file).touch()
    cache = str(tmp_path / name / "cache")
    done = subprocess.run(
        [link, "--data", "train data", "--val", "val data", "trainer.save_freq=5"],
        cwd=tmp_path / name,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": path, "SEARCH_CACHE": cache, "OUT": "out"},
    )
    checked, trained = map(json.loads, done.stdout.splitlines())
    assert checked[:2] == ["-m", "search_agent.check"]
    assert trained[:2] == ["-m", "verl.trainer.main_ppo"]
    assert trained[2:] == checked[2:]
    assert trained[2:6] == ["--config-dir", str(recipe / "config"), "--config-name", "multimodal_search"]
    parser = OverridesParser.create()
    overrides = {each.key_or_group: each.value() for each in map(parser.parse_override, trained[6:])}
    variables = "ray_kwargs.ray_init.runtime_env.env_vars"
    for key, value in {
        "data.train_files": tmp_path / name / "train data",
        "data.val_files": tmp_path / name / "val data",
        f"{variables}.RECIPE": recipe,
        f"{variables}.OUT": tmp_path / name / "out",
        f"{variables}.SEARCH_CACHE": cache,
    }.items():
        assert overrides[key] == str(value)
    assert overrides["trainer.save_freq"] == 5


def test_train_sh_keeps_a_cache_s_password_out_of_the_configuration(tmp_path):
    """VeRL prints it and Hydra writes it to a file. The processes inherit the variable all the same."""
    path = stand_in(tmp_path / "bin", "print(json.dumps([os.environ['SEARCH_CACHE'], *sys.argv[1:]]))")
    (tmp_path / "data").touch()
    for cache, told in (
        ("redis://:s%2Fe%40cret@host:6379/0", False),
        ("rediss://host:6379/0?password=cret", False),
        ("redis://host:6379/0", True),
    ):
        done = subprocess.run(
            [RECIPE / "train.sh", "--data", tmp_path / "data", "--val", tmp_path / "data"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PATH": path, "SEARCH_CACHE": cache, "OUT": str(tmp_path / "out")},
        )
        for inherited, *arguments in map(json.loads, done.stdout.splitlines()):
            assert inherited == cache
            assert "cret" not in " ".join(arguments)
            assert any("env_vars.SEARCH_CACHE" in argument for argument in arguments) == told


@pytest.mark.parametrize("where", ["recipe", "out", "data", "cache"])
def test_train_sh_refuses_paths_with_an_interpolation(tmp_path, where):
    path = stand_in(tmp_path / "bin", "sys.exit('started all the same')")
    odd = tmp_path / "a ${b}"
    odd.mkdir()
    recipe = (odd if where == "recipe" else tmp_path) / "recipe"
    shutil.copytree(RECIPE, recipe)
    data = (odd if where == "data" else tmp_path) / "data"
    data.touch()
    env = {"OUT": str(odd if where == "out" else tmp_path), "SEARCH_CACHE": str(odd if where == "cache" else tmp_path)}
    done = subprocess.run(
        [recipe / "train.sh", "--data", data, "--val", data],
        capture_output=True,
        text=True,
        env={**os.environ, **env, "PATH": path},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("train.sh: ")
    assert f"{odd}" in done.stderr
    assert "a path with ${ in it" in done.stderr
    assert len(done.stderr.splitlines()) == 1


MERGED = "target = Path(sys.argv[-1])\ntarget.mkdir()\n(target / 'config.json').write_text('{CONFIG}')\n"


@pytest.mark.parametrize(
    ("config", "kept", "code"),
    [
        ('{"vision_config": {}}', {"preprocessor_config.json": "{}", "model.safetensors.index.json": "{}"}, 0),
        ('{"vision_config": {}}', {"processor_config.json": '{"image_processor": {}}', "chat_template.jinja": "x"}, 0),
        ('{"vision_config": {}}', {"processor_config.json": '{"processor_class": "X"}'}, 1),
        ('{"vision_config": {}}', {}, 1),
        ('{"model_type": "qwen2"}', {}, 0),
    ],
)
def test_merge_sh_keeps_the_processor_of_images(tmp_path, config, kept, code):
    """veRL's merger leaves out what it cannot load, and succeeds."""
    path = stand_in(tmp_path / "bin", MERGED.replace("{CONFIG}", config))
    folder = tmp_path / "global_step_1" / "actor" / "huggingface"
    folder.mkdir(parents=True)
    for name, text in {**kept, "config.json": "of training"}.items():
        (folder / name).write_text(text)
    done = script("merge.sh", folder.parents[1], tmp_path / "merged", PATH=path)
    assert done.returncode == code
    assert ("has no processor of images" in done.stderr) == (code == 1)
    merged = {file.name: file.read_text() for file in (tmp_path / "merged").iterdir()}
    assert merged.pop("config.json") == config  # the merger's own
    assert merged == {name: text for name, text in kept.items() if "index" not in name}


@pytest.fixture
def ray(tmp_path):
    """A stand-in for Ray, which says what it was told and makes a token; the environment with it."""
    folder = tmp_path / "bin"
    path = stand_in(
        folder,
        "print(json.dumps([*sys.argv[1:], os.environ['RAY_AUTH_MODE']]))\n"
        "if 'health-check' in sys.argv and os.environ.get('SAYS'):\n    sys.exit(os.environ['SAYS'])\n"
        "if 'get-auth-token' in sys.argv:\n"
        "    token = Path.home() / '.ray' / 'auth_token'\n    token.parent.mkdir()\n    token.write_text('secret')",
    )
    (folder / "python3").rename(folder / "ray")
    path = path.replace(os.pathsep, f"{os.pathsep}{Path(sys.executable).parent}{os.pathsep}", 1)
    return {"PATH": path, "HOME": str(tmp_path), "RAY_START_LIMIT": "5"}


def test_ray_cluster_sh_starts_the_first_node(ray, tmp_path):
    """With a token that it makes and does not print, and `--block`, with which Ray ends as a job of Slurm needs it."""
    done = script("ray_cluster.sh", "head", "10.0.0.1", "--block", **ray, RAY_PORT="1234")
    *told, started = done.stdout.splitlines()
    assert json.loads(started) == [
        *("start", "--head", "--port", "1234", "--node-ip-address", "10.0.0.1", "--block", "--disable-usage-stats"),
        "token",
    ]
    assert told[0].endswith("ray_cluster.sh join 10.0.0.1")
    assert "RAY_ADDRESS=10.0.0.1:1234 ./train.sh" in told[2]
    assert "secret" not in done.stdout + done.stderr
    token = tmp_path / ".ray" / "auth_token"
    assert (token.stat().st_mode & 0o777, token.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_ray_cluster_sh_joins(ray, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = str(listening.getsockname()[1])
        join = ["ray_cluster.sh", "join", "127.0.0.1", "10.0.0.2", "--num-gpus", "8"]
        done = script(*join, **ray, RAY_PORT=port)
        assert done.returncode == 1
        assert "the first node's token is missing here: mkdir -p ~/.ray && scp -p 127.0.0.1:.ray" in done.stderr
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("secret")
        done = script(*join, **ray, RAY_PORT=port, SAYS="ray.exceptions.AuthenticationError: RPC error")
        assert (done.returncode, done.stdout) == (1, "")
        assert "the token here is not the first node's: mkdir" in done.stderr
        done = script(*join, **ray, RAY_PORT=port)
        assert json.loads(done.stdout) == [
            *("start", "--address", f"127.0.0.1:{port}", "--node-ip-address", "10.0.0.2", "--num-gpus", "8"),
            *("--disable-usage-stats", "token"),
        ]
    done = script(*join, **{**ray, "RAY_START_LIMIT": "0"}, RAY_PORT=port)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"nothing listens at 127.0.0.1:{port}: is Ray started there" in done.stderr


def test_slurm_sh_trains_once_all_nodes_are_there(tmp_path):
    """With stand-ins: Slurm starts what it is told, on one machine; Ray and the recipe's scripts say what they are."""
    copy = tmp_path / "recipe"
    shutil.copytree(RECIPE, copy)
    log = tmp_path / "log"
    programs = {
        tmp_path / "bin" / "scontrol": "echo node-a; echo node-b",
        tmp_path / "bin" / "hostname": "echo 10.0.0.1 172.17.0.1",
        tmp_path
        / "bin"
        / "srun": 'where=; while :; do case "$1" in --nodelist=*|--exclude=*) where="$1"; shift ;; --*) shift ;; '
        '*) break ;; esac; done; NODES="$where" exec "$@"',
        copy / "ray_cluster.sh": f'echo "$NODES $RAY_ADDRESS ray $*" >> {log}; [ "$1" = wait ] || exec sleep 60',
        copy / "train.sh": f'echo "$NODES $RAY_ADDRESS train $*" >> {log}',
    }
    (tmp_path / "bin").mkdir()
    for file, text in programs.items():
        file.write_text(f"#!/usr/bin/env bash\n{text}\n")
        file.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_SUBMIT_DIR": str(copy),
    }
    done = subprocess.run(
        ["bash", copy / "slurm.sh", "--data", "a b"], env=environment, cwd="/", timeout=60, check=False
    )
    assert done.returncode == 0
    said = log.read_text().splitlines()
    first, ray = "--nodelist=node-a", "10.0.0.1:6379"
    order = [line for line in said if " ray head" not in line and " ray join" not in line]
    assert order == [f"{first} {ray} {what}" for what in ("ray wait 1", "ray wait 2", "train --nodes 2 --data a b")]
    # These are in the background: when they come to say so is open.
    assert {line for line in said if line not in order} <= {
        f"{first}  ray head --block",
        f"--exclude=node-a {ray} ray join 10.0.0.1 --block",
    }


def test_ray_cluster_sh_waits_for_nodes_no_longer_than_told(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = script("ray_cluster.sh", "wait", "2", "1", PATH=path, RAY_ADDRESS="127.0.0.1:9")
    assert done.returncode == 1
    assert "nothing listens at 127.0.0.1:9: the first node is down" in done.stderr


@pytest.mark.long
def test_check_finds_what_is_wrong(tmp_path):
    file = tmp_path / "data.parquet"
    file.write_text("none")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    tools = tmp_path / "tools.yaml"
    text = (RECIPE / "config" / "tools_train.yaml").read_text()
    tools.write_text(text.replace("provider: service,", "provider: service, attempts: 1,"))
    multi_turn = "actor_rollout_ref.rollout.multi_turn"
    wrong = [f"{multi_turn}.tool_config_path={tools}", f"{multi_turn}.max_tool_response_length=256"]
    wrong += ["+algorithm.tapo.tools.zoom.box=iou"]
    data = ["--data", str(file), "--val", str(file)]
    done = script("train.sh", "--dry-run", *data, *wrong, PATH=path, SEARCH_URL="http://127.0.0.1:9")
    assert done.returncode == 1
    for message in (
        f"{file} is not parquet",
        "127.0.0.1:9",
        "max_tool_response_length=256 would cut",
        "algorithm.tapo.tools.zoom.box: the tool has no such parameter; did you mean 'bbox'?",
    ):
        assert message in done.stderr


class Calculator(SearchTool):
    schema: ClassVar = {
        "name": "calculator",
        "description": "Calculates.",
        "parameters": {"type": "object", "properties": {"term": {"type": "string", "description": "A term."}}},
    }
    kernels: ClassVar = {"term": "text"}

    async def answer(self, call):
        return Answer(call.text("term", 100))


@pytest.mark.parametrize(
    ("chosen", "problems", "said"),
    [
        (
            None,
            [],
            ["text_search: takes part: query=text", "calculator: takes part: term=text", "zoom: takes part: im"],
        ),
        ({"zoom": {}}, [], ["calculator: left out: not in algorithm.tapo.tools", "text_search: left out: not in"]),
        ({"calculatr": {}}, ["tools.calculatr: no configured tool has that name; did you mean 'calculator'?"], []),
        ({"browse": {}}, ["tools.browse: no configured tool has that name; known: calculator, text_search, zoom"], []),
        ({"zoom": {"box": "iou"}}, ["zoom.box: the tool has no such parameter; did you mean 'bbox'?"], []),
        ({"calculator": {}}, [], ["calculator: takes part: term=exact"]),
    ],
)
def test_check_says_which_tools_take_part(monkeypatch, tmp_path, capsys, chosen, problems, said):
    """A new tool is a class and a line in the YAML."""
    monkeypatch.setitem(sys.modules, "my_tools", SimpleNamespace(Calculator=Calculator, __spec__=1))
    file = tmp_path / "tools.yaml"
    names = ("search_agent.tools.TextSearch", "search_agent.tools.Zoom", "my_tools.Calculator")
    file.write_text("tools:\n" + "".join(f"- {{class_name: {name}, config: {{type: native}}}}\n" for name in names))
    config = composed(f"actor_rollout_ref.rollout.multi_turn.tool_config_path={file}")
    config.algorithm.tapo.tools = chosen
    declare_tools(config)
    found = list(_credit_problems(config.algorithm, initialize_tools_from_config(str(file))))
    assert len(found) == len(problems)
    assert all(words in problem for words, problem in zip(problems, found, strict=True))
    out = capsys.readouterr().out
    assert all(words in out for words in said)


def test_the_readme_s_tool_is_all_of_one(monkeypatch, tmp_path):
    text = (RECIPE / "README.md").read_text(encoding="utf-8")
    (code,) = [block.split("```")[0] for block in text.split("```python\n") if block.startswith("class Weather")]
    (line,) = [block.split("```")[0] for block in text.split("```yaml\n") if "my_tools.Weather" in block]
    parameters = {"type": "object", "properties": {name: {"type": "string"} for name in ("place", "day")}}
    module = {"SearchTool": SearchTool, "Answer": Answer}
    exec(code.replace("{...}", repr(parameters)), module)
    monkeypatch.setitem(sys.modules, "my_tools", SimpleNamespace(Weather=module["Weather"], __spec__=1))
    file = tmp_path / "tools.yaml"
    file.write_text(f"tools:\n  - {{class_name: search_agent.tools.TextSearch, config: {{type: native}}}}\n{line}")
    config = composed(f"actor_rollout_ref.rollout.multi_turn.tool_config_path={file}")
    check_run(config)
    assert config.algorithm.tapo.tools["weather"] == {"place": "text", "day": "exact"}
    tools = initialize_tools_from_config(str(file))
    assert tools[-1].sentence in system_prompt(tools)
    assert with_own_limits({"all": 12}, {tool.name: tool for tool in tools})["weather"] == 4


def test_check_says_which_tools_take_part_by_their_names(capsys):
    python = Calculator({"type": "native"})
    python.name = "run_python"
    algorithm = OmegaConf.create({"adv_estimator": "tapo", "tapo": {}})
    assert list(_credit_problems(algorithm, [TextSearch({"type": "native"}), python])) == []
    out = capsys.readouterr().out
    assert "text_search: takes part: query=text" in out
    assert "run_python: left out: its name says" in out


def test_check_compares_prompts_and_tools(tmp_path, capsys):
    def said(prompt, tools):
        file = tmp_path / "data.parquet"
        pd.DataFrame({"prompt": [prompt]}).to_parquet(file)
        _compare_prompts(file, tools)
        return capsys.readouterr().out

    question = {"role": "user", "content": "Where is this zoo? <image>"}
    told = system_prompt([TextSearch({"type": "native"}), Zoom({"type": "native"})])
    system = {"role": "system", "content": told}
    assert said([system, question], ["text_search", "zoom"]) == ""
    assert said([question], ["text_search"]) == ""
    assert said("no messages", ["text_search"]) == ""
    other = said([system, question], ["text_search", "calculator"])
    assert "data.parquet does not speak of calculator: take it out of the data, and search_agent/prompts" in other
    assert "data.parquet speaks of zoom, which this run does not have" in other


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_pass_shellcheck():
    done = subprocess.run(["shellcheck", *RECIPE.glob("*.sh")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
