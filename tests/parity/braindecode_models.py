"""braindecode's models, for the tests beside this file.

braindecode wants torchaudio, whose wheels follow PyTorch's releases late and which no model compared here calls: where
it is absent an empty module stands in for it. Needs a pytest that may skip: `models = braindecode_models()`.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
import warnings
from typing import Any

import pytest


class _Stub(types.ModuleType):
    """A module in which every name is an empty class, so that what is derived from it can at least be imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _stub(name: str) -> Any:
    sys.modules[name] = module = _Stub(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    return module


def braindecode_models() -> Any:
    """`braindecode.models`; skips the calling test file where braindecode is not installed."""
    if importlib.util.find_spec("braindecode") is None:
        pytest.skip("braindecode is not installed", allow_module_level=True)
    if importlib.util.find_spec("torchaudio") is None:
        whole = _stub("torchaudio")
        whole.functional, whole.transforms = _stub("torchaudio.functional"), _stub("torchaudio.transforms")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import braindecode.models as models
    return models
