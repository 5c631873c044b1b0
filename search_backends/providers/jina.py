"""Jina's reader: web pages as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from search_backends.errors import ModelError
from search_backends.http import ApiKey
from search_backends.providers.base import Address, Answer, HttpSettings, answer_of, settings_of
from search_backends.results import Page


class JinaSettings(HttpSettings):
    """Settings of ``provider: jina``."""

    base_url: Address = "https://r.jina.ai"


class _Content(Answer):
    content: str
    title: str = ""
    warning: str = ""


class _Answer(Answer):
    data: _Content


class JinaPages:
    """Readable text of web pages."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        settings = settings_of(JinaSettings, "jina", config)
        key = ApiKey.from_environment("JINA_API_KEY")
        headers = {"Authorization": f"Bearer {key.value}", "Accept": "application/json"}
        # It answers 400 and 422 to addresses that are malformed, unknown or do not open.
        self._client = settings.client(
            settings.base_url, headers=headers, key=key, query_fault=r"\b(url|domain|goto|resolve)"
        )
        self.identity = f"jina {self._client.name}"

    async def read(self, url: str) -> Page:
        try:
            parts = urlsplit(url)
            fine = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            fine = False
        if not fine:
            raise ModelError("url must be a full address that begins with http:// or https://")
        data = answer_of(_Answer, "jina", await self._client.post("/", {"url": url})).data
        if data.warning.startswith("Target URL returned error"):
            raise ModelError(f"the page cannot be read: {data.warning[:100]}")
        if not data.content.strip():
            raise ModelError("the page has no readable text")
        return Page(url, data.content, data.title)

    async def close(self) -> None:
        await self._client.close()
