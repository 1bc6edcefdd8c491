"""Splits are disjoint, whole and the same every time."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from synthetic import PLAIN, make_raw

from zoo.data.prepare import prepare
from zoo.data.recipes import Window
from zoo.data.splits import Split, by_run, by_subject, by_time
from zoo.data.store import Dataset
from zoo.errors import ZooError

HALVES = {"train": 0.5, "test": 0.5}


def subjects(dataset: Dataset, records: np.ndarray) -> set[str]:
    return {dataset.recordings[number].subject for number in dataset.recording[records]}


def samples(dataset: Dataset, records: np.ndarray) -> set[tuple[int, int]]:
    return {
        (int(dataset.recording[i]), sample)
        for i in records
        for sample in range(dataset.start[i], dataset.start[i] + dataset.length[i])
    }


def covers_once(split: Split, dataset: Dataset) -> bool:
    return sorted(np.concatenate(list(split.values())).tolist()) == list(range(len(dataset)))


def test_by_subject_keeps_people_apart(dataset: Dataset) -> None:
    split = by_subject(dataset)
    assert list(split) == ["train", "validation", "test"]
    assert covers_once(split, dataset)
    for one, other in combinations(split.values(), 2):
        assert not subjects(dataset, one) & subjects(dataset, other)


def test_by_subject_follows_the_fractions_and_the_seed(dataset: Dataset) -> None:
    split = by_subject(dataset, {"train": 0.67, "test": 0.33}, seed=1)
    assert len(subjects(dataset, split["train"])) == 2
    again = by_subject(dataset, {"train": 0.67, "test": 0.33}, seed=1)
    np.testing.assert_array_equal(split["test"], again["test"])
    tested = {
        tuple(subjects(dataset, by_subject(dataset, {"train": 0.67, "test": 0.33}, seed)["test"])) for seed in range(9)
    }
    assert len(tested) == 3


def test_by_run_keeps_recordings_apart(dataset: Dataset) -> None:
    split = by_run(dataset)
    assert covers_once(split, dataset)
    for one, other in combinations(split.values(), 2):
        assert not set(dataset.recording[one]) & set(dataset.recording[other])


def test_too_few_groups_are_an_error(dataset: Dataset) -> None:
    with pytest.raises(ZooError, match="3 subjects cannot fill 4 sets"):
        by_subject(dataset, dict.fromkeys("abcd", 0.25))


def test_by_time_cuts_each_recording_into_blocks(dataset: Dataset) -> None:
    split = by_time(dataset)
    assert covers_once(split, dataset)
    for number in range(len(dataset.recordings)):
        train, validation, test = (each[dataset.recording[each] == number] for each in split.values())
        assert train.max() < validation.min() <= validation.max() < test.min()


def test_by_time_leaves_a_gap(dataset: Dataset) -> None:
    split = by_time(dataset, HALVES, gap_seconds=4.0)
    for number in range(len(dataset.recordings)):
        train, test = (each[dataset.recording[each] == number] for each in split.values())
        assert dataset.start[test[0]] - dataset.start[train[-1]] - dataset.length[train[-1]] >= 400


def test_by_time_never_shares_a_sample_of_overlapping_windows(tmp_path: Path) -> None:
    events = tuple((2.0 + 0.5 * i, 0.0, "tick") for i in range(30))
    make_raw(events=events).save(tmp_path / "ticks_eeg.fif", verbose="error")
    recipe = replace(PLAIN, window=Window(("tick",), -1.0, 1.0))
    prepare(tmp_path / "ticks_eeg.fif", tmp_path / "out", recipe)
    dataset = Dataset.open(tmp_path / "out")
    split = by_time(dataset, HALVES)
    assert len(split["train"]) > 5
    assert len(split["test"]) > 5
    assert not samples(dataset, split["train"]) & samples(dataset, split["test"])
    assert dataset.classes == ("tick",)


@pytest.mark.parametrize("fractions", [{}, {"train": 0.5}, {"train": 1.0, "test": 0.0}])
def test_fractions_must_add_up(dataset: Dataset, fractions: dict[str, float]) -> None:
    with pytest.raises(ZooError, match="add up to 1"):
        by_time(dataset, fractions)
