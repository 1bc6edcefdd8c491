"""Prepared datasets on object stores: `gs://…`, `s3://…`, or any other address that fsspec knows.

ArrayRecord opens local files, and `gs://` only with the credentials of its own client. So a record is read from an
object store by the byte range that it has in its shard (`record_ranges`), or whole shards are copied to the local disk
first (`ShardCache`) and read there.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from zoo.errors import ZooError

ATTEMPTS = 3
"""Times that a request is made before its failure counts."""
WAIT_SECONDS = 0.5
"""Before the second attempt; twice as long before each further one."""

BLOCK, BLOCK_HEADER, CHUNK_HEADER = 1 << 16, 24, 40
"""Bytes of Riegeli's blocks, of the header each block begins with, and of the header each chunk begins with."""

T = TypeVar("T")


@dataclass(frozen=True)
class Remote:
    """A file or folder on an object store, with what a dataset needs of `pathlib.Path`.

    address   `protocol://…`, without a slash at its end
    """

    address: str

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.address}/{name}")

    def read_bytes(self, start: int | None = None, stop: int | None = None) -> bytes:
        """The file's bytes, or those from `start` to `stop`. Raises ZooError when they cannot be had."""

        def read() -> bytes:
            files, path = self._files()
            content: bytes = files.cat_file(path, start=start, end=stop)
            if start is not None and stop is not None and len(content) != stop - start:
                raise ConnectionError(f"{len(content)} bytes came, wanted {stop - start}")
            return content

        return self._tried(read)

    def copy_to(self, file: Path, size: int, digest: str) -> None:
        """Copies the file to the local `file`; ZooError when it has not `size` bytes of the sha256 `digest`."""

        from zoo.data.store import disk_errors

        def copy() -> None:
            files, path = self._files()
            hashed, done = sha256(), 0
            with files.open(path, "rb") as source, file.open("wb") as target:
                while part := source.read(1 << 22):
                    with disk_errors(file.parent):
                        target.write(part)
                    hashed.update(part)
                    done += len(part)
            if done != size or hashed.hexdigest() != digest:
                raise ConnectionError(f"{done} bytes came, wanted {size}, or others than those of its checksum")

        self._tried(copy)

    def sizes(self) -> dict[str, int | None]:
        """Names of the files in this folder, and their bytes where the store tells."""

        def listed() -> dict[str, int | None]:
            files, path = self._files()
            files.invalidate_cache(path)  # what this process saw before
            return {each["name"].rsplit("/", 1)[-1]: each.get("size") for each in files.ls(path, detail=True)}

        return self._tried(listed)

    def _files(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        return url_to_fs(self.address)

    def _tried(self, request: Callable[[], T]) -> T:
        """What a request gives, made again when it fails for a reason that may pass."""
        for attempt in range(ATTEMPTS):
            try:
                return request()
            except ZooError:
                raise
            except FileNotFoundError as error:
                raise ZooError(f"{self}: no such file or folder") from error
            except PermissionError as error:
                raise ZooError(f"{self}: no permission to read it: {_line(error)}") from error
            except ImportError as error:
                raise ZooError(f"{self}: a package is missing that reads such addresses: {_line(error)}") from error
            except Exception as error:  # each store's package has its own
                if attempt == ATTEMPTS - 1:
                    raise ZooError(f"{self}: cannot be read, {ATTEMPTS} times: {_line(error)}") from error
                time.sleep(WAIT_SECONDS * 2**attempt)
        raise AssertionError


Place = Path | Remote


def locate(path: str | Path | Remote) -> Place:
    """A local path, or an address on an object store. Raises ZooError for an address that went through `Path`."""
    if isinstance(path, Remote):
        return path
    if isinstance(path, str) and "://" in path:
        return Remote(path.rstrip("/"))
    if re.match(r"[a-z][a-z0-9+]+:/", str(path)):
        raise ZooError(f"{path}: wanted two slashes; Path takes one of them, so give an address as a string")
    return Path(path)


def file_sizes(folder: Place) -> dict[str, int | None]:
    """Names of the files in a folder, and their bytes where the store tells; empty when there is no such folder."""
    if isinstance(folder, Remote):
        return folder.sizes()
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries}


def record_ranges(
    shard: npt.NDArray[Any], position: npt.NDArray[Any], size: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First byte of each record in its shard, and the byte behind its last, both [records] int64.

    shard     [records] index of the file
    position  [records] place in the file, from 0
    size      [records] bytes of each record

    Shards have one uncompressed record a chunk, so that places follow from sizes (Riegeli's "records file format"): a
    file is cut into blocks of 64 KiB that begin with a header of 24 bytes, wherever a record then is; behind these
    headers lie chunks: first one of a header alone, then for each record a header of 40 bytes, a byte that says that
    nothing is compressed, the number of bytes of the size, the size as a varint, and the record.
    """
    order = np.lexsort((position, shard))
    varint = 1 + sum((size >= 1 << bits).astype(np.int64) for bits in (7, 14, 21, 28, 35))
    chunk = (CHUNK_HEADER + 2 + varint + size)[order]
    end = np.cumsum(chunk)
    first = np.flatnonzero(np.diff(shard[order], prepend=-1))
    before = np.repeat((end - chunk)[first], np.diff([*first, len(order)]))
    stop = np.empty_like(end)
    stop[order] = CHUNK_HEADER + end - before
    return _behind_headers(stop - size), _behind_headers(stop - 1) + 1


def without_headers(content: bytes, start: int) -> bytes:
    """The record in the bytes of a shard from `start` on: what is left without the headers of blocks."""
    parts, at = [], 0
    border = -start % BLOCK
    while border < len(content):
        parts.append(content[at:border])
        at = border + BLOCK_HEADER
        border += BLOCK
    return b"".join([*parts, content[at:]])


def _behind_headers(place: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where in a file a byte is, from where it is among those that are not in headers of blocks."""
    return place + BLOCK_HEADER * (place // (BLOCK - BLOCK_HEADER) + 1)


class ShardCache:
    """Copies of shards on the local disk, shared by the processes of a host.

    folder   where they are
    limit    bytes they may take; those used longest ago make room for new ones

    A copy appears whole or not at all. One that made room stays readable to those that have it open.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def get(self, shard: Remote, size: int, digest: str) -> Path:
        """The copy of a shard of `size` bytes and sha256 `digest`, made now if it is not there.

        Raises ZooError when the shard cannot be read or is another one, and when the disk cannot be written.
        """
        from zoo.data.store import disk_errors

        copy = self.folder / f"{digest}.arrayrecord"
        temporary = copy.with_suffix(".tmp")
        with disk_errors(self.folder):
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            with self._locked(digest):
                if copy.exists() and copy.stat().st_size == size:
                    os.utime(copy)
                    return copy
                try:
                    self._make_room(temporary, size)
                    shard.copy_to(temporary, size, digest)
                    os.replace(temporary, copy)
                finally:
                    temporary.unlink(missing_ok=True)
        return copy

    def _make_room(self, new: Path, size: int) -> None:
        """Removes the copies used longest ago until `size` bytes are within the limit too, and takes them for `new`."""
        with self._locked("room"):
            # Who had begun these has ended: whoever writes one holds its lock.
            for file in self.folder.glob("*.tmp"):
                with self._locked(file.stem, wait=False) as free:
                    if free:
                        file.unlink(missing_ok=True)
            held = sorted((file.stat().st_mtime_ns, file) for file in self.folder.glob("*.arrayrecord"))
            taken = sum(file.stat().st_size for file in self.folder.glob("*.*"))
            for _, file in held:
                if taken + size <= self.limit:
                    break
                taken -= file.stat().st_size
                file.unlink()
            with new.open("wb") as reserved:
                reserved.truncate(size)

    @contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Holds a lock among the threads and processes of this host; False where it is taken and not waited for.

        Shards whose names begin alike share one, so that there are not more than a few hundred.
        """
        with (self.folder / "locks" / (name if name == "room" else name[:2])).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True


def _line(error: Exception) -> str:
    """What an error says, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
