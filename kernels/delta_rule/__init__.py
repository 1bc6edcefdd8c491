"""The delta rule: DeltaNet, Gated DeltaNet and KDA, with packed sequences, state hand-over and streaming."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.checks import check_chunk_size, check_segment_ids
from kernels.delta_rule import reference, tpu, xla
from kernels.delta_rule.form import Form
from kernels.heads import canonical, canonical_token, repeat_heads
from kernels.packing import starts, with_resets


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """S_t = (I − beta_t k_t k_tᵀ) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_tᵀ; out_t = scale · S_tᵀ q_t.

    Without decay DeltaNet (Yang et al. 2406.06484), with one decay a token and head Gated DeltaNet (2412.06464), with
    one a key channel KDA (2510.26692). The state decays before the error is taken. Keys are used as given: the papers
    normalise them to length one, which keeps the recurrence stable for beta in (0, 2).

    Args:
      q: [B, T, Hq, K] queries.
      k: [B, T, Hk, K] keys.
      v: [B, T, Hv, V] values. H is the largest of the head counts; each of them divides it and serves H / count
        neighbouring heads.
      beta: [B, T, Hb] strengths of the correction.
      log_decay: None, [H], [B, T, Hg] or [B, T, Hg, K] with Hg dividing H; at most 0. -inf forgets the state.
      scale: of the output; K**-0.5 unless given.
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
    op = "delta_rule"
    given = canonical(op, {"q": q, "k": k, "v": v, "beta": beta}, log_decay, initial_state, scale)
    check_segment_ids(op, segment_ids, given.sizes)
    form = Form(given.scale, check_chunk_size(op, chunk_size))
    refusal = tpu.refusal(given.sizes["K"], given.sizes["V"], form.chunk_size, jnp.result_type(q, k, v))
    dispatch.check_implementation(op, implementation, refusal)

    if implementation == "reference":
        q, k, v, beta, log_decay = (repeat_heads(x, given.sizes["H"]) for x in (q, k, v, beta, given.log_decay))
        return reference.delta_rule(q, k, v, beta, log_decay, given.state, segment_ids, scale=given.scale)
    log_decay = with_resets(given.log_decay, None if segment_ids is None else starts(segment_ids))
    return _correct(implementation, refusal, form, q, k, v, beta, log_decay, given.state)


def delta_rule_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `delta_rule`, for streaming.

    Args:
      q, k, v: [B, Hq, K], [B, Hk, K], [B, Hv, V].
      beta: [B, Hb].
      state: [B, H, K, V], zeros or what the operation or a step before handed on.
      log_decay: None, [H], [B, Hg] or [B, Hg, K].
      scale: as in the operation.

    Returns:
      out [B, H, V] in v's dtype and the new state in the state's dtype.

    Raises:
      ValueError: an argument of another shape or dtype.
    """
    arrays = {"q": q, "k": k, "v": v, "beta": beta}
    given = canonical_token("delta_rule_step", arrays, log_decay, state, scale)
    token = (q[:, None], k[:, None], v[:, None], beta[:, None], given.log_decay)
    q, k, v, beta, log_decay = (repeat_heads(x, given.sizes["H"]) for x in token)
    out, state = reference.delta_rule(q, k, v, beta, log_decay, given.state, None, scale=given.scale)
    return out[:, 0], state


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _correct(implementation, refusal, form, q, k, v, beta, log_decay, initial_state):
    run = partial(dispatch.run, implementation, refusal)
    return run(partial(xla.forward, form), partial(tpu.forward, form), q, k, v, beta, log_decay, initial_state)


def _correct_forward(implementation, refusal, form, *arrays):
    return _correct(implementation, refusal, form, *arrays), arrays


def _correct_backward(implementation, refusal, form, arrays, cotangents):
    run = partial(dispatch.run, implementation, refusal)
    return run(partial(xla.backward, form), partial(tpu.backward, form), *arrays, *cotangents)


_correct.defvjp(_correct_forward, _correct_backward)
