"""bm25s without JAX: ``from search_backends.retrieval.bm25s_alone import bm25s``.

Where JAX is installed, bm25s starts it on import. A CUDA build of JAX then takes three quarters of the GPU's memory, in
every process that only meant to search, and training ends with NCCL's "out of memory". Equal scores would also come in
JAX's order, so that the same question has another answer on another machine. Neither has a switch.
"""

from __future__ import annotations

import sys
from typing import Any

_modules: dict[str, Any] = sys.modules
_names = ("jax", "jax.lax")
_others = {name: _modules[name] for name in _names if name in _modules}
# An import of what is None here fails, as it does where JAX is not installed.
_modules.update(dict.fromkeys(_names))
try:
    import bm25s
finally:
    for _name in _names:
        del _modules[_name]
    _modules.update(_others)

__all__ = ["bm25s"]
