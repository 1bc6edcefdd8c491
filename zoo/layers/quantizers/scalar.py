"""Quantisation number by number, without a codebook: the code of a vector is read off its coordinates.

Source: finite scalar quantisation, Mentzer et al., 2309.15505, section 3.1 and the code of appendix A; lookup-free
quantisation, Yu et al., 2310.05737, section 3.1.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from zoo.errors import ZooError
from zoo.layers.quantizers.quantizer import Quantized, Quantizer, mean_where, straight_through
from zoo.types import Array


class FiniteScalarQuantizer(Quantizer):
    """Every number is bounded by a tanh and rounded to one of so many levels, evenly spaced in −1 to 1.

    levels   of each of the D numbers, at least 3; odd ones include ±1, even ones only −1
    epsilon  by which the bound stays within the outermost levels

    A code is the number whose digits are the levels, the first the lowest. Rounding passes gradients straight through,
    the bound its own. There are no losses and nothing is learned.
    """

    levels: tuple[int, ...]
    epsilon: float = 1e-3

    def setup(self) -> None:
        if not self.levels or min(self.levels) < 3 or math.prod(self.levels) >= 2**31:
            raise ZooError(
                f"FiniteScalarQuantizer levels: got {self.levels}, wanted at least 3 each and fewer than 2^31 codes"
            )

    @property
    def code_sizes(self) -> tuple[int, ...]:
        return (math.prod(self.levels),)

    def __call__(
        self, x: Float[Array, "*rows D"], *, valid: Bool[Array, "*rows"] | None = None, train: bool = False
    ) -> Quantized:
        if x.shape[-1] != len(self.levels):
            raise ZooError(f"FiniteScalarQuantizer: got vectors of {x.shape[-1]} numbers, wanted {len(self.levels)}")
        levels = np.array(self.levels)
        reach = (levels - 1) * (1 - self.epsilon) / 2
        # Levels of an even number lie half a step off the middle; the shift keeps 0 where it was.
        offset = np.where(levels % 2, 0.0, 0.5)
        bounded = jnp.tanh(x.astype(jnp.float32) + np.tan(offset / reach)) * reach - offset
        digits = jnp.round(bounded)
        quantized = straight_through(bounded, digits) / self._half
        codes = jnp.sum((digits.astype(jnp.int32) + self._half) * self._places, axis=-1)
        if valid is not None:
            codes, quantized = jnp.where(valid, codes, -1), jnp.where(valid[..., None], quantized, 0)
        return Quantized(quantized, codes[..., None], {})

    def decode(self, codes: Int[Array, "*rows 1"]) -> Float[Array, "*rows D"]:
        digits = codes // self._places % np.array(self.levels, np.int32)
        return jnp.where(codes >= 0, (digits - self._half) / self._half.astype(np.float32), 0)

    @property
    def _half(self) -> np.ndarray:
        return np.array(self.levels, np.int32) // 2

    @property
    def _places(self) -> np.ndarray:
        """What a step of each digit adds to a code."""
        return np.cumprod((1, *self.levels[:-1])).astype(np.int32)


class LookupFreeQuantizer(Quantizer):
    """Every number becomes its sign: 2^D codes, the first number the lowest bit.

    bits         D
    entropy      weight of the mean entropy of a vector's code less `diversity` times the entropy of the mean code
    diversity    of a batch, beside the certainty of each vector
    commitment   weight of mean((q − x)²)
    temperature  of the softmax over squared distances to all codes that these entropies are of

    Weights and temperature are those common in open code, the paper tells none. Losses: commitment and entropy, both
    weighed; nothing is learned. The softmax is a product over bits, so a vector's
    entropy is a sum over bits, and the mean code of a batch one matmul of two halves of the bits: neither needs the
    probabilities of all codes for every vector.
    """

    bits: int
    entropy: float = 0.1
    diversity: float = 1.0
    commitment: float = 0.25
    temperature: float = 0.01

    def setup(self) -> None:
        if not 2 <= self.bits <= 24:
            raise ZooError(f"LookupFreeQuantizer bits: got {self.bits}, wanted 2 to 24")

    @property
    def code_sizes(self) -> tuple[int, ...]:
        return (2**self.bits,)

    def __call__(
        self, x: Float[Array, "*rows D"], *, valid: Bool[Array, "*rows"] | None = None, train: bool = False
    ) -> Quantized:
        if x.shape[-1] != self.bits:
            raise ZooError(f"LookupFreeQuantizer: got vectors of {x.shape[-1]} numbers, wanted {self.bits}")
        x = x.astype(jnp.float32)
        positive = x > 0
        signs = jnp.where(positive, 1.0, -1.0)
        each, batch = self._entropies(x, valid)
        losses = {
            "commitment": self.commitment * mean_where(jnp.square(x - signs).mean(-1), valid),
            "entropy": self.entropy * (each - self.diversity * batch),
        }
        codes = jnp.sum(jnp.where(positive, self._places, 0), axis=-1)
        quantized = straight_through(x, signs)
        if valid is not None:
            codes, quantized = jnp.where(valid, codes, -1), jnp.where(valid[..., None], quantized, 0)
        return Quantized(quantized, codes[..., None], losses)

    def decode(self, codes: Int[Array, "*rows 1"]) -> Float[Array, "*rows D"]:
        signs = jnp.where(codes & self._places, 1.0, -1.0)
        return jnp.where(codes >= 0, signs, 0)

    @property
    def _places(self) -> np.ndarray:
        return 2 ** np.arange(self.bits, dtype=np.int32)

    def _entropies(self, x: Array, valid: Array | None) -> tuple[Array, Array]:
        """In nats: that of a vector's code, their mean; and that of the mean code."""
        logits = 4 * x / self.temperature  # of a bit being one: |x + 1|² − |x − 1|² = 4x
        logs = jnp.stack([jax.nn.log_sigmoid(-logits), jax.nn.log_sigmoid(logits)], axis=-1)
        each = mean_where(-jnp.sum(jnp.exp(logs) * logs, axis=(-2, -1)), valid)
        logs = logs.reshape(-1, self.bits, 2)
        weight = jnp.ones(logs.shape[0]) if valid is None else valid.reshape(-1).astype(jnp.float32)
        low, high = (jnp.exp(_joint(part)) for part in (logs[:, : self.bits // 2], logs[:, self.bits // 2 :]))
        mean = jnp.matmul((low * weight[:, None]).T, high, precision="highest") / jnp.maximum(weight.sum(), 1)
        return each, -jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-30)))


def _joint(logs: Float[Array, "R K 2"]) -> Float[Array, "R M"]:
    """Log probabilities of all 2^K values of K independent bits."""
    joint = logs[:, 0]
    for bit in range(1, logs.shape[1]):
        joint = (logs[:, bit, :, None] + joint[:, None]).reshape(logs.shape[0], -1)
    return joint
