"""How fast prepared shards become batches, recordings become shards, and training uses them up.

    python benchmarks/loader.py [--config configs/quickstart.py] [--json loader.json]

Prepares the configuration's recordings in one process, times its training step on this machine, then its loader: with
and without records held in memory, with other numbers of threads, and for all channels of a window instead of those the
configuration draws. Speeds are windows a second, MB of them a second, and multiples of what training uses in the same
run; the speed of preparation is seconds of recording per second of one core. No speed is shown for batches that are
not, bit for bit, what `Dataset.read` gives.

    python benchmarks/loader.py --shards 1000 [--json shards.json]

reads a made dataset of so many shards of a megabyte instead (`benchmarks/many_shards.py`): time and memory to open it,
windows a second from a cold and a warm page cache, by threads, by how the shards are reached, and mixed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

# Before this file's own folder, in which `kernels` would be this folder's file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zoo.batches import find_source, make_loader
from zoo.data.prepare import prepare
from zoo.data.store import Dataset
from zoo.errors import ZooError
from zoo.train.config import Config, load_config
from zoo.train.mesh import BatchPlacer, divided, make_mesh
from zoo.train.state import Program

WANTED = 20.0
"""Multiple of training's use that the loader has to reach."""
SECONDS = 3.0
TIMED_STEPS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.py"))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--threads", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shards", type=int, default=0, help="read a made dataset of so many shards instead")
    arguments = parser.parse_args()
    if arguments.shards:
        from benchmarks.many_shards import measure

        measure(arguments.shards, arguments.threads, arguments.json)
        return
    config = load_config(arguments.config)
    with tempfile.TemporaryDirectory() as folder:
        preparation = time_preparation(config, Path(folder) / "prepared")
        used = time_training(config, Dataset.open(Path(folder) / "prepared", cache_bytes=10**9))
        rows = []
        for channels in dict.fromkeys((config.data.channels, 0)):
            for cached in (False, True):
                for threads in arguments.threads:
                    data = replace(config.data, channels=channels, threads=threads)
                    cache_bytes = int(data.cache_gigabytes * 1e9) if cached else 0
                    dataset = Dataset.open(Path(folder) / "prepared", cache_bytes)
                    rows.append(time_loader(replace(config, data=data), dataset, cached, used))
    show(config, preparation, rows, used)
    if arguments.json:
        figures = {"preparation": preparation, "loader": rows, "training_windows_per_second": used}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def time_preparation(config: Config, out: Path) -> dict[str, float]:
    """Prepares with one process: seconds taken, hours of recording, and their quotient."""
    source = find_source(config.data.source)
    start = time.perf_counter()
    totals = prepare(source, out, config.data.recipe, split=config.data.split, fractions=config.data.fractions)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "hours": totals.hours, "times_real_time": totals.hours * 3600 / seconds}


def time_training(config: Config, dataset: Dataset) -> float:
    """Windows a second that the compiled training step uses, from the median of its steps on one placed batch."""
    mesh = make_mesh(config.mesh)
    config = divided(config, mesh)
    place = BatchPlacer(mesh, config.rules, config.data.batch_size, config.train.accumulate)
    batch = next(make_loader(config, dataset, "train", place.rows, config.data.channels).at(0))
    program = Program(config, config.task, mesh, place.abstract(batch))
    step, state, placed = program.compile()[0], program.initial(), place(batch)
    seconds = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        state, metrics = step(state, placed)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    return config.data.batch_size / statistics.median(seconds)


def time_loader(config: Config, dataset: Dataset, cached: bool, used: float) -> dict[str, Any]:
    """Windows a second, after checking what comes out. Both caches, the loader's and the system's, are warm."""
    loader = make_loader(config, dataset, "train", range(config.data.batch_size), config.data.channels)
    batches = loader.at(0)
    warm = list(islice(batches, round(2 * loader.epoch_steps)))
    check(config, dataset, warm[:16])
    del warm
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        next(batches)
        done += config.data.batch_size
    speed = done / (time.perf_counter() - start)
    return {
        "channels": loader.channels,
        "in_memory": cached,
        "threads": config.data.threads,
        "windows_per_second": speed,
        "megabytes_per_second": speed * loader.channels * loader.window * 4 / 1e6,
        "times_training": speed / used,
    }


def check(config: Config, dataset: Dataset, batches: list[dict[str, Any]]) -> None:
    """ZooError unless every row is bitwise a channel that `Dataset.read` gives, and the right share is masked."""
    for batch in batches:
        window = batch["signal"].shape[-1]
        for row, (record, start) in enumerate(zip(batch["record"], batch["start"], strict=True)):
            whole = dataset.read(dataset.recording[record], int(start), int(start) + window)
            stored = {channel.tobytes() for channel in whole}
            if not {channel.tobytes() for channel in batch["signal"][row]} <= stored:
                raise ZooError(f"record {record}, sample {start}: the window is not what Dataset.read gives")
        wanted = np.round(config.data.mask_ratio * batch["sensors"].valid.sum(1) * batch["mask"].shape[-1])
        if (batch["mask"].sum((1, 2)) != wanted).any():
            raise ZooError(f"a mask does not cover {config.data.mask_ratio:g} of the valid channels' patches")


def show(config: Config, preparation: dict[str, float], rows: list[dict[str, Any]], used: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"batches of {config.data.batch_size} windows; training uses {used:.0f} windows a second")
    for heading in ("channels", "records", "threads", "windows/s", "MB/s", "× training"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['channels']}",
            "in memory" if row["in_memory"] else "from shards",
            f"{row['threads']}",
            f"{row['windows_per_second']:.0f}",
            f"{row['megabytes_per_second']:.0f}",
            f"{row['times_training']:.1f}",
        )
    console = Console()
    console.print(table)
    configured = next(row for row in rows if row["in_memory"] and row["threads"] == config.data.threads)
    verdict = "reaches" if configured["times_training"] >= WANTED else "misses"
    console.print(f"as configured: {configured['times_training']:.1f}×, {verdict} the {WANTED:g}× wanted")
    console.print(
        f"preparation: {preparation['hours']:.2f} h of recording in {preparation['seconds']:.1f} s, "
        f"{preparation['times_real_time']:.0f}× real time on one core"
    )


if __name__ == "__main__":
    main()
