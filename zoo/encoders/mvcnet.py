"""MVCNet's convolutional branch: sums over electrodes, a filter over time for each, means.

Source: Wang et al., "MVCNet: Multi-View Contrastive Network for Motor Imagery Classification", Knowledge-Based Systems
2025; sizes and initial values are facts of the authors' code (github.com/wzwvv/MVCNet, no licence; nothing of it is
used here), whose branch is IFNet (Wang et al., IEEE TNSRE 31, 2023) with one frequency band.

Input: EEG of motor imagery at 250 Hz, 4 s, each person's whitened by the inverse root of its mean covariance (Euclidean
alignment, He and Wu, IEEE TBME 67, 2020).

Training has a second branch, which a test does not need, and four views of every window: `zoo.objectives.mvcnet`. The
published windows have 1,001 samples, the last of which the filters read and the means do not; `samples=1001` does so.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from zoo.encoders.windowed import Windowed, all_there, flat
from zoo.layers.parameters import dense, partitioned
from zoo.layers.temporal_filters import average_pool, batch_norm, filtered
from zoo.registry import Card, register
from zoo.types import AnyArray, Encoded, Sensors
from zoo.weights.keys import Ignore, Key

SMALL = nn.initializers.normal(0.01)
"""The code's `trunc_normal_` cuts at ±2, two hundred deviations away."""
EPSILON = 1e-5


class MVCNet(Windowed):
    """The convolutional branch; tokens are its means, pooled all of them, features by times.

    maps     sums over electrodes, each with a filter over time
    width    samples of a filter, odd
    pool     samples of a mean
    dropout  of the means
    """

    maps: int = 64
    width: int = 63
    pool: int = 125
    dropout: float = 0.5

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return self.maps * (self.samples // self.pool)

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
        """signal [B, C, T] → tokens [B, T / pool, maps]. A channel that is not valid is silence.

        Raises ZooError for another montage or T, for a mask, and where T is shorter than a mean.
        """
        signal = self.window(signal, sensors, mask)
        self.refuse_unless_positive(self.samples // self.pool)
        x = dense(self.maps, (None, None), init=SMALL, name="spatial")(signal.swapaxes(1, 2))
        x = batch_norm(train, EPSILON, name="norm1")(x)
        kernel = self.param("temporal", partitioned(SMALL, None, None), (self.width, self.maps))
        half = self.width // 2
        x = filtered(jnp.pad(x, ((0, 0), (half, half), (0, 0))), kernel)
        x = nn.gelu(batch_norm(train, EPSILON, name="norm2")(x), approximate=False)
        tokens = nn.Dropout(self.dropout, deterministic=not train)(average_pool(x, self.pool, self.pool))
        return all_there(tokens, flat(tokens))

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two."""
        return 2.0 * samples * self.maps * (channels + self.width)


KEYS = (
    Key("stem.sconv.conv.weight", "params/spatial/kernel", "o i 1 -> i o"),
    Key("stem.tconv.0.conv.weight", "params/temporal", "f 1 w -> w f"),
    *(
        key
        for theirs, ours in (("stem.sconv.bn", "norm1"), ("stem.tconv.0.bn", "norm2"))
        for key in (
            Key(f"{theirs}.weight", f"params/{ours}/scale"),
            Key(f"{theirs}.bias", f"params/{ours}/bias"),
            Key(f"{theirs}.running_mean", f"batch_stats/{ours}/mean"),
            Key(f"{theirs}.running_var", f"batch_stats/{ours}/var"),
            Ignore(f"{theirs}.num_batches_tracked", "a counter"),
        )
    ),
    Ignore("fc.0.weight", "a classifier that the authors' training leaves aside"),
    Ignore("fc.0.bias", "a classifier that the authors' training leaves aside"),
)
"""The authors' branch (IFNet, radix 1)."""

HEAD_KEYS = (
    Key("fc.weight", "params/linear/kernel", "k d -> d k"),
    Key("fc.bias", "params/linear/bias"),
)
"""Their classifier."""

VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "mvcnet_tiny": ({"channels": 8, "samples": 64, "maps": 16, "width": 9, "pool": 16}, 336, "parity of its layers"),
    "mvcnet_base": ({}, 5_696, "parity: pooled vector within 1e-6 (relative) of the authors' branch, random weights"),
}
"""Options, parameters without the classifier, evidence. tiny is ours."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        MVCNet,
        _options,
        Card(
            title=f"MVCNet's convolutional branch, {_parameters:,} parameters without its classifier",
            paper="Wang et al. MVCNet: Multi-View Contrastive Network for Motor Imagery Classification. "
            "Knowledge-Based Systems 2025",
            code="github.com/wzwvv/MVCNet",
            licence="none (facts only)",
            inputs="EEG [B, C, T] of one montage and window length, in the paper 250 Hz, Euclidean-aligned",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
