"""The CPU platform is there when it is asked for, complete, and else not at all."""

import os
import subprocess
import sys

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import open_dict

from verl_tapo.cpu.check import problems, shortages
from verl_tapo.cpu.distributed import worker_group_hook
from verl_tapo.cpu.engine import save_hook
from verl_tapo.cpu.images import read_images
from verl_tapo.cpu.order import in_prompt_order


def python(code, **environment):
    base = {key: value for key, value in os.environ.items() if key != "VERL_PLATFORM"}
    return subprocess.run(
        [sys.executable, "-c", code], env=base | environment, capture_output=True, text=True, timeout=120, check=False
    )


REGISTRIES = """
import importlib, sys
from verl.utils.device import get_device_id, get_device_name, get_torch_device
from verl.workers.engine.base import EngineRegistry
from verl.workers.rollout.base import get_rollout_class
from verl.workers.rollout.replica import get_rollout_replica_class
from verl_tapo.plugin import CPU_HOOKS
assert (get_device_name(), get_device_id()) == ("cpu", "cpu")
device = get_torch_device()
assert device.memory_allocated() > 2**20 and device.is_available() and device.device_count() == 1
assert get_rollout_replica_class("transformers").__module__ == "verl_tapo.cpu.replica"
assert get_rollout_class("transformers").__module__ == "verl_tapo.cpu.replica"
import verl.workers.engine
assert EngineRegistry.get_engine_cls("language_model", "fsdp2").__module__ == "verl_tapo.cpu.engine"
assert EngineRegistry.get_engine_cls("value_model", "fsdp2").__module__ == "verl_tapo.cpu.engine"
for hook in CPU_HOOKS:
    importlib.import_module(hook.module)
    assert hook.status in ("active", "registered"), (hook, hook.status)
"""
ABSENT = """
import sys
import verl
import verl.trainer.ppo.core_algos
from verl.plugin.platform import PlatformRegistry
from verl_tapo.plugin import CPU_HOOKS, HOOKS
assert "cpu" not in PlatformRegistry.registered_names()
assert not [hook for hook in HOOKS if hook in CPU_HOOKS]
assert not [name for name in sys.modules if name.startswith("verl_tapo.cpu.")]
"""
PROCESS_GROUP = """
import os
import torch
from verl.utils.distributed import initialize_global_process_group_ray
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777"}
initialize_global_process_group_ray()
assert torch.distributed.get_backend() == "gloo"
"""


@pytest.mark.long
def test_it_is_registered_and_every_hook_holds():
    done = python(REGISTRIES, VERL_PLATFORM="cpu")
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_without_the_variable_there_is_nothing_of_it():
    done = python(ABSENT)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_the_process_group_is_gloo():
    done = python(PROCESS_GROUP, VERL_PLATFORM="cpu")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def config(monkeypatch, tmp_path):
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("cpu", overrides=[f"actor_rollout_ref.model.path={tmp_path}"])


def test_the_configuration_for_a_cpu_has_no_problems(config):
    assert problems(config, use_critic=True) == []


def test_servers_of_their_own_need_slots_and_a_way_for_the_weights(config):
    with open_dict(config):
        config.trainer.v1.trainer_mode = "separate_async"
        config.actor_rollout_ref.rollout.nnodes = 2
    backend, slots = problems(config)
    assert backend.endswith("checkpoint_engine.backend=naive: separate_async needs ray on a CPU")
    assert slots.startswith("Ray has 1 slots for 3 workers")


@pytest.mark.parametrize(
    ("named", "slots", "advice"), [("", 1, "set -1,"), ("0", 2, "set -1,-1,"), ("0", 1, None), ("-1,-1", 2, None)]
)
def test_hidden_gpus_leave_ray_its_slots(config, monkeypatch, named, slots, advice):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    with open_dict(config):
        config.ray_kwargs.ray_init.num_gpus = slots
    found = problems(config)
    assert [advice] * len(found) == [said[said.index("set -1") : said.index(" which hides")] for said in found]
    assert bool(found) == (advice is not None)


SLOTS = """
import os, ray
ray.init(num_gpus=2, num_cpus=2, include_dashboard=False)
print("worker has", ray.get(ray.remote(num_gpus=1)(lambda: os.environ["CUDA_VISIBLE_DEVICES"]).remote()))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("named", "said"), [("", "CUDA_VISIBLE_DEVICES contains []"), ("0", "contains ['0']"), ("-1,-1", "worker has -1")]
)
def test_ray_takes_what_is_advised_and_nothing_less(named, said):
    done = python(SLOTS, CUDA_VISIBLE_DEVICES=named)
    assert said in done.stdout + done.stderr


def test_weights_that_are_kept_do_not_change_with_the_model():
    weight = torch.zeros(2)
    kept, spec = save_hook(lambda model: ({"weight": (model.cpu(), None)}, "spec"), None, (weight,), {})
    weight += 1
    assert kept["weight"][0].tolist() == [0, 0]
    assert (kept["weight"][1], spec) == (None, "spec")


def test_verls_own_configuration_has_a_problem_for_each_thing_that_needs_a_gpu(config):
    with initialize_config_module("verl.trainer.config", version_base=None):
        stock = compose("ppo_trainer", overrides=["actor_rollout_ref.rollout.name=vllm"])
    found = problems(stock, use_critic=True)
    told = ("trainer.device", "rollout.name=vllm", "actor.strategy=fsdp", "critic.strategy", "flash", "padding", "Ray")
    assert len(found) == len(told)
    assert all(word in sentence for word, sentence in zip(told, found, strict=True))


def test_adapters_that_would_not_reach_the_rollouts_are_refused(config):
    with open_dict(config):
        config.actor_rollout_ref.model.lora_rank = 8
    (problem,) = problems(config)
    assert "set actor_rollout_ref.model.lora.merge=True" in problem
    config.actor_rollout_ref.model.lora.merge = True
    assert problems(config) == []


@pytest.mark.long
def test_a_configuration_for_a_gpu_ends_before_ray_starts():
    code = "import sys; from verl.trainer.main_ppo import main; sys.argv = ['x', 'actor_rollout_ref.rollout.name=vllm']"
    done = python(code + "; main()", VERL_PLATFORM="cpu", HYDRA_FULL_ERROR="1")
    assert done.returncode != 0
    assert "rollout.name=vllm, which is not installed: set transformers" in done.stderr
    assert "ValueError: VERL_PLATFORM=cpu cannot run this (`--config-name cpu` has it all): " in done.stderr
    assert "ray init" not in done.stdout


@pytest.mark.long
def test_the_configuration_without_the_platform_names_the_variable():
    code = "import sys; from verl.trainer.main_ppo import main; sys.argv = ['x', '--config-name', 'cpu']; main()"
    done = python(code, HYDRA_FULL_ERROR="1")
    assert done.returncode != 0
    assert "Environment variable 'VERL_PLATFORM' not found" in done.stderr


def test_what_does_not_fit_is_told_with_numbers(config, tmp_path):
    assert shortages(config) == []
    with (tmp_path / "model.safetensors").open("wb") as weights:
        weights.truncate(2**42)  # sparse
    (memory,) = shortages(config)
    assert memory.startswith("about 20483.5 GiB of memory are needed")
    (tmp_path / "model.safetensors").unlink()
    with open_dict(config):
        config.ray_kwargs.ray_init.object_store_memory = 2**50
    (shared,) = shortages(config)
    assert "Ray's object store is to have 1048576.00 GiB" in shared


def test_the_master_port_is_none_that_a_connection_may_get():
    def made(**kwargs):
        return worker_group_hook(lambda **given: given, None, (), kwargs)["master_port_range"]

    ranges = [made(use_gpu=True, master_port_range=None) for _ in range(100)]
    assert len({start for start, _ in ranges}) > 50
    assert all(20000 <= start < end <= 30000 for start, end in ranges)
    assert made(master_port_range=[7, 9]) == [7, 9]


def test_rows_follow_the_prompts_then_the_numbers():
    rows = {"b_10_0": 1, "a_1_0": 2, "b_2_1": 3, "b_2_0": 4, "a_0_0": 5}
    assert list(in_prompt_order(rows, {"b": 1, "a": 1})) == ["b_2_0", "b_2_1", "b_10_0", "a_0_0", "a_1_0"]
    assert in_prompt_order(rows, {}) == rows


def test_images_are_read_in_their_order(tmp_path):
    from PIL import Image

    Image.new("L", (3, 4)).save(tmp_path / "grey.png")
    blocks = [{"type": "image", "image": Image.new("RGBA", (1, 2))}, {"type": "text", "text": "x"}]
    later = [{"type": "image", "image": f"file://{tmp_path}/grey.png"}]
    messages = [{"role": "user", "content": blocks}, {"content": "plain"}, {"content": later}]
    assert [(image.size, image.mode) for image in read_images(messages)] == [((1, 2), "RGB"), ((3, 4), "RGB")]
    assert read_images([{"role": "user", "content": "plain"}]) is None
    for block, message in (({"type": "video"}, "videos"), ({"type": "image", "image": "http://x/y.png"}, "in memory")):
        with pytest.raises(ValueError, match=message):
            read_images([{"content": [block]}])


@pytest.mark.long
@pytest.mark.parametrize(
    ("environment", "threads"),
    [({"VERL_PLATFORM": "cpu"}, "1"), ({"VERL_PLATFORM": "cpu", "TQ_NUM_THREADS": "2"}, "2"), ({}, "None")],
)
def test_transfer_queue_is_not_told_to_take_more_threads_than_there_are_cores(environment, threads):
    """It warned in every transfer, in most lines of a run's log. Ray's processes inherit the driver's environment."""
    done = python("import os, verl; print(os.environ.get('TQ_NUM_THREADS'))", **environment)
    assert done.stdout.splitlines()[-1:] == [threads], done.stderr
