"""The selective scan as Pallas TPU kernels: outputs, block-start states, and the backward pass from those.

The grid runs over sequences, tiles of features and, in order, blocks of time. A state is a tile [N, F], states in
sublanes and features in lanes, and waits in scratch memory from block to block. What a token has for every state (a row
of B or C) is turned into a column, what it has for every feature is a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

STEP = 16  # tokens between loads and stores: a whole tile also in bfloat16
BLOCK = 128  # tokens whose states the backward pass holds
# Elements of a state tile, at most. Half as many spill hardly any registers, but take half as many bundles again.
STATE = 16 * 512

Pair = tuple[Any, pl.BlockSpec]


def refusal(u_shape: tuple[int, int, int], states: int, dtypes: Sequence[Any], dtype: jnp.dtype) -> str | None:
    """Why these kernels do not serve u [B, T, D], so many states a feature and a state of `dtype`, or None.

    `dtypes` are those of the arrays over time.
    """
    batch, time, features = u_shape
    if dtype != jnp.float32:
        return f"state and accumulation are float32, these arguments need {dtype}"
    if jnp.float16 in dtypes:
        return "a TPU has no float16"
    if batch == 0 or time == 0 or features % 128 or states % 8 or not 0 < states <= 64 or not features:
        return (
            f"{batch} sequences of {time} tokens, {features} features, {states} states, needs at least one token, a "
            "multiple of 128 features and of 8 states, at most 64"
        )
    return None


@dataclass(frozen=True)
class _Tokens:
    """What sixteen tokens bring: u, delta [16, F], B [N, 16], log decays to add [16, 1]."""

    u: jax.Array
    delta: jax.Array
    B: jax.Array
    reset: jax.Array | None

    def decay(self, n: int, A: jax.Array) -> jax.Array:
        log_decay = _row(self.delta, n) * A
        return jnp.exp(log_decay if self.reset is None else log_decay + _row(self.reset, n))

    def added(self, n: int) -> jax.Array:
        return _column(self.B, n) * (_row(self.delta, n) * _row(self.u, n))


@dataclass(frozen=True)
class _Block:
    """The refs of a block of tokens; those from `left` on lie behind the end of time (None where there are none)."""

    u: Any
    delta: Any
    B: Any
    reset: Any | None
    left: Any | None

    def read(self, ref: Any, start: Any) -> jax.Array:
        """Sixteen tokens in float32; behind the end of time 0, which changes no state."""
        x = ref[pl.ds(start, STEP), :].astype(jnp.float32)
        if self.left is None:
            return x
        return jnp.where(start + lax.broadcasted_iota(jnp.int32, x.shape, 0) < self.left, x, 0.0)

    def tokens(self, start: Any) -> _Tokens:
        reset = None if self.reset is None else self.read(self.reset, start)
        return _Tokens(self.read(self.u, start), self.read(self.delta, start), self.read(self.B, start).T, reset)


def _row(x: jax.Array, n: int) -> jax.Array:
    return x[n : n + 1]


def _column(x: jax.Array, n: int) -> jax.Array:
    return x[:, n : n + 1]


def _groups(size: int, body: Callable[[Any, Any], Any], carry: Any, *, reverse: bool = False) -> Any:
    """Runs `body(start, carry)` for every sixteen tokens of a block."""
    count = size // STEP
    return lax.fori_loop(
        0, count, lambda i, c: body(pl.multiple_of((count - 1 - i if reverse else i) * STEP, STEP), c), carry
    )


def _left(time: int, size: int, block: Any) -> Any | None:
    return time - block * size if time % size else None


def _forward_kernel(time: int, *refs: Any) -> None:
    """Refs: u, delta, B, [reset,] C, A, D, initial state; y, state so far; sixteen rows."""
    u, delta, B, *reset, C, A, D, initial, y, final, rows = refs
    size = u.shape[0]
    block = _Block(u, delta, B, reset[0] if reset else None, _left(time, size, pl.program_id(2)))

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        final[...] = initial[...]

    def step(start: Any, state: jax.Array) -> jax.Array:
        tokens, c = block.tokens(start), block.read(C, start).T
        for n in range(STEP):
            state = tokens.decay(n, A[...]) * state + tokens.added(n)
            rows[n : n + 1, :] = jnp.sum(_column(c, n) * state, 0, keepdims=True)
        y[pl.ds(start, STEP), :] = (rows[...] + D[...] * tokens.u).astype(y.dtype)
        return state

    final[...] = _groups(size, step, final[...])


def _starts_kernel(time: int, *refs: Any) -> None:
    """Refs: u, delta, B, [reset,] A, initial state; the state at the block's start; waiting state."""
    u, delta, B, *reset, A, initial, start_state, waiting = refs
    size = u.shape[0]
    block = _Block(u, delta, B, reset[0] if reset else None, _left(time, size, pl.program_id(2)))

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        waiting[...] = initial[...]

    def step(start: Any, state: jax.Array) -> jax.Array:
        tokens = block.tokens(start)
        for n in range(STEP):
            state = tokens.decay(n, A[...]) * state + tokens.added(n)
        return state

    start_state[...] = waiting[...]
    waiting[...] = _groups(size, step, waiting[...])


def _backward_kernel(time: int, *refs: Any) -> None:
    """Refs: u, delta, B, [reset,] C, d_y, A, D, start state, d_final; d_u, d_delta, d_B, d_C, d_A, d_initial;
    states, two times sixteen rows.
    """
    *inputs, d_u, d_delta, d_B, d_C, d_A, d_initial, states, rows = refs
    u, delta, B, *reset, C, d_y, A, D, start_state, d_final = inputs
    size = u.shape[0]
    number = pl.num_programs(2) - 1 - pl.program_id(2)
    block = _Block(u, delta, B, reset[0] if reset else None, _left(time, size, number))

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        d_initial[...] = d_final[...]
        d_A[...] = jnp.zeros_like(d_A)

    def again(start: Any, state: jax.Array) -> jax.Array:
        tokens = block.tokens(start)
        for n in range(STEP):
            states[start + n] = state
            state = tokens.decay(n, A[...]) * state + tokens.added(n)
        return state

    states[size] = _groups(size, again, start_state[...])

    def step(start: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        later, sum_A = carry
        tokens, c, d_out = block.tokens(start), block.read(C, start).T, block.read(d_y, start)
        lane = lax.broadcasted_iota(jnp.int32, tokens.B.shape, 1)
        for_B = for_C = jnp.zeros_like(tokens.B)
        for n in reversed(range(STEP)):
            delta, d_row = _row(tokens.delta, n), _row(d_out, n)
            d_state = later + _column(c, n) * d_row
            later = tokens.decay(n, A[...]) * d_state
            d_log_decay = later * states[start + n]
            sum_A += d_log_decay * delta
            rows[0, n : n + 1, :] = jnp.sum(d_state * _column(tokens.B, n), 0, keepdims=True)
            rows[1, n : n + 1, :] = jnp.sum(d_log_decay * A[...], 0, keepdims=True)
            added_B = jnp.sum(d_state * (delta * _row(tokens.u, n)), 1, keepdims=True)
            for_B = jnp.where(lane == n, added_B, for_B)
            for_C = jnp.where(lane == n, jnp.sum(states[start + n + 1] * d_row, 1, keepdims=True), for_C)
        here = pl.ds(start, STEP)
        d_u[here, :] = (rows[0] * tokens.delta + D[...] * d_out).astype(d_u.dtype)
        d_delta[here, :] = (rows[0] * tokens.u + rows[1]).astype(d_delta.dtype)
        d_B[here, :] = for_B.T
        d_C[here, :] = for_C.T
        return later, sum_A

    d_initial[...], d_A[...] = _groups(size, step, (d_initial[...], d_A[...]), reverse=True)


@dataclass(frozen=True)
class _Grid:
    """Sequences × tiles of features × blocks of time, and which part of each array belongs to a place in it."""

    batch: int
    time: int
    features: int
    states: int
    reverse: bool = False

    @property
    def size(self) -> int:
        return min(BLOCK, pl.cdiv(self.time, STEP) * STEP)

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.time, self.size)

    @property
    def width(self) -> int:
        """The widest tile of features that divides them and whose state is not too large."""
        fitting = [w for w in (512, 256, 128) if self.features % w == 0 and self.states * w <= STATE]
        return fitting[0] if fitting else 128

    def _spec(self, shape: tuple[int | None, ...], place: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda b, f, n: place(b, f, self.blocks - 1 - n if self.reverse else n))

    def by_feature(self) -> pl.BlockSpec:
        """[B, T, D]"""
        return self._spec((None, self.size, self.width), lambda b, f, n: (b, n, f))

    def by_token(self, width: int) -> pl.BlockSpec:
        """[B, T, width]"""
        return self._spec((None, self.size, width), lambda b, f, n: (b, n, 0))

    def partial_by_token(self) -> pl.BlockSpec:
        """[B, D / width, T, N]"""
        return self._spec((None, None, self.size, self.states), lambda b, f, n: (b, f, n, 0))

    def constant(self, rows: int) -> pl.BlockSpec:
        """[rows, D]"""
        return self._spec((rows, self.width), lambda b, f, n: (0, f))

    def state(self) -> pl.BlockSpec:
        """[B, N, D]"""
        return self._spec((None, self.states, self.width), lambda b, f, n: (b, 0, f))

    def start_states(self) -> pl.BlockSpec:
        """[B, blocks, N, D]"""
        return self._spec((None, None, self.states, self.width), lambda b, f, n: (b, n, 0, f))

    def call(
        self,
        kernel: Callable[..., None],
        inputs: Sequence[Pair],
        outputs: Sequence[Pair],
        scratch: Sequence[tuple[int, ...]],
    ) -> list[jax.Array]:
        """Inputs and outputs are pairs of an array (or its shape and dtype) and its spec; scratch lacks a width."""
        arrays, in_specs = zip(*inputs, strict=True)
        shapes, out_specs = zip(*outputs, strict=True)
        return pl.pallas_call(
            partial(kernel, self.time),
            grid=(self.batch, self.features // self.width, self.blocks),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=shapes,
            scratch_shapes=[pltpu.VMEM((*shape, self.width), jnp.float32) for shape in scratch],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            name=f"selective_scan{kernel.__name__.removesuffix('_kernel')}",
        )(*arrays)


def _inputs(grid: _Grid, u: jax.Array, delta: jax.Array, B: jax.Array, reset: jax.Array | None) -> list[Pair]:
    inputs = [(u, grid.by_feature()), (delta, grid.by_feature()), (B, grid.by_token(grid.states))]
    return inputs if reset is None else [*inputs, (reset[..., None], grid.by_token(1))]


def forward(u, delta, A, B, C, D, initial_state, reset):
    """As the XLA form's."""
    grid = _Grid(u.shape[0], u.shape[1], u.shape[2], A.shape[0])
    A, D = A.astype(jnp.float32), D.astype(jnp.float32)[None]
    inputs = [
        *_inputs(grid, u, delta, B, reset),
        (C, grid.by_token(grid.states)),
        (A, grid.constant(grid.states)),
        (D, grid.constant(1)),
        (initial_state, grid.state()),
    ]
    outputs = [(_like(u), grid.by_feature()), (_like(initial_state), grid.state())]
    return tuple(grid.call(_forward_kernel, inputs, outputs, [(STEP,)]))


def backward(u, delta, A, B, C, D, initial_state, reset, d_y, d_final):
    """As the XLA form's."""
    grid = _Grid(u.shape[0], u.shape[1], u.shape[2], A.shape[0])
    A, D = A.astype(jnp.float32), D.astype(jnp.float32)[None]
    inputs = [
        *_inputs(grid, u, delta, B, reset),
        (A, grid.constant(grid.states)),
        (initial_state, grid.state()),
    ]
    shape = (grid.batch, grid.blocks, grid.states, grid.features)
    (start_states,) = grid.call(
        _starts_kernel, inputs, [(jax.ShapeDtypeStruct(shape, jnp.float32), grid.start_states())], [(grid.states,)]
    )

    grid = replace(grid, reverse=True)
    tokens = (grid.by_token(grid.states), grid.by_feature())
    inputs = [
        *_inputs(grid, u, delta, B, reset),
        (C, tokens[0]),
        (d_y, tokens[1]),
        (A, grid.constant(grid.states)),
        (D, grid.constant(1)),
        (start_states, grid.start_states()),
        (d_final, grid.state()),
    ]
    shape = (grid.batch, grid.features // grid.width, grid.time, grid.states)
    partial_sums = (jax.ShapeDtypeStruct(shape, jnp.float32), grid.partial_by_token())
    state = (_like(initial_state), grid.state())
    outputs = [(_like(u), tokens[1]), (_like(delta), tokens[1]), partial_sums, partial_sums, state, state]
    scratch = [(grid.size + 1, grid.states), (2, STEP)]
    d_u, d_delta, d_B, d_C, d_A, d_initial = grid.call(_backward_kernel, inputs, outputs, scratch)
    d_D = jnp.sum(d_y.astype(jnp.float32) * u.astype(jnp.float32), (0, 1))
    d_B, d_C = (jnp.sum(d, 1).astype(x.dtype) for d, x in ((d_B, B), (d_C, C)))
    return d_u, d_delta, jnp.sum(d_A, 0), d_B, d_C, d_D, d_initial


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
