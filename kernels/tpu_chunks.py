"""Walking over chunks of time in a TPU kernel, one head of one example after another, the state staying on the chip.

An operation gives `chunk(state, tiles) -> (state, out)`, a function of float32 tiles: state [V, K] (transposed, so that
a decay of K channels is a row of it), `tiles` a pytree of [C, F] and, for one number a token, [1, C]; out is [C, V].
The backward kernel is that function's VJP, traced inside the kernel. States are stored once a block of chunks and
computed again in between.

The arrays of `tokens` are [B, T, G, F] with any G that divides H; heads share theirs through the index maps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Chunk = Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]

BLOCK_TOKENS = 512


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
    def over(cls, time: int, size: int) -> "Walk":
        chunks = max(pl.cdiv(time, size), 1)
        blocks = pl.cdiv(chunks, max(BLOCK_TOKENS // size, 1))
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


def _call(kernel: Callable[..., None], walk: Walk, state: jax.Array, name: str, **options: Any) -> Callable[..., Any]:
    return pl.pallas_call(
        kernel,
        grid=(*state.shape[:2], walk.blocks),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name=name,
        **options,
    )


def _forward_kernel(chunk: Chunk, scale: float, walk: Walk, *refs: Any) -> None:
    tokens, initial, out, final, state = refs
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        state[...] = initial[...]

    def step(i, _):
        state[...], rows = chunk(state[...], _tiles(walk, tokens, i))
        out[_where(walk, out, i)] = (scale * rows).astype(out.dtype)

    lax.fori_loop(0, walk.chunks, step, None)

    @pl.when(n == walk.blocks - 1)
    def _():
        final[...] = state[...]


def _states_kernel(chunk: Chunk, walk: Walk, tokens: Any, initial: Any, starts: Any, state: Any) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = initial[...]

    starts[...] = state[...]

    def step(i, _):
        state[...], _ = chunk(state[...], _tiles(walk, tokens, i))

    lax.fori_loop(0, walk.chunks, step, None)


def _linearized(chunk: Chunk, state: jax.Array, tiles: Any) -> tuple[jax.Array, list[jax.Array], Callable[..., Any]]:
    """The state after a chunk, what its gradient needs beside `tiles`, and `pull(tiles, needed)` to make the VJP of it."""
    (state, _), vjp = jax.vjp(chunk, state, tiles)
    residuals, structure = jax.tree.flatten(vjp)
    given = jax.tree.leaves(tiles)
    places = {id(x): n for n, x in enumerate(given)}
    needed = []
    for x in residuals:
        if id(x) not in places:
            places[id(x)] = len(places)
            needed.append(x)
    order = [places[id(x)] for x in residuals]

    def pull(tiles: Any, needed: list[jax.Array]) -> Any:
        arrays = [*jax.tree.leaves(tiles), *needed]
        return jax.tree.unflatten(structure, [arrays[n] for n in order])

    return state, needed, pull


def _backward_kernel(chunk: Chunk, scale: float, walk: Walk, *refs: Any) -> None:
    tokens, start, d_out, d_final, d_tokens, d_initial, state, needed, d_state = refs
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        d_state[...] = d_final[...]

    state[...] = start[...]
    pulls = []

    def ahead(i, _):
        state[...], values, pull = _linearized(chunk, state[...], _tiles(walk, tokens, i))
        pulls.append(pull)
        for ref, value in zip(needed, values, strict=True):
            ref[i] = value

    lax.fori_loop(0, walk.chunks, ahead, None)

    def back(step, _):
        i = walk.chunks - 1 - step
        pull = pulls[-1](_tiles(walk, tokens, i), [ref[i] for ref in needed])
        d_state[...], d_tiles = pull((d_state[...], scale * _tiles(walk, d_out, i)))

        def write(ref, d):
            ref[_where(walk, ref, i)] = d.astype(ref.dtype)

        jax.tree.map(write, d_tokens, d_tiles)

    lax.fori_loop(0, walk.chunks, back, None)

    @pl.when(n == walk.blocks - 1)
    def _():
        d_initial[...] = d_state[...]


def forward(
    name: str, chunk: Chunk, scale: float, size: int, tokens: Any, initial: jax.Array, out_like: jax.Array
) -> Any:
    """Walks `chunk` over time from `initial` [B, H, K, V]; `out_like` has the output's shape [B, T, H, V] and dtype.

    Returns:
      out and the final state [B, H, K, V].
    """
    walk = Walk.over(out_like.shape[1], size)
    initial = initial.mT
    batch, heads, width, _ = initial.shape
    tokens = jax.tree.map(partial(_head_first, walk), tokens)
    out = jax.ShapeDtypeStruct((batch, heads, walk.time, width), out_like.dtype)
    specs = partial(jax.tree.map, lambda x: _token_spec(walk, heads, x, lambda n: n))
    out, final = _call(
        partial(_forward_kernel, chunk, scale, walk),
        walk,
        initial,
        f"{name}_forward",
        in_specs=[specs(tokens), _state_spec(initial.shape)],
        out_specs=[specs(out), _state_spec(initial.shape)],
        out_shape=[out, jax.ShapeDtypeStruct(initial.shape, jnp.float32)],
        scratch_shapes=[pltpu.VMEM(initial.shape[2:], jnp.float32)],
    )(tokens, initial)
    return jnp.transpose(out[:, :, : out_like.shape[1]], (0, 2, 1, 3)), final.mT


def backward(
    name: str,
    chunk: Chunk,
    scale: float,
    size: int,
    tokens: Any,
    initial: jax.Array,
    d_out: jax.Array,
    d_final: jax.Array,
) -> Any:
    """Cotangents of `forward`'s results → (those of `tokens`, in their shapes and dtypes, and that of `initial`)."""
    walk = Walk.over(d_out.shape[1], size)
    initial, d_final = initial.mT, d_final.mT
    batch, heads, *tile = initial.shape
    given, tokens = tokens, jax.tree.map(partial(_head_first, walk), tokens)
    d_out = _head_first(walk, d_out)
    step_state = pl.BlockSpec((None, None, None, *tile), lambda b, h, n: (b, h, n, 0, 0))
    starts = _call(
        partial(_states_kernel, chunk, walk),
        walk,
        initial,
        f"{name}_states",
        in_specs=[jax.tree.map(lambda x: _token_spec(walk, heads, x, lambda n: n), tokens), _state_spec(initial.shape)],
        out_specs=step_state,
        out_shape=jax.ShapeDtypeStruct((batch, heads, walk.blocks, *tile), jnp.float32),
        scratch_shapes=[pltpu.VMEM(tile, jnp.float32)],
    )(tokens, initial)

    def last(n):
        return walk.blocks - 1 - n

    def d_like(x):
        dtype = x.dtype if x.shape[1] == heads else jnp.float32
        return jax.ShapeDtypeStruct((batch, heads, *x.shape[2:]), dtype)

    tiles = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((walk.size, x.shape[3]) if x.ndim == 4 else x.shape[3:], jnp.float32), tokens
    )
    needed = jax.eval_shape(lambda *x: _linearized(chunk, *x)[1], jax.ShapeDtypeStruct(tile, jnp.float32), tiles)
    specs = partial(jax.tree.map, lambda x: _token_spec(walk, heads, x, last))
    d_tokens = jax.tree.map(d_like, tokens)
    d_tokens, d_initial = _call(
        partial(_backward_kernel, chunk, scale, walk),
        walk,
        initial,
        f"{name}_backward",
        in_specs=[
            specs(tokens),
            pl.BlockSpec((None, None, None, *tile), lambda b, h, n: (b, h, last(n), 0, 0)),
            specs(d_out),
            _state_spec(initial.shape),
        ],
        out_specs=[specs(d_tokens), _state_spec(initial.shape)],
        out_shape=[d_tokens, jax.ShapeDtypeStruct(initial.shape, jnp.float32)],
        scratch_shapes=[
            pltpu.VMEM(tile, jnp.float32),
            [pltpu.VMEM((walk.chunks, *x.shape), jnp.float32) for x in needed],
            pltpu.VMEM(tile, jnp.float32),
        ],
    )(tokens, starts, d_out, d_final)
    return jax.tree.map(_time_first, d_tokens, given), d_initial.mT
