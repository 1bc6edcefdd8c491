"""What a residual branch passes through, and what a stack of layers may recompute."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from zoo.types import Array

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What the backward pass of a layer recomputes: nothing, all, or all but the results of matmuls with parameters."""


def drop_path(branch: Array, rate: Array | float, key: Array) -> Array:
    """Stochastic depth (1603.09382): the branch [B, ...] is left out of an example with probability `rate`.

    Kept ones are divided by the probability of being kept, so that the mean stays.
    """
    keep = 1.0 - jnp.asarray(rate)
    kept = jax.random.bernoulli(key, keep, (branch.shape[0], *(1,) * (branch.ndim - 1)))
    return jnp.where(kept, branch / keep.astype(branch.dtype), 0)
