"""Rotary positions of one to four axes."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Float, Int

from kernels.packing import begins
from zoo.errors import ZooError
from zoo.types import Array

BASE = 10_000.0


def rotate(x: Float[Array, "B T H K"], positions: Array, base: float = BASE) -> Float[Array, "B T H K"]:
    """Turns pairs of features by angles that grow with position (RoFormer, 2104.09864).

    Products of turned queries and keys depend on differences of position alone. positions [B or 1, T] for one axis, or
    [B or 1, T, A] for A = 1 to 4: each axis turns the same even number of features, at most K / A; features left over
    stay as they are. Feature i of a share pairs with i + share/2 (GPT-NeoX layout) and turns by
    position · base^(−2i/share). Angles are float32, the result has x's dtype. Raises ZooError for more axes, and for
    heads too narrow.
    """
    positions = positions[..., None] if positions.ndim == 2 else positions
    axes, width = positions.shape[-1], x.shape[-1]
    share = width // axes // 2 * 2 if 1 <= axes <= 4 else 0
    if not share:
        raise ZooError(
            f"rotary positions: got {axes} axes and heads of {width}, wanted 1 to 4 axes and a pair for each"
        )
    rate = base ** (-jnp.arange(share // 2, dtype=jnp.float32) * 2 / share)
    angle = positions[..., None].astype(jnp.float32) * rate
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    pairs = x[..., : axes * share].astype(jnp.float32).reshape(*x.shape[:-1], axes, share)
    first, second = jnp.split(pairs, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = turned.reshape(*x.shape[:-1], axes * share).astype(x.dtype)
    return jnp.concatenate([turned, x[..., axes * share :]], axis=-1)


def times(length: int, segment_ids: Int[Array, "B T"] | None) -> Int[Array, "_ T"]:
    """[1 or B, T]: each token's time since its segment began."""
    time = jnp.arange(length, dtype=jnp.int32)[None]
    return time if segment_ids is None else time - begins(segment_ids)


def grid_positions(*sizes: int) -> Int[Array, "1 T A"]:
    """[1, T, A]: the places of T = product of `sizes` tokens of a grid, the last axis fastest."""
    axes = jnp.meshgrid(*(jnp.arange(size, dtype=jnp.int32) for size in sizes), indexing="ij")
    return jnp.stack([axis.reshape(-1) for axis in axes], axis=-1)[None]
