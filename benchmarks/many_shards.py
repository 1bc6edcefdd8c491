"""A dataset of many shards: what it takes to open, and how fast windows come from it. See `benchmarks/loader.py`.

Every sample says where it is, so that windows are checked against their place and not against another way of reading
them; and an epoch is checked to take every window of every record once. Only then is a speed printed.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import resource
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import mne
import numpy as np
import numpy.typing as npt

from zoo.data.loader import Loader
from zoo.data.mixture import MixedLoader, Mixture
from zoo.data.prepare import prepare
from zoo.data.recipes import Recipe
from zoo.data.store import Dataset, write_records, write_shards
from zoo.errors import ZooError

CHANNELS, RATE_HZ, RECORDS, SAMPLES = 16, 100, 8, 2000
"""A shard: 8 records of 16 channels and 20 s at 100 Hz, one megabyte."""
WINDOW, BATCH = 500, 64
STEPS, ROUNDS = 30, 3
"""Batches timed in a go, and goes of each case; the cases take turns."""


def measure(shards: int, threads: Sequence[int], out: Path | None) -> None:
    """Makes the dataset, checks what comes out of it, times it, and prints a table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "many"
        make(path, shards)
        opened = time_opening(path)
        check_epoch(Dataset.open(path))
        cases = list(itertools.product(threads, ("from shards", "by byte range", "mixed 7:3"), (True, False)))
        rounds = [[time_reading(path, how, cold, number) for number, how, cold in cases] for _ in range(ROUNDS)]
        rows = [
            {**each[0], "windows_per_second": statistics.median(one["windows_per_second"] for one in each)}
            for each in zip(*rounds, strict=True)
        ]
    show(shards, opened, rows)
    if out:
        out.write_text(json.dumps({"shards": shards, "opening": opened, "reading": rows}, indent=1) + "\n")


def sample(recording: int, start: int, size: int) -> npt.NDArray[np.float32]:
    """What is stored: [CHANNELS, size], a whole number that says recording, channel and time."""
    time_, channel = np.arange(start, start + size), np.arange(CHANNELS)[:, None]
    return ((1009 * recording + 97 * channel + time_) % 65521).astype(np.float32)


def make(path: Path, shards: int) -> None:
    """A prepared dataset of `shards` recordings, and two of 7 and 3 tenths of them beside it."""
    info = mne.create_info([f"E{number}" for number in range(CHANNELS)], RATE_HZ, "eeg")
    raw = mne.io.RawArray(np.zeros((CHANNELS, SAMPLES)), info, verbose="error")
    raw.save(path.with_name("one_raw.fif"), verbose="error")
    recipe = replace(Recipe("many"), sensor_names="none", segment_seconds=SAMPLES / RATE_HZ)
    one = path.with_name("one")
    prepare(path.with_name("one_raw.fif"), one, recipe, fractions={"train": 1.0})
    most = shards * 7 // 10
    for name, first, last in ((path.name, 0, shards), ("most", 0, most), ("rest", most, shards)):
        describe(one, path.with_name(name), first, last)


def describe(one: Path, path: Path, first: int, last: int) -> None:
    """Recordings `first` … `last`, in the form of the dataset `one`."""
    plain = Dataset.read_json(one)
    index = Dataset.read_index(one, plain)
    (path / "shards").mkdir(parents=True)
    template, plain["recordings"], plain["shards"], crc = plain["recordings"][0], [], [], []
    for number in range(first, last):

        def records(number: int = number) -> Iterator[npt.NDArray[np.float32]]:
            for record in range(RECORDS):
                signal = sample(number, record * SAMPLES, SAMPLES)
                crc.append(zlib.crc32(signal.tobytes()))
                yield signal

        plain["shards"] += [asdict(shard) for shard in write_shards(path, f"r{number:05}", records())]
        whose = {"id": f"r{number:05}", "subject": f"s{number // 4:05}", "n_samples": RECORDS * SAMPLES}
        plain["recordings"].append(template | whose)
    count = last - first
    fields = {
        "recording": np.repeat(np.arange(count), RECORDS),
        "start": np.tile(np.arange(RECORDS) * SAMPLES, count),
        "shard": np.repeat(np.arange(count), RECORDS),
        "position": np.tile(np.arange(RECORDS), count),
        "crc": np.array(crc),
    }
    whole = {name: fields.get(name, np.repeat(value[:1], count * RECORDS)) for name, value in index.items()}
    write_records(path, Dataset.FILE, plain, {name: value.astype(index[name].dtype) for name, value in whole.items()})


def time_opening(path: Path) -> dict[str, float]:
    """Seconds, files and memory that a dataset and its loader take before the first record is read."""
    files: list[str] = []
    sys.addaudithook(lambda event, about: files.append(str(about[0])) if event == "open" else None)
    seconds = []
    for _ in range(5):
        files.clear()
        start = time.perf_counter()
        dataset = Dataset.open(path)
        loader_of(dataset)
        seconds.append(time.perf_counter() - start)
        opened = {file for file in files if file.startswith(str(path))}
    if opened != {str(path / "dataset.json"), str(path / "index.npz")}:
        raise ZooError(f"opening the dataset opened {sorted(opened)}")
    arrays = [value for value in vars(dataset).values() if isinstance(value, np.ndarray)]
    arrays += [value for value in vars(dataset._shards).values() if isinstance(value, np.ndarray)]
    held = sum(array.nbytes for array in arrays if len(array) == len(dataset))
    return {
        "seconds": min(seconds),
        "files": len(opened),
        "records": len(dataset),
        "index_bytes_per_record": held / len(dataset),
        "json_bytes_per_recording": (path / "dataset.json").stat().st_size / len(dataset.recordings),
    }


def loader_of(dataset: Dataset, threads: int = 0) -> Loader:
    kind = MixedLoader if isinstance(dataset, Mixture) else Loader
    return kind(dataset, dataset.splits["train"], window=WINDOW, batch_size=BATCH, seed=0, threads=threads)


def check_epoch(dataset: Dataset) -> None:
    """ZooError unless an epoch takes every window of every record once, and every window is what its place says."""
    loader = loader_of(dataset)
    seen: list[int] = []
    for batch in loader.at(0):
        check(dataset, batch)
        seen += batch["record"].tolist()
        if len(seen) >= loader.n_examples:
            break
    counts = np.bincount(seen[: loader.n_examples], minlength=len(dataset))
    if (counts != SAMPLES // WINDOW).any():
        raise ZooError(f"an epoch takes records {counts.min()} to {counts.max()} times, wanted {SAMPLES // WINDOW}")


def check(dataset: Dataset, batch: dict[str, Any]) -> None:
    for signal, record, start in zip(batch["signal"], batch["record"], batch["start"], strict=True):
        recording = int(dataset.recordings[dataset.recording[record]].id.rpartition("r")[2])
        if (signal != sample(recording, int(start), WINDOW)).any():
            raise ZooError(f"record {record}, sample {start}: the window is not the one of its place")


def time_reading(path: Path, how: str, cold: bool, threads: int) -> dict[str, Any]:
    """Windows a second. Cold: the system is told to forget the files first."""
    gc.collect()  # datasets of earlier cases, with their files
    files = len(os.listdir("/proc/self/fd"))
    if how == "mixed 7:3":
        parts = {name: Dataset.open(path.with_name(name)) for name in ("most", "rest")}
        dataset: Dataset = Mixture(parts, {"most": 7, "rest": 3})
    else:
        dataset = Dataset.open(f"file://{path}" if how == "by byte range" else path)
    loader = loader_of(dataset, threads)
    if cold:
        forget(path.parent)
    else:
        list(islice(loader.at(0), STEPS))
    batches, done = loader.at(0), []
    start = time.perf_counter()
    for _ in range(STEPS):
        done.append(next(batches))
    seconds = time.perf_counter() - start
    for batch in done:
        check(dataset, batch)
    return {
        "how": how,
        "cold": cold,
        "threads": threads,
        "windows_per_second": STEPS * BATCH / seconds,
        "open_files": len(os.listdir("/proc/self/fd")) - files,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def forget(folder: Path) -> None:
    """Takes the files below `folder` out of the system's page cache."""
    for file in folder.glob("*/shards/*"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def show(shards: int, opened: dict[str, float], rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"windows of {CHANNELS} channels and {WINDOW / RATE_HZ:g} s from {shards} shards")
    for heading in ("records", "page cache", "threads", "windows/s", "10⁶ samples/s", "open files"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["how"],
            "cold" if row["cold"] else "warm",
            f"{row['threads']}",
            f"{row['windows_per_second']:.0f}",
            f"{row['windows_per_second'] * CHANNELS * WINDOW / 1e6:.1f}",
            f"{row['open_files']}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"opening: {opened['seconds'] * 1e3:.0f} ms, {opened['files']} files read; "
        f"{opened['index_bytes_per_record']:.0f} bytes of index a record in memory"
    )
    console.print(f"peak memory of the process: {rows[-1]['peak_megabytes']:.0f} MB")
