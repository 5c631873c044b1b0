"""How many pixels tools may put before the model: images are tokens, and a context is finite."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from pydantic import Field

from search_agent.tools.base import ToolSettings
from search_backends.errors import ModelError
from search_backends.pictures import fit

SMALLEST = 28 * 28  # one token of Qwen2.5-VL


class ImageBudget(ToolSettings):
    """Settings of tools that return images. (A token of Qwen2.5-VL is 28 x 28 pixels, of Qwen3-VL 32 x 32.)"""

    max_pixels: int = Field(512 * 512, ge=SMALLEST)
    """Of an image that is returned; a larger one is shrunk."""
    max_images: int = Field(12, ge=1)
    """Of a conversation, the question's included; then no more are returned."""
    total_pixels: int = Field(4 * 1024 * 1024, ge=SMALLEST)
    """Of all images of a conversation together; the last ones are shrunk to fit."""

    def room(self, images: Sequence[Image.Image]) -> int:
        """Pixels that another image may have.

        Raises:
            ModelError: No room is left.
        """
        rest: int = self.total_pixels - sum(image.width * image.height for image in images)
        if len(images) >= self.max_images or rest < SMALLEST:
            raise ModelError("no more images can be shown in this conversation; answer with what you have seen")
        return min(rest, self.max_pixels)

    def fit(self, image: Image.Image, limit: int) -> Image.Image:
        """The image, shrunk to ``limit`` pixels, its sides large enough for the model."""
        return fit(image, max_pixels=limit, min_side=28)
