"""The tools as veRL runs them. Each question says which countries its searches may find (`tools_kwargs`)."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

from verl.tools.base_tool import BaseTool
from verl.tools.schemas import ToolResponse

from flags_and_facts.search import load_index
from verl_tapo.calls.limits import failed


class FlagsTool(BaseTool):  # type: ignore[misc]
    """One of `image_search`, `text_search`, `zoom`: the name in its schema says which.

    Arguments that make no sense are answered as veRL answers what a tool raises. The metrics say that the model is at
    fault: what is raised counts as the tool's own failure, of which `max_fault_rate` would end the run.
    """

    def __init__(self, config: dict[str, Any], tool_schema: Any):
        super().__init__(config, tool_schema)
        self._splits: dict[str, Any] = {}

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> tuple[str, ToolResponse]:
        instance_id = instance_id or str(uuid4())
        self._splits[instance_id] = (kwargs.get("create_kwargs") or {}).get("split")
        return instance_id, ToolResponse()

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        images = list(kwargs["agent_data"].image_data or [])
        split = self._splits[instance_id]
        index = await asyncio.to_thread(load_index, split)
        try:
            text, image = await asyncio.to_thread(index.run, self.name, parameters, images)
        except ValueError as error:
            return ToolResponse(text=failed(self.name, str(error))), None, {"fault": "model"}
        return ToolResponse(text=text, **({"image": [image]} if image else {})), None, {}

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        self._splits.pop(instance_id, None)
