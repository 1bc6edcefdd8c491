"""Devices, and real recordings fetched once into the user's cache."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

from zoo.data.fetch import fetch

# Shapes and dtypes in signatures are checked in tests, and only there. Before the modules are first imported.
install_import_hook(
    ["zoo.attention", "zoo.encoders", "zoo.layers", "zoo.objectives", "zoo.state_space", "zoo.tokenizers"],
    "beartype.beartype",
)

# Before anything uses JAX: tests of sharding want several devices, and the CPU can pretend to be them.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def faces_eeg() -> Path:
    """The BIDS folder of the `faces_eeg` sample: 2 people, 128-channel EEG."""
    return fetch("faces_eeg")


THINNED = frozenset((Path(__file__).parent / "thinned.txt").read_text().split())
"""Test functions with many long cases."""
SHARE = 8


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The default run takes every eighth case of a function in thinned.txt, `-m slow` the others.

    Whole training runs begin first: they stay on one worker, which would else be the last to end.
    """
    seen: Counter[str] = Counter()
    for item in items:
        function = item.nodeid.partition("[")[0]
        if function in THINNED and item.get_closest_marker("slow") is None:
            if seen[function] % SHARE:
                item.add_marker(pytest.mark.slow)
            seen[function] += 1
    items.sort(key=lambda item: not item.nodeid.startswith("tests/train/"))
