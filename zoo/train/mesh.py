"""Devices → mesh, logical axes → mesh axes, host arrays → sharded batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from zoo.errors import ZooError
from zoo.train.config import Config, Devices, Mesh, Rules
from zoo.types import Batch

AXES = ("slice", "data", "fsdp", "tensor", "sequence")


def choose_devices(devices: Devices) -> None:
    """Chooses the platform. Before any other use of JAX."""
    if devices.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if devices.cpu_devices > 1:
        try:
            jax.config.update("jax_num_cpu_devices", devices.cpu_devices)
        except RuntimeError as error:
            raise ZooError(f"devices.cpu_devices {devices.cpu_devices}: JAX has already started with others") from error


def check_devices(devices: Devices) -> None:
    """Raises ZooError when the platform named is not there: JAX would otherwise run on the CPU in silence."""
    found = jax.default_backend()
    if devices.platform not in ("auto", found):
        raise ZooError(f"devices.platform is {devices.platform} but JAX found only {found}; is the driver installed?")


def mesh_shape(mesh: Mesh, devices: int) -> dict[str, int]:
    """Axis sizes that use all `devices`, the −1 filled in. Raises ZooError when they cannot."""
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    asked = " × ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "all axes 1"
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise ZooError(f"mesh sizes must be 1 or more, one of them −1 at most; got {asked}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices % fixed or (not free and fixed != devices):
        raise ZooError(f"mesh {asked} needs {'a multiple of ' if free else ''}{fixed} devices; there are {devices}")
    for axis in free:
        sizes[axis] = devices // fixed
    return sizes


def make_mesh(mesh: Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of all devices, or of those given. With several slices, `slice` runs across the data-centre network and
    the rest inside a slice; inside, neighbours on the mesh are neighbours in the machine as far as they can be."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_shape(mesh, len(devices))
    if sizes["slice"] > 1 and hasattr(devices[0], "slice_index"):
        inside = tuple(1 if axis == "slice" else size for axis, size in sizes.items())
        across = tuple(size if axis == "slice" else 1 for axis, size in sizes.items())
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    kinds = (AxisType.Auto,) * len(AXES)
    # An axis of 8 has to be let lie along two axes of a machine of 4 × 4 × 4.
    grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=kinds)


def logical_rules(rules: Rules) -> list[tuple[str, tuple[str, ...] | None]]:
    """Rules in the form `flax.linen.logical_axis_rules` takes."""
    return [(each.name, getattr(rules, each.name) or None) for each in dataclasses.fields(rules)]


def parameter_shardings(boxed: Any, rules: Rules, mesh: jax.sharding.Mesh) -> Any:
    """A NamedSharding for every leaf of abstract variables boxed with logical axis names (unboxed leaves: replicated).

    Raises ZooError listing every parameter whose axes do not divide, or whose axis names have no rule.
    """
    wrong: list[str] = []

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        name, shape = jax.tree_util.keystr(path, simple=True, separator="/"), leaf.value.shape
        spec: list[tuple[str, ...] | None] = []
        for axis, size in zip(leaf.names, shape, strict=True):
            if axis is not None and not hasattr(rules, axis):
                wrong.append(f"{name}: no rule for logical axis {axis!r}")
            over = tuple(each for each in getattr(rules, axis or "", ()) if mesh.shape[each] > 1)
            parts = math.prod(mesh.shape[each] for each in over)
            if size % parts:
                wrong.append(f"{name} {shape}: {axis} {size} does not divide over {'×'.join(over)} {parts}")
            spec.append(over or None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    shardings = jax.tree_util.tree_map_with_path(
        sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )
    if wrong:
        raise ZooError("the mesh does not fit the model: " + "; ".join(wrong))
    return shardings


def check_replication(parameters: Any, shardings: Any, mesh: jax.sharding.Mesh, limit: float) -> None:
    """Raises ZooError when parameters are to be split but more than `limit` of their bytes stay whole everywhere."""
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return
    whole: dict[str, int] = {}
    total = 0
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        size = leaf.size * leaf.dtype.itemsize
        total += size
        if sharding.is_fully_replicated:
            whole[jax.tree_util.keystr(path, simple=True, separator="/")] = size
    share = sum(whole.values()) / total
    if share > limit:
        largest = max(whole, key=lambda name: whole[name])
        raise ZooError(
            f"{share:.0%} of parameter bytes would be whole on every device, mesh.max_replicated is {limit:.0%}; "
            f"the largest is {largest} ({whole[largest]:,} bytes): give it logical axes or change the rules"
        )


class BatchPlacer:
    """Puts this host's rows of a batch on its devices: examples over `rules.batch`, everything else whole."""

    def __init__(self, mesh: jax.sharding.Mesh, rules: Rules, batch_size: int, accumulate: int) -> None:
        self.sharding = NamedSharding(mesh, PartitionSpec(rules.batch))
        parts = _groups(rules, mesh.shape)
        if batch_size % (parts * accumulate):
            raise ZooError(
                f"data.batch_size {batch_size} does not divide into {parts} device groups × {accumulate} micro-batches"
            )
        self._size = batch_size
        indices = self.sharding.addressable_devices_indices_map((batch_size,)).values()
        self.rows: Sequence[int] = sorted({row for index in indices if index for row in range(batch_size)[index[0]]})
        """Rows of the global batch that this host's devices hold."""

    def __call__(self, batch: Batch) -> Batch:
        """Host rows [b, …] → global arrays [B, …]; strings and other host-only leaves must be taken out before."""
        with jax.transfer_guard("allow"):  # the one transfer to the device that a step is meant to make
            return jax.tree.map(self._place, batch)

    def abstract(self, batch: Batch) -> Batch:
        """Shapes and shardings of the global batch that `batch` is this host's part of."""
        return jax.tree.map(
            lambda rows: jax.ShapeDtypeStruct((self._size, *rows.shape[1:]), rows.dtype, sharding=self.sharding), batch
        )

    def _place(self, rows: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(self.sharding, rows, (self._size, *rows.shape[1:]))


def divided(config: Config, mesh: jax.sharding.Mesh) -> Config:
    """The configuration with `train.accumulate` as `train.micro_batch` and the devices of `mesh` ask for.

    The global batch stays what it is, and every step takes the same examples. On the same devices a run comes out bit
    for bit. On others sums are rounded in another order, and a task that draws in its loss (dropout) or moves
    statistics once a micro-batch (codebooks) draws and moves otherwise. Raises ZooError, with the numbers of hosts (of
    devices, for one process) that would do, when the batch does not divide over these.
    """
    most, batch = config.train.micro_batch, config.data.batch_size
    if not most:
        return config
    if config.train.accumulate != 1:
        raise ZooError(
            f"train.accumulate {config.train.accumulate} and train.micro_batch {most}: wanted one of them; the second "
            f"gives the first"
        )
    groups = _groups(config.rules, mesh.shape)
    if batch % groups:
        raise ZooError(
            f"data.batch_size {batch} does not divide into the {groups} device groups of {mesh.size} devices; "
            f"it would on {_would_do(config, mesh.size, jax.process_count())}"
        )
    each = batch // groups
    count = next(count for count in range(1, each + 1) if each % count == 0 and each // count <= most)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=count, micro_batch=0))


def _groups(rules: Rules, sizes: Mapping[str, int]) -> int:
    """Device groups that take different examples."""
    return math.prod(sizes[axis] for axis in rules.batch)


def _would_do(config: Config, devices: int, hosts: int) -> str:
    """Numbers of hosts, or of one host's devices, up to twice those there are, over which mesh and batch divide."""
    unit = devices // hosts if hosts > 1 else 1
    found = []
    for count in range(1, 2 * devices // unit + 1):
        try:
            sizes = mesh_shape(config.mesh, count * unit)
        except ZooError:
            continue
        if config.data.batch_size % _groups(config.rules, sizes) == 0:
            found.append(str(count))
    return f"{', '.join(found) or 'no number of'} {f'hosts of {unit} devices' if hosts > 1 else 'devices'}"


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())
