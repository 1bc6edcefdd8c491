"""ShallowFBCSPNet: filters over time and electrodes, the logarithm of their power in windows, a linear classifier.

Source: Schirrmeister et al., "Deep learning with convolutional neural networks for EEG decoding and visualization",
Human Brain Mapping 38, 2017 (1703.05051), §2.4.3; braindecode 1.8.1 (BSD-3), whose first authors are the paper's.

Input: EEG, in the paper at 250 Hz, band-passed, standardised by a running mean and variance.

The paper's and braindecode's agree. What is drawn at first is Glorot's uniform, offsets 0, as in both.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from zoo.encoders.windowed import FlatHead, Windowed, all_there, flat
from zoo.layers.temporal_filters import TemporalSpatial, average_pool, batch_norm
from zoo.registry import Card, register
from zoo.types import AnyArray, Encoded, Sensors
from zoo.weights.keys import Ignore, Key

EPSILON = 1e-5
FLOOR = 1e-6
"""Least power that the logarithm tells apart."""


class Shallow(Windowed):
    """ShallowFBCSPNet; tokens are log power in windows, pooled all of that, features by times.

    filters, width, maps   filters over time and their samples, sums over electrodes and filters
    pool, stride           samples of a window of power, and between two
    dropout                of the log power
    """

    filters: int = 40
    width: int = 25
    maps: int = 40
    pool: int = 75
    stride: int = 15
    dropout: float = 0.5

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return self.maps * self._times()

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
        """signal [B, C, T] → tokens [B, A, maps], A windows of power. A channel that is not valid is silence.

        Raises ZooError for another montage or T, for a mask, and where T is too short.
        """
        signal = self.window(signal, sensors, mask)
        self.refuse_unless_positive(self._times())
        x = TemporalSpatial(self.filters, self.width, self.maps, name="first")(signal)
        x = batch_norm(train, EPSILON, name="norm")(x)
        power = average_pool(jnp.square(x), self.pool, self.stride)
        tokens = nn.Dropout(self.dropout, deterministic=not train)(jnp.log(jnp.maximum(power, FLOOR)))
        return all_there(tokens, flat(tokens))

    @nn.nowrap
    def head(self, classes: int) -> nn.Module:
        """A linear map of all features at all times."""
        return FlatHead(classes, self.maps)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two.

        As published: filters first, on every channel.
        """
        return 2.0 * (samples - self.width + 1) * channels * self.filters * (self.width + self.maps)

    @nn.nowrap
    def _times(self) -> int:
        """Windows of power."""
        return (self.samples - self.width + 1 - self.pool) // self.stride + 1


KEYS = (
    Key("conv_time_spat.conv_time.weight", "params/first/temporal", "i 1 w 1 -> w i"),
    Key("conv_time_spat.conv_time.bias", "params/first/temporal_bias"),
    Key("conv_time_spat.conv_spat.weight", "params/first/spatial", "o i 1 c -> c i o"),
    Key("bnorm.weight", "params/norm/scale"),
    Key("bnorm.bias", "params/norm/bias"),
    Key("bnorm.running_mean", "batch_stats/norm/mean"),
    Key("bnorm.running_var", "batch_stats/norm/var"),
    Ignore("bnorm.num_batches_tracked", "a counter"),
)
"""braindecode's ShallowFBCSPNet without its classifier."""

HEAD_KEYS = (
    Key("final_layer.conv_classifier.weight", "params/kernel", "k f t 1 -> (f t) k"),
    Key("final_layer.conv_classifier.bias", "params/bias"),
)
"""Its classifier."""

VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "shallow_tiny": (
        {"channels": 8, "samples": 64, "filters": 8, "width": 9, "maps": 8, "pool": 16, "stride": 8},
        608,
        "parity of its layers",
    ),
    "shallow_base": ({}, 36_320, "parity: feature map and logits within 1e-6 (relative) of braindecode's"),
}
"""Options, parameters without the classifier, evidence. base is the paper's and braindecode's, tiny is ours."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        Shallow,
        _options,
        Card(
            title=f"ShallowFBCSPNet, {_parameters:,} parameters without its classifier",
            paper="Schirrmeister et al. Deep learning with convolutional neural networks for EEG decoding and "
            "visualization. Human Brain Mapping 38, 2017, arXiv 1703.05051",
            code="github.com/braindecode/braindecode",
            licence="BSD-3-Clause",
            inputs="EEG [B, C, T] of one montage and window length, in the paper 250 Hz, band-passed, standardised",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
