"""What a sensor is, as a vector: from its position, its orientation and its kind."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from zoo.errors import ZooError
from zoo.layers.parameters import dense, norm, partitioned
from zoo.sensors import KINDS
from zoo.types import Array, Sensors

EMBEDDED = KINDS[:3]
"""EEG, magnetometers, gradiometers: rows of the table of kinds."""


class SensorEmbedding(nn.Module):
    """Sensors → [B, C, D] float32, for EEG and MEG alike (BrainOmni, 2505.18185, section 3.2, and its code).

    y = W₂ selu(W₁ [position, orientation]) + kind, then RMSNorm(y + W₄ selu(W₃ y)). Positions are `standard_positions`;
    EEG has orientation 0. A channel that is not `described` gets some vector, but no NaN. Kernels and kinds begin
    normal with deviation `spread`, as published; for few features that is so little that kinds drown places.
    """

    dim: int
    spread: float = 0.02

    @nn.compact
    def __call__(self, sensors: Sensors) -> Float[Array, "B C D"]:
        if self.dim % 2:
            raise ZooError(f"SensorEmbedding dim: got {self.dim}, wanted an even number")
        init = nn.initializers.normal(self.spread)
        here = described(sensors)
        kind = jnp.where(here, sensors.kind, 0)
        orientation = jnp.where((here & (kind > 0))[..., None], sensors.orientation, 0)
        place = jnp.concatenate([standard_positions(sensors), orientation], axis=-1)
        hidden = jax.nn.selu(dense(self.dim // 2, (None, "mlp"), bias=True, init=init, name="place_in")(place))
        y = dense(self.dim, ("mlp", "embed"), bias=True, init=init, name="place_out")(hidden)
        table = self.param("kind", partitioned(init, None, "embed"), (len(EMBEDDED), self.dim))
        # As a matmul with ones and zeros: rows taken of a split table would copy the batch to every device.
        y += jax.nn.one_hot(kind, len(EMBEDDED)) @ table
        hidden = jax.nn.selu(dense(4 * self.dim, bias=True, init=init, name="in")(y))
        y += dense(self.dim, ("mlp", "embed"), bias=True, init=init, name="out")(hidden)
        return norm("rms", name="norm")(y)


def described(sensors: Sensors) -> Bool[Array, "B C"]:
    """Which channels are valid, of a kind that can be embedded, and known in position and, for MEG, orientation."""
    kind = jnp.asarray(sensors.kind)
    placed = jnp.isfinite(sensors.position).all(-1)
    turned = jnp.isfinite(sensors.orientation).all(-1) | (kind == EMBEDDED.index("eeg"))
    return jnp.asarray(sensors.valid) & (kind < len(EMBEDDED)) & placed & turned


def standard_positions(sensors: Sensors) -> Float[Array, "B C 3"]:
    """Positions about the middle of an example's EEG, and of its MEG, over √3 times the root of their mean square.

    Only `described` channels count; the others are at 0, and so is one that is alone.
    """
    here = described(sensors)
    position = jnp.where(here[..., None], sensors.position, 0).astype(jnp.float32)
    eeg = jnp.asarray(sensors.kind) == EMBEDDED.index("eeg")
    standard = jnp.zeros_like(position)
    for group in (here & eeg, here & ~eeg):
        share = group / jnp.maximum(group.sum(1, keepdims=True), 1)
        centred = jnp.where(group[..., None], position - (position * share[..., None]).sum(1, keepdims=True), 0)
        square = 3 * (jnp.square(centred).sum(-1) * share).sum(1)
        # Below a tenth of a millimetre there is one place, and what is left is rounding.
        scale = jnp.sqrt(jnp.where(square > 1e-8, square, jnp.inf))
        standard += centred / scale[:, None, None]
    return standard
