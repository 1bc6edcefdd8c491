"""BIOT: half-second spectra of each channel as words of one sentence, read by linear attention.

Source: Yang, Westover and Sun, "BIOT: Biosignal Transformer for Cross-data Learning in the Wild", NeurIPS 2023, section
2, and the official code (github.com/ycq091044/BIOT, MIT).

Input: biosignals at 200 Hz in any unit: each channel of a window is divided here by the 95th percentile of its
magnitude (plus 1e-8), as the official loaders do.

A channel has a token: a row of a table that is chosen by the channel's name, so channels may come in any order and any
of them may be missing. Official code takes row i for the i-th channel given; the published rows are those of
`BIPOLAR`, and two more for the sleep recordings of SHHS, whose derivations have no canonical name here. Where
`channels` is a number, channels need no names and the i-th takes row i: then their order matters.

Transforms are of rectangular frames: the official code names no window, for which PyTorch takes ones. What fills no
frame at the end of a window is left out.

Where this differs from the official code:
- A channel that is not valid has no words: none attends to it and it is not pooled.
- Words that a mask hides are left out in the same way. This is the published perturbation of pretraining, which draws
  words once for a whole batch; `zoo.objectives.biot` draws them for each window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import Encoder, blank
from zoo.errors import ZooError
from zoo.layers.linear_transformer import KEYS as LAYER_KEYS
from zoo.layers.linear_transformer import LinearTransformer
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias, partitioned
from zoo.layers.post_norm import sinusoids
from zoo.layers.spectra import stft
from zoo.registry import Card, register
from zoo.sensors import NAME_INDEX, NAMES
from zoo.types import AnyArray, Array, Encoded, Sensors
from zoo.weights.keys import Ignore, Key, Rule, below

_BANANA = "FP1-F7 F7-T7 T7-P7 P7-O1 FP2-F8 F8-T8 T8-P8 P8-O2 FP1-F3 F3-C3 C3-P3 P3-O1 FP2-F4 F4-C4 C4-P4 P4-O2"
BIPOLAR: tuple[str, ...] = tuple(_BANANA.split())
"""The double banana of TUAB, TUEV and PREST, in the published order of rows."""
MAX_FRAMES = 1000
"""Positions of the published table."""


class BIOT(Encoder):
    """The BIOT encoder.

    channels           names of the table's rows, or how many rows, then for channels in their order
    dim, depth, heads  features, layers and attention heads
    window, hop        samples of a frame, and from one to the next, which divides it
    embed_dropout      of embedded words
    dropout            of what attention gives
    dtype              compute dtype; spectra, parameters and softmax stay float32
    """

    channels: int | tuple[str, ...] = BIPOLAR
    dim: int = 256
    depth: int = 4
    heads: int = 8
    window: int = 200
    hop: int = 100
    embed_dropout: float = 0.1
    dropout: float = 0.2
    dtype: DTypeLike = jnp.float32

    @property
    def sampling_rate(self) -> float:
        """Hz of the published frames of a second; where `window` is another, so is a second."""
        return float(self.window)

    @property
    def montage(self) -> int | None:
        """How many channels, where `channels` is a number."""
        return self.channels if isinstance(self.channels, int) else None

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return self.dim

    @nn.compact
    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        *,
        mask: Bool[AnyArray, "B _ _"] | None = None,
        subject: Int[AnyArray, " B"] | None = None,
        train: bool = False,
    ) -> Encoded:
        """signal [B, C, T], 200 Hz → Encoded, N = C·A tokens, A = (T − 200) // 100 + 1 a channel, channel-major.

        mask [B, C, A]: True where a word is left out, so that its token is not valid. pooled is the mean of the valid
        tokens, 0 where there are none. A channel of a name that the table has not makes its example NaN;
        `check_recording` says so before. Raises ZooError for windows of less than a frame or of more than 1000, and
        for a mask of another shape.
        """
        signal = self.present(signal, sensors)
        batch, channels, samples = signal.shape
        frames = self.frames(samples)
        if mask is not None and mask.shape != (batch, channels, frames):
            raise ZooError(f"BIOT wants a mask of shape {(batch, channels, frames)}, got {mask.shape}")
        scale = jnp.quantile(jnp.abs(signal), 0.95, axis=-1, keepdims=True) + 1e-8
        spectrum = jnp.abs(stft(signal / scale, np.ones(self.window, np.float32), self.hop))

        bins = self.window // 2 + 1
        words = dense(
            self.dim,
            (None, "embed"),
            bias=True,
            init=LIKE_TORCH,
            bias_init=like_torch_bias(bins),
            dtype=self.dtype,
            name="embed_spectrum",
        )(spectrum)
        place = channel_table(self, sensors, self.channels, self.dim)
        x = (words + place[:, :, None] + sinusoids(frames, self.dim)).astype(self.dtype)
        x = nn.Dropout(self.embed_dropout, deterministic=not train)(x.reshape(batch, channels * frames, self.dim))
        x = nn.with_logical_constraint(x, ("batch", "tokens", None))

        valid = jnp.repeat(jnp.asarray(sensors.valid), frames, axis=1)
        if mask is not None:
            valid = valid & ~jnp.asarray(mask).reshape(valid.shape)
        x = self._transformer(name="transformer")(x, valid, train=train).astype(jnp.float32)
        words_there = jnp.maximum(valid.sum(1, keepdims=True), 1)
        return Encoded(x, jnp.sum(x, axis=1, where=valid[..., None]) / words_there, valid)

    @nn.nowrap
    def head(self, classes: int) -> nn.Module:
        """ELU and a linear map."""
        return EluHead(classes)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls, a multiply-add counting two."""
        tokens = channels * self.frames(samples)
        return 2.0 * tokens * (self.window // 2 + 1) * self.dim + self._transformer().flops(tokens, self.dim)

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """One frame of its channels."""
        return blank(self.channels, self.window)

    @nn.nowrap
    def check_sensors(self, names: Sequence[str]) -> None:
        """Raises ZooError for names that are no rows of the table; where `channels` is a number, for another one."""
        super().check_sensors(names)
        check_rows("BIOT", self.channels, names)

    @nn.nowrap
    def _transformer(self, name: str | None = None) -> LinearTransformer:
        return LinearTransformer(self.depth, self.heads, dropout=self.dropout, dtype=self.dtype, name=name)

    @nn.nowrap
    def frames(self, samples: int) -> int:
        """Words of a channel of so many samples. Raises ZooError for none, more than 1000, and options out of range."""
        if self.window % self.hop or self.dim % 2:
            raise ZooError(
                f"BIOT wants a hop that divides the window and an even dim: got {self.hop}, {self.window}, {self.dim}"
            )
        count = (samples - self.window) // self.hop + 1 if samples >= self.window else 0
        if not 0 < count <= MAX_FRAMES:
            raise ZooError(
                f"BIOT wants 1 to {MAX_FRAMES} frames of {self.window} samples every {self.hop}, got {samples} samples"
            )
        return count


class EluHead(nn.Module):
    """[B, D] → [B, classes]: ELU, then a linear map that begins as PyTorch's."""

    classes: int

    @nn.compact
    def __call__(self, pooled: Float[AnyArray, "B D"], *, train: bool = False) -> Float[Array, "B K"]:
        bias = like_torch_bias(pooled.shape[-1])
        linear = dense(self.classes, (None, None), bias=True, init=LIKE_TORCH, bias_init=bias, name="linear")
        return linear(nn.elu(jnp.asarray(pooled)))


def channel_table(
    module: nn.Module, sensors: Sensors, channels: int | tuple[str, ...], dim: int, std: float = 1.0
) -> Float[Array, "B C D"]:
    """Each channel's row of `module`'s parameter `embed_channel`: by name, or by place where `channels` is a number.

    It begins with a spread of `std`. A valid channel whose name is no row's is NaN, so that it cannot pass for another.
    """
    count = channels if isinstance(channels, int) else len(channels)
    init = partitioned(nn.initializers.normal(std), None, "embed")
    # Made whole before rows are taken of it: from a split table XLA would copy the batch to every device.
    table = nn.with_logical_constraint(module.param("embed_channel", init, (count, dim)), (None, None))
    if isinstance(channels, int):
        return jnp.broadcast_to(table, (*sensors.valid.shape, dim))
    row_of = np.full(len(NAMES) + 1, -1)
    for row, name in enumerate(channels):
        if name in NAME_INDEX:
            row_of[NAME_INDEX[name]] = row
    rows = jnp.asarray(row_of)[jnp.asarray(sensors.name)]
    place = jnp.where((rows >= 0)[..., None], jnp.take(table, jnp.maximum(rows, 0), axis=0), jnp.nan)
    return jnp.where(jnp.asarray(sensors.valid)[..., None], place, 0.0)


def check_rows(who: str, channels: int | tuple[str, ...], names: Sequence[str]) -> None:
    """Raises ZooError for a canonical name (upper case, "" for none) that is none of `channels`."""
    if isinstance(channels, int):
        return
    for name in names:
        if name not in channels:
            raise ZooError(
                f"{who} has no row for channel {name!r}, only for {', '.join(channels)}; "
                "its option `channels` names the rows"
            )


VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "biot_tiny": ({"dim": 64, "depth": 2, "heads": 4}, 107_136, "parity of its layers"),
    "biot_base": (
        {},
        3_186_176,
        "parity: tokens, pooled vector and logits of the official code and of braindecode within 1e-5 (relative), "
        "random weights: tests/parity/test_biot_peers.py",
    ),
    "biot_base_18": (
        {"channels": (*BIPOLAR, "SHHS 1", "SHHS 2")},
        3_186_688,
        "shapes: parameter count of the official code; parity of biot_base",
    ),
}
"""Options, parameters (encoder without head), evidence. tiny is ours; the others are the official checkpoints'."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        BIOT,
        _options,
        Card(
            title=f"BIOT encoder, {_parameters / 1e6:.1f} M parameters",
            paper="Yang, Westover, Sun. BIOT: Biosignal Transformer for Cross-data Learning in the Wild. NeurIPS 2023, "
            "arXiv 2305.10351",
            code="github.com/ycq091044/BIOT",
            licence="MIT",
            inputs="biosignals [B, C, T] at 200 Hz in any unit, T of 1 s or more; bipolar EEG, or the channels named",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )


def encoder_keys(source: str) -> tuple[Rule, ...]:
    """The keys of a BIOTEncoder whose tensors' names begin with `source`."""
    return (
        Key(f"{source}patch_embedding.projection.weight", "params/embed_spectrum/kernel", "o i -> i o"),
        Key(f"{source}patch_embedding.projection.bias", "params/embed_spectrum/bias"),
        Key(f"{source}channel_tokens.weight", "params/embed_channel"),
        Ignore(f"{source}index", "the numbers of the rows"),
        Ignore(f"{source}positional_encoding.pe", "sinusoids, computed here"),
        *below(LAYER_KEYS, "transformer", f"{source}transformer."),
    )


KEYS: tuple[Rule, ...] = encoder_keys("")
"""Of the official checkpoints, which are of the encoder alone."""
CLASSIFIER_KEYS: tuple[Rule, ...] = encoder_keys("biot.")
"""Of the official BIOTClassifier."""
HEAD_KEYS: tuple[Rule, ...] = (
    Key("classifier.clshead.1.weight", "params/linear/kernel", "o i -> i o"),
    Key("classifier.clshead.1.bias", "params/linear/bias"),
)
BRAINDECODE_KEYS: tuple[Rule, ...] = encoder_keys("encoder.")
"""Of braindecode's BIOT, which does not scale its channels: its windows come scaled."""
BRAINDECODE_HEAD_KEYS: tuple[Rule, ...] = (
    Key("final_layer.classification_head.weight", "params/linear/kernel", "o i -> i o"),
    Key("final_layer.classification_head.bias", "params/linear/bias"),
)
