"""Rows of paired batches answer the same stimulus, or the same time, whatever the hosts, threads or starting point."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import mne
import numpy as np
import pytest
from synthetic import PLAIN

from zoo.data.paired import Paired, PairedDataset, PairedLoader
from zoo.data.prepare import prepare
from zoo.data.recipes import Window
from zoo.data.store import Dataset
from zoo.errors import ZooError
from zoo.plan.plan import example
from zoo.train.config import Config, Data

STIMULI = [f"image{number}" for number in range(6)]
OPTIONS = {
    "eeg": Paired("eeg", 0.8, -0.1),
    "meg": Paired("meg", 0.5, 0.1, channels=3),
    "slow": Paired("slow", 4.0, 2.0),
}


def write(folder: Path, kind: str, names: Sequence[str], rate_hz: float, subjects: Sequence[str], seed: int) -> None:
    """Two minutes a person: time in seconds on every channel, and the stimuli four seconds apart in another order."""
    folder.mkdir()
    for number, subject in enumerate(subjects):
        rng = np.random.default_rng(100 * seed + number)
        order = rng.permutation([*STIMULI * 4, *[f"only_{kind}"] * 2])
        info = mne.create_info(list(names), rate_hz, kind)
        time = np.arange(round(120 * rate_hz)) / rate_hz
        raw = mne.io.RawArray(np.tile(time * 1e-6, (len(names), 1)), info, verbose="error")
        raw.set_annotations(mne.Annotations(2 + 4.0 * np.arange(len(order)), 0.0, order))
        raw.save(folder / f"sub-{subject}_task-images_run-1_{'meg' if kind == 'mag' else 'eeg'}.fif", verbose="error")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Continuous EEG of two people, windows of MEG of one of them and another, something slow of both."""
    top = tmp_path_factory.mktemp("paired")
    mag = replace(PLAIN, kinds=("mag",))
    for seed, (name, kind, channels, rate, subjects, recipe) in enumerate(
        (
            ("eeg", "eeg", ("C3", "C4", "O1", "O2"), 100.0, ("a", "b"), PLAIN),
            ("meg", "mag", [f"MEG{i}" for i in range(5)], 50.0, ("b", "c"), mag),
            ("slow", "eeg", ("Fz", "Cz"), 10.0, ("a", "b"), PLAIN),
        )
    ):
        write(top / f"{name}_files", kind, channels, rate, subjects, seed)
        if name == "meg":
            recipe = replace(recipe, window=Window(tuple(STIMULI[:5]), -0.2, 1.0))
        prepare(top / f"{name}_files", top / name, recipe, fractions={"train": 0.75, "validation": 0.25})
    return {name: top / name for name in OPTIONS}


@pytest.fixture
def data(folders: dict[str, Path]) -> PairedDataset:
    return opened(folders, OPTIONS)


def opened(folders: dict[str, Path], options: dict[str, Paired]) -> PairedDataset:
    return PairedDataset.open({name: replace(each, prepared=folders[name]) for name, each in options.items()})


def make(data: PairedDataset, part: str = "train", **changes: Any) -> PairedLoader:
    return PairedLoader(data, part, **({"by": "stimulus", "batch_size": 8, "seed": 1} | changes))


def assert_same(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_what_a_batch_holds(data: PairedDataset) -> None:
    loader = make(data)
    batch = next(loader.at(0))
    assert {name: batch[name]["signal"].shape for name in OPTIONS} == {
        "eeg": (8, 4, 80),
        "meg": (8, 3, 25),
        "slow": (8, 2, 40),
    }
    assert loader.samples_per_batch == 8 * (4 * 80 + 3 * 25 + 2 * 40)
    assert all(batch[name]["sensors"].position.shape == (8, n, 3) for name, n in (("eeg", 4), ("meg", 3), ("slow", 2)))
    for field in ("record", "start", "label", "subject", "stimulus"):
        assert (batch[field].shape, batch[field].dtype) == ((8,), np.int32)
    assert "5 of 7 stimuli are in all of eeg, meg, slow" in str(loader)
    assert loader.stimuli == tuple(STIMULI[:5])


@pytest.mark.parametrize("part", ["train", "validation"])
def test_every_modality_answers_the_stimulus_of_its_row(data: PairedDataset, part: str) -> None:
    """The signal is its own time, so that a window says which event it followed."""
    loader = make(data, part)
    trials: dict[str, set[float]] = {name: set() for name in OPTIONS}
    for batch in islice(loader.at(0), 7):
        for name, options in OPTIONS.items():
            dataset = data.datasets[name]
            for row in range(8):
                person = dataset.people[batch[name]["subject"][row]]
                recording = next(each for each in dataset.recordings if each.subject == person)
                onset = batch[name]["signal"][row, 0, 0] - options.offset_seconds
                event = min(recording.events, key=lambda each: abs(each.onset / dataset.rate_hz - onset))
                assert abs(event.onset / dataset.rate_hz - onset) < 1e-3
                assert event.label == loader.stimuli[batch["label"][row]]
                trials[name].add((person, round(onset)))
    # More than one trial a stimulus, where there are more.
    assert part == "validation" or min(len(found) for found in trials.values()) > 8
    eeg = data.datasets["eeg"]
    assert set(batch["record"].tolist()) <= set(eeg.splits[part].tolist())
    np.testing.assert_allclose(batch["start"] / 100.0, batch["eeg"]["signal"][:, 0, 0], 1e-6)
    np.testing.assert_array_equal(batch["subject"], eeg.person[eeg.recording[batch["record"]]])


def test_a_stimulus_of_a_subject_pairs_one_person(data: PairedDataset) -> None:
    loader = make(data, by="stimulus_of_subject")
    for batch in islice(loader.at(0), 5):
        for name, dataset in data.datasets.items():
            assert {dataset.people[person] for person in batch[name]["subject"]} == {"b"}
    assert loader.n_examples <= 5


def test_stimuli_are_the_labels_that_match(data: PairedDataset) -> None:
    assert make(data, stimuli="image[23]").stimuli == ("image2", "image3")


def test_units_of_time_are_simultaneous_and_cover_the_session(folders: dict[str, Path]) -> None:
    options = {"eeg": Paired("", 1.0), "slow": Paired("", 2.0, offset_seconds=1.0)}
    loader = make(opened(folders, options), by="time", batch_size=1)
    assert loader.stimuli == ()
    batches = list(islice(loader.at(0), 2 * loader.n_examples))
    starts = np.array([batch["eeg"]["signal"][0, 0, 0] for batch in batches])
    delays = np.array([batch["slow"]["signal"][0, 0, 0] for batch in batches]) - starts
    np.testing.assert_allclose(delays, 1.0, atol=0.06)  # half a sample of the slower
    units = [int(batch["stimulus"][0]) for batch in batches]
    assert sorted(units[: loader.n_examples]) == sorted(units[loader.n_examples :]) == list(range(loader.n_examples))
    assert units[: loader.n_examples] != units[loader.n_examples :]
    assert loader.n_examples == 2 * 88  # of the first 90 s of two people: a second and its answer, which ends 3 s later
    assert 0.2 < np.std(starts % 1.0) < 0.4  # moved within their stretch
    assert all(batch["label"] == -1 for batch in batches)


def test_no_window_reaches_beyond_what_is_stored(folders: dict[str, Path]) -> None:
    """Windows before the start, and answers after the end, of the part: the first 90 s of each person."""
    options = {"eeg": Paired("", 1.0, offset_seconds=-2.5), "slow": Paired("", 1.0, offset_seconds=1.5)}
    loader = make(opened(folders, options), by="time", batch_size=1)
    starts = [float(batch["eeg"]["signal"][0, 0, 0]) for batch in islice(loader.at(0), loader.n_examples)]
    assert len(starts) == 2 * 85  # from 3.0 s to 87.0 s, of which the last answer ends at 89.5 s
    assert min(starts) < 1.5
    assert max(starts) > 83.5
    stimuli = make(opened(folders, {**options, "eeg": Paired("", 1.0, offset_seconds=-2.5)}))
    assert all(batch["eeg"]["signal"].min() >= 0 for batch in islice(stimuli.at(0), 4))


def test_an_epoch_takes_every_stimulus_once(data: PairedDataset) -> None:
    loader = make(data, batch_size=1)
    epochs = [[int(batch["stimulus"][0]) for batch in islice(loader.at(5 * epoch), 5)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_hosts_threads_and_starting_points_change_nothing(data: PairedDataset) -> None:
    whole = list(islice(make(data).at(0), 4))
    for start, other in ((3, make(data)), (0, make(data, threads=0)), (0, make(data, threads=3))):
        for one, two in zip(whole[start:], other.at(start), strict=False):
            assert_same(one, two)
    hosts = [make(data, rows=range(4 * host, 4 * host + 4)).at(0) for host in range(2)]
    for one, *parts in islice(zip(whole, *hosts, strict=False), 2):
        assert_same(one, jax.tree.map(lambda *each: np.concatenate(each), *parts))
    assert (whole[0]["start"] != next(make(data, seed=2).at(0))["start"]).any()


def test_signal_and_target_make_batches_of_one_signal(folders: dict[str, Path]) -> None:
    named = {"signal": replace(OPTIONS["eeg"], prepared=folders["eeg"]), "target": Paired(folders["meg"], 0.5, 0.1)}
    batch = next(make(PairedDataset.open(named)).at(0))
    other = next(make(PairedDataset.open({"eeg": named["signal"], "meg": named["target"]})).at(0))
    assert batch["target"].shape == (8, 25, 5)
    assert_same(batch["signal"], other["eeg"]["signal"])
    assert_same(batch["sensors"], other["eeg"]["sensors"])
    assert_same(batch["target"], np.swapaxes(other["meg"]["signal"], 1, 2))
    for field, wanted in {"segment": "stimulus", "subject": "subject", "record": "record", "label": "label"}.items():
        assert_same(batch[field], other[wanted])
    planned = example(Config(task=None, data=Data(paired=named)))
    assert {name: leaf.shape[1:] for name, leaf in planned.items() if name != "sensors"} == {
        name: leaf.shape[1:] for name, leaf in batch.items() if name != "sensors"
    }
    for names in (("signal", "meg"), ("signal", "target", "meg")):
        with pytest.raises(ZooError, match="signal and target go with each other and no other"):
            PairedDataset.open(dict.fromkeys(names, named["signal"]))


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"eeg": Paired("")}, {}, "one modality, eeg; wanted two or more"),
        (
            {"eeg": Paired(""), "meg": Paired("", offset_seconds=5.0)},
            {},
            r"no stimulus is whole .* eeg has 7 \(image0,",
        ),
        ({"eeg": Paired(""), "meg": Paired("")}, {"stimuli": "tone.*"}, "eeg has none; meg has none"),
        ({"eeg": Paired(""), "meg": Paired("")}, {"stimuli": "("}, "not a regular expression"),
        ({"eeg": Paired(""), "meg": Paired("", window_seconds=0.001)}, {}, "0.001 s have no sample at 50 Hz"),
        (
            {"eeg": Paired(""), "slow": Paired("", 500.0)},
            {"by": "time"},
            r"no time is whole .* eeg has 2 \(a//images/1, b//images/1\)",
        ),
    ],
)
def test_bad_requests(
    folders: dict[str, Path], options: dict[str, Paired], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ZooError, match=message):
        make(opened(folders, options), **changes)


def test_bad_datasets(folders: dict[str, Path]) -> None:
    eeg = Dataset.open(folders["eeg"])
    with pytest.raises(ZooError, match="cannot be called 'label'"):
        PairedDataset({"eeg": eeg, "label": eeg}, {})
    with pytest.raises(ZooError, match=r"100 Hz, data\.paired\.eeg\.rate_hz is 50"):
        opened(folders, {"eeg": Paired("", rate_hz=50.0), "meg": Paired("", rate_hz=50.0)})
    with pytest.raises(ZooError, match=re.escape("has no part 'test', only train, validation")):
        make(opened(folders, OPTIONS), "test")
    eeg.recordings = tuple(replace(each, subject="a") for each in eeg.recordings)
    both = PairedDataset({"eeg": eeg, "slow": eeg}, {"eeg": Paired(""), "slow": Paired("")})
    with pytest.raises(ZooError, match="sub-a_task-images_run-1_eeg and sub-b_task-images_run-1_eeg are one session"):
        make(both, by="time")


def test_a_plan_counts_on_such_batches(data: PairedDataset, folders: dict[str, Path]) -> None:
    options = {name: replace(each, prepared=folders[name]) for name, each in OPTIONS.items()}
    planned = example(Config(task=None, data=Data(paired=options)))
    given = next(make(data, batch_size=1).at(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), planned) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), given
    )
