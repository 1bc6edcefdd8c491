"""Mamba's selective scan: a diagonal recurrence whose states never exist for all tokens at once."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.checks import check_floating, check_segment_ids, check_shape
from kernels.packing import RESET, starts
from kernels.selective_scan import reference as definition
from kernels.selective_scan import tpu, xla


def selective_scan(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t and y_t = C_t · h_t + D u_t (Mamba, 2312.00752, section 3).

    In the shapes, B, T, D, N are batch, time, features and states a feature; every feature d has its own state h_d [N].

    Args:
      u: [B, T, D] input.
      delta: [B, T, D] step sizes, positive; softplus is the caller's.
      A: [D, N], negative: itself, not its log.
      B: [B, T, N] what of the input enters each state.
      C: [B, T, N] how much of each state is read.
      D: [D] of the input that goes straight to the output; none unless given.
      initial_state: [B, D, N], zeros unless given; enters the first segment.
      segment_ids: [B, T] integers; the state starts from zero wherever the id changes.
      implementation: None (best for the platform), "reference", "xla" or "pallas".

    Returns:
      y [B, T, D] in u's dtype, and final_state [B, D, N] in float32 (float64 where an argument is), that of the last
      segment.

    Raises:
      ValueError: an argument of another shape or dtype.
      NotImplementedError: "pallas" where it cannot serve.
    """
    op = "selective_scan"
    sizes = _check(op, u, delta, A, B, C, D, time="T ")
    if initial_state is not None:
        check_shape(op, "initial_state", initial_state, "B D N", sizes)
        check_floating(op, {"initial_state": initial_state})
    check_segment_ids(op, segment_ids, sizes)
    dtype = jnp.promote_types(jnp.result_type(u, delta, A, B, C), jnp.float32)
    dtypes = [jnp.result_type(x) for x in (u, delta, B, C)]
    refusal = tpu.refusal((sizes["B"], sizes["T"], sizes["D"]), sizes["N"], dtypes, dtype)
    dispatch.check_implementation(op, implementation, refusal)
    shape = (sizes["B"], sizes["D"], sizes["N"])
    state = jnp.zeros(shape, dtype) if initial_state is None else jnp.asarray(initial_state, dtype)
    D = jnp.zeros(sizes["D"], dtype) if D is None else D

    if implementation == "reference":
        return definition.selective_scan(u, delta, A, B, C, D, state, segment_ids)
    reset = None if segment_ids is None else jnp.where(starts(segment_ids), RESET, 0.0).astype(dtype)
    y, final_state = _scan(implementation, refusal, u, delta, A.T, B, C, D, state.mT, reset)
    return y, final_state.mT


def selective_scan_step(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    state: jax.Array,
    D: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `selective_scan`, for streaming.

    Args:
      u, delta: [B, D].
      A: [D, N].
      B, C: [B, N].
      state: [B, D, N], zeros or what the operation or a step before handed on.
      D: [D] or None.

    Returns:
      y [B, D] in u's dtype and the new state in the dtype of the operation's.

    Raises:
      ValueError: an argument of another shape or dtype.
    """
    op = "selective_scan_step"
    sizes = _check(op, u, delta, A, B, C, D, time="")
    check_shape(op, "state", state, "B D N", sizes)
    check_floating(op, {"state": state})
    dtype = jnp.promote_types(jnp.result_type(u, delta, A, B, C), jnp.float32)
    D = jnp.zeros(sizes["D"], dtype) if D is None else D
    u, delta, B, C = (x[:, None] for x in (u, delta, B, C))
    y, state = definition.selective_scan(u, delta, A, B, C, D, jnp.asarray(state, dtype), None)
    return y[:, 0], state


def _check(
    op: str,
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    *,
    time: str,
) -> dict[str, int]:
    """The sizes of B, (T,) D and N; raises ValueError for an argument of another shape or dtype."""
    sizes: dict[str, int] = {}
    check_shape(op, "u", u, f"B {time}D", sizes)
    check_shape(op, "delta", delta, f"B {time}D", sizes)
    check_shape(op, "A", A, "D N", sizes)
    check_shape(op, "B", B, f"B {time}N", sizes)
    check_shape(op, "C", C, f"B {time}N", sizes)
    if D is not None:
        check_shape(op, "D", D, "D", sizes)
    check_floating(op, {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D})
    return sizes


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(implementation, refusal, *arrays):
    return dispatch.run(implementation, refusal, xla.forward, tpu.forward, *arrays)


def _scan_forward(implementation, refusal, *arrays):
    return _scan(implementation, refusal, *arrays), arrays


def _scan_backward(implementation, refusal, arrays, cotangents):
    gradients = dispatch.run(implementation, refusal, xla.backward, tpu.backward, *arrays, *cotangents)
    wanted = (x.astype(array.dtype) for x, array in zip(gradients, arrays, strict=False))
    return *wanted, None


_scan.defvjp(_scan_forward, _scan_backward)
