"""Soft choices among codes that training hardens: annealed mixtures and Gumbel samples of one-hot vectors.

Source: the annealed mixture is that of EphysTokenizer ("tokenizers for MEG foundation models", 2602.16626, and its
code); Gumbel-softmax, its straight-through form and its schedule are Jang et al., 1611.01144, sections 2 and 4; the
divergence from a uniform prior is that of DALL-E's discrete autoencoder, 2102.12092, equation 1.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from zoo.errors import ZooError
from zoo.layers.parameters import LIKE_TORCH, dense, partitioned
from zoo.layers.quantizers.quantizer import COLLECTION, RNG, Quantized, Quantizer, mean_where, straight_through
from zoo.types import Array


class SoftQuantizer(Quantizer):
    """Logits of x choose among M learned codes: in training a mixture of them, else the likeliest.

    codes, dim    M codes of D numbers
    temperatures  at the first training step and at the end of the schedule, where it stays
    steps         of the schedule; counted in the collection `codebooks`

    The projection starts as PyTorch's Linear does but for its bias, which is zero, and codes as its Embedding.
    """

    codes: int
    dim: int
    temperatures: tuple[float, float] = (1.0, 0.5)
    steps: int = 10_000

    def setup(self) -> None:
        if min(self.temperatures) <= 0 or self.steps < 1:
            got = f"got temperatures {self.temperatures} in {self.steps} steps"
            raise ZooError(f"{type(self).__name__}: {got}, wanted positive ones")
        self.logits = dense(self.codes, (None, None), bias=True, init=LIKE_TORCH)
        first = partitioned(nn.initializers.normal(1.0), None, None)
        self.embedding = self.param("embedding", first, (self.codes, self.dim))
        self.step = self.variable(COLLECTION, "step", jnp.zeros, (), jnp.int32)

    @property
    def code_sizes(self) -> tuple[int, ...]:
        return (self.codes,)

    def __call__(
        self, x: Float[Array, "*rows D"], *, valid: Bool[Array, "*rows"] | None = None, train: bool = False
    ) -> Quantized:
        if x.shape[-1] != self.dim:
            raise ZooError(f"{type(self).__name__}: got vectors of {x.shape[-1]} numbers, wanted {self.dim}")
        logits = self.logits(x.astype(jnp.float32))
        if train and not self.is_initializing():
            weights = self.mixture(logits, self.temperature(jnp.minimum(self.step.value / self.steps, 1)))
            self.step.value += 1
        else:
            weights = jax.nn.one_hot(jnp.argmax(logits, axis=-1), self.codes)
        codes, quantized = jnp.argmax(weights, axis=-1).astype(jnp.int32), weights @ self.embedding
        if valid is not None:
            codes, quantized = jnp.where(valid, codes, -1), jnp.where(valid[..., None], quantized, 0)
        return Quantized(quantized, codes[..., None], self.losses(logits, valid))

    def decode(self, codes: Int[Array, "*rows 1"]) -> Float[Array, "*rows D"]:
        rows = jnp.take(self.embedding, jnp.maximum(codes[..., 0], 0), axis=0)
        return jnp.where(codes >= 0, rows, 0)

    def temperature(self, done: Float[Array, ""]) -> Float[Array, ""]:
        """After the share `done` of the schedule."""
        raise NotImplementedError

    def mixture(self, logits: Float[Array, "*rows M"], temperature: Float[Array, ""]) -> Float[Array, "*rows M"]:
        """The weights of the codes in training."""
        raise NotImplementedError

    def losses(self, logits: Float[Array, "*rows M"], valid: Bool[Array, "*rows"] | None) -> dict[str, Array]:
        return {}


class AnnealedQuantizer(SoftQuantizer):
    """Mixes softmax and one-hot weights, less and less of the softmax: see `annealed_one_hot`. Linear schedule."""

    temperatures: tuple[float, float] = (1.0, 1e-3)

    def temperature(self, done: Float[Array, ""]) -> Float[Array, ""]:
        first, last = self.temperatures
        return first + (last - first) * done

    def mixture(self, logits: Float[Array, "*rows M"], temperature: Float[Array, ""]) -> Float[Array, "*rows M"]:
        return annealed_one_hot(logits, temperature)


class GumbelQuantizer(SoftQuantizer):
    """Draws a code from the softmax of the logits, with the gradient of a Gumbel-softmax sample. Geometric schedule.

    hard   one code, its gradient passed straight through to the sample; else the sample itself, a mixture
    prior  weight of the mean divergence of the softmax from a uniform prior
    """

    hard: bool = True
    prior: float = 5e-4

    def temperature(self, done: Float[Array, ""]) -> Float[Array, ""]:
        first, last = self.temperatures
        return first * (last / first) ** done

    def mixture(self, logits: Float[Array, "*rows M"], temperature: Float[Array, ""]) -> Float[Array, "*rows M"]:
        noise = jax.random.gumbel(self.make_rng(RNG), logits.shape)
        sample = jax.nn.softmax((logits + noise) / temperature, axis=-1)
        if not self.hard:
            return sample
        return straight_through(sample, jax.nn.one_hot(jnp.argmax(sample, axis=-1), self.codes))

    def losses(self, logits: Float[Array, "*rows M"], valid: Bool[Array, "*rows"] | None) -> dict[str, Array]:
        logs = jax.nn.log_softmax(logits, axis=-1)
        divergence = jnp.sum(jnp.exp(logs) * (logs + jnp.log(self.codes)), axis=-1)
        return {"prior": self.prior * mean_where(divergence, valid)}


def annealed_one_hot(logits: Float[Array, "*rows M"], tau: Float[Array, ""] | float) -> Float[Array, "*rows M"]:
    """tau · softmax(logits) + (1 − tau) · the one-hot vector of the largest, which has no gradient.

    At tau 1 it is a softmax, at 0 one-hot, and then nothing learns: a schedule should end above it.
    """
    hard = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=logits.dtype)
    return tau * jax.nn.softmax(logits, axis=-1) + (1 - tau) * hard
