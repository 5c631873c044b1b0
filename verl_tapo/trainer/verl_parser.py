"""Parsers of the run's tool format: our own, or veRL's for formats that others have registered with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from verl_tapo.calls.formats import Tools
from verl_tapo.calls.parsing import ToolCallParser

logger = logging.getLogger("verl_tapo")


def verl_fallback(tool_format: str, tokenizer: Any) -> Callable[[Sequence[int]], list[tuple[str, str]]]:
    """Turn tokens to ``(name, arguments as JSON)`` of each call, by the parser veRL has under that name.

    Raises:
        ValueError: (veRL's) where there is no parser of that name, once it is needed.
    """

    def parse(token_ids: Sequence[int]) -> list[tuple[str, str]]:
        from verl.experimental.agent_loop.tool_parser import ToolParser

        parser = ToolParser.get_tool_parser(tool_format, tokenizer)
        # In a thread of its own: the trainer may run in an event loop already.
        with ThreadPoolExecutor(1) as pool:
            _, calls = pool.submit(asyncio.run, parser.extract_tool_calls(list(token_ids), None)).result()
        return [(call.name, call.arguments) for call in calls]

    return parse


@lru_cache(maxsize=4)
def _parser(tool_format: str, tokenizer: Any, tools: tuple[tuple[str, tuple[str, ...]], ...]) -> ToolCallParser:
    return ToolCallParser(tool_format, tokenizer, verl_fallback(tool_format, tokenizer), tools=dict(tools))


def cached_parser(tool_format: str, tokenizer: Any, tools: Tools | None = None) -> ToolCallParser:
    """The parser of a tool format; made once per process. ``tools``: see `ToolCallParser`."""
    return _parser(tool_format, tokenizer, tuple((name, tuple(required)) for name, required in (tools or {}).items()))


def read_yaml(path: str) -> Any:
    """Returns what a file of the configuration holds, found and resolved as veRL does it."""
    from omegaconf import OmegaConf

    try:
        from verl.utils.import_utils import resolve_config_path
    except ImportError:  # veRL 0.8
        from verl.experimental.agent_loop.utils import resolve_config_path

    return OmegaConf.to_container(OmegaConf.load(resolve_config_path(path)), resolve=True)


def declared_tools(multi_turn: Any) -> Tools | None:
    """Returns the tools of a run as veRL's configuration ``multi_turn`` declares them, or None if
    it does not.

    It does not declare tools that are functions or bring their own schema: neither is imported
    here.
    """
    path = multi_turn.get("tool_config_path")
    if not path or multi_turn.get("function_tool_path"):
        return None
    try:
        functions = [tool["tool_schema"]["function"] for tool in read_yaml(path)["tools"]]
        return {str(each["name"]): tuple(each["parameters"].get("required") or ()) for each in functions}
    # Another veRL, or a file that veRL has read already, or will say what is wrong with.
    except Exception as error:
        logger.debug("TAPO: the tools in %s are not known: %s", path, error)
        return None
