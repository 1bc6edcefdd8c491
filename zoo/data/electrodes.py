"""From the channels of a recording to the canonical electrode table `zoo.sensors.NAMES`."""

from __future__ import annotations

import difflib
import functools
import re
from typing import TYPE_CHECKING, Literal

import numpy as np

from zoo.errors import ZooError
from zoo.sensors import LABRAM_NAMES, NAME_INDEX, NAMES

if TYPE_CHECKING:
    import mne

Policy = Literal["by_name", "nearest", "none"]

MAX_ANGLE_DEGREES = 25.0
"""Neighbouring 10-10 electrodes lie about 20 degrees apart; farther off, "nearest" would be a lie."""

_SPHERE_ELECTRODES = 16
"""Fewer points than this do not fix a sphere."""

_IDEAL_SPHERE = 1e-3
"""Radii that vary by less than this were computed, not measured on a head."""

# Two of MNE's montages: 10-05 sites on a real head, and 10-10 sites on the sphere that manufacturers draw,
# whose equator runs through Fpz, T7, T8 and Oz. Directions differ by up to 25 degrees between the two.
_ANATOMICAL = "colin27_1005"
_SPHERICAL = "easycap-M1"

# Everything before T3 is a 10-10 site; what follows are other names of the same places, or pairs.
_TEN_TEN_NAMES = LABRAM_NAMES[: LABRAM_NAMES.index("T3")]

_OLDER_NAMES = {"T3": "T7", "T4": "T8", "T5": "P7", "T6": "P8"}

_BIOSEMI_ABCD = re.compile(r"A([3-9]|[12]\d|3[0-2])|[BD]([1-9]|[12]\d|3[0-2])")
"""Names of BioSemi's ABCD layout that the 10-20 system does not know (it does know A1, A2, C1 … C6)."""


def canonical_names(raw: mne.io.BaseRaw, policy: Policy) -> tuple[str, ...]:
    """The canonical electrode name of every channel of `raw`; "" for a channel that is not EEG.

    "by_name"  what the channel is called, without case, an "EEG " prefix, a "-REF", "-LE" or "-AVG" suffix or
               trailing dots; the result must be in `zoo.sensors.NAMES`.
    "nearest"  the 10-10 electrode in the nearest direction, seen from the centre of a sphere fitted to the
               recording's EEG positions (from the template's own centre when there are fewer than 16), in
               head coordinates. The template is MNE's colin27_1005; for positions that lie exactly on a
               sphere, which were computed and not measured, its easycap-M1. Two channels may share a name.
    "none"     "" for every channel.

    Raises ZooError, which the caller gives the file's name, for an unknown name; for names of BioSemi's
    ABCD layout, which collide with 10-20 names; for a missing position; for a channel more than 25 degrees
    from every 10-10 electrode.
    """
    kinds = raw.get_channel_types()
    eeg = [name for name, kind in zip(raw.ch_names, kinds, strict=True) if kind == "eeg"]
    if policy == "none" or not eeg:
        return ("",) * len(kinds)
    if policy == "by_name":
        found = _by_name(eeg)
    elif policy == "nearest":
        found = _nearest(raw, eeg)
    else:
        raise ZooError(f"sensor name policy {policy!r}: wanted by_name, nearest or none")
    return tuple(found.get(name, "") for name in raw.ch_names)


def plain_name(name: str) -> str:
    """ "EEG Fp1-REF" and "Fp1." to "FP1": the electrode's name without what recorders put around it."""
    name = name.strip().upper().rstrip(".")
    return re.sub(r"-(REF|LE|AVG)$", "", name.removeprefix("EEG ")).strip()


def is_biosemi_abcd(names: list[str]) -> bool:
    """Whether channel names follow BioSemi's ABCD layout (A1 … A32, B1 … B32, …)."""
    return sum(_BIOSEMI_ABCD.fullmatch(plain_name(name)) is not None for name in names) >= 8


def attach_template_positions(raw: mne.io.BaseRaw) -> None:
    """Gives the EEG channels of `raw` the positions of MNE's colin27_1005, in place, in head coordinates.

    Only where no EEG channel has a position and every EEG channel has a canonical name; otherwise `raw` stays
    as it is. Names the template does not have (bipolar pairs, CB1, …) stay without position.
    """
    import mne

    kinds = raw.get_channel_types()
    eeg = [i for i, kind in enumerate(kinds) if kind == "eeg"]
    names = [raw.ch_names[i] for i in eeg]
    placed = any(_has_position(raw.info["chs"][i]["loc"][:3]) for i in eeg)
    if not eeg or placed or is_biosemi_abcd(names) or any(plain_name(n) not in NAME_INDEX for n in names):
        return
    template = mne.channels.make_standard_montage(_ANATOMICAL)
    place = template.get_positions()["ch_pos"]
    upper = {name.upper(): name for name in template.ch_names}
    positions = {name: place[upper[plain_name(name)]] for name in names if plain_name(name) in upper}
    fiducials = {key: template.get_positions()[key] for key in ("nasion", "lpa", "rpa")}
    montage = mne.channels.make_dig_montage(positions, coord_frame="mri", **fiducials)
    raw.set_montage(montage, on_missing="ignore", verbose="ERROR")


@functools.cache
def template(names: tuple[str, ...], spherical: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Positions [n, 3] of 10-10 electrodes (also T3 to T6), and the centre [3] of the sphere through all sites.

    float64, metres, head coordinates. spherical: on the sphere that manufacturers draw (easycap-M1), where that has all
    of these electrodes; else on a real head (colin27_1005).

    Raises ZooError for a name without a place.
    """
    wanted = [_OLDER_NAMES.get(name, name) for name in names]
    for montage in (_SPHERICAL,) * spherical + (_ANATOMICAL,):
        known, place = _ten_ten_positions(montage)
        missing = [name for name in wanted if name not in known]
        if not missing:
            return np.array([place[known.index(name)] for name in wanted]), _sphere_centre(place)
    raise ZooError(f"electrode {missing[0]!r} has no place in the 10-10 system")


def _by_name(eeg: list[str]) -> dict[str, str]:
    if is_biosemi_abcd(eeg):
        raise ZooError(
            f"the EEG channels are named by BioSemi's ABCD layout ({eeg[0]} … {eeg[-1]}), whose "
            "C3 is not the 10-20 site C3: wanted 10-20 names, or the sensor name policy 'nearest'"
        )
    found = {name: plain_name(name) for name in eeg}
    for name, plain in found.items():
        if plain not in NAME_INDEX:
            close = difflib.get_close_matches(plain, NAMES, n=1, cutoff=0.0)[0]
            raise ZooError(
                f"channel {name!r} is not in the canonical electrode table; nearest name: "
                f"{close} (rename it, correct its kind, or use the sensor name policy 'nearest' or 'none')"
            )
    return found


def _nearest(raw: mne.io.BaseRaw, eeg: list[str]) -> dict[str, str]:
    position = np.array([raw.info["chs"][raw.ch_names.index(name)]["loc"][:3] for name in eeg])
    missing = [name for name, p in zip(eeg, position, strict=True) if not _has_position(p)]
    if missing:
        raise ZooError(
            f"channel {missing[0]!r} ({len(missing)} of {len(eeg)}) has no position: "
            "the sensor name policy 'nearest' wants one for every EEG channel"
        )
    names, site = _ten_ten_positions(_ANATOMICAL)
    centre, site_centre = _sphere_centre(site), _sphere_centre(site)
    if len(position) >= _SPHERE_ELECTRODES:
        centre = _sphere_centre(position)
        radius = np.linalg.norm(position - centre, axis=1)
        if radius.std() < _IDEAL_SPHERE * radius.mean():
            names, site = _ten_ten_positions(_SPHERICAL)
            site_centre = _sphere_centre(site)
    cosine = _directions(position, centre) @ _directions(site, site_centre).T
    angle = np.degrees(np.arccos(np.clip(cosine.max(axis=1), -1.0, 1.0)))
    if angle.max() > MAX_ANGLE_DEGREES:
        worst = int(angle.argmax())
        raise ZooError(
            f"channel {eeg[worst]!r} lies {angle[worst]:.0f} degrees from the nearest 10-10 "
            f"electrode, wanted at most {MAX_ANGLE_DEGREES:.0f}: are positions metres in head coordinates?"
        )
    return {name: names[i] for name, i in zip(eeg, cosine.argmax(axis=1), strict=True)}


@functools.cache
def _ten_ten_positions(montage_name: str) -> tuple[list[str], np.ndarray]:
    """The 10-10 names of one of MNE's montages and their positions [n, 3] in metres, head coordinates."""
    import mne

    montage = mne.channels.make_standard_montage(montage_name)
    info = mne.create_info(montage.ch_names, 1.0, "eeg").set_montage(montage)
    place = {channel["ch_name"].upper(): channel["loc"][:3] for channel in info["chs"]}
    names = [name for name in _TEN_TEN_NAMES if name in place]
    return names, np.array([place[name] for name in names])


def _sphere_centre(points: np.ndarray) -> np.ndarray:
    """Centre [3] of the least-squares sphere through points [n, 3]: |p|² = 2 p·c + (r² − |c|²)."""
    system = np.column_stack([2 * points, np.ones(len(points))])
    solution, *_ = np.linalg.lstsq(system, (points**2).sum(axis=1), rcond=None)
    return solution[:3]


def _directions(points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    offset = points - centre
    return offset / np.linalg.norm(offset, axis=1, keepdims=True)


def _has_position(position: np.ndarray) -> bool:
    # MNE writes NaN where it knows nothing; some file formats write zeros.
    return bool(np.isfinite(position).all() and np.any(position))
