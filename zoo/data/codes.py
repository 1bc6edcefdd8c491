"""Code shards on disk: `codes.json`, `index.npz`, `tokenizer.npz` and `shards/*.arrayrecord`.

One record is one window of one recording: its codes, and behind them what the tokenizer needs beside codes to give the
signal its units back. Codes are stored plus one, so that 0 is a token that is not there, in the smallest unsigned type
that holds them. The folder holds the tokenizer's variables, and so all that decoding takes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from zoo.data.remote import Place, locate
from zoo.data.store import Dataset, Records, write_file, write_shards
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.types import Sensors

Window = tuple[npt.NDArray[np.int32], Sequence[npt.NDArray[np.float32]]]
"""Codes [N, Q], −1 for none, and the leaves of the tokenizer's scale."""


class CodeDataset(Records):
    """Codes of a dataset's recordings, opened for reading. Its records are windows of one length.

    tokenizer   name, options and dtype of the tokenizer, as `zoo.objectives.train_tokenizer.TrainTokenizer` takes them
    run, step   where its variables were trained; "" and None for one that was fitted to the dataset
    window      samples of each record
    hop         samples of a frame
    margin      samples at both ends of a record that the tokenizer read besides
    code_sizes  codes of each of the Q codebooks
    grids       (rows, frames) of a record of each recording: N = rows · frames
    measures    what was measured when they were made
    """

    FILE = "codes.json"
    MAKER = "zoo tokenize"

    def __init__(self, path: Place, plain: Mapping[str, Any], index: Mapping[str, npt.NDArray[Any]]) -> None:
        self.code_sizes: tuple[int, ...] = tuple(plain["code_sizes"])
        self.grids: tuple[tuple[int, int], ...] = tuple((rows, frames) for rows, frames in plain["grids"])
        self._scales: list[list[list[int]]] = plain["scales"]
        self._dtype = stored_dtype(self.code_sizes)
        super().__init__(path, plain, index)
        self.plain = plain
        self.tokenizer: dict[str, Any] = plain["tokenizer"] | {"options": _hashable(plain["tokenizer"]["options"])}
        self.run: str = plain["request"]["run"]
        self.step: int | None = plain["request"]["step"]
        self.window: int = plain["request"]["window"]
        self.margin: int = plain["request"]["margin"]
        self.hop: float = plain["hop"]
        self.measures: dict[str, Any] = plain.get("measures", {})

    @classmethod
    def open(cls, path: str | Place) -> CodeDataset:
        """The codes in folder `path`, or at that address; ZooError when they are missing, unfinished or damaged."""
        path = locate(path)
        plain = cls.read_json(path)
        return cls(path, plain, cls.read_index(path, plain))

    def _record_bytes(self, plain: Mapping[str, Any]) -> npt.NDArray[np.int64]:
        codes = np.prod(self.grids, axis=1, dtype=np.int64) * len(self.code_sizes) * np.dtype(self._dtype).itemsize
        scales = [4 * sum(int(np.prod(leaf)) for leaf in leaves) for leaves in self._scales]
        return (codes + np.array(scales, np.int64))[self.recording]

    def __getitem__(self, i: int) -> npt.NDArray[np.int32]:
        """Codes [N, Q] of record i, −1 for none; ZooError naming the shard when its checksum does not match."""
        return self.read(i)[0]

    def read(self, i: int) -> Window:
        """Codes [N, Q] of record i, and the leaves of its scale."""
        recording = self.recording[i]
        shape = (int(np.prod(self.grids[recording])), len(self.code_sizes))
        packed = self.packed(i)
        codes = np.frombuffer(packed, self._dtype, count=int(np.prod(shape)))
        leaves, at = [], codes.nbytes
        for each in self._scales[recording]:
            leaf = np.frombuffer(packed, np.float32, count=int(np.prod(each)), offset=at).reshape(each)
            leaves.append(leaf)
            at += leaf.nbytes
        return codes.reshape(shape).astype(np.int32) - 1, leaves

    def of_recording(self, recording: int) -> range:
        """The records of a recording, in order of time."""
        return range(self._first[recording], self._first[recording + 1])

    def follows(self, i: int) -> bool:
        """Whether record i begins where the one before it ends, in the same recording."""
        return (
            0 < i < len(self)
            and bool(self.recording[i] == self.recording[i - 1])
            and bool(self.start[i] == self.start[i - 1] + self.window)
        )

    def variables(self) -> dict[str, npt.NDArray[Any]]:
        """The tokenizer's variables by path; ZooError when their checksum does not match."""
        file = self.path / "tokenizer.npz"
        try:
            packed = file.read_bytes()
        except OSError as error:
            raise ZooError(f"{file}: cannot be read: {error.strerror}") from error
        if sha256(packed).hexdigest() != self.plain["tokenizer_sha256"]:
            raise ZooError(f"{file}: its checksum is not the one in {self.FILE}; run {self.MAKER} again")
        with np.load(BytesIO(packed)) as arrays:
            return dict(arrays)


def _hashable(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they were before JSON made lists of tuples."""

    def back(value: Any) -> Any:
        return tuple(back(each) for each in value) if isinstance(value, list) else value

    return {name: back(value) for name, value in options.items()}


def sensors_of(records: Records, recording: int, batch: int) -> Sensors:
    """The sensors of a recording, `batch` times."""
    from zoo.types import Sensors

    fields = records.sensors(recording)
    return Sensors(**{name: np.broadcast_to(value, (batch, *value.shape)) for name, value in fields.items()})


def stored_dtype(code_sizes: Sequence[int]) -> npt.DTypeLike:
    """The smallest unsigned type for codes plus one."""
    return np.min_scalar_type(max(code_sizes))


def write_codes(
    out: Path, stem: str, windows: Iterable[Window], code_sizes: Sequence[int]
) -> tuple[list[dict[str, Any]], list[int]]:
    """Writes the windows of one recording, all or none; returns its shards and the checksum of each record."""
    crc: list[int] = []

    def records() -> Iterator[npt.NDArray[np.uint8]]:
        for codes, leaves in windows:
            parts = [(codes + 1).astype(stored_dtype(code_sizes)), *(np.asarray(leaf, np.float32) for leaf in leaves)]
            record = np.frombuffer(b"".join(part.tobytes() for part in parts), np.uint8)
            crc.append(zlib.crc32(record.data))
            yield record

    return [asdict(shard) for shard in write_shards(out, stem, records())], crc


def write_variables(out: Path, variables: Mapping[str, npt.NDArray[Any]]) -> str:
    """Writes `tokenizer.npz`; returns its sha256."""
    packed = BytesIO()
    np.savez(packed, **variables)  # type: ignore[arg-type]
    write_file(out / "tokenizer.npz", packed.getvalue())
    return sha256(packed.getvalue()).hexdigest()


@dataclass(frozen=True)
class Cut:
    """A recording cut into windows side by side: first samples, split and label of each, and the samples left over."""

    start: list[int]
    split: list[int]
    label: list[int]
    left_over: int


def cut(dataset: Dataset, recording: int, window: int, margin: int = 0) -> Cut:
    """Cuts every stretch of a recording that is stored without a gap and in one part of the split, from its start.

    `margin` samples are left at both ends of a stretch. Windows of events are stretches of their own.
    """
    stretches: list[list[int]] = []  # first sample, last (exclusive), split, label
    for i in np.flatnonzero(dataset.recording == recording):
        begin, end = int(dataset.start[i]), int(dataset.start[i] + dataset.length[i])
        joins = stretches and not dataset.classes and stretches[-1][1:3] == [begin, dataset.split[i]]
        if joins:
            stretches[-1][1] = end
        else:
            stretches.append([begin, end, int(dataset.split[i]), int(dataset.label[i])])
    found = Cut([], [], [], 0)
    used = 0
    for begin, end, split, label in stretches:
        starts = list(range(begin + margin, end - margin - window + 1, window))
        found.start.extend(starts)
        found.split.extend([split] * len(starts))
        found.label.extend([label] * len(starts))
        used += len(starts) * window
    stored = sum(end - begin for begin, end, _, _ in stretches)
    return Cut(found.start, found.split, found.label, stored - used)
