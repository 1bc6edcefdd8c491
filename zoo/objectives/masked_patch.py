"""Masked-patch regression: hide patches of the signal, predict their waveform and their amplitude spectrum.

It takes the masking of LaBraM's pretraining (paper §2.3: a random half of the patches behind a mask token) and, in
place of codes, regresses what the codes stand for: the samples of each hidden patch and its log-amplitude spectrum,
each with one linear head on the patch's token.

A second term keeps the pooled vector useful on its own: every hidden patch is predicted again from `pooled` alone,
given where and when the patch is. It follows the secondary task of REVE (El Ouahidi et al., NeurIPS 2025), with two
differences: it reads the encoder's own pooled vector rather than a learned pool over all layers, and place multiplies
content instead of being added to it, so that one vector can say different things of different electrodes.

Targets are the signal as it comes from the loader, so scale it in the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float

from zoo.errors import ZooError
from zoo.registry import create
from zoo.types import AnyArray, Array, Batch, Encoded, Sensors, Variables

HEAD_RADIUS = 0.095
"""Metres; brings sensor positions to about one."""
AMPLITUDE_FLOOR = 0.01
"""Added to spectral amplitudes (signal units × samples^½) before the logarithm."""


@dataclass(frozen=True)
class MaskedPatch:
    """The task. A frozen dataclass: it is its own configuration.

    Attributes:
        model: registered encoder
        options: replacements for its options
        dtype: compute dtype of the encoder; parameters and statistics stay float32
        remat: what the encoder recomputes in the backward pass: none, full or dots
        patch: samples a patch; must be the encoder's
        waveform_weight: weight of the waveform error
        spectrum_weight: weight of the log-amplitude error
        pooled_weight: weight of both errors when predicted from the pooled vector alone; 0 leaves that head out
        pooled_width: features of that head
    """

    model: str = "labram_tiny"
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    remat: str = "none"
    patch: int = 200
    waveform_weight: float = 1.0
    spectrum_weight: float = 1.0
    pooled_weight: float = 1.0
    pooled_width: int = 256

    def encoder(self) -> nn.Module:
        """The encoder alone. Its variables are `{"params": variables["params"]["encoder"]}`."""
        return create(self.model, **{"dtype": jnp.dtype(self.dtype), "remat": self.remat, **self.options})

    def module(self) -> MaskedPatchModel:
        """Encoder and heads."""
        return MaskedPatchModel(self.encoder(), self.patch, self.pooled_width if self.pooled_weight else 0)

    def init(self, key: Array, batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names."""
        return self.module().init(key, batch["signal"], batch["sensors"], _mask(batch))

    def loss(
        self, variables: Variables, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """Weighted errors, mean over the masked patches of valid channels; metrics: parts, waveform R², weight."""
        prediction: Any = self.module().apply(
            variables, batch["signal"], batch["sensors"], _mask(batch), train=train, rngs={"dropout": key}
        )
        valid = batch["sensors"].valid[:, :, None]
        target, amplitude = targets(jnp.where(valid, batch["signal"], 0), self.patch)
        counted = (_mask(batch) & valid).reshape(target.shape[:2])
        weight = counted.sum()

        def mean(error: Array) -> Array:
            return jnp.sum(error.mean(-1), where=counted) / jnp.maximum(weight, 1)

        metrics = {
            "waveform": mean(huber(prediction["waveform"] - target)),
            "spectrum": mean(huber(prediction["spectrum"] - amplitude)),
            "waveform_r2": 1.0 - mean(jnp.square(prediction["waveform"] - target)) / mean(jnp.square(target)),
        }
        value = self.waveform_weight * metrics["waveform"] + self.spectrum_weight * metrics["spectrum"]
        if self.pooled_weight:
            metrics["pooled_waveform"] = mean(huber(prediction["pooled_waveform"] - target))
            metrics["pooled_spectrum"] = mean(huber(prediction["pooled_spectrum"] - amplitude))
            value += self.pooled_weight * (
                self.waveform_weight * metrics["pooled_waveform"] + self.spectrum_weight * metrics["pooled_spectrum"]
            )
        return value, {**metrics, "weight": weight.astype(jnp.float32)}, {}

    def reconstruct(self, variables: Variables, batch: Batch) -> Array:
        """The batch's signal [B, C, T] with every masked patch replaced by its prediction."""
        prediction: Any = self.module().apply(variables, batch["signal"], batch["sensors"], _mask(batch))
        signal = batch["signal"]
        masked = jnp.repeat(_mask(batch), self.patch, axis=-1)
        return jnp.where(masked, prediction["waveform"].reshape(signal.shape), signal)

    def flops(self, batch: Batch) -> float:
        """Operations of one forward pass over `batch`: the encoder's and the heads' matrix products."""
        examples, channels, samples = batch["signal"].shape
        encoder: Any = self.encoder()
        tokens = channels * (samples // self.patch)
        width, outputs = encoder.dim, self.patch + self.patch // 2 + 1
        heads = 2 * tokens * width * outputs
        if self.pooled_weight:
            heads += 2 * self.pooled_width * (width + tokens * (4 + self.pooled_width + outputs))
        return examples * (encoder.flops(channels, samples) + heads)

    def check_sensors(self, names: tuple[str, ...]) -> None:
        """Raises ZooError when the encoder cannot take channels of these canonical names."""
        encoder: Any = self.encoder()
        encoder.check_sensors(names)


class MaskedPatchModel(nn.Module):
    """An encoder with the heads of the task; predictions by name, [B, N, P] waveforms and [B, N, P/2+1] spectra."""

    encoder: nn.Module
    patch: int
    pooled_width: int

    @nn.compact
    def __call__(
        self, signal: Float[AnyArray, "B C T"], sensors: Sensors, mask: Bool[AnyArray, "B _ _"], *, train: bool = False
    ) -> dict[str, Float[Array, "B N _"]]:
        encoded: Encoded = self.encoder(signal, sensors, mask=mask, train=train)
        tokens = encoded.tokens.astype(jnp.float32)
        predictions = {
            "waveform": self._head(self.patch, "waveform")(tokens),
            "spectrum": self._head(self.patch // 2 + 1, "spectrum")(tokens),
        }
        if self.pooled_width:
            where = _dense(self.pooled_width, (None, "mlp"), "where")(_where(sensors, signal.shape[-1] // self.patch))
            what = _dense(self.pooled_width, ("embed", "mlp"), "what")(encoded.pooled.astype(jnp.float32))
            hidden = nn.gelu(what[:, None] * where)
            hidden = nn.gelu(_dense(self.pooled_width, ("mlp", None), "pooled_hidden")(hidden))
            predictions["pooled_waveform"] = self._head(self.patch, "pooled_waveform")(hidden)
            predictions["pooled_spectrum"] = self._head(self.patch // 2 + 1, "pooled_spectrum")(hidden)
        return predictions

    def _head(self, outputs: int, name: str) -> nn.Dense:
        return _dense(outputs, ("embed", None), name)


def targets(signal: Float[AnyArray, "B C T"], patch: int) -> tuple[Float[Array, "B N P"], Float[Array, "B N F"]]:
    """Patches [B, N, P] of signal [B, C, T] and the logarithm of their amplitude spectra [B, N, P/2+1], float32."""
    if signal.shape[-1] % patch:
        raise ZooError(f"a window of {signal.shape[-1]} samples is not made of patches of {patch} samples")
    patches = jnp.asarray(signal, jnp.float32).reshape(signal.shape[0], -1, patch)
    amplitude = jnp.abs(jnp.fft.rfft(patches, norm="ortho"))
    return patches, jnp.log(amplitude + AMPLITUDE_FLOOR)


def huber(error: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """½e² below one, |e| − ½ above: artefacts pull no harder than their size."""
    size = jnp.abs(error)
    return jnp.where(size < 1.0, 0.5 * jnp.square(error), size - 0.5)


def _mask(batch: Batch) -> Array:
    if "mask" not in batch:
        raise ZooError("masked-patch regression needs masked batches: set data.mask_patch and data.mask_ratio")
    return jnp.asarray(batch["mask"])


def _where(sensors: Sensors, patches: int) -> Float[Array, "B N 4"]:
    """Position and patch index of every token [B, N, 4], each about one in size; unknown positions are zero."""
    position = jnp.nan_to_num(sensors.position) / HEAD_RADIUS
    batch, channels = position.shape[:2]
    time = jnp.broadcast_to(
        jnp.linspace(-1.0, 1.0, patches) if patches > 1 else jnp.zeros(1), (batch, channels, patches)
    )
    place = jnp.broadcast_to(position[:, :, None], (batch, channels, patches, 3))
    return jnp.concatenate([place, time[..., None]], axis=-1).reshape(batch, channels * patches, 4)


def _dense(outputs: int, names: tuple[str | None, str | None], name: str) -> nn.Dense:
    return nn.Dense(
        outputs,
        kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), names),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, names[1:]),
        name=name,
    )
