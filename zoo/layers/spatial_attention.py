"""Spatial attention: any sensors in any order to a fixed number of channels, by where the sensors are.

Source: Défossez et al., "Decoding speech perception from non-invasive brain recordings", Nature Machine Intelligence
2023, 2208.12266, "spatial attention layer"; in three dimensions as in Benchetrit et al., 2310.19812.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from zoo.errors import ZooError
from zoo.layers.parameters import partitioned
from zoo.types import AnyArray, Array, Sensors

MARGIN = 0.2
"""How far beyond the sensors the waves go on before they repeat; the sensors span 1."""


class SpatialAttention(nn.Module):
    """[B, C, T] → [B, T, outputs]: each output a weighted mean of the sensors.

    Weights are softmax over sensors of a learned row times cos and sin of `waves` at the sensor's place. Sensors that
    are not valid, or whose position is not known, get none. In training a disc is drawn (a ball in three dimensions),
    one a batch, and the sensors in it get none either; where no sensor is left the outputs are 0. The weights
    [B, outputs, C] are sown as "weights" in "intermediates".

    outputs      how many
    frequencies  waves an axis
    axes         2: the flattened head, `flattened`; 3: positions as they are
    radius       of the disc, of sensors that span 1; 0 draws none
    """

    outputs: int = 270
    frequencies: int = 32
    axes: int = 2
    radius: float = 0.2

    @nn.compact
    def __call__(
        self, signal: Float[Array, "B C T"], sensors: Sensors, *, train: bool = False
    ) -> Float[Array, "B T G"]:
        if self.axes not in (2, 3):
            raise ZooError(f"SpatialAttention axes: got {self.axes}, wanted 2 or 3")
        if not 0 <= self.radius < 1:
            raise ZooError(f"SpatialAttention radius: got {self.radius}, wanted 0 to less than 1")
        here = placed(sensors)
        place = spanning(flattened(sensors.position) if self.axes == 2 else jnp.asarray(sensors.position), here)
        size = 2 * self.frequencies**self.axes
        init = nn.initializers.normal(size**-0.5)
        rows = self.param("rows", partitioned(init, None, "embed"), (self.outputs, size))
        scores = jnp.einsum("bcp,op->boc", waves(place, self.frequencies), rows)
        if train and self.radius:
            centre = jax.random.uniform(self.make_rng("dropout"), (self.axes,))
            here &= jnp.sum(jnp.square(place - centre), axis=-1) > self.radius**2
        # Not −inf: where no sensor is left every weight would be NaN.
        weights = jax.nn.softmax(jnp.where(here[:, None], scores, -1e30), axis=-1) * here[:, None]
        self.sow("intermediates", "weights", weights)
        return jnp.einsum("bct,boc->bto", signal, weights)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example in matmuls, a multiply-add counting two."""
        size = 2 * self.frequencies**self.axes
        return 2.0 * self.outputs * channels * (size + samples)


def placed(sensors: Sensors) -> Bool[Array, "B C"]:
    """Which channels are valid and where their sensors are is known."""
    return jnp.asarray(sensors.valid) & jnp.isfinite(sensors.position).all(-1)


def check_placed(who: str, sensors: Sensors) -> None:
    """Raises ZooError for valid channels without a position, of sensors on the host."""
    lost = np.argwhere(np.asarray(sensors.valid) & ~np.asarray(placed(sensors)))
    if len(lost):
        raise ZooError(
            f"{who}: channel {lost[0, 1]} of example {lost[0, 0]} ({len(lost)} in all) has no known position"
        )


def flattened(position: Float[AnyArray, "B C 3"]) -> Float[Array, "B C 2"]:
    """The head from above, flattened as MNE lays EEG out: the arc from the vertex is the distance from the middle.

    Azimuthal equidistant about the origin of head coordinates, each sensor on a sphere of its own radius.
    """
    x, y, z = jnp.moveaxis(jnp.asarray(position, jnp.float32), -1, 0)
    level = jnp.sqrt(x**2 + y**2)
    # At the vertex every direction is right.
    factor = jnp.sqrt(level**2 + z**2) * jnp.arctan2(level, z) / jnp.maximum(level, 1e-9)
    return jnp.stack([x * factor, y * factor], axis=-1)


def spanning(place: Float[AnyArray, "B C _"], here: Bool[Array, "B C"]) -> Float[Array, "B C _"]:
    """Along each axis from 0 to 1 over the channels that are `here`, as published; 0 where these have one place.

    Channels that are not here are put at 0.
    """
    here = here[..., None]
    least = jnp.min(place, axis=1, keepdims=True, where=here, initial=jnp.inf)
    most = jnp.max(place, axis=1, keepdims=True, where=here, initial=-jnp.inf)
    span = most - least
    return jnp.where(here, (place - least) / jnp.where(span > 1e-9, span, 1), 0).astype(jnp.float32)


def waves(place: Float[Array, "B C K"], frequencies: int) -> Float[Array, "B C P"]:
    """cos, then sin, of 2π Σ_a k_a (x_a + margin) / (1 + 2 margin) for k of 0 … frequencies − 1, the last fastest."""
    axes = place.shape[-1]
    k = np.stack(np.meshgrid(*[np.arange(frequencies)] * axes, indexing="ij"), axis=-1).reshape(-1, axes)
    phase = (place + MARGIN) @ jnp.asarray(2 * math.pi / (1 + 2 * MARGIN) * k.T, jnp.float32)
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)
