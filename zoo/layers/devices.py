"""Kernels on the mesh a model runs under: each device works on its own examples and heads.

The compiler cannot split a kernel, so it is run inside `jax.shard_map`. Where arrays lie follows from their logical
axes and the rules in force (`flax.linen.logical_axis_rules`, `jax.set_mesh`), as everywhere in a model. Without a mesh
these functions only call the operation. An axis that does not divide among its devices stays whole.

Time is split where the rules put "tokens" on a mesh axis of more than one device. What then becomes of it:

    states travel       recurrences that are linear in their state: linear, gla, retention, lightnet, deltanet,
                        gated_deltanet, kda, mamba, mamba2, rg_lru, s5
    keys go round       softmax attention: softmax, gated, region, duplex, sliding windows longer than a stretch
    neighbours' tokens  short windows: sliding_window, asa_local; convolutions over a few tokens
    blocks              native_sparse, moba, asa_global: summaries of all blocks go everywhere, keys go round. Stretches
                        have to be whole blocks
    in turns            titans, whose memory is not linear: one device after another, so the time is that of one
    gathered            all others, at least in part: tokens are brought together for the mixer, whole on every device
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, PartitionSpec

from kernels import sequence
from kernels.delta_rule import delta_rule as whole_delta_rule
from kernels.linear_attention import linear_attention as whole_linear_attention
from kernels.linear_scan import linear_scan as whole_linear_scan
from zoo.types import Array

Axes = tuple[str | None, ...]


def on_devices(op: Callable[..., Any], arrays: Sequence[Array], axes: Sequence[Axes], out_axes: Any) -> Any:
    """`op(*arrays)`, each device on its part.

    `axes` are the logical axes of each array, `out_axes` those of the result (a pytree of them for several). An axis
    that is None is whole on every device while `op` runs. One name is split in all arrays or in none.
    """
    mesh = _mesh()
    if mesh is None:
        return op(*arrays)
    return _on_mesh(mesh, _split_names(mesh, [x.shape for x in arrays], axes), op, arrays, axes, out_axes)


def over_time(
    op: Callable[..., Any], arrays: Sequence[Array], axes: Sequence[Axes], out_axes: Any, multiple: int = 1
) -> Any:
    """`on_devices` of an operation that can be split over the axis "tokens": `op(*arrays, axis=...)`.

    `axis` is the mesh axis that time is split over, each device having a stretch of a multiple of so many tokens, or
    None where time is whole: without a mesh, or where the tokens do not divide into such stretches.
    """
    mesh = _mesh()
    if mesh is None:
        return op(*arrays, axis=None)
    names = _split_names(mesh, [x.shape for x in arrays], axes)
    axis = _time_axis(mesh, names, _length(arrays, axes), multiple)
    if axis is None:
        names.pop("tokens", None)
    return _on_mesh(mesh, names, partial(op, axis=axis), arrays, axes, out_axes)


def splits_time(length: int, multiple: int = 1) -> bool:
    """Whether `over_time` splits so many tokens into stretches of a multiple of `multiple`."""
    mesh = _mesh()
    if mesh is None:
        return False
    names = _split_names(mesh, ((length,),), (("tokens",),))
    return _time_axis(mesh, names, length, multiple) is not None


@contextlib.contextmanager
def shared_out(examples: int) -> Iterator[None]:
    """Inside, so many examples lie on the devices of tokens too, each whole on one: what examples are cut into.

    Where they do not divide among these devices, the rules stay as they are.
    """
    rules = dict(nn.get_logical_axis_rules())
    both = tuple(axis for name in ("batch", "tokens") for axis in _several(rules.get(name)))
    mesh = _mesh()
    if mesh is None or examples % math.prod(mesh.shape.get(axis, 1) for axis in both):
        yield
        return
    with nn.logical_axis_rules([*{**rules, "batch": both, "tokens": None}.items()]):
        yield


def linear_attention(q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
    """`kernels.linear_attention.linear_attention` on the mesh; tokens may be split, then only states travel."""
    place = _recurrence((q, k, v), options, heads=True)
    if place is None:
        return whole_linear_attention(q, k, v, **options)
    return sequence.linear_attention(q, k, v, mesh=place[0], spec=place[1], **options)


def delta_rule(q: Array, k: Array, v: Array, beta: Array, **options: Any) -> tuple[Array, Array]:
    """`kernels.delta_rule.delta_rule` on the mesh; tokens may be split, then only states travel."""
    place = _recurrence((q, k, v, beta), options, heads=True)
    if place is None:
        return whole_delta_rule(q, k, v, beta, **options)
    return sequence.delta_rule(q, k, v, beta, mesh=place[0], spec=place[1], **options)


def linear_scan(x: Array, log_decay: Array, **options: Any) -> tuple[Array, Array]:
    """`kernels.linear_scan.linear_scan` of [B, T, *F] on the mesh; tokens may be split, then only states travel."""
    place = _recurrence((x,), options, heads=False)
    if place is None:
        return whole_linear_scan(x, log_decay, **options)
    return sequence.linear_scan(x, log_decay, mesh=place[0], spec=place[1], **options)


def _recurrence(arrays: Sequence[Array], options: dict[str, Any], heads: bool) -> tuple[Any, PartitionSpec] | None:
    """The mesh and how [B, T, H or F, ...] lie on it; None without a mesh."""
    mesh = _mesh()
    if mesh is None:
        return None
    axes: Axes = ("batch", "tokens", "heads" if heads else "mlp")
    decay = options.get("log_decay") if heads else None
    given = [*arrays, *([decay] if decay is not None and decay.ndim > 2 else [])]
    names = _split_names(mesh, [x.shape for x in given], [axes] * len(given))
    names["tokens"] = _time_axis(mesh, names, arrays[0].shape[1])
    return mesh, PartitionSpec(*(names.get(axis) if axis else None for axis in axes))


def _on_mesh(
    mesh: AbstractMesh,
    names: dict[str, Any],
    op: Callable[..., Any],
    arrays: Sequence[Array],
    axes: Sequence[Axes],
    out_axes: Any,
) -> Any:
    """`op(*arrays)` within `jax.shard_map`, logical axes lying on the mesh axes of `names`."""

    def spec(axes: Axes) -> PartitionSpec:
        return PartitionSpec(*(names.get(axis) if axis else None for axis in axes))

    out_specs = jax.tree.map(spec, out_axes, is_leaf=_is_axes)
    run = jax.shard_map(op, mesh=mesh, in_specs=tuple(map(spec, axes)), out_specs=out_specs, check_vma=False)
    return run(*arrays)


def _time_axis(mesh: AbstractMesh, names: dict[str, Any], length: int, multiple: int = 1) -> str | None:
    """The one mesh axis that tokens are split over: what knows of time exchanges along one."""
    over = names.get("tokens", ())
    if len(over) != 1 or length // mesh.shape[over[0]] % multiple:
        return None
    return over[0]


def _length(arrays: Sequence[Array], axes: Sequence[Axes]) -> int:
    """T."""
    pairs = ((x, own) for x, own in zip(arrays, axes, strict=True) if "tokens" in own)
    x, own = next(pairs)
    return x.shape[own.index("tokens")]


def _mesh() -> AbstractMesh | None:
    """The mesh in force that a rule splits something over; None where there is none, or where a device is alone."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes or not nn.get_logical_axis_rules():
        return None
    return mesh


def _split_names(mesh: AbstractMesh, shapes: Sequence[tuple[int, ...]], axes: Sequence[Axes]) -> dict[str, Any]:
    """Logical axis → mesh axes, for those names whose every size divides among them."""
    sizes: dict[str, set[int]] = {}
    for shape, own in zip(shapes, axes, strict=True):
        for axis, size in zip(own, shape, strict=False):
            if axis is not None:
                sizes.setdefault(axis, set()).add(size)
    rules = dict(nn.get_logical_axis_rules())
    names = {}
    for axis, found in sizes.items():
        rule = rules.get(axis) or ()
        over = tuple(each for each in _several(rule) if mesh.shape.get(each, 1) > 1)
        parts = math.prod(mesh.shape[each] for each in over)
        if over and all(size % parts == 0 for size in found):
            names[axis] = over
    return names


def _several(rule: str | Sequence[str] | None) -> tuple[str, ...]:
    return (rule,) if isinstance(rule, str) else tuple(rule or ())


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple) and all(each is None or isinstance(each, str) for each in x)
