"""Devices, and real recordings fetched once into the user's cache."""

from __future__ import annotations

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
