"""A Qwen2.5-VL of two million parameters with its own tokenizer, built without a download."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig

from flags_and_facts.questions import SYSTEM, WEIGHTS, ask
from flags_and_facts.script import Script, Slips, made_up_world
from flags_and_facts.search import Index
from flags_and_facts.world import World

VOCABULARY = 1024
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<answer>", "</answer>")
"""These are not special tokens, because a reward function reads text decoded without special tokens."""

MIN_PIXELS = 28 * 28 * 4
MAX_PIXELS = 28 * 28 * 16
"""A sheet of flags is seen at a quarter of its size: enough to recognise a sheet, too small to read a flag."""

# Qwen's, with the tools by name only: their parameters are learned, and every token counts at this size.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}
    {%- for block in content -%}
      {%- if block.type == "image" -%}<|vision_start|><|image_pad|><|vision_end|>
      {%- elif block.type == "text" -%}{{ block.text }}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {%- if message.role == "tool" -%}
    {%- if loop.first or messages[loop.index0 - 1].role != "tool" -%}{{ "<|im_start|>user" }}{%- endif -%}
    {{- "\\n<tool_response>\\n" + render(message.content) + "\\n</tool_response>" -}}
    {%- if loop.last or messages[loop.index0 + 1].role != "tool" -%}{{ "<|im_end|>\\n" }}{%- endif -%}
  {%- else -%}
    {{- "<|im_start|>" + message.role + "\\n" + render(message.content) -}}
    {%- if message.role == "system" and tools -%}
      {{- "\\nTools: " -}}
      {%- for tool in tools -%}{{- tool.function.name -}}{%- if not loop.last -%}{{ ", " }}{%- endif -%}{%- endfor -%}
    {%- endif -%}
    {%- for call in message.tool_calls or [] -%}
      {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
      {{- (call.function.arguments | tojson) + "}\\n</tool_call>" -}}
    {%- endfor -%}
    {{- "<|im_end|>\\n" -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n" }}{%- endif -%}
"""

_PIECES = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]|\s+(?!\S)|\s+")


def _texts(world: World, rng: random.Random) -> Iterator[str]:
    yield from [SYSTEM, "system\n", "user\n", "assistant\n", "\nTools: image_search, text_search, zoom"] * 50
    for _ in range(40):
        made_up = made_up_world(world, rng)
        script = Script(made_up, Index(made_up), Slips(), rng)
        for _ in range(50):
            question = ask(made_up, rng, rng.choice(list(WEIGHTS)))
            yield question.text
            for turn in script.play(question):
                yield turn.said
                yield turn.answer or ""


def build_tokenizer(world: World, seed: int = 0) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on made-up worlds, so that a real name is no better known than an unseen one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_PIECES, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(MARKERS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(world, random.Random(seed)), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in MARKERS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    common = {"bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    hidden = 192
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            **common,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        **common,
    )
