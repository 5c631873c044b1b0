"""The tools of a YAML file outside of training: for evaluation, and to try them by hand.

python -m search_agent.tools.toolbox config/tools_train.yaml text_search '{"query": "who painted this"}' [IMAGE ...]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from verl.tools.tool_registry import initialize_tools_from_config

from search_backends.clean import clean_text
from search_backends.errors import InfrastructureError
from search_backends.pictures import load_picture
from search_backends.tools import shown, without_exit
from verl_tapo.records import CallStatus

FAILED = "Error executing tool '"
"""How the text of a failed call begins."""
MAX_PIXELS = 100_000_000  # of an image on the command line
_NAME_CHARS = 100  # of a tool's name that does not exist are repeated


def load_tools(path: str | Path) -> list[Any]:
    """The tools of a file as veRL's ``multi_turn.tool_config_path`` takes it.

    Raises:
        ValueError: The file is none, there is no such class, its settings are wrong, or its provider's key is missing.
        FileNotFoundError
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        for tool in OmegaConf.load(path).tools:
            module, _, name = tool.class_name.rpartition(".")
            if not module or not hasattr(import_module(module), name):  # veRL would speak of None
                raise AttributeError(f"class_name: there is no {tool.class_name}")
        return list(initialize_tools_from_config(str(path)))
    except (OmegaConfBaseException, yaml.YAMLError, AttributeError, TypeError, ImportError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


@dataclass
class ToolAnswer:
    """What a call came to."""

    text: str
    images: list[Image.Image] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    status: CallStatus = "ok"


class Toolbox:
    """Tools by name.

    Args:
        tools: veRL's.
        timeout_s: for tools that have no timeout of their own.
    """

    def __init__(self, tools: Sequence[Any], timeout_s: float = 150.0):
        self.tools = {tool.name: tool for tool in tools}
        self.timeout_s = timeout_s

    @classmethod
    def from_yaml(cls, path: str | Path) -> Toolbox:
        """The tools of a file, see `load_tools`."""
        return cls(load_tools(path))

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """In OpenAI's format."""
        return [tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True) for tool in self.tools.values()]

    async def call(
        self,
        name: str,
        arguments: Mapping[str, Any] | str,
        images: Sequence[Image.Image] = (),
        create_kwargs: Mapping[str, Any] | None = None,
        alone: bool = True,
    ) -> ToolAnswer:
        """Calls a tool; whatever goes wrong is an answer.

        Args:
            name: of the tool.
            arguments: a mapping, or JSON as a model wrote it.
            images: of the conversation so far.
            create_kwargs: the question's ``tools_kwargs`` for this tool.
            alone: whether it is the turn's only call.
        """
        tool = self.tools.get(name)
        if tool is None:
            text = clean_text(f"Unknown function '{name[:_NAME_CHARS]}'. Available tools: {list(self.tools)}")
            return ToolAnswer(text, status="unknown_tool")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                return ToolAnswer(f"Invalid JSON in arguments for '{name}': {error}", status="malformed")
        agent = SimpleNamespace(image_data=list(images), tool_calls=[None] if alone else [None, None])
        instance, _ = await tool.create(create_kwargs=dict(create_kwargs or {}))
        try:
            response, _, metrics = await asyncio.wait_for(
                without_exit(tool.execute(instance, arguments, agent_data=agent)), self.timeout_s
            )
        except asyncio.TimeoutError:
            return ToolAnswer(f"{FAILED}{name}': no answer within {self.timeout_s:g} s", status="timeout")
        except Exception as error:
            return ToolAnswer(clean_text(f"{FAILED}{name}': {shown(error, str)}"), status="error")
        finally:
            await tool.release(instance)
        text = response.text or ""
        status: CallStatus = "error" if text.startswith(FAILED) else "ok"
        return ToolAnswer(text, list(response.image or []), dict(metrics or {}), status)

    async def close(self) -> None:
        """Closes connections and caches."""
        for tool in self.tools.values():
            if hasattr(tool, "close"):
                await tool.close()


async def _try(arguments: argparse.Namespace) -> int:
    images = []
    try:
        toolbox = Toolbox.from_yaml(arguments.tools)
        for path in arguments.images:
            try:
                images.append(load_picture(path, max_pixels=MAX_PIXELS))
            except InfrastructureError as error:
                raise ValueError(f"{path}: {error}") from None
    except (ValueError, OSError) as error:
        print(f"search_agent.tools.toolbox: {error}", file=sys.stderr)
        return 2
    answer = await toolbox.call(arguments.tool, arguments.arguments, images)
    await toolbox.close()
    print(f"{answer.status}  {answer.metrics}", file=sys.stderr)
    print(answer.text)
    for number, image in enumerate(answer.images, len(images) + 1):
        image.save(f"image-{number}.png")
        print(f"image-{number}.png", file=sys.stderr)
    return 0 if answer.status == "ok" else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", type=Path, help="tools YAML")
    parser.add_argument("tool", help="name of the tool")
    parser.add_argument("arguments", help="JSON")
    parser.add_argument("images", type=Path, nargs="*", help="images of the conversation")
    return asyncio.run(_try(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
