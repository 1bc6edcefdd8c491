"""ADHDeepNet: EEGNet's filter bank, four towers of filters of several lengths, features weighed by how loud they are.

Source: Amini, Alijanpour, Latifi and Motie Nasrabadi, "ADHDeepNet From Raw EEG to Diagnosis", 2509.08779; sizes are
facts of the authors' notebook (github.com/AliAmini93/ADHDeepNet, no licence; nothing of it is used here).

Input: EEG of 19 electrodes at 128 Hz, windows of 4 s. A person's class is the vote over all of their windows
(`zoo.evaluate.votes.vote`; the notebook leaves out each person's last), and people are never on both sides of a split
(`zoo.data.splits.by_subject`; the notebook stops its training and tunes on the people it then tests). It searched
filters {8 … 64}, depth {2, 4, 8}, width {32 … 512}, squeeze {8, 16, 32}, max_norm {.5 … 10}, dropout {.3, .4, .5}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from zoo.encoders.windowed import Windowed, all_there
from zoo.errors import ZooError
from zoo.layers.max_norm import MaxNormHead
from zoo.layers.parameters import dense, partitioned
from zoo.layers.temporal_filters import GLOROT, FilterBank, average_pool, batch_norm, filtered
from zoo.registry import Card, register
from zoo.types import AnyArray, Array, Encoded, Sensors

EPSILON, MOMENTUM = 1e-3, 0.99


class ADHDeepNet(Windowed):
    """ADHDeepNet; tokens are its last feature map, a quarter of the samples, pooled their mean.

    filters, depth  filters over time, and sums over electrodes of each
    width           samples of the filters
    towers          features of the towers: long filters, longer filters, a mean, every second sample
    tower_widths    samples of the filters of the first two towers, and of the last ones
    squeeze         features between the two layers that weigh features
    max_norm        largest norm of weights over electrodes, and of a class in the classifier
    dropout         of the first feature map, and of the last
    """

    channels: int | tuple[str, ...] = 19
    samples: int = 512
    filters: int = 64
    depth: int = 4
    width: int = 16
    towers: tuple[int, int, int, int] = (128, 32, 32, 64)
    tower_widths: tuple[int, int, int] = (128, 256, 64)
    squeeze: int = 16
    max_norm: float = 0.25
    dropout: float = 0.5

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)

    @property
    def sampling_rate(self) -> float:
        """Hz."""
        return 128.0

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return sum(self.towers)

    @nn.compact
    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        *,
        mask: Bool[AnyArray, "B _"] | Bool[AnyArray, "B _ _"] | None = None,
        subject: Int[AnyArray, " B"] | None = None,
        train: bool = False,
    ) -> Encoded:
        """signal [B, C, T] → tokens [B, T / 4, D]. A channel that is not valid is silence.

        Raises ZooError for another montage or T, for a mask, and for T that four does not divide.
        """
        signal = self.window(signal, sensors, mask)
        if self.samples % 4 or not self.samples:
            raise ZooError(f"ADHDeepNet: got windows of {self.samples} samples, wanted a multiple of 4")
        drop = nn.Dropout(self.dropout, deterministic=not train)

        def activated(x: Array, name: str) -> Array:
            return nn.elu(batch_norm(train, EPSILON, MOMENTUM, name)(x))

        bank = FilterBank(
            self.filters, self.width, self.depth, around(self.width), self.max_norm, EPSILON, MOMENTUM, name="bank"
        )
        x = drop(average_pool(activated(bank(signal, train), "norm1"), 2, 2))

        long, longer, mean, second = self.towers
        # Each of the first two narrows to half of what it then makes.
        first = Separable(long, self.tower_widths[0], name="long")(pointwise(long // 2, "long_narrow")(x))
        other = Separable(longer, self.tower_widths[1], name="longer")(pointwise(longer // 2, "longer_narrow")(x))
        x = jnp.concatenate(
            [
                average_pool(first, 2, 2),
                average_pool(other, 2, 2),
                pointwise(mean, "mean")(average_pool(x, 2, 2)),
                pointwise(second, "second")(x[:, ::2]),
            ],
            axis=-1,
        )
        x = SqueezeExcite(self.squeeze, name="weigh1")(activated(x, "norm2"))
        x = Separable(self.features, self.tower_widths[2], name="last")(x)
        tokens = drop(SqueezeExcite(self.squeeze, name="weigh2")(activated(x, "norm3")))
        return all_there(tokens, tokens.mean(1))

    @nn.nowrap
    def head(self, classes: int) -> nn.Module:
        """A linear map whose weights of a class are limited to `max_norm`."""
        return MaxNormHead(classes, self.max_norm, kernel_init=GLOROT, bias_init=nn.initializers.zeros)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two.

        As published: filters first, on every channel.
        """
        maps, half = self.filters * self.depth, samples // 2
        long, longer, mean, second = self.towers
        total = samples * channels * (self.width * self.filters + maps)
        for features, width in ((long, self.tower_widths[0]), (longer, self.tower_widths[1])):
            total += half * features // 2 * (maps + width + features)
        total += half // 2 * (maps * (mean + second) + self.features * (self.tower_widths[2] + self.features))
        return 2.0 * (total + 4 * self.squeeze * self.features)


class Separable(nn.Module):
    """A filter over time a feature, the window kept, then a linear map to `features`; no offsets."""

    features: int
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T G"]:
        kernel = self.param("filters", partitioned(GLOROT, None, None), (self.width, x.shape[-1]))
        return pointwise(self.features, "mix")(filtered(jnp.pad(x, ((0, 0), around(self.width), (0, 0))), kernel))


class SqueezeExcite(nn.Module):
    """Features times numbers in (0, 1) that two layers make of their means over time (Hu et al., 1709.01507)."""

    squeeze: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        def layer(features: int, name: str) -> nn.Dense:
            return dense(features, (None, None), bias=True, init=GLOROT, name=name)

        hidden = nn.relu(layer(self.squeeze, "squeeze")(x.mean(1)))
        return x * nn.sigmoid(layer(x.shape[-1], "excite")(hidden))[:, None]


def pointwise(features: int, name: str) -> nn.Dense:
    """A linear map without offset."""
    return dense(features, (None, None), init=GLOROT, name=name)


def around(width: int) -> tuple[int, int]:
    """Samples of silence that keep a window's length, the odd one after."""
    return (width - 1) // 2, width // 2


def with_noise(
    signal: Float[np.ndarray, "N C T"],
    label: Int[np.ndarray, " N"],
    deviations: Sequence[float],
    factors: Sequence[float],
    rng: np.random.Generator,
) -> tuple[Float[np.ndarray, "M C T"], Int[np.ndarray, " M"]]:
    """The windows, then each once more for every deviation and factor, normal noise times the factor added.

    The paper's augmentation: deviations .1, .01, .001 and factors 1, 2, 3, or some of them.
    """
    noisy = [signal]
    for deviation in deviations:
        for factor in factors:
            noise = factor * rng.normal(0, deviation, signal.shape)
            noisy.append((signal + noise).astype(signal.dtype))
    return np.concatenate(noisy), np.tile(label, len(noisy))


_EVIDENCE = "its definition in float64, written out in its test"

VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "adhdeepnet_tiny": (
        {
            "channels": 8,
            "samples": 128,
            "filters": 8,
            "depth": 2,
            "towers": (16, 4, 4, 8),
            "tower_widths": (32, 64, 16),
            "squeeze": 4,
        },
        3_424,
        _EVIDENCE,
    ),
    "adhdeepnet_base": ({}, 172_448, _EVIDENCE),
}
"""Options, parameters without the classifier, evidence. base is the notebook's defaults, tiny is ours."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        ADHDeepNet,
        _options,
        Card(
            title=f"ADHDeepNet, {_parameters:,} parameters without its classifier",
            paper="Amini et al. ADHDeepNet From Raw EEG to Diagnosis: Improving ADHD Diagnosis through "
            "Temporal-Spatial Processing, Adaptive Attention Mechanisms, and Explainability in Raw EEG Signals. "
            "2025, arXiv 2509.08779",
            code="github.com/AliAmini93/ADHDeepNet",
            licence="none (facts only)",
            inputs="EEG [B, 19, 512] at 128 Hz",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
