"""VeRL's data set, with images read by Pillow alone: qwen-vl-utils, which veRL would use, needs torchvision."""

from __future__ import annotations

from typing import Any

from PIL import Image
from verl.utils.dataset.rl_dataset import RLHFDataset


class FlagsDataset(RLHFDataset):  # type: ignore[misc]
    """A data set for ``data.custom_cls``. Tools get the images at full size; the processor shrinks
    them for the model."""

    @classmethod
    async def process_multi_modal_info(
        cls, messages: list[dict[str, Any]], image_patch_size: int, config: Any
    ) -> tuple[list[Image.Image] | None, None, None]:
        images = [
            block["image"].convert("RGB")
            for message in messages
            if isinstance(message["content"], list)
            for block in message["content"]
            if block["type"] == "image"
        ]
        return images or None, None, None
