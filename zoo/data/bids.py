"""BIDS: names, folders and the tables beside a recording (Gorgolewski et al. 2016 and its extensions)."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError

if TYPE_CHECKING:
    import mne

_RECORDINGS = {
    "eeg": (".edf", ".bdf", ".vhdr", ".set"),
    "ieeg": (".edf", ".vhdr", ".set", ".mefd", ".nwb"),
    "meg": (".fif", ".ds", ".con", ".sqd"),
    "func": (".nii", ".nii.gz", ".dtseries.nii", ".ptseries.nii", ".func.gii"),
}
_SUFFIX = {"func": "bold"}  # elsewhere a recording's suffix is the name of its folder

_ELECTRODE_KINDS = ("eeg", "seeg", "ecog", "dbs")


def is_root(folder: Path) -> bool:
    """Whether `folder` is a BIDS dataset."""
    return (folder / "dataset_description.json").is_file()


def recordings(root: Path) -> list[Path]:
    """EEG, iEEG, MEG and BOLD recordings of a dataset, but for empty rooms and later parts of split files."""
    return [path for path in sorted(root.glob("sub-*/**/*")) if is_recording(path)]


def is_recording(path: Path) -> bool:
    """Whether a path inside a dataset is one of its recordings, by its name and folder."""
    datatype = path.parent.name
    return (
        datatype in _RECORDINGS
        and path.name.lower().endswith(_RECORDINGS[datatype])
        and f"_{_SUFFIX.get(datatype, datatype)}." in path.name
        and not path.name.startswith("sub-emptyroom")
        and not re.search(r"_split-0*([2-9]|[1-9]\d+)_", path.name)
    )


def labels(path: Path) -> dict[str, str]:
    """Values of sub, ses, run and task in a file's name, "" where it has none.

    Folders may give sub and ses instead: sub-01/ses-2, or subjects/NAME.
    """
    found = {key: _entity(path.name, key) for key in ("sub", "ses", "run", "task")}
    folders = path.parts[:-1]
    for key in ("sub", "ses"):
        found[key] = found[key] or next(filter(None, (_entity(name, key) for name in reversed(folders))), "")
    if not found["sub"] and "subjects" in folders[:-1]:
        found["sub"] = folders[folders.index("subjects") + 1]
    return found


def read(path: Path) -> mne.io.BaseRaw:
    """The recording with its events, electrodes, channel kinds, bad channels and subject, through mne-bids.

    Raises ZooError when channels.tsv lacks a channel of the file, or electrodes.tsv has some but not all
    electrodes.
    """
    import mne_bids

    bids_path = mne_bids.get_bids_path_from_fname(path, check=False)
    raw = mne_bids.read_raw_bids(bids_path, verbose="WARNING")
    kinds = dict(zip(raw.ch_names, raw.get_channel_types(), strict=True))
    channels = _names(bids_path, "channels")
    unlisted = [name for name in kinds if channels and name not in channels]
    if unlisted:
        raise ZooError(f"{path.name}: channel {unlisted[0]!r} ({len(unlisted)} in all) is missing in channels.tsv")
    placed = _names(bids_path, "electrodes")
    wanted = [name for name, kind in kinds.items() if kind in _ELECTRODE_KINDS]
    missing = [name for name in wanted if name not in placed]
    if placed and missing and len(missing) < len(wanted):
        raise ZooError(f"{path.name}: electrode {missing[0]!r} ({len(missing)} in all) is missing in electrodes.tsv")
    return raw


def _entity(name: str, key: str) -> str:
    match = re.search(rf"(?:^|_){key}-([A-Za-z0-9]+)", name)
    return match[1] if match else ""


def _names(bids_path: Any, suffix: str) -> set[str]:
    """The names in the channels or electrodes table of a recording; none where there is no table."""
    file = bids_path.find_matching_sidecar(suffix=suffix, extension=".tsv", on_error="ignore")
    if file is None:
        return set()
    with open(file, encoding="utf-8-sig", newline="") as table:
        return {row["name"] for row in csv.DictReader(table, delimiter="\t")}
