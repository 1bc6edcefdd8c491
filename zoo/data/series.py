"""Recordings that are a plain array [channels, time]: what describes them, and their way into MNE.

An fMRI or region-series file often lacks its sampling interval, channel names or units. They are then given
in a sidecar, a JSON file beside it with the same name (`rest.mat` → `rest.json`, `bold.nii.gz` →
`bold.json`), whose keys follow BIDS where BIDS has one:

    RepetitionTime     seconds a sample, or
    SamplingFrequency  samples a second; either wins over the file's own header
    Variable           .mat, .npz: the array [channels, time], as a path through structs ("out.resp"); of a
                       struct or cell array, or along a third, leading dimension, each element is a recording
    Series             what these elements are: "run" (default) or "subject"
    ChannelType        one of `zoo.sensors.KINDS`; .mat, .npz: "roi" unless given
    ChannelNames       list of names, one a channel
    Units              V, mV, µV or uV, T, fT, n/a; must be given for an electric or magnetic ChannelType
    Subject            the person, where the path does not tell
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zoo.errors import ZooError
from zoo.sensors import KINDS

if TYPE_CHECKING:
    import mne

SPATIAL_KINDS = ("roi", "vertex", "voxel")
"""Kinds MNE has no channel type for: its type "misc", in arbitrary units."""

_UNITS = {"V": 1.0, "mV": 1e-3, "µV": 1e-6, "uV": 1e-6, "T": 1.0, "fT": 1e-15, "n/a": 1.0}


@dataclass(frozen=True)
class Sidecar:
    """The contents of a sidecar (see the module); None or "" for what it does not say."""

    rate_hz: float | None = None
    variable: str = ""
    series: str = "run"
    channel_type: str = ""
    channel_names: tuple[str, ...] | None = None
    units: str = ""
    subject: str = ""


@dataclass(frozen=True)
class Series:
    """signal [C, T] in the file's units; names and kinds of its channels; position [C, 3] metres."""

    signal: np.ndarray
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    rate_hz: float | None
    position: np.ndarray | None = None


def sidecar_path(path: Path) -> Path:
    """Where the sidecar of `path` is: the same name, ending in .json."""
    stem = path.name.removesuffix(".gz")
    return path.with_name(stem[: stem.rindex(".")] + ".json")


def read_sidecar(path: Path) -> Sidecar:
    """The sidecar of the recording at `path`, an empty one where there is none. ZooError if it is invalid."""
    file = sidecar_path(path)
    if not file.is_file():
        return Sidecar()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        seconds, rate = content.get("RepetitionTime"), content.get("SamplingFrequency")
        names = content.get("ChannelNames")
        sidecar = Sidecar(
            rate_hz=float(rate) if rate else 1.0 / float(seconds) if seconds else None,
            variable=content.get("Variable", ""),
            series=content.get("Series", "run"),
            channel_type=content.get("ChannelType", ""),
            channel_names=None if names is None else tuple(names),
            units=content.get("Units", ""),
            subject=content.get("Subject", ""),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise ZooError(f"{file.name}: not a valid sidecar: {error}") from error
    for key, value, wanted in (
        ("Series", sidecar.series, ("run", "subject")),
        ("ChannelType", sidecar.channel_type or KINDS[0], KINDS),
        ("Units", sidecar.units or "n/a", tuple(_UNITS)),
    ):
        if value not in wanted:
            raise ZooError(f"{file.name}: {key} is {value!r}, wanted one of {', '.join(wanted)}")
    return sidecar


def to_raw(path: Path, series: Series, sidecar: Sidecar) -> mne.io.BaseRaw:
    """The series as an MNE recording, in SI units where the sidecar names units.

    Raises ZooError when neither header nor sidecar gives the sampling interval, when channel names do not
    number the channels or repeat, or when an electric or magnetic signal comes without units.
    """
    import mne

    rate = sidecar.rate_hz or series.rate_hz
    if not rate or not np.isfinite(rate) or rate < 0:
        raise ZooError(
            f"{path.name}: the file does not give its sampling interval: wanted RepetitionTime or "
            f"SamplingFrequency in {sidecar_path(path).name}"
        )
    names = sidecar.channel_names or series.names
    if len(names) != len(series.signal):
        raise ZooError(f"{path.name}: {len(names)} channel names for {len(series.signal)} channels")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ZooError(f"{path.name}: channel name {twice!r} occurs more than once, wanted unique names")
    if not sidecar.units and not set(series.kinds) <= set(SPATIAL_KINDS):
        raise ZooError(f"{path.name}: {series.kinds[0]} signals want Units in {sidecar_path(path).name}")
    types = ["misc" if kind in SPATIAL_KINDS else kind for kind in series.kinds]
    info = mne.create_info(list(names), rate, types, verbose="ERROR")
    if series.position is not None:
        for channel, position in zip(info["chs"], series.position, strict=True):
            channel["loc"][:3] = position
    signal = np.asarray(series.signal, dtype=np.float64) * _UNITS[sidecar.units or "n/a"]
    return mne.io.RawArray(signal, info, verbose="ERROR")
