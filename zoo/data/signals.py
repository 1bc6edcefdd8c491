"""One recording, processed: a recipe applied to what a reader gave.

The filters are MNE's, in float64; the result is the recipe's dtype. Positions and orientations come out in
head coordinates, events in samples of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from zoo.data.recipes import Recipe
from zoo.data.recording import Event, Montage
from zoo.errors import ZooError

if TYPE_CHECKING:
    import mne

    from zoo.data.readers import Reading

REFERENCED = ("eeg", "seeg", "ecog")
"""Kinds that are measured against a reference, so that another can be chosen."""


@dataclass(frozen=True)
class Processed:
    """A recording ready to be cut: signal [C, T] in stored units; `notes`, a line for all that was lost."""

    signal: npt.NDArray[Any]
    rate_hz: float
    montage: Montage
    bads: tuple[str, ...]
    events: tuple[Event, ...]
    notes: tuple[str, ...]
    dropped_channels: int


def process(reading: Reading, recipe: Recipe, file: str) -> Processed:
    """Applies a recipe; takes over `reading.raw`, which is changed. ZooErrors begin with `file`."""
    import mne

    from zoo.data.electrodes import canonical_names

    raw = reading.raw
    notes: list[str] = []
    with mne.use_log_level("error"):
        kinds, dropped = _pick(raw, reading.kinds, recipe, file, notes)
        raw.load_data()
        _check_finite(raw, file)
        try:
            canonical = canonical_names(raw, recipe.sensor_names)
        except ZooError as error:
            raise ZooError(f"{file}: {error}") from error
        _check_band(raw, recipe, file)
        annotations = _annotations(raw, file)
        try:
            if recipe.bads == "interpolate" and raw.info["bads"]:
                notes.append(f"interpolated bad channels {', '.join(raw.info['bads'])}")
                raw.interpolate_bads(reset_bads=True)
            flat = _flat(raw, recipe, notes)
            _filter(raw, recipe)
            _reference(raw, recipe, kinds)
            if recipe.rate_hz and recipe.rate_hz != raw.info["sfreq"]:
                raw.resample(recipe.rate_hz)
        except (ValueError, RuntimeError) as error:
            raise ZooError(f"{file}: recipe {recipe.name!r} cannot be applied: {error}") from error
    signal = _scaled(raw, recipe, flat, file)
    return Processed(
        signal=signal,
        rate_hz=float(raw.info["sfreq"]),
        montage=_montage(raw, kinds, canonical, notes),
        bads=tuple(raw.info["bads"]),
        events=_events(annotations, raw),
        notes=tuple(notes),
        dropped_channels=dropped,
    )


def _pick(
    raw: mne.io.BaseRaw, kinds: Sequence[str], recipe: Recipe, file: str, notes: list[str]
) -> tuple[tuple[str, ...], int]:
    """Keeps the recipe's channels; returns their kinds and how many were dropped."""
    keep = [i for i, kind in enumerate(kinds) if kind in recipe.kinds]
    if not keep:
        raise ZooError(
            f"{file}: its channels are {', '.join(sorted(set(kinds)))}, wanted {', '.join(recipe.kinds)} "
            f"for recipe {recipe.name!r}"
        )
    dropped = [f"{raw.ch_names[i]} ({kind})" for i, kind in enumerate(kinds) if kind not in recipe.kinds]
    if dropped:
        notes.append(f"dropped {len(dropped)} channels: {_listed(dropped)}")
    raw.pick([raw.ch_names[i] for i in keep])
    return tuple(kinds[i] for i in keep), len(dropped)


def _listed(names: Sequence[str]) -> str:
    """Names for a line that people read; a surface has thousands of vertices."""
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _check_finite(raw: mne.io.BaseRaw, file: str) -> None:
    for i, name in enumerate(raw.ch_names):
        finite = np.isfinite(raw.get_data(picks=[i])[0])
        if not finite.all():
            first = int(np.argmin(finite))
            raise ZooError(
                f"{file}: channel {name} has {int((~finite).sum())} samples that are NaN or "
                f"infinite, the first at sample {first} ({first / raw.info['sfreq']:.3f} s)"
            )


def _check_band(raw: mne.io.BaseRaw, recipe: Recipe, file: str) -> None:
    nyquist = raw.info["sfreq"] / 2
    for field, edge in [("lowpass_hz", recipe.lowpass_hz), *(("notch_hz", hz) for hz in recipe.notch_hz)]:
        if edge and edge >= nyquist:
            raise ZooError(
                f"{file}: {field} {edge:g} of recipe {recipe.name!r} is not below half of the file's "
                f"sampling rate ({nyquist:g} Hz)"
            )


def _annotations(raw: mne.io.BaseRaw, file: str) -> list[tuple[float, float, str]]:
    """Onset and duration in seconds from the first sample, and label; ZooError for one outside."""
    seconds = raw.n_times / raw.info["sfreq"]
    found = []
    for annotation in raw.annotations:
        onset, label = float(annotation["onset"] - raw.first_time), str(annotation["description"])
        if not -0.5 <= onset * raw.info["sfreq"] < raw.n_times:
            raise ZooError(f"{file}: event {label!r} at {onset:.3f} s lies outside the recording of {seconds:.3f} s")
        found.append((onset, float(annotation["duration"]), label))
    return found


def _flat(raw: mne.io.BaseRaw, recipe: Recipe, notes: list[str]) -> set[str]:
    """Channels that never change, and so have no width to scale by unless a new reference gives them one."""
    flat = {name for i, name in enumerate(raw.ch_names) if np.ptp(raw.get_data(picks=[i])) == 0}
    if flat:
        notes.append(f"{len(flat)} flat channels: {_listed(sorted(flat))}")
    return set() if recipe.reference else flat


def _filter(raw: mne.io.BaseRaw, recipe: Recipe) -> None:
    if recipe.butterworth_order:
        for hz in recipe.notch_hz:
            # A band-stop of order 1 and ±1 Hz is the second-order notch of quality f / 2.
            design = {"order": 1, "ftype": "butter", "output": "sos"}
            raw.notch_filter(hz, picks="all", notch_widths=1.0, trans_bandwidth=1.0, method="iir", iir_params=design)
    elif recipe.notch_hz:
        raw.notch_filter(recipe.notch_hz, picks="all")
    if recipe.highpass_hz is None and recipe.lowpass_hz is None:
        return
    if recipe.butterworth_order:
        design = {"order": recipe.butterworth_order, "ftype": "butter", "output": "sos"}
        raw.filter(recipe.highpass_hz, recipe.lowpass_hz, picks="all", method="iir", iir_params=design)
    else:
        raw.filter(recipe.highpass_hz, recipe.lowpass_hz, picks="all")


def _reference(raw: mne.io.BaseRaw, recipe: Recipe, kinds: Sequence[str]) -> None:
    if recipe.reference == "average":
        for kind in REFERENCED:
            if kind in kinds:
                raw.set_eeg_reference("average", ch_type=kind)


_STATISTICS: dict[str, Callable[[npt.NDArray[np.float64]], tuple[float, float]]] = {
    "zscore": lambda x: (float(x.mean()), float(x.std())),
    "robust": lambda x: (float(np.median(x)), float(np.subtract(*np.percentile(x, (75, 25))))),
    "percentile95": lambda x: (0.0, float(np.percentile(np.abs(x), 95))),
}
"""Centre and width of one channel, for each scale that is taken from the signal."""


def _scaled(raw: mne.io.BaseRaw, recipe: Recipe, flat: set[str], file: str) -> npt.NDArray[Any]:
    """The signal in stored units, one channel at a time so that no second float64 copy exists."""
    signal = np.empty((len(raw.ch_names), raw.n_times), recipe.dtype)
    for i, name in enumerate(raw.ch_names):
        channel = raw.get_data(picks=[i])[0]
        centre, width = 0.0, recipe.unit
        if recipe.scale != "fixed":
            centre, width = _STATISTICS[recipe.scale](channel)
            if width == 0 or name in flat:
                channel, centre, width = np.zeros_like(channel), 0.0, 1.0
        channel = (channel - centre) / width
        if recipe.clip is not None:
            channel = channel.clip(-recipe.clip, recipe.clip)
        if np.abs(channel).max() > np.finfo(recipe.dtype).max:
            raise ZooError(f"{file}: channel {name} does not fit {recipe.dtype}: choose another unit or scale")
        signal[i] = channel
    return signal


def _events(annotations: list[tuple[float, float, str]], raw: mne.io.BaseRaw) -> tuple[Event, ...]:
    """Annotations in samples of the result; a duration that passes the end is cut there."""
    rate, events = raw.info["sfreq"], []
    for onset, duration, label in annotations:
        start = min(max(round(onset * rate), 0), raw.n_times - 1)  # rounding at the new rate may pass an end
        events.append(Event(start, min(round(duration * rate), raw.n_times - start), label))
    return tuple(events)


def _montage(raw: mne.io.BaseRaw, kinds: tuple[str, ...], canonical: tuple[str, ...], notes: list[str]) -> Montage:
    from mne.io.constants import FIFF

    position = np.full((len(kinds), 3), np.nan)
    orientation = np.full((len(kinds), 3), np.nan)
    device_to_head = raw.info["dev_head_t"]
    in_device = 0
    for i, channel in enumerate(raw.info["chs"]):
        if channel["loc"][:3].any():  # zeros and NaN both mean unknown
            position[i] = channel["loc"][:3]
        if kinds[i] in ("mag", "grad"):
            orientation[i] = channel["loc"][9:12]
        if channel["coord_frame"] == FIFF.FIFFV_COORD_DEVICE:
            if device_to_head is None:
                position[i] = orientation[i] = np.nan
                in_device += 1
            else:
                rotation, translation = device_to_head["trans"][:3, :3], device_to_head["trans"][:3, 3]
                position[i] = rotation @ position[i] + translation
                orientation[i] = rotation @ orientation[i]
    if in_device:
        notes.append(f"{in_device} sensors have no position: the file does not say where the head was")
    return Montage(
        names=tuple(raw.ch_names),
        canonical=canonical,
        kinds=kinds,
        position=position.astype(np.float32),
        orientation=orientation.astype(np.float32),
    )


def cut(processed: Processed, recipe: Recipe) -> tuple[list[tuple[int, int, int]], list[str]]:
    """Where the records lie, as (first sample, samples, label), and a line for each one left out."""
    rate, n_samples = processed.rate_hz, processed.signal.shape[1]
    cuts: list[tuple[int, int, int]] = []
    lost: list[str] = []
    if recipe.window is None:
        size = max(1, round(recipe.segment_seconds * rate))
        wanted = [(start, min(size, n_samples - start), -1) for start in range(0, n_samples, size)]
    else:
        first, size = (
            round(recipe.window.tmin * rate),
            round((recipe.window.tmax - recipe.window.tmin) * rate),
        )
        labels = recipe.window.events
        chosen = [event for event in processed.events if event.label in labels]
        wanted = sorted((event.onset + first, size, labels.index(event.label)) for event in chosen)
    for start, size, label in wanted:
        where = f"the record at {start / rate:.2f} s"
        if start < 0 or start + size > n_samples:
            lost.append(f"left out {where}: its window crosses an end of the recording")
            continue
        peak = float(np.abs(processed.signal[:, start : start + size]).max()) if recipe.reject else 0.0
        if recipe.reject and peak >= recipe.reject:
            lost.append(f"left out {where}: its largest magnitude is {peak:.3g}, the recipe rejects {recipe.reject:g}")
            continue
        cuts.append((start, size, label))
    return cuts, lost
