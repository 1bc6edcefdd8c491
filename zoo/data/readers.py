"""Recordings of any format: `discover` finds them, `read` opens one.

Formats: whatever `mne.io.read_raw` opens (EDF, BDF, GDF, BrainVision, EEGLAB, FIF, CTF, …); BIDS folders
with their events, electrodes, channels and participants tables, through mne-bids; NIfTI, MGH, GIFTI and
CIFTI, through nibabel (`zoo.data.volumes`); .mat and .npz matrices (`zoo.data.matrices`). A file that lacks
what its format cannot say has it in a sidecar (`zoo.data.series`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.data import bids, electrodes, matrices, series, volumes
from zoo.data.quiet import reader_warnings
from zoo.errors import ZooError

if TYPE_CHECKING:
    import mne


@dataclass(frozen=True)
class Source:
    """One recording to be read.

    id                   unique within what was discovered, and file-name safe
    subject … task       "" when unknown
    format               "bids", "mne", "nifti", "surface", "cifti" or "matrix"
    variable             .mat and .npz: which array of the file
    parcellation, mask   fMRI: files that make regions, or pick voxels
    """

    path: Path
    id: str
    subject: str
    session: str
    run: str
    task: str
    format: str
    variable: str = ""
    parcellation: Path | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class Reading:
    """One recording, in memory.

    raw    MNE recording: V, T, T/m, or arbitrary units for roi, vertex and voxel (whose MNE type is "misc");
           positions in info; annotations are the events; info["bads"] the bad channels
    kinds  one a channel of raw: one of `zoo.sensors.KINDS`, or an MNE type such as "eog", "stim", "misc"
    """

    raw: mne.io.BaseRaw
    kinds: tuple[str, ...]


_FORMATS = {
    "cifti": (".dtseries.nii", ".ptseries.nii"),
    "nifti": (".nii", ".nii.gz"),
    "surface": (".func.gii", ".gii", ".mgh", ".mgz"),
    "matrix": (".mat", ".npz"),
}

# What a folder is searched for: endings that mean a recording and nothing else. `mne.io.read_raw` opens
# more when given the file itself.
_EEG_ENDINGS = (".edf", ".bdf", ".gdf", ".vhdr", ".ahdr", ".set", ".cnt", ".mff", ".nxe", ".lay", ".cdt")
_MEG_ENDINGS = (".fif", ".fif.gz", ".ds", ".sqd", ".con")
_OTHER_ENDINGS = (".nedf", ".mefd", ".ns3")
_MNE_ENDINGS = _EEG_ENDINGS + _MEG_ENDINGS + _OTHER_ENDINGS
_FOLDER_FORMATS = (".ds", ".mff", ".mefd")  # recordings that are folders themselves

# FIF files that hold no recording, and the later parts of one that was split.
_NOT_RAW_FIF = re.compile(
    r"[-_](epo|ave|evoked|cov|fwd|inv|ica|src|bem|sol|eve|proj|trans|tfr|psd|annot|[1-9]\d*)\.fif(\.gz)?$"
    r"|_split-0*([2-9]|[1-9]\d+)[_.]"
)

_PHYSIOLOGY = re.compile(r"(EOG|ECG|EKG|EMG|^RESP\b|^TEMP\b)", re.IGNORECASE)
_PHYSIOLOGY_KINDS = {"EKG": "ecg", "TEMP": "temperature"}  # the others are called what MNE calls them


def discover(source: str | Path, *, parcellation: Path | None = None, mask: Path | None = None) -> list[Source]:
    """The recordings of a file, a BIDS folder (it has a dataset_description.json) or any other folder.

    A BIDS folder gives its EEG, iEEG and MEG recordings and its `_bold` series, volumes only where a
    parcellation or mask is given; empty-room recordings, which hold no brain, and derivatives, which have a
    BIDS folder of their own, are left out. Another folder gives every file of a known format below it: FIF
    files by their names, NIfTI and MGH files with a time axis, .mat and .npz files that have a sidecar.
    People, sessions, runs and tasks are read from names (sub-01_task-rest) and folders subjects/NAME.

    parcellation, mask  fMRI: see `zoo.data.volumes`.

    Raises ZooError when there is no such path, nothing to read in it, or two files differ in ending only.
    """
    source = Path(source)
    if not source.exists():
        raise ZooError(f"{source}: no such file or folder")
    if source.is_file() or _ending(source, _FOLDER_FORMATS):
        paths, root = [source], source.parent
    elif bids.is_root(source):
        paths, root = bids.recordings(source), source
        if parcellation is None and mask is None:
            paths = [path for path in paths if _format(path) != "nifti"]
    else:
        paths, root = [p for p in sorted(source.rglob("*")) if _is_recording(p)], source
    found = [
        replace(each, parcellation=parcellation, mask=mask) if each.format in ("nifti", "surface", "cifti") else each
        for path in paths
        for each in _sources(path)
    ]
    if not found:
        raise ZooError(f"{source}: holds no recording of a known format (volumes want a parcellation or mask)")
    if len({each.id for each in found}) < len(found):
        # File names repeat across folders: name by the whole path below the folder instead.
        found = [replace(each, id=f"{_safe(each.path.parent.relative_to(root))}_{each.id}") for each in found]
    known: dict[str, Source] = {}
    for each in found:
        if each.id in known:
            raise ZooError(f"{known[each.id].path} and {each.path.name}: two recordings of one name: rename one")
        known[each.id] = each
    return found


def read(source: Source) -> Reading:
    """One recording with its sensors, events and bad channels, loaded into memory.

    A stim channel becomes events (annotations named by its values) where the file has no events of its own.
    Outside BIDS, a channel that the format calls EEG and its name EOG, ECG, EMG, Resp or Temp is what its
    name says. EEG channels with 10-20 names and no positions get those of MNE's template head.

    Raises ZooError, naming the file and the cause: unreadable or truncated, no samples, repeated channel
    names, events beyond the end, electrodes or channels that a BIDS table lacks. (NaN samples:
    `zoo.data.signals`.)
    """
    try:
        with reader_warnings(source.path.name):
            raw, kinds = _open(source)
            raw.load_data(verbose="ERROR")
    except ZooError:
        raise
    except Exception as error:  # thirty readers raise as many kinds of error
        raise ZooError(f"{source.path.name}: cannot be read as {source.format}: {error}") from error
    if raw.n_times == 0:
        raise ZooError(f"{source.path.name}: holds no samples")
    electrodes.attach_template_positions(raw)
    return Reading(raw, kinds)


def _sources(path: Path) -> list[Source]:
    """The recordings in one file; several where a .mat or .npz file holds several."""
    labels = bids.labels(path)
    kind = _format(path)
    if kind == "mne" and bids.is_recording(path) and any(map(bids.is_root, path.parents)):
        kind = "bids"
    sidecar = series.read_sidecar(path)
    one = Source(path, _safe(_stem(path)), sidecar.subject or labels["sub"], labels["ses"], labels["run"],
                 labels["task"], kind)  # fmt: skip
    if kind != "matrix":
        return [one]
    names = matrices.variables(path, sidecar.variable)
    if len(names) == 1:
        return [replace(one, variable=names[0])]
    number = [f"{i + 1:02d}" for i in range(len(names))]
    each = [replace(one, variable=name, id=f"{one.id}_{n}") for name, n in zip(names, number, strict=True)]
    if sidecar.series == "subject":
        return [replace(source, subject=n) for source, n in zip(each, number, strict=True)]
    return [replace(source, run=n) for source, n in zip(each, number, strict=True)]


def _open(source: Source) -> tuple[mne.io.BaseRaw, tuple[str, ...]]:
    import mne

    if source.format in ("bids", "mne"):
        check_edf_length(source.path)
        if source.format == "bids":
            raw = bids.read(source.path)
        else:
            raw = mne.io.read_raw(source.path, verbose="WARNING")
            _set_physiology_kinds(raw)
        _annotate_triggers(raw)
        return raw, tuple(raw.get_channel_types())
    sidecar = series.read_sidecar(source.path)
    if source.format == "nifti":
        content = volumes.read_nifti(source.path, source.parcellation, source.mask)
    elif source.format == "surface":
        content = volumes.read_surface(source.path, source.parcellation)
    elif source.format == "cifti":
        content = volumes.read_cifti(source.path, source.parcellation)
    elif source.format == "matrix":
        content = matrices.read_matrix(source.path, source.variable, sidecar)
    else:
        raise ZooError(f"{source.path.name}: unknown format {source.format!r}")
    return series.to_raw(source.path, content, sidecar), content.kinds


def check_edf_length(path: Path) -> None:
    """Raises ZooError when an EDF or BDF file is shorter than its header says; MNE only warns."""
    if path.suffix.lower() not in (".edf", ".bdf"):
        return
    with path.open("rb") as file:
        fixed = file.read(256)
        try:
            header, records, signals = int(fixed[184:192]), int(fixed[236:244]), int(fixed[252:256])
            fields = file.read(256 * signals)
            samples = sum(int(fields[signals * 216 + 8 * i :][:8]) for i in range(signals))
        except ValueError as error:
            raise ZooError(f"{path.name}: not a valid EDF header: {error}") from error
    wanted = header + records * samples * (3 if fixed[0] == 0xFF else 2)
    size = path.stat().st_size
    if size < wanted:  # a record count of −1, a recording never closed, wants nothing
        raise ZooError(f"{path.name}: truncated: {size} bytes, wanted {wanted} for {records} data records")


def _set_physiology_kinds(raw: mne.io.BaseRaw) -> None:
    """Kinds of channels that a format without channel types calls EEG and whose name says otherwise."""
    eeg = [name for name, kind in zip(raw.ch_names, raw.get_channel_types(), strict=True) if kind == "eeg"]
    said = {name: match[1].upper() for name in eeg if (match := _PHYSIOLOGY.search(name))}
    raw.set_channel_types({n: _PHYSIOLOGY_KINDS.get(word, word.lower()) for n, word in said.items()}, verbose="ERROR")


def _annotate_triggers(raw: mne.io.BaseRaw) -> None:
    """Events of the stim channels as annotations, where there are none."""
    import mne

    if len(raw.annotations) or "stim" not in raw.get_channel_types():
        return
    events = mne.find_events(raw, shortest_event=1, verbose="ERROR")
    if len(events):
        names = {int(value): str(value) for value in events[:, 2]}
        raw.set_annotations(
            mne.annotations_from_events(events, raw.info["sfreq"], names, raw.first_samp, verbose="ERROR")
        )


def _is_recording(path: Path) -> bool:
    if any(_ending(parent, _FOLDER_FORMATS) for parent in path.parents):
        return False
    if _ending(path, (".fif", ".fif.gz")):
        return _NOT_RAW_FIF.search(path.name) is None
    if _ending(path, (*_MNE_ENDINGS, *_FORMATS["cifti"], ".func.gii")):
        return True
    if _ending(path, _FORMATS["matrix"]):
        return series.sidecar_path(path).is_file()
    return _ending(path, (".nii", ".nii.gz", ".mgh", ".mgz")) and volumes.has_time(path)


def _format(path: Path) -> str:
    return next((kind for kind, endings in _FORMATS.items() if _ending(path, endings)), "mne")


def _ending(path: Path, endings: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(endings)


def _stem(path: Path) -> str:
    endings = (*_MNE_ENDINGS, *(ending for group in _FORMATS.values() for ending in group))
    ending = max((e for e in endings if path.name.lower().endswith(e)), key=len, default=path.suffix)
    return path.name[: len(path.name) - len(ending)]


def _safe(name: str | Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", str(name)).strip("._") or "recording"
