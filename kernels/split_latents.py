"""`kernels.alternating_sparse_attention` with time split over devices, for the inside of `jax.shard_map`.

A window's latents come from the neighbours, and keys and values are made of them there; of blocks the summaries are
latents, whose projections go to all devices (`kernels.split_blocks`).
"""

import jax
import jax.numpy as jnp

from kernels.alternating_sparse_attention import latent_arguments, up_projected
from kernels.checks import check_shape
from kernels.native_sparse_attention.branches import gated_sum
from kernels.native_sparse_attention.compression import Compress
from kernels.select_blocks.form import Form as Selection
from kernels.sparse_attention.mask import Causal, Window
from kernels.split_attention import split_attention
from kernels.split_blocks import Whole, split_branches


def split_local_latent_attention(
    q: jax.Array,
    latents: jax.Array,
    up_k: jax.Array,
    up_v: jax.Array,
    *,
    axis: str,
    window: int = 512,
    q_rope: jax.Array | None = None,
    k_rope: jax.Array | None = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`local_latent_attention` of this device's tokens; arguments, result and errors are the operation's."""
    op = "local_latent_attention"
    arrays = {"q": (q, "B T H K"), "latents": (latents, "B T C"), "up_k": (up_k, "C H K"), "up_v": (up_v, "C H V")}
    q_rope, k_rope, scale, _ = latent_arguments(op, arrays, q_rope, k_rope, "B T", scale)
    k, v = (up_projected("btc,chk->bthk", latents, up) for up in (up_k, up_v))
    q, k = _with_ropes(q, k, q_rope, k_rope)
    whole = Whole.of(op, axis, q, segment_ids, 1)
    ids = None if whole.runs is None else (whole.runs, whole.runs)
    mask = Causal() & Window(window)
    return split_attention(q, k, v, mask, axis=axis, scale=scale, segment_ids=ids, implementation=implementation)


def split_global_latent_attention(
    q: jax.Array,
    latents: jax.Array,
    gates: jax.Array,
    up_k: jax.Array,
    up_v: jax.Array,
    *,
    axis: str,
    block_size: int = 64,
    stride: int = 16,
    selected_blocks: int = 16,
    compress: Compress | None = None,
    compression_block: int | None = None,
    initial: int = 1,
    local: int = 2,
    q_rope: jax.Array | None = None,
    k_rope: jax.Array | None = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`global_latent_attention` of this device's tokens, whole blocks of them.

    Arguments, result and errors are the operation's.

    Raises:
      ValueError: a stretch of another length.
    """
    op = "global_latent_attention"
    arrays = {"q": (q, "B T H K"), "latents": (latents, "B T G C"), "up_k": (up_k, "G C K"), "up_v": (up_v, "G C V")}
    q_rope, k_rope, scale, sizes = latent_arguments(op, arrays, q_rope, k_rope, "B T", scale)
    check_shape(op, "gates", gates, "B T H 2", sizes | {"2": 2})
    compression_block = 2 * stride if compression_block is None else compression_block
    whole = Whole.of(op, axis, q, segment_ids, block_size)
    summaries = whole.summaries(latents, compression_block, stride, compress)
    k_compressed, v_compressed = (up_projected("bngc,gck->bngk", summaries, up) for up in (up_k, up_v))
    k, v = (up_projected("btgc,gck->btgk", latents, up) for up in (up_k, up_v))
    longer, k = _with_ropes(q, k, q_rope, k_rope)
    selection = Selection(scale, block_size, stride, compression_block, selected_blocks, initial, local)
    branches = split_branches(
        (q, longer), (k_compressed, v_compressed), (k, v), whole, selection, scale, implementation
    )
    return gated_sum(gates, *branches)


def _with_ropes(q: jax.Array, k: jax.Array, q_rope: jax.Array, k_rope: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[q; q_rope] and [k; k_rope], the latter shared by the heads."""
    shared = jnp.broadcast_to(k_rope[:, :, None], (*k.shape[:3], k_rope.shape[-1]))
    return jnp.concatenate([q, q_rope], axis=-1), jnp.concatenate([k, shared], axis=-1)
