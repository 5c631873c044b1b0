"""tavily.com: web search with extracts of the pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from search_backends.http import ApiKey
from search_backends.providers.base import Address, Answer, HttpSettings, answer_of, settings_of
from search_backends.results import Passage

_MOST = 20  # results that it gives


class TavilySettings(HttpSettings):
    """Settings of ``provider: tavily``."""

    base_url: Address = "https://api.tavily.com"
    search_depth: Literal["basic", "advanced"] = "basic"
    """``advanced`` costs twice as much."""


class _Page(Answer):
    title: str
    url: str
    content: str
    score: float


class _Pages(Answer):
    results: list[_Page]


class TavilyText:
    """Extracts of web pages."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        settings = settings_of(TavilySettings, "tavily", config)
        key = ApiKey.from_environment("TAVILY_API_KEY")
        self._client = settings.client(
            settings.base_url, headers={"Authorization": f"Bearer {key.value}"}, key=key, query_fault=r"\bquery\b"
        )
        self._depth = settings.search_depth
        self.identity = f"tavily {self._client.name} {self._depth}"

    async def search(self, query: str, topk: int) -> list[Passage]:
        body = {"query": query, "max_results": min(topk, _MOST), "search_depth": self._depth}
        pages = answer_of(_Pages, "tavily", await self._client.post("/search", body)).results
        return [Passage(page.content, page.title, page.url, page.score) for page in pages[:topk]]

    async def close(self) -> None:
        await self._client.close()
