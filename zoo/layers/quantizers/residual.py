"""Several codebooks in turn, each quantising what the ones before it left; or side by side, each a part of the vector.

Source: residual and product quantisation as in SoundStream, 2107.03312, section III.C; leaving out the last stages of
an example in training from the same section ("quantizer dropout").
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from zoo.errors import ZooError
from zoo.layers.quantizers.quantizer import COLLECTION, RNG, Quantized, Quantizer
from zoo.types import Array

_STACKED: Any = {
    "variable_axes": {"params": 0, COLLECTION: 0},
    "split_rngs": {"params": True, RNG: True},
    "metadata_params": {nn.PARTITION_NAME: "layers"},
}

GRADIENTS = ("once", "each")


class ResidualQuantizer(Quantizer):
    """`levels` quantizers like `book`, which must have one codebook: r ← r − q(r), quantized is the sum of all q.

    dropout        probability that an example keeps only its first n levels in training, n uniform in 1 to levels
    unit_residual  each residual is brought to length one before the next code is taken off it: what NeuroRVQ's rule
                   would need for its later levels to matter; not published
    gradient       to the input: once, the book's estimator from the sum of all levels to x; or each, the sum of what
                   every level's estimator gives from its code to its residual, as in BrainOmni's code and
                   vector-quantize-pytorch (with straight_through that is `levels` times the gradient of once)

    Each level's commitment draws the input. Losses are means over levels. Parameters and codebooks of the levels are
    stacked, level first.
    """

    book: Quantizer
    levels: int
    dropout: float = 0.0
    unit_residual: bool = False
    gradient: str = "once"

    def setup(self) -> None:
        if self.gradient not in GRADIENTS:
            raise ZooError(f"ResidualQuantizer gradient: got {self.gradient!r}, wanted one of {GRADIENTS}")

    @property
    def code_sizes(self) -> tuple[int, ...]:
        return self.book.code_sizes * self.levels

    def __call__(
        self, x: Float[Array, "*rows D"], *, valid: Bool[Array, "*rows"] | None = None, train: bool = False
    ) -> Quantized:
        x = x.astype(jnp.float32)
        here = jnp.ones(x.shape[:-1], bool) if valid is None else valid
        kept = jnp.full(x.shape[:1], self.levels)
        if train and self.dropout and not self.is_initializing():
            some, count = jax.random.split(self.make_rng(RNG))
            fewer = jax.random.randint(count, kept.shape, 1, self.levels + 1)
            kept = jnp.where(jax.random.bernoulli(some, self.dropout, kept.shape), fewer, kept)
        kept = kept.reshape(-1, *(1,) * (here.ndim - 1))

        def level(book: Quantizer, carry: tuple[Array, Array], index: Array) -> Any:
            residual, total = carry
            if self.unit_residual:
                length = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(residual), axis=-1, keepdims=True), 1e-24))
                residual = residual / jax.lax.stop_gradient(length)
            found = book(residual, valid=here & (index < kept), train=train)
            value = jax.lax.stop_gradient(found.quantized)
            passed = found.quantized if self.gradient == "each" else value
            return (residual - value, total + passed), (found.codes[..., 0], found.losses)

        (_, total), (codes, losses) = nn.scan(level, length=self.levels, **_STACKED)(
            self.book, (x, jnp.zeros_like(x)), jnp.arange(self.levels)
        )
        quantized = total if self.gradient == "each" else self.book.passed(x, total)
        quantized = jnp.where(here[..., None], quantized, 0)
        return Quantized(quantized, jnp.moveaxis(codes, 0, -1), jax.tree.map(lambda each: each.mean(), losses))

    def decode(self, codes: Int[Array, "*rows Q"]) -> Float[Array, "*rows D"]:
        each = _decode_each(self.book, jnp.moveaxis(codes, -1, 0)[..., None])
        return each.sum(0)


class GroupedQuantizer(Quantizer):
    """The vector cut into `groups` equal parts, each with a quantizer like `book` of its own; codes group by group.

    Losses are means over groups. Parameters and codebooks are stacked, group first.
    """

    book: Quantizer
    groups: int

    @property
    def code_sizes(self) -> tuple[int, ...]:
        return self.book.code_sizes * self.groups

    def __call__(
        self, x: Float[Array, "*rows D"], *, valid: Bool[Array, "*rows"] | None = None, train: bool = False
    ) -> Quantized:
        if x.shape[-1] % self.groups:
            raise ZooError(f"GroupedQuantizer: {x.shape[-1]} numbers do not divide into {self.groups} groups")
        parts = jnp.moveaxis(x.reshape(*x.shape[:-1], self.groups, -1), -2, 0)

        # One after the other, not `vmap`, which would run k-means at every step.
        def group(book: Quantizer, _: None, part: Array) -> Any:
            return None, book(part, valid=valid, train=train)

        _, found = nn.scan(group, length=self.groups, **_STACKED)(self.book, None, parts)
        quantized, codes = (jnp.moveaxis(each, 0, -2) for each in (found.quantized, found.codes))
        return Quantized(
            quantized.reshape(x.shape),
            codes.reshape(*x.shape[:-1], -1),
            jax.tree.map(lambda each: each.mean(), found.losses),
        )

    def decode(self, codes: Int[Array, "*rows Q"]) -> Float[Array, "*rows D"]:
        parts = jnp.moveaxis(codes.reshape(*codes.shape[:-1], self.groups, -1), -2, 0)
        each = jnp.moveaxis(_decode_each(self.book, parts), 0, -2)
        return each.reshape(*codes.shape[:-1], -1)


def _decode_each(book: Quantizer, codes: Array) -> Array:
    """[G, ..., Q] → [G, ..., D], each with its own codebooks."""

    def decode(book: Quantizer, _: None, codes: Array) -> Any:
        return None, book.decode(codes)

    return nn.scan(decode, length=len(codes), **_STACKED)(book, None, codes)[1]
