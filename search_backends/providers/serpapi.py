"""serpapi.com: Google Lens, for images with an address on the web."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from search_backends.errors import InfrastructureError
from search_backends.http import ApiKey
from search_backends.providers.base import Address, Answer, HttpSettings, ImageAddresses, answer_of, settings_of
from search_backends.results import ImageHit

_NOTHING = "hasn't returned any results"  # of its `error` where the search went well


class SerpApiSettings(HttpSettings):
    """Settings of ``provider: serpapi``."""

    base_url: Address = "https://serpapi.com"
    hl: str = "en"
    """Language."""
    image_urls: str
    """A JSON file: prompt images' addresses on the web, by key."""


class _Match(Answer):
    title: str
    link: str
    source: str = ""


class _Metadata(Answer):
    status: str


class _Matches(Answer):
    search_metadata: _Metadata
    visual_matches: list[_Match] | None = None
    error: str = ""


class SerpApiImages:
    """Pages that Google Lens finds for an image; without thumbnails."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        settings = settings_of(SerpApiSettings, "serpapi", config)
        self._addresses = ImageAddresses("serpapi", settings.image_urls)
        self._key = ApiKey.from_environment("SERPAPI_API_KEY")
        self._client = settings.client(settings.base_url, key=self._key)
        self._hl = settings.hl
        self.identity = f"serpapi lens {self._client.name} {self._hl}"

    async def search(self, image: bytes, topk: int, key: str | None = None) -> list[ImageHit]:
        params = {
            "engine": "google_lens",
            "type": "visual_matches",
            "url": self._addresses.find(key),
            "hl": self._hl,
            "api_key": self._key.value,  # there is no header for it
        }
        answer = answer_of(_Matches, "serpapi", await self._client.get("/search", params))
        if answer.visual_matches is None:
            if answer.search_metadata.status == "Success" and _NOTHING in answer.error:
                return []
            raise InfrastructureError(
                f"serpapi: {answer.search_metadata.status}: {answer.error or 'no visual_matches'}"
            )
        return [ImageHit(match.title, match.source, match.link) for match in answer.visual_matches[:topk]]

    async def close(self) -> None:
        await self._client.close()
