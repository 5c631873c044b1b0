"""The quickstart without its images: a text-only model, the same questions, and an image search that knows the flag."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import pandas as pd
import prepare
import yaml
from run import HERE
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import ToolResponse
from vllm_cpu.vllm_runs import CALL_END, VllmRun

LOOPS = {"tapo_tool_agent": "WitnessedTapoToolAgentLoop", "tool_agent": "WitnessedToolAgentLoop"}
MODEL = HERE / "flags_and_facts" / "model"


class NamedFlag(BaseTool):  # type: ignore[misc]
    """``image_search`` where there is no image: answers as the quickstart's does."""

    def __init__(self, config: dict[str, Any], tool_schema: Any) -> None:
        super().__init__(config, tool_schema)
        self._countries: dict[str, str] = {}

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> tuple[str, ToolResponse]:
        instance_id = instance_id or str(uuid4())
        self._countries[instance_id] = kwargs["create_kwargs"]["country"]
        return instance_id, ToolResponse()

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        return ToolResponse(text=f"This is the flag of {self._countries.pop(instance_id)}."), None, {}


def save_text_model(folder: Path) -> Path:
    """The quickstart's Qwen2.5-VL without its eyes, which is a Qwen2."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(MODEL / name, folder)
    theirs = json.loads((MODEL / "config.json").read_text())["text_config"]
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    kept += ("vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    kept += ("bos_token_id", "eos_token_id", "pad_token_id")
    rope = {"rope_type": "default", "rope_theta": theirs["rope_parameters"]["rope_theta"]}
    config = Qwen2Config(**{name: theirs[name] for name in kept}, rope_parameters=rope)
    config.architectures, config.dtype = ["Qwen2ForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    weights = load_file(MODEL / "model.safetensors")
    weights = {name: value for name, value in weights.items() if not name.startswith("visual.")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def end_turns_with_the_call(model: Path) -> None:
    """Makes ``</tool_call>`` a token that ends a turn, as a model's ``generation_config.json`` may say."""
    tokens = json.loads((model / "tokenizer.json").read_text())["added_tokens"]
    identity = next(token["id"] for token in tokens if token["content"] == CALL_END)
    path = model / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "eos_token_id": [config["eos_token_id"], identity]}))


def write_questions(images: Path, file: Path) -> Path:
    """The quickstart's questions about single flags, told and not shown."""
    rows = pd.read_parquet(images)
    rows = rows[rows["ability"].isin(["flag", "fact", "neighbour"])].drop(columns="images")

    def without_image(messages: Any) -> list[dict[str, str]]:
        return [{**message, "content": message["content"].removeprefix("<image>")} for message in messages]

    def with_country(extra: dict[str, Any]) -> dict[str, Any]:
        tools = {**extra["tools_kwargs"], "image_search": {"create_kwargs": {"country": extra["country"]}}}
        return {**extra, "tools_kwargs": {name: tools[name] for name in ("image_search", "text_search")}}

    rows["prompt"] = rows["prompt"].map(without_image)
    rows["extra_info"] = rows["extra_info"].map(with_country)
    rows.to_parquet(file)
    return file


def write_tools(file: Path) -> Path:
    """The quickstart's, with `NamedFlag` and without the zoom."""
    tools = {
        tool["tool_schema"]["function"]["name"]: tool
        for tool in yaml.safe_load((HERE / "tools.yaml").read_text())["tools"]
    }
    tools["image_search"]["class_name"] = "vllm_cpu.text_world.NamedFlag"
    file.write_text(yaml.safe_dump({"tools": [tools["image_search"], tools["text_search"]]}))
    return file


def make_text_world(folder: Path) -> Path:
    """All of the above, in a folder."""
    prepare.prepare(folder / "data", {"train": 32, "val": 4, "heldout": 4})
    write_questions(folder / "data" / "train.parquet", folder / "questions.parquet")
    write_tools(folder / "tools.yaml")
    save_text_model(folder / "model")
    return folder


def text_run(world: Path, name: str, advantage: str, loss: str, loop: str, *overrides: str) -> VllmRun:
    """A run of two small steps.

    Args:
        world: of `make_text_world`.
        name: of the run.
        advantage: estimator.
        loss: policy loss.
        loop: agent loop, a key of `LOOPS`.
        overrides: Hydra's.
    """
    agents = world / f"{name}.yaml"
    agents.write_text(yaml.safe_dump([{"name": loop, "_target_": f"vllm_cpu.witnessed_loops.{LOOPS[loop]}"}]))
    settings = {
        "actor_rollout_ref.model.path": world / "model",
        "actor_rollout_ref.rollout.n": 4,
        "actor_rollout_ref.rollout.agent.default_agent_loop": loop,
        "actor_rollout_ref.rollout.agent.agent_loop_config_path": agents,
        "actor_rollout_ref.rollout.multi_turn.tool_config_path": world / "tools.yaml",
        "data.custom_cls.path": "null",
        "data.train_files": world / "questions.parquet",
        "data.val_files": world / "questions.parquet",
        "data.train_batch_size": 4,
        "trainer.val_before_train": "false",
        "trainer.test_freq": -1,
        "trainer.save_freq": 1,
    }
    chosen = [f"{key}={value}" for key, value in settings.items()]
    # The world has no zoom, and how a tool is compared that is not there is an error.
    return VllmRun(name, advantage, loss, out=world, overrides=[*chosen, "~algorithm.tapo.tools.zoom", *overrides])
