"""What every quantizer is: vectors in; vectors of a finite set, their codes and what their choice costs out."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from zoo.types import Array

COLLECTION = "codebooks"
"""The mutable collection of what is not learned by gradient: codes, how often each is used."""
RNG = "codes"
"""The random stream that training draws from: k-means' first means, what replaces dead codes, Gumbel noise."""


@flax.struct.dataclass
class Quantized:
    """quantized [..., D], with a gradient to the input; codes [..., Q] int32; losses, terms to be added to a loss.

    A vector that is not there (`valid` False) has codes −1 and quantized 0, and so has a stage that was left out.
    """

    quantized: Array
    codes: Array
    losses: Mapping[str, Array]


class Quantizer(nn.Module):
    """The contract. A quantizer's own fields are its configuration; its parameters are made in `setup`."""

    @property
    def code_sizes(self) -> tuple[int, ...]:
        """How many codes each of the Q codebooks has."""
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "*rows D"], *, valid: Bool[Array, "*rows"] | None = None, train: bool = False
    ) -> Quantized:
        """The nearest that x [..., D] can be said to be.

        With `train` the collection `codebooks` must be mutable and the stream "codes" be given: codebooks that follow
        statistics are updated, with those of all devices.
        """
        raise NotImplementedError

    def decode(self, codes: Int[Array, "*rows Q"]) -> Float[Array, "*rows D"]:
        """The vectors that codes stand for; 0 where a code is −1."""
        raise NotImplementedError

    @nn.nowrap
    def passed(self, x: Float[Array, "*rows D"], value: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """`value`, with the gradient to x that this quantizer gives it."""
        return straight_through(x, value)


def straight_through(x: Float[Array, "*shape"], value: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`value`, with the gradient that x would have (1308.3432)."""
    return x + lax.stop_gradient(value - x)


def unit(x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """Vectors of length one; those shorter than 1e-12 stay as short, as in PyTorch's `normalize`."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    # Of the square, so that a vector of zeros has a gradient of zero and not NaN.
    return x / jnp.sqrt(jnp.maximum(square, 1e-24))


def mean_where(values: Float[Array, "*rows"], valid: Bool[Array, "*rows"] | None) -> Float[Array, ""]:
    """The mean of the values that are there; 0 where none is."""
    if valid is None:
        return values.mean()
    return jnp.sum(values, where=valid) / jnp.maximum(valid.sum(), 1)
