"""How the audit's files are written: a file that is there is replaced by a whole one, or stays."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that takes ``path``'s place once all of it is written. What is no plain file, as a pipe, is written to."""
    path = Path(path)
    real = Path(os.path.realpath(path))
    if path.is_relative_to("/dev") or path.is_relative_to("/proc") or (real.exists() and not real.is_file()):
        with path.open("wb") as file:
            yield file
        return
    partial = real.with_name(f".{real.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, real)
    finally:
        partial.unlink(missing_ok=True)


def check(path: str | os.PathLike[str]) -> None:
    """Finds out early what keeps a file from being written.

    Raises:
        OSError: its folder is missing or cannot be written to, or a folder has its name.
    """
    folder = Path(os.path.realpath(path)).parent
    if Path(path).is_dir():
        code = errno.EISDIR
    elif not folder.is_dir():
        code = errno.ENOENT
    elif not os.access(folder, os.W_OK) and not Path(path).exists():
        code = errno.EACCES
    else:
        return
    raise OSError(code, os.strerror(code), str(path))
