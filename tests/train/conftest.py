"""Two minutes each of two people's EEG on 16 electrodes, prepared once, and a run that nothing interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small import finish, start, write_config

from zoo.data.prepare import prepare
from zoo.data.readers import discover, read
from zoo.data.recipes import RECIPES

RECIPE = replace(RECIPES["labram"], notch_hz=(60.0,), sensor_names="nearest", scale="robust", clip=10.0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs share a dataset, compiled programs and runs of other tests: they stay on one worker."""
    for item in items:
        if "cache" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("runs"))


@pytest.fixture(scope="session")
def recordings(faces_eeg: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two FIF files cut out of the `faces_eeg` sample, events and positions kept."""
    folder = tmp_path_factory.mktemp("faces")
    for source in discover(faces_eeg):
        raw = read(source).raw
        raw.pick(raw.ch_names[:128:8]).crop(60.0, 180.0)
        raw.save(folder / f"sub-{source.subject}_task-faces_eeg.fif", verbose="error")
    return folder


@pytest.fixture(scope="session")
def prepared(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset made of them; not to be changed."""
    out = tmp_path_factory.mktemp("prepared") / "faces"
    prepare(recordings, out, RECIPE, fractions={"train": 0.9, "validation": 0.1})
    return out


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this session share their compiled programs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A working folder with a configuration and its dataset."""
    write_config(tmp_path, prepared)
    return tmp_path


@pytest.fixture(scope="session")
def straight(prepared: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of a run from its first step to its last; not to be changed."""
    folder = tmp_path_factory.mktemp("straight")
    write_config(folder, prepared)
    finish(start(folder, cache))
    return folder
