"""Reads the images of prompts with Pillow alone if qwen-vl-utils, which veRL uses, lacks torchvision."""

from __future__ import annotations

from typing import Any

from PIL import Image
from transformers.utils.import_utils import is_torchvision_available


def read_images(messages: list[dict[str, Any]]) -> list[Image.Image] | None:
    """The images of messages in their order, as RGB, at full size; None if there are none.

    Raises:
        ValueError: for videos, and images that are neither in memory nor files.
    """
    images = []
    for message in messages:
        content = message.get("content")
        for block in content if isinstance(content, list) else []:
            if block.get("type") == "video":
                raise ValueError("videos need torchvision, which is not installed")
            if block.get("type") != "image":
                continue
            image = block.get("image", block.get("image_url"))
            if isinstance(image, str) and "://" not in image.removeprefix("file://"):
                image = Image.open(image.removeprefix("file://"))
            if not isinstance(image, Image.Image):
                raise ValueError(f"without torchvision, an image must be in memory or a file, got {image!r:.80}")
            images.append(image.convert("RGB"))
    return images or None


def process_hook(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Round ``RLHFDataset._process_multi_modal_info``."""

    def call(messages: list[dict[str, Any]], image_patch_size: int, config: Any) -> Any:
        return read_images(messages), None, instance._extract_audio_info(messages)

    return wrapped(*args, **kwargs) if is_torchvision_available() else call(*args, **kwargs)
