"""Real recordings for the tests, fetched once into the user's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo.data.fetch import fetch


@pytest.fixture(scope="session")
def faces_eeg() -> Path:
    """The BIDS folder of the `faces_eeg` sample: 2 people, 128-channel EEG."""
    return fetch("faces_eeg")
