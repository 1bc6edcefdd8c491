"""LaBraM: a transformer over one-second, one-channel patches of EEG.

Source: Jiang, Zhao and Lu, "Large Brain Model for Learning Generic Representations with Tremendous EEG Data in BCI",
ICLR 2024, §2.2, and the official code (github.com/935963004/LaBraM, MIT).

Input: EEG at 200 Hz, 0.1–75 Hz, mains notched, microvolt / 100 (recipe `labram`), cut into patches of 200 samples.

Where this differs from the official code:
- The samples of a channel whose `sensors.valid` is False are never read: it takes no part in attention, pooling or the
  group statistics. Official code has no such channels; with every channel valid the two agree.
- The CLS token takes row 0 of the electrode table, as in the fine-tuning code. The pretraining code gives it the row
  of the first channel listed; `cls_position="first_channel"` does so, with the first valid channel.
- Group normalisation runs over all patches of an example, as published, so a patch's embedding depends on the others
  and, since masking comes after the embedding, masked samples reach the visible tokens through its two statistics.
  `per_patch_norm=True` normalises each patch alone and closes that leak; published weights need False.
- Drop-path is the only dropout (the published scripts set the others to 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import Encoder, LinearHead, blank
from zoo.errors import ZooError
from zoo.layers.parameters import norm, partitioned
from zoo.layers.patch_transformer import PatchTransformer, TemporalConv
from zoo.registry import Card, register
from zoo.sensors import KINDS, LABRAM_NAMES
from zoo.types import AnyArray, Array, Encoded, Sensors
from zoo.weights.keys import Ignore, Key, Rule

ROWS = 129
"""Rows of the electrode table: row 0 is CLS, row 1 + i the i-th of LaBraM's names; the last 8 of its 136 do not fit."""


class LaBraM(Encoder):
    """The LaBraM encoder.

    depth, dim, heads    layers, features, attention heads; dim must be patch/8 · conv_features
    layer_scale          initial value of the learned residual scales; 0 leaves them out
    drop_path            stochastic-depth rate of the last layer; layer l of L has rate · (l−1)/(L−1)
    max_patches          rows of the time table, so the longest input in patches a channel
    table_std            initial spread of electrode, time, mask and CLS embeddings. The published 0.02 is a thirtieth
                         of the patch embeddings they are added to: short trainings never learn which electrode is which
    remat                "none", "full" (recompute all) or "dots" (keep matmul outputs)
    dtype                compute dtype; parameters, statistics and softmax stay float32
    """

    depth: int = 12
    dim: int = 200
    heads: int = 10
    conv_features: int = 8
    patch: int = 200
    mlp_ratio: int = 4
    qkv_bias: bool = False
    qk_norm: bool = True
    layer_scale: float = 0.1
    drop_path: float = 0.0
    max_patches: int = 16
    table_std: float = 0.02
    cls_position: str = "row"
    per_patch_norm: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)

    @property
    def sampling_rate(self) -> float:
        """Hz of the published patches of 200 samples a second; where `patch` is another, so is a second."""
        return float(self.patch)

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
        """signal [B, C, T] (µV/100, 200 Hz) → Encoded, N = C·A tokens, channel-major (all patches of channel 0 first).

        mask [B, C, A] bool: True where the mask token stands in for the patch. tokens carry the final norm; pooled is
        the normed mean of the un-normed valid tokens, as in fine-tuning. `train` draws drop-path from the "dropout"
        stream. Raises ZooError when T is not a multiple of the patch or has more than `max_patches` of them, when
        sensors or mask have another shape, or when an option is out of range.
        """
        self._check_options()
        signal = self.present(signal, sensors)
        self._check_window(signal, mask)
        batch, channels, samples = signal.shape
        count = samples // self.patch
        valid = jnp.repeat(sensors.valid, count, axis=1)
        patches = signal.reshape(batch, channels * count, self.patch)

        embed = TemporalConv(self.conv_features, self.per_patch_norm, self.dtype, name="embed_patch")
        x = nn.with_logical_constraint(embed(patches, valid), ("batch", "tokens", None))
        table_init = nn.initializers.truncated_normal(self.table_std)
        if mask is not None:
            token = self.param("embed_mask", partitioned(table_init, "embed"), (self.dim,)).astype(x.dtype)
            x = jnp.where(mask.reshape(batch, -1, 1), token, x)

        rows = electrode_rows(sensors)
        body = self._body()
        # Its parameters are this module's own.
        nn.share_scope(self, body)
        x = body(x, jnp.where(rows > 0, rows, -1), sensors.valid, train=train)

        last = norm("layer", dtype=self.dtype, name="norm")
        pooled = jnp.mean(x, axis=1, where=valid[..., None], dtype=jnp.float32)
        return Encoded(tokens=last(x), pooled=last(pooled), valid=valid)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two."""
        steps = self.patch // 8
        tokens = channels * (samples // self.patch)
        conv = 2 * tokens * steps * (15 * self.conv_features + 2 * 3 * self.conv_features**2)
        return float(conv) + self._body().flops(tokens, self.dim)

    @nn.nowrap
    def head(self, classes: int) -> nn.Module:
        """A linear map that begins a thousandth as large as the others, as in fine-tuning."""
        return LinearHead(classes, 0.001)

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """The smallest input, one patch of one electrode of one example."""
        return blank(LABRAM_NAMES[:1], self.patch)

    @nn.nowrap
    def check_sensors(self, names: Sequence[str]) -> None:
        """Raises ZooError for a canonical name (upper case, "" for none) that has no row in the electrode table."""
        check_electrodes(names)

    @nn.nowrap
    def _body(self) -> PatchTransformer:
        return PatchTransformer(
            self.depth,
            self.heads,
            self.mlp_ratio,
            self.qkv_bias,
            self.qk_norm,
            self.layer_scale,
            self.drop_path,
            ROWS,
            self.max_patches,
            self.table_std,
            self.cls_position,
            remat=self.remat,
            dtype=self.dtype,
        )

    def _check_options(self) -> None:
        if self.patch % 8 or self.conv_features % 4 or self.dim != self.patch // 8 * self.conv_features:
            raise ZooError(
                "LaBraM wants dim = patch/8 · conv_features, patch a multiple of 8, conv_features of 4: "
                f"got dim {self.dim}, patch {self.patch}, conv_features {self.conv_features}"
            )

    def _check_window(self, signal: AnyArray, mask: AnyArray | None) -> None:
        batch, channels, samples = signal.shape
        if samples % self.patch or not 0 < samples // self.patch <= self.max_patches:
            raise ZooError(
                f"LaBraM wants 1 to {self.max_patches} patches of {self.patch} samples, got {samples} samples"
            )
        if mask is not None and mask.shape != (batch, channels, samples // self.patch):
            raise ZooError(f"LaBraM wants a mask of shape {(batch, channels, samples // self.patch)}, got {mask.shape}")


def electrode_rows(sensors: Sensors) -> Int[Array, "B C"]:
    """Row of the electrode table for each channel [B, C] int32; 0 where the table has none.

    `zoo.sensors.NAMES` begins with LaBraM's names in LaBraM's order.
    """
    known = (sensors.name >= 0) & (sensors.name < ROWS - 1) & (sensors.kind == KINDS.index("eeg"))
    return jnp.where(known, sensors.name + 1, 0)


def check_electrodes(names: Sequence[str]) -> None:
    """Raises ZooError for a canonical name (upper case, "" for none) that has no row in LaBraM's electrode table."""
    for name in names:
        if name not in LABRAM_NAMES[: ROWS - 1]:
            raise ZooError(f"LaBraM has no electrode {name!r}; a recipe's sensor_names='nearest' maps by position")


_PARITY = (
    "parity: tokens, pooled vector and input gradients within 1e-6 (relative) of the official code, random weights"
)

VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "labram_tiny": (
        {"depth": 4, "dim": 100, "heads": 4, "conv_features": 4},
        500_192,
        "parity of its layers; trained: configs/quickstart.py, two layers deep",
    ),
    "labram_base": ({}, 5_819_936, _PARITY),
    "labram_large": (
        {"depth": 24, "dim": 400, "heads": 16, "conv_features": 16, "layer_scale": 1e-5},
        46_258_720,
        _PARITY,
    ),
    "labram_huge": (
        {"depth": 48, "dim": 800, "heads": 16, "conv_features": 32, "layer_scale": 1e-5},
        369_235_712,
        "shapes: parameter count of the official code",
    ),
}
"""Options, parameters (encoder without mask token and head), evidence. tiny is ours; the others are the paper's."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        LaBraM,
        _options,
        Card(
            title=f"LaBraM encoder, {_parameters / 1e6:.1f} M parameters",
            paper="Jiang, Zhao, Lu. Large Brain Model for Learning Generic Representations with Tremendous EEG Data in "
            "BCI. ICLR 2024, arXiv 2405.18765",
            code="github.com/935963004/LaBraM",
            licence="MIT",
            inputs="EEG [B, C, A·200] at 200 Hz, 0.1–75 Hz, mains notched, µV/100; electrodes of LaBraM's table; "
            "A ≤ 16",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )


def linear_keys(source: str, target: str, layer: str = "") -> tuple[Key, ...]:
    """The keys of a linear map; `layer`: the index of a leaf of stacked ones, as "[{l}]"."""
    kernel = Key(f"{source}.weight", f"params/{target}/kernel{layer}", "o i -> i o")
    return kernel, Key(f"{source}.bias", f"params/{target}/bias{layer}")


def norm_keys(source: str, target: str, layer: str = "") -> tuple[Key, ...]:
    """The keys of a layer or group norm."""
    scale = Key(f"{source}.weight", f"params/{target}/scale{layer}")
    return scale, Key(f"{source}.bias", f"params/{target}/bias{layer}")


def block_keys(
    *, biases: str = "", qk_norm: bool = True, layer_scale: bool = True, mlp: tuple[str, str] = ("fc1", "fc2")
) -> tuple[Key, ...]:
    """The keys of `zoo.layers.patch_transformer.Stack`, as timm names the parts of a vision transformer.

    biases  of queries, keys and values: "" none; "apart", of queries and values, each a tensor; "fused", of all three
    """
    source, target, layer = "blocks.{l}.", "blocks/", "[{l}]"
    attention, names = f"params/{target}attention/", ("query", "key", "value")
    keys = [
        Key(f"{source}attn.qkv.weight", f"{attention}{name}/kernel{layer}", "(h k) d -> d h k", part=(part, 3))
        for part, name in enumerate(names)
    ]
    if biases == "fused":
        keys += [
            Key(f"{source}attn.qkv.bias", f"{attention}{name}/bias{layer}", "(h k) -> h k", part=(part, 3))
            for part, name in enumerate(names)
        ]
    elif biases == "apart":
        keys += [
            Key(f"{source}attn.{name[0]}_bias", f"{attention}{name}/bias{layer}", "(h k) -> h k")
            for name in ("query", "value")
        ]
    if qk_norm:
        for name in ("query", "key"):
            keys += norm_keys(f"{source}attn.{name[0]}_norm", f"{target}attention/{name}_norm", layer)
    if layer_scale:
        keys += [
            Key(f"{source}gamma_{number}", f"params/{target}{part}_scale{layer}")
            for number, part in ((1, "attention"), (2, "mlp"))
        ]
    return (
        *keys,
        Key(f"{source}attn.proj.weight", f"{attention}out/kernel{layer}", "d (h k) -> h k d"),
        Key(f"{source}attn.proj.bias", f"{attention}out/bias{layer}"),
        *norm_keys(f"{source}norm1", f"{target}attention_norm", layer),
        *norm_keys(f"{source}norm2", f"{target}mlp_norm", layer),
        *linear_keys(f"{source}mlp.{mlp[0]}", f"{target}mlp_in", layer),
        *linear_keys(f"{source}mlp.{mlp[1]}", f"{target}mlp_out", layer),
    )


def table_keys(electrode: str = "pos_embed", time: str = "time_embed") -> tuple[Key, ...]:
    """The keys of the tables of `zoo.layers.patch_transformer.PatchTransformer`."""
    return (
        Key("cls_token", "params/embed_cls", "1 1 d -> d"),
        Key(electrode, "params/embed_electrode", "1 c d -> c d"),
        Key(time, "params/embed_time", "1 a d -> a d"),
    )


def conv_keys(source: str) -> tuple[Key, ...]:
    """The keys of `zoo.layers.patch_transformer.TemporalConv`, in a module `embed_patch`."""
    keys: list[Key] = []
    for number in (1, 2, 3):
        conv = f"params/embed_patch/conv{number}"
        keys.append(Key(f"{source}.conv{number}.weight", f"{conv}/kernel", "o i 1 t -> t i o"))
        keys.append(Key(f"{source}.conv{number}.bias", f"{conv}/bias"))
        keys += norm_keys(f"{source}.norm{number}", f"embed_patch/norm{number}")
    return tuple(keys)


KEYS: tuple[Rule, ...] = (*table_keys(), *conv_keys("patch_embed"), *block_keys(), *norm_keys("fc_norm", "norm"))
"""Of the official fine-tuned model, `NeuralTransformer` with mean pooling and without biases of queries and values."""
HEAD_KEYS: tuple[Rule, ...] = linear_keys("head", "linear")

PRETRAINED_KEYS: tuple[Rule, ...] = (
    *(
        replace(key, source=f"student.{key.source}")
        for key in (*table_keys(), *conv_keys("patch_embed"), *block_keys(), *norm_keys("norm", "norm"))
    ),
    Ignore("student.mask_token", "of pretraining"),
    *(
        Ignore(f"{name}.{part}", "a head of pretraining")
        for name in ("student.lm_head", "lm_head", "projection_head.0")
        for part in ("weight", "bias")
    ),
)
"""Of the official pretrained model, `labram-base.pth`: its last norm, which fine-tuning makes anew, stands for ours."""

BRAINDECODE_KEYS: tuple[Rule, ...] = (
    *table_keys("position_embedding", "temporal_embedding"),
    *conv_keys("patch_embed.temporal_conv"),
    *block_keys(mlp=("0", "2")),
    *norm_keys("fc_norm", "norm"),
)
"""Of braindecode's Labram with mean pooling, whose `max_patches` is one more than its windows have."""
BRAINDECODE_HEAD_KEYS: tuple[Rule, ...] = linear_keys("final_layer", "linear")
