"""What encoders of one montage share, and those of one window length besides."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float

from zoo.encoders.encoder import Encoder, blank
from zoo.errors import ZooError
from zoo.layers.parameters import partitioned
from zoo.types import AnyArray, Array, Encoded, Sensors


class OneMontage(Encoder):
    """An encoder of `channels`, in their order.

    channels   canonical names, or their number where they have none
    """

    channels: int | tuple[str, ...] = 22

    ORDER_FREE = False

    @property
    def montage(self) -> int | tuple[str, ...]:
        """Its channels."""
        return self.channels

    @property
    def count(self) -> int:
        """C, how many they are."""
        return self.channels if isinstance(self.channels, int) else len(self.channels)


class Windowed(OneMontage):
    """An encoder of one montage and of `samples`; it hides no tokens.

    samples    T of its windows
    """

    samples: int = 1000

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """One window of zeros."""
        return blank(self.channels, self.samples, self.TAKES[0])

    @nn.nowrap
    def window(
        self, signal: AnyArray, sensors: Sensors, mask: Bool[AnyArray, "B _"] | Bool[AnyArray, "B _ _"] | None
    ) -> Float[Array, "B C T"]:
        """The signal, float32, silent in channels that are not valid. Raises ZooError for another montage or length,
        and for a mask."""
        signal = self.present(signal, sensors)
        name = type(self).__name__
        if signal.shape[-1] != self.samples:
            raise ZooError(f"{name}: got windows of {signal.shape[-1]} samples, wanted {self.samples}")
        if mask is not None:
            raise ZooError(f"{name} hides no tokens: got a mask, wanted None")
        return signal

    @nn.nowrap
    def refuse_unless_positive(self, left: int) -> None:
        """Raises ZooError where filters and pools leave no time of a window."""
        if left < 1:
            raise ZooError(f"{type(self).__name__}: its filters and pools leave nothing of {self.samples} samples")


def all_there(tokens: Float[Array, "B N D"], pooled: Float[Array, "B F"]) -> Encoded:
    """Encoded whose tokens are all valid."""
    return Encoded(tokens, pooled, jnp.ones(tokens.shape[:2], bool))


def flat(tokens: Float[Array, "B N D"]) -> Float[Array, "B F"]:
    """Features by times [B, D·N], as PyTorch and Keras flatten [B, D, N]."""
    return tokens.swapaxes(1, 2).reshape(tokens.shape[0], -1)


class FlatHead(nn.Module):
    """Flattened maps [B, maps · A] → [B, classes]: a convolution as long as the maps. It begins as Glorot's uniform
    of that convolution, without offset."""

    classes: int
    maps: int

    @nn.compact
    def __call__(self, pooled: Float[AnyArray, "B F"], *, train: bool = False) -> Float[Array, "B K"]:
        pooled = jnp.asarray(pooled, jnp.float32)
        times = pooled.shape[-1] // self.maps

        def init(key: Array, shape: tuple[int, ...]) -> Array:
            return nn.initializers.glorot_uniform()(key, (times, self.maps, self.classes)).reshape(shape)

        kernel = self.param("kernel", partitioned(init, None, None), (pooled.shape[-1], self.classes))
        return pooled @ kernel + self.param("bias", partitioned(nn.initializers.zeros, None), (self.classes,))
