"""A dataset on an object store reads as one on the disk does, and says in one line what went wrong."""

from __future__ import annotations

import errno
import multiprocessing
import pickle
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from fsspec import AbstractFileSystem

from zoo.data import remote
from zoo.data.loader import Loader
from zoo.data.remote import Remote, ShardCache, locate, record_ranges, without_headers
from zoo.data.shards import Shards
from zoo.data.store import Dataset
from zoo.errors import ZooError


class Bucket(AbstractFileSystem):
    """An object store in memory that counts what it is asked for, and fails as it is told to."""

    protocol = "bucket"
    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[Counter[str]] = Counter()
    faults: ClassVar[dict[str, list[Any]]] = {}
    """Name of a file → what its next requests meet: an exception, or the share of the bytes that come."""
    sent = 0

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        return [{"name": name, "size": len(self.files[name])} for name in self.files if name.startswith(f"{path}/")]

    def cat_file(self, path: str, version: str = "", start: int | None = None, end: int | None = None) -> bytes:
        assert isinstance(version, str)  # S3's store has the version of a file in the place of `start`
        name = path.rpartition("/")[2]
        Bucket.asked[name] += 1
        fault = self.faults[name].pop(0) if self.faults.get(name) else 1.0
        if isinstance(fault, Exception):
            raise fault
        if path not in self.files:
            raise FileNotFoundError(path)
        content = self.files[path][start:end]
        content = content[: int(len(content) * fault)]
        Bucket.sent += len(content)
        return content

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return BytesIO(self.cat_file(path))


@pytest.fixture
def bucket(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a copy of `prepared`."""
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    Bucket.files.clear()
    for file in prepared.rglob("*"):
        if file.is_file():
            Bucket.files[f"top/{file.relative_to(prepared)}"] = file.read_bytes()
    Bucket.asked.clear()
    Bucket.faults.clear()
    Bucket.sent = 0
    monkeypatch.setattr(remote, "WAIT_SECONDS", 0.0)
    return "bucket://top"


def shard_of(dataset: Dataset, i: int) -> str:
    return Path(dataset._shards._shards[dataset._shards._shard[i]]["file"]).name


def test_records_by_byte_range_are_those_on_the_disk(bucket: str, dataset: Dataset) -> None:
    found = Dataset.open(bucket + "/")
    assert str(found.path) == bucket
    assert Bucket.asked == {"dataset.json": 1, "index.npz": 1}  # no shard is opened to open the dataset
    for i in range(len(dataset)):
        np.testing.assert_array_equal(found[i], dataset[i])
    whole = sum(dataset[i].nbytes for i in range(len(dataset)))
    described = sum(len((dataset.path / name).read_bytes()) for name in ("dataset.json", "index.npz"))
    assert 0 <= Bucket.sent - whole - described <= 24 * len(dataset)  # records, and headers of blocks within them
    copy = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(copy[3], dataset[3])


def test_batches_are_those_of_the_disk(bucket: str, dataset: Dataset) -> None:
    def batches(source: Dataset) -> Any:
        return Loader(source, np.arange(len(source)), window=100, batch_size=4, seed=0, threads=2).at(3)

    for one, other in islice(zip(batches(Dataset.open(bucket)), batches(dataset), strict=True), 5):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_rows_of_a_batch_are_read_at_a_time(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"window": 100, "batch_size": 8, "seed": 0, "threads": 0}
    one = next(Loader(dataset, np.arange(len(dataset)), **options).at(0))
    four, read = threading.Barrier(4, timeout=20), Shards.read
    monkeypatch.setattr(Shards, "read", lambda shards, i: (four.wait(), read(shards, i))[1])
    other = next(Loader(dataset, np.arange(len(dataset)), **options, readers=4).at(0))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_ranges_follow_from_sizes(tmp_path: Path) -> None:
    """Of two files of ArrayRecord's own, with records that begin, end and lie across borders of blocks."""
    rng = np.random.default_rng(0)
    edges = [65536 - 64 - 40 - 5, 1, 127, 128, 16383, 16384, 70000, 65536, 131072, 300000, 65512, 65512 - 45, 2]
    sizes = np.array([*edges, *rng.integers(1, 200_000, 40)], np.int64)
    shard = np.repeat([0, 1], [20, len(sizes) - 20])
    position = np.concatenate([np.arange(20), np.arange(len(sizes) - 20)])
    records = [rng.bytes(int(size)) for size in sizes]
    for number in range(2):
        writer = ArrayRecordWriter(str(tmp_path / str(number)), "group_size:1,uncompressed")
        for i in np.flatnonzero(shard == number):
            writer.write(records[i])
        writer.close()
    order = rng.permutation(len(sizes))
    for i, start, stop in zip(order, *record_ranges(shard[order], position[order], sizes[order]), strict=True):
        content = (tmp_path / str(shard[i])).read_bytes()[start:stop]
        assert without_headers(content, int(start)) == records[i]


def test_whole_shards_are_copied_once(bucket: str, dataset: Dataset, tmp_path: Path) -> None:
    for _ in range(2):
        cache = ShardCache(tmp_path / "cache", 10**9)
        found = Dataset.open(bucket, shard_cache=cache)
        with ThreadPoolExecutor(4) as pool:
            for i, record in enumerate(pool.map(found.__getitem__, range(len(dataset)))):
                np.testing.assert_array_equal(record, dataset[i])
    asked = {name: count for name, count in Bucket.asked.items() if name.endswith("arrayrecord")}
    assert len(asked) == 6
    assert set(asked.values()) == {1}
    assert sum(file.suffix == ".arrayrecord" for file in (tmp_path / "cache").iterdir()) == 6


def test_copies_used_longest_ago_make_room(bucket: str, dataset: Dataset, tmp_path: Path) -> None:
    sizes = {file.name: file.stat().st_size for file in (dataset.path / "shards").iterdir()}
    total = sum(sizes.values())
    with pytest.raises(ZooError, match=r"bucket://top: \S+ GB of shards, data.shard_gigabytes is .* wanted at least"):
        Dataset.open(bucket, shard_cache=ShardCache(tmp_path, total - 1))
    tight = Dataset.open(bucket, shard_cache=(cache := ShardCache(tmp_path, total)))
    for i in range(len(dataset)):
        tight[i]
    other = Remote(bucket) / "other"
    Bucket.files["top/other"] = content = bytes(min(sizes.values()))
    for i in range(len(dataset)):  # the first shard is used again, so the second has waited longest
        if shard_of(dataset, i) == shard_of(dataset, 0):
            Dataset.open(bucket, shard_cache=cache)[i]
    cache.get(other, len(content), sha256(content).hexdigest())
    held = {file.name for file in tmp_path.glob("*.arrayrecord")}
    assert sum((tmp_path / name).stat().st_size for name in held) <= total
    digests = [shard["sha256"] for shard in tight._shards._shards]
    assert f"{digests[0]}.arrayrecord" in held
    assert f"{digests[1]}.arrayrecord" not in held
    for i in range(len(dataset)):  # readers that are open outlive the copies
        np.testing.assert_array_equal(tight[i], dataset[i])


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([FileNotFoundError("gone")], r"{shard}: no such file or folder"),
        ([PermissionError("403 of the bucket\n  nested")], r"{shard}: no permission .*403 of the bucket nested"),
        ([0.5] * 3, r"{shard}: cannot be read, 3 times: ConnectionError: \d+ bytes came, wanted \d+"),
        ([OSError(errno.ECONNRESET, "reset")] * 3, r"{shard}: cannot be read, 3 times: .*reset"),
    ],
)
def test_a_fault_is_one_line_and_leaves_nothing(
    bucket: str, tmp_path: Path, cached: bool, faults: list[Any], message: str
) -> None:
    found = Dataset.open(bucket, shard_cache=ShardCache(tmp_path, 10**9) if cached else None)
    name = shard_of(found, 0)
    Bucket.faults[name] = list(faults)
    with pytest.raises(ZooError, match=message.format(shard=name)) as raised:
        found[0]
    assert "\n" not in str(raised.value)
    assert not [file for file in tmp_path.iterdir() if file.is_file()]
    assert np.isfinite(found[0]).all()  # the fault has passed


@pytest.mark.parametrize("cached", [False, True])
def test_what_passes_is_tried_again(bucket: str, dataset: Dataset, tmp_path: Path, cached: bool) -> None:
    found = Dataset.open(bucket, shard_cache=ShardCache(tmp_path, 10**9) if cached else None)
    Bucket.faults[shard_of(found, 0)] = [0.9, TimeoutError("slow")]
    np.testing.assert_array_equal(found[0], dataset[0])


def test_a_full_disk_is_said(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    found = Dataset.open(bucket, shard_cache=ShardCache(tmp_path, 10**9))
    monkeypatch.setattr(remote.os, "replace", full)
    with pytest.raises(ZooError, match="cannot be written: the disk is full"):
        found[0]
    assert not [file for file in tmp_path.iterdir() if file.is_file()]


def test_other_bytes_than_the_indexed_ones_are_found(bucket: str, tmp_path: Path) -> None:
    file = f"top/shards/{shard_of(Dataset.open(bucket), 0)}"
    whole = Bucket.files[file]
    Bucket.files[file] = whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]
    with pytest.raises(ZooError, match="record 0 is damaged: its checksum"):
        Dataset.open(bucket)[0]
    with pytest.raises(ZooError, match="or others than those of its checksum"):
        Dataset.open(bucket, shard_cache=ShardCache(tmp_path, 10**9))[0]
    Bucket.files[file] = whole[:-1]
    with pytest.raises(ZooError, match=r"arrayrecord: \d+ bytes, wanted \d+: truncated"):
        Dataset.open(bucket)
    del Bucket.files[file]
    with pytest.raises(ZooError, match="arrayrecord: missing"):
        Dataset.open(bucket)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("bucket://top/absent", "bucket://top/absent/dataset.json: no such file or folder"),
        (
            "nonsense://x",
            "nonsense://x/dataset.json: cannot be read, 3 times: ValueError: Protocol not known: nonsense",
        ),
        ("abfs://x/y", "a package is missing that reads such addresses: ImportError: Install adlfs"),
        (Path("gs://bucket/x"), "gs:/bucket/x: wanted two slashes"),
    ],
)
def test_bad_addresses(bucket: str, address: str | Path, message: str) -> None:
    with pytest.raises(ZooError, match=message):
        Dataset.open(address)


def test_a_local_folder_has_an_address_too(prepared: Path, dataset: Dataset) -> None:
    found = Dataset.open(f"file://{prepared}")
    np.testing.assert_array_equal(found[5], dataset[5])
    assert locate("relative/folder") == Path("relative/folder")


def _read(folder: str, cache: Path, shares: Any) -> None:
    found = Dataset.open(f"file://{folder}", shard_cache=ShardCache(cache, 10**9))
    shares.put([found[i].sum() for i in range(len(found))])


@pytest.mark.slow  # three processes that import everything
def test_processes_of_a_host_share_the_copies(prepared: Path, dataset: Dataset, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    shares = spawn.Queue()
    workers = [spawn.Process(target=_read, args=(str(prepared), tmp_path / "cache", shares)) for _ in range(3)]
    for worker in workers:
        worker.start()
    wanted = [dataset[i].sum() for i in range(len(dataset))]
    for _ in workers:
        assert shares.get(timeout=60) == wanted
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    kept = [file for file in (tmp_path / "cache").iterdir() if file.is_file()]
    assert sorted(file.stat().st_size for file in kept) == sorted(
        file.stat().st_size for file in (prepared / "shards").iterdir()
    )


def test_what_a_killed_process_left_makes_room(bucket: str, dataset: Dataset, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, sum(file.stat().st_size for file in (dataset.path / "shards").iterdir()))
    (tmp_path / ("ab" * 32 + ".tmp")).write_bytes(bytes(100))
    np.testing.assert_array_equal(Dataset.open(bucket, shard_cache=cache)[0], dataset[0])
    assert not list(tmp_path.glob("*.tmp"))
