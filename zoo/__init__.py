"""Brain Zoo: any brain signal, any tokenizer, any encoder, one sharded training loop.

The face is `create`, `load`, `export` and `list_models`; `nnx` and `variables` for those who write NNX; and for serving
`export_program` and `load_program`. Everything else is imported from its room.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import kernels
from zoo._version import __version__

if getattr(kernels, "DISTRIBUTION", None) != "brain-zoo":
    raise ImportError(
        f"the package 'kernels' found at {getattr(kernels, '__file__', None) or list(kernels.__path__)} is not "
        "Brain Zoo's: another distribution of that name is installed; remove it (pip uninstall kernels) or use a "
        "fresh environment"
    )

if TYPE_CHECKING:
    from zoo.bridge import nnx, variables
    from zoo.program import load_program
    from zoo.registry import create, list_models, load
    from zoo.serving import export_program
    from zoo.weights.folder import export
    from zoo.weights.load import load_head

__all__ = [
    "__version__",
    "create",
    "export",
    "export_program",
    "list_models",
    "load",
    "load_head",
    "load_program",
    "nnx",
    "variables",
]

_FACE = {
    "create": "zoo.registry",
    "load": "zoo.registry",
    "list_models": "zoo.registry",
    "export": "zoo.weights.folder",
    "export_program": "zoo.serving",
    "load_head": "zoo.weights.load",
    "load_program": "zoo.program",
    "nnx": "zoo.bridge",
    "variables": "zoo.bridge",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `zoo --help` does not pay for importing jax.
    if name in _FACE:
        return getattr(importlib.import_module(_FACE[name]), name)
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")
