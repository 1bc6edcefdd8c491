"""The linear scan as Pallas TPU kernels: one for the states, one that runs the cotangents back.

The grid runs over sequences, tiles of features and, in order, blocks of time; the state waits in scratch memory from
block to block. Rows are tokens: eight at a time are combined by doubling, then meet the state. Numbers are lists of one
part (real) or two (real and imaginary), as a TPU kernel has no complex ones.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Parts = list[jax.Array]
Give = Callable[[list[Parts], Parts, Parts], list[Parts]]

ROWS = 8  # of a vector register
STEP = 16  # tokens between loads and stores, a whole tile also in bfloat16
BLOCK = 512  # tokens
FEATURES = 512
MIN_FEATURES = 32  # fewer leave most of a register's 128 lanes empty
ONE = (1.0, 0.0)  # real and imaginary part


def refusal(x_shape: tuple[int, int, int], x_dtype: jnp.dtype, dtype: jnp.dtype) -> str | None:
    """Why these kernels do not serve x [B, T, F] and a state of `dtype`, or None where they do."""
    batch, time, features = x_shape
    if dtype not in (jnp.float32, jnp.complex64):
        return f"state and accumulation are float32 or complex64, these arguments need {dtype}"
    if x_dtype == jnp.float16:
        return "a TPU has no float16"
    if batch == 0 or time == 0 or features < MIN_FEATURES:
        return f"{batch} sequences of {time} tokens with {features} features, needs at least 1, 1 and {MIN_FEATURES}"
    return None


def _multiply(a: Parts, b: Parts) -> Parts:
    if len(a) == 1:
        return [a[0] * b[0]]
    return [a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]]


def _add(a: Parts, b: Parts) -> Parts:
    return [p + q for p, q in zip(a, b, strict=True)]


def _scan_rows(x: Parts, decay: Parts, state: Parts, reverse: bool) -> tuple[Parts, Parts, Parts]:
    """x, decay [8, F] and the state [1, F] before → (the states after each token, before each token, after all)."""
    row = lax.broadcasted_iota(jnp.int32, x[0].shape, 0)
    if reverse:
        row = ROWS - 1 - row
    sum_, product = x, decay
    for distance in (1, 2, 4):
        shift = ROWS - distance if reverse else distance
        met = row >= distance
        earlier = [jnp.where(met, pltpu.roll(p, shift, 0), 0.0) for p in sum_]
        sum_ = _add(sum_, _multiply(product, earlier))
        earlier = [jnp.where(met, pltpu.roll(p, shift, 0), n) for p, n in zip(product, ONE, strict=False)]
        product = _multiply(product, earlier)
    after = _add(sum_, _multiply(product, state))
    shift = ROWS - 1 if reverse else 1
    before = [jnp.where(row == 0, s, pltpu.roll(p, shift, 0)) for s, p in zip(state, after, strict=True)]
    last = 0 if reverse else ROWS - 1
    return after, before, [p[last : last + 1] for p in after]


def _after(arrays: list[Parts], after: Parts, before: Parts) -> list[Parts]:
    return [after]


def _before(arrays: list[Parts], after: Parts, before: Parts) -> list[Parts]:
    return [before]


def _cotangents(arrays: list[Parts], after: Parts, before: Parts) -> list[Parts]:
    """The scan ran over decay · d_y: before a token it is what comes back to its state, after it what goes on back."""
    d_y, _, state_before = arrays
    return [_add(d_y, before), _multiply(after, state_before)]


def _kernel(give: Give, reverse: bool, time: int, parts: int, counts: tuple[int, int], *refs: Any) -> None:
    """One block of time. refs: inputs [C, F], initial state [1, F], outputs [C, F], final state, waiting state.

    The inputs are x (or d_y) and the decay, then whatever else `give` makes the outputs of.
    """
    groups = [list(refs[i : i + parts]) for i in range(0, len(refs), parts)]
    inputs, outputs = groups[: counts[0]], groups[counts[0] + 1 : -2]
    initial, final, waiting = groups[counts[0]], *groups[-2:]
    size, features = inputs[0][0].shape
    n = pl.program_id(2)
    first = (pl.num_programs(2) - 1 - n if reverse else n) * size

    @pl.when(n == 0)
    def _() -> None:
        for to, source in zip(waiting, initial, strict=True):
            to[...] = source[...]

    def read(start: Any) -> list[Parts]:
        arrays = [[ref[pl.ds(start, STEP), :].astype(jnp.float32) for ref in group] for group in inputs]
        if parts == 1:
            arrays[1] = [jnp.exp(arrays[1][0])]
        if time % size:
            token = first + start + lax.broadcasted_iota(jnp.int32, (STEP, features), 0)
            arrays[0] = [jnp.where(token < time, p, 0.0) for p in arrays[0]]
            arrays[1] = [jnp.where(token < time, p, n) for p, n in zip(arrays[1], ONE, strict=False)]
        return arrays

    def step(i: Any, state: Parts) -> Parts:
        start = pl.multiple_of((size // STEP - 1 - i if reverse else i) * STEP, STEP)
        arrays, given = read(start), {}
        for row in sorted(range(0, STEP, ROWS), reverse=reverse):
            rows = [[p[row : row + ROWS] for p in array] for array in arrays]
            x = _multiply(*rows[:2]) if give is _cotangents else rows[0]
            after, before, state = _scan_rows(x, rows[1], state, reverse)
            given[row] = give(rows, after, before)
        for group, *halves in zip(outputs, *(given[row] for row in sorted(given)), strict=True):
            for ref, *half in zip(group, *halves, strict=True):
                ref[pl.ds(start, STEP), :] = jnp.concatenate(half, 0).astype(ref.dtype)
        return state

    state = lax.fori_loop(0, size // STEP, step, [ref[...] for ref in waiting])
    for to, also, value in zip(waiting, final, state, strict=True):
        to[...] = value
        also[...] = value


def _call(
    give: Give, reverse: bool, inputs: list[Parts], initial: Parts, dtypes: list[jnp.dtype]
) -> tuple[list[Parts], Parts]:
    """Inputs [B, T, F] and initial state [B, F] → outputs [B, T, F] of `dtypes` and the final state [B, F]."""
    batch, time, features = inputs[0][0].shape
    parts = len(initial)
    size = min(BLOCK // parts, pl.cdiv(time, STEP) * STEP)
    width = min(features, FEATURES // parts)
    blocks = pl.cdiv(time, size)
    over_time = pl.BlockSpec((None, size, width), lambda b, f, n: (b, blocks - 1 - n if reverse else n, f))
    once = pl.BlockSpec((None, 1, width), lambda b, f, n: (b, 0, f))
    outputs = [jax.ShapeDtypeStruct((batch, time, features), dtype) for dtype in dtypes for _ in range(parts)]
    state = [jax.ShapeDtypeStruct((batch, 1, features), jnp.float32)] * parts
    results = pl.pallas_call(
        partial(_kernel, give, reverse, time, parts, (len(inputs), len(dtypes))),
        grid=(batch, pl.cdiv(features, width), blocks),
        in_specs=[over_time] * (len(inputs) * parts) + [once] * parts,
        out_specs=[over_time] * len(outputs) + [once] * parts,
        out_shape=outputs + state,
        scratch_shapes=[pltpu.VMEM((1, width), jnp.float32)] * parts,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name=f"linear_scan{give.__name__}",
    )(*(p for array in inputs for p in array), *(p[:, None] for p in initial))
    groups = [list(results[i : i + parts]) for i in range(0, len(results), parts)]
    return groups[:-1], [p[:, 0] for p in groups[-1]]


def _parts(x: jax.Array) -> Parts:
    return [x.real, x.imag] if jnp.iscomplexobj(x) else [x]


def _joined(parts: Parts) -> jax.Array:
    return lax.complex(*parts) if len(parts) == 2 else parts[0]


def _decay(x: jax.Array, log_decay: jax.Array) -> Parts:
    """The decay's real and imaginary part, or the log of a real one: the kernel's exp is real."""
    log_decay = jnp.broadcast_to(log_decay, x.shape)
    return _parts(jnp.exp(log_decay).astype(x.dtype)) if jnp.iscomplexobj(x) else [log_decay]


def forward(reverse: bool, x: jax.Array, log_decay: jax.Array, initial_state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [B, T, F], log_decay [1, 1, F] or [B, T, F], initial_state [B, F] → (y [B, T, F], final_state [B, F])."""
    x_parts = _parts(x)
    (y,), final = _call(_after, reverse, [x_parts, _decay(x, log_decay)], _parts(initial_state), [x_parts[0].dtype])
    return _joined(y), _joined(final)


def backward(
    reverse: bool, x: jax.Array, log_decay: jax.Array, initial_state: jax.Array, d_y: jax.Array, d_final: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of (y, final_state) → those of x, of log_decay ([B, T, F], not yet summed) and of initial_state."""
    x_parts, decay = _parts(x), _decay(x, log_decay)
    (before,), _ = _call(_before, reverse, [x_parts, decay], _parts(initial_state), [jnp.float32])
    dtypes = [x_parts[0].dtype, jnp.float32]
    (d_x, d_log_decay), d_initial = _call(
        _cotangents, not reverse, [_parts(d_y), decay, before], _parts(d_final), dtypes
    )
    return _joined(d_x), _joined(d_log_decay), _joined(d_initial)
