"""EEGNet: a filter bank over time, weights over electrodes for each filter, and a separable convolution.

Source: Lawhern et al., "EEGNet: a compact convolutional neural network for EEG-based brain-computer interfaces",
J. Neural Eng. 15, 2018 (1611.08024, fourth version), table 2, and the authors' code (github.com/vlawhern/arl-eegmodels,
CC0/Apache-2.0, Keras); braindecode 1.8.1 (BSD-3), a PyTorch one.

Input: EEG, in the paper at 128 Hz, `width` half a second of samples. Any other rate does, with a `width` that fits it.

The paper's and braindecode's differ, and `eegnet_8_2` and `eegnet_base` are the two: the paper keeps T in its
convolutions (the odd sample of silence after the window), drops half of its features in training, and limits the
classifier's weights; braindecode pads half a kernel on both sides, so that even kernels make T one longer, drops a
quarter, and limits them only where asked. Both differ from here in how a limit is kept, see `MaxNormHead`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import LinearHead
from zoo.encoders.windowed import Windowed, all_there, flat
from zoo.errors import ZooError
from zoo.layers.max_norm import MaxNormHead
from zoo.layers.parameters import dense, partitioned
from zoo.layers.temporal_filters import GLOROT, FilterBank, average_pool, batch_norm, filtered
from zoo.registry import Card, register
from zoo.types import AnyArray, Encoded, Sensors
from zoo.weights.keys import Ignore, Key

PADDINGS = ("same", "both")
EPSILON, MOMENTUM = 1e-3, 0.99


class EEGNet(Windowed):
    """EEGNet; tokens are its last feature map, pooled all of that, features by times.

    filters, depth   F1 and D: filters over time, and sums over electrodes of each
    mixed            F2: features of the last map; filters · depth where 0
    width, late_width
                     samples of the filters, and of the depthwise ones after the first pool
    pools            samples of the two means
    padding          same: as the paper; both: as braindecode
    spatial_max_norm, head_max_norm
                     largest norms of weights over electrodes, and of a class in the classifier; 0: none
    dropout          of each pooled map
    """

    samples: int = 128
    filters: int = 8
    depth: int = 2
    mixed: int = 0
    width: int = 64
    late_width: int = 16
    pools: tuple[int, int] = (4, 8)
    padding: str = "both"
    spatial_max_norm: float = 1.0
    head_max_norm: float = 0.0
    dropout: float = 0.25

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return self._times()[1] * (self.mixed or self.filters * self.depth)

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
        """signal [B, C, T] → tokens [B, T', F2], T' about T / 32. A channel that is not valid is silence.

        Raises ZooError for another montage or T, for a mask, and where an option is out of range.
        """
        signal = self.window(signal, sensors, mask)
        self.refuse_unless_positive(self._times()[1])
        drop = nn.Dropout(self.dropout, deterministic=not train)
        maps = self.filters * self.depth

        bank = FilterBank(
            self.filters,
            self.width,
            self.depth,
            self._around(self.width),
            self.spatial_max_norm,
            EPSILON,
            MOMENTUM,
            name="bank",
        )
        x = nn.elu(batch_norm(train, EPSILON, MOMENTUM, "norm1")(bank(signal, train)))
        x = drop(average_pool(x, self.pools[0], self.pools[0]))

        kernel = self.param("late", partitioned(GLOROT, None, None), (self.late_width, maps))
        x = filtered(jnp.pad(x, ((0, 0), self._around(self.late_width), (0, 0))), kernel)
        x = dense(self.mixed or maps, (None, None), init=GLOROT, name="mix")(x)
        x = nn.elu(batch_norm(train, EPSILON, MOMENTUM, "norm2")(x))
        tokens = drop(average_pool(x, self.pools[1], self.pools[1]))
        return all_there(tokens, flat(tokens))

    @nn.nowrap
    def head(self, classes: int) -> nn.Module:
        """A linear map, its weights limited where `head_max_norm` says so."""
        if self.head_max_norm:
            return MaxNormHead(classes, self.head_max_norm, kernel_init=GLOROT, bias_init=nn.initializers.zeros)
        return LinearHead(classes)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two.

        As published: filters first, on every channel.
        """
        maps = self.filters * self.depth
        first, late = samples + self._longer(self.width), samples // self.pools[0] + self._longer(self.late_width)
        bank = first * channels * (self.width * self.filters + maps)
        return 2.0 * (bank + late * maps * (self.late_width + (self.mixed or maps)))

    @nn.nowrap
    def _around(self, width: int) -> tuple[int, int]:
        """Samples of silence before and after what a filter of `width` reads."""
        if self.padding not in PADDINGS:
            raise ZooError(f"EEGNet padding must be one of {PADDINGS}, got {self.padding!r}")
        return (width // 2, width // 2) if self.padding == "both" else ((width - 1) // 2, width // 2)

    @nn.nowrap
    def _longer(self, width: int) -> int:
        return sum(self._around(width)) - (width - 1)

    @nn.nowrap
    def _times(self) -> tuple[int, int]:
        """Times after each pool."""
        first = (self.samples + self._longer(self.width)) // self.pools[0]
        return first, (first + self._longer(self.late_width)) // self.pools[1]


KEYS = (
    Key("conv_temporal.weight", "params/bank/temporal", "f 1 1 w -> w f"),
    Key("bnorm_temporal.weight", "params/bank/scale"),
    Key("bnorm_temporal.bias", "params/bank/bias"),
    Key("bnorm_temporal.running_mean", "batch_stats/bank/mean"),
    Key("bnorm_temporal.running_var", "batch_stats/bank/var"),
    Key("conv_spatial.parametrizations.weight.original", "params/bank/spatial", "(f d) 1 c 1 -> c f d"),
    Key("bnorm_{l}.weight", "params/norm{l}/scale"),
    Key("bnorm_{l}.bias", "params/norm{l}/bias"),
    Key("bnorm_{l}.running_mean", "batch_stats/norm{l}/mean"),
    Key("bnorm_{l}.running_var", "batch_stats/norm{l}/var"),
    Key("conv_separable_depth.weight", "params/late", "f 1 1 w -> w f"),
    Key("conv_separable_point.weight", "params/mix/kernel", "o i 1 1 -> i o"),
    Ignore("bnorm_temporal.num_batches_tracked", "a counter"),
    Ignore("bnorm_{l}.num_batches_tracked", "a counter"),
)
"""braindecode's EEGNet without its classifier."""

HEAD_KEYS = (
    Key("final_layer.conv_classifier.weight", "params/linear/kernel", "k f 1 t -> (f t) k"),
    Key("final_layer.conv_classifier.bias", "params/linear/bias"),
)
"""Its classifier."""

MAX_NORM_HEAD_KEYS = (
    Key("final_layer.linearconstraint.parametrizations.weight.original", "params/kernel", "k d -> d k"),
    Key("final_layer.linearconstraint.bias", "params/bias"),
)
"""Its classifier with limited weights."""

_PAPER: dict[str, Any] = {"channels": 64, "padding": "same", "dropout": 0.5, "head_max_norm": 0.25}
_PARITY = "parity: feature map, pooled vector and logits within 1e-6 (relative) of braindecode's, random weights"

VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "eegnet_tiny": (
        {"channels": 8, "samples": 64, "filters": 4, "width": 16, "late_width": 8, "pools": (2, 4)},
        296,
        "parity of its layers",
    ),
    "eegnet_4_2": ({**_PAPER, "filters": 4}, 1_000, _PARITY + ", but for the padding"),
    "eegnet_8_2": (_PAPER, 2_128, _PARITY + ", but for the padding"),
    "eegnet_base": ({}, 1_456, _PARITY),
}
"""Options, parameters without the classifier, evidence. 4_2 and 8_2 are the paper's (F1, D), base braindecode's
defaults, tiny is ours."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        EEGNet,
        _options,
        Card(
            title=f"EEGNet, {_parameters:,} parameters without its classifier",
            paper="Lawhern et al. EEGNet: a compact convolutional neural network for EEG-based brain-computer "
            "interfaces. J. Neural Eng. 15, 2018, arXiv 1611.08024",
            code="github.com/vlawhern/arl-eegmodels, github.com/braindecode/braindecode",
            licence="CC0 or Apache-2.0, BSD-3-Clause",
            inputs="EEG [B, C, T] of one montage and window length, in the paper 128 Hz and band-passed",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
