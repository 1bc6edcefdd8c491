"""Masked latents of whole groups of electrodes: BaRISTA's pretraining, as far as it is told.

Source: "BaRISTA", NeurIPS 2025, 2512.12135: tokens are hidden by spatial groups (an electrode, a parcel, a lobe), and
what is reconstructed are latents. Its code is not given, so the rest is our choice: groups are drawn until half of an
example's electrodes are hidden in all segments; a linear map of their tokens predicts what a slow average of the
convolutional encoder (.996 to 1) makes of them, layer-normalised; mean square error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from zoo.encoders.barista import Barista, TemporalEncoder
from zoo.errors import ZooError
from zoo.layers.parameters import dense
from zoo.objectives.jepa import first_target, latent_mse, next_target
from zoo.registry import create
from zoo.types import AnyArray, Array, Batch, Encoded, Sensors, Variables


@dataclass(frozen=True)
class MaskedGroups:
    """The task. A frozen dataclass: it is its own configuration.

    Attributes:
        model: registered BaRISTA
        options: replacements for its options
        dtype: compute dtype of the encoder; parameters and statistics stay float32
        remat: what the encoder recomputes in the backward pass: none, full or dots
        hidden: share of an example's electrodes that is hidden, at least
        steps: of the run, over which the average slows down; as `train.steps`
        momentum: of the average, at first and at the end
    """

    model: str = "barista_tiny"
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    remat: str = "none"
    hidden: float = 0.5
    steps: int = 1000
    momentum: tuple[float, float] = (0.996, 1.0)

    def encoder(self) -> Barista:
        """The encoder: its variables are `{"params": variables["params"]["encoder"]}`. Raises ZooError for another."""
        made = create(self.model, **{"dtype": jnp.dtype(self.dtype), "remat": self.remat, **self.options})
        if not isinstance(made, Barista):
            raise ZooError(f"task.model: {self.model} is no BaRISTA, such as barista_tiny")
        if not 0 < self.hidden < 1:
            raise ZooError(f"task.hidden: got {self.hidden}, wanted between 0 and 1")
        return made

    def module(self) -> MaskedGroupsModel:
        """Encoder and predictor."""
        return MaskedGroupsModel(self.encoder())

    def init(self, key: Array, batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names. The average begins as the encoder."""
        channels, samples = batch["signal"].shape[1:]
        mask = jnp.zeros((len(batch["signal"]), channels, samples // self.encoder().segment), bool)
        params = self.module().init(key, batch["signal"], batch["sensors"], mask)["params"]
        return {"params": params, "target": first_target(params["encoder"]["temporal"])}

    def loss(
        self, variables: Variables, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """Squared error at hidden tokens of valid channels, a mean over them.

        Metrics: how many there are, and the deviation of targets over them, about 0 where they have collapsed to one.
        """
        encoder = self.encoder()
        signal, sensors = batch["signal"], batch["sensors"]
        drawing, dropout = jax.random.split(key)
        rows = np.arange(signal.shape[1]) if not encoder.regions else np.asarray(encoder.region_of)
        hidden = groups_hidden(drawing, jnp.asarray(sensors.valid), rows, self.hidden)
        count = signal.shape[-1] // encoder.segment
        mask = jnp.repeat(hidden[..., None], count, axis=2)
        prediction: Any = self.module().apply(
            {"params": variables["params"]}, signal, sensors, mask, train=train, rngs={"dropout": dropout}
        )
        average = {"params": jax.lax.stop_gradient(variables["target"]["params"])}
        segments = encoder.present(signal, sensors).reshape(*mask.shape, encoder.segment)
        wanted: Any = TemporalEncoder(encoder.dim, encoder.dtype).apply(average, segments)
        wanted = wanted.astype(jnp.float32).reshape(prediction.shape)
        counted = mask.reshape(prediction.shape[:2])
        value = latent_mse(prediction, wanted, counted, normalised=True)
        metrics = {
            "target_deviation": wanted.std((0, 1), where=counted[..., None]).mean(),
            "weight": counted.sum().astype(jnp.float32),
        }
        if not train:
            return value, metrics, {}
        own = variables["params"]["encoder"]["temporal"]
        return value, metrics, {"target": next_target(variables["target"], own, self.steps, *self.momentum)}

    def flops(self, batch: Batch) -> float:
        """Operations of one forward pass over `batch`."""
        examples, channels, samples = batch["signal"].shape
        return examples * self.encoder().flops(channels, samples)

    def check_recording(self, rate_hz: float, kinds: Sequence[str], names: Sequence[str]) -> None:
        """Raises ZooError when the encoder cannot take a recording of this rate and these channels."""
        self.encoder().check_recording(rate_hz, kinds, names)

    def check_positions(self, sensors: Sensors) -> None:
        """Raises ZooError for sensors, on the host, whose place it must know and does not."""
        self.encoder().check_positions(sensors)


class MaskedGroupsModel(nn.Module):
    """An encoder and a linear map of its tokens [B, N, D]."""

    encoder: Barista

    @nn.compact
    def __call__(
        self, signal: Float[AnyArray, "B C T"], sensors: Sensors, mask: Bool[AnyArray, "B _ _"], *, train: bool = False
    ) -> Float[Array, "B N D"]:
        encoded: Encoded = self.encoder(signal, sensors, mask=mask, train=train)
        return dense(encoded.tokens.shape[-1], ("embed", None), bias=True, name="predict")(encoded.tokens)


def groups_hidden(key: Array, valid: Bool[Array, "B C"], group: np.ndarray, share: float) -> Bool[Array, "B C"]:
    """Valid channels of whole groups (`group` [C], a number each), drawn until `share` of an example's are hidden.

    One group at least stays, where there are two.
    """
    numbers = np.unique(group, return_inverse=True)[1]
    count = int(numbers.max()) + 1
    member = jnp.asarray(np.eye(count, dtype=np.float32)[numbers])
    size = valid.astype(jnp.float32) @ member
    order = jnp.argsort(jnp.where(size > 0, jax.random.uniform(key, size.shape), 2.0), axis=1)
    sizes = jnp.take_along_axis(size, order, axis=1)
    before = jnp.cumsum(sizes, axis=1) - sizes
    kinds = (size > 0).sum(1, keepdims=True)
    chosen = (before < share * valid.sum(1, keepdims=True)) & (jnp.arange(count) < jnp.maximum(kinds - 1, 1))
    drawn = jnp.zeros_like(chosen).at[jnp.arange(len(chosen))[:, None], order].set(chosen)
    return valid & drawn[:, numbers]
