"""What the loop costs the host at every step, besides the device's work.

    python benchmarks/host.py [--json host.json]

Runs `zoo.train.loop.fit` as a real run does, with the real metrics file and screen, on a task whose step takes the
device next to no time and on batches that are in memory (`benchmarks/loader.py` measures how fast they get there). So
the time of a step is the host's: placing the batch, calling the step, and writing the figures of the step before. The
same step called again and again on one placed batch is taken off. No time is shown for a run whose losses are not those
of the plain calls.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import mne
import numpy as np

# Before this file's own folder, in which `kernels` would be this folder's file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zoo.data.loader import Loader
from zoo.data.prepare import prepare
from zoo.data.recipes import Recipe
from zoo.data.store import Dataset
from zoo.errors import ZooError
from zoo.train.checkpoint import Checkpoints
from zoo.train.cluster import Cluster
from zoo.train.config import Config, Data, Mesh, Optimizer, Train
from zoo.train.loop import fit
from zoo.train.mesh import BatchPlacer, make_mesh
from zoo.train.metrics import JsonLines, Screen, Sink
from zoo.train.state import Program

WANTED_MS = 3.0
"""Milliseconds a step that the host may add."""
RATE_HZ = 200
BATCHES = 20
"""Different batches that are held, and first steps that are left out of the median."""


@dataclass(frozen=True)
class OneNumber:
    """Learns the mean of the signal's first sample: a step of nanoseconds with one parameter."""

    def init(self, key: jax.Array, batch: Any) -> Any:
        return {"params": {"mean": nn.LogicallyPartitioned(jnp.zeros((1, 1)), (None, None))}}

    def loss(self, variables: Any, batch: Any, key: jax.Array, train: bool) -> Any:
        value = jnp.square(batch["signal"][:, 0, 0] - variables["params"]["mean"][0, 0]).mean()
        return value, {"weight": jnp.asarray(1.0)}, {}

    def flops(self, batch: Any) -> float:
        return 1.0


class InMemory(Loader):
    """A loader whose first batches come round again and again, without reading."""

    def at(self, step: int) -> Iterator[Any]:
        return itertools.islice(itertools.cycle(self.held), step, None)

    @functools.cached_property
    def held(self) -> list[Any]:
        return list(itertools.islice(super().at(0), BATCHES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 128])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            time_steps(Path(folder) / str(channels), channels, arguments.batch_size, arguments.steps)
            for channels in arguments.channels
        ]
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def time_steps(folder: Path, channels: int, batch_size: int, steps: int) -> dict[str, float]:
    """Median milliseconds of a step: of the loop, of the bare call, and their difference."""
    dataset = make_dataset(folder, channels)
    config = Config(
        task=OneNumber(),
        runs=folder / "runs",
        data=Data(batch_size=batch_size),
        optimizer=Optimizer(warmup_steps=1),
        train=Train(steps=steps, checkpoint_every=steps),
        mesh=Mesh(data=1),
    )
    mesh = make_mesh(config.mesh)
    place = BatchPlacer(mesh, config.rules, batch_size, 1)
    loader = InMemory(
        dataset,
        np.arange(len(dataset)),
        window=RATE_HZ,
        batch_size=batch_size,
        seed=0,
        mask_patch=RATE_HZ,
        mask_ratio=0.5,
    )
    program = Program(config, config.task, mesh, place.abstract(next(loader.at(0))))
    compiled = program.compile()
    losses, bare = bare_steps(program, compiled[0], place, loader, steps)

    config.folder.mkdir(parents=True)
    metrics = config.folder / "metrics.jsonl"
    sinks: list[Sink] = [JsonLines(metrics, 0), Screen(0, steps, steps)]
    checkpoints = Checkpoints(folder / "saved", 1)
    fit(config, program, compiled, program.initial(), loader, None, place, checkpoints, sinks, Cluster(config))
    for sink in sinks:
        sink.close()
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    if [line["loss"] for line in lines[: len(losses)]] != losses:
        raise ZooError("the loop's losses are not those of its steps called one by one")
    taken = [1e3 * line["step_seconds"] for line in lines[BATCHES:-1]]
    loop = statistics.median(taken)
    return {
        "channels": channels,
        "batch_size": batch_size,
        "loop_ms": loop,
        "bare_ms": bare,
        "overhead_ms": loop - bare,
        "loop_p95_ms": statistics.quantiles(taken, n=20)[-1],
    }


def bare_steps(
    program: Program, step: Any, place: BatchPlacer, loader: Loader, count: int
) -> tuple[list[float], float]:
    """The losses of the first steps, and the median milliseconds of a step on a batch that is already there."""
    state, losses = program.initial(), []
    batches = loader.at(0)
    for _ in range(BATCHES):
        state, metrics = step(state, place(next(batches)))
        losses.append(float(metrics["loss"]))
    batch = place(next(batches))
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        taken.append(1e3 * (time.perf_counter() - start))
    return losses, statistics.median(taken)


def make_dataset(folder: Path, channels: int) -> Dataset:
    """A minute of noise."""
    noise = np.random.default_rng(0).normal(0, 1, (channels, 60 * RATE_HZ))
    info = mne.create_info([f"E{number}" for number in range(channels)], RATE_HZ, "eeg")
    folder.mkdir(parents=True)
    mne.io.RawArray(noise, info, verbose="error").save(folder / "noise_raw.fif", verbose="error")
    prepare(folder / "noise_raw.fif", folder / "prepared", replace(Recipe("noise"), sensor_names="none"))
    return Dataset.open(folder / "prepared")


def show(rows: list[dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="milliseconds a step, median")
    columns = ("channels", "batch_size", "loop_ms", "bare_ms", "overhead_ms", "loop_p95_ms")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{row[column]:.3g}" for column in columns))
    console = Console()
    console.print(table)
    worst = max(row["overhead_ms"] for row in rows)
    console.print(f"the host adds {worst:.2f} ms at most; wanted is under {WANTED_MS:g} ms")


if __name__ == "__main__":
    main()
