"""The recipe's tools as veRL runs them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any
from uuid import uuid4

from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse

from search_backends.tools import Tool


class SearchTool(Tool, BaseTool):  # type: ignore[misc]
    """A tool of `search_backends` that veRL can run, see `search_backends.tools.Tool`.

    Args:
        config: see ``Settings``.
        tool_schema: replaces the class's own schema, for example with another description.

    Raises:
        ValueError: as `Tool`.
    """

    def __init__(self, config: Mapping[str, Any], tool_schema: OpenAIFunctionToolSchema | None = None):
        schema = tool_schema or OpenAIFunctionToolSchema.model_validate({"type": "function", "function": self.schema})
        # VeRL's class prints the schema in every worker.
        with redirect_stdout(None):
            BaseTool.__init__(self, dict(config), schema)
        Tool.__init__(self, config, schema.function.name)
        self._created: dict[str, dict[str, Any]] = {}

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> tuple[str, ToolResponse]:
        instance_id = instance_id or str(uuid4())
        self._created[instance_id] = dict(kwargs.get("create_kwargs") or {})
        return instance_id, ToolResponse()

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        self._created.pop(instance_id, None)

    async def execute(
        self, instance_id: str, parameters: Any, **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        agent = kwargs.get("agent_data")
        data = getattr(agent, "image_data", None)
        images = [] if data is None else list(data) if isinstance(data, list | tuple) else [data]
        alone = len(getattr(agent, "tool_calls", None) or ()) < 2
        answer = await self.run(parameters, images, self._created.get(instance_id, {}), alone)
        found = {"image": answer.images} if answer.images else {}
        return ToolResponse(text=answer.text, **found), None, answer.metrics
