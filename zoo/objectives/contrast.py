"""Contrast of what a model makes of brain signals with what is known of the stimulus: text, images, sound as vectors.

    head = ContrastHead(features=768, loss="clip")
    value, metrics = head.apply(variables, encoded.pooled, target)          # [B, D], [B, F]

Row i of both belongs together and every other row of the batch does not. Under a mesh the batch is the whole one, over
all devices. All is float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from zoo.errors import ZooError
from zoo.layers.parameters import dense, partitioned
from zoo.layers.quantizers import unit
from zoo.types import AnyArray, Array

MAX_SCALE = 100.0
"""The largest factor of similarities that CLIP's training lets through."""


def similarities(
    ours: Float[AnyArray, "B F"], theirs: Float[AnyArray, "B F"], *, cosine: bool = True
) -> Float[Array, "B B"]:
    """Cosines, or plain products, of every row of the one with every row of the other."""
    ours, theirs = (jnp.asarray(each, jnp.float32) for each in (ours, theirs))
    return unit(ours) @ unit(theirs).T if cosine else ours @ theirs.T


def info_nce(logits: Float[AnyArray, "B B"], valid: Bool[AnyArray, " B"] | None = None) -> Float[Array, ""]:
    """Mean over rows of −log softmax_j(logits_ij) at j = i (van den Oord et al., 1807.03748, equation 4).

    valid: rows that are there; the others are neither asked nor an answer. 0 where none is.
    """
    valid = jnp.ones(len(logits), bool) if valid is None else jnp.asarray(valid)
    # Not −inf: a row that is not there would have no answer at all, and NaN for a gradient.
    log_probs = jax.nn.log_softmax(jnp.where(valid, logits, -1e30), axis=-1)
    return -jnp.sum(jnp.diagonal(log_probs), where=valid) / jnp.maximum(valid.sum(), 1)


def clip_loss(logits: Float[AnyArray, "B B"], valid: Bool[AnyArray, " B"] | None = None) -> Float[Array, ""]:
    """Half of `info_nce` one way and half the other (Radford et al., 2103.00020, figure 3). At first about ln B."""
    return 0.5 * (info_nce(logits, valid) + info_nce(logits.T, valid))


def siglip_loss(logits: Float[AnyArray, "B B"], valid: Bool[AnyArray, " B"] | None = None) -> Float[Array, ""]:
    """−log sigmoid(±logits_ij), + where i = j, summed over j, a mean over i (Zhai et al., 2303.15343, algorithm 1)."""
    valid = jnp.ones(len(logits), bool) if valid is None else jnp.asarray(valid)
    sign = 2 * jnp.eye(len(logits)) - 1
    pairs = valid[:, None] & valid
    return -jnp.sum(jax.nn.log_sigmoid(sign * logits), where=pairs) / jnp.maximum(valid.sum(), 1)


def retrieval(
    logits: Float[AnyArray, "B B"], valid: Bool[AnyArray, " B"] | None = None, top: int = 1
) -> Float[Array, ""]:
    """Share of rows whose own column is among the `top` largest; of equals half rank before it."""
    valid = jnp.ones(len(logits), bool) if valid is None else jnp.asarray(valid)
    own = jnp.diagonal(logits)[:, None]
    others = valid & ~jnp.eye(len(logits), dtype=bool)
    rank = jnp.sum(logits > own, axis=1, where=others) + 0.5 * jnp.sum(logits == own, axis=1, where=others)
    return jnp.sum(rank < top, where=valid) / jnp.maximum(valid.sum(), 1)


class ContrastHead(nn.Module):
    """A linear map into the space of the targets, a learned factor of cosines, and for SigLIP a learned offset.

    features     F of the targets
    loss         clip or siglip
    temperature  1 / the factor at first; 0.07 as CLIP, 0.1 as SigLIP unless given
    """

    features: int
    loss: str = "clip"
    temperature: float | None = None

    @nn.compact
    def __call__(
        self,
        pooled: Float[AnyArray, "B D"],
        target: Float[AnyArray, "B F"],
        valid: Bool[AnyArray, " B"] | None = None,
    ) -> tuple[Float[Array, ""], Mapping[str, Array]]:
        """(loss; metrics: retrieval of the target and of the signal among the batch, the factor).

        Raises ZooError for another loss or targets of another width.
        """
        if self.loss not in ("clip", "siglip"):
            raise ZooError(f"ContrastHead loss: got {self.loss!r}, wanted 'clip' or 'siglip'")
        if target.shape[-1] != self.features:
            raise ZooError(f"ContrastHead: got targets of {target.shape[-1]} numbers, wanted {self.features}")
        first = self.temperature or (0.07 if self.loss == "clip" else 0.1)
        log_scale = self.param("log_scale", partitioned(nn.initializers.constant(-math.log(first))), ())
        scale = jnp.minimum(jnp.exp(log_scale), MAX_SCALE)
        ours = dense(self.features, ("embed", None), name="project")(jnp.asarray(pooled, jnp.float32))
        logits = scale * similarities(ours, target)
        if self.loss == "siglip":
            logits = logits + self.param("offset", partitioned(nn.initializers.constant(-10.0)), ())
        value = (clip_loss if self.loss == "clip" else siglip_loss)(logits, valid)
        metrics = {
            "target_retrieval": retrieval(logits, valid),
            "signal_retrieval": retrieval(logits.T, valid),
            "scale": scale,
        }
        return value, metrics
