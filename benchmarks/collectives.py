"""What travels between devices when time is split over them: `kernels.sequence` compiled ahead for a TPU slice.

    python benchmarks/collectives.py --topology v5e:4x4

For each operation, forward and with gradients, it prints every kind of collective in the compiled program, how often it
stands there and the largest array it moves. The exit code is 1 if an array as large as a device's queries is moved.
Needs libtpu (`pip install 'brain-zoo[aot]'`) and no TPU.
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

# Before this file's own folder, in which `kernels` would be this folder's file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from benchmarks import aot
from kernels import sequence
from zoo.errors import ZooError
from zoo.terminal import parse

COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute|ragged-all-to-all)(-start)?\("
)
SHAPE = re.compile(r"[a-z]\w*\[([\d,]*)\]")


@dataclass(frozen=True)
class Options:
    topology: str = "v5e:4x4"
    """A slice, as libtpu names it; all its chips split time."""
    batch: int = 1
    time: int = 65536
    heads: int = 16
    width: int = 128


def moved(text: str) -> dict[str, list[int]]:
    """Compiled HLO → for each kind of collective the elements of the largest array of each that stands there."""
    kinds = defaultdict(list)
    for shapes, kind, _ in COLLECTIVE.findall(text):
        sizes = [math.prod(int(n) for n in dims.split(",") if n) for dims in SHAPE.findall(shapes)]
        kinds[kind].append(max(sizes, default=1))
    return dict(kinds)


def programs(options: Options, mesh: jax.sharding.Mesh) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """Name → (operation, arguments) with the gates of SSD, Gated DeltaNet and RG-LRU."""
    spec = P(None, "sequence")
    sharding = jax.sharding.NamedSharding(mesh, spec)

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((options.batch, options.time, *shape), dtype, sharding=sharding)

    heads = array(options.heads, options.width)
    gate = array(options.heads, dtype=jnp.float32)
    wide = array(options.heads * options.width)
    place: dict[str, Any] = {"mesh": mesh, "spec": spec}
    return {
        "linear_scan": (lambda x, g: sequence.linear_scan(x, g, **place), [wide, wide]),
        "linear_attention": (
            lambda q, k, v, g: sequence.linear_attention(q, k, v, log_decay=g, **place),
            [heads, heads, heads, gate],
        ),
        "delta_rule": (
            lambda q, k, v, b, g: sequence.delta_rule(q, k, v, b, log_decay=g, **place),
            [heads, heads, heads, array(options.heads), gate],
        ),
    }


def with_gradients(operation: Callable[..., Any], count: int) -> Callable[..., Any]:
    def loss(*arrays: jax.Array) -> jax.Array:
        out, state = operation(*arrays)
        return jnp.sum(jnp.square(out.astype(jnp.float32))) + jnp.sum(state)

    return jax.grad(loss, argnums=tuple(range(count)))


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse(Options, sys.argv[1:] if arguments is None else arguments, prog="collectives")
        with tempfile.TemporaryDirectory() as dump:
            aot.prepare(Path(dump))
            from jax.experimental import topologies

            try:
                chips = topologies.get_topology_desc(options.topology, platform="tpu").devices
            except Exception as error:  # libtpu has its own exceptions for slices it does not know
                raise ZooError(f"--topology {options.topology}: libtpu does not know it: {error}") from None
            mesh = jax.sharding.Mesh(np.array(chips), ("sequence",))
            return report(options, mesh)
    except ZooError as error:
        print(error, file=sys.stderr)
        return 2


def report(options: Options, mesh: jax.sharding.Mesh) -> int:
    table = Table(title=f"{options.topology}: B{options.batch} T{options.time} H{options.heads} K{options.width}")
    for column in ("operation", "mode", "collective", "count", "largest, elements", "of a device's q", "compile s"):
        table.add_column(column, justify="left" if column in ("operation", "mode", "collective") else "right")
    queries = options.batch * options.time * options.heads * options.width // mesh.size
    too_large = False
    for name, (operation, arrays) in programs(options, mesh).items():
        for mode in ("forward", "forward_backward"):
            function = operation if mode == "forward" else with_gradients(operation, len(arrays))
            start = time.perf_counter()
            text = jax.jit(function).lower(*arrays).compile().as_text()
            seconds = f"{time.perf_counter() - start:.1f}"
            for kind, sizes in moved(text or "").items():
                share = max(sizes) / queries
                too_large |= share >= 1
                table.add_row(name, mode, kind, str(len(sizes)), f"{max(sizes):,}", f"{share:.3f}", seconds)
    Console(width=120).print(table)
    return int(too_large)


if __name__ == "__main__":
    sys.exit(main())
