"""The tools of a YAML file outside of training: for evaluation, and to try them by hand.

python -m search_agent.tools.toolbox config/tools_train.yaml text_search '{"query": "who painted this"}' [IMAGE ...]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from verl.tools.tool_registry import initialize_tools_from_config

from search_backends.errors import InfrastructureError
from search_backends.pictures import load_picture
from search_backends.toolbox import Toolbox

MAX_PIXELS = 100_000_000  # of an image on the command line


def load_tools(path: str | Path) -> list[Any]:
    """The tools of a file as veRL's ``multi_turn.tool_config_path`` takes it.

    Raises:
        ValueError: The file is no tools YAML, a class or a provider's key is missing, or settings are wrong.
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


def load_toolbox(path: str | Path) -> Toolbox:
    """The tools of a file, to be called; raises as `load_tools`."""
    return Toolbox(load_tools(path))


async def _try(arguments: argparse.Namespace) -> int:
    images = []
    try:
        toolbox = load_toolbox(arguments.tools)
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
