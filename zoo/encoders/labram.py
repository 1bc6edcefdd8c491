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
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.errors import ZooError
from zoo.layers.parameters import partitioned
from zoo.layers.residual import REMAT, drop_path
from zoo.registry import Card, register
from zoo.sensors import KINDS, LABRAM_NAMES
from zoo.types import AnyArray, Array, Encoded, Sensors

ROWS = 129
"""Rows of the electrode table: row 0 is CLS, row 1 + i the i-th of LaBraM's names; the last 8 of its 136 do not fit."""

_WEIGHT_INIT = nn.initializers.truncated_normal(0.02)


class GroupNorm(nn.Module):
    """Group normalisation of [B, N, S, F] over the S steps and F/groups features of all N patches, or of each alone.

    Patches where `valid [B, N]` is False stay out of the statistics. eps 1e-5, statistics in float32.
    """

    groups: int
    per_patch: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B N S F"], valid: Bool[Array, "B N"]) -> Float[Array, "B N S F"]:
        features = x.shape[-1]
        scale = self.param("scale", partitioned(nn.initializers.ones, None), (features,))
        bias = self.param("bias", partitioned(nn.initializers.zeros, None), (features,))
        grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, features // self.groups)

        def mean(values: Array) -> Array:
            # First each patch, then the patches: a single long sum rounds three times worse.
            each = values.mean((2, 4), keepdims=True)
            return each if self.per_patch else each.mean(1, keepdims=True, where=valid[:, :, None, None, None])

        centred = grouped - mean(grouped)
        normal = centred * jax.lax.rsqrt(mean(jnp.square(centred)) + 1e-5)
        return (normal.reshape(x.shape) * scale + bias).astype(x.dtype)


class TemporalConv(nn.Module):
    """Patch embedding [B, N, P] → [B, N, D], D = P/8 · features; element t·features + f is step t, feature f."""

    features: int
    per_patch_norm: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, patches: Float[Array, "B N P"], valid: Bool[Array, "B N"]) -> Float[Array, "B N D"]:
        x = patches[..., None]
        for layer, (width, stride) in enumerate(((15, 8), (3, 1), (3, 1)), start=1):
            x = nn.Conv(
                self.features,
                (width,),
                strides=(stride,),
                padding=[(width // 2, width // 2)],
                kernel_init=partitioned(_WEIGHT_INIT, None, None, None),
                bias_init=partitioned(nn.initializers.zeros, None),
                dtype=self.dtype,
                name=f"conv{layer}",
            )(x)
            x = nn.gelu(GroupNorm(4, self.per_patch_norm, name=f"norm{layer}")(x, valid), approximate=False)
        return x.reshape(*patches.shape[:2], -1)


class Attention(nn.Module):
    """Softmax attention over tokens [B, N, D] with layer-normalised queries and keys (paper eq. 5)."""

    heads: int
    qkv_bias: bool
    qk_norm: bool
    depth_scale: Array
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], valid: Bool[Array, "B N"]) -> Float[Array, "B N D"]:
        dim = x.shape[-1]
        width = dim // self.heads

        def project(name: str, bias: bool) -> Array:
            return nn.Einsum(
                (dim, self.heads, width),
                "bnd,dhk->bnhk",
                use_bias=bias,
                kernel_init=partitioned(_WEIGHT_INIT, "embed", "heads", "head_width"),
                bias_init=partitioned(nn.initializers.zeros, "heads", "head_width"),
                dtype=self.dtype,
                name=name,
            )(x)

        # The published option gives queries and values a bias, keys never.
        query, key, value = project("query", self.qkv_bias), project("key", False), project("value", self.qkv_bias)
        if self.qk_norm:
            query = _layer_norm("query_norm", self.dtype, "head_width")(query)
            key = _layer_norm("key_norm", self.dtype, "head_width")(key)
        mixed = jax.nn.dot_product_attention(query, key, value, mask=valid[:, None, None, :])
        return nn.Einsum(
            (self.heads, width, dim),
            "bnhk,hkd->bnd",
            kernel_init=partitioned(_scaled(self.depth_scale), "heads", "head_width", "embed"),
            bias_init=partitioned(nn.initializers.zeros, "embed"),
            dtype=self.dtype,
            name="out",
        )(mixed)


class Block(nn.Module):
    """One pre-norm layer, the body of a scan over layers; `layer` is (index from 1, drop-path rate)."""

    heads: int
    mlp_ratio: int
    qkv_bias: bool
    qk_norm: bool
    layer_scale: float
    train: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], valid: Bool[Array, "B N"], layer: tuple[Float[Array, ""], Float[Array, ""]]
    ) -> tuple[Float[Array, "B N D"], None]:
        index, drop = layer
        depth_scale = jax.lax.rsqrt(2.0 * index)
        dim = x.shape[-1]

        def residual(name: str, branch: Array) -> Array:
            if self.layer_scale:
                scale = self.param(name, partitioned(nn.initializers.constant(self.layer_scale), "embed"), (dim,))
                branch = branch * scale.astype(branch.dtype)
            if self.train:
                branch = drop_path(branch, drop, self.make_rng("dropout"))
            return nn.with_logical_constraint(branch, ("batch", None, None))

        attention = Attention(self.heads, self.qkv_bias, self.qk_norm, depth_scale, self.dtype, name="attention")
        x = x + residual("attention_scale", attention(_layer_norm("attention_norm", self.dtype)(x), valid))
        hidden = nn.Dense(
            dim * self.mlp_ratio,
            kernel_init=partitioned(_WEIGHT_INIT, "embed", "mlp"),
            bias_init=partitioned(nn.initializers.zeros, "mlp"),
            dtype=self.dtype,
            name="mlp_in",
        )(_layer_norm("mlp_norm", self.dtype)(x))
        hidden = nn.with_logical_constraint(nn.gelu(hidden, approximate=False), ("batch", None, "mlp"))
        out = nn.Dense(
            dim,
            kernel_init=partitioned(_scaled(depth_scale), "mlp", "embed"),
            bias_init=partitioned(nn.initializers.zeros, "embed"),
            dtype=self.dtype,
            name="mlp_out",
        )(hidden)
        return x + residual("mlp_scale", out), None


class LaBraM(nn.Module):
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

    @nn.compact
    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        *,
        mask: Bool[AnyArray, "B _ _"] | None = None,
        train: bool = False,
    ) -> Encoded:
        """signal [B, C, T] (µV/100, 200 Hz) → Encoded, N = C·A tokens, channel-major (all patches of channel 0 first).

        mask [B, C, A] bool: True where the mask token stands in for the patch. tokens carry the final norm; pooled is
        the normed mean of the un-normed valid tokens, as in fine-tuning. `train` draws drop-path from the "dropout"
        stream. Raises ZooError when T is not a multiple of the patch or has more than `max_patches` of them, when
        sensors or mask have another shape, or when an option is out of range.
        """
        self._check_options()
        self._check_shapes(signal, sensors, mask)
        batch, channels, samples = signal.shape
        count = samples // self.patch
        valid = jnp.repeat(sensors.valid, count, axis=1)
        patches = jnp.where(valid[..., None], signal.reshape(batch, channels * count, self.patch), 0)

        embed = TemporalConv(self.conv_features, self.per_patch_norm, self.dtype, name="embed_patch")
        x = nn.with_logical_constraint(embed(patches, valid), ("batch", "tokens", None))
        table_init = nn.initializers.truncated_normal(self.table_std)
        if mask is not None:
            token = self.param("embed_mask", partitioned(table_init, "embed"), (self.dim,)).astype(x.dtype)
            x = jnp.where(mask.reshape(batch, -1, 1), token, x)

        electrode = self.param("embed_electrode", partitioned(table_init, None, "embed"), (ROWS, self.dim))
        time = self.param("embed_time", partitioned(table_init, None, "embed"), (self.max_patches, self.dim))
        cls = self.param("embed_cls", partitioned(table_init, "embed"), (self.dim,))
        # Made whole before rows are taken of it: from a split table XLA would copy the batch to every device.
        electrode = nn.with_logical_constraint(electrode, (None, None))
        rows = electrode_rows(sensors)
        # A channel the table does not know must not pass for another: its embedding is NaN, and so is the loss.
        place = jnp.where((rows > 0)[..., None], jnp.take(electrode, rows, axis=0), jnp.nan)
        place = jnp.where(sensors.valid[..., None], place, 0.0)
        x = x + (place[:, :, None] + time[:count]).reshape(batch, channels * count, self.dim).astype(x.dtype)
        if self.cls_position == "first_channel":
            first = jnp.take_along_axis(place, jnp.argmax(sensors.valid, axis=1)[:, None, None], axis=1)[:, 0]
        else:
            first = electrode[0]
        first = jnp.broadcast_to(cls + first, (batch, self.dim)).astype(x.dtype)

        x = jnp.concatenate([first[:, None], x], axis=1)
        keys = jnp.concatenate([jnp.ones((batch, 1), bool), valid], axis=1)
        x = self._blocks(train)(x, keys, self._layers())[0][:, 1:]

        norm = _layer_norm("norm", self.dtype)
        pooled = jnp.mean(x, axis=1, where=valid[..., None], dtype=jnp.float32)
        return Encoded(tokens=norm(x), pooled=norm(pooled), valid=valid)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two."""
        steps = self.patch // 8
        tokens = channels * (samples // self.patch)
        conv = 2 * tokens * steps * (15 * self.conv_features + 2 * 3 * self.conv_features**2)
        length = tokens + 1
        layer = 2 * length * self.dim**2 * (4 + 2 * self.mlp_ratio) + 4 * length**2 * self.dim
        return float(conv + self.depth * layer)

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """The smallest input, one patch of one electrode of one example."""
        blank = jnp.zeros((1, 1, 3))
        one = jnp.zeros((1, 1), jnp.int32)
        return jnp.zeros((1, 1, self.patch)), Sensors(blank, blank, one, one, jnp.ones((1, 1), bool))

    @nn.nowrap
    def check_sensors(self, names: Sequence[str]) -> None:
        """Raises ZooError for a canonical name (upper case, "" for none) that has no row in the electrode table."""
        for name in names:
            if name not in LABRAM_NAMES[: ROWS - 1]:
                raise ZooError(f"LaBraM has no electrode {name!r}; a recipe's sensor_names='nearest' maps by position")

    def _blocks(self, train: bool) -> nn.Module:
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False)
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0),
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stack(
            self.heads,
            self.mlp_ratio,
            self.qkv_bias,
            self.qk_norm,
            self.layer_scale,
            train and self.drop_path > 0,
            self.dtype,
            name="blocks",
        )

    def _layers(self) -> tuple[Array, Array]:
        return jnp.arange(1.0, self.depth + 1.0), jnp.linspace(0.0, self.drop_path, self.depth)

    def _check_options(self) -> None:
        if self.patch % 8 or self.conv_features % 4 or self.dim != self.patch // 8 * self.conv_features:
            raise ZooError(
                "LaBraM wants dim = patch/8 · conv_features, patch a multiple of 8, conv_features of 4: "
                f"got dim {self.dim}, patch {self.patch}, conv_features {self.conv_features}"
            )
        if self.dim % self.heads:
            raise ZooError(f"LaBraM dim {self.dim} does not divide into {self.heads} heads")
        if self.remat not in REMAT:
            raise ZooError(f"LaBraM remat must be one of {sorted(REMAT)}, got {self.remat!r}")
        if self.cls_position not in ("row", "first_channel"):
            raise ZooError(f"LaBraM cls_position must be 'row' or 'first_channel', got {self.cls_position!r}")
        if not 0 <= self.drop_path < 1:
            raise ZooError(f"LaBraM drop_path must be in [0, 1), got {self.drop_path}")

    def _check_shapes(self, signal: AnyArray, sensors: Sensors, mask: AnyArray | None) -> None:
        batch, channels, samples = signal.shape
        if samples % self.patch or not 0 < samples // self.patch <= self.max_patches:
            raise ZooError(
                f"LaBraM wants 1 to {self.max_patches} patches of {self.patch} samples, got {samples} samples"
            )
        if sensors.valid.shape != (batch, channels):
            raise ZooError(f"LaBraM wants sensors for {(batch, channels)} channels, got {sensors.valid.shape}")
        if mask is not None and mask.shape != (batch, channels, samples // self.patch):
            raise ZooError(f"LaBraM wants a mask of shape {(batch, channels, samples // self.patch)}, got {mask.shape}")


def electrode_rows(sensors: Sensors) -> Int[Array, "B C"]:
    """Row of the electrode table for each channel [B, C] int32; 0 where the table has none.

    `zoo.sensors.NAMES` begins with LaBraM's names in LaBraM's order.
    """
    known = (sensors.name >= 0) & (sensors.name < ROWS - 1) & (sensors.kind == KINDS.index("eeg"))
    return jnp.where(known, sensors.name + 1, 0)


def _layer_norm(name: str, dtype: DTypeLike, axis: str = "embed") -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=1e-6,
        dtype=dtype,
        scale_init=partitioned(nn.initializers.ones, axis),
        bias_init=partitioned(nn.initializers.zeros, axis),
        name=name,
    )


def _scaled(depth_scale: Array) -> Any:
    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        return _WEIGHT_INIT(key, shape, dtype) * depth_scale

    return init


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
