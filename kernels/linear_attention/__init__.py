"""Linear attention with optional decay: retention, gated linear attention, SSD, both directions, packed sequences."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.checks import check_chunk_size, check_segment_ids
from kernels.chunks import compute_dtype
from kernels.heads import canonical, canonical_token, repeat_heads
from kernels.linear_attention import reference, tpu, xla
from kernels.linear_attention.form import Form
from kernels.packing import starts, with_resets


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    scale: float | None = None,
    causal: bool = True,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_tᵀ and out_t = scale · S_tᵀ q_t, for every head.

    Without decay this is the linear attention of Katharopoulos et al. (2006.16236, unnormalised), with one decay a head
    retention (2307.08621), with one a token and head SSD (2405.21060; pass scale=1) or simple gated linear attention,
    with one a key channel GLA (2312.06635) and LightNet (2405.21022).

    Args:
      q: [B, T, Hq, K] queries.
      k: [B, T, Hk, K] keys.
      v: [B, T, Hv, V] values. H is the largest of the head counts; each of them divides it and serves H / count
        neighbouring heads.
      log_decay: None, [H], [B, T, Hg] or [B, T, Hg, K] with Hg dividing H; at most 0. -inf forgets the state.
      scale: of the output; K**-0.5 unless given.
      causal: False also lets a token see later ones: its output gains scale · S'_tᵀ q_t of the recurrence run backwards
        in time over the tokens after it, in which token j > t has decayed by exp(log_decay_t + … + log_decay_{j-1}).
        `initial_state` and `final_state` remain those of the forward direction.
      initial_state: [B, H, K, V], zeros unless given; enters the first segment.
      segment_ids: [B, T] integers; the state starts from zero wherever the id changes.
      chunk_size: tokens worked on together, a power of two; 64 unless given. Changes the speed, not the result.
      implementation: None (best for the platform), "reference", "xla" or "pallas".

    Returns:
      out [B, T, H, V] in v's dtype, and final_state [B, H, K, V] in float32 (float64 where an input is), that of the
      last segment.

    Raises:
      ValueError: an argument of another shape or dtype.
      NotImplementedError: "pallas" where it cannot serve.
    """
    op = "linear_attention"
    given = canonical(op, {"q": q, "k": k, "v": v}, log_decay, initial_state, scale)
    check_segment_ids(op, segment_ids, given.sizes)
    chunk_size = check_chunk_size(op, chunk_size)
    refusal = tpu.refusal(given.sizes["K"], given.sizes["V"], chunk_size, jnp.result_type(q, k, v))
    dispatch.check_implementation(op, implementation, refusal)
    log_decay, initial_state, scale = given.log_decay, given.state, given.scale

    if implementation == "reference":
        q, k, v, log_decay = (repeat_heads(x, given.sizes["H"]) for x in (q, k, v, log_decay))
        return reference.linear_attention(q, k, v, log_decay, initial_state, segment_ids, scale=scale, causal=causal)
    if not causal and log_decay is None and segment_ids is None and implementation != "pallas":
        return _all_to_all(q, k, v, initial_state, scale)

    attend = partial(_attend, implementation, refusal)
    fresh = None if segment_ids is None else starts(segment_ids)
    out, final_state = attend(Form(scale, chunk_size), q, k, v, with_resets(log_decay, fresh), initial_state)
    if not causal:
        back = [jnp.flip(x, 1) for x in (q, k, v)]
        log_decay = None if log_decay is None else jnp.flip(log_decay, 1)
        fresh = None if segment_ids is None else starts(jnp.flip(segment_ids, 1))
        nothing = jnp.zeros_like(initial_state)
        later, _ = attend(Form(scale, chunk_size, own=False), *back, with_resets(log_decay, fresh), nothing)
        out += jnp.flip(later, 1)
    return out, final_state


def linear_attention_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `linear_attention`, for streaming.

    Args:
      q, k, v: [B, Hq, K], [B, Hk, K], [B, Hv, V].
      state: [B, H, K, V], zeros or what the operation or a step before handed on.
      log_decay: None, [H], [B, Hg] or [B, Hg, K].
      scale: as in the operation.

    Returns:
      out [B, H, V] in v's dtype and the new state in the state's dtype.

    Raises:
      ValueError: an argument of another shape or dtype.
    """
    given = canonical_token("linear_attention_step", {"q": q, "k": k, "v": v}, log_decay, state, scale)
    token = (q[:, None], k[:, None], v[:, None], given.log_decay)
    q, k, v, log_decay = (repeat_heads(x, given.sizes["H"]) for x in token)
    out, state = reference.linear_attention(q, k, v, log_decay, given.state, None, scale=given.scale, causal=True)
    return out[:, 0], state


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(implementation, refusal, form, q, k, v, log_decay, initial_state):
    run = partial(dispatch.run, implementation, refusal)
    return run(partial(xla.forward, form), partial(tpu.forward, form), q, k, v, log_decay, initial_state)


def _attend_forward(implementation, refusal, form, *arrays):
    return _attend(implementation, refusal, form, *arrays), arrays


def _attend_backward(implementation, refusal, form, arrays, cotangents):
    run = partial(dispatch.run, implementation, refusal)
    return run(partial(xla.backward, form), partial(tpu.backward, form), *arrays, *cotangents)


_attend.defvjp(_attend_forward, _attend_backward)


def _all_to_all(
    q: jax.Array, k: jax.Array, v: jax.Array, initial_state: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Both directions without decay: every token reads the sum over all of them."""
    dtype, precision = compute_dtype(q, k, v)
    q, k, v_ = (repeat_heads(x, initial_state.shape[1]).astype(dtype) for x in (q, k, v))
    state = initial_state + jnp.einsum("bthk,bthv->bhkv", k, v_, precision=precision)
    out = scale * jnp.einsum("bthk,bhkv->bthv", q, state, precision=precision)
    return out.astype(v.dtype), state
