"""Processors of own checkpoints, as veRL loads them."""

import os
import subprocess
import sys

import pytest
from tiny_models import save_tiny_model, tiny_tokenizer
from transformers import AutoProcessor

from verl_tapo.cpu.processor import build_processor, save_processor

IMAGES = """
import sys
from PIL import Image
from verl.utils import hf_processor
processor = hf_processor(sys.argv[1])
content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
inputs = processor(text=[text], images=[Image.new("RGB", (64, 48), "red")], return_tensors="pt")
merged = inputs["image_grid_thw"].prod().item() // 4
assert (inputs["input_ids"] == processor.image_token_id).sum().item() == merged
positions, _ = processor.get_rope_index(**{k: v for k, v in inputs.items() if k != "pixel_values"})
assert positions.shape == (3, 1, inputs["input_ids"].shape[1])
print(type(processor).__name__, tuple(inputs["pixel_values"].shape))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "expected"),
    [("qwen2_5_vl", "Qwen2_5_VLProcessor (16, 1176)"), ("qwen3_vl", "Qwen3VLProcessor (16, 1536)")],
)
def test_verl_loads_the_processor_and_sees_images(family, expected, tmp_path):
    save_tiny_model(tmp_path, family)
    environment = os.environ | {"VERL_PLATFORM": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", IMAGES, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(expected)


def test_limits_reach_the_folder_and_leave_other_processors_alone(tmp_path):
    save_processor(tiny_tokenizer(), tmp_path, min_pixels=28 * 28, max_pixels=28 * 28 * 9)
    save_processor(tiny_tokenizer(), tmp_path / "default")
    assert AutoProcessor.from_pretrained(tmp_path).image_processor.size["longest_edge"] == 28 * 28 * 9
    assert AutoProcessor.from_pretrained(tmp_path / "default").image_processor.size["longest_edge"] == 28 * 28 * 1280


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "qwen9"}, "family must be one of"),
        ({"min_pixels": 5000, "max_pixels": 4000}, "min_pixels and max_pixels"),
        ({"min_pixels": 1, "max_pixels": 500}, ">= 784"),
    ],
)
def test_what_cannot_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_processor(tiny_tokenizer(), **{"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 4, **arguments})


def test_a_tokenizer_without_vision_tokens_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match="chat_template"):
        build_processor(tokenizer, min_pixels=1, max_pixels=1000)
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match=r"lacks <\|vision_start\|>"):
        build_processor(tokenizer, min_pixels=1, max_pixels=1000)
