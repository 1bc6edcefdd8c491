"""One recording from its files to its shards and its manifest, `parts/<id>.json`.

The manifest is written last, and names by checksum what went in and what came out: a recording whose
manifest still holds need not be prepared again.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from zoo.data.recipes import Recipe
from zoo.data.recording import StoredRecording
from zoo.data.store import FORMAT, file_sha256, write_json, write_shards
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.data.readers import Source
    from zoo.data.signals import Processed


@dataclass(frozen=True)
class Outcome:
    """One recording's end: its manifest, or the reason there is none."""

    id: str
    manifest: dict[str, Any] | None = None
    reused: bool = False
    reason: str = ""
    fatal: bool = False  # the reason is not the file's


def prepare_recording(source: Source, files: list[Path], out: Path, recipe: Recipe) -> Outcome:
    """One recording from file to manifest, in a worker."""
    from zoo.data.readers import read
    from zoo.data.signals import cut, process

    manifest_file = out / "parts" / f"{source.id}.json"
    try:
        hashes = {file.name: file_sha256(file) for file in files}
    except OSError as error:
        return Outcome(source.id, reason=f"{error.filename}: cannot be read: {error.strerror}")
    key = sha256(json.dumps([FORMAT, source.variable, hashes, recipe.to_json()]).encode()).hexdigest()
    kept = kept_manifest(manifest_file, key, out)
    if kept:
        return Outcome(source.id, kept, reused=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            processed = process(read(source), recipe, source.path.name)
        cuts, lost = cut(processed, recipe)
        warned = dict.fromkeys(" ".join(str(warning.message).split()) for warning in caught)
        if not cuts:
            raise ZooError(f"{source.path.name}: no record is left of it: {'; '.join(lost)}")
    except ZooError as error:
        return Outcome(source.id, reason=str(error))
    try:
        manifest = {
            "key": key,
            "files": hashes,
            "notes": [*warned, *processed.notes, *lost],
            "rejected": len(lost),
            "dropped_channels": processed.dropped_channels,
            **_write(source, out, processed, cuts),
        }
        write_json(manifest_file, manifest)
    except ZooError as error:
        return Outcome(source.id, reason=str(error), fatal=True)
    return Outcome(source.id, manifest)


def _write(source: Source, out: Path, processed: Processed, cuts: list[tuple[int, int, int]]) -> dict[str, Any]:
    """Writes the shards of one recording; returns its part of the index, as plain values."""
    crc: list[int] = []

    def records() -> Iterator[npt.NDArray[Any]]:
        for start, size, _ in cuts:
            record = np.ascontiguousarray(processed.signal[:, start : start + size])
            crc.append(zlib.crc32(record.data))
            yield record

    shards = write_shards(out, source.id, records())
    recording = StoredRecording(
        id=source.id,
        subject=source.subject,
        session=source.session,
        run=source.run,
        task=source.task,
        montage=0,
        n_samples=processed.signal.shape[1],
        bads=processed.bads,
        events=processed.events,
    )
    start, length, label = (list(column) for column in zip(*cuts, strict=True))
    return {
        "recording": recording.to_json(),
        "montage": processed.montage.to_json(),
        "rate_hz": processed.rate_hz,
        "shards": [asdict(shard) for shard in shards],
        "records": {"start": start, "length": length, "label": label, "crc": crc},
    }


def index_of(manifests: Sequence[Mapping[str, Any]]) -> dict[str, npt.NDArray[Any]]:
    """One row per record: recordings in order, and by time within each.

    A manifest tells of one recording: its "shards", and its "records" as columns start, length, label, crc and, where
    it is known by then, split; else split is −1.
    """
    columns: dict[str, list[int]] = {name: [] for name in ("recording", "shard", "position")}
    shards = 0
    for number, manifest in enumerate(manifests):
        columns["recording"] += [number] * len(manifest["records"]["start"])
        for shard in manifest["shards"]:
            columns["shard"] += [shards] * shard["records"]
            columns["position"] += range(shard["records"])
            shards += 1
    for name in manifests[0]["records"]:
        columns[name] = [value for manifest in manifests for value in manifest["records"][name]]
    index: dict[str, npt.NDArray[Any]] = {
        name: np.array(values, np.uint32 if name == "crc" else np.int64) for name, values in columns.items()
    }
    return {"split": np.full(len(index["start"]), -1, np.int64), **index}


def kept_manifest(file: Path, key: str, out: Path) -> dict[str, Any] | None:
    """The manifest of an earlier run, when it was made of the same input and its shards are there."""
    if not file.exists():
        return None
    try:
        manifest = json.loads(file.read_text())
    except ValueError:  # a power cut can leave an empty file behind
        return None
    if manifest["key"] != key:
        return None
    for shard in manifest["shards"]:
        written = out / shard["file"]
        if not written.exists() or file_sha256(written) != shard["sha256"]:
            return None
    return manifest


def source_files(sources: Sequence[Source]) -> dict[str, list[Path]]:
    """The files each recording is read from, as far as names tell: of the same stem, and BIDS sidecars.

    Keys are the recordings' ids. A recording that is a folder (CTF, EGI) is all files in it.
    """
    listings: dict[Path, dict[str, list[Path]]] = {}
    files = {}
    for source in sources:
        folder = source.path.parent
        if source.path.is_dir():
            files[source.id] = sorted(file for file in source.path.rglob("*") if file.is_file())
            continue
        if folder not in listings:
            listings[folder] = _listing(folder)
        subject = source.path.name.split("_")[0]
        keys = (_stem(source.path), f"{subject} sidecars")
        found = {file for key in keys for file in listings[folder].get(key, ())}
        found.update(file for file in (source.parcellation, source.mask) if file)
        files[source.id] = sorted(found)
    return files


def _listing(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder by stem, and BIDS sidecars by subject."""
    listing: dict[str, list[Path]] = {}
    for file in folder.iterdir():
        if file.is_file():
            listing.setdefault(_stem(file), []).append(file)
            if file.name.startswith("sub-") and file.suffix in (".tsv", ".json"):
                listing.setdefault(f"{file.name.split('_')[0]} sidecars", []).append(file)
    return listing


def _stem(file: Path) -> str:
    return file.name.split(".")[0]
