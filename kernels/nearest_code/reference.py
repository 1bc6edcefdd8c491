"""The definitions of nearest-code search and of a codebook's statistics, one row at a time."""

import jax
import jax.numpy as jnp
from jax import lax


def unit(x: jax.Array) -> jax.Array:
    """Rows of x [..., D] divided by their length; rows of zeros stay zeros."""
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0)
    x = x / jnp.where(largest > 0, largest, 1)  # so that no square over- or underflows
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1)


def nearest_code(x: jax.Array, codebook: jax.Array, *, metric: str) -> jax.Array:
    """As the public operation; x [..., D] and codebook [M, D] in the dtype to compute in."""
    usable = jnp.all(jnp.isfinite(codebook), axis=-1)

    def search(row: jax.Array) -> jax.Array:
        if metric == "cosine":
            distance = -jnp.sum(unit(codebook) * unit(row), axis=-1)
        else:
            distance = jnp.sum((codebook - row) ** 2, axis=-1)
        code = jnp.argmin(jnp.where(usable, distance, jnp.inf))
        return jnp.where(jnp.all(jnp.isfinite(row)), code, 0)

    return lax.map(search, x.reshape(-1, x.shape[-1])).astype(jnp.int32).reshape(x.shape[:-1])


def code_statistics(x: jax.Array, codes: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """As the public operation; rows x [..., D] whose code is `size` are left out. Sums in x's dtype."""
    x, codes = x.reshape(-1, x.shape[-1]), codes.reshape(-1)

    def add(n: jax.Array, statistics: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        counts, sums = statistics
        return counts.at[codes[n]].add(1, mode="drop"), sums.at[codes[n]].add(x[n], mode="drop")

    nothing = (jnp.zeros(size, x.dtype), jnp.zeros((size, x.shape[-1]), x.dtype))
    return lax.fori_loop(0, x.shape[0], add, nothing)
