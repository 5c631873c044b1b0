"""Parsers of the run's tool format: our own, or veRL's for formats that `verl_tapo.parsing` does not read natively."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from verl_tapo.parsing import ToolCallParser


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
def cached_parser(tool_format: str, tokenizer: Any) -> ToolCallParser:
    """The parser of a tool format; made once per process."""
    return ToolCallParser(tool_format, tokenizer, fallback=verl_fallback(tool_format, tokenizer))
