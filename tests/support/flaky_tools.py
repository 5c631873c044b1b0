"""The quickstart's tools with a back end that goes down: from some call on, one raises and one never answers."""

from __future__ import annotations

import asyncio
from typing import Any

from flags_and_facts.tools import FlagsTool

CALLS_BEFORE = 3


class FlakyTool(FlagsTool):
    """``config.how``: "raise" or "hang", once it has answered a few calls."""

    calls = 0

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls > CALLS_BEFORE:
            if self.config["how"] == "raise":
                raise ConnectionError("the index is gone")
            await asyncio.sleep(3600)
        return await super().execute(instance_id, parameters, **kwargs)
