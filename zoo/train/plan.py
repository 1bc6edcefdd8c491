"""What a run will cost, said before it starts: devices, parameters, memory, operations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from zoo.train.state import Program

PEAK_FLOPS: Mapping[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
"""Dense bfloat16 peak of one device by `device_kind`, FLOP/s, from the makers' data sheets."""


def peak_flops() -> float | None:
    """Peak of all devices of the run together, None for a chip that is not in the table."""
    one = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if one is None else one * jax.device_count()


def step_flops(program: Program) -> float:
    """Analytic operations of one training step: forward once, backward twice; recomputation is not counted."""
    return 3.0 * program.task.flops(program.batch)


def report(program: Program, compiled: Any) -> str:
    """The text printed before step 0."""
    lines = [_devices(program), *_parameters(program.boxed, program.shardings.params)]
    memory = compiled.memory_analysis()
    if memory is not None:
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        lines.append(
            f"bytes per device: arguments {memory.argument_size_in_bytes:,}, outputs {memory.output_size_in_bytes:,} "
            f"({memory.alias_size_in_bytes:,} in place), temporaries {memory.temp_size_in_bytes:,}; "
            f"in all {held + memory.temp_size_in_bytes:,}"
        )
    lines.append(f"operations per step: {step_flops(program):.3e} (3 × forward, analytic)")
    return "\n".join(lines)


def _devices(program: Program) -> str:
    sizes = {axis: size for axis, size in program.mesh.shape.items() if size > 1}
    laid_out = " × ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one device"
    hosts = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"devices: {jax.device_count()} × {jax.devices()[0].device_kind}{hosts}; mesh: {laid_out}"


def _parameters(boxed: Any, shardings: Any) -> list[str]:
    """One line a parameter: name, logical axes, shape, count, how many ways it is split."""
    is_boxed = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_boxed)
    rows = []
    total = here = 0
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        value = leaf.unbox() if is_boxed(leaf) else leaf
        axes = leaf.names if is_boxed(leaf) else ("",) * value.ndim
        local = math.prod(sharding.shard_shape(value.shape))
        total, here = total + value.size, here + local * value.dtype.itemsize
        rows.append(
            (
                jax.tree_util.keystr(path, simple=True, separator="/"),
                " × ".join(f"{size} {axis or ''}".strip() for size, axis in zip(value.shape, axes, strict=True)),
                f"{value.size:,}",
                f"/{value.size // local}" if value.size > local else "",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    table = [
        f"  {name:<{widths[0]}}  {shape:<{widths[1]}}  {count:>{widths[2]}} {split}".rstrip()
        for name, shape, count, split in rows
    ]
    return [f"parameters: {total:,}; {here:,} bytes per device", *table]
