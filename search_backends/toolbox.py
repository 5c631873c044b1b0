"""Tools outside of training: called as veRL's agent loop calls them, whatever becomes of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias

from PIL import Image

from search_backends.clean import clean_text
from search_backends.tools import shown, without_exit
from verl_tapo.calls.limits import STOCK_ERRORS, failed, invalid_json, unknown_tool

Status: TypeAlias = Literal["ok", "error", "timeout", "unknown_tool", "malformed"]

_NAME_CHARS = 100  # of a tool's name that does not exist are repeated


@dataclass
class ToolAnswer:
    """The outcome of a call."""

    text: str
    images: list[Image.Image] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    status: Status = "ok"


class Toolbox:
    """Tools by name.

    Args:
        tools: veRL's, or what can be called like them.
        timeout_s: for tools that have no timeout of their own.
    """

    def __init__(self, tools: Sequence[Any], timeout_s: float = 150.0):
        self.tools = {tool.name: tool for tool in tools}
        self.timeout_s = timeout_s

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The tools' schemas in OpenAI's format."""
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
            name: the tool's name.
            arguments: a mapping, or JSON as a model wrote it.
            images: the images of the conversation so far.
            create_kwargs: the question's ``tools_kwargs`` for this tool.
            alone: whether it is the turn's only call.
        """
        tool = self.tools.get(name)
        if tool is None:
            return ToolAnswer(clean_text(unknown_tool(name[:_NAME_CHARS], self.tools)), status="unknown_tool")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                return ToolAnswer(invalid_json(name, str(error)), status="malformed")
        agent = SimpleNamespace(image_data=list(images), tool_calls=[None] if alone else [None, None])
        instance, _ = await tool.create(create_kwargs=dict(create_kwargs or {}))
        try:
            response, _, metrics = await asyncio.wait_for(
                without_exit(tool.execute(instance, arguments, agent_data=agent)), self.timeout_s
            )
        except asyncio.TimeoutError:
            return ToolAnswer(failed(name, f"no answer within {self.timeout_s:g} s"), status="timeout")
        except Exception as error:
            return ToolAnswer(clean_text(failed(name, shown(error, str))), status="error")
        finally:
            await tool.release(instance)
        text = response.text or ""
        status: Status = "error" if text.startswith(STOCK_ERRORS) else "ok"
        return ToolAnswer(text, list(response.image or []), dict(metrics or {}), status)

    async def close(self) -> None:
        """Closes connections and caches."""
        for tool in self.tools.values():
            if hasattr(tool, "close"):
                await tool.close()
