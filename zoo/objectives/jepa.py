"""Predicting what another encoder makes of the hidden part: its parameters are a slow average of the encoder's own.

The functions here serve every such task. The average lives in the collection "target", which the loss gives back one
step further; no gradient reaches it. `Jepa` is the plainest of them, for any encoder that can hide patches behind a
token of its own: a perceptron of two layers predicts, from each hidden token, what the average makes there of the whole
signal (data2vec, 2202.03555, §3, in I-JEPA's terms, 2301.08243).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import Encoder
from zoo.errors import ZooError
from zoo.layers.parameters import dense
from zoo.objectives.signal import mean_square
from zoo.registry import create
from zoo.types import AnyArray, Array, Batch, Encoded, Sensors, Variables


@dataclass(frozen=True)
class Jepa:
    """The task. A frozen dataclass: it is its own configuration.

    Attributes:
        model: registered encoder that hides patches
        options: replacements for its options
        steps: over which the average slows down: `train.steps` times `train.accumulate`
        momentum: of the average, at first and at the end
        width: hidden features of the predictor, in D
        normalised: whether targets are layer-normalised
    """

    model: str = "labram_tiny"
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 1000
    momentum: tuple[float, float] = (0.996, 1.0)
    width: float = 2.0
    normalised: bool = True

    def encoder(self) -> Any:
        """The encoder alone. Its variables are `{"params": variables["params"]["encoder"]}`."""
        encoder = create(self.model, **self.options)
        if not isinstance(encoder, Encoder):
            raise ZooError(f"task.model: {self.model} is not an encoder of signals, such as labram_tiny")
        return encoder

    def module(self) -> JepaModel:
        """Encoder and predictor."""
        return JepaModel(self.encoder(), self.width)

    def init(self, key: Array, batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names. The average begins as the encoder."""
        variables = self.module().init(key, batch["signal"], batch["sensors"], _mask(batch))
        if set(variables) != {"params"}:
            raise ZooError(f"task.model: {self.model} keeps statistics, of which there is no slow average")
        params = variables["params"]
        return {"params": params, "target": first_target(params["encoder"])}

    def loss(
        self, variables: Variables, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """Squared error at hidden tokens of valid channels, a mean over them.

        Metrics: how many there are, and the deviation of targets over the batch's tokens, about 0 where they have
        collapsed to one. The average that is given back counts the parameters this loss is of.
        """
        mask = _mask(batch)
        encoded: Any
        prediction, encoded = self.module().apply(
            {"params": variables["params"]},
            batch["signal"],
            batch["sensors"],
            mask,
            train=train,
            rngs={"dropout": key},
        )
        average = jax.lax.stop_gradient(variables["target"]["params"])
        wanted = self.encoder().apply({"params": average}, batch["signal"], batch["sensors"]).tokens
        hidden = encoded.valid & mask.reshape(encoded.valid.shape)
        value = latent_mse(prediction, wanted, hidden, normalised=self.normalised)
        metrics = {
            "target_deviation": wanted.std((0, 1), where=encoded.valid[..., None]).mean(),
            "weight": hidden.sum().astype(jnp.float32),
        }
        if not train:
            return value, metrics, {}
        new = next_target(variables["target"], variables["params"]["encoder"], self.steps, *self.momentum)
        return value, metrics, {"target": new}

    def flops(self, batch: Batch) -> float:
        """Operations of one forward pass over `batch`: the encoder's, and a third for its average's, which has no
        backward pass."""
        examples, channels, samples = batch["signal"].shape
        return float(examples * self.encoder().flops(channels, samples) * 4 / 3)

    def check_recording(self, rate_hz: float, kinds: tuple[str, ...], names: tuple[str, ...]) -> None:
        """Raises ZooError when the encoder cannot take such a recording."""
        self.encoder().check_recording(rate_hz, kinds, names)

    def check_positions(self, sensors: Sensors) -> None:
        """Raises ZooError for sensors, on the host, whose place it must know and does not."""
        self.encoder().check_positions(sensors)


class JepaModel(nn.Module):
    """An encoder and what predicts from its tokens: (prediction [B, N, D], what the encoder gave)."""

    encoder: Any
    width: float

    @nn.compact
    def __call__(
        self, signal: Float[AnyArray, "B C T"], sensors: Sensors, mask: Bool[AnyArray, "B _ _"], *, train: bool = False
    ) -> tuple[Float[Array, "B N D"], Encoded]:
        encoded: Encoded = self.encoder(signal, sensors, mask=mask, train=train)
        size = encoded.tokens.shape[-1]
        hidden = dense(round(self.width * size), bias=True, name="predictor_in")(encoded.tokens.astype(jnp.float32))
        return dense(size, ("mlp", "embed"), bias=True, name="predictor_out")(nn.gelu(hidden)), encoded


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


def _mask(batch: Batch) -> Array:
    if "mask" not in batch:
        raise ZooError("prediction of hidden patches needs masked batches: set data.mask_patch and data.mask_ratio")
    return jnp.asarray(batch["mask"])
