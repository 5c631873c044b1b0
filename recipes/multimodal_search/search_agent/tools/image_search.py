"""Image search: the texts of pages that show such an image."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from PIL import Image
from pydantic import Field

from search_agent.tools.base import SearchTool
from search_backends.clean import format_image_hits
from search_backends.errors import InfrastructureError, ModelError
from search_backends.pictures import encode, load_picture
from search_backends.providers import CachedImages, make_image_provider
from search_backends.results import ImageHit
from search_backends.tools import Answer, Call, ImageSettings, ProviderSettings

# Larger thumbnails of a provider are left out unread.
MAX_THUMBNAIL_PIXELS = 25_000_000


class ImageSearchSettings(ProviderSettings, ImageSettings):
    """Settings of `ImageSearch`."""

    topk: int = Field(3, ge=1, le=20)
    """Hits that are returned."""
    thumbnails: int = Field(0, ge=0, le=20)
    """The number of first hits whose images are shown with their captions."""
    limit_chars: int = Field(3000, ge=100)
    max_calls: int | None = Field(3, ge=0)


class ImageSearch(SearchTool):
    """Identifies what an image shows: the question's, or one that a tool returned."""

    Settings = ImageSearchSettings
    schema: ClassVar[dict[str, Any]] = {
        "name": "image_search",
        "description": "Search by image. Returns titles and texts of web pages that show the same or a similar image.",
        "parameters": {
            "type": "object",
            "properties": {"image": {"type": "integer", "description": "Image number, starting from 1."}},
            "required": ["image"],
        },
    }
    kernels: ClassVar[dict[str, Any] | None] = {"image": "exact"}
    sentence = "Use image_search to identify what an image shows."
    make_provider = staticmethod(make_image_provider)
    remembered = CachedImages

    async def answer(self, call: Call) -> Answer:
        position = call.image()
        keys = call.created.get("image_keys", ())
        key = keys[position] if position < len(keys) else None
        picture = await asyncio.to_thread(encode, call.images[position])
        hits, metrics = await self.ask(picture, self.settings.topk, key)
        if not hits:
            return Answer("No results.", metrics={**metrics, "results": 0})
        images, hits = await asyncio.to_thread(self._thumbnails, hits, call)
        text, _ = format_image_hits(
            hits, first_image_number=call.next_image if images else None, limit_chars=self.settings.limit_chars
        )
        return Answer(text, images, {**metrics, "results": len(hits)})

    def _thumbnails(self, hits: list[ImageHit], call: Call) -> tuple[list[Image.Image], list[ImageHit]]:
        """Returns the images to show, and the hits. A hit keeps its image only if it is shown."""
        shown: list[Image.Image] = []
        kept = []
        for hit in hits:
            image = None
            if hit.image is not None and len(shown) < self.settings.thumbnails:
                try:
                    room = self.settings.room([*call.images, *shown])
                    image = self.settings.fit(load_picture(hit.image, max_pixels=MAX_THUMBNAIL_PIXELS), room)
                except (ModelError, InfrastructureError):  # no room, or no image: its caption stands alone
                    image = None
            if image is not None:
                shown.append(image)
            kept.append(hit if image is not None else ImageHit(hit.title, hit.text, hit.url, None, hit.score))
        return shown, kept
