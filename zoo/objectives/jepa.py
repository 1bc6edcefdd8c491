"""Predicting what another encoder makes of the hidden part: its parameters are a slow average of the encoder's own.

The functions here serve every such task. The average lives in the collection "target", which the loss gives back one
step further; no gradient reaches it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from zoo.objectives.signal import mean_square
from zoo.types import AnyArray, Array


def first_target(params: Any) -> dict[str, Any]:
    """The collection "target" at step 0: a copy of the parameters, boxed as they are, and the count of steps."""
    return {"params": jax.tree.map(jnp.copy, params), "step": jnp.zeros((), jnp.int32)}


def next_target(target: Any, params: Any, steps: int, first: float = 0.996, last: float = 1.0) -> dict[str, Any]:
    """The collection one step later: momentum · average + (1 − momentum) · parameters.

    steps: of the whole run, over which the momentum goes from `first` to `last`.
    """
    new = ema(target["params"], params, momentum(target["step"], steps, first, last))
    return {"params": new, "step": target["step"] + 1}


def momentum(step: Int[AnyArray, ""] | int, steps: int, first: float = 0.996, last: float = 1.0) -> Float[Array, ""]:
    """From `first` to `last` in equal steps, then `last` (I-JEPA, 2301.08243, appendix A)."""
    return first + (last - first) * jnp.minimum(jnp.asarray(step, jnp.float32) / steps, 1.0)


def ema(average: Any, params: Any, decay: Float[AnyArray, ""] | float) -> Any:
    """decay · average + (1 − decay) · params, leaf by leaf, without gradient."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * jax.lax.stop_gradient(new), average, params)


def latent_mse(
    prediction: Float[AnyArray, "*rows D"],
    target: Float[AnyArray, "*rows D"],
    valid: Bool[AnyArray, "*_"] | None = None,
    *,
    normalised: bool = True,
) -> Float[Array, ""]:
    """Mean of (prediction − normalised target)² over what is valid; nothing flows into the target.

    normalised: layer normalisation of the target over D without learned scale, ε 1e-5 (EEGPT, equation 5; data2vec).
    """
    target = jax.lax.stop_gradient(jnp.asarray(target, jnp.float32))
    if normalised:
        target = layer_normalised(target)
    return mean_square(prediction, target, valid)


def layer_normalised(x: Float[AnyArray, "*rows D"], epsilon: float = 1e-5) -> Float[Array, "*rows D"]:
    """Mean 0 and variance 1 over the last axis, nothing learned."""
    x = jnp.asarray(x, jnp.float32)
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + epsilon)
