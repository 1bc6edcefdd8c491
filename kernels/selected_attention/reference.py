"""The definition of selected attention: a softmax over all tokens with the mask of the chosen blocks."""

import jax
import jax.numpy as jnp

from kernels.chunks import compute_dtype
from kernels.heads import repeat_heads
from kernels.selected_attention.form import Form


def visible(form: Form, blocks: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
    """[B, T, L, T] bool: which tokens each query attends to."""
    token = jnp.arange(blocks.shape[1])
    chosen = jnp.any(blocks[..., None] == token // form.block_size, axis=-2)
    return chosen & ((token >= first[..., None]) & (token <= last[..., None]))[:, :, None]


def attend(
    form: Form, q: jax.Array, k: jax.Array, v: jax.Array, blocks: jax.Array, first: jax.Array, last: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As the public operation, of canonical arguments."""
    heads = q.shape[2]
    dtype, precision = compute_dtype(q, k, v)
    k, v_ = (repeat_heads(x, heads).astype(dtype) for x in (k, v))
    seen = repeat_heads(visible(form, blocks, first, last), heads)
    scores = form.scale * jnp.einsum("bthk,bjhk->bthj", q.astype(dtype), k, precision=precision)
    scores = jnp.where(seen, scores, -jnp.inf)
    some = jnp.any(seen, axis=-1)
    # A query that sees nothing gets scores of 0 to normalise, and leaves no trace in the gradients either.
    log_normalizer = jax.nn.logsumexp(jnp.where(some[..., None], scores, 0), axis=-1)
    weights = jnp.where(seen, jnp.exp(scores - log_normalizer[..., None]), 0)
    out = jnp.einsum("bthj,bjhv->bthv", weights, v_, precision=precision)
    return out.astype(v.dtype), jnp.where(some, log_normalizer, -jnp.inf)
