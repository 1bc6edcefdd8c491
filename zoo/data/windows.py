"""Windows around events, cut from the continuous records of a dataset, for probes and decoders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.data.recording import StoredRecording
    from zoo.data.store import Dataset


@dataclass(frozen=True)
class Windows:
    """N labelled windows, recording by recording and in order of time within each.

    signal     [N, C, T] float32, stored units; channels that pad a smaller montage are zero
    label      [N] int64, index into `classes`
    classes    class names
    subject    [N] person of each window
    person     [N] int64, index of that person in the dataset's people
    recording  [N] int64, index into the dataset's recordings
    onset      [N] int64, samples from the start of the recording to the event
    rate_hz    sampling rate
    sensors    fields of `zoo.types.Sensors`, [recordings, C, …]: `sensors[field][recording]` gives those of
               each window
    left_out   reason -> number of events that gave no window
    """

    signal: npt.NDArray[np.float32]
    label: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    subject: npt.NDArray[np.str_]
    person: npt.NDArray[np.int64]
    recording: npt.NDArray[np.int64]
    onset: npt.NDArray[np.int64]
    rate_hz: float
    sensors: dict[str, npt.NDArray[Any]]
    left_out: dict[str, int]


def event_windows(
    dataset: Dataset,
    classes: Mapping[str, tuple[str, ...]],
    tmin: float,
    tmax: float,
    *,
    baseline: tuple[float, float] | None = None,
    reject_bad: bool = False,
) -> Windows:
    """Cuts one window per event of the given classes.

    classes     class name -> labels of the events that belong to it
    tmin, tmax  seconds from the event's onset to the first sample and to the end (exclusive)
    baseline    (from, to) seconds, within the window: its mean is subtracted from each channel; None
                subtracts nothing
    reject_bad  leaves out windows that touch an event whose label begins with "bad", MNE's mark of an
                artefact

    Windows that reach beyond an end of their recording are left out; `Windows.left_out` counts them.

    Raises ZooError: a label no recording has, or that two classes claim; no window left; a baseline outside
    the window.
    """
    class_of = _class_of(dataset, classes)
    first, size = round(tmin * dataset.rate_hz), round((tmax - tmin) * dataset.rate_hz)
    if size <= 0:
        raise ZooError(f"a window from {tmin} s to {tmax} s has no samples at {dataset.rate_hz:g} Hz")
    left_out: Counter[str] = Counter()
    found: list[tuple[int, int, int]] = []  # recording, onset, label
    for number, recording in enumerate(dataset.recordings):
        artefacts = _artefacts(recording) if reject_bad else np.zeros((0, 2), np.int64)
        for event in sorted(recording.events, key=lambda each: each.onset):
            if event.label not in class_of:
                continue
            start, stop = event.onset + first, event.onset + first + size
            if start < 0 or stop > recording.n_samples:
                left_out["reaches beyond an end of the recording"] += 1
            elif ((artefacts[:, 0] < stop) & (artefacts[:, 1] > start)).any():
                left_out["touches a bad stretch"] += 1
            else:
                found.append((number, event.onset, class_of[event.label]))
    if not found:
        raise ZooError(f"{dataset.path}: no window from {tmin} s to {tmax} s is left: {dict(left_out)}")
    recording_of, onset, label = np.array(found, np.int64).T
    signal = np.zeros((len(found), dataset.n_channels, size), np.float32)
    for window, (number, at, _) in zip(signal, found, strict=True):
        read = dataset.read(number, at + first, at + first + size)
        window[: len(read)] = read
    if baseline is not None:
        signal -= _baseline(signal, baseline, tmin, dataset.rate_hz)
    tables, row_of = dataset.sensor_tables()
    return Windows(
        signal=signal,
        label=label,
        classes=tuple(classes),
        subject=np.array([dataset.recordings[number].subject for number in recording_of]),
        person=dataset.person[recording_of],
        recording=recording_of,
        onset=onset,
        rate_hz=dataset.rate_hz,
        sensors={field: values[row_of] for field, values in tables.items()},
        left_out=dict(left_out),
    )


def record_windows(
    dataset: Dataset, records: npt.NDArray[np.int64], size: int, classes: Mapping[str, tuple[str, ...]]
) -> Windows:
    """The middle `size` samples of records that were cut around events (a recipe's `window`), as windows.

    classes  class name → labels of the events that belong to it, others are left out; empty: every label is a class.

    Raises ZooError for a label no record has, or that two classes claim, and where no record is left.
    """
    label = class_labels(dataset, classes) if classes else dataset.label
    chosen = np.asarray([i for i in records if label[i] >= 0 and dataset.length[i] >= size], np.int64)
    if not len(chosen):
        raise ZooError(f"{dataset.path}: none of {len(records)} records is a labelled window of {size} samples")
    first = (dataset.length[chosen] - size) // 2
    signal = np.zeros((len(chosen), dataset.n_channels, size), np.float32)
    for window, i, at in zip(signal, chosen, first, strict=True):
        record = dataset[int(i)]
        window[: len(record)] = record[:, at : at + size]
    recording_of = dataset.recording[chosen]
    tables, row_of = dataset.sensor_tables()
    return Windows(
        signal=signal,
        label=label[chosen],
        classes=tuple(classes) or dataset.classes,
        subject=np.array([dataset.recordings[number].subject for number in recording_of]),
        person=dataset.person[recording_of],
        recording=recording_of,
        onset=dataset.start[chosen] + first,
        rate_hz=dataset.rate_hz,
        sensors={field: values[row_of] for field, values in tables.items()},
        left_out={},
    )


def class_labels(dataset: Dataset, classes: Mapping[str, tuple[str, ...]]) -> npt.NDArray[np.int64]:
    """Class of every record that was cut around an event, [records], −1 where its label is in no class.

    Raises ZooError for a label that the dataset's windows do not have, or that two classes claim.
    """
    class_of: dict[str, int] = {}
    for number, (name, labels) in enumerate(classes.items()):
        for label in labels:
            if label not in dataset.classes:
                raise ZooError(
                    f"{dataset.path}: class {name!r} wants windows of {label!r}; there are those of "
                    f"{', '.join(dataset.classes) or 'no event: prepare with a recipe that has a window'}"
                )
            if label in class_of:
                raise ZooError(f"events called {label!r} belong to two classes")
            class_of[label] = number
    # One more, for records without a label: −1 looks up the last.
    table = np.array([*(class_of.get(label, -1) for label in dataset.classes), -1])
    return table[dataset.label]


def _class_of(dataset: Dataset, classes: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """Event label -> class index."""
    present = {event.label for recording in dataset.recordings for event in recording.events}
    class_of: dict[str, int] = {}
    for number, (name, labels) in enumerate(classes.items()):
        for label in labels:
            if label not in present:
                raise ZooError(
                    f"{dataset.path}: class {name!r} wants events called {label!r}; the recordings have "
                    f"{', '.join(sorted(present)) or 'none'}"
                )
            if label in class_of:
                raise ZooError(f"events called {label!r} belong to two classes")
            class_of[label] = number
    return class_of


def _artefacts(recording: StoredRecording) -> npt.NDArray[np.int64]:
    """First and last sample (exclusive) of the stretches marked bad, [·, 2]."""
    bad = [event for event in recording.events if event.label.lower().startswith("bad")]
    spans = [(event.onset, event.onset + max(event.duration, 1)) for event in bad]
    return np.array(spans, np.int64).reshape(-1, 2)


def _baseline(
    signal: npt.NDArray[np.float32], baseline: tuple[float, float], tmin: float, rate_hz: float
) -> npt.NDArray[np.float32]:
    start, stop = (round((seconds - tmin) * rate_hz) for seconds in baseline)
    if not 0 <= start < stop <= signal.shape[-1]:
        raise ZooError(f"baseline {baseline} s lies outside the window, which starts at {tmin} s")
    return signal[:, :, start:stop].mean(axis=-1, keepdims=True)
