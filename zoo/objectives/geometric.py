"""Denoising: clean windows with artefacts mixed in, and the clean ones asked back.

    task = Denoise("geometric_base")                    # artefacts are made up, or a batch brings its own as "noise"
    clean = task.denoise(variables, signal, sensors)    # [B, C, T], in the units of the signal

Source: arXiv 2502.05334, with mixtures as EEGdenoiseNet's (Zhang et al., 2009.11662): clean + λ·artefact, λ such that
the ratio is a number of decibels. Here it is one of powers, 20·log₁₀ of the ratio of root mean squares; EEGdenoiseNet
takes 10·log₁₀ of it, so its 2 dB are 4 dB here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Key

from zoo.encoders.geometric import GeometricDenoiser
from zoo.errors import ZooError
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias
from zoo.objectives.signal import mean_square, pearson, root, standardised_where
from zoo.registry import create
from zoo.types import AnyArray, Array, Batch, Sensors, Variables

EYES, MUSCLES = (0.3, 5.0), (20.0, 100.0)
"""Bands in Hz of the artefacts that are made up."""


class Denoiser(nn.Module):
    """The encoder, and a linear map of each token to the samples of its patch."""

    encoder: GeometricDenoiser

    @nn.compact
    def __call__(
        self, signal: Float[AnyArray, "B C T"], sensors: Sensors, *, train: bool = False
    ) -> Float[Array, "B C T"]:
        """The clean window over the deviation of the noisy one, without its mean."""
        tokens = self.encoder(signal, sensors, train=train).tokens
        bias = like_torch_bias(self.encoder.dim)
        last = dense(self.encoder.patch, ("embed", None), bias=True, init=LIKE_TORCH, bias_init=bias, name="last")
        return last(tokens).reshape(signal.shape)


@dataclass(frozen=True)
class Denoise:
    """The task: mean squared error, over the deviation of the noisy window.

    Attributes:
        model: registered denoiser
        options: replacements for its options
        decibels: from and to, drawn for each channel in training; validation has the cleaner of the two
    """

    model: str = "geometric_base"
    options: Mapping[str, Any] = field(default_factory=dict)
    decibels: tuple[float, float] = (-7.0, 2.0)

    def encoder(self) -> GeometricDenoiser:
        """The encoder alone. Its variables are `{"params": variables["params"]["encoder"]}`."""
        encoder = create(self.model, **self.options)
        if not isinstance(encoder, GeometricDenoiser):
            raise ZooError(f"task.model: {self.model} is not a denoiser, such as geometric_base")
        return encoder

    def module(self) -> Denoiser:
        """Encoder and last map."""
        return Denoiser(self.encoder())

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names."""
        return self.module().init(key, batch["signal"], batch["sensors"])

    def loss(
        self, variables: Variables, batch: Batch, key: Key[Array, ""], train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """Metrics: correlation of what is told with what is clean, and of the noisy window; weight, channels."""
        keys = jax.random.split(key)
        valid = jnp.asarray(batch["sensors"].valid)
        clean = jnp.where(valid[..., None], jnp.asarray(batch["signal"], jnp.float32), 0)
        noise = batch.get("noise")
        if noise is None:
            noise = artefacts(keys[0], clean.shape, self.encoder().rate)
        least, most = self.decibels
        drawn = jax.random.uniform(keys[1], clean.shape[:2], minval=least, maxval=most)
        noisy = mixture(clean, noise, drawn if train else jnp.full(clean.shape[:2], most))
        _, mean, deviation = standardised_where(noisy, valid, axes=(2,))
        wanted = (clean - mean) / deviation
        told = self._apply(variables, noisy, batch["sensors"], train)
        metrics = {
            "correlation": pearson(told, wanted, valid),
            "correlation_before": pearson(noisy, clean, valid),
            "weight": valid.sum().astype(jnp.float32),
        }
        return mean_square(told, wanted, valid), metrics, {}

    def denoise(
        self, variables: Variables, signal: Float[AnyArray, "B C T"], sensors: Sensors
    ) -> Float[Array, "B C T"]:
        """The clean signal, in its own units; 0 in channels that are not valid."""
        _, mean, deviation = standardised_where(signal, sensors.valid, axes=(2,))
        told = self._apply(variables, signal, sensors, False) * deviation + mean
        return jnp.where(jnp.asarray(sensors.valid)[..., None], told, 0)

    def flops(self, batch: Batch) -> float:
        """Operations of one pass over `batch`."""
        encoder, (examples, channels, samples) = self.encoder(), batch["signal"].shape
        return examples * (encoder.flops(channels, samples) + 2.0 * channels * samples * encoder.dim)

    def check_recording(self, rate_hz: float, kinds: Sequence[str], names: Sequence[str]) -> None:
        """Raises ZooError when the encoder cannot take a recording of this rate and these channels."""
        self.encoder().check_recording(rate_hz, kinds, names)

    def _apply(self, variables: Variables, signal: AnyArray, sensors: Sensors, train: bool) -> Array:
        found: Any = self.module().apply({"params": variables["params"]}, signal, sensors, train=train)
        return found


def mixture(
    clean: Float[Array, "B C T"], noise: Float[AnyArray, "B C T"], decibels: Float[Array, "B C"]
) -> Float[Array, "B C T"]:
    """clean + λ·noise, λ such that clean is so many decibels stronger. Silent noise adds nothing."""
    size = [root(jnp.square(jnp.asarray(each)).mean(-1)) for each in (clean, noise)]
    factor = jnp.where(size[1] > 0, size[0] / jnp.where(size[1] > 0, size[1], 1), 0) * 10 ** (-decibels / 20)
    return clean + factor[..., None] * noise


def artefacts(key: Key[Array, ""], shape: tuple[int, ...], rate_hz: float) -> Float[Array, "B C T"]:
    """Noise of one band: eyes' or muscles', drawn for each channel of each example."""
    keys = jax.random.split(key)
    frequency = np.fft.rfftfreq(shape[-1], 1 / rate_hz)
    bands = np.array([(lower <= frequency) & (frequency <= upper) for lower, upper in (EYES, MUSCLES)])
    which = jax.random.bernoulli(keys[0], shape=shape[:2])
    bins = jnp.fft.rfft(jax.random.normal(keys[1], shape))
    return jnp.fft.irfft(bins * jnp.where(which[..., None], bands[1], bands[0]), shape[-1])
