"""Preparation loses nothing without a line, continues where it was, and leaves nothing half-written."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mne
import numpy as np
import pytest
from synthetic import PLAIN, make_raw, write_recordings

from zoo.data import manifests, store
from zoo.data.prepare import prepare
from zoo.data.recipes import RECIPES
from zoo.data.recording import Event
from zoo.data.store import Dataset
from zoo.data.windows import event_windows
from zoo.errors import ZooError

BAD = "sub-s2_task-noise_run-1_eeg"


@pytest.fixture
def source(recordings: Path, tmp_path: Path) -> Path:
    """A copy of the recordings to change."""
    return shutil.copytree(recordings, tmp_path / "source")


def spoil(source: Path) -> bytes:
    """Overwrites one file with noise; returns what it was."""
    file = source / f"{BAD}.fif"
    content = file.read_bytes()
    file.write_bytes(np.random.default_rng(0).bytes(5000))
    return content


def fingerprint(folder: Path) -> dict[str, Any]:
    """Everything that should not depend on how the dataset came about."""
    plain = json.loads((folder / "dataset.json").read_text())
    kept = ("index_sha256", "shards", "recordings", "montages", "recipe", "split", "source_sha256")
    return {field: plain[field] for field in kept}


def temporaries(folder: Path) -> list[Path]:
    return list(folder.glob("**/*.tmp"))


def test_totals_and_description(recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    totals = prepare(recordings, tmp_path / "out", PLAIN)
    assert (totals.files_in, totals.files_out, totals.reused, totals.skipped) == (6, 6, 0, ())
    assert (totals.records, totals.rejected, totals.dropped_channels) == (68, 0, 6)
    assert totals.hours == pytest.approx(2 * (21 + 22 + 23) / 3600)
    assert totals.bytes == sum(shard.stat().st_size for shard in (tmp_path / "out" / "shards").iterdir())
    printed = capsys.readouterr().out
    assert "files in 6, out 6" in printed
    assert f"{BAD}: dropped 1 channels: EOG1 (eog)" in printed
    assert "split by_time: train 52, validation 6, test 10 records, 0 in none" in printed
    plain = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert plain["subjects"] == ["s1", "s2", "s3"]
    assert plain["versions"]["mne"] == mne.__version__
    assert plain["source_sha256"][BAD] == {f"{BAD}.fif": store.file_sha256(recordings / f"{BAD}.fif")}
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.recordings[2].events[1] == Event(500, 50, "right")
    assert dataset.recordings[3].bads == ("C3",)
    assert not temporaries(tmp_path)


def test_a_finished_dataset_returns_at_once(
    prepared: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("zoo.data.prepare._run", lambda *args: pytest.fail("prepared again"))
    totals = prepare(recordings, prepared, PLAIN)
    assert (totals.files_out, totals.reused, totals.records) == (6, 6, 68)
    assert "already prepared" in capsys.readouterr().out


def test_jobs_change_nothing(recordings: Path, prepared: Path, tmp_path: Path) -> None:
    prepare(recordings, tmp_path / "out", PLAIN, jobs=2)
    assert fingerprint(tmp_path / "out") == fingerprint(prepared)


def test_a_bad_file_stops_the_run_by_name_and_the_next_run_continues(
    source: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = spoil(source)
    with pytest.raises(ZooError, match=rf"{BAD}\.fif: cannot be read .* \(2 of 6 recordings are prepared and kept\)"):
        prepare(source, tmp_path / "out", PLAIN)
    with pytest.raises(ZooError, match="has not finished"):
        Dataset.open(tmp_path / "out")
    assert f"bad file {BAD}" in capsys.readouterr().out
    (source / f"{BAD}.fif").write_bytes(content)
    totals = prepare(source, tmp_path / "out", PLAIN)
    assert (totals.files_out, totals.reused) == (6, 2)
    assert fingerprint(tmp_path / "out") == fingerprint(prepared)


def test_skip_bad_lists_what_it_left_out(source: Path, tmp_path: Path) -> None:
    spoil(source)
    totals = prepare(source, tmp_path / "out", PLAIN, skip_bad=True)
    assert (totals.files_in, totals.files_out) == (6, 5)
    ((name, reason),) = totals.skipped
    assert name == BAD
    assert "cannot be read" in reason
    assert f"skipped {BAD}: " in str(totals)
    plain = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert plain["totals"]["skipped"] == [[BAD, reason]]
    assert BAD not in [recording.id for recording in Dataset.open(tmp_path / "out").recordings]
    assert prepare(source, tmp_path / "out", PLAIN, skip_bad=True) == replace(totals, reused=5)


def test_a_dataset_with_bad_files_left_out_is_not_enough_without_skip_bad(source: Path, tmp_path: Path) -> None:
    spoil(source)
    prepare(source, tmp_path / "out", PLAIN, skip_bad=True)
    with pytest.raises(ZooError, match=BAD):
        prepare(source, tmp_path / "out", PLAIN)


def test_a_killed_run_continues(source: Path, prepared: Path, tmp_path: Path) -> None:
    """kill -9 in the third recording, half-way through its shard."""
    script = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from synthetic import PLAIN
        from zoo.data import manifests
        from zoo.data.prepare import prepare

        write = manifests.write_shards

        def slow(folder, stem, records):
            def stop_half_way():
                for number, record in enumerate(records):
                    if stem == {BAD!r} and number == 4:
                        Path(folder, "here").touch()
                        time.sleep(600)
                    yield record
            return write(folder, stem, stop_half_way())

        manifests.write_shards = slow
        prepare({str(source)!r}, {str(tmp_path / "out")!r}, PLAIN)
    """
    run = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "here").exists():
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert temporaries(tmp_path / "out")
    with pytest.raises(ZooError, match="has not finished"):
        Dataset.open(tmp_path / "out")
    totals = prepare(source, tmp_path / "out", PLAIN)
    assert totals.reused == 2
    assert fingerprint(tmp_path / "out") == fingerprint(prepared)
    assert not temporaries(tmp_path / "out")


def test_a_changed_file_is_prepared_again(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", PLAIN)
    before = Dataset.open(tmp_path / "out").read(2, 0, 100)
    make_raw(seed=99).save(source / f"{BAD}.fif", overwrite=True, verbose="error")
    assert prepare(source, tmp_path / "out", PLAIN).reused == 5
    assert (Dataset.open(tmp_path / "out").read(2, 0, 100) != before).any()


def test_a_damaged_shard_is_prepared_again(source: Path, prepared: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", PLAIN)
    shard = tmp_path / "out" / "shards" / f"{BAD}-000.arrayrecord"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ZooError, match="truncated"):
        Dataset.open(tmp_path / "out")
    assert prepare(source, tmp_path / "out", PLAIN).reused == 5
    assert fingerprint(tmp_path / "out") == fingerprint(prepared)


def test_added_files_extend_a_dataset(source: Path, tmp_path: Path) -> None:
    held_back = source / f"{BAD}.fif"
    held_back.rename(tmp_path / "later.fif")
    prepare(source, tmp_path / "out", PLAIN)
    (tmp_path / "later.fif").rename(held_back)
    totals = prepare(source, tmp_path / "out", PLAIN)
    assert (totals.files_out, totals.reused) == (6, 5)


def test_another_recipe_needs_another_folder(prepared: Path, recordings: Path) -> None:
    with pytest.raises(ZooError, match=r"another recipe \('plain'; they differ in rate_hz\)"):
        prepare(recordings, prepared, replace(PLAIN, rate_hz=50.0))


def test_another_split_only_needs_the_manifests(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", PLAIN)
    totals = prepare(source, tmp_path / "out", PLAIN, split="by_subject")
    assert totals.reused == 6
    dataset = Dataset.open(tmp_path / "out")
    assert all(len(set(dataset.recording[records] // 2)) == 1 for records in dataset.splits.values())


def test_a_folder_of_something_else_is_refused(recordings: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all my work")
    with pytest.raises(ZooError, match="not a folder of zoo prepare"):
        prepare(recordings, tmp_path, PLAIN)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_nan_samples_are_named(source: Path, tmp_path: Path) -> None:
    raw = make_raw()
    raw._data[4, 1234] = np.nan
    raw.save(source / f"{BAD}.fif", overwrite=True, verbose="error")
    with pytest.raises(ZooError, match=rf"{BAD}\.fif: channel O1 has 1 samples .* sample 1234 \(12\.340 s\)"):
        prepare(source, tmp_path / "out", PLAIN)


def test_files_of_several_rates_need_a_rate(source: Path, tmp_path: Path) -> None:
    make_raw().resample(64.0).save(source / f"{BAD}.fif", overwrite=True, verbose="error")
    with pytest.raises(ZooError, match=r"differ in sampling rate .*100 Hz.*64 Hz|64 Hz.*100 Hz"):
        prepare(source, tmp_path / "out", PLAIN)
    prepare(source, tmp_path / "at64", replace(PLAIN, rate_hz=64.0))
    assert Dataset.open(tmp_path / "at64").rate_hz == 64.0


def test_a_fake_full_disk(recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store.os, "replace", full)
    with pytest.raises(ZooError, match="the disk is full"):
        prepare(recordings, tmp_path / "out", PLAIN)
    assert not temporaries(tmp_path)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_full_disk(tmp_path: Path, skip_bad: bool) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("lacks the right to mount a small tmpfs")
    try:
        source = write_recordings(tmp_path / "source")
        with pytest.raises(ZooError, match=r"the disk is full \([1-5] of 6 recordings are prepared and kept\)"):
            prepare(source, disk / "out", PLAIN, skip_bad=skip_bad)
        assert not temporaries(disk)
        manifested = {file.stem for file in (disk / "out" / "parts").iterdir()}
        assert {file.name.rsplit("-", 1)[0] for file in (disk / "out" / "shards").iterdir()} == manifested
        assert not (disk / "out" / "dataset.json").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_dask_without_the_extra(recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("dask"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ZooError, match=r"brain-zoo\[dask\]"):
        prepare(recordings, tmp_path / "out", PLAIN, dask="tcp://127.0.0.1:9")


def test_an_unknown_split_is_an_error(recordings: Path, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="by_subject"):
        prepare(recordings, tmp_path / "out", PLAIN, split="by_luck")
    assert not (tmp_path / "out").exists()


def test_source_files_include_bids_sidecars(tmp_path: Path) -> None:
    from zoo.data.readers import Source

    names = (
        "sub-1_task-a_eeg.edf", "sub-1_task-a_eeg.json", "sub-1_task-a_events.tsv", "sub-1_electrodes.tsv",
        "sub-1_task-a_ica.fif", "sub-10_task-a_events.tsv", "sub-1_task-b_eeg.edf",
    )  # fmt: skip
    for name in names:
        (tmp_path / name).touch()
    one = Source(tmp_path / names[0], "one", "1", "", "", "a", "bids")
    (files,) = manifests.source_files([one]).values()
    assert {file.name for file in files} == set(names[:4])


def test_real_recordings(faces_eeg: Path, tmp_path: Path) -> None:
    """The second person of `faces_eeg`: 128 EEG channels without 10-20 names, resampled to 200 Hz."""
    person = tmp_path / "faces"
    shutil.copytree(faces_eeg, person, ignore=shutil.ignore_patterns("sub-s01*", "*_ica.fif"))
    shutil.copy(faces_eeg / "participants.tsv", person / "participants.tsv")
    with pytest.raises(ZooError, match=r"sub-s02_task-faceO_eeg\.edf.*BioSemi"):
        prepare(person, tmp_path / "by_name", RECIPES["labram"])
    recipe = replace(RECIPES["labram"], sensor_names="nearest", notch_hz=(60.0,))
    totals = prepare(person, tmp_path / "out", recipe)
    assert totals.files_out == 1
    dataset = Dataset.open(tmp_path / "out")
    (recording,) = dataset.recordings
    assert (dataset.n_channels, dataset.rate_hz, recording.subject) == (128, 200.0, "s02")
    assert totals.hours == pytest.approx(recording.n_samples / 200 / 3600)
    assert np.isfinite(dataset.sensors(0)["position"]).all()
    signal = dataset.read(0, 0, 4000)
    assert 0.01 < np.median(np.abs(signal)) < 1  # about 10 µV in units of 100 µV
    windows = event_windows(dataset, {"face": ("face-upright",), "house": ("house-upright",)}, -0.1, 0.6)
    assert set(np.bincount(windows.label)) <= set(range(190, 201))
    assert windows.signal.shape[1:] == (128, 140)
