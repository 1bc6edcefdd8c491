"""The definition of block selection: equations 8 to 12 of native sparse attention (2502.11089), all scores at once."""

import jax
import jax.numpy as jnp

from kernels.chunks import compute_dtype
from kernels.select_blocks.form import Form, ascending, rank


def select_blocks(
    form: Form, q: jax.Array, k_compressed: jax.Array, time: jax.Array, begins: jax.Array, blocks: int
) -> jax.Array:
    """Canonical arguments → [B, T, G, n] int32, ascending, -1 for none.

    `time` [B or 1, T] is that of each query, `blocks` how many there are to choose from.
    """
    dtype, _ = compute_dtype(q, k_compressed)
    batch, queries, _, width = q.shape
    compressed, groups = k_compressed.shape[1:3]
    q = q.astype(dtype).reshape(batch, queries, groups, -1, width)
    s = form.scale * jnp.einsum("btghk,bngk->btghn", q, k_compressed.astype(dtype), precision="highest")
    time, begins = time[:, :, None, None], begins[:, :, None, None]
    visible = form.visible(jnp.arange(compressed), time, begins)[:, :, None]
    largest = jnp.max(s, axis=-1, keepdims=True, where=visible, initial=jnp.finfo(s.dtype).min)
    p = jnp.exp(jnp.where(visible, s - largest, -jnp.inf))
    total = jnp.sum(p, axis=-1, keepdims=True)
    p = jnp.sum(p / jnp.where(total > 0, total, 1), axis=3)  # over the heads of a group

    block = jnp.arange(blocks)
    p = jnp.pad(p, ((0, 0), (0, 0), (0, 0), (0, form.ratio * blocks - compressed)))
    score = jnp.zeros((batch, queries, groups, blocks), p.dtype)
    for m in range(form.ratio):
        for n in range(form.compression_block // form.stride):
            place = form.ratio * (block + 1) - 1 - m - n
            score += jnp.where(place >= 0, p[..., jnp.maximum(place, 0)], 0)
    ranked = rank(score, block, time, begins, block_size=form.block_size, initial=form.initial, local=form.local)
    order = jnp.argsort(-ranked, axis=-1, stable=True)[..., : form.selected]
    chosen = jnp.where(jnp.take_along_axis(ranked, order, axis=-1) > -jnp.inf, order, -1)
    return ascending(chosen, form.selected)
