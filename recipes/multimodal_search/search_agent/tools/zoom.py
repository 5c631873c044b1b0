"""Zoom: cuts a region out of an image and enlarges it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, ClassVar

from PIL import Image
from pydantic import Field

from search_agent.tools.base import SearchTool
from search_backends.pictures import Coordinates, crop
from search_backends.tools import Answer, Call, ImageSettings


class ZoomSettings(ImageSettings):
    """Settings of `Zoom`."""

    coordinates: Coordinates = "thousandths"
    """The unit of ``bbox`` unless the run's ``data.tool_settings`` or the question gives it:
    ``absolute`` for pixels of the image as the model sees it (Qwen2.5-VL), ``thousandths`` for
    Qwen3-VL."""
    min_side: int = Field(28, ge=1)
    """Pixels that a region must have in width and height; a smaller one is grown."""
    scale_to_pixels: int = Field(512 * 512, ge=28 * 28)
    """Pixels to which a small region is enlarged."""
    max_pixels: int = Field(401408, ge=28 * 28)
    max_calls: int | None = Field(6, ge=0)


_COUNTS: Mapping[Coordinates, str] = {
    "absolute": "bbox is in pixels of that image",
    "thousandths": "bbox is in thousandths of that image's width and height, from 0 to 1000",
}


class Zoom(SearchTool):
    """Shows a region of an image larger, as a new image."""

    Settings = ZoomSettings
    schema: ClassVar[dict[str, Any]] = {
        "name": "zoom",
        "description": "Enlarge a region of an image to see its details. Returns a new image.",
        "parameters": {
            "type": "object",
            "properties": {
                "image": {"type": "integer", "description": "Image number, starting from 1."},
                "bbox": {
                    "type": "array",
                    "items": {"type": "number"},
                    "description": "Region as [left, top, right, bottom].",
                },
            },
            "required": ["image", "bbox"],
        },
    }
    kernels: ClassVar[dict[str, Any] | None] = {"image": "exact", "bbox": "iou"}

    def prompt(self, created: Mapping[str, Any]) -> str:
        return f"Use zoom to enlarge a region of an image; {_COUNTS[self._coordinates(created)]}."

    def _coordinates(self, created: Mapping[str, Any]) -> Coordinates:
        chosen: Coordinates = created.get("coordinates", self.settings.coordinates)
        if chosen not in _COUNTS:
            raise ValueError(f"zoom: coordinates must be one of {', '.join(_COUNTS)}, got {chosen!r}")
        return chosen

    async def answer(self, call: Call) -> Answer:
        position = call.image()
        settings = self.settings
        limit = settings.room(call.images)

        def cut() -> Image.Image:
            region = crop(
                call.images[position],
                call.arguments.get("bbox"),
                coordinates=self._coordinates(call.created),
                min_side=settings.min_side,
                scale_to_pixels=min(settings.scale_to_pixels, limit),
            )
            return settings.fit(region, limit)

        image = await asyncio.to_thread(cut)
        name = "This image" if call.next_image is None else f"Image {call.next_image}"
        return Answer(f"{name} is the region of image {position + 1}, {image.width} x {image.height} pixels.", [image])
