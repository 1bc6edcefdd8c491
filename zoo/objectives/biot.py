"""BIOT's pretraining: a window is to be told from the others by what is left of its words.

Source: Yang, Westover and Sun, "BIOT", NeurIPS 2023, section 2.3, and the official code (github.com/ycq091044/BIOT,
MIT).

The one view is the pooled vector of the whole window; the other that of a random part of each channel's words, led
through two linear maps with GELU between. Their cosines, divided by the temperature, are contrasted one way: each whole
window with the parts of all. Gradients flow through both views.

Official code draws the words once for a whole batch, this for each window; of a channel at least one stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from zoo.encoders.biot import BIOT
from zoo.errors import ZooError
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias
from zoo.objectives.contrast import info_nce, similarities
from zoo.registry import create, entry
from zoo.types import AnyArray, Array, Batch, Sensors, Variables


@dataclass(frozen=True)
class PerturbedWords:
    """The task. A frozen dataclass: it is its own configuration.

    Attributes:
        model: a registered BIOT
        options: replacements for its options
        dtype: compute dtype of the encoder; parameters and softmax stay float32
        temperature: what cosines are divided by
    """

    model: str = "biot_tiny"
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    temperature: float = 0.2

    def encoder(self) -> BIOT:
        """The encoder alone. Its variables are `{"params": variables["params"]["encoder"]}`.

        Raises ZooError for a model that is no BIOT.
        """
        if entry(self.model).constructor is not BIOT:
            raise ZooError(f"task.model: {self.model} has no words to leave out, wanted a BIOT, such as biot_tiny")
        encoder: Any = create(self.model, **{"dtype": jnp.dtype(self.dtype), **self.options})
        return encoder

    def module(self) -> TwoViews:
        """Encoder and prediction."""
        return TwoViews(self.encoder())

    def init(self, key: Array, batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names."""
        hidden = jnp.zeros(self._words(batch), bool)
        return self.module().init(key, batch["signal"], batch["sensors"], hidden)

    def loss(
        self, variables: Variables, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """Mean of −log softmax of each window's own part among those of all; metrics: top1, the share of windows whose
        own is the nearest; weight, how many windows there are."""
        words, dropout = jax.random.split(key)
        hidden = left_out(words, self._words(batch))
        views: Any = self.module().apply(
            variables, batch["signal"], batch["sensors"], hidden, train=train, rngs={"dropout": dropout}
        )
        there = jnp.asarray(batch["sensors"].valid).any(1)
        # A window without channels has a vector of zeros, which has no direction.
        whole, part = (jnp.where(there[:, None], each, 1.0) for each in views)
        logits = similarities(whole, part) / self.temperature
        nearest = jnp.argmax(jnp.where(there, logits, -jnp.inf), axis=-1) == jnp.arange(len(there))
        weight = there.sum()
        top1 = jnp.sum(nearest, where=there) / jnp.maximum(weight, 1)
        return info_nce(logits, there), {"top1": top1, "weight": weight.astype(jnp.float32)}, {}

    def flops(self, batch: Batch) -> float:
        """Operations of one forward pass over `batch`, both views."""
        examples, channels, samples = batch["signal"].shape
        encoder = self.encoder()
        return examples * (2 * encoder.flops(channels, samples) + 4.0 * encoder.dim**2)

    def check_recording(self, rate_hz: float, kinds: Sequence[str], names: Sequence[str]) -> None:
        """Raises ZooError when a recording is not the encoder's."""
        self.encoder().check_recording(rate_hz, kinds, names)

    def _words(self, batch: Batch) -> tuple[int, int, int]:
        """[B, C, A] of a batch."""
        examples, channels, samples = batch["signal"].shape
        return examples, channels, self.encoder().frames(samples)


class TwoViews(nn.Module):
    """An encoder with the prediction of the task: whole windows and what is predicted of their parts, both [B, D]."""

    encoder: BIOT

    @nn.compact
    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        hidden: Bool[AnyArray, "B C A"],
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
        whole = self.encoder(signal, sensors, train=train).pooled
        part = self.encoder(signal, sensors, mask=hidden, train=train).pooled
        dim = part.shape[-1]

        def linear(name: str) -> nn.Dense:
            return dense(dim, (None, None), bias=True, init=LIKE_TORCH, bias_init=like_torch_bias(dim), name=name)

        return whole, linear("predict_out")(nn.gelu(linear("predict_in")(part), approximate=False))


def left_out(key: Array, shape: tuple[int, int, int]) -> Bool[Array, "B C A"]:
    """True where a word is left out: of the A of a channel, A // 2 to A − 1 stay, at least one, all numbers alike."""
    count_key, order_key = jax.random.split(key)
    words = shape[-1]
    least = max(1, words // 2)
    stay = jax.random.randint(count_key, (*shape[:-1], 1), least, max(words, least + 1))
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(order_key, shape), axis=-1), axis=-1)
    return rank >= stay
