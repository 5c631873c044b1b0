"""Text search."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from search_agent.tools.base import SearchTool
from search_backends.clean import format_passages
from search_backends.providers import CachedText, make_text_provider
from search_backends.tools import Answer, Call, ProviderSettings

LONGEST_QUERY = 512


class TextSearchSettings(ProviderSettings):
    """Settings of `TextSearch`."""

    topk: int = Field(3, ge=1, le=50)
    """Passages that are returned."""
    max_calls: int | None = Field(8, ge=0)


class TextSearch(SearchTool):
    """Finds passages that answer a query."""

    Settings = TextSearchSettings
    schema: ClassVar[dict[str, Any]] = {
        "name": "text_search",
        "description": "Search for text passages. Returns those that match the query best.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "A short search query."}},
            "required": ["query"],
        },
    }
    kernels: ClassVar[dict[str, Any] | None] = {"query": "text"}
    sentence = "Use text_search to look up passages on a topic."
    make_provider = staticmethod(make_text_provider)
    remembered = CachedText

    async def answer(self, call: Call) -> Answer:
        passages, metrics = await self.ask(call.text("query", LONGEST_QUERY), self.settings.topk)
        text = format_passages(passages, limit_chars=self.settings.limit_chars) if passages else "No results."
        return Answer(text, metrics={**metrics, "results": len(passages)})
