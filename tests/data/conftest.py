"""A folder of small recordings, and the dataset prepared from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import PLAIN, write_recordings

from zoo.data.prepare import prepare
from zoo.data.store import Dataset


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six FIF files, see `write_recordings`."""
    return write_recordings(tmp_path_factory.mktemp("recordings") / "noise")


@pytest.fixture(scope="session")
def prepared(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder made of `recordings` with `PLAIN`; not to be changed."""
    out = tmp_path_factory.mktemp("prepared") / "noise"
    prepare(recordings, out, PLAIN)
    return out


@pytest.fixture
def dataset(prepared: Path) -> Dataset:
    """`prepared`, opened."""
    return Dataset.open(prepared)
