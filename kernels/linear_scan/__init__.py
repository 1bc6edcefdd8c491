"""The linear recurrence h_t = exp(log_decay_t) h_{t-1} + x_t, real or complex, in either direction of time."""

from functools import partial
from math import prod

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.checks import check_floating, check_segment_ids
from kernels.linear_scan import reference as definition
from kernels.linear_scan import tpu, xla
from kernels.packing import RESET, starts


def linear_scan(
    x: jax.Array,
    log_decay: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    reverse: bool = False,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """h_t = exp(log_decay_t) h_{t-1} + x_t for every feature on its own.

    The recurrence of S4D (2206.11893) and S5 (2208.04933) with constant complex decays, of RG-LRU (2402.19427) with
    one a token.

    Args:
      x: [B, T, *F] with any number of feature axes, floating or complex.
      log_decay: of a shape that broadcasts to x's, such as [*F] for constant decays; floating or complex, the real part
        at most 0. A real part of -inf forgets the state.
      initial_state: [B, *F], zeros unless given. Enters the first segment (the last one where reversed).
      reverse: runs from the end of time to its start: h_t = exp(log_decay_t) h_{t+1} + x_t.
      segment_ids: [B, T] integers; the state starts from zero wherever the id changes.
      implementation: None (best for the platform), "reference", "xla" or "pallas".

    Returns:
      y [B, T, *F], all h_t, in x's dtype (complex where an argument is), and final_state [B, *F], h_{T-1} (h_0 where
      reversed), in float32 or complex64 (float64 or complex128 where an argument has that precision).

    Raises:
      ValueError: an argument of another shape or dtype.
      NotImplementedError: "pallas" where it cannot serve.
    """
    op = "linear_scan"
    x, log_decay, dtype = _check(op, x, log_decay, initial_state, leading="B T")
    batch, time, *features = x.shape
    check_segment_ids(op, segment_ids, {"B": batch, "T": time})
    refusal = tpu.refusal((batch, time, prod(features)), x.dtype, dtype)
    dispatch.check_implementation(op, implementation, refusal)
    state = jnp.zeros((batch, *features), dtype) if initial_state is None else jnp.asarray(initial_state, dtype)

    if implementation == "reference":
        return definition.linear_scan(x, log_decay, state, segment_ids, reverse=reverse)
    log_decay = _with_resets(log_decay, segment_ids, reverse)
    leading = (1, 1) if log_decay.shape[:2] == (1, 1) else (batch, time)
    y, final_state = _scan(
        implementation,
        refusal,
        reverse,
        x.reshape(batch, time, -1),
        jnp.broadcast_to(log_decay, (*leading, *features)).reshape(*leading, -1),
        state.reshape(batch, -1),
    )
    return y.reshape(x.shape), final_state.reshape(state.shape)


def linear_scan_step(x: jax.Array, log_decay: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One token of `linear_scan`, for streaming.

    Args:
      x: [B, *F].
      log_decay: of a shape that broadcasts to x's.
      state: [B, *F], zeros or what the operation or a step before handed on.

    Returns:
      y [B, *F] in x's dtype (complex where an argument is) and the new state in the dtype of the operation's.

    Raises:
      ValueError: an argument of another shape or dtype.
    """
    x, log_decay, dtype = _check("linear_scan_step", x, log_decay, state, leading="B")
    state = jnp.exp(log_decay) * jnp.asarray(state, dtype) + x.astype(dtype)
    return state.astype(x.dtype), state


def _check(
    op: str, x: jax.Array, log_decay: jax.Array, state: jax.Array | None, *, leading: str
) -> tuple[jax.Array, jax.Array, jnp.dtype]:
    """(x in the result's dtype, log_decay in at least float32 with as many axes as x, the state's dtype).

    Raises:
      ValueError: an argument of another shape or dtype.
    """
    axes = len(leading.split())
    if jnp.ndim(x) < axes:
        raise ValueError(f"{op}: x: got shape {jnp.shape(x)}, wanted [{', '.join(leading.split())}, *F]")
    check_floating(
        op, {"x": x, "log_decay": log_decay, "state" if axes == 1 else "initial_state": state}, complex_too=True
    )
    x, log_decay = jnp.asarray(x), jnp.asarray(log_decay)
    fits = log_decay.ndim <= x.ndim and all(
        got in (1, wanted) for got, wanted in zip(log_decay.shape[::-1], x.shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(f"{op}: log_decay: got shape {log_decay.shape}, wanted one that broadcasts to x's {x.shape}")
    log_decay = log_decay.astype(jnp.promote_types(log_decay.dtype, jnp.float32))
    log_decay = log_decay.reshape((1,) * (x.ndim - log_decay.ndim) + log_decay.shape)
    arrays = (x, log_decay) if state is None else (x, log_decay, state)
    dtype = jnp.result_type(*arrays)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        x = x.astype(dtype)
    if state is not None and jnp.shape(state) != (x.shape[0], *x.shape[axes:]):
        name = "state" if axes == 1 else "initial_state"
        raise ValueError(f"{op}: {name}: got shape {jnp.shape(state)}, wanted {(x.shape[0], *x.shape[axes:])}")
    return x, log_decay, dtype


def _with_resets(log_decay: jax.Array, segment_ids: jax.Array | None, reverse: bool) -> jax.Array:
    """Log decay whose exp is 0 where a segment starts."""
    if segment_ids is None:
        return log_decay
    fresh = jnp.flip(starts(jnp.flip(segment_ids, 1)), 1) if reverse else starts(segment_ids)
    reset = jnp.where(fresh, RESET, 0.0).astype(log_decay.real.dtype)
    return log_decay + reset.reshape(*reset.shape, *(1,) * (log_decay.ndim - 2))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scan(implementation, refusal, reverse, x, log_decay, initial_state):
    run = partial(dispatch.run, implementation, refusal)
    return run(partial(xla.forward, reverse), partial(tpu.forward, reverse), x, log_decay, initial_state)


def _scan_forward(implementation, refusal, reverse, *arrays):
    return _scan(implementation, refusal, reverse, *arrays), arrays


def _scan_backward(implementation, refusal, reverse, arrays, cotangents):
    run = partial(dispatch.run, implementation, refusal)
    d_x, d_log_decay, d_initial = run(
        partial(xla.backward, reverse), partial(tpu.backward, reverse), *arrays, *cotangents
    )
    log_decay = arrays[1]
    if not jnp.iscomplexobj(log_decay):
        d_log_decay = d_log_decay.real
    if log_decay.shape[:2] == (1, 1):
        d_log_decay = jnp.sum(d_log_decay, (0, 1), keepdims=True)
    return d_x, d_log_decay, d_initial


_scan.defvjp(_scan_forward, _scan_backward)
