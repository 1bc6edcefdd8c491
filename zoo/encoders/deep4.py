"""Deep4Net: four blocks of convolution, batch normalisation and maxima over time, and a linear classifier.

Source: Schirrmeister et al., "Deep learning with convolutional neural networks for EEG decoding and visualization",
Human Brain Mapping 38, 2017 (1703.05051), §2.4.2; braindecode 1.8.1 (BSD-3), whose first authors are the paper's.

Input: EEG, in the paper at 250 Hz, band-passed, standardised by a running mean and variance.

The paper's and braindecode's agree. Where this differs from braindecode: a window too short for the blocks is refused,
where braindecode shortens its kernels, and of equal samples in a maximum each gets its share of the gradient.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
from jaxtyping import Bool, Float, Int

from zoo.encoders.windowed import FlatHead, Windowed, all_there, flat
from zoo.layers.convolution import Convolution
from zoo.layers.temporal_filters import GLOROT, TemporalSpatial, batch_norm, max_pool
from zoo.registry import Card, register
from zoo.types import AnyArray, Encoded, Sensors
from zoo.weights.keys import Ignore, Key

EPSILON = 1e-5


class Deep4(Windowed):
    """Deep4Net; tokens are the last maxima, pooled all of that, features by times.

    filters  filters over time of the first block
    maps     features of each block
    width    samples of every kernel
    pool     samples of every maximum
    dropout  of what enters the blocks but the first
    """

    filters: int = 25
    maps: tuple[int, ...] = (25, 50, 100, 200)
    width: int = 10
    pool: int = 3
    dropout: float = 0.5

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return self.maps[-1] * self._times()[-1]

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
        """signal [B, C, T] → tokens [B, T', maps of the last block]. A channel that is not valid is silence.

        Raises ZooError for another montage or T, for a mask, and where T is too short.
        """
        signal = self.window(signal, sensors, mask)
        self.refuse_unless_positive(min(self._times()))
        x = TemporalSpatial(self.filters, self.width, self.maps[0], name="first")(signal)
        for block, features in enumerate(self.maps, start=1):
            if block > 1:
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
                x = Convolution(features, (self.width,), bias=False, kernel_init=GLOROT, name=f"conv{block}")(x)
            x = max_pool(nn.elu(batch_norm(train, EPSILON, name=f"norm{block}")(x)), self.pool)
        return all_there(x, flat(x))

    @nn.nowrap
    def head(self, classes: int) -> nn.Module:
        """A linear map of all features at all times."""
        return FlatHead(classes, self.maps[-1])

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two.

        As published: filters first, on every channel.
        """
        times = samples - self.width + 1
        total = times * channels * self.filters * (self.width + self.maps[0])
        for before, after in zip(self.maps, self.maps[1:], strict=False):
            times = times // self.pool - self.width + 1
            total += times * self.width * before * after
        return 2.0 * total

    @nn.nowrap
    def _times(self) -> list[int]:
        """Times after each block."""
        times, after = self.samples, []
        for _ in self.maps:
            times = (times - self.width + 1) // self.pool
            after.append(times)
        return after


KEYS = (
    Key("conv_time_spat.conv_time.weight", "params/first/temporal", "i 1 w 1 -> w i"),
    Key("conv_time_spat.conv_time.bias", "params/first/temporal_bias"),
    Key("conv_time_spat.conv_spat.weight", "params/first/spatial", "o i 1 c -> c i o"),
    Key("conv_{l}.weight", "params/conv{l}/kernel", "o i w 1 -> w i o"),
    Key("bnorm.weight", "params/norm1/scale"),
    Key("bnorm.bias", "params/norm1/bias"),
    Key("bnorm.running_mean", "batch_stats/norm1/mean"),
    Key("bnorm.running_var", "batch_stats/norm1/var"),
    Key("bnorm_{l}.weight", "params/norm{l}/scale"),
    Key("bnorm_{l}.bias", "params/norm{l}/bias"),
    Key("bnorm_{l}.running_mean", "batch_stats/norm{l}/mean"),
    Key("bnorm_{l}.running_var", "batch_stats/norm{l}/var"),
    Ignore("bnorm.num_batches_tracked", "a counter"),
    Ignore("bnorm_{l}.num_batches_tracked", "a counter"),
)
"""braindecode's Deep4Net without its classifier."""

HEAD_KEYS = (
    Key("final_layer.conv_classifier.weight", "params/kernel", "k f t 1 -> (f t) k"),
    Key("final_layer.conv_classifier.bias", "params/bias"),
)
"""Its classifier."""

VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "deep4_tiny": (
        {"channels": 8, "samples": 64, "filters": 8, "maps": (8, 16, 32), "width": 5, "pool": 2},
        3_872,
        "parity of its layers",
    ),
    "deep4_base": ({}, 277_275, "parity: feature map and logits within 1e-6 (relative) of braindecode's"),
}
"""Options, parameters without the classifier, evidence. base is the paper's and braindecode's, tiny is ours."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        Deep4,
        _options,
        Card(
            title=f"Deep4Net, {_parameters:,} parameters without its classifier",
            paper="Schirrmeister et al. Deep learning with convolutional neural networks for EEG decoding and "
            "visualization. Human Brain Mapping 38, 2017, arXiv 1703.05051",
            code="github.com/braindecode/braindecode",
            licence="BSD-3-Clause",
            inputs="EEG [B, C, T] of one montage and window length, in the paper 250 Hz, band-passed, standardised",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
