"""Training with time split over devices: what each device holds while it takes a step, beside one device's.

    python benchmarks/sequence_parallel.py --tokens 65536 --json sequence_parallel.json

The step of the training loop, forward, backward and update, of a small encoder for each kind of mixer is compiled for 1
and for so many fake CPU devices along `mesh.sequence`, at the same number of tokens, and not run. Temporaries are what
the compiler plans for one device (`memory_analysis`), apart from arguments and results. The exit code is 1 where those
of some encoder fall by less than `--least`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Before this file's own folder, in which `kernels` would be this folder's file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from zoo.encoders.sequence import SequenceModel
from zoo.errors import ZooError
from zoo.terminal import parse
from zoo.train.config import Config, Mesh, Optimizer, Train
from zoo.train.mesh import BatchPlacer, make_mesh
from zoo.train.state import Program
from zoo.types import Array, Batch, Variables

BLOCKS = {"block_size": 64, "stride": 16, "compression_block": 32, "selected_blocks": 8, "window": 128}
ENCODERS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "softmax": ("softmax", {}),
    "softmax both ways": ("softmax", {"causal": False}),
    "sliding_window": ("sliding_window", {"window": 128}),
    "gla": ("gla", {}),
    "kda": ("kda", {}),
    "native_sparse": ("native_sparse", BLOCKS),
    "moba": ("moba", {"block_size": 128, "top_k": 4}),
    "titans": ("titans", {"wiring": "mac", "segment": 128, "chunk": 16}),
    "titans mag": ("titans", {"wiring": "mag", "window": 128, "chunk": 16}),
}
"""Name → mixer and its options."""


@dataclass(frozen=True)
class Options:
    encoders: tuple[str, ...] = ("softmax", "gla", "native_sparse", "titans")
    """Names of ENCODERS."""
    devices: int = 8
    tokens: int = 65536
    batch: int = 1
    dim: int = 64
    heads: int = 2
    layers: int = 2
    features: int = 4
    """Numbers a token is made from."""
    remat: str = "full"
    least: float = 6.0
    """How many times less a device has to hold."""
    json: Path | None = None


@dataclass(frozen=True)
class NextToken:
    """A sequence model of signals [B, features, T] that tells the next token; those not in `mask` [B, T] are not there.

    `segments` packs two of them into each row.
    """

    model: SequenceModel
    segments: bool = False

    def init(self, key: Array, batch: Batch) -> Variables:
        return self.model.init(key, self._tokens(batch))

    def loss(
        self, variables: Variables, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        x = self._tokens(batch)
        ids = jnp.broadcast_to(jnp.arange(x.shape[1]) >= x.shape[1] * 3 // 8, x.shape[:2]).astype(jnp.int32)
        mask = batch.get("mask")
        told: Any = self.model.apply(variables, x, segment_ids=ids if self.segments else None, mask=mask, train=train)
        there = jnp.ones(x.shape[:2], bool) if mask is None else mask
        weight = jnp.sum(there[:, :-1]).astype(jnp.float32)
        error = jnp.where(there[:, :-1, None], jnp.square(told[:, :-1] - x[:, 1:]), 0)
        return jnp.sum(error) / weight, {"weight": weight}, {}

    def flops(self, batch: Batch) -> float:
        raise NotImplementedError("this task is compiled, not timed")

    def _tokens(self, batch: Batch) -> Array:
        return jnp.swapaxes(batch["signal"], 1, 2)


def program(
    task: NextToken, devices: int, batch: Mapping[str, np.ndarray], optimizer: Optimizer | None = None
) -> tuple[Program, BatchPlacer]:
    """The loop's step with so many devices along `sequence`, for batches such as this one, and what places them."""
    config = Config(
        task=task,
        optimizer=optimizer or Optimizer(warmup_steps=1),
        train=Train(steps=100),
        mesh=Mesh(data=1, sequence=devices, max_replicated=1.0),
    )
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    place = BatchPlacer(mesh, config.rules, len(batch["signal"]), 1)
    return Program(config, task, mesh, place.abstract(dict(batch))), place


def temporaries(options: Options, name: str, devices: int) -> tuple[int, float]:
    """Bytes of a device, and seconds of compilation."""
    mixer, given = ENCODERS[name]
    model = SequenceModel(
        dim=options.dim,
        mixers=(mixer,) * options.layers,
        features=options.features,
        mixer_options={mixer: {"heads": options.heads, **given}},
        remat=options.remat,
    )
    signal = np.zeros((options.batch, options.features, options.tokens), np.float32)
    made, _ = program(NextToken(model), devices, {"signal": signal})
    start = time.perf_counter()
    with jax.set_mesh(made.mesh), made.context():
        compiled: Any = made.train_step.lower(made.abstract(), made.batch).compile()
    size: int = compiled.memory_analysis().temp_size_in_bytes
    return size, time.perf_counter() - start


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse(Options, sys.argv[1:] if arguments is None else arguments, prog="sequence_parallel")
        for name in options.encoders:
            if name not in ENCODERS:
                raise ZooError(f"--encoders: got {name!r}, wanted some of {', '.join(ENCODERS)}")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.devices)
        return report(options)
    except ZooError as error:
        print(error, file=sys.stderr)
        return 2


def report(options: Options) -> int:
    table = Table(title=f"{options.layers} layers of {options.dim} features, {options.tokens:,} tokens, MiB a device")
    for column in ("encoder", "1 device", f"{options.devices} devices", "times less", "compile s"):
        table.add_column(column, justify="left" if column == "encoder" else "right")
    rows: list[dict[str, Any]] = []
    for name in options.encoders:
        (one, _), (several, seconds) = (temporaries(options, name, devices) for devices in (1, options.devices))
        rows.append({"encoder": name, "one": one, "several": several, "ratio": one / several, "compile": seconds})
        sizes = (f"{size / 2**20:,.1f}" for size in (one, several))
        table.add_row(name, *sizes, f"{one / several:.1f}", f"{seconds:.0f}")
    Console(width=120).print(table)
    if options.json is not None:
        plain = {**asdict(options), "json": str(options.json)}
        options.json.write_text(json.dumps({"options": plain, "rows": rows}, indent=1))
    return int(any(row["ratio"] < options.least for row in rows))


if __name__ == "__main__":
    sys.exit(main())
