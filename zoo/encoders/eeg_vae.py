"""β-VAE of short EEG windows: ten numbers a window, some of which may turn out to mean something.

Source: Honke et al., "Representation learning for improved interpretability and classification accuracy of clinical
factors from EEG", arXiv 2010.15274, after Higgins et al., β-VAE, ICLR 2017. There is no public code, and the paper does
not give every size: kernels, strides and features here are ours.

Input: three midline electrodes, 256 samples at 250 Hz from −248 ms about an event, single trials or averages. Each
channel is standardised over the window here.

The decoder, and the network that learns which of the ten mean a label (SCAN), are in `zoo.objectives.eeg_vae`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import Encoder, blank
from zoo.errors import ZooError
from zoo.layers.convolution import Convolution
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias
from zoo.objectives.signal import standardised_where
from zoo.registry import Card, register
from zoo.types import AnyArray, Array, Encoded, Sensors

MIDLINE = ("FZ", "CZ", "PZ")
LOWEST, HIGHEST = -10.0, 10.0
"""Bounds of log-variances: beyond them a Gaussian's KL and its gradient overflow."""


class EEGVAE(Encoder):
    """Three strided convolutions, a hidden layer, and the mean and log-variance of each latent.

    channels  names of the electrodes, or how many
    samples   T of its windows, a multiple of 8
    rate      sampling rate in Hz
    widths    features of the convolutions, of five samples with stride two
    hidden    features of the layer after them
    latents   how many numbers a window becomes
    """

    channels: int | tuple[str, ...] = MIDLINE
    samples: int = 256
    rate: float = 250.0
    widths: tuple[int, ...] = (32, 64, 128)
    hidden: int = 256
    latents: int = 10

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)
    ORDER_FREE: ClassVar[bool] = False

    def setup(self) -> None:
        self.convolutions = [Convolution(width, (5,), (2,), paddings=(2,)) for width in self.widths]
        self.inner = linear(self.hidden, self.widths[-1] * (self.samples >> len(self.widths)))
        self.outer = linear(2 * self.latents, self.hidden)

    @property
    def sampling_rate(self) -> float:
        """Hz."""
        return self.rate

    @property
    def montage(self) -> int | tuple[str, ...]:
        """Its electrodes."""
        return self.channels

    @property
    def features(self) -> int:
        """D of its pooled vector: the latents."""
        return self.latents

    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        *,
        mask: Bool[AnyArray, "B _"] | Bool[AnyArray, "B _ _"] | None = None,
        subject: Int[AnyArray, " B"] | None = None,
        train: bool = False,
    ) -> Encoded:
        """signal [B, C, T], any unit → Encoded: pooled is the latents' mean, tokens the last feature map.

        Raises ZooError for windows of other lengths and for a mask.
        """
        if mask is not None:
            raise ZooError("EEGVAE hides no tokens: it takes no mask")
        mean, _, tokens = self.posterior(self.standardised(signal, sensors))
        return Encoded(tokens=tokens, pooled=mean, valid=jnp.ones(tokens.shape[:2], bool))

    def posterior(
        self, standard: Float[Array, "B C T"]
    ) -> tuple[Float[Array, "B D"], Float[Array, "B D"], Float[Array, "B A _"]]:
        """(mean, log-variance of the latents, last feature map)."""
        x = standard.swapaxes(1, 2)
        for convolution in self.convolutions:
            x = nn.gelu(convolution(x), approximate=False)
        hidden = nn.gelu(self.inner(x.reshape(x.shape[0], -1)), approximate=False)
        mean, log_variance = jnp.split(self.outer(hidden), 2, axis=-1)
        return mean, jnp.clip(log_variance, LOWEST, HIGHEST), x

    @nn.nowrap
    def standardised(self, signal: Float[AnyArray, "B C T"], sensors: Sensors) -> Float[Array, "B C T"]:
        """Every valid channel with mean 0 and deviation 1 over the window; what does not vary is 0."""
        period = 2 ** len(self.widths)
        if signal.shape[-1] != self.samples or self.samples % period:
            raise ZooError(
                f"EEGVAE wants windows of {self.samples} samples, a multiple of {period}, got {signal.shape[-1]}"
            )
        return standardised_where(self.present(signal, sensors), sensors.valid, axes=(2,))[0]

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two."""
        total, inputs = 0.0, channels
        for width in self.widths:
            samples //= 2
            total, inputs = total + 10.0 * samples * inputs * width, width
        return total + 2.0 * self.hidden * (samples * inputs + 2 * self.latents)

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """One window."""
        return blank(self.channels, self.samples)


def linear(features: int, inputs: int, name: str | None = None) -> nn.Dense:
    """A linear map that begins as PyTorch's."""
    bias = like_torch_bias(inputs)
    return dense(features, (None, None), bias=True, init=LIKE_TORCH, bias_init=bias, name=name)


VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "eeg_vae_tiny": (
        {"samples": 64, "widths": (16, 32, 32), "hidden": 64},
        25_748,
        "trained on a toy: traversals, SCAN",
    ),
    "eeg_vae_base": ({}, 1_105_876, "closed forms of its losses; its layers are those of eeg_vae_tiny"),
}
"""Options, parameters (encoder without decoder), evidence. base has the paper's input and latents."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        EEGVAE,
        _options,
        Card(
            title=f"β-VAE of EEG windows, {_parameters / 1e3:.0f} k parameters",
            paper="Honke et al. Representation learning for improved interpretability and classification accuracy of "
            "clinical factors from EEG. arXiv 2010.15274",
            code="none published",
            licence="Apache-2.0, ours",
            inputs="EEG [B, 3, 256] of FZ CZ PZ at 250 Hz, any unit (tiny: 64 samples)",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
