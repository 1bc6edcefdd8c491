"""The transformer over embedded patches of EEG, one token a patch and channel, that several systems share.

Source: Jiang, Zhao and Lu, "Large Brain Model for Learning Generic Representations with Tremendous EEG Data in BCI",
ICLR 2024, §2.2, and the official code (github.com/935963004/LaBraM, MIT); its tokenizer, and NeuroRVQ (2510.13068),
have the same with other options.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.errors import ZooError
from zoo.layers.parameters import LIKE_TORCH, like_torch_bias, norm, partitioned
from zoo.layers.residual import REMAT, drop_path
from zoo.types import AnyArray, Array

WEIGHT_INIT = nn.initializers.truncated_normal(0.02)
CLS_POSITIONS = ("row", "first_channel")


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
    """Patch embedding [B, N, P] → [B, N, D], D = P/8 · features; element t·features + f is step t, feature f.

    like_torch  convolutions begin as PyTorch's do, else with kernels of 0.02 and no bias
    """

    features: int
    per_patch_norm: bool
    dtype: DTypeLike
    like_torch: bool = False

    @nn.compact
    def __call__(self, patches: Float[Array, "B N P"], valid: Bool[Array, "B N"]) -> Float[Array, "B N D"]:
        x = patches[..., None]
        for layer, (width, stride) in enumerate(((15, 8), (3, 1), (3, 1)), start=1):
            kernel, bias = WEIGHT_INIT, nn.initializers.zeros
            if self.like_torch:
                kernel, bias = LIKE_TORCH, like_torch_bias(width * x.shape[-1])
            x = nn.Conv(
                self.features,
                (width,),
                strides=(stride,),
                padding=[(width // 2, width // 2)],
                kernel_init=partitioned(kernel, None, None, None),
                bias_init=partitioned(bias, None),
                dtype=self.dtype,
                name=f"conv{layer}",
            )(x)
            x = nn.gelu(GroupNorm(4, self.per_patch_norm, name=f"norm{layer}")(x, valid), approximate=False)
        return x.reshape(*patches.shape[:2], -1)


class Attention(nn.Module):
    """Softmax attention over tokens [B, N, D] with layer-normalised queries and keys (paper eq. 5).

    key_bias  keys have a bias
    turn      what makes queries and keys [B, N, H, K] know where they are
    """

    heads: int
    qkv_bias: bool
    qk_norm: bool
    depth_scale: Array
    dtype: DTypeLike
    key_bias: bool = False
    turn: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], valid: Bool[Array, "B N"]) -> Float[Array, "B N D"]:
        dim = x.shape[-1]
        width = dim // self.heads

        def project(name: str, bias: bool) -> Array:
            return nn.Einsum(
                (dim, self.heads, width),
                "bnd,dhk->bnhk",
                use_bias=bias,
                kernel_init=partitioned(WEIGHT_INIT, "embed", "heads", "head_width"),
                bias_init=partitioned(nn.initializers.zeros, "heads", "head_width"),
                dtype=self.dtype,
                name=name,
            )(x)

        # The published option gives queries and values a bias, keys never.
        query, key, value = (
            project(name, bias)
            for name, bias in (("query", self.qkv_bias), ("key", self.key_bias), ("value", self.qkv_bias))
        )
        if self.qk_norm:
            query = norm("layer", axis="head_width", dtype=self.dtype, name="query_norm")(query)
            key = norm("layer", axis="head_width", dtype=self.dtype, name="key_norm")(key)
        if self.turn is not None:
            query, key = self.turn(query), self.turn(key)
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
    epsilon: float
    train: bool
    dtype: DTypeLike
    key_bias: bool = False
    turn: Callable[[Array], Array] | None = None

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

        attention = Attention(
            self.heads,
            self.qkv_bias,
            self.qk_norm,
            depth_scale,
            self.dtype,
            self.key_bias,
            self.turn,
            name="attention",
        )
        x = x + residual("attention_scale", attention(self._norm("attention_norm")(x), valid))
        hidden = nn.Dense(
            dim * self.mlp_ratio,
            kernel_init=partitioned(WEIGHT_INIT, "embed", "mlp"),
            bias_init=partitioned(nn.initializers.zeros, "mlp"),
            dtype=self.dtype,
            name="mlp_in",
        )(self._norm("mlp_norm")(x))
        hidden = nn.with_logical_constraint(nn.gelu(hidden, approximate=False), ("batch", None, "mlp"))
        out = nn.Dense(
            dim,
            kernel_init=partitioned(_scaled(depth_scale), "mlp", "embed"),
            bias_init=partitioned(nn.initializers.zeros, "embed"),
            dtype=self.dtype,
            name="mlp_out",
        )(hidden)
        return x + residual("mlp_scale", out), None

    def _norm(self, name: str) -> nn.Module:
        return norm("layer", epsilon=self.epsilon, dtype=self.dtype, name=name)


class Stack(nn.Module):
    """Layers of `Block` one upon another: tokens [B, N, D] → [B, N, D], those not `valid` seen by none.

    drop_path  stochastic-depth rate of the last layer; layer l of L has rate · (l−1)/(L−1)
    remat      "none", "full" or "dots"
    The others are `Attention`'s and `Block`'s.
    """

    depth: int
    heads: int
    mlp_ratio: int = 4
    qkv_bias: bool = False
    qk_norm: bool = True
    layer_scale: float = 0.0
    drop_path: float = 0.0
    epsilon: float = 1e-6
    key_bias: bool = False
    turn: Callable[[Array], Array] | None = None
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], valid: Bool[AnyArray, "B N"], *, train: bool = False
    ) -> Float[Array, "B N D"]:
        """Raises ZooError for an option out of range."""
        if x.shape[-1] % self.heads:
            raise ZooError(f"PatchTransformer: {x.shape[-1]} features do not divide into {self.heads} heads")
        if self.remat not in REMAT:
            raise ZooError(f"PatchTransformer remat must be one of {sorted(REMAT)}, got {self.remat!r}")
        if not 0 <= self.drop_path < 1:
            raise ZooError(f"PatchTransformer drop_path must be in [0, 1), got {self.drop_path}")
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
        blocks = stack(
            self.heads,
            self.mlp_ratio,
            self.qkv_bias,
            self.qk_norm,
            self.layer_scale,
            self.epsilon,
            train and self.drop_path > 0,
            self.dtype,
            self.key_bias,
            self.turn,
            name="blocks",
        )
        layers = jnp.arange(1.0, self.depth + 1.0), jnp.linspace(0.0, self.drop_path, self.depth)
        return blocks(x, jnp.asarray(valid), layers)[0]

    @nn.nowrap
    def flops(self, tokens: int, dim: int) -> float:
        """Operations of one example's pass in matmuls, a multiply-add counting two."""
        return float(self.depth * (2 * tokens * dim**2 * (4 + 2 * self.mlp_ratio) + 4 * tokens**2 * dim))


class PatchTransformer(nn.Module):
    """Embedded patches [B, C·A, D], channel by channel, → [B, C·A, D], without a last norm.

    depth, heads       layers, attention heads
    qkv_bias           queries and values have a bias
    qk_norm            layer-normalised queries and keys
    layer_scale        initial value of the learned residual scales; 0 leaves them out
    drop_path          stochastic-depth rate of the last layer; layer l of L has rate · (l−1)/(L−1)
    electrodes         rows of the electrode table
    max_patches        rows of the time table, so the longest input in patches a channel
    table_std          initial spread of electrode, time and CLS embeddings
    cls_position       the CLS token takes row 0 of the electrode table ("row"), or that of the first valid channel
                       ("first_channel")
    epsilon            of the layer norms over features
    """

    depth: int
    heads: int
    mlp_ratio: int = 4
    qkv_bias: bool = False
    qk_norm: bool = True
    layer_scale: float = 0.0
    drop_path: float = 0.0
    electrodes: int = 129
    max_patches: int = 16
    table_std: float = 0.02
    cls_position: str = "row"
    epsilon: float = 1e-6
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        rows: Int[Array, "B C"],
        valid: Bool[AnyArray, "B C"],
        *,
        first: int = 0,
        train: bool = False,
    ) -> Float[Array, "B N D"]:
        """rows [B, C]: row of the electrode table for each channel, −1 for one that has none, which makes every token
        of the example NaN; first: row of the time table for the first patch. Raises ZooError for an option out of
        range."""
        self._check_options()
        batch, channels = rows.shape
        count, dim = x.shape[1] // channels, x.shape[-1]
        table_init = nn.initializers.truncated_normal(self.table_std)
        electrode = self.param("embed_electrode", partitioned(table_init, None, "embed"), (self.electrodes, dim))
        time = self.param("embed_time", partitioned(table_init, None, "embed"), (self.max_patches, dim))
        cls = self.param("embed_cls", partitioned(table_init, "embed"), (dim,))
        # Made whole before rows are taken of it: from a split table XLA would copy the batch to every device.
        electrode = nn.with_logical_constraint(electrode, (None, None))
        # A channel the table does not know must not pass for another: its embedding is NaN, and so is the loss.
        place = jnp.where((rows >= 0)[..., None], jnp.take(electrode, jnp.maximum(rows, 0), axis=0), jnp.nan)
        place = jnp.where(valid[..., None], place, 0.0)
        x = x + (place[:, :, None] + time[first : first + count]).reshape(x.shape).astype(x.dtype)
        if self.cls_position == "first_channel":
            beside = jnp.take_along_axis(place, jnp.argmax(valid, axis=1)[:, None, None], axis=1)[:, 0]
        else:
            beside = electrode[0]
        token = jnp.broadcast_to(cls + beside, (batch, dim)).astype(x.dtype)

        x = jnp.concatenate([token[:, None], x], axis=1)
        keys = jnp.concatenate([jnp.ones((batch, 1), bool), jnp.repeat(valid, count, axis=1)], axis=1)
        stack = self._stack()
        # Its layers are this module's own.
        nn.share_scope(self, stack)
        return stack(x, keys, train=train)[:, 1:]

    @nn.nowrap
    def flops(self, tokens: int, dim: int) -> float:
        """Operations of one example's pass in matmuls, a multiply-add counting two."""
        return self._stack().flops(tokens + 1, dim)

    @nn.nowrap
    def _stack(self) -> Stack:
        return Stack(
            self.depth,
            self.heads,
            self.mlp_ratio,
            self.qkv_bias,
            self.qk_norm,
            self.layer_scale,
            self.drop_path,
            self.epsilon,
            remat=self.remat,
            dtype=self.dtype,
        )

    def _check_options(self) -> None:
        if self.cls_position not in CLS_POSITIONS:
            raise ZooError(f"PatchTransformer cls_position must be one of {CLS_POSITIONS}, got {self.cls_position!r}")


def _scaled(depth_scale: Array) -> Any:
    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        return WEIGHT_INIT(key, shape, dtype) * depth_scale

    return init
