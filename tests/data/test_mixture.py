"""Mixtures keep every dataset's share and order, whatever the hosts, threads or starting point."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from synthetic import PLAIN, RATE_HZ, make_raw

from zoo.data.mixture import Mixed, MixedLoader, Mixture, turn, whole_numbers
from zoo.data.prepare import prepare
from zoo.data.recipes import Window
from zoo.data.store import Dataset
from zoo.errors import ZooError
from zoo.plan.plan import example
from zoo.train.config import Config, Data


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller dataset with a wider montage, and a person of the same name."""
    top = tmp_path_factory.mktemp("other")
    raw = make_raw(("Fz", "Cz", "Pz", "C3", "C4", "O1", "O2", "P3"), seconds=13.0, seed=7, bads=["Cz"], events=())
    (top / "files").mkdir()
    raw.save(top / "files" / "sub-s1_task-rest_run-1_eeg.fif", verbose="error")
    prepare(top / "files", top / "rest", PLAIN)
    return top / "rest"


@pytest.fixture
def mixture(prepared: Path, other: Path) -> Mixture:
    return Mixture.open_all({"noise": Mixed(prepared, 0.7), "rest": Mixed(other, 0.3)}, cache_bytes=10**6)


def make(mixture: Mixture, **changes: Any) -> MixedLoader:
    options = {"window": 100, "batch_size": 8, "seed": 3, "mask_patch": 25, "mask_ratio": 0.4} | changes
    return MixedLoader(mixture, options.pop("records", np.arange(len(mixture))), **options)


def assert_same(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_whole_is_its_parts_one_after_another(mixture: Mixture, prepared: Path, other: Path) -> None:
    parts = Dataset.open(prepared), Dataset.open(other)
    assert len(mixture) == sum(map(len, parts))
    assert mixture.n_channels == 8
    assert mixture.people == ("noise/s1", "noise/s2", "noise/s3", "rest/s1")
    for i in (0, len(parts[0]) - 1, len(parts[0]), len(mixture) - 1):
        source, own = (0, i) if i < len(parts[0]) else (1, i - len(parts[0]))
        assert mixture.source[i] == source
        np.testing.assert_array_equal(mixture[i], parts[source][own])
        assert mixture.packed(i) == parts[source].packed(own)
        recording = mixture.recordings[mixture.recording[i]]
        stored = parts[source].recordings[parts[source].recording[own]]
        assert recording.id == f"{mixture.names[source]}/{stored.id}"
        assert mixture.people[mixture.person[mixture.recording[i]]] == recording.subject
        start = int(mixture.start[i])
        np.testing.assert_array_equal(mixture.read(int(mixture.recording[i]), start, start + 50), mixture[i][:, :50])
        assert_same(mixture.sensors(int(mixture.recording[i])), parts[source].sensors(parts[source].recording[own]))
    for name, records in mixture.splits.items():
        assert len(records) == sum(len(part.splits[name]) for part in parts)
        assert all(mixture.source[record] == (record >= len(parts[0])) for record in records)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(mixture))[5], mixture[5])


def test_rows_are_where_they_say_in_the_dataset_they_name(mixture: Mixture) -> None:
    for batch in islice(make(mixture).at(0), 5):
        assert batch["dataset"].dtype == np.int32
        for row, (record, start) in enumerate(zip(batch["record"], batch["start"], strict=True)):
            assert batch["dataset"][row] == mixture.source[record]
            wanted = mixture.read(mixture.recording[record], start, start + 100)
            np.testing.assert_array_equal(batch["signal"][row, : len(wanted)], wanted)
            assert not batch["signal"][row, len(wanted) :].any()
            sensors = mixture.sensors(mixture.recording[record])
            np.testing.assert_array_equal(batch["sensors"].valid[row, : len(wanted)], sensors["valid"])
            assert not batch["sensors"].valid[row, len(wanted) :].any()
            person = mixture.people[batch["subject"][row]]
            assert person == mixture.recordings[mixture.recording[record]].subject


def test_shares_are_exact_and_even(mixture: Mixture) -> None:
    assert mixture.shares == (7, 3)
    sources = np.concatenate([batch["dataset"] for batch in islice(make(mixture).at(0), 25)])
    assert Counter(sources.tolist()) == {0: 140, 1: 60}
    within = np.cumsum(sources == 0) - 0.7 * np.arange(1, 201)
    assert np.abs(within).max() < 1.0


@pytest.mark.parametrize("shares", [(1,), (7, 3), (1, 1, 1), (5, 1, 93, 1), (997, 3, 41), (1, 2, 3, 4, 5, 6)])
def test_turns(shares: tuple[int, ...]) -> None:
    total = sum(shares)
    counts = [0] * len(shares)
    for i in range(3 * total):
        number, before = turn(i, shares)
        assert before == counts[number]
        counts[number] += 1
        for count, share in zip(counts, shares, strict=True):
            assert abs(count - (i + 1) * share / total) < 2
        if (i + 1) % total == 0:
            assert counts == [share * (i + 1) // total for share in shares]
    far = 10**17 * total  # a hundred thousand million million examples on
    assert turn(far, shares) == (turn(0, shares)[0], 10**17 * shares[turn(0, shares)[0]])


def test_weights_in_whole_numbers() -> None:
    assert whole_numbers([0.7, 0.3]) == (7, 3)
    assert whole_numbers([2, 4.0]) == (1, 2)
    assert whole_numbers([1e-3, 1]) == (1, 1000)


def test_each_dataset_has_epochs_of_its_own(mixture: Mixture) -> None:
    loader = make(mixture, batch_size=50, mask_patch=0, threads=0)
    records = np.concatenate([batch["record"] for batch in islice(loader.at(0), 8)])
    for source in (0, 1):
        own = np.flatnonzero(mixture.source == source)
        fits = mixture.length[own] // 100
        seen = records[mixture.source[records] == source]
        epochs = [seen[at : at + fits.sum()] for at in range(0, len(seen) - fits.sum() + 1, fits.sum())]
        assert len(epochs) > 1
        for epoch in epochs:
            np.testing.assert_array_equal(np.bincount(epoch, minlength=len(mixture))[own], fits)
        assert epochs[0].tolist() != epochs[1].tolist()
    assert "noise 0.7 of the examples: 132 windows in 3.8 steps; rest 0.3" in str(loader)


def test_hosts_threads_and_starting_points_change_nothing(mixture: Mixture) -> None:
    whole = list(islice(make(mixture).at(0), 4))
    for start, loader in ((3, make(mixture)), (0, make(mixture, threads=0)), (0, make(mixture, threads=3))):
        for one, two in zip(whole[start:], loader.at(start), strict=False):
            assert_same(one, two)
    hosts = [make(mixture, rows=range(2 * host, 2 * host + 2)).at(0) for host in range(4)]
    for one, *parts in islice(zip(whole, *hosts, strict=False), 2):
        assert_same(one, jax.tree.map(lambda *each: np.concatenate(each), *parts))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_is_above_zero(prepared: Path, other: Path, weight: float) -> None:
    with pytest.raises(ZooError, match=r"data.mix.rest.weight is \S+, wanted a number above 0"):
        Mixture.open_all({"noise": Mixed(prepared), "rest": Mixed(other, weight)})


def test_what_cannot_be_mixed(mixture: Mixture, recordings: Path, prepared: Path, other: Path, tmp_path: Path) -> None:
    for name, recipe in {
        "slow": replace(PLAIN, rate_hz=RATE_HZ / 2),
        "events": replace(PLAIN, window=Window(("left",), -0.2, 0.8)),
        "short": replace(PLAIN, segment_seconds=0.5),
    }.items():
        prepare(recordings / "sub-s1_task-noise_run-1_eeg.fif", tmp_path / name, recipe)
    for name, message in (
        ("slow", "noise is sampled at 100 Hz, b at 50"),
        ("events", "noise has windows of the events none; b of left"),
        ("absent", "no such folder"),
    ):
        with pytest.raises(ZooError, match=message):
            Mixture.open_all({"noise": Mixed(prepared), "b": Mixed(tmp_path / name)})
    with pytest.raises(ZooError, match="a and b are the same dataset"):
        Mixture.open_all({"a": Mixed(prepared), "b": Mixed(str(prepared))})
    short = Mixture.open_all({"noise": Mixed(prepared), "b": Mixed(tmp_path / "short")})
    with pytest.raises(ZooError, match=r"short: none of its \d+ records here has the 100 samples .* take b out"):
        make(short)
    with pytest.raises(ZooError, match="rest: none of its 0 records here"):
        make(mixture, records=np.flatnonzero(mixture.source == 0))


def test_a_plan_counts_on_such_batches(mixture: Mixture, prepared: Path, other: Path) -> None:
    mix = {"noise": Mixed(prepared, 0.7), "rest": Mixed(other, 0.3)}
    data = Data(mix=mix, mask_patch=25, window_seconds=1.0)
    planned, given = example(Config(task=None, data=data)), next(make(mixture, batch_size=1).at(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), planned) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), given
    )
