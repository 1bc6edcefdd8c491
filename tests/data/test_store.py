"""A dataset gives back what was stored, or says which shard is broken."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mne
import numpy as np
import pytest
from synthetic import PLAIN, make_raw

from zoo.data import shards, store
from zoo.data.prepare import prepare
from zoo.data.store import Dataset
from zoo.errors import ZooError
from zoo.sensors import KINDS, NAME_INDEX


@pytest.fixture
def broken(prepared: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(prepared, tmp_path / "broken")


def shard_of(folder: Path) -> Path:
    return folder / "shards" / "sub-s1_task-noise_run-1_eeg-000.arrayrecord"


def test_stored_samples_are_the_files_samples(dataset: Dataset, recordings: Path) -> None:
    for number, recording in enumerate(dataset.recordings):
        raw = mne.io.read_raw_fif(recordings / f"{recording.id}.fif", verbose="error")
        wanted = (raw.get_data("eeg", verbose="error") * 1e6).astype(np.float32)
        np.testing.assert_array_equal(dataset.read(number, 0, recording.n_samples), wanted)


def test_records_and_index_agree(dataset: Dataset) -> None:
    assert len(dataset) == 6 * 11 + 2  # 21, 22 and 23 s in records of 2 s
    for i in (0, 10, len(dataset) - 1):
        number, start, length = dataset.recording[i], dataset.start[i], dataset.length[i]
        np.testing.assert_array_equal(dataset[i], dataset.read(number, start, start + length))
    assert dataset[10].shape == (6, 100)
    assert (dataset.label == -1).all()


@pytest.mark.parametrize(("start", "stop"), [(150, 250), (0, 1), (199, 801), (2050, 2100)])
def test_read_stitches_records(dataset: Dataset, start: int, stop: int) -> None:
    whole = dataset.read(0, 0, 2100)
    np.testing.assert_array_equal(dataset.read(0, start, stop), whole[:, start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 10), (2000, 2101), (5000, 5010)])
def test_read_beyond_an_end_is_an_error(dataset: Dataset, start: int, stop: int) -> None:
    with pytest.raises(ZooError, match="sub-s1_task-noise_run-1_eeg are not all stored"):
        dataset.read(0, start, stop)


def test_sensors(dataset: Dataset) -> None:
    by_id = {recording.id: number for number, recording in enumerate(dataset.recordings)}
    sensors = dataset.sensors(by_id["sub-s2_task-noise_run-2_eeg"])
    assert sensors["name"].tolist() == [NAME_INDEX[name] for name in ("FP1", "FP2", "C3", "C4", "O1", "O2")]
    assert set(sensors["kind"]) == {KINDS.index("eeg")}
    assert sensors["valid"].tolist() == [True, True, False, True, True, True]
    assert 0.07 < np.linalg.norm(sensors["position"], axis=1).mean() < 0.13  # metres from the head's centre
    assert np.isnan(sensors["orientation"]).all()


def test_sensor_tables_pad_the_smaller_montage(dataset: Dataset) -> None:
    tables, row_of = dataset.sensor_tables()
    assert len(tables["valid"]) == 3  # six channels, one of them bad, four channels
    for number in range(len(dataset.recordings)):
        for field, values in dataset.sensors(number).items():
            np.testing.assert_array_equal(tables[field][row_of[number]][: len(values)], values)
    assert not tables["valid"][row_of[-1]][4:].any()


def test_threads_and_pickles_read_the_same(dataset: Dataset) -> None:
    wanted = [dataset[i] for i in range(len(dataset))]
    copy = pickle.loads(pickle.dumps(dataset))
    order = np.random.default_rng(0).integers(len(dataset), size=400).tolist()
    with ThreadPoolExecutor(8) as pool:
        for i, record in zip(order, pool.map(copy.__getitem__, order), strict=True):
            np.testing.assert_array_equal(record, wanted[i])


def test_few_shards_stay_open(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_alive", weakref.WeakSet([dataset._shards]))
    monkeypatch.setattr(shards, "OPEN_SHARDS", 4)
    for i in range(len(dataset)):
        dataset[i]
    assert len(dataset._shards._readers) == 4
    another = Dataset.open(dataset.path)  # they share what may be open
    for each in (another, dataset):
        each[0], each[20], each[40]
        assert len(each._shards._readers) == 2


def test_large_recordings_fill_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD_BYTES", 3 * 6 * 200 * 4)
    raw = make_raw()
    raw.save(tmp_path / "long_eeg.fif", verbose="error")
    prepare(tmp_path / "long_eeg.fif", tmp_path / "out", PLAIN)
    assert len(list((tmp_path / "out" / "shards").iterdir())) == 4
    dataset = Dataset.open(tmp_path / "out")
    wanted = (raw.get_data("eeg") * 1e6).astype(np.float32)
    np.testing.assert_allclose(dataset.read(0, 0, 2100), wanted, rtol=1e-6)


def test_flipped_bytes_name_the_shard(broken: Path) -> None:
    content = bytearray(shard_of(broken).read_bytes())
    content[9000] ^= 0xFF
    shard_of(broken).write_bytes(content)
    dataset = Dataset.open(broken)  # the size is right: the damage shows on reading
    assert np.isfinite(dataset[0]).all()
    with pytest.raises(ZooError, match=r"sub-s1_task-noise_run-1_eeg-000\.arrayrecord: record 1 "):
        dataset[1]


def test_a_record_that_is_not_the_indexed_one_is_damaged(broken: Path) -> None:
    other = broken / "shards" / "sub-s1_task-noise_run-2_eeg-000.arrayrecord"
    shutil.copy(other, shard_of(broken))  # as large, and whole, but another recording
    with pytest.raises(ZooError, match="record 0 is damaged: its checksum"):
        Dataset.open(broken)[0]


def test_a_truncated_shard_is_named(broken: Path) -> None:
    shard = shard_of(broken)
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ZooError, match=rf"{shard.name}: \d+ bytes, wanted \d+: truncated"):
        Dataset.open(broken)


def test_a_shard_truncated_after_opening_is_named(broken: Path) -> None:
    dataset = Dataset.open(broken)
    shard = shard_of(broken)
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(ZooError, match=shard.name):
        dataset[0]


def test_a_missing_shard_is_named(broken: Path) -> None:
    shard_of(broken).unlink()
    with pytest.raises(ZooError, match=rf"{shard_of(broken).name}: missing"):
        Dataset.open(broken)


def test_a_damaged_index_is_named(broken: Path) -> None:
    content = bytearray((broken / "index.npz").read_bytes())
    content[300] ^= 1
    (broken / "index.npz").write_bytes(content)
    with pytest.raises(ZooError, match=r"index\.npz: its checksum"):
        Dataset.open(broken)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not valid JSON"), (json.dumps({"format": 0}), "format 0, wanted 1")]
)
def test_a_damaged_description_is_named(broken: Path, content: str, message: str) -> None:
    (broken / "dataset.json").write_text(content)
    with pytest.raises(ZooError, match=rf"dataset\.json: {message}"):
        Dataset.open(broken)


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="no such folder"):
        Dataset.open(tmp_path / "nothing")
    with pytest.raises(ZooError, match="zoo prepare has not finished"):
        Dataset.open(tmp_path)


def test_the_store_is_cheap_to_import() -> None:
    code = "import sys, zoo.data.store; print([m for m in ('mne', 'jax', 'grain') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_the_records_read_last_are_kept_up_to_a_size(dataset: Dataset) -> None:
    kept = Dataset.open(dataset.path, cache_bytes=2 * max(dataset[i].nbytes for i in range(3)))
    first = kept[0]
    np.testing.assert_array_equal(first, dataset[0])
    assert kept[0] is first
    assert not first.flags.writeable  # what is kept must not change under the next reader
    kept[1], kept[2]
    assert kept[2] is kept[2]
    assert kept[0] is not first
    assert dataset[0] is not dataset[0]
