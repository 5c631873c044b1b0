"""serper.dev: Google's results for text, and Google Lens for images with an address on the web."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from search_backends.http import ApiKey, JsonClient
from search_backends.providers.base import Address, Answer, HttpSettings, ImageAddresses, answer_of, settings_of
from search_backends.results import ImageHit, Passage


class SerperSettings(HttpSettings):
    """Settings of ``provider: serper``."""

    base_url: Address = "https://google.serper.dev"
    gl: str = "us"
    """Country to search from."""
    hl: str = "en"
    """Language."""


class SerperImageSettings(SerperSettings):
    """Settings of ``provider: serper`` for images."""

    image_urls: str
    """A JSON file: prompt images' addresses on the web, by key."""


class _Page(Answer):
    title: str
    link: str
    snippet: str = ""


class _Pages(Answer):
    organic: list[_Page]


class _Match(Answer):
    title: str
    link: str
    source: str = ""


class _Matches(Answer):
    organic: list[_Match]


def _client(settings: SerperSettings) -> JsonClient:
    key = ApiKey.from_environment("SERPER_API_KEY")
    # It answers 400 to queries it does not allow, and when the account has no credits left, too.
    return settings.client(settings.base_url, headers={"X-API-KEY": key.value}, key=key, query_fault=r"\bquery\b")


class SerperText:
    """Google's organic results: title, address, snippet."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._settings = settings_of(SerperSettings, "serper", config)
        self._client = _client(self._settings)
        self.identity = f"serper {self._client.name} {self._settings.gl} {self._settings.hl}"

    async def search(self, query: str, topk: int) -> list[Passage]:
        body = {"q": query, "num": topk, "gl": self._settings.gl, "hl": self._settings.hl}
        pages = answer_of(_Pages, "serper", await self._client.post("/search", body)).organic
        return [Passage(page.snippet, page.title, page.link) for page in pages[:topk]]

    async def close(self) -> None:
        await self._client.close()


class SerperImages:
    """Pages that Google Lens finds for an image; without thumbnails."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._settings = settings_of(SerperImageSettings, "serper", config)
        self._addresses = ImageAddresses("serper", self._settings.image_urls)
        self._client = _client(self._settings)
        self.identity = f"serper lens {self._client.name} {self._settings.gl} {self._settings.hl}"

    async def search(self, image: bytes, topk: int, key: str | None = None) -> list[ImageHit]:
        body = {"url": self._addresses.find(key), "gl": self._settings.gl, "hl": self._settings.hl}
        matches = answer_of(_Matches, "serper", await self._client.post("/lens", body)).organic
        return [ImageHit(match.title, match.source, match.link) for match in matches[:topk]]

    async def close(self) -> None:
        await self._client.close()
