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
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest, sha256
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from zoo.data.recording import PADDING, Montage, StoredRecording
from zoo.data.remote import Place, ShardCache, file_sizes, locate
from zoo.data.shards import Shards
from zoo.errors import ZooError
from zoo.sensors import KINDS, NAME_INDEX

FORMAT = 1
SHARD_BYTES = 1 << 28


class Records:
    """Records of recordings in shards, with the index that says what they are: a folder of files.

    FILE     JSON that makes the folder a finished one
    MAKER    command that writes it

    path        the folder, which may be on an object store
    rate_hz     sampling rate of the recordings
    recipe      the recipe they were prepared with, as plain values
    recordings  one `StoredRecording` each
    montages    the different sets of channels among them
    classes     label names of event windows, empty for what is continuous
    people      names of all people, sorted
    person      [recordings] int64 array: index of each recording's person in `people`
    splits      the default split: name -> record indices
    n_channels  most channels of any recording
    n_shards, n_bytes
                how many files there are, and their size
    recording, start, length, label, split
                [records] int64 arrays: recording index, first sample in it, samples, index into `classes`
                or −1, index into the names of `splits` or −1

    Safe to share between threads and to pickle.
    """

    FILE: ClassVar[str]
    MAKER: ClassVar[str]

    def __init__(
        self,
        path: Place,
        plain: Mapping[str, Any],
        index: Mapping[str, npt.NDArray[Any]],
        shard_cache: ShardCache | None = None,
    ) -> None:
        self.path = path
        self.rate_hz = float(plain["rate_hz"])
        self.recipe: dict[str, Any] = plain["recipe"]
        self.classes: tuple[str, ...] = tuple(plain["classes"])
        self.recordings = tuple(StoredRecording.from_json(each) for each in plain["recordings"])
        self.montages = tuple(Montage.from_json(each) for each in plain["montages"])
        self.people = tuple(sorted({recording.subject for recording in self.recordings}))
        number = {person: i for i, person in enumerate(self.people)}
        self.person = np.array([number[recording.subject] for recording in self.recordings], np.int64)
        self.n_channels = max(len(montage.names) for montage in self.montages)
        self.recording, self.start, self.length, self.label = (
            index[field].astype(np.int64) for field in ("recording", "start", "length", "label")
        )
        self.split = index["split"]
        self.splits = {name: np.flatnonzero(self.split == code) for code, name in enumerate(plain["split"]["names"])}
        self.n_shards, self.n_bytes = len(plain["shards"]), sum(shard["size"] for shard in plain["shards"])
        self._shards = Shards(path, plain["shards"], index, self._record_bytes(plain), self.MAKER, shard_cache)
        # Records come recording by recording, and by start within one: a slice of the index each.
        self._first = np.searchsorted(self.recording, np.arange(len(self.recordings) + 1))

    @classmethod
    def read_json(cls, path: Place) -> dict[str, Any]:
        """`FILE` of a finished folder; ZooError when there is none or it is of another format."""
        file = path / cls.FILE
        if isinstance(path, Path) and not path.is_dir():
            raise ZooError(f"{path}: no such folder; wanted a dataset made by {cls.MAKER}")
        if isinstance(file, Path) and not file.exists():
            raise ZooError(f"{path}: no {cls.FILE} in it: not a dataset, or {cls.MAKER} has not finished")
        try:
            plain = json.loads(_read_bytes(file))
        except ValueError as error:
            raise ZooError(f"{file}: not valid JSON: {error}") from error
        if plain.get("format") != FORMAT:
            raise ZooError(f"{file}: format {plain.get('format')}, wanted {FORMAT}; run {cls.MAKER} again")
        return plain

    @classmethod
    def read_index(cls, path: Place, plain: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
        """`index.npz`, after its checksum and the sizes of the shards."""
        packed = _read_bytes(path / "index.npz")
        if sha256(packed).hexdigest() != plain["index_sha256"]:
            raise ZooError(f"{path / 'index.npz'}: its checksum is not the one in {cls.FILE}; run {cls.MAKER} again")
        sizes = file_sizes(path / "shards")
        for shard in plain["shards"]:
            _check_size(path / shard["file"], sizes, shard["size"], cls.MAKER)
        with np.load(BytesIO(packed)) as index:
            return dict(index)

    def _record_bytes(self, plain: Mapping[str, Any]) -> npt.NDArray[np.int64]:
        """Bytes of each record as it is stored, [records]."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.recording)

    def packed(self, i: int) -> bytes:
        """Record i as it is stored; ZooError naming the shard when it cannot be read or its checksum does not match."""
        return self._shards.read(i)

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


class Dataset(Records):
    """A prepared dataset, opened for reading."""

    FILE = "dataset.json"
    MAKER = "zoo prepare"

    def __init__(
        self,
        path: Place,
        plain: Mapping[str, Any],
        index: Mapping[str, npt.NDArray[Any]],
        shard_cache: ShardCache | None = None,
        cache_bytes: int = 0,
    ) -> None:
        super().__init__(path, plain, index, shard_cache)
        self._cache_bytes = cache_bytes
        self._dtype = np.dtype(self.recipe["dtype"])
        self._forget()

    @classmethod
    def open(cls, path: str | Place, cache_bytes: int = 0, shard_cache: ShardCache | None = None) -> Dataset:
        """The dataset in folder `path`; ZooError when it is missing, unfinished or damaged.

        The records read last are kept in memory, up to `cache_bytes`: training cuts each several times an epoch. `path`
        may be an address on an object store, `gs://…` or any other that fsspec knows: then records are read by their
        byte ranges, or with a `shard_cache` whole shards are copied to it, which has to have room for all of them.
        """
        path = locate(path)
        plain = cls.read_json(path)
        dataset = cls(path, plain, cls.read_index(path, plain), shard_cache, cache_bytes)
        if shard_cache is not None and not isinstance(path, Path) and dataset.n_bytes > shard_cache.limit:
            raise ZooError(
                f"{path}: {dataset.n_bytes / 1e9:.3g} GB of shards, data.shard_gigabytes is "
                f"{shard_cache.limit / 1e9:.3g}; wanted at least as much, or 0 to read records by byte range"
            )
        return dataset

    def _record_bytes(self, plain: Mapping[str, Any]) -> npt.NDArray[np.int64]:
        channels = np.array([len(self.montages[each.montage].names) for each in self.recordings])
        return channels[self.recording] * self.length * np.dtype(self.recipe["dtype"]).itemsize

    def __getitem__(self, i: int) -> npt.NDArray[np.float32]:
        """Record i, [C, T] float32, to be read only; ZooError naming the shard when its checksum does not match."""
        with self._lock:
            if i in self._cache:
                self._cache.move_to_end(i)
                return self._cache[i]
        signal = np.frombuffer(self.packed(i), self._dtype).reshape(-1, self.length[i]).astype(np.float32, copy=False)
        if signal.nbytes <= self._cache_bytes:
            with self._lock:
                self._cache[i] = signal
                # Records are about equal in size, so counting them is counting bytes.
                while len(self._cache) * signal.nbytes > self._cache_bytes:
                    self._cache.popitem(last=False)
        return signal

    def record_at(self, recording: int, sample: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The last record of a recording that starts at `sample` or before; −1 when none does. Of any shape."""
        first, last = self._first[recording], self._first[recording + 1]
        i = np.searchsorted(self.start[first:last], sample, side="right") - 1
        return np.where(i < 0, -1, first + i)

    def read(self, recording: int, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Samples start … stop of a recording, [C, stop − start] float32, stitched from its records.

        ZooError when a part of it is not stored: beyond the ends, between event windows, or in a rejected
        record.
        """
        signal: npt.NDArray[np.float32] | None = None
        at = start
        while at < stop or signal is None:
            i = int(self.record_at(recording, at))
            if i < 0 or at >= self.start[i] + self.length[i]:
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

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, npt.NDArray[np.float32]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {field: value for field, value in self.__dict__.items() if field not in ("_lock", "_cache")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _read_bytes(file: Place) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ZooError(f"{file}: cannot be read: {error.strerror}") from error


def _check_size(file: Place, sizes: Mapping[str, int | None], size: int, maker: str) -> None:
    name = str(file).rpartition("/")[2]
    if name not in sizes:
        raise ZooError(f"{file}: missing; run {maker} again")
    if sizes[name] not in (size, None):
        raise ZooError(f"{file}: {sizes[name]} bytes, wanted {size}: truncated or overwritten")


def write_records(folder: Path, file: str, plain: dict[str, Any], index: Mapping[str, npt.NDArray[Any]]) -> None:
    """Finishes a folder of records: `index.npz`, then the JSON `file`, with the checksum of the index put into it."""
    packed = BytesIO()
    np.savez(packed, **index)  # type: ignore[arg-type]
    plain["index_sha256"] = sha256(packed.getvalue()).hexdigest()
    write_file(folder / "index.npz", packed.getvalue())
    write_json(folder / file, plain)


def claim(out: Path, mark: str, plain: Mapping[str, Any], maker: str, what: str) -> None:
    """Makes `out` the folder of what `plain` says, in the JSON file `mark`; ZooError when it is another's.

    maker   the command that writes there
    what    of which `plain` is the description
    """
    file = out / mark
    if file.exists():
        try:
            before = json.loads(file.read_text())
        except ValueError as error:
            raise ZooError(f"{file}: not valid JSON: {error}") from error
        if before != plain:
            fields = [field for field in plain if before.get(field) != plain[field]]
            raise ZooError(
                f"{out}: {what} ({before.get('name')!r}; they differ in {', '.join(fields)}); choose another folder"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ZooError(f"{out}: exists and is not a folder of {maker}; choose another")
    for folder in (out / "shards", out / "parts"):
        with disk_errors(out):
            folder.mkdir(parents=True, exist_ok=True)
    write_json(file, plain)


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
