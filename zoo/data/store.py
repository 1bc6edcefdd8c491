"""A prepared dataset on disk: `dataset.json`, `index.npz` and `shards/*.arrayrecord`.

One record is one stretch [C, T] of one recording: float32 or float16, channel-major, without a header; the
index holds where it lies, what it is and its checksum. A record is read alone (group size 1) and is not
compressed: EEG in float32 shrinks by 7 % under zstd and then reads four times slower.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest, sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zoo.errors import ZooError
from zoo.sensors import KINDS, NAME_INDEX

FORMAT = 1
SHARD_BYTES = 1 << 28
OPEN_SHARDS = 256
"""Shards a dataset keeps open; a big one has more files than a process may open."""


@dataclass(frozen=True)
class Event:
    """Something that happened: onset and duration in samples of the prepared signal."""

    onset: int
    duration: int
    label: str


@dataclass(frozen=True)
class Montage:
    """The channels of a recording.

    names        as in the file
    canonical    entries of `zoo.sensors.NAMES`, "" where a channel has none
    kinds        entries of `zoo.sensors.KINDS`
    position     [C, 3] float32, metres, head coordinates; NaN when unknown
    orientation  [C, 3] float32, unit vector of the sensor's axis; NaN where the kind has none
    """

    names: tuple[str, ...]
    canonical: tuple[str, ...]
    kinds: tuple[str, ...]
    position: npt.NDArray[np.float32]
    orientation: npt.NDArray[np.float32]

    def to_json(self) -> dict[str, Any]:
        """Plain values; unknown positions are null, since JSON has no NaN."""
        return {
            "names": list(self.names),
            "canonical": list(self.canonical),
            "kinds": list(self.kinds),
            "position": _vectors_to_json(self.position),
            "orientation": _vectors_to_json(self.orientation),
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Montage:
        return cls(
            names=tuple(plain["names"]),
            canonical=tuple(plain["canonical"]),
            kinds=tuple(plain["kinds"]),
            position=_vectors_from_json(plain["position"]),
            orientation=_vectors_from_json(plain["orientation"]),
        )


@dataclass(frozen=True)
class StoredRecording:
    """One recording; `montage` is an index into `Dataset.montages`, `n_samples` the whole length."""

    id: str
    subject: str
    session: str
    run: str
    task: str
    montage: int
    n_samples: int
    bads: tuple[str, ...]
    events: tuple[Event, ...]

    def to_json(self) -> dict[str, Any]:
        plain = {field: getattr(self, field) for field in ("id", "subject", "session", "run", "task")}
        events = [[event.onset, event.duration, event.label] for event in self.events]
        return plain | {
            "montage": self.montage,
            "n_samples": self.n_samples,
            "bads": list(self.bads),
            "events": events,
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> StoredRecording:
        events = tuple(Event(*event) for event in plain["events"])
        return cls(**{**plain, "bads": tuple(plain["bads"]), "events": events})


def _vectors_to_json(vectors: npt.NDArray[np.float32]) -> list[list[float] | None]:
    return [None if np.isnan(vector).any() else [float(x) for x in vector] for vector in vectors]


def _vectors_from_json(plain: Sequence[list[float] | None]) -> npt.NDArray[np.float32]:
    unknown = [np.nan] * 3
    return np.array([unknown if vector is None else vector for vector in plain], np.float32).reshape(-1, 3)


PADDING: Mapping[str, Any] = {"position": np.nan, "orientation": np.nan, "kind": 0, "name": -1, "valid": False}
"""Fields of `zoo.types.Sensors` for a channel that is not there."""


class Dataset:
    """A prepared dataset, opened for reading; safe to share between threads and to pickle.

    path        the folder
    rate_hz     sampling rate of every record
    recipe      the recipe it was prepared with, as plain values
    recordings  one `StoredRecording` each
    montages    the different sets of channels among them
    classes     label names of a dataset of event windows, empty for a continuous one
    splits      the default split: name -> record indices
    n_channels  most channels of any recording
    recording, start, length, label
                [records] int64 arrays: recording index, first sample in it, samples, index into `classes`
                or −1
    """

    def __init__(
        self, path: Path, plain: Mapping[str, Any], index: Mapping[str, npt.NDArray[Any]], cache_bytes: int = 0
    ) -> None:
        self.path = path
        self._cache_bytes = cache_bytes
        self.rate_hz = float(plain["rate_hz"])
        self.recipe: dict[str, Any] = plain["recipe"]
        self.classes: tuple[str, ...] = tuple(plain["classes"])
        self.recordings = tuple(StoredRecording.from_json(each) for each in plain["recordings"])
        self.montages = tuple(Montage.from_json(each) for each in plain["montages"])
        self.n_channels = max(len(montage.names) for montage in self.montages)
        self.recording, self.start, self.length, self.label = (
            index[field].astype(np.int64) for field in ("recording", "start", "length", "label")
        )
        self.splits = {
            name: np.flatnonzero(index["split"] == code) for code, name in enumerate(plain["split"]["names"])
        }
        self._shards: tuple[str, ...] = tuple(shard["file"] for shard in plain["shards"])
        self._shard, self._position, self._crc = index["shard"], index["position"], index["crc"]
        self._dtype = np.dtype(self.recipe["dtype"])
        # Records come recording by recording, and by start within one: a slice of the index each.
        self._first = np.searchsorted(self.recording, np.arange(len(self.recordings) + 1))
        self._forget_what_is_open()

    @classmethod
    def open(cls, path: str | Path, cache_bytes: int = 0) -> Dataset:
        """The dataset in folder `path`; ZooError when it is missing, unfinished or damaged.

        The records read last are kept in memory, up to `cache_bytes`: training cuts each several times an epoch.
        """
        path = Path(path)
        plain = read_dataset_json(path)
        packed = _read_bytes(path / "index.npz")
        if sha256(packed).hexdigest() != plain["index_sha256"]:
            raise ZooError(f"{path / 'index.npz'}: its checksum is not the one in dataset.json; run zoo prepare again")
        with np.load(BytesIO(packed)) as index:
            arrays = dict(index)
        for shard in plain["shards"]:
            _check_size(path / shard["file"], shard["size"])
        return cls(path, plain, arrays, cache_bytes)

    def __len__(self) -> int:
        return len(self.recording)

    def __getitem__(self, i: int) -> npt.NDArray[np.float32]:
        """Record i, [C, T] float32, to be read only; ZooError naming the shard when its checksum does not match."""
        with self._lock:
            if i in self._cache:
                self._cache.move_to_end(i)
                return self._cache[i]
        signal = self._read(i)
        if signal.nbytes <= self._cache_bytes:
            with self._lock:
                self._cache[i] = signal
                # Records are about equal in size, so counting them is counting bytes.
                while len(self._cache) * signal.nbytes > self._cache_bytes:
                    self._cache.popitem(last=False)
        return signal

    def _read(self, i: int) -> npt.NDArray[np.float32]:
        shard = self.path / self._shards[self._shard[i]]
        try:
            packed = self._open(shard).read([int(self._position[i])])[0]
        except (RuntimeError, IndexError) as error:
            raise ZooError(f"{shard}: record {self._position[i]} cannot be read: {error}") from error
        if zlib.crc32(packed) != self._crc[i]:
            raise ZooError(
                f"{shard}: record {self._position[i]} is damaged: its checksum is not the one in the index; "
                "delete the file and run zoo prepare again"
            )
        signal = np.frombuffer(packed, self._dtype).reshape(-1, self.length[i])
        return signal.astype(np.float32, copy=False)

    def read(self, recording: int, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Samples start … stop of a recording, [C, stop − start] float32, stitched from its records.

        ZooError when a part of it is not stored: beyond the ends, between event windows, or in a rejected
        record.
        """
        first, last = self._first[recording], self._first[recording + 1]
        starts = self.start[first:last]
        signal: npt.NDArray[np.float32] | None = None
        at = start
        while at < stop or signal is None:
            i = first + np.searchsorted(starts, at, side="right") - 1
            if i < first or at >= self.start[i] + self.length[i]:
                raise ZooError(
                    f"{self.path}: samples {start} to {stop} of {self.recordings[recording].id} are not all "
                    f"stored ({at} is not; the recording has {self.recordings[recording].n_samples})"
                )
            record = self[i][:, at - self.start[i] : stop - self.start[i]]
            if signal is None:
                signal = np.empty((len(record), stop - start), np.float32)
            signal[:, at - start : at - start + record.shape[1]] = record
            at += record.shape[1]
        return signal

    def sensors(self, recording: int) -> dict[str, npt.NDArray[Any]]:
        """The fields of `zoo.types.Sensors` for one recording, without the batch axis."""
        stored = self.recordings[recording]
        montage = self.montages[stored.montage]
        return {
            "position": montage.position,
            "orientation": montage.orientation,
            "kind": np.array([KINDS.index(kind) for kind in montage.kinds], np.int32),
            "name": np.array([NAME_INDEX.get(name, -1) for name in montage.canonical], np.int32),
            "valid": ~np.isin(montage.names, stored.bads),
        }

    def sensor_tables(self) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.int64]]:
        """The sensors of each distinct (montage, bad channels), and which of them each recording has.

        The first are the fields of `zoo.types.Sensors` [tables, n_channels, …], smaller montages padded
        with `valid` False; the second is [recordings] int64.
        """
        rows: dict[tuple[int, tuple[str, ...]], int] = {}
        tables: list[dict[str, npt.NDArray[Any]]] = []
        row_of = []
        for number, recording in enumerate(self.recordings):
            key = (recording.montage, recording.bads)
            if key not in rows:
                rows[key] = len(tables)
                tables.append(self.sensors(number))
            row_of.append(rows[key])
        stacked = {}
        for field, fill in PADDING.items():
            first = tables[0][field]
            stacked[field] = np.full((len(tables), self.n_channels, *first.shape[1:]), fill, first.dtype)
            for padded, table in zip(stacked[field], tables, strict=True):
                padded[: len(table[field])] = table[field]
        return stacked, np.array(row_of)

    def _open(self, shard: Path) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            if shard in self._readers:
                self._readers.move_to_end(shard)
                return self._readers[shard]
            reader = ArrayRecordReader(str(shard), options="readahead_buffer_size:0,max_parallelism:0")
            if not reader.ok():
                raise ZooError(f"{shard}: not a whole ArrayRecord file: truncated or overwritten")
            self._readers[shard] = reader
            if len(self._readers) > OPEN_SHARDS:
                self._readers.popitem(last=False)
            return reader

    def _forget_what_is_open(self) -> None:
        self._lock = threading.Lock()
        self._readers: OrderedDict[Path, Any] = OrderedDict()
        self._cache: OrderedDict[int, npt.NDArray[np.float32]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {field: value for field, value in self.__dict__.items() if field not in ("_lock", "_readers", "_cache")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_what_is_open()


def read_dataset_json(path: Path) -> dict[str, Any]:
    """`dataset.json` of a finished dataset; ZooError when there is none or it is of another format."""
    file = path / "dataset.json"
    if not path.is_dir():
        raise ZooError(f"{path}: no such folder; wanted a dataset made by zoo prepare")
    if not file.exists():
        raise ZooError(f"{path}: no dataset.json in it: not a dataset, or zoo prepare has not finished")
    try:
        plain = json.loads(_read_bytes(file))
    except ValueError as error:
        raise ZooError(f"{file}: not valid JSON: {error}") from error
    if plain.get("format") != FORMAT:
        raise ZooError(f"{file}: format {plain.get('format')}, wanted {FORMAT}; run zoo prepare again")
    return plain


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ZooError(f"{file}: cannot be read: {error.strerror}") from error


def _check_size(file: Path, size: int) -> None:
    if not file.exists():
        raise ZooError(f"{file}: missing; run zoo prepare again")
    if file.stat().st_size != size:
        raise ZooError(f"{file}: {file.stat().st_size} bytes, wanted {size}: truncated or overwritten")


@dataclass(frozen=True)
class Shard:
    """A written shard: file name relative to the dataset, bytes, sha256 of the file, records in it."""

    file: str
    size: int
    sha256: str
    records: int


def write_shards(folder: Path, stem: str, records: Iterator[npt.NDArray[Any]]) -> list[Shard]:
    """Writes `shards/<stem>-NNN.arrayrecord` in `folder`, about `SHARD_BYTES` each; all of them or none."""
    written: list[Path] = []
    counts: list[int] = []
    try:
        with disk_errors(folder):
            record = next(records, None)
            while record is not None:
                written.append(folder / "shards" / f"{stem}-{len(written):03}.arrayrecord.tmp")
                counts.append(0)
                with _shard_writer(written[-1]) as writer:
                    size = 0
                    while record is not None and (not size or size + record.nbytes <= SHARD_BYTES):
                        writer.write(record.tobytes())
                        size += record.nbytes
                        counts[-1] += 1
                        record = next(records, None)
            shards = []
            for temporary, count in zip(written, counts, strict=True):
                final = temporary.with_suffix("")
                shards.append(Shard(f"shards/{final.name}", temporary.stat().st_size, file_sha256(temporary), count))
                os.replace(temporary, final)
            return shards
    except BaseException:
        for temporary in written:
            temporary.unlink(missing_ok=True)
            temporary.with_suffix("").unlink(missing_ok=True)
        raise


@contextmanager
def _shard_writer(file: Path) -> Iterator[Any]:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(file), "group_size:1,uncompressed")
    try:
        yield writer
    finally:
        writer.close()  # writes happen in the background; their errors come up here


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a failure to write below `folder` into a ZooError that says why."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise ZooError(f"{folder}: cannot be written: {reason}") from error
    except RuntimeError as error:  # ArrayRecord's way of saying the same
        reason = "the disk is full" if os.strerror(errno.ENOSPC) in str(error) else str(error)
        raise ZooError(f"{folder}: cannot be written: {reason}") from error


def write_file(file: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    with disk_errors(file.parent):
        try:
            temporary.write_bytes(content)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(file: Path, plain: Mapping[str, Any]) -> None:
    """Writes plain values as JSON, whole or not at all."""
    write_file(file, (json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def file_sha256(file: Path) -> str:
    """sha256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()
