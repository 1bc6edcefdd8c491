"""`zoo info` tells what a prepared dataset holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import PLAIN

from zoo.cli import main
from zoo.data.prepare import prepare
from zoo.data.recipes import Window


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_info_of_a_dataset(prepared: Path, capsys: pytest.CaptureFixture[str], scheme: str) -> None:
    assert main(["info", f"{scheme}{prepared}"]) == 0
    size = sum(file.stat().st_size for file in (prepared / "shards").iterdir())
    assert capsys.readouterr().out == (
        f"dataset    {scheme}{prepared}, by the recipe plain\n"
        "recordings 6 of 3 people, 0.03667 hours\n"
        "signal     100 Hz, 4 to 6 channels (eeg)\n"
        "records    68 of 100 to 200 samples; train 52, validation 6, test 10\n"
        "events     left 12, right 12, BAD_jump 6\n"
        f"shards     6, {size / 1e9:.3g} GB\n"
    )


def test_info_of_windows_of_events(recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = replace(PLAIN, window=Window(("left",), -0.2, 0.8))
    prepare(recordings / "sub-s1_task-noise_run-1_eeg.fif", tmp_path / "events", recipe)
    capsys.readouterr()
    assert main(["info", str(tmp_path / "events")]) == 0
    assert "windows of left 2\n" in capsys.readouterr().out


def test_info_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", f"{tmp_path}/absent"]) == 2
    assert "absent: no such folder; wanted a dataset made by zoo prepare" in capsys.readouterr().err
