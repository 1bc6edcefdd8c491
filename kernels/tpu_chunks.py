"""Walking over chunks of time in a TPU kernel, one head of one example after another, the state staying on the chip.

An operation (`Op`) is functions of float32 tiles: stages, all that does not depend on the state, and `advance`, which
moves the state [V, K] (transposed, so that a decay of K channels is a row of it) over a chunk. The backward kernel is
made of their VJPs, taken inside the kernel. It walks a block of chunks forward, keeping in VMEM what the VJPs need, and
then back; only the state at the start of each block has gone through HBM. Each stage is a loop of its own over the
block's chunks, so that what is alive at a time fits the registers.

The arrays of `tokens` are [B, T, G, F] with any G that divides H; heads share theirs through the index maps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Tokens of a block times key and value width, which its buffers in VMEM grow with; narrower tiles are filled up to 128.
BLOCK = 256 * 256


@dataclass(frozen=True)
class Op:
    name: str
    stages: tuple[Callable[[Any], Any], ...]
    """The first takes a chunk's tiles, [C, F] or, for one number a token, [1, C], the others what the last one gave."""
    advance: Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]
    """State at the chunk's start and what the last stage gave → (state after it, out [C, V])."""
    scale: float
    """Of the output."""


def refusal(key_width: int, value_width: int, dtype: jnp.dtype) -> str | None:
    """Why kernels of this kind do not serve these arguments, or None where they do."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"computes in float32 and bfloat16, got {jnp.dtype(dtype).name}"
    for name, width in (("K", key_width), ("V", value_width)):
        if not 8 <= width <= 256:
            return f"takes widths from 8 to 256, got {name}={width}"
    return None


@dataclass(frozen=True)
class Walk:
    """How time is cut: `blocks` steps of the grid, `chunks` in each, `size` tokens a chunk."""

    size: int
    chunks: int
    blocks: int

    @classmethod
    def over(cls, time: int, chunk_size: int, widths: Sequence[int]) -> "Walk":
        size = min(max(chunk_size, 16), 128)  # rows of a bfloat16 tile, columns of a register
        most = max(BLOCK // (size * sum(max(width, 128) for width in widths)), 1)
        chunks = max(pl.cdiv(time, size), 1)
        blocks = pl.cdiv(chunks, most)
        return cls(size, pl.cdiv(chunks, blocks), blocks)

    @property
    def time(self) -> int:
        return self.blocks * self.chunks * self.size


def _head_first(walk: Walk, x: jax.Array) -> jax.Array:
    """[B, T, G, F] → [B, G, T', F], or [B, G, N, 1, C] for F = 1, time filled up with zeros."""
    x = jnp.pad(x, ((0, 0), (0, walk.time - x.shape[1]), (0, 0), (0, 0)))
    x = jnp.transpose(x, (0, 2, 1, 3))
    return x.reshape(*x.shape[:2], -1, 1, walk.size) if x.shape[3] == 1 else x


def _time_first(x: jax.Array, like: jax.Array) -> jax.Array:
    """[B, H, …] as made by `_head_first` → the shape and dtype of `like`, heads of a group summed."""
    batch, time, groups, width = like.shape
    x = x.reshape(batch, groups, x.shape[1] // groups, -1, width)
    x = x[:, :, 0] if x.shape[2] == 1 else jnp.sum(x, axis=2)
    return jnp.transpose(x[:, :, :time], (0, 2, 1, 3)).astype(like.dtype)


def _token_spec(walk: Walk, heads: int, x: jax.Array, at: Callable[[Any], Any]) -> pl.BlockSpec:
    """The block of a head-first array for head h and step n of the grid; `at` turns time round in the backward pass."""

    def group(h):
        return lax.div(h, np.int32(heads // x.shape[1]))

    if x.ndim == 5:
        return pl.BlockSpec((None, None, walk.chunks, 1, walk.size), lambda b, h, n: (b, group(h), at(n), 0, 0))
    rows = walk.chunks * walk.size
    return pl.BlockSpec((None, None, rows, x.shape[3]), lambda b, h, n: (b, group(h), at(n), 0))


def _state_spec(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, *shape[2:]), lambda b, h, n: (b, h, 0, 0))


def _where(walk: Walk, ref: Any, i: Any) -> Any:
    """The place of chunk i in a block."""
    return i if ref.ndim == 3 else pl.ds(pl.multiple_of(i * walk.size, walk.size), walk.size)


def _tiles(walk: Walk, refs: Any, i: Any) -> Any:
    return jax.tree.map(lambda ref: ref[_where(walk, ref, i)].astype(jnp.float32), refs)


def _store(walk: Walk, refs: Any, i: Any, tiles: Any) -> None:
    def store(ref, tile):
        ref[_where(walk, ref, i)] = tile.astype(ref.dtype)

    jax.tree.map(store, refs, tiles)


def _read(refs: list[Any], i: Any) -> list[jax.Array]:
    return [ref[i] for ref in refs]


def _write(refs: list[Any], i: Any, values: list[jax.Array]) -> None:
    for ref, value in zip(refs, values, strict=True):
        ref[i] = value


def _split(tree: Any, given: Any) -> tuple[list[jax.Array], Callable[[Any, list[jax.Array]], Any]]:
    """The leaves of `tree` that are not among those of `given`, and `join(given, leaves)` to make it again."""
    leaves, structure = jax.tree.flatten(tree)
    known = jax.tree.leaves(given)
    count = len(known)
    places = {id(x): n for n, x in enumerate(known)}
    for x in leaves:
        if id(x) not in places:
            places[id(x)] = len(known)
            known.append(x)
    order = [places[id(x)] for x in leaves]

    def join(given: Any, others: list[jax.Array]) -> Any:
        arrays = [*jax.tree.leaves(given), *others]
        return jax.tree.unflatten(structure, [arrays[n] for n in order])

    return known[count:], join


def _known(walk: Walk, tokens: Any, joins: list[Any], outputs: list[Any], i: Any) -> tuple[Any, ...]:
    """The tiles of chunk i and what the stages gave so far."""
    known: tuple[Any, ...] = (_tiles(walk, tokens, i),)
    for join, refs in zip(joins, outputs, strict=False):
        known += (join(known, _read(refs, i)),)
    return known


class Memory(NamedTuple):
    """What the backward kernel keeps of a block's chunks: by stage its output, the output's cotangent and the VJP."""

    outputs: list[Any]
    d_outputs: list[Any]
    vjps: list[Any]
    vjp_of_advance: list[Any]

    @classmethod
    def shapes(cls, op: Op, walk: Walk, state: jax.ShapeDtypeStruct, tiles: Any) -> "Memory":
        def trace(state: jax.Array, tiles: Any) -> Memory:
            memory = Memory([], [], [], [])
            known: tuple[Any, ...] = (tiles,)
            for stage in op.stages:
                output, pull = jax.vjp(stage, known[-1])
                memory.outputs.append(_split(output, known)[0])
                memory.d_outputs.append(jax.tree.leaves(output))
                known += (output,)
                memory.vjps.append(_split(pull, known)[0])
            _, pull = jax.vjp(op.advance, state, known[-1])
            return memory._replace(vjp_of_advance=_split(pull, known)[0])

        return jax.tree.map(
            lambda x: pltpu.VMEM((walk.chunks, *x.shape), jnp.float32), jax.eval_shape(trace, state, tiles)
        )


def _forward_kernel(op: Op, walk: Walk, *refs: Any) -> None:
    tokens, initial, out, final, state, outputs = refs
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        state[...] = initial[...]

    joins: list[Any] = []
    known_at = partial(_known, walk, tokens, joins, outputs)

    def run_stage(n, i, _):
        known = known_at(i)
        values, join = _split(op.stages[n](known[-1]), known)
        _write(outputs[n], i, values)
        joins.append(join)

    def advance(i, _):
        state[...], rows = op.advance(state[...], known_at(i)[-1])
        _store(walk, out, i, op.scale * rows)

    for loop in [partial(run_stage, n) for n in range(len(op.stages))] + [advance]:
        lax.fori_loop(0, walk.chunks, loop, None)

    @pl.when(n == walk.blocks - 1)
    def _():
        final[...] = state[...]


def _states_kernel(op: Op, walk: Walk, tokens: Any, initial: Any, starts: Any, state: Any) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = initial[...]

    starts[...] = state[...]

    def step(i, _):
        prepared = _tiles(walk, tokens, i)
        for stage in op.stages:
            prepared = stage(prepared)
        state[...], _ = op.advance(state[...], prepared)

    lax.fori_loop(0, walk.chunks, step, None)


def _backward_kernel(op: Op, walk: Walk, *refs: Any) -> None:
    tokens, start, d_out, d_final, d_tokens, d_initial, state, d_state, memory = refs
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        d_state[...] = d_final[...]

    state[...] = start[...]
    joins: list[Any] = []
    vjp_joins: list[Any] = []
    known_at = partial(_known, walk, tokens, joins, memory.outputs)

    def run_stage(n, i, _):
        known = known_at(i)
        output, pull = jax.vjp(op.stages[n], known[-1])
        values, join = _split(output, known)
        _write(memory.outputs[n], i, values)
        values, vjp_join = _split(pull, (*known, output))
        _write(memory.vjps[n], i, values)
        joins.append(join)
        vjp_joins.append(vjp_join)

    def advance(i, _):
        known = known_at(i)
        (state[...], _), pull = jax.vjp(op.advance, state[...], known[-1])
        values, vjp_join = _split(pull, known)
        _write(memory.vjp_of_advance, i, values)
        vjp_joins.append(vjp_join)

    def pull_advance(step, _):
        i = walk.chunks - 1 - step
        pull = vjp_joins[-1](known_at(i), _read(memory.vjp_of_advance, i))
        d_state[...], d_prepared = pull((d_state[...], op.scale * _tiles(walk, d_out, i)))
        _write(memory.d_outputs[-1], i, jax.tree.leaves(d_prepared))

    def pull_stage(n, i, _):
        known = known_at(i)[: n + 2]
        pull = vjp_joins[n](known, _read(memory.vjps[n], i))
        (d_input,) = pull(jax.tree.unflatten(jax.tree.structure(known[-1]), _read(memory.d_outputs[n], i)))
        if n > 0:
            _write(memory.d_outputs[n - 1], i, jax.tree.leaves(d_input))
        else:
            _store(walk, d_tokens, i, d_input)

    stages = range(len(op.stages))
    loops = [partial(run_stage, n) for n in stages] + [advance, pull_advance]
    for loop in loops + [partial(pull_stage, n) for n in reversed(stages)]:
        lax.fori_loop(0, walk.chunks, loop, None)

    @pl.when(n == walk.blocks - 1)
    def _():
        d_initial[...] = d_state[...]


def _call(kernel: Callable[..., None], op: Op, walk: Walk, state: jax.Array, **options: Any) -> Callable[..., Any]:
    return pl.pallas_call(
        partial(kernel, op, walk),
        grid=(*state.shape[:2], walk.blocks),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name=f"{op.name}{kernel.__name__.removesuffix('_kernel')}",
        **options,
    )


def _tile_shapes(walk: Walk, tokens: Any) -> Any:
    def tile(x):
        shape = x.shape[3:] if x.ndim == 5 else (walk.size, x.shape[3])
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return jax.tree.map(tile, tokens)


def forward(op: Op, size: int, tokens: Any, initial: jax.Array, out_like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Walks `op` over time from `initial` [B, H, K, V], `size` tokens a chunk.

    `out_like` has the output's shape [B, T, H, V] and dtype.

    Returns:
      out and the final state [B, H, K, V].
    """
    walk = Walk.over(out_like.shape[1], size, initial.shape[2:])
    initial = initial.mT
    batch, heads, *tile = initial.shape
    tokens = jax.tree.map(partial(_head_first, walk), tokens)
    out = jax.ShapeDtypeStruct((batch, heads, walk.time, tile[0]), out_like.dtype)
    specs = partial(jax.tree.map, lambda x: _token_spec(walk, heads, x, lambda n: n))
    memory = Memory.shapes(op, walk, jax.ShapeDtypeStruct(tile, jnp.float32), _tile_shapes(walk, tokens))
    out, final = _call(
        _forward_kernel,
        op,
        walk,
        initial,
        in_specs=[specs(tokens), _state_spec(initial.shape)],
        out_specs=[specs(out), _state_spec(initial.shape)],
        out_shape=[out, jax.ShapeDtypeStruct(initial.shape, jnp.float32)],
        scratch_shapes=[pltpu.VMEM(tile, jnp.float32), memory.outputs],
    )(tokens, initial)
    return jnp.transpose(out[:, :, : out_like.shape[1]], (0, 2, 1, 3)), final.mT


def backward(op: Op, size: int, tokens: Any, initial: jax.Array, d_out: jax.Array, d_final: jax.Array) -> Any:
    """Cotangents of `forward`'s results → (those of `tokens`, in their shapes and dtypes, and that of `initial`)."""
    walk = Walk.over(d_out.shape[1], size, initial.shape[2:])
    initial, d_final = initial.mT, d_final.mT
    batch, heads, *tile = initial.shape
    given, tokens = tokens, jax.tree.map(partial(_head_first, walk), tokens)
    d_out = _head_first(walk, d_out)
    starts = _call(
        _states_kernel,
        op,
        walk,
        initial,
        in_specs=[jax.tree.map(lambda x: _token_spec(walk, heads, x, lambda n: n), tokens), _state_spec(initial.shape)],
        out_specs=pl.BlockSpec((None, None, None, *tile), lambda b, h, n: (b, h, n, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, heads, walk.blocks, *tile), jnp.float32),
        scratch_shapes=[pltpu.VMEM(tile, jnp.float32)],
    )(tokens, initial)

    def last(n):
        return walk.blocks - 1 - n

    def d_like(x):
        dtype = x.dtype if x.shape[1] == heads else jnp.float32
        return jax.ShapeDtypeStruct((batch, heads, *x.shape[2:]), dtype)

    specs = partial(jax.tree.map, lambda x: _token_spec(walk, heads, x, last))
    d_tokens = jax.tree.map(d_like, tokens)
    memory = Memory.shapes(op, walk, jax.ShapeDtypeStruct(tile, jnp.float32), _tile_shapes(walk, tokens))
    d_tokens, d_initial = _call(
        _backward_kernel,
        op,
        walk,
        initial,
        in_specs=[
            specs(tokens),
            pl.BlockSpec((None, None, None, *tile), lambda b, h, n: (b, h, last(n), 0, 0)),
            specs(d_out),
            _state_spec(initial.shape),
        ],
        out_specs=[specs(d_tokens), _state_spec(initial.shape)],
        out_shape=[d_tokens, jax.ShapeDtypeStruct(initial.shape, jnp.float32)],
        scratch_shapes=[pltpu.VMEM(tile, jnp.float32), pltpu.VMEM(tile, jnp.float32), memory],
    )(tokens, starts, d_out, d_final)
    return jax.tree.map(_time_first, d_tokens, given), d_initial.mT
