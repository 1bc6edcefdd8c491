"""Batches of paired modalities: row i of each is a trial of the same stimulus, or the same time of one session.

A stimulus is an event's label, so recordings of other people, devices and days answer the same one. Signals that were
recorded together (EEG in the scanner, speech and its features) are paired by time instead: two datasets whose
recordings have the same subject, session, task and run, and whose clocks start together.

Modalities called `signal` and `target` make the batches of tasks that take one signal, and what was heard or seen then.

Like those of `zoo.data.loader`, a batch is a pure function of (seed, step).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from zoo.data.channels import Channels, take
from zoo.data.loader import ahead, together
from zoo.data.remote import ShardCache
from zoo.data.store import Dataset
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.types import Batch

Key = Literal["stimulus", "stimulus_of_subject", "time"]
FIELDS = ("record", "start", "label", "subject", "stimulus", "segment", "sensors")
"""Fields of a batch that are not modalities."""
OF_ONE_SIGNAL = {"signal", "target"}
"""Modalities of which the first is the batch's own signal, and the other its features [b, T, F]."""

NEVER = np.iinfo(np.int64).min
"""Before every sample, also those that would lie before a recording."""


@dataclass(frozen=True)
class Paired:
    """One modality of paired examples.

    Attributes:
        prepared: folder or address of its prepared dataset: continuous, or windows of events
        window_seconds: length of its part of an example
        offset_seconds: from the stimulus, or the common time, to the first sample; positive for a slow response
        channels: valid channels drawn at random for each example; 0 takes all
        rate_hz: what the dataset must be sampled at, and `zoo plan` goes by before it is prepared; 0 takes any
    """

    prepared: str | Path
    window_seconds: float = 1.0
    offset_seconds: float = 0.0
    channels: int = 0
    rate_hz: float = 0.0


class PairedDataset:
    """Prepared datasets by the name of their modality.

    datasets, options  name → dataset, and how it is cut; the first modality gives the fields of a batch that are one's
    path               the folders, for messages

    ZooError for fewer than two modalities, for `signal` or `target` without the other or beside others, for a name that
    is a field of the batch, and for another rate than asked.
    """

    def __init__(self, datasets: Mapping[str, Dataset], options: Mapping[str, Paired]) -> None:
        if len(datasets) < 2:
            raise ZooError(f"data.paired: one modality, {', '.join(datasets)}; wanted two or more")
        for name in FIELDS:
            if name in datasets:
                raise ZooError(f"data.paired: a modality cannot be called {name!r}: batches have a field of that name")
        if OF_ONE_SIGNAL & datasets.keys() and datasets.keys() != OF_ONE_SIGNAL:
            raise ZooError(f"data.paired: got {', '.join(datasets)}; signal and target go with each other and no other")
        for name, dataset in datasets.items():
            wanted = options[name].rate_hz
            if wanted and abs(dataset.rate_hz - wanted) > 1e-6 * wanted:
                raise ZooError(
                    f"{dataset.path}: sampled at {dataset.rate_hz:g} Hz, data.paired.{name}.rate_hz is {wanted:g}"
                )
        self.datasets, self.options = dict(datasets), dict(options)
        self.path = " + ".join(str(dataset.path) for dataset in datasets.values())

    @classmethod
    def open(
        cls, options: Mapping[str, Paired], cache_bytes: int = 0, shard_cache: ShardCache | None = None
    ) -> PairedDataset:
        """Opens every modality's dataset, with an equal share of `cache_bytes` each."""
        share = cache_bytes // max(len(options), 1)
        return cls({name: Dataset.open(each.prepared, share, shard_cache) for name, each in options.items()}, options)


@dataclass(frozen=True)
class Trials:
    """Where the windows of one modality are, unit by unit: those of unit u are `first[u]` … `first[u + 1]`.

    first              [units + 1] int64
    recording, start   [trials] int64: recording, and first sample of the window in it
    latest             [trials] int64: last sample that the window may start at when it is moved
    """

    first: npt.NDArray[np.int64]
    recording: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    latest: npt.NDArray[np.int64]


class PairedLoader:
    """Endless batches of paired windows. What is shuffled and counted are units: what the rows' modalities share.

    data        the modalities
    part        of the split of every dataset
    by          what makes a unit: `stimulus`, an event's label; `stimulus_of_subject`, a label of one person; `time`, a
                stretch of one session as long as the shortest window, moved at random by up to that length
    stimuli     regular expression that a whole label has to match to be a stimulus
    batch_size  examples a step, over all hosts
    seed        of the shuffle, the choice of trials and of channels; 0 … 2³² − 1
    rows        this host's rows of each batch; None for all
    threads     batches that are read at a time; 0 reads in the caller's thread
    prefetch    batches held ready
    readers     rows of a batch that are read at a time

    An epoch takes every unit that all modalities have once, and of each modality one of its trials at random. Trials
    whose samples are not all stored in `part` are left out. ZooError when no unit is left, when two recordings of one
    dataset are of the same session (`time`), and, while iterating, when a shard is damaged.
    """

    def __init__(
        self,
        data: PairedDataset,
        part: str,
        *,
        by: Key,
        batch_size: int,
        seed: int,
        stimuli: str = r"(?i)(?!bad).*",
        rows: Sequence[int] | None = None,
        threads: int = 1,
        prefetch: int = 4,
        readers: int = 1,
    ) -> None:
        self.batch_size = batch_size
        self._datasets = data.datasets
        self._windows = {name: _window(dataset, data.options[name]) for name, dataset in data.datasets.items()}
        self._channels = {
            name: Channels(dataset, data.options[name].channels) for name, dataset in data.datasets.items()
        }
        cut = _Cut(data, part, self._windows)
        self.stimuli: tuple[str, ...] = ()
        """Labels of the stimuli."""
        if by == "time":
            self._trials, self._slack = cut.by_time()
            self._label = np.full(len(self._slack), -1)
        else:
            self._trials, labels = cut.by_stimulus(stimuli, of_subject=by == "stimulus_of_subject")
            self._slack = np.zeros(len(labels))
            self.stimuli = tuple(sorted(set(labels)))
            self._label = np.searchsorted(self.stimuli, labels)
        self.n_examples = len(self._slack)
        self._units = f"{self.n_examples} of {cut.units_of_any} {'stretches of time' if by == 'time' else 'stimuli'}"
        self._rows = range(batch_size) if rows is None else rows
        self._threads, self._prefetch = threads, prefetch
        self._map = together(readers)
        self._stream = self._examples(seed)

    @property
    def epoch_steps(self) -> float:
        """Steps that make one epoch."""
        return self.n_examples / self.batch_size

    @property
    def samples_per_batch(self) -> int:
        """Samples of signal in a batch, over all modalities, channels and hosts."""
        each = (channels.count * self._windows[name] for name, channels in self._channels.items())
        return self.batch_size * sum(each)

    def __str__(self) -> str:
        return f"{self._units} are in all of {', '.join(self._datasets)}; {self.epoch_steps:.1f} steps an epoch"

    def at(self, step: int) -> Iterator[Batch]:
        """The batches of steps `step`, `step` + 1, …, without end.

        NAME      of each modality: `signal` float32 [b, C, T], `sensors` (`zoo.types.Sensors` of numpy arrays), and
                  `subject` int32 [b], index into the people of its dataset
        record    int32 [b], index into the first modality's records: where its window starts
        start     int32 [b], first sample of the first modality's window in its recording
        label     int32 [b], index into `self.stimuli`; −1 for units of time
        subject   int32 [b], that of the first modality
        stimulus  int32 [b], the unit: rows with the same are no negatives of each other

        With the modalities `signal` and `target`, `flat` makes them batches of one signal.
        """
        return ahead(self._batch, step, self.batch_size, self._threads, self._prefetch)

    def _examples(self, seed: int) -> Any:
        import grain

        return grain.MapDataset.range(self.n_examples).seed(seed).shuffle().repeat().random_map(self._example)

    def _example(self, unit: int, rng: np.random.Generator) -> dict[str, Any]:
        """One trial of a unit in each modality."""
        moved = rng.random() * self._slack[unit]
        example: dict[str, Any] = {"stimulus": unit}
        for name, dataset in self._datasets.items():
            trials, size = self._trials[name], self._windows[name]
            trial = rng.integers(trials.first[unit], trials.first[unit + 1])
            recording = int(trials.recording[trial])
            start = min(int(trials.start[trial]) + round(moved * dataset.rate_hz), int(trials.latest[trial]))
            signal = dataset.read(recording, start, start + size)
            channel = self._channels[name].draw(recording, len(signal), rng)
            example[name] = {
                "signal": take(signal, channel, 0, size),
                "channel": channel,
                "recording": recording,
                "start": start,
            }
        return example

    def _batch(self, step: int) -> Batch:
        examples = list(self._map(lambda row: self._stream[step * self.batch_size + row], self._rows))
        stimulus = np.array([example["stimulus"] for example in examples], np.int32)
        batch: Batch = {"stimulus": stimulus, "label": self._label[stimulus].astype(np.int32)}
        for name, dataset in self._datasets.items():
            fields = examples[0][name]
            signal, channel, recording, start = (
                np.stack([example[name][field] for example in examples]) for field in fields
            )
            batch[name] = {
                "signal": signal,
                "sensors": self._channels[name].sensors(recording, channel),
                "subject": dataset.person[recording].astype(np.int32),
            }
            if "record" not in batch:
                records = [int(dataset.record_at(*where)) for where in zip(recording, start, strict=True)]
                batch["record"] = np.array(records, np.int32)
                batch["start"] = start.astype(np.int32)
                batch["subject"] = batch[name]["subject"]
        return flat(batch)


def flat(batch: Batch) -> Batch:
    """A batch of the modalities `signal` and `target` as one of one signal; any other as it is.

    signal, sensors, subject  those of the modality `signal`
    target                    float32 [b, T, F]: the channels of the other as features
    segment                   int32 [b], the unit: rows with the same have the same stimulus
    """
    if not batch.keys() >= OF_ONE_SIGNAL:
        return batch
    target = np.ascontiguousarray(np.swapaxes(batch["target"]["signal"], 1, 2))
    return {**batch, **batch["signal"], "target": target, "segment": batch["stimulus"]}


class _Cut:
    """Finds the trials of every modality in one part of the split."""

    def __init__(self, data: PairedDataset, part: str, windows: Mapping[str, int]) -> None:
        self.data, self.part, self.windows = data, part, windows
        self.reach = {name: _reach(dataset, part) for name, dataset in data.datasets.items()}
        self.units_of_any = 0

    def by_stimulus(self, pattern: str, of_subject: bool) -> tuple[dict[str, Trials], list[str]]:
        """Trials of the units (label,) or (subject, label) that every modality has, and the label of each unit."""
        try:
            is_stimulus = re.compile(pattern).fullmatch
        except re.error as error:
            raise ZooError(f"data.stimuli: {pattern!r} is not a regular expression: {error}") from error
        found: dict[str, dict[tuple[str, ...], list[tuple[int, int, int]]]] = {}
        for name, dataset in self.data.datasets.items():
            found[name] = defaultdict(list)
            for number, recording in enumerate(dataset.recordings):
                events = [event for event in recording.events if is_stimulus(event.label)]
                start = np.array([event.onset for event in events], np.int64) + self._offset(name)
                for event, at, latest in zip(events, start.tolist(), self._latest(name, number, start), strict=True):
                    if latest >= at:
                        unit = (recording.subject, event.label) if of_subject else (event.label,)
                        found[name][unit].append((number, at, at))
        common = sorted(set.intersection(*(set(units) for units in found.values())))
        self.units_of_any = len(set.union(*(set(units) for units in found.values())))
        if not common:
            raise self._nothing("stimulus", {name: [unit[-1] for unit in units] for name, units in found.items()})
        trials = {name: _trials([units[unit] for unit in common]) for name, units in found.items()}
        return trials, [unit[-1] for unit in common]

    def by_time(self) -> tuple[dict[str, Trials], npt.NDArray[np.float64]]:
        """Trials of stretches side by side of the sessions that every modality has, one each, and the seconds by which
        each stretch may be moved."""
        length = min(options.window_seconds for options in self.data.options.values())
        sessions = {name: _sessions(dataset) for name, dataset in self.data.datasets.items()}
        found: dict[str, list[npt.NDArray[np.int64]]] = {name: [np.zeros((3, 0), np.int64)] for name in sessions}
        for session in sorted(set.intersection(*(set(each) for each in sessions.values()))):
            trials = {}
            for name, dataset in self.data.datasets.items():
                number = sessions[name][session]
                seconds = dataset.recordings[number].n_samples / dataset.rate_hz
                onset = np.arange(int(seconds // length) + 1) * length
                start = np.round((onset + self.data.options[name].offset_seconds) * dataset.rate_hz).astype(np.int64)
                trials[name] = np.stack([np.full_like(start, number), start, self._latest(name, number, start)])
            slots = min(each.shape[1] for each in trials.values())
            there = np.stack([each[2, :slots] >= each[1, :slots] for each in trials.values()])
            self.units_of_any += int(there.any(0).sum())
            for name, each in trials.items():
                found[name].append(each[:, :slots][:, there.all(0)])
        if not sum(each.shape[1] for each in next(iter(found.values()))):
            raise self._nothing("time", {name: list(each) for name, each in sessions.items()})
        whole = {name: np.concatenate(each, axis=1) for name, each in found.items()}
        room = [(latest - start) / self.data.datasets[name].rate_hz for name, (_, start, latest) in whole.items()]
        count = np.arange(len(room[0]) + 1)
        return {name: Trials(count, *each) for name, each in whole.items()}, np.minimum(np.min(room, axis=0), length)

    def _offset(self, name: str) -> int:
        return round(self.data.options[name].offset_seconds * self.data.datasets[name].rate_hz)

    def _latest(self, name: str, recording: int, start: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Last sample at which a window may start, from each of `start` on, with all of it stored; `NEVER` for none."""
        record, reach = self.data.datasets[name].record_at(recording, start), self.reach[name]
        return np.where((record >= 0) & (start < reach[record]), reach[record] - self.windows[name], NEVER)

    def _nothing(self, what: str, has: Mapping[str, Sequence[str]]) -> ZooError:
        few = "; ".join(f"{name} has {_few(names)}" for name, names in has.items())
        return ZooError(f"data.paired: no {what} is whole in the {self.part} part of every modality: {few}")


def _window(dataset: Dataset, options: Paired) -> int:
    """Samples of the window."""
    size = round(options.window_seconds * dataset.rate_hz)
    if size < 1:
        raise ZooError(f"{dataset.path}: {options.window_seconds} s have no sample at {dataset.rate_hz:g} Hz")
    return size


def _reach(dataset: Dataset, part: str) -> npt.NDArray[np.int64]:
    """[records] int64: the sample of its recording up to which all is stored, and in `part`, from each record's start.

    −1 for records outside the part. Records that follow each other without a gap make one stretch.
    """
    if part not in dataset.splits:
        raise ZooError(f"{dataset.path}: its split has no part {part!r}, only {', '.join(dataset.splits)}")
    inside = np.zeros(len(dataset), bool)
    inside[dataset.splits[part]] = True
    stop = dataset.start + dataset.length
    joins = (dataset.recording[1:] == dataset.recording[:-1]) & (dataset.start[1:] <= stop[:-1])
    begins = np.flatnonzero(np.concatenate([[True], ~(joins & inside[1:] & inside[:-1])]))
    sizes = np.diff([*begins, len(dataset)])
    return np.where(inside, np.repeat(np.maximum.reduceat(stop, begins), sizes), -1)


def _sessions(dataset: Dataset) -> dict[str, int]:
    """Name of a session → its recording."""
    sessions: dict[str, int] = {}
    for number, each in enumerate(dataset.recordings):
        session = "/".join((each.subject, each.session, each.task, each.run))
        if session in sessions:
            raise ZooError(f"{dataset.path}: {dataset.recordings[sessions[session]].id} and {each.id} are one session")
        sessions[session] = number
    return sessions


def _few(names: Sequence[str]) -> str:
    few = [*sorted(names)[:4], *["…"] * (len(names) > 4)]
    return f"{len(names)} ({', '.join(few)})" if names else "none"


def _trials(units: Sequence[Sequence[tuple[int, int, int]]]) -> Trials:
    sizes = [len(trials) for trials in units]
    recording, start, latest = np.array([trial for trials in units for trial in trials], np.int64).T
    return Trials(np.concatenate([[0], np.cumsum(sizes)]), recording, start, latest)
