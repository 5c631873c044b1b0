"""Tokenizers built offline, one for each way a marker can be spelled in tokens; and when long tests are run."""

import datetime
import os
import random
import time

# Before torch comes in. Tensors here are small: with two threads, one of which waits for a core that another process
# keeps busy, tests take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

TOOL_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
]
CORPUS = [
    'I should look this up first. {"name": "text_search", "arguments": {"query": "capital of France"}}\n',
    '<tool_call>\n{"name": "zoom", "arguments": {"image": 0, "bbox_2d": [10, 20, 300, 400]}}\n</tool_call>\n',
    "<tool_response>\nParis is the capital of France.\n</tool_response>\n",
    "<tool_call>\n<function=text_search>\n<parameter=query>\nriver in Peru\n</parameter>\n</function>\n</tool_call>",
    "Error executing tool 'zoom': image 7 does not exist. Unknown function 'foo'. Available tools: ['zoom']\n",
    "Invalid JSON in arguments for 'zoom': Expecting value. The answer is 42, as the picture on the left shows.\n",
    "def crop(image, box):\n    return image.crop(tuple(int(v) for v in box))  # a < b and c > d\n",
    "北京是中国的首都。 Über die Größe läßt sich streiten, naïve café 😀 🎉\n",
]
UNTIL = "TESTS_UNTIL"


def rotated(units, day):
    """The units in their order, beginning with another one each day.

    From day to day the beginning moves by half of them: what came last, and may have been skipped, comes first on the
    next day. Of an odd number, to which an even one is filled up, half shares no factor with it, so that each begins
    some day, however often tests run.
    """
    padded = [*units, *[None] * (1 - len(units) % 2)]
    begin = day * (len(padded) // 2) % len(padded)
    return [unit for unit in padded[begin:] + padded[:begin] if unit is not None]


def pytest_collection_modifyitems(items):
    """Long tests come last, file by file, in an order that changes with the date.

    Of the others those with a limit in time of their own come first, which run the trainer: at the end one process
    would wait for them.
    """
    long = [item for item in items if item.get_closest_marker("long")]
    files = list(dict.fromkeys(item.path for item in long))
    order = rotated(files, datetime.date.today().toordinal())
    long.sort(key=lambda item: order.index(item.path))
    short = [item for item in items if not item.get_closest_marker("long")]
    items[:] = sorted(short, key=lambda item: item.get_closest_marker("timeout") is None) + long


def pytest_runtest_setup(item):
    """Skips the long tests that would begin after ``$TESTS_UNTIL`` (seconds since 1970); without it, all are run."""
    until = float(os.environ.get(UNTIL) or "inf")
    if item.get_closest_marker("long") and time.time() > until:
        pytest.skip(f"long, and no time was left for it ({UNTIL})")


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable():
    """What a worker of pytest-xdist says travels as UTF-8, which half a surrogate pair in a test's output has not."""
    return _encodable((yield))


def _encodable(value):
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_encodable, value))
    return value


# ChatML as Qwen2.5 renders it, with images as Qwen2.5-VL does.
CHAT_TEMPLATE = """
{%- macro text(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}
    {%- for item in content or [] -%}
      {%- if item.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
      {%- elif item.text is defined -%}{{ item.text }}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if tools %}
  {{- '<|im_start|>system\\n' }}
  {{- text(messages[0].content) if messages[0].role == 'system' else 'You are a helpful assistant.' }}
  {{- '\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
  {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
  {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
  {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments ' }}
  {{- 'within <tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
  {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
  {{- '<|im_start|>system\\n' + text(messages[0].content) + '<|im_end|>\\n' }}
{%- else %}
  {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
  {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
    {{- '<|im_start|>' + message.role + '\\n' + text(message.content) + '<|im_end|>\\n' }}
  {%- elif message.role == 'assistant' %}
    {{- '<|im_start|>assistant' }}
    {%- if message.content or not message.tool_calls %}{{- '\\n' + text(message.content) }}{%- endif %}
    {%- for call in message.tool_calls or [] %}
      {%- set call = call.function if call.function is defined else call %}
      {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
      {{- call.arguments if call.arguments is string else call.arguments | tojson }}
      {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
  {%- elif message.role == 'tool' %}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
    {{- '\\n<tool_response>\\n' + text(message.content) + '\\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""".strip()


# Tokenizers and transformers are imported where they are used: that takes seconds, which most tests need not wait.
def _byte_level(tool_tokens):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tool_tokens])
    return _wrap(tokenizer)


def _wrap(tokenizer):
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    assert len(wrapped) == max(wrapped.get_vocab().values()) + 1
    return wrapped


@pytest.fixture(scope="session")
def qwen_like_tokenizer():
    """Byte-level BPE with the tool markers as added, non-special tokens, as Qwen3's."""
    return _byte_level(TOOL_TOKENS)


@pytest.fixture(scope="session")
def spelled_tokenizer():
    """Byte-level BPE that spells the tool markers with several tokens, which merge with their neighbours."""
    return _byte_level([])


@pytest.fixture(scope="session")
def metaspace_tokenizer():
    """SentencePiece-like BPE: ``▁`` for spaces, bytes ``<0xNN>`` for what the vocabulary lacks; markers are spelled."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        max_token_length=8,
        show_progress=False,
    )
    ascii_only = [line for line in CORPUS if line.isascii()]
    pieces = [piece for line in ascii_only for piece in line.replace(" ", " ▁").split(" ")]
    random.Random(0).shuffle(pieces)
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return _wrap(tokenizer)
