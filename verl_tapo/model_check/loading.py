"""Loads a model's tokenizer and processor as veRL does, and says in one line what keeps it from doing so."""

from __future__ import annotations

import contextlib
import json
import re
import unicodedata
import warnings
from pathlib import Path
from typing import Any, NamedTuple

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_SAMPLE = 'Größe, 北京 😀: {"query": "two words", "bbox": [1, 2.5]}'


class Model(NamedTuple):
    """What veRL's agent loops take from a model's folder."""

    tokenizer: Any
    processor: Any
    """None for a model that takes text alone."""
    model_type: str | None
    """By which veRL chooses what builds the tokens of answers; None without a ``config.json``."""
    stops: frozenset[int]
    """Ids of tokens at which inference engines end a turn."""
    problems: list[str]
    """What is missing, and leaves something to examine."""


def one_line(error: BaseException) -> str:
    """An error's text without line ends, cut to 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def named(error: BaseException) -> str:
    """An error's type and text in one line."""
    return f"{type(error).__name__}: {one_line(error)}"


def load_model(name: str, chat_template: str | None = None) -> Model:
    """Loads from a folder, without a look at the network, or by a name of the Hugging Face hub.

    Code that comes with a model is never run.

    Args:
        name: of a folder, or of the hub where there is no such folder.
        chat_template: replaces the model's own, as ``actor_rollout_ref.model.custom_chat_template`` does.

    Raises:
        ValueError: in one line, if there is no tokenizer, or none that can be read.
    """
    folder = Path(name).expanduser()
    local = folder.exists()
    if local:
        _check_files(folder)
    elif not _HUB_NAME.fullmatch(name):
        raise ValueError(f"--model {name}: there is no such folder")
    source = str(folder) if local else name
    tokenizer = _tokenizer(source, local)
    config, problems = _config(source, local)
    processor = None
    if config.get("vision_config") or any((folder / file).is_file() for file in _PROCESSOR_FILES):
        processor, why = _processor(source, local)
        problems += (
            [] if processor else [f"veRL cannot load the model's processor, and would go on without images: {why}"]
        )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if processor is not None and (chat_template or not getattr(processor, "chat_template", None)):
        processor.chat_template = tokenizer.chat_template
    model_type = config.get("model_type")
    stops = _stops(tokenizer, config, source, local)
    return Model(tokenizer, processor, model_type if isinstance(model_type, str) else None, stops, problems)


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"--model {folder} is a file: name the folder that it is in")
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ValueError(f"--model {folder} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there")


def _tokenizer(source: str, local: bool) -> Any:
    from verl.utils import hf_tokenizer

    try:
        tokenizer = hf_tokenizer(source, trust_remote_code=False, local_files_only=local)
        text = tokenizer.decode(tokenizer.encode(_SAMPLE, add_special_tokens=False))
    except Exception as error:  # whatever a damaged file makes the libraries raise
        damaged = _damaged_file(Path(source)) if local else None
        if damaged is None and not local:
            raise ValueError(
                f"--model {source} is no folder here, and cannot be had from the Hugging Face hub: {one_line(error)}"
            ) from None
        raise ValueError(damaged or f"--model {source}: its tokenizer cannot be loaded: {one_line(error)}") from None
    if _plain(text) != _plain(_SAMPLE):
        raise ValueError(
            f"--model {source}: its tokenizer, which transformers loads as {type(tokenizer).__name__}, does not give a "
            f"text back: {_SAMPLE!r} comes out as {text!r}. Its class is chosen by model_type in config.json and by "
            f"tokenizer_class in tokenizer_config.json: are both there, and right?"
        )
    return tokenizer


def _plain(text: str) -> list[str]:
    """A text without what tokenizers may change: forms of characters and the amount of white space."""
    return unicodedata.normalize("NFKC", text).split()


def _damaged_file(folder: Path) -> str | None:
    """Returns which file of a tokenizer cannot be read, and why."""
    for path in (folder / name for name in _JSON_FILES):
        try:
            raw = path.read_bytes()
        except OSError:
            continue
        if raw.startswith(b"version https://git-lfs"):
            return f"{path} is a pointer of Git LFS and not the file itself: git lfs pull"
        try:
            json.loads(raw)
        except (ValueError, RecursionError) as error:
            return f"{path} is damaged ({one_line(error)}): fetch it again"
    return None


def _config(source: str, local: bool) -> tuple[dict[str, Any], list[str]]:
    """Returns the content of the model's ``config.json``, and what is wrong with it."""
    from transformers import PretrainedConfig

    if local and not (Path(source) / "config.json").is_file():
        return {}, [
            f"{source} has no config.json, without which veRL does not start: it reads there, as model_type, how to "
            f"build the tokens of tools' answers. Examined with its default"
        ]
    try:
        config, _ = PretrainedConfig.get_config_dict(source, local_files_only=local)
        return dict(config), []
    except Exception as error:  # the hub's, the file system's, JSON's
        raise ValueError(_damaged_file(Path(source)) or f"the config.json of {source}: {one_line(error)}") from None


def _stops(tokenizer: Any, config: dict[str, Any], source: str, local: bool) -> frozenset[int]:
    """Returns the ids that the tokenizer, ``config.json`` and ``generation_config.json`` give for an end."""
    from transformers import GenerationConfig

    given = [tokenizer.eos_token_id, config.get("eos_token_id"), (config.get("text_config") or {}).get("eos_token_id")]
    with contextlib.suppress(Exception):  # there need not be one
        given.append(GenerationConfig.from_pretrained(source, local_files_only=local).eos_token_id)
    return frozenset(
        number for ids in given for number in (ids if isinstance(ids, list) else [ids]) if isinstance(number, int)
    )


def _processor(source: str, local: bool) -> tuple[Any, str]:
    """Returns the processor, or None and why veRL would have none."""
    from verl.utils import hf_processor

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        processor = hf_processor(source, trust_remote_code=False, local_files_only=local)
    why = [str(warning.message) for warning in caught if "Failed to create processor" in str(warning.message)]
    return processor, " ".join(why[-1].split())[:300] if why else "transformers finds none"
