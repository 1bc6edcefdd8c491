"""Attention of every query to the blocks of keys that were chosen for it.

No matrix of all queries and keys exists. The work is that of the chosen blocks, temporary memory grows with T. On
several devices call it inside `jax.shard_map` on every device's own batch rows or heads.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels import dispatch
from kernels.checks import check_floating, check_segment_ids, check_shape
from kernels.chunks import compute_dtype
from kernels.heads import repeat_heads
from kernels.packing import starts
from kernels.selected_attention import reference, tpu, xla
from kernels.selected_attention.form import Form


def selected_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: jax.Array,
    *,
    block_size: int,
    scale: float | None = None,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention over the tokens of chosen blocks: block j is tokens j · block_size to (j + 1) · block_size - 1.

    The selected branch of native sparse attention (2502.11089, section 3.3.2), whose query heads of a group share their
    blocks, and of mixture of block attention (2502.13189), whose every query head has its own.

    Args:
      q: [B, T, H, K] queries.
      k: [B, T, G, K] keys; G divides H, each serves H / G neighbouring heads.
      v: [B, T, G, V] values.
      blocks: [B, T, L, n] integers, the blocks of each query, for L = G groups or L = H heads. In any order; one named
        twice counts once, and numbers below 0 or past the last block, which may be short, choose nothing.
      block_size: tokens of a block.
      scale: of the scores; K**-0.5 unless given.
      causal: whether a query sees no later tokens.
      segment_ids: [B, T] integers; a query sees the tokens of its own segment, a run of equal ids. Blocks do not start
        anew with a segment.
      implementation: None (best for the platform), "reference", "xla" or "pallas".

    Returns:
      out [B, T, H, V] in v's dtype; 0 for a query that sees no token. `blocks` has no gradient.

    Raises:
      ValueError: an argument of another shape or dtype.
      NotImplementedError: "pallas" where it cannot serve.
    """
    options = {"block_size": block_size, "scale": scale, "causal": causal, "segment_ids": segment_ids}
    return _checked("selected_attention", q, k, v, blocks, implementation=implementation, **options)[0]


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: jax.Array,
    *,
    block_size: int,
    scale: float | None = None,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`selected_attention` with what its weights were divided by, to merge it with attention to other keys.

    Returns:
      out [B, T, H, V] and log_normalizer [B, T, H], the logarithm of the sum of exp(scores) in float32 (float64 where
      an input is): -inf for a query that sees no token. Both are differentiable.
    """
    options = {"block_size": block_size, "scale": scale, "causal": causal, "segment_ids": segment_ids}
    return _checked("attend", q, k, v, blocks, implementation=implementation, **options)


def _checked(op, q, k, v, blocks, *, block_size, scale, causal, segment_ids, implementation):
    sizes: dict[str, int] = {}
    arrays = {"q": (q, "B T H K"), "k": (k, "B T G K"), "v": (v, "B T G V"), "blocks": (blocks, "B T L n")}
    for name, (array, shape) in arrays.items():
        check_shape(op, name, array, shape, sizes)
    check_floating(op, {"q": q, "k": k, "v": v})
    check_segment_ids(op, segment_ids, sizes)
    batch, time, heads, groups, lists = (sizes[letter] for letter in "BTHGL")
    if groups == 0 or heads % groups:
        raise ValueError(f"{op}: k: got {groups} heads, wanted a divisor of those of q, {heads}")
    if lists not in (groups, heads):
        raise ValueError(f"{op}: blocks: got {lists} lists, wanted one for each of {groups} groups or {heads} heads")
    if not jnp.issubdtype(jnp.result_type(blocks), jnp.integer):
        raise ValueError(f"{op}: blocks: got dtype {jnp.result_type(blocks)}, wanted an integer one")
    for name in "KV":
        if sizes[name] == 0:
            raise ValueError(f"{op}: {'q' if name == 'K' else 'v'}: got width 0, wanted at least 1")
    if block_size < 1:
        raise ValueError(f"{op}: block_size: got {block_size}, wanted at least 1")
    dtype = jnp.result_type(q, k, v)
    refusal = tpu.refusal(dtype, time, (sizes["K"], sizes["V"]), heads // lists, block_size)
    dispatch.check_implementation(op, implementation, refusal)

    if 0 in (batch, time, heads, sizes["n"]):
        out = jnp.zeros((batch, time, heads, sizes["V"]), v.dtype)
        return out, jnp.full((batch, time, heads), -jnp.inf, compute_dtype(q, k, v)[0])
    form = Form(sizes["K"] ** -0.5 if scale is None else float(scale), block_size)
    blocks = blocks.astype(jnp.promote_types(blocks.dtype, jnp.int32))  # one of few bits cannot be compared below
    blocks = jnp.where((blocks >= 0) & (blocks <= (time - 1) // block_size), blocks, -1).astype(jnp.int32)
    first, last = _interval(batch, time, causal, segment_ids)
    canonical = q, repeat_heads(k, lists), repeat_heads(v, lists), blocks, first, last
    if implementation == "reference":
        return reference.attend(form, *canonical)
    return _attend(implementation, refusal, form, *canonical)


def _interval(batch, time, causal, segment_ids):
    """The first and the last token that each query may see, [B, T] int32 each."""
    token = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))
    if segment_ids is None:
        return jnp.zeros_like(token), token if causal else jnp.full_like(token, time - 1)
    fresh = starts(segment_ids)
    first = lax.cummax(jnp.where(fresh, token, 0), axis=1)
    if causal:
        return first, token
    ends = jnp.concatenate([fresh[:, 1:], jnp.ones((batch, 1), bool)], axis=1)
    return first, lax.cummin(jnp.where(ends, token, time), axis=1, reverse=True)


def attend_piece(form: Form, implementation: str | None, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`attend` of canonical arguments without its gradients: to one of several sets of keys, by whoever merges them."""
    return _attend(implementation, _refusal(form, implementation, *arrays[:4]), form, *arrays)


def piece_gradients(form: Form, implementation: str | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """What one set adds to d_q, its d_k and d_v; after canonical arguments those of `of_queries`: out and
    log_normalizer of all sets, and the cotangents of both."""
    refusal = _refusal(form, implementation, *arrays[:4])
    return _attend_backward(implementation, refusal, form, arrays[:8], arrays[8:])[:3]


def _refusal(form, implementation, q, k, v, blocks):
    dtype, widths = jnp.result_type(q, k, v), (k.shape[3], v.shape[3])
    refusal = tpu.refusal(dtype, q.shape[1], widths, q.shape[2] // blocks.shape[2], form.block_size)
    dispatch.check_implementation("selected_attention", implementation, refusal)
    return refusal


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(implementation, refusal, form, q, k, v, blocks, first, last):
    run = partial(dispatch.run, implementation, refusal)
    return run(partial(xla.forward, form), partial(tpu.forward, form), q, k, v, blocks, first, last)


def _attend_forward(implementation, refusal, form, *arrays):
    results = _attend(implementation, refusal, form, *arrays)
    return results, (*arrays, *results)


def _attend_backward(implementation, refusal, form, kept, cotangents):
    run = partial(dispatch.run, implementation, refusal)
    gradients = run(partial(xla.backward, form), partial(tpu.backward, form), *kept, *cotangents)
    return *gradients, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)
