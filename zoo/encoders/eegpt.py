"""EEGPT: in each quarter of a second, a few summaries of what all electrodes say.

Source: Wang et al., "EEGPT: Pretrained Transformer for Universal and Reliable Representation of EEG Signals", NeurIPS
2024, section 2, and the official code (github.com/BINE022/EEGPT, Apache-2.0).

Input: EEG at 256 Hz, average reference, in millivolt, cut into patches of 64 samples; electrodes of `CHANNELS`. Scale
matters: a patch is embedded as it is.

Attention is between the electrodes of one patch of time and its summaries alone, so the encoder knows nothing of what
was before or after: what is said of a patch depends on that patch only. Time comes in pretraining, by a predictor that
is part of the task (`zoo.objectives.eegpt`).

Where this differs from the official code:
- A channel that is not valid, or a patch of a channel that a mask hides, is not attended to. The official code leaves
  hidden ones out of the sequence, which gives the same; `visible` does that here too, where masks leave so many.
- `patches` other than 0 pools the summaries of all patches side by side, for the published probe; 0 takes windows of
  any length and pools their mean.
- Drop-path is the only dropout (the published scripts set all to 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.encoders.biot import channel_table
from zoo.encoders.encoder import Encoder, LinearHead, blank
from zoo.encoders.labram import block_keys, norm_keys
from zoo.errors import ZooError
from zoo.layers.max_norm import MaxNormHead
from zoo.layers.parameters import dense, norm, partitioned
from zoo.layers.patch_transformer import WEIGHT_INIT, Stack
from zoo.layers.spectra import frames
from zoo.registry import Card, register
from zoo.types import AnyArray, Array, Encoded, Sensors
from zoo.weights.keys import Key, Rule

_TABLE = """
FP1 FPZ FP2 AF7 AF3 AF4 AF8 F7 F5 F3 F1 FZ F2 F4 F6 F8 FT7 FC5 FC3 FC1 FCZ FC2 FC4 FC6 FT8 T7 C5 C3 C1 CZ C2 C4 C6 T8
TP7 CP5 CP3 CP1 CPZ CP2 CP4 CP6 TP8 P7 P5 P3 P1 PZ P2 P4 P6 P8 PO7 PO5 PO3 POZ PO4 PO6 PO8 O1 OZ O2
"""
CHANNELS: tuple[str, ...] = tuple(_TABLE.split())
"""The 62 electrodes of the published table, row by row from the front."""
PRETRAINED: tuple[str, ...] = tuple(name for name in CHANNELS if name not in ("AF7", "AF8", "PO5", "PO6"))
"""The 58 of them that it was pretrained on."""
TABLE_STD = 0.02
PROBE = 16
"""Features of a patch in the published probe."""


class EEGPT(Encoder):
    """The EEGPT encoder, which is also its momentum encoder.

    dim, depth, heads  features, layers and attention heads
    summaries          S, summary tokens of a patch of time
    patch, stride      samples of a patch, and from one to the next, which divides it
    patches            of a window, where `pooled` is all summaries side by side; 0: any number, their mean
    visible            where a mask is given, so many visible channels of a patch are read, the first ones; 0: all
    drop_path          stochastic-depth rate of the last layer
    remat              "none", "full" (recompute all) or "dots" (keep matmul outputs)
    dtype              compute dtype; parameters, statistics and softmax stay float32
    """

    dim: int = 512
    depth: int = 8
    heads: int = 8
    summaries: int = 4
    patch: int = 64
    stride: int = 64
    patches: int = 16
    visible: int = 0
    drop_path: float = 0.0
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)

    @property
    def sampling_rate(self) -> float:
        """Hz of the published patches of 64 samples, a quarter of a second; where `patch` is another, so is that."""
        return 4.0 * self.patch

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return max(1, self.patches) * self.summaries * self.dim

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
        """signal [B, C, T] (mV, 256 Hz) → Encoded, N = A·S tokens: the summaries of each patch of time in turn.

        mask [B, C, A]: True where a patch of a channel is hidden; the tokens of a patch of which nothing is visible are
        not valid. An electrode that the table has not makes its example NaN; `check_recording` says so before. Raises
        ZooError for windows that are not made of patches, or of another number than `patches`, and for a mask of
        another shape.
        """
        signal = self.present(signal, sensors)
        batch, channels, samples = signal.shape
        count = self._patches(samples)
        if mask is not None and mask.shape != (batch, channels, count):
            raise ZooError(f"EEGPT wants a mask of shape {(batch, channels, count)}, got {mask.shape}")

        embed = dense(self.dim, (None, "embed"), bias=True, init=WEIGHT_INIT, dtype=self.dtype, name="embed_patch")
        x = embed(frames(signal, self.patch, self.stride))
        x = x + channel_table(self, sensors, CHANNELS, self.dim, TABLE_STD)[:, :, None].astype(x.dtype)
        x = x.swapaxes(1, 2)
        seen = jnp.broadcast_to(jnp.asarray(sensors.valid)[:, None], (batch, count, channels))
        if mask is not None:
            seen = seen & ~jnp.asarray(mask).swapaxes(1, 2)
            if self.visible:
                first = jnp.argsort(~seen, axis=-1, stable=True)[..., : self.visible]
                seen, x = jnp.take_along_axis(seen, first, 2), jnp.take_along_axis(x, first[..., None], 2)

        token = self.param("embed_summary", partitioned(WEIGHT_INIT, None, "embed"), (self.summaries, self.dim))
        summary = jnp.broadcast_to(token.astype(x.dtype), (batch, count, self.summaries, self.dim))
        x = jnp.concatenate([x, summary], axis=2).reshape(batch * count, -1, self.dim)
        keys = jnp.concatenate([seen, jnp.ones((batch, count, self.summaries), bool)], axis=2)
        body = self._stack()
        # Its layers are this module's own.
        nn.share_scope(self, body)
        x = body(x, keys.reshape(batch * count, -1), train=train)[:, -self.summaries :]
        x = norm("layer", dtype=self.dtype, name="norm")(x).astype(jnp.float32)

        tokens = x.reshape(batch, count * self.summaries, self.dim)
        there = seen.any(-1)
        valid = jnp.repeat(there, self.summaries, axis=1)
        if self.patches:
            return Encoded(tokens, tokens.reshape(batch, -1), valid)
        mean = jnp.mean(tokens.reshape(batch, count, -1), axis=1, where=there[..., None])
        return Encoded(tokens, mean, valid)

    @nn.nowrap
    def head(self, classes: int) -> nn.Module:
        """The published probe: a linear map of each patch's summaries to 16 features, and one of all these."""
        return Probe(classes, self.patches) if self.patches else LinearHead(classes)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls, a multiply-add counting two; nothing hidden."""
        count = self._patches(samples)
        layers = self._stack().flops(channels + self.summaries, self.dim)
        return count * (layers + 2.0 * channels * self.patch * self.dim)

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """A window of one electrode."""
        return blank(CHANNELS[:1], self.patch + self.stride * (max(1, self.patches) - 1))

    @nn.nowrap
    def check_sensors(self, names: Sequence[str]) -> None:
        """Raises ZooError for a canonical name (upper case, "" for none) that has no row in the electrode table."""
        for name in names:
            if name not in CHANNELS:
                raise ZooError(f"EEGPT has no electrode {name!r}; a recipe's sensor_names='nearest' maps by position")

    @nn.nowrap
    def _stack(self) -> Stack:
        return Stack(
            self.depth,
            self.heads,
            qkv_bias=True,
            key_bias=True,
            qk_norm=False,
            drop_path=self.drop_path,
            remat=self.remat,
            dtype=self.dtype,
        )

    @nn.nowrap
    def _patches(self, samples: int) -> int:
        if self.patch % self.stride:
            raise ZooError(f"EEGPT wants a stride that divides the patch: got {self.stride}, {self.patch}")
        over = samples - self.patch
        count = over // self.stride + 1
        if over < 0 or over % self.stride or self.patches not in (0, count):
            wanted = f"{self.patches}" if self.patches else "1 or more"
            every = f" every {self.stride}" if self.stride != self.patch else ""
            raise ZooError(f"EEGPT wants {wanted} patches of {self.patch} samples{every}, got {samples} samples")
        return count


class Probe(nn.Module):
    """[B, A·S·D] → [B, classes]; weights of an output are held within 1 in the first map, within ¼ in the second."""

    classes: int
    patches: int

    @nn.compact
    def __call__(self, pooled: Float[AnyArray, "B D"], *, train: bool = False) -> Float[Array, "B K"]:
        batch = pooled.shape[0]
        each = MaxNormHead(PROBE, 1.0, 0.5, name="patch")(pooled.reshape(batch * self.patches, -1), train=train)
        return MaxNormHead(self.classes, 0.25, name="window")(each.reshape(batch, -1), train=train)


_SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "tiny1": (64, 1, 2, 4, 108_288),
    "tiny2": (64, 4, 2, 4, 108_480),
    "tiny3": (64, 4, 8, 4, 408_384),
    "little": (128, 4, 8, 4, 1_603_200),
    "base1": (256, 1, 6, 4, 4_771_840),
    "base2": (256, 4, 8, 4, 6_352_128),
    "base3": (512, 1, 6, 8, 18_980_864),
    "large": (512, 4, 8, 8, 25_287_168),
}
"""Features, summaries, layers, heads of the published sizes, and parameters of the encoder alone."""
_PARITY = (
    "parity: tokens and logits of the official code and of braindecode within 1e-5 (relative), random weights: "
    "tests/parity/test_eegpt_peers.py"
)

VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "eegpt_tiny": (
        {"dim": 64, "summaries": 4, "depth": 2, "heads": 4, "patches": 0},
        108_480,
        "parity of its layers",
    ),
    **{
        f"eegpt_{size}": (
            {"dim": dim, "summaries": summaries, "depth": depth, "heads": heads},
            parameters,
            _PARITY if size == "large" else "shapes: parameter count of the official code; parity of eegpt_large",
        )
        for size, (dim, summaries, depth, heads, parameters) in _SIZES.items()
    },
}
"""Options, parameters (encoder alone), evidence. tiny is tiny2 for windows of any length; the others are published."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        EEGPT,
        _options,
        Card(
            title=f"EEGPT encoder, {_parameters / 1e6:.1f} M parameters",
            paper="Wang, Liu, He, Xu, Ma, Li. EEGPT: Pretrained Transformer for Universal and Reliable Representation "
            "of EEG Signals. NeurIPS 2024",
            code="github.com/BINE022/EEGPT",
            licence="Apache-2.0",
            inputs="EEG [B, C, 1024] at 256 Hz, average reference, mV; electrodes of its 62",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )


def encoder_keys(source: str) -> tuple[Rule, ...]:
    """The keys of an EEGTransformer whose tensors' names begin with `source`."""
    keys = (
        Key("patch_embed.proj.weight", "params/embed_patch/kernel", "o 1 1 t -> t o"),
        Key("patch_embed.proj.bias", "params/embed_patch/bias"),
        Key("chan_embed.weight", "params/embed_channel"),
        Key("summary_token", "params/embed_summary", "1 s d -> s d"),
        *block_keys(biases="fused", qk_norm=False, layer_scale=False),
        *norm_keys("norm", "norm"),
    )
    return tuple(Key(source + key.source, key.target, key.how, key.part) for key in keys)


KEYS: tuple[Rule, ...] = encoder_keys("target_encoder.")
"""Of the momentum encoder in the official checkpoints, and in braindecode's EEGPT without a channel projection."""


def _head_keys(source: str, weight: str) -> tuple[Rule, ...]:
    return tuple(
        key
        for number, part in ((1, "patch"), (2, "window"))
        for key in (
            Key(f"{source}{number}.{weight}", f"params/{part}/kernel", "o i -> i o"),
            Key(f"{source}{number}.bias", f"params/{part}/bias"),
        )
    )


HEAD_KEYS: tuple[Rule, ...] = _head_keys("linear_probe", "weight")
BRAINDECODE_HEAD_KEYS: tuple[Rule, ...] = _head_keys("final_layer.probe", "parametrizations.weight.original")
