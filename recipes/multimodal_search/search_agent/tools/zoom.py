"""Zoom: cuts a region out of an image and enlarges it."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar, Literal

from PIL import Image
from pydantic import Field

from search_agent.tools.base import Answer, Call, SearchTool
from search_agent.tools.budget import ImageBudget
from search_backends.pictures import crop


class ZoomSettings(ImageBudget):
    """Of `Zoom`."""

    coordinates: Literal["absolute", "thousandths"] = "thousandths"
    """What ``bbox`` counts, where the question's ``tools_kwargs`` do not say: pixels of the image as the model sees it
    (Qwen2.5-VL), or thousandths (Qwen3-VL)."""
    min_side: int = Field(28, ge=1)
    """Pixels that a region must have in width and height; a smaller one is grown."""
    scale_to_pixels: int = Field(512 * 512, ge=28 * 28)
    """Pixels to which a small region is enlarged."""


class Zoom(SearchTool):
    """Shows a region of an image larger, as a new image."""

    Settings = ZoomSettings
    schema: ClassVar[dict[str, Any]] = {
        "name": "zoom",
        "description": "Enlarges a region of an image, to see details. Gives a new image.",
        "parameters": {
            "type": "object",
            "properties": {
                "image": {"type": "integer", "description": "Number of the image; the first is 1."},
                "bbox": {
                    "type": "array",
                    "items": {"type": "number"},
                    "description": "The region: [left, top, right, bottom].",
                },
            },
            "required": ["image", "bbox"],
        },
    }
    kernels: ClassVar[dict[str, str]] = {"image": "exact", "bbox": "iou"}

    async def answer(self, call: Call) -> Answer:
        position = call.image()
        settings = self.settings
        limit = settings.room(call.images)

        def cut() -> Image.Image:
            region = crop(
                call.images[position],
                call.arguments.get("bbox"),
                coordinates=call.created.get("coordinates", settings.coordinates),
                min_side=settings.min_side,
                scale_to_pixels=min(settings.scale_to_pixels, limit),
            )
            return settings.fit(region, limit)

        image = await asyncio.to_thread(cut)
        name = "The next image" if call.next_image is None else f"Image {call.next_image}"
        return Answer(f"{name} is the region of image {position + 1}, {image.width} x {image.height} pixels:", [image])
