"""Prompts as the model takes them: positions and pixels, computed as veRL's agent loop does for the actor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from verl.utils.tokenizer import build_multimodal_processor_inputs, get_processor_token_id


def model_inputs(
    prompt: Sequence[int], images: Sequence[Any] | None, processor: Any, processor_options: dict[str, Any] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The positions of a prompt's tokens, and the model's other inputs.

    Args:
        prompt: token ids, with as many image tokens as the images have patches to be shown.
        images: PIL images, in the order of the prompt.
        processor: the result of veRL's ``hf_processor``; None for a text model.
        processor_options: ``data.mm_processor_kwargs``.

    Returns:
        positions: (tokens,), or (3, tokens) for a model with multimodal rotary positions.
        vision: ``pixel_values`` and ``image_grid_thw``, or nothing.

    Raises:
        ValueError: for images without a processor, or if the prompt has not the image tokens that belong to the images.
    """
    images = list(images or [])
    if processor is None:
        if images:
            raise ValueError(f"the prompt has {len(images)} images, and the model takes none")
        return torch.arange(len(prompt)), {}
    ids = torch.tensor([list(prompt)])
    image_token = get_processor_token_id(processor, "image")
    vision: dict[str, Tensor] = {}
    expected = 0
    if images:
        text = "".join(processor.image_token for _ in images)
        options = {"mm_processor_kwargs": processor_options} if processor_options else {}
        inputs = build_multimodal_processor_inputs(processor, text=[text], images=images, **options)
        vision = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
        expected = int((inputs["input_ids"] == image_token).sum())
    found = int((ids == image_token).sum())
    if found != expected:
        raise ValueError(
            f"the prompt has {found} image tokens, its {len(images)} images have {expected}: a prompt must not be cut "
            "within an image (data.max_prompt_length), nor an image token be generated"
        )
    if not hasattr(processor, "get_rope_index"):
        return torch.arange(len(prompt)), vision
    positions, _ = processor.get_rope_index(
        input_ids=ids,
        mm_token_type_ids=(ids == image_token).int(),
        image_grid_thw=vision.get("image_grid_thw"),
        attention_mask=torch.ones_like(ids),
    )
    return positions[:, 0], vision
