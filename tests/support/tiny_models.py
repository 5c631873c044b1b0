"""Random models of 250 thousand parameters with their own tokenizer and processor, built without a download."""

from functools import lru_cache
from pathlib import Path

import torch
from conftest import CHAT_TEMPLATE, CORPUS, TOOL_TOKENS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from verl_tapo.cpu.processor import VISION_TOKENS, save_processor

TEXT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HIDDEN = 64


@lru_cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (*TEXT_TOKENS, *VISION_TOKENS)])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in TOOL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    return fast


def _text_config(tokenizer, **more):
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,  # at the usual 0.02 the outputs are close to uniform, and prove little
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        **more,
    }


def _vision_tokens(tokenizer):
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in zip(names, VISION_TOKENS, strict=True)}


def _qwen2_5_vl(tokenizer):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.3,
    }
    config = Qwen2_5_VLConfig(
        text_config=_text_config(tokenizer, rope_parameters=rope),
        vision_config=vision,
        tie_word_embeddings=False,
        **_vision_tokens(tokenizer),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(tokenizer):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
        "initializer_range": 0.3,
    }
    config = Qwen3VLConfig(
        text_config=_text_config(tokenizer, rope_parameters=rope, head_dim=16),
        vision_config=vision,
        tie_word_embeddings=False,
        **_vision_tokens(tokenizer),
    )
    return Qwen3VLForConditionalGeneration(config)


def _qwen3(tokenizer):
    return Qwen3ForCausalLM(Qwen3Config(**_text_config(tokenizer, head_dim=16), tie_word_embeddings=False))


_BUILDERS = {"qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl, "qwen3": _qwen3}


def save_tiny_model(folder: Path, family: str = "qwen2_5_vl", seed: int = 0) -> Path:
    """A checkpoint folder as veRL takes it; family "qwen2_5_vl", "qwen3_vl" or "qwen3" (text only)."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _BUILDERS[family](tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    if family == "qwen3":
        tokenizer.save_pretrained(folder)
    else:
        save_processor(tokenizer, folder, family, min_pixels=4 * 28 * 28, max_pixels=16 * 28 * 28)
    return folder
