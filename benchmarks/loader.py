"""How fast prepared shards become batches, and recordings become shards.

    python benchmarks/loader.py [--json loader.json]

Prepares the `faces_eeg` sample with LaBraM's recipe in one process, then reads it with a warm page cache.
Speeds of the loader are windows [128, 200] float32 a second, MB of them a second, and multiples of what
training consumes; the speed of preparation is seconds of recording per second of one core. No speed is
shown for batches that are not, bit for bit, what `Dataset.read` gives.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.fetch import fetch
from zoo.data.loader import Loader
from zoo.data.prepare import prepare
from zoo.data.recipes import RECIPES
from zoo.data.store import Dataset
from zoo.errors import ZooError

CONSUMPTION = 100.0
"""Windows a second that the quickstart trains on (2 CPU cores)."""
WANTED = 20.0
"""Multiple of the consumption the loader has to reach."""
RATE_HZ = 200
SECONDS = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--consumption", type=float, default=CONSUMPTION, help="windows a second of training")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--threads", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        preparation = time_preparation(Path(folder) / "faces")
        dataset = Dataset.open(Path(folder) / "faces")
        rows = [
            time_loader(dataset, batch_size, threads, arguments.consumption)
            for batch_size in arguments.batch_sizes
            for threads in arguments.threads
        ]
    show(preparation, rows, arguments.consumption)
    if arguments.json:
        figures = {"preparation": preparation, "loader": rows, "consumption": arguments.consumption}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def time_preparation(out: Path) -> dict[str, float]:
    """Prepares the sample with one process: seconds taken, hours of recording, and their quotient."""
    recipe = replace(RECIPES["labram"], notch_hz=(60.0,), sensor_names="nearest")
    source = fetch("faces_eeg")
    start = time.perf_counter()
    totals = prepare(source, out, recipe)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "hours": totals.hours, "times_real_time": totals.hours * 3600 / seconds}


def time_loader(dataset: Dataset, batch_size: int, threads: int, consumption: float) -> dict[str, float]:
    """Windows a second with half of the patches masked, after checking what comes out."""
    loader = Loader(
        dataset,
        np.arange(len(dataset)),
        window=RATE_HZ,
        batch_size=batch_size,
        seed=0,
        mask_patch=RATE_HZ,
        mask_ratio=0.5,
        threads=threads,
    )
    batches = loader.at(0)
    check(dataset, islice(batches, 512 // batch_size))
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        next(batches)
        done += batch_size
    speed = done / (time.perf_counter() - start)
    return {
        "batch_size": batch_size,
        "threads": threads,
        "windows_per_second": speed,
        "megabytes_per_second": speed * dataset.n_channels * RATE_HZ * 4 / 1e6,
        "times_consumption": speed / consumption,
    }


def check(dataset: Dataset, batches: Iterator[dict[str, Any]]) -> None:
    """ZooError unless every window is bitwise what `Dataset.read` gives, and half of it is masked."""
    for batch in batches:
        for row, (record, start) in enumerate(zip(batch["record"], batch["start"], strict=True)):
            wanted = dataset.read(dataset.recording[record], int(start), int(start) + RATE_HZ)
            if wanted.tobytes() != batch["signal"][row].tobytes():
                raise ZooError(f"record {record}, sample {start}: the window is not what Dataset.read gives")
        if (batch["mask"].sum((1, 2)) != np.round(0.5 * batch["sensors"].valid.sum(1))).any():
            raise ZooError("a mask does not cover half of the valid channels")


def show(preparation: dict[str, float], rows: list[dict[str, float]], consumption: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"loader, [128, {RATE_HZ}] windows; training consumes {consumption:g} a second")
    for heading in ("batch", "threads", "windows/s", "MB/s", "× consumption"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['batch_size']}",
            f"{row['threads']}",
            f"{row['windows_per_second']:.0f}",
            f"{row['megabytes_per_second']:.0f}",
            f"{row['times_consumption']:.1f}",
        )
    console = Console()
    console.print(table)
    best = max(row["times_consumption"] for row in rows)
    verdict = "reaches" if best >= WANTED else "misses"
    console.print(f"{verdict} the {WANTED:g}× wanted (best {best:.1f}×)")
    console.print(
        f"preparation: {preparation['hours']:.2f} h of 128-channel EDF in {preparation['seconds']:.1f} s, "
        f"{preparation['times_real_time']:.0f}× real time on one core"
    )


if __name__ == "__main__":
    main()
