"""A disk with no room left, while preparing and while training."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from small import finish, metrics, start


@pytest.fixture
def small_disk(tmp_path):
    """Makes a file system of so many kilobytes, at `tmp_path/disk`."""
    disk = tmp_path / "disk"

    def mount(kilobytes: int):
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(disk)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("lacks the right to mount a small tmpfs")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", str(disk)], check=True)


def test_preparing(recordings, folder, cache, small_disk):
    out = small_disk(1000) / "out"
    _, err = finish(start(folder, cache, command=("prepare", str(recordings), str(out))), 2)
    assert err == f"zoo: {out}: cannot be written: the disk is full (0 of 2 recordings are prepared and kept)\n"
    assert [each.name for each in out.rglob("*") if each.is_file()] == ["recipe.json"]


@pytest.mark.slow
def test_a_checkpoint(folder, cache, straight, small_disk):
    size = sum(each.stat().st_size for each in (straight / "runs/small/checkpoints/20").rglob("*"))
    disk = small_disk(round(1.6 * size / 1024))
    _, err = finish(start(folder, cache, "--runs", str(disk)), 2)
    cause = r"the disk is full: a checkpoint takes [\d,]+ bytes, [\d,]+ are free"
    assert re.fullmatch(rf"zoo: {disk}/small/checkpoints: {cause}\n", err)
    assert [each.name for each in (disk / "small/checkpoints").iterdir()] == ["4"]
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    out, _ = finish(start(folder, cache, "--runs", str(disk)))
    assert "resuming from step 4\n" in out
    assert metrics(disk.parent, disk) == metrics(straight)


def test_figures(folder, cache, small_disk):
    disk = small_disk(20)
    _, err = finish(start(folder, cache, "--runs", str(disk)), 2)
    assert err == f"zoo: {disk}/small/metrics.jsonl: cannot be written: the disk is full\n"
