"""Masked-patch regression: hide patches of the signal, predict their waveform and their amplitude spectrum.

It takes the masking of LaBraM's pretraining (paper §2.3: a random half of the patches behind a mask token) and, in
place of codes, regresses what the codes stand for: the samples of each hidden patch and its log-amplitude spectrum,
each with one linear head on the patch's token.

A second pair of terms keeps the pooled vector useful on its own: every patch, hidden or not, is predicted again from
`pooled` alone, given where and when the patch is. It follows the secondary task of REVE (El Ouahidi et al., NeurIPS
2025), with three differences: it reads the encoder's own pooled vector rather than a learned pool over all layers, it
answers for all patches, and place multiplies content instead of being added to it, so that the head is a low-rank
space × time model of the window: sum over k of what_k(pooled) · where_k(place) · wave_k(time).

Targets are standardised over each example as a whole (one mean, one deviation over its valid channels), so that an
example counts the same at any amplitude.

Any encoder does that takes a mask of patches [B, C, A] and gives a token for each. `CBRAMOD` has the options with which
CBraMod is pretrained (Wang et al., ICLR 2025): the samples themselves, squared error, each patch hidden by a coin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from zoo.encoders.encoder import Encoder
from zoo.errors import ZooError
from zoo.registry import create, entry
from zoo.types import AnyArray, Array, Batch, Encoded, Sensors, Variables

HEAD_RADIUS = 0.1
"""Metres; brings sensor positions to about one."""
AMPLITUDE_FLOOR = 0.01
"""Added to spectral amplitudes (orthonormal transform of standardised signal) before the logarithm."""


@dataclass(frozen=True)
class MaskedPatch:
    """The task. A frozen dataclass: it is its own configuration.

    Attributes:
        model: registered encoder
        options: replacements for its options
        dtype: compute dtype of the encoder; parameters and statistics stay float32
        remat: what the encoder recomputes in the backward pass: none, full or dots
        patch: samples a patch; must be the encoder's
        waveform_weight: weight of the waveform error of hidden patches
        spectrum_weight: weight of their log-amplitude error
        pooled_waveform_weight: weight of the waveform error of all patches, predicted from the pooled vector
        pooled_spectrum_weight: weight of their log-amplitude error; both 0 leave the pooled heads out
        pooled_rank: terms of the space × time model of the pooled heads
        error: of samples and of log-amplitudes: huber, or square
        standardise: whether targets are standardised; else they are the signal as it is
        coin: probability that a patch is hidden, each on its own; 0 hides those of the batch's mask
    """

    model: str = "labram_tiny"
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    remat: str = "none"
    patch: int = 200
    waveform_weight: float = 0.5
    spectrum_weight: float = 0.2
    pooled_waveform_weight: float = 1.0
    pooled_spectrum_weight: float = 0.2
    pooled_rank: int = 256
    error: Literal["huber", "square"] = "huber"
    standardise: bool = True
    coin: float = 0.0

    def encoder(self) -> nn.Module:
        """The encoder alone. Its variables are `{"params": variables["params"]["encoder"]}`.

        Raises ZooError for a model that does not take signals and sensors, or patches of another length.
        """
        known = getattr(entry(self.model).constructor, "__dataclass_fields__", {})
        options: dict[str, Any] = {"dtype": jnp.dtype(self.dtype), "remat": self.remat}
        asked = {name for name, usual in (("dtype", "float32"), ("remat", "none")) if getattr(self, name) != usual}
        options = {name: value for name, value in options.items() if name in known or name in asked}
        encoder = create(self.model, **{**options, **self.options})
        if not isinstance(encoder, Encoder):
            raise ZooError(f"task.model: {self.model} is not an encoder of signals, such as labram_tiny")
        if getattr(encoder, "patch", self.patch) != self.patch:
            raise ZooError(f"task.patch: got {self.patch}, {self.model} has patches of {encoder.patch} samples")
        return encoder

    def module(self) -> MaskedPatchModel:
        """Encoder and heads."""
        spectra = self.spectrum_weight > 0 or self.pooled_spectrum_weight > 0
        return MaskedPatchModel(self.encoder(), self.patch, self.pooled_rank if self._pools() else 0, spectra)

    def init(self, key: Array, batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names."""
        return self.module().init(key, batch["signal"], batch["sensors"], self._hidden(batch, key))

    def loss(
        self, variables: Variables, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """The weighted errors of a batch; metrics: each of them, R² of the waveforms, how many patches are hidden.

        Token errors are means over the hidden patches of valid channels. Pooled errors are means over all patches of
        valid channels in each example, and over examples by how many patches they hide: so both are means over hidden
        patches, and micro-batches add up.
        """
        mask = self._hidden(batch, jax.random.fold_in(key, 1))
        prediction: Any = self.module().apply(
            variables, batch["signal"], batch["sensors"], mask, train=train, rngs={"dropout": key}
        )
        waveform, spectrum = targets(self._standardised(batch)[0], self.patch)
        present = jnp.broadcast_to(batch["sensors"].valid[:, :, None], mask.shape).reshape(waveform.shape[:2])
        hidden = present & mask.reshape(present.shape)
        hidden_each = hidden.sum(1)
        weight = hidden_each.sum()

        def token_mean(error: Array) -> Array:
            return jnp.sum(error.mean(-1), where=hidden) / jnp.maximum(weight, 1)

        def pooled_mean(error: Array) -> Array:
            each = jnp.sum(error.mean(-1), axis=1, where=present) / jnp.maximum(present.sum(1), 1)
            return jnp.sum(each * hidden_each) / jnp.maximum(weight, 1)

        error = huber if self.error == "huber" else jnp.square
        metrics = {
            "waveform": token_mean(error(prediction["waveform"] - waveform)),
            "waveform_r2": _r2(prediction["waveform"], waveform, token_mean),
        }
        value = self.waveform_weight * metrics["waveform"]
        if "spectrum" in prediction:
            metrics["spectrum"] = token_mean(error(prediction["spectrum"] - spectrum))
            value += self.spectrum_weight * metrics["spectrum"]
        if "pooled_waveform" in prediction:
            metrics["pooled_waveform"] = pooled_mean(error(prediction["pooled_waveform"] - waveform))
            metrics["pooled_waveform_r2"] = _r2(prediction["pooled_waveform"], waveform, pooled_mean)
            value += self.pooled_waveform_weight * metrics["pooled_waveform"]
        if "pooled_spectrum" in prediction:
            metrics["pooled_spectrum"] = pooled_mean(error(prediction["pooled_spectrum"] - spectrum))
            value += self.pooled_spectrum_weight * metrics["pooled_spectrum"]
        return value, {**metrics, "weight": weight.astype(jnp.float32)}, {}

    def reconstruct(self, variables: Variables, batch: Batch) -> Array:
        """The batch's signal [B, C, T] with every masked patch replaced by its prediction."""
        mask = self._hidden(batch, jax.random.key(0))
        prediction: Any = self.module().apply(variables, batch["signal"], batch["sensors"], mask)
        signal = batch["signal"]
        _, mean, deviation = self._standardised(batch)
        masked = jnp.repeat(mask, self.patch, axis=-1)
        return jnp.where(masked, prediction["waveform"].reshape(signal.shape) * deviation + mean, signal)

    def flops(self, batch: Batch) -> float:
        """Operations of one forward pass over `batch`: the encoder's and the heads' matrix products."""
        examples, channels, samples = batch["signal"].shape
        encoder: Any = self.encoder()
        tokens = channels * (samples // self.patch)
        spectra = self.spectrum_weight > 0 or self.pooled_spectrum_weight > 0
        width, rank = encoder.dim, self.pooled_rank
        outputs = self.patch + spectra * (self.patch // 2 + 1)
        heads = 2 * tokens * width * outputs
        if self._pools():
            heads += 2 * rank * (2 * width + tokens * (4 + rank + outputs))
        return examples * (encoder.flops(channels, samples) + heads)

    def check_sensors(self, names: tuple[str, ...]) -> None:
        """Raises ZooError when the encoder cannot take channels of these canonical names."""
        encoder: Any = self.encoder()
        encoder.check_sensors(names)

    def _pools(self) -> bool:
        return self.pooled_waveform_weight > 0 or self.pooled_spectrum_weight > 0

    def _standardised(self, batch: Batch) -> tuple[Array, Any, Any]:
        """The signal that targets are of, and what it has to be multiplied by and added to."""
        if self.standardise:
            return standardised(batch["signal"], batch["sensors"].valid)
        signal = jnp.where(batch["sensors"].valid[:, :, None], batch["signal"], 0).astype(jnp.float32)
        return signal, 0.0, 1.0

    def _hidden(self, batch: Batch, key: Array) -> Array:
        """Which patches are hidden [B, C, A], also among those of channels that are not valid."""
        if not self.coin:
            return _mask(batch)
        examples, channels, samples = batch["signal"].shape
        return jax.random.bernoulli(key, self.coin, (examples, channels, samples // self.patch))


CBRAMOD: Mapping[str, Any] = {
    "model": "cbramod_base",
    "waveform_weight": 1.0,
    "spectrum_weight": 0.0,
    "pooled_waveform_weight": 0.0,
    "pooled_spectrum_weight": 0.0,
    "error": "square",
    "standardise": False,
    "coin": 0.5,
}
"""`MaskedPatch(**CBRAMOD)` is CBraMod's pretraining: its encoder, with one linear head of 200 samples a patch."""


class MaskedPatchModel(nn.Module):
    """An encoder with the heads of the task; predictions by name, [B, N, P] waveforms and [B, N, P/2+1] spectra."""

    encoder: nn.Module
    patch: int
    pooled_rank: int
    spectra: bool = True

    @nn.compact
    def __call__(
        self, signal: Float[AnyArray, "B C T"], sensors: Sensors, mask: Bool[AnyArray, "B _ _"], *, train: bool = False
    ) -> dict[str, Float[Array, "B N _"]]:
        encoded: Encoded = self.encoder(signal, sensors, mask=mask, train=train)
        tokens, content = encoded.tokens.astype(jnp.float32), encoded.pooled.astype(jnp.float32)
        if tokens.shape[1] != mask[0].size:
            raise ZooError(f"masked-patch regression: got {tokens.shape[1]} tokens for {mask[0].size} patches")
        outputs = {"waveform": self.patch, "spectrum": self.patch // 2 + 1}
        if not self.spectra:
            del outputs["spectrum"]
        predictions = {name: _dense(size, ("embed", None), name)(tokens) for name, size in outputs.items()}
        if self.pooled_rank:
            where = nn.gelu(_dense(self.pooled_rank, (None, "embed"), "where_in")(_where(sensors, mask.shape[-1])))
            where = _dense(self.pooled_rank, ("embed", "mlp"), "where_out")(where)
            for name, size in outputs.items():
                what = _dense(self.pooled_rank, ("embed", "mlp"), f"pooled_{name}_what")(content)
                predictions[f"pooled_{name}"] = _dense(size, ("alone", None), f"pooled_{name}")(what[:, None] * where)
        return predictions


def standardised(
    signal: Float[AnyArray, "B C T"], valid: Bool[AnyArray, "B C"]
) -> tuple[Float[Array, "B C T"], Float[Array, "B 1 1"], Float[Array, "B 1 1"]]:
    """Signal with mean 0 and deviation 1 over all valid channels of each example together; mean; deviation.

    Invalid channels become zero. An example without variation is left at zero.
    """
    where = valid[:, :, None]
    signal = jnp.where(where, signal, 0).astype(jnp.float32)
    mean = signal.mean((1, 2), keepdims=True, where=where)
    deviation = signal.std((1, 2), keepdims=True, where=where)
    return jnp.where(where, (signal - mean) / jnp.maximum(deviation, 1e-6), 0), mean, deviation


def targets(signal: Float[AnyArray, "B C T"], patch: int) -> tuple[Float[Array, "B N P"], Float[Array, "B N F"]]:
    """Patches [B, N, P] of signal, and the log-amplitude spectrum of each less its mean [B, N, P/2+1]."""
    if signal.shape[-1] % patch:
        raise ZooError(f"a window of {signal.shape[-1]} samples is not made of patches of {patch} samples")
    patches = jnp.asarray(signal, jnp.float32).reshape(signal.shape[0], -1, patch)
    amplitude = jnp.abs(jnp.fft.rfft(patches - patches.mean(-1, keepdims=True), norm="ortho"))
    return patches, jnp.log(amplitude + AMPLITUDE_FLOOR)


def _r2(prediction: Array, target: Array, mean: Any) -> Array:
    """Share of the target's square that the prediction explains."""
    return 1.0 - mean(jnp.square(prediction - target)) / jnp.maximum(mean(jnp.square(target)), 1e-12)


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
