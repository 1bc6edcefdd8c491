"""Reading records out of a dataset's shards, wherever they are."""

from __future__ import annotations

import resource
import threading
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zoo.data.remote import Place, Remote, ShardCache, record_ranges, without_headers
from zoo.errors import ZooError

OPEN_SHARDS = max(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 3)
"""Shards that all datasets together keep open: fewer than the files a process may open, and a big one has more."""

_alive: weakref.WeakSet[Shards] = weakref.WeakSet()


class Shards:
    """The shards of a dataset.

    folder  the dataset's
    shards  `zoo.data.store.Shard` of each file, as plain values
    index   `shard`, `position` and `crc` of each record, [records]
    size    [records] int64, bytes of each record
    maker   the command that writes such a dataset
    cache   where shards of an object store are copied to; without one, their records are read by byte range

    Safe to share between threads and to pickle.
    """

    def __init__(
        self,
        folder: Place,
        shards: Sequence[Mapping[str, Any]],
        index: Mapping[str, npt.NDArray[Any]],
        size: npt.NDArray[np.int64],
        maker: str,
        cache: ShardCache | None,
    ) -> None:
        self._folder, self._shards, self._maker, self._cache = folder, shards, maker, cache
        self._shard, self._position, self._crc, self._size = index["shard"], index["position"], index["crc"], size
        self._forget_what_is_open()

    def read(self, i: int) -> bytes:
        """Record i as it is stored; ZooError naming the shard when it cannot be read or its checksum does not match."""
        number, position = int(self._shard[i]), int(self._position[i])
        shard = self._folder / self._shards[number]["file"]
        if isinstance(shard, Remote) and self._cache is None:
            start, stop = (int(each[i]) for each in self._ranges)
            packed = without_headers(shard.read_bytes(start, stop), start)
        else:
            try:
                packed = self._open(number, shard).read([position])[0]
            except (RuntimeError, IndexError) as error:
                raise ZooError(f"{shard}: record {position} cannot be read: {error}") from error
        if zlib.crc32(packed) != self._crc[i]:
            raise ZooError(
                f"{shard}: record {position} is damaged: its checksum is not the one in the index; "
                f"delete the file and run {self._maker} again"
            )
        return packed

    @cached_property
    def _ranges(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return record_ranges(self._shard, self._position, self._size)

    def _open(self, number: int, shard: Place) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            if number in self._readers:
                self._readers.move_to_end(number)
                return self._readers[number]
        # Outside the lock: a copy may take a while. Two threads may both open a file; one of them is kept.
        reader = ArrayRecordReader(str(self._local(number, shard)), options="readahead_buffer_size:0,max_parallelism:0")
        if not reader.ok():
            raise ZooError(f"{shard}: not a whole ArrayRecord file: truncated or overwritten")
        with self._lock:
            self._readers[number] = reader
            while len(self._readers) > max(1, OPEN_SHARDS // len(_alive)):
                self._readers.popitem(last=False)
        return reader

    def _local(self, number: int, shard: Place) -> Path:
        if isinstance(shard, Path):
            return shard
        assert self._cache is not None
        about = self._shards[number]
        return self._cache.get(shard, about["size"], about["sha256"])

    def _forget_what_is_open(self) -> None:
        self._lock = threading.Lock()
        self._readers: OrderedDict[int, Any] = OrderedDict()
        _alive.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {field: value for field, value in self.__dict__.items() if field not in ("_lock", "_readers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_what_is_open()
