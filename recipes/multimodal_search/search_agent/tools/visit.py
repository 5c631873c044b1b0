"""Visit: a page's readable text."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from search_agent.tools.base import SearchTool
from search_backends.clean import format_page
from search_backends.providers import CachedPages, make_page_provider
from search_backends.tools import Answer, Call, ProviderSettings

LONGEST_URL = 2048


class VisitSettings(ProviderSettings):
    """Settings of `Visit`."""

    provider: dict[str, Any] = Field(default_factory=lambda: {"provider": "direct"})


class Visit(SearchTool):
    """Reads a page that a search found."""

    Settings = VisitSettings
    schema: ClassVar[dict[str, Any]] = {
        "name": "visit",
        "description": "Open a web page and return its text.",
        "parameters": {
            "type": "object",
            "properties": {"url": {"type": "string", "description": "URL of the page."}},
            "required": ["url"],
        },
    }
    kernels: ClassVar[dict[str, Any] | None] = {"url": "exact"}
    sentence = "Use visit to read a page that a search found."
    make_provider = staticmethod(make_page_provider)
    remembered = CachedPages
    method = "read"

    async def answer(self, call: Call) -> Answer:
        page, metrics = await self.ask(call.text("url", LONGEST_URL))
        return Answer(format_page(page, limit_chars=self.settings.limit_chars), metrics=metrics)
