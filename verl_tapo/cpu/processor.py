"""Qwen-VL processors for checkpoints of one's own, with or without torchvision.

transformers builds a Qwen-VL processor from a tokenizer, an image processor and a video processor.
The video processor needs torchvision, even if no video is ever read. Without torchvision, veRL's
``hf_processor`` warns and returns None, and the run continues without images. Here only the video
part is left out then.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.import_utils import is_torchvision_available

CONFIG_FILE = "processor_config.json"
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


@dataclass(frozen=True)
class _Family:
    module: str
    processor: str
    video_processor: str
    patch_size: int
    """Pixels."""
    mean_and_std: dict[str, list[float]]
    """Mean and standard deviation per channel; empty if the image processor's defaults are right.
    """


FAMILIES = {
    "qwen2_5_vl": _Family(
        "transformers.models.qwen2_5_vl.processing_qwen2_5_vl", "Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", 14, {}
    ),
    "qwen3_vl": _Family(
        "transformers.models.qwen3_vl.processing_qwen3_vl",
        "Qwen3VLProcessor",
        "Qwen3VLVideoProcessor",
        16,
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ),
}


def leave_out_video(module: ModuleType) -> None:
    """Makes the processor classes of a transformers module do without a video processor if torchvision is missing.

    Args:
        module: ``transformers.models.<family>.processing_<family>``.
    """
    if is_torchvision_available():
        return
    for family in FAMILIES.values():
        if family.module == module.__name__:
            getattr(module, family.processor).get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])


def build_processor(
    tokenizer: PreTrainedTokenizerBase, family: str = "qwen2_5_vl", *, min_pixels: int, max_pixels: int
) -> Any:
    """A Qwen-VL processor round a tokenizer.

    Args:
        tokenizer: a tokenizer with a chat template and Qwen's vision tokens (`VISION_TOKENS`).
        family: a key of `FAMILIES`.
        min_pixels: smaller images are enlarged to as many pixels, > 0.
        max_pixels: larger images are reduced to as many pixels; a token of the model sees 28 x 28 of them
            (Qwen3-VL: 32 x 32).

    Raises:
        ValueError: for an unknown family, a tokenizer without template or vision tokens, or limits out of order.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {sorted(FAMILIES)}, got {family!r}")
    if not isinstance(tokenizer.chat_template, str):
        raise ValueError("the tokenizer needs a chat_template: the processor renders messages with it")
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in VISION_TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(f"the tokenizer lacks {', '.join(missing)}")
    kind = FAMILIES[family]
    token_pixels = (2 * kind.patch_size) ** 2
    if not 0 < min_pixels <= max_pixels or max_pixels < token_pixels:
        raise ValueError(
            f"min_pixels and max_pixels must satisfy 0 < min_pixels <= max_pixels, and max_pixels >= {token_pixels}; "
            f"got {min_pixels} and {max_pixels}"
        )
    module = importlib.import_module(kind.module)
    leave_out_video(module)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": min_pixels, "longest_edge": max_pixels}, patch_size=kind.patch_size, **kind.mean_and_std
    )
    parts: dict[str, Any] = {"image_processor": image_processor, "tokenizer": tokenizer}
    if is_torchvision_available():
        import transformers

        parts["video_processor"] = getattr(transformers, kind.video_processor)()
    return getattr(module, kind.processor)(**parts, chat_template=tokenizer.chat_template)


def save_processor(
    tokenizer: PreTrainedTokenizerBase,
    folder: str | PathLike[str],
    family: str = "qwen2_5_vl",
    *,
    min_pixels: int = 4 * 28 * 28,
    max_pixels: int = 1280 * 28 * 28,
) -> Any:
    """Writes tokenizer and processor into a checkpoint folder, and returns the processor.

    Where the folder also has the model's ``config.json``, veRL's ``hf_tokenizer`` and ``hf_processor`` load from it,
    with torchvision as well as without (there under ``VERL_PLATFORM=cpu``).

    Args:
        tokenizer: see `build_processor`.
        folder: made if it does not exist.
        family: see `build_processor`.
        min_pixels: see `build_processor`.
        max_pixels: see `build_processor`.

    Raises:
        ValueError: as `build_processor`.
    """
    processor = build_processor(tokenizer, family, min_pixels=min_pixels, max_pixels=max_pixels)
    processor.save_pretrained(folder)
    path = Path(folder) / CONFIG_FILE
    config = json.loads(path.read_text())
    config.setdefault("video_processor", {"video_processor_type": FAMILIES[family].video_processor})
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return processor
