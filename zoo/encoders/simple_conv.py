"""SimpleConv: dilated convolutions over sensors brought to a fixed layout, for decoding the speech that is heard.

Source: Défossez, Caucheteux, Rapin, Kabeli and King, "Decoding speech perception from non-invasive brain recordings",
Nature Machine Intelligence 2023, 2208.12266, §2.3 and extended data figure 4; the model of the same name in
github.com/facebookresearch/neuroai (MIT), whose weights `KEYS` carries over.

Input: MEG or EEG at 120 Hz, 0.5–30 Hz or wider, each window less the mean of its first half second, channels scaled by
their quartiles, then clipped at ±20; 3 s are 360 samples. What it decodes lies 150 ms earlier. Output: a vector a
sample, as long as the sound's features (1024 of wav2vec 2.0, or 120 mel bands). Any sensors in any order, known by
where they are.

Where this differs from the published model:
- Sensors are laid out in the graph as MNE lays out EEG (`zoo.layers.spatial_attention.flattened`); for MEG the authors
  take MNE's drawing of each device instead.
- The layer of a subject is there only where `subjects` says how many there are, since the number is a dataset's own.
- `pooled`, which the paper has no use for, is the mean over time, as in braindecode's model.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import Encoder, blank
from zoo.errors import ZooError
from zoo.layers.convolution import Convolution
from zoo.layers.dilated import DilatedConvolutions
from zoo.layers.spatial_attention import SpatialAttention, check_placed
from zoo.layers.subject import SubjectLayer
from zoo.registry import Card, register
from zoo.types import AnyArray, Array, Encoded, Sensors
from zoo.weights.keys import Ignore, Key, Rule


class SimpleConv(Encoder):
    """The brain module of speech decoding.

    rate                 Hz of its windows; 0 takes any
    virtual              channels that spatial attention makes of the sensors
    frequencies, radius  of that attention (`zoo.layers.spatial_attention`)
    mixed                features of the map after it
    subjects             how many have a matrix of their own, over the mixed features; 0: none has
    width, depth         of the convolutions (`zoo.layers.dilated`)
    period               layers until dilation begins at 1 again
    dropout              after each convolution
    outputs              features of the stimulus that it predicts; 0 gives the last convolution's
    dtype                compute dtype of the convolutions
    """

    rate: float = 120.0
    virtual: int = 270
    frequencies: int = 32
    radius: float = 0.2
    mixed: int = 270
    subjects: int = 0
    width: int = 320
    depth: int = 10
    period: int = 5
    dropout: float = 0.0
    outputs: int = 1024
    dtype: DTypeLike = jnp.float32

    TAKES: ClassVar[tuple[str, ...]] = ("eeg", "mag", "grad", "seeg", "ecog")

    @property
    def sampling_rate(self) -> float | None:
        """Hz that its windows are measured in."""
        return self.rate or None

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return self.outputs or self.width

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
        """signal [B, C, T] → Encoded: a token a sample [B, T, outputs], pooled their mean.

        Channels that are not valid, or have no position, get no weight. `train` draws the disc of hidden sensors and
        dropout from the stream "dropout". Raises ZooError for a mask, and where subjects are wanted and not given or
        given and not wanted.
        """
        if mask is not None:
            raise ZooError("SimpleConv: hides nothing, got a mask")
        signal = self.present(signal, sensors)
        x = brought_together(self, signal, sensors, subject, train)
        x = self._trunk()(x, train=train)
        if self.outputs:
            x = Convolution(2 * x.shape[-1], (1,), dtype=self.dtype, name="out_in")(x)
            x = jax.nn.gelu(x, approximate=False)
            x = Convolution(self.outputs, (1,), dtype=self.dtype, name="out")(x)
        x = nn.with_logical_constraint(x, ("batch", "tokens", None)).astype(jnp.float32)
        return Encoded(tokens=x, pooled=x.mean(1), valid=jnp.ones(x.shape[:2], bool))

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two."""
        out = 4 * samples * self.width * (self.width + self.outputs) if self.outputs else 0
        return together_flops(self, channels, samples) + self._trunk().flops(self.mixed, samples) + out

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """One sensor and eight samples."""
        return blank(1, 8)

    @nn.nowrap
    def check_positions(self, sensors: Sensors) -> None:
        """Raises ZooError for sensors, on the host, with valid channels whose place is not known."""
        check_placed(type(self).__name__, sensors)

    @nn.nowrap
    def _trunk(self) -> DilatedConvolutions:
        return DilatedConvolutions(
            self.width, self.depth, period=self.period, dropout=self.dropout, dtype=self.dtype, name="trunk"
        )


def brought_together(
    encoder: Any, signal: Float[Array, "B C T"], sensors: Sensors, subject: AnyArray | None, train: bool
) -> Float[Array, "B T G"]:
    """Sensors to `virtual` channels, a map to `mixed` features, then the subject's own map of these.

    Called inside the compact method of an encoder with the fields of `SimpleConv` and perhaps `axes`. Raises ZooError
    where a subject is wanted and not given, or given and not wanted.
    """
    name = type(encoder).__name__
    if (subject is None) == (encoder.subjects > 0):
        wanted = f"the subject of each example, 0 to {encoder.subjects - 1}" if encoder.subjects else "no subject"
        raise ZooError(f"{name}: wanted {wanted}, got {'none' if subject is None else 'some'}")
    x = merger(encoder)(signal, sensors, train=train)
    x = Convolution(encoder.mixed, (1,), dtype=encoder.dtype, name="mix")(x)
    if subject is not None:
        x = SubjectLayer(encoder.subjects, name="subject")(x, subject)
    return x


def merger(encoder: Any) -> SpatialAttention:
    """The spatial attention of an encoder with these fields."""
    axes = getattr(encoder, "axes", 2)
    return SpatialAttention(encoder.virtual, encoder.frequencies, axes, encoder.radius, name="merger")


def together_flops(encoder: Any, channels: int, samples: int) -> float:
    """Operations of `brought_together` for one example."""
    mixed = 2 * samples * encoder.mixed * (encoder.virtual + encoder.mixed * (encoder.subjects > 0))
    return merger(encoder).flops(channels, samples) + mixed


_EVIDENCE = "parity: tokens and pooled within 1e-5 (relative) of neuroai's and braindecode's models, random weights"

VARIANTS: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "simple_conv_tiny": (
        {"virtual": 32, "frequencies": 8, "mixed": 32, "width": 48, "depth": 6, "period": 3, "outputs": 128},
        104_064,
        "128 features of sound",
        "parity of its layers; trained: benchmarks/speech_retrieval.py",
    ),
    "simple_conv_base": ({}, 7_596_754, "1024 features of wav2vec 2.0", _EVIDENCE),
    "simple_conv_mel": ({"outputs": 120}, 7_017_290, "120 mel bands", _EVIDENCE),
}
"""Options, parameters, what it decodes, evidence. tiny is ours; the others are the paper's."""

for _name, (_options, _parameters, _decodes, _evidence) in VARIANTS.items():
    register(
        _name,
        SimpleConv,
        _options,
        Card(
            title=f"SimpleConv, decoding {_decodes}, {_parameters / 1e6:.1f} M parameters",
            paper="Défossez, Caucheteux, Rapin, Kabeli, King. Decoding speech perception from non-invasive brain "
            "recordings. Nature Machine Intelligence 2023, arXiv 2208.12266",
            code="github.com/facebookresearch/neuroai (MIT); github.com/facebookresearch/brainmagick (CC BY-NC)",
            licence="MIT (neuroai)",
            inputs="MEG or EEG [B, C, T] at 120 Hz with positions, baseline of 0.5 s, scaled by quartiles, ±20",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )

TRUNK_KEYS: tuple[Rule, ...] = (
    *[
        Key(f"encoder.sequence.{{k}}.0.{theirs}", f"params/trunk/convolution{{k}}/{ours}", how)
        for theirs, ours, how in (("weight", "kernel", "o i t -> t i o"), ("bias", "bias", ""))
    ],
    *[
        Key(f"encoder.sequence.{{k}}.1.{theirs}", f"{collection}/trunk/norm{{k}}/{ours}")
        for theirs, collection, ours in (
            ("weight", "params", "scale"),
            ("bias", "params", "bias"),
            ("running_mean", "batch_stats", "mean"),
            ("running_var", "batch_stats", "var"),
        )
    ],
    Ignore("encoder.sequence.{k}.1.num_batches_tracked", "a counter"),
    Key("encoder.glus.{k}.0.weight", "params/trunk/gate{k}/kernel", "o i t -> t i o"),
    Key("encoder.glus.{k}.0.bias", "params/trunk/gate{k}/bias"),
)
MERGER_KEYS: tuple[Rule, ...] = (
    Key("merger.heads", "params/merger/rows"),
    Ignore("merger.embedding.pos", "frequencies, which follow from their number"),
)
MIX_KEYS: tuple[Rule, ...] = (
    Key("initial_linear.0.weight", "params/mix/kernel", "o i t -> t i o"),
    Key("initial_linear.0.bias", "params/mix/bias"),
)
KEYS: tuple[Rule, ...] = (
    *MERGER_KEYS,
    *MIX_KEYS,
    *TRUNK_KEYS,
    Key("final.0.weight", "params/out_in/kernel", "o i t -> t i o"),
    Key("final.0.bias", "params/out_in/bias"),
    # A transposed convolution, whose first axis is the input's.
    Key("final.2.weight", "params/out/kernel", "i o t -> t i o"),
    Key("final.2.bias", "params/out/bias"),
)
"""neuroai's SimpleConv without subjects."""
SUBJECT_KEYS: tuple[Rule, ...] = (*KEYS, Key("subject_layers.weights", "params/subject/kernel"))
"""With subject layers, without their biases."""
BRAINDECODE_KEYS: tuple[Rule, ...] = (
    *MERGER_KEYS,
    Key("input_projection.weight", "params/mix/kernel", "o i t -> t i o"),
    Key("input_projection.bias", "params/mix/bias"),
    *TRUNK_KEYS,
)
"""braindecode's BrainModule with its merger, but for its classifier: mixed = width, no outputs."""
BRAINDECODE_HEAD_KEYS: tuple[Rule, ...] = (
    Key("final_layer.2.weight", "params/linear/kernel", "o i -> i o"),
    Key("final_layer.2.bias", "params/linear/bias"),
)
