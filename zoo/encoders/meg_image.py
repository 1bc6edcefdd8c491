"""MEG to images: SimpleConv's trunk with one vector a window, for decoding the image that is seen.

Source: Benchetrit, Banville and King, "Brain decoding: toward real-time reconstruction of visual perception", ICLR
2024, 2310.19812, §2.3; its model is `SimpleConvTimeAgg` of github.com/facebookresearch/neuroai (MIT), whose weights
`KEYS` carries over.

Input: MEG (or EEG) at 120 Hz, a window from half a second before the image to one second after it (181 samples), less
its baseline, channels scaled by their quartiles, then clipped at ±20. Any sensors in any order, known by their places
in three dimensions.

`meg_image_base` is the configuration of neuroai's benchmark (windows of 256 samples; the last convolution leads to 512
features). The paper's own has 2048 features by a linear map (`meg_image_wide`: from a card, its widths not checked
against code) and layers of its four subjects, which `subjects=4` adds. The two projections that are trained on top, one
for the contrast and one for the regression, belong to the task (`zoo.objectives.meg_image`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import Encoder, blank
from zoo.encoders.simple_conv import MERGER_KEYS, MIX_KEYS, TRUNK_KEYS, brought_together, together_flops
from zoo.errors import ZooError
from zoo.layers.convolution import Convolution
from zoo.layers.dilated import DilatedConvolutions
from zoo.layers.parameters import torch_linear
from zoo.layers.spatial_attention import check_placed
from zoo.registry import Card, register
from zoo.types import AnyArray, Array, Encoded, Sensors
from zoo.weights.keys import Key, Rule

AGGREGATIONS = ("linear", "mean", "attention")
ATTENTION_FEATURES = 256


class MEGImage(Encoder):
    """The brain module of image decoding.

    rate                 Hz of its windows; 0 takes any
    samples              of its windows
    virtual              channels that spatial attention makes of the sensors
    frequencies, radius  of that attention (`zoo.layers.spatial_attention`), an axis; `axes` 3 or 2
    mixed                features of the map after it
    subjects             how many have a matrix of their own, over the mixed features; 0: none has
    width, depth         of the convolutions (`zoo.layers.dilated`)
    period               layers until dilation begins at 1 again
    dropout              after each convolution
    outputs              features of a sample, and of the pooled vector
    last                 what leads to them: "convolution", the last of the trunk, or "linear", a map after it
    aggregate            samples to one: "linear", learned weights; "mean"; "attention", weights by content (additive)
    dtype                compute dtype of the convolutions
    """

    rate: float = 120.0
    samples: int = 181
    virtual: int = 270
    frequencies: int = 10
    axes: int = 3
    radius: float = 0.2
    mixed: int = 270
    subjects: int = 0
    width: int = 320
    depth: int = 4
    period: int = 5
    dropout: float = 0.0
    outputs: int = 512
    last: str = "convolution"
    aggregate: str = "linear"
    dtype: DTypeLike = jnp.float32

    TAKES: ClassVar[tuple[str, ...]] = ("eeg", "mag", "grad")

    @property
    def sampling_rate(self) -> float | None:
        """Hz that its windows are measured in."""
        return self.rate or None

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return self.outputs

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
        """signal [B, C, T] → Encoded: a token a sample [B, T, outputs], pooled their aggregation.

        Channels that are not valid, or have no position, get no weight. `train` draws the ball of hidden sensors and
        dropout from the stream "dropout". Raises ZooError for a mask, for windows of other than `samples`, for unknown
        options, and where subjects are wanted and not given or given and not wanted.
        """
        if mask is not None:
            raise ZooError("MEGImage: hides nothing, got a mask")
        if signal.shape[-1] != self.samples:
            raise ZooError(f"MEGImage: got a window of {signal.shape[-1]} samples, wanted {self.samples}")
        if self.last not in ("convolution", "linear"):
            raise ZooError(f"MEGImage last: got {self.last!r}, wanted 'convolution' or 'linear'")
        signal = self.present(signal, sensors)
        x = brought_together(self, signal, sensors, subject, train)
        x = self._trunk()(x, train=train)
        if self.last == "linear":
            x = Convolution(self.outputs, (1,), dtype=self.dtype, name="out")(x)
        x = nn.with_logical_constraint(x, ("batch", "tokens", None)).astype(jnp.float32)
        return Encoded(tokens=x, pooled=self._aggregated(x), valid=jnp.ones(x.shape[:2], bool))

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two."""
        out = 2 * samples * self.width * self.outputs * (self.last == "linear")
        attention = 2 * samples * self.outputs * ATTENTION_FEATURES * (self.aggregate == "attention")
        trunk = self._trunk().flops(self.mixed, samples)
        return together_flops(self, channels, samples) + trunk + out + attention + 2 * samples * self.outputs

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """One sensor of one example."""
        return blank(1, self.samples, "mag")

    @nn.nowrap
    def check_positions(self, sensors: Sensors) -> None:
        """Raises ZooError for sensors, on the host, with valid channels whose place is not known."""
        check_placed(type(self).__name__, sensors)

    @nn.nowrap
    def _trunk(self) -> DilatedConvolutions:
        outputs = self.outputs if self.last == "convolution" else 0
        return DilatedConvolutions(
            self.width, self.depth, outputs, period=self.period, dropout=self.dropout, dtype=self.dtype, name="trunk"
        )

    def _aggregated(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        if self.aggregate == "mean":
            return x.mean(1)
        if self.aggregate == "linear":
            return torch_linear(1, self.samples, "aggregate")(x.swapaxes(1, 2))[..., 0]
        if self.aggregate == "attention":
            hidden = jnp.tanh(torch_linear(ATTENTION_FEATURES, self.outputs, "attend_in")(x))
            scores = torch_linear(1, ATTENTION_FEATURES, "attend_out")(hidden)
            return jnp.einsum("bto,btd->bd", jax.nn.softmax(scores, axis=1), x)
        raise ZooError(f"MEGImage aggregate: got {self.aggregate!r}, wanted {', '.join(AGGREGATIONS)}")


VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "meg_image_tiny": (
        {"virtual": 32, "frequencies": 4, "mixed": 32, "width": 48, "outputs": 64, "samples": 60},
        71_981,
        "parity of its layers; learns a known answer in its tests",
    ),
    "meg_image_base": (
        {"samples": 256},
        4_170_867,
        "parity: tokens and pooled within 1e-5 (relative) of neuroai's model, random weights; its parameter count",
    ),
    "meg_image_wide": (
        {"outputs": 2048, "last": "linear"},
        3_685_480,
        "shapes; parity of its layers. Its widths are unverified",
    ),
}
"""Options, parameters (encoder without the task's projections), evidence. tiny is ours."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        MEGImage,
        _options,
        Card(
            title=f"MEG-to-image module, {_parameters / 1e6:.1f} M parameters",
            paper="Benchetrit, Banville, King. Brain decoding: toward real-time reconstruction of visual perception. "
            "ICLR 2024, arXiv 2310.19812",
            code="github.com/facebookresearch/neuroai",
            licence="MIT",
            inputs="MEG or EEG [B, C, T] at 120 Hz with positions, from −0.5 s to 1 s about the image, baseline, "
            "scaled by quartiles, ±20",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )

KEYS: tuple[Rule, ...] = (
    *MERGER_KEYS,
    *MIX_KEYS,
    *TRUNK_KEYS,
    Key("time_agg_out.weight", "params/aggregate/kernel", "o t -> t o"),
    Key("time_agg_out.bias", "params/aggregate/bias"),
)
"""neuroai's SimpleConvTimeAgg without subjects, with a linear aggregation; its `output_head` is the task's."""
ATTENTION_KEYS: tuple[Rule, ...] = (
    *MERGER_KEYS,
    *MIX_KEYS,
    *TRUNK_KEYS,
    *[
        key
        for theirs, ours in (("Wa", "attend_in"), ("Va", "attend_out"))
        for key in (
            Key(f"time_agg_out.{theirs}.weight", f"params/{ours}/kernel", "o i -> i o"),
            Key(f"time_agg_out.{theirs}.bias", f"params/{ours}/bias"),
        )
    ],
)
"""The same with attention over time."""
