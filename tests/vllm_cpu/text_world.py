"""The quickstart without its images: a text-only model, the same questions, and an image search that knows the flag."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import pandas as pd
import yaml
from run import HERE
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import ToolResponse
from vllm_cpu.vllm_runs import CALL_END

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
