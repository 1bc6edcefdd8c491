"""A batch is a pure function of (seed, step): whatever the hosts, threads or starting point."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from synthetic import PLAIN

from zoo.data.loader import Loader
from zoo.data.prepare import prepare
from zoo.data.recipes import Window
from zoo.data.store import Dataset
from zoo.data.windows import record_windows
from zoo.errors import ZooError


def make(dataset: Dataset, **changes: Any) -> Loader:
    options = {"window": 100, "batch_size": 8, "seed": 3, "mask_patch": 25, "mask_ratio": 0.4} | changes
    return Loader(dataset, options.pop("records", np.arange(len(dataset))), **options)


def assert_same(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_what_a_batch_holds(dataset: Dataset) -> None:
    batch = next(make(dataset).at(0))
    assert {field: (value.shape, value.dtype.name) for field, value in batch.items() if field != "sensors"} == {
        "signal": ((8, 6, 100), "float32"),
        "mask": ((8, 6, 4), "bool"),
        "record": ((8,), "int32"),
        "start": ((8,), "int32"),
        "label": ((8,), "int32"),
        "subject": ((8,), "int32"),
    }
    sensors = batch["sensors"]
    assert sensors.position.shape == sensors.orientation.shape == (8, 6, 3)
    assert sensors.kind.shape == sensors.name.shape == sensors.valid.shape == (8, 6)
    assert "mask" not in next(make(dataset, mask_patch=0).at(0))


def test_the_signal_is_where_it_says(dataset: Dataset) -> None:
    batches = list(islice(make(dataset).at(0), 20))
    padded = 0
    for batch in batches:
        for row, (record, start) in enumerate(zip(batch["record"], batch["start"], strict=True)):
            wanted = dataset.read(dataset.recording[record], start, start + 100)
            np.testing.assert_array_equal(batch["signal"][row, : len(wanted)], wanted)
            assert not batch["signal"][row, len(wanted) :].any()
            assert not batch["sensors"].valid[row, len(wanted) :].any()
            sensors = dataset.sensors(dataset.recording[record])
            np.testing.assert_array_equal(batch["sensors"].name[row, : len(wanted)], sensors["name"])
            padded += len(wanted) < 6
    assert padded  # both montages came up
    assert len({int(start) % 200 for batch in batches for start in batch["start"]}) > 50  # the crops are random


def test_labels_and_people_are_those_of_the_records(dataset: Dataset, recordings: Path, tmp_path: Path) -> None:
    batch = next(make(dataset).at(0))
    assert (batch["label"] == -1).all()
    people = [dataset.recordings[dataset.recording[record]].subject for record in batch["record"]]
    assert [dataset.people[person] for person in batch["subject"]] == people
    assert dataset.people == ("s1", "s2", "s3")

    prepare(recordings, tmp_path / "events", replace(PLAIN, window=Window(("right", "left", "BAD_jump"), -0.2, 0.8)))
    events = Dataset.open(tmp_path / "events")
    plain = next(make(events, window=80, mask_patch=0).at(0))
    np.testing.assert_array_equal(plain["label"], events.label[plain["record"]])
    sides = {"left": ("left",), "right": ("right",)}
    chosen = make(events, window=80, mask_patch=0, classes=sides)
    assert chosen.n_examples == (events.label < 2).sum() < len(events)
    batch = next(chosen.at(0))
    np.testing.assert_array_equal(batch["label"], 1 - events.label[batch["record"]])

    windows = record_windows(events, np.arange(len(events)), 80, sides)
    assert windows.label.tolist() == [1 - label for label in events.label if label < 2]
    np.testing.assert_array_equal(windows.signal[0, :6], events[int(np.flatnonzero(events.label < 2)[0])][:, 10:90])
    assert [events.people[person] for person in windows.person] == windows.subject.tolist()
    for classes, message in (
        ({"up": ("upward",)}, "class 'up' wants windows of 'upward'; there are those of right, left, BAD_jump"),
        ({"a": ("left",), "b": ("left",)}, "'left' belong to two classes"),
    ):
        with pytest.raises(ZooError, match=message):
            make(events, window=80, mask_patch=0, classes=classes)
    with pytest.raises(ZooError, match="no event: prepare with a recipe that has a window"):
        make(dataset, classes=sides)
    with pytest.raises(ZooError, match="is a labelled window of 200 samples"):
        record_windows(events, np.arange(3), 200, {})


def test_masks_are_exact_and_only_on_valid_channels(dataset: Dataset) -> None:
    counts = set()
    for batch in islice(make(dataset).at(0), 20):
        valid = batch["sensors"].valid
        assert not batch["mask"][~valid].any()
        np.testing.assert_array_equal(batch["mask"].sum((1, 2)), np.round(0.4 * valid.sum(1) * 4))
        counts |= set(valid.sum(1).tolist())
    assert counts == {4, 5, 6}


def test_drawn_channels_are_valid_ones_with_their_own_signal_sensors_and_mask(dataset: Dataset) -> None:
    drawn = set()
    for batch in islice(make(dataset, channels=3).at(0), 20):
        assert batch["signal"].shape == (8, 3, 100)
        assert batch["sensors"].valid.all()
        np.testing.assert_array_equal(batch["mask"].sum((1, 2)), np.full(8, round(0.4 * 3 * 4)))
        for row, (record, start) in enumerate(zip(batch["record"], batch["start"], strict=True)):
            whole = dataset.read(dataset.recording[record], start, start + 100)
            sensors = dataset.sensors(dataset.recording[record])
            for signal, name in zip(batch["signal"][row], batch["sensors"].name[row], strict=True):
                places = [i for i in np.flatnonzero(sensors["name"] == name) if np.array_equal(whole[i], signal)]
                assert len(places) == 1
                assert sensors["valid"][places[0]]
                drawn.add((int(dataset.recording[record]), int(places[0])))
    every = {(i, int(c)) for i in range(len(dataset.recordings)) for c in np.flatnonzero(dataset.sensors(i)["valid"])}
    assert drawn == every


def test_every_epoch_takes_each_record_as_often_as_windows_fit(dataset: Dataset) -> None:
    loader = make(dataset, batch_size=1, mask_patch=0)
    assert loader.n_examples == loader.epoch_steps == int((dataset.length // 100).sum())
    batches = loader.at(0)
    epochs = [[int(batch["record"][0]) for batch in islice(batches, loader.n_examples)] for _ in range(2)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.bincount(epoch, minlength=len(dataset)), dataset.length // 100)
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


def test_starting_at_a_step_gives_the_same_batches(dataset: Dataset) -> None:
    loader = make(dataset)
    for step in (7, 40):  # 40: in the third epoch
        assert_same(next(loader.at(step)), next(islice(loader.at(0), step, None)))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_change_nothing(dataset: Dataset, threads: int) -> None:
    for one, other in zip(islice(make(dataset).at(0), 12), make(dataset, threads=threads).at(0), strict=False):
        assert_same(one, other)


@pytest.mark.parametrize("hosts", [2, 4])
def test_rows_of_the_hosts_make_the_batch_of_one(dataset: Dataset, hosts: int) -> None:
    size = 8 // hosts
    parts = [make(dataset, rows=range(host * size, (host + 1) * size)).at(5) for host in range(hosts)]
    for whole, *rows in islice(zip(make(dataset).at(5), *parts, strict=True), 6):
        assert_same(jax.tree.map(lambda *each: np.concatenate(each), *rows), whole)


def test_another_seed_gives_other_batches(dataset: Dataset) -> None:
    one, other = (next(make(dataset, seed=seed).at(0)) for seed in (3, 4))
    assert one["record"].tolist() != other["record"].tolist()
    assert (one["mask"] != other["mask"]).any()


def test_only_the_given_records_are_read(dataset: Dataset) -> None:
    records = dataset.splits["validation"]
    seen = {int(i) for batch in islice(make(dataset, records=records).at(0), 20) for i in batch["record"]}
    assert seen <= set(records.tolist())


def test_records_shorter_than_a_window_are_said(dataset: Dataset) -> None:
    loader = make(dataset, window=150, mask_patch=0)
    assert loader.too_short == 4  # the last second of the runs of 21 and 23 s
    assert "4 records are shorter" in str(loader)
    assert loader.n_examples == int((dataset.length >= 150).sum())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 300}, "none of the 68 records has the 300 samples of a window; the longest has 200"),
        ({"records": []}, "none of the 0 records"),
        ({"mask_patch": 30}, "mask_patch 30"),
        ({"mask_ratio": 1.5}, "mask_ratio 1.5"),
    ],
)
def test_bad_requests(dataset: Dataset, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        make(dataset, **changes)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_damaged_shard_comes_up_by_name(prepared: Path, tmp_path: Path, threads: int) -> None:
    broken = shutil.copytree(prepared, tmp_path / "broken")
    shard = next((broken / "shards").iterdir())
    content = bytearray(shard.read_bytes())
    content[1000:40000] = bytes(39000)
    shard.write_bytes(content)
    batches = make(Dataset.open(broken), threads=threads).at(0)
    with pytest.raises(ZooError, match=shard.name):
        list(islice(batches, 20))
