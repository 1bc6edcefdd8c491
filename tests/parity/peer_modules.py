"""Modules of a peer's repository, for the tests beside this file. Several call their package `models`."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest


def peer_module(root: Path, name: str) -> Any:
    """Module `name` of the repository at `root`, whatever else of that name is loaded or on the path.

    A package without an `__init__.py` would give way to any that has one, so folders with one are off the path
    meanwhile; what was loaded before is there again after.
    """
    package = name.partition(".")[0]

    def taken() -> dict[str, Any]:
        return {each: sys.modules.pop(each) for each in list(sys.modules) if each.partition(".")[0] == package}

    before, others = sys.path[:], taken()
    sys.path[:] = [str(root), *[each for each in before if not (Path(each) / package).is_dir()]]
    try:
        return importlib.import_module(name)
    finally:
        sys.path[:] = before
        taken()
        sys.modules.update(others)


def peer_or_skip(repository: str, name: str) -> Any:
    """Module `name` of a repository in BRAIN_ZOO_PEERS. Skips the tests where it, or what it imports, is not there."""
    peers = os.environ.get("BRAIN_ZOO_PEERS")
    if peers is None:
        pytest.skip(f"no package: BRAIN_ZOO_PEERS, a folder with {repository}", allow_module_level=True)
    root = Path(peers) / repository
    if not root.is_dir():
        pytest.skip(f"no {repository} in BRAIN_ZOO_PEERS", allow_module_level=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            return peer_module(root, name)
    except ImportError as error:
        pytest.skip(f"{repository}: {error}", allow_module_level=True)
