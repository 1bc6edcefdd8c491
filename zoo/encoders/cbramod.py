"""CBraMod: patches of a second that attend across channels with one half of their features, across time with the other.

Source: Wang et al., "CBraMod: A Criss-Cross Brain Foundation Model for EEG Decoding", ICLR 2025, 2412.07236, section 2,
and the official code (github.com/wjq-learning/CBraMod, MIT).

Input: EEG at 200 Hz, 0.3–75 Hz, mains notched, microvolt / 100, any number of patches of 200 samples.

A patch's place is told by a depthwise convolution over the grid of channels and patches, 19 channels wide, so the order
of channels is part of the model. The published one is that of `channels`' default, of the corpus it was pretrained on;
any other number of channels is taken too, as in the published fine-tuning.

A hidden patch is one whose samples are zero, also in the spectrum: what lay there is never read, and it looks like a
silent one.

Where this differs from the official code:
- A channel that is not valid is silence. It is not pooled, but the others see it silent.
- Layers are drawn one by one. The official ones begin as copies of one layer, of which all linear maps but those into
  attention are then drawn anew.
- `patches` other than 0 is the published default classifier, over the features of all patches; 0 the published
  alternative, over their mean, which takes windows of any length.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import Encoder, LinearHead, blank
from zoo.errors import ZooError
from zoo.layers.convolution import Convolution
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias, merge_heads, norm, partitioned, split_heads
from zoo.layers.patch_transformer import GroupNorm
from zoo.layers.residual import REMAT
from zoo.registry import Card, register
from zoo.types import AnyArray, Array, Encoded, Sensors
from zoo.weights.keys import Ignore, Key, Rule

_TUEG = "FP1 FP2 F3 F4 C3 C4 P3 P4 O1 O2 F7 F8 T3 T4 T5 T6 FZ CZ PZ"
TUEG: tuple[str, ...] = tuple(_TUEG.split())
"""The channels it was pretrained on, in their order, by their names there: T3, T4, T5, T6 are T7, T8, P7, P8."""
CONVOLUTIONS = ((49, 25), (3, 1), (3, 1))
"""Width and stride of the convolutions over a patch."""
GROUPS = 5
KAIMING = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class CBraMod(Encoder):
    """The CBraMod encoder.

    channels       the montage: names in their order, or how many
    patches        that windows have, where the features of all are pooled side by side; 0: any number, their mean is
    depth, heads   layers; attention heads, half of them across channels, half across time
    conv_features  of the convolutions over a patch, a multiple of 5; D is as many times the steps they leave of it
    patch          samples a patch
    mlp_ratio      width of the MLP, in D
    dropout        of attention weights, of what attention and MLP give, in the MLP, of embedded spectra
    remat          "none", "full" (recompute all) or "dots" (keep matmul outputs)
    dtype          compute dtype; spectra, parameters, statistics and softmax stay float32
    """

    channels: int | tuple[str, ...] = TUEG
    patches: int = 0
    depth: int = 12
    heads: int = 8
    conv_features: int = 25
    patch: int = 200
    mlp_ratio: int = 4
    dropout: float = 0.1
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)
    ORDER_FREE: ClassVar[bool] = False

    @property
    def sampling_rate(self) -> float:
        """Hz of the published patches of 200 samples a second; where `patch` is another, so is a second."""
        return float(self.patch)

    @property
    def montage(self) -> int | tuple[str, ...]:
        """Its channels."""
        return self.channels

    @property
    def dim(self) -> int:
        """D of its tokens."""
        width, stride = CONVOLUTIONS[0]
        return self.conv_features * ((self.patch + 2 * (width // 2) - width) // stride + 1)

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return self.dim * max(1, self.patches * self._count())

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
        """signal [B, C, A·200] (µV/100, 200 Hz) → Encoded, N = C·A tokens, channel-major, without a last norm.

        mask [B, C, A]: True where a patch is hidden. pooled is the mean of the valid tokens, or all tokens side by
        side. Raises ZooError for windows that are not made of patches, or of another number than `patches`, for
        channels that are not its own, for a mask of another shape, and for options out of range.
        """
        self._check_options()
        signal = self.present(signal, sensors)
        batch, channels, samples = signal.shape
        count = self._patches(samples)
        if mask is not None and mask.shape != (batch, channels, count):
            raise ZooError(f"CBraMod wants a mask of shape {(batch, channels, count)}, got {mask.shape}")
        patches = signal.reshape(batch, channels, count, self.patch)
        if mask is not None:
            patches = jnp.where(jnp.asarray(mask)[..., None], 0, patches)

        x = PatchEmbedding(self.conv_features, self.dim, self.dropout if train else 0.0, self.dtype, name="embed")(
            patches
        )
        layer = Layer
        if self.remat != "none":
            layer = nn.remat(Layer, policy=REMAT[self.remat], prevent_cse=False)
        stack: Any = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        rate = self.dropout if train else 0.0
        x = stack(self.heads, self.mlp_ratio, rate, self.dtype, name="layers")(x, None)[0]
        tokens = x.astype(jnp.float32).reshape(batch, channels * count, self.dim)
        valid = jnp.repeat(jnp.asarray(sensors.valid), count, axis=1)
        if self.patches:
            return Encoded(tokens, tokens.reshape(batch, -1), valid)
        return Encoded(tokens, jnp.mean(tokens, axis=1, where=valid[..., None]), valid)

    @nn.nowrap
    def head(self, classes: int) -> nn.Module:
        """A linear map of the mean, or three of all patches with ELU and dropout between."""
        return AllPatchesHead(classes, self.patches * self.dim, self.dim) if self.patches else LinearHead(classes)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two."""
        count = self._patches(samples)
        tokens, dim, features = channels * count, self.dim, self.conv_features
        embedding = dim * (49 + 2 * 3 * features) + (self.patch // 2 + 1) * dim + 19 * 7 * dim
        layer = 2 * dim**2 + 2 * self.mlp_ratio * dim**2 + dim * (channels + count)
        return 2.0 * tokens * (embedding + self.depth * layer)

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """One patch of its channels, or as many as it has."""
        return blank(self.channels, self.patch * max(1, self.patches))

    def _count(self) -> int:
        return self.channels if isinstance(self.channels, int) else len(self.channels)

    @nn.nowrap
    def _patches(self, samples: int) -> int:
        count = samples // self.patch
        wanted = f"{self.patches}" if self.patches else "1 or more"
        if samples % self.patch or not count or self.patches not in (0, count):
            raise ZooError(f"CBraMod wants {wanted} patches of {self.patch} samples, got {samples} samples")
        return count

    def _check_options(self) -> None:
        if self.conv_features % GROUPS or self.heads % 2 or self.dim % self.heads or self.dim % 2:
            raise ZooError(
                f"CBraMod wants conv_features a multiple of {GROUPS}, heads even and a divisor of D: got "
                f"{self.conv_features}, {self.heads}, D {self.dim}"
            )
        if self.remat not in REMAT:
            raise ZooError(f"CBraMod remat must be one of {sorted(REMAT)}, got {self.remat!r}")


class PatchEmbedding(nn.Module):
    """Patches [B, C, A, P] → [B, C, A, D]: convolved samples and amplitudes of the spectrum, and where they are.

    Element f · steps + t of the convolved is feature f, step t. Group norms are over all patches of an example.
    """

    features: int
    dim: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, patches: Float[Array, "B C A P"]) -> Float[Array, "B C A D"]:
        batch, channels, count, samples = patches.shape
        x = patches.reshape(batch, channels * count, samples, 1)
        every = jnp.ones((batch, channels * count), bool)
        for number, (width, stride) in enumerate(CONVOLUTIONS, start=1):
            x = nn.Conv(
                self.features,
                (width,),
                strides=(stride,),
                padding=[(width // 2, width // 2)],
                kernel_init=partitioned(LIKE_TORCH, None, None, None),
                bias_init=partitioned(like_torch_bias(width * x.shape[-1]), None),
                dtype=self.dtype,
                name=f"conv{number}",
            )(x)
            x = nn.gelu(GroupNorm(GROUPS, False, name=f"norm{number}")(x, every), approximate=False)
        waveform = x.swapaxes(-1, -2).reshape(batch, channels, count, self.dim)

        amplitude = jnp.abs(jnp.fft.rfft(patches, norm="forward"))
        bias = like_torch_bias(amplitude.shape[-1])
        spectrum = dense(
            self.dim, (None, "embed"), bias=True, init=KAIMING, bias_init=bias, dtype=self.dtype, name="spectrum"
        )(amplitude)
        x = waveform + nn.Dropout(self.dropout, deterministic=not self.dropout)(spectrum)
        x = nn.with_logical_constraint(x, ("batch", None, None, None))
        place = Convolution(self.dim, (19, 7), paddings=(9, 3), groups=self.dim, dtype=self.dtype, name="place")
        return x + place(x)


class Layer(nn.Module):
    """x + [attention across channels of x's first half, across time of its second], then x + MLP; both of normed x."""

    heads: int
    mlp_ratio: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B C A D"], _: None) -> tuple[Float[Array, "B C A D"], None]:
        dim = x.shape[-1]

        def drop(x: Array) -> Array:
            return nn.Dropout(self.dropout, deterministic=not self.dropout)(x)

        def linear(features: int, axes: tuple[str, str], name: str) -> nn.Dense:
            bias = like_torch_bias(dim * self.mlp_ratio if features == dim else dim)
            return dense(features, axes, bias=True, init=KAIMING, bias_init=bias, dtype=self.dtype, name=name)

        def attention(name: str) -> Attention:
            return Attention(self.heads // 2, self.dropout, self.dtype, name=name)

        normal = norm("layer", epsilon=1e-5, dtype=self.dtype, name="attention_norm")(x)
        across, along = jnp.split(normal, 2, axis=-1)
        across = attention("across_channels")(across.swapaxes(1, 2)).swapaxes(1, 2)
        along = attention("along_time")(along)
        x = x + drop(jnp.concatenate([across, along], axis=-1))
        normal = norm("layer", epsilon=1e-5, dtype=self.dtype, name="mlp_norm")(x)
        hidden = nn.gelu(linear(dim * self.mlp_ratio, ("embed", "mlp"), "mlp_in")(normal), approximate=False)
        return x + drop(linear(dim, ("mlp", "embed"), "mlp_out")(drop(hidden))), None


class Attention(nn.Module):
    """Softmax attention of [B, G, N, D] over N, for each of G on its own; it begins as PyTorch's MultiheadAttention."""

    heads: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B G N D"]) -> Float[Array, "B G N D"]:
        dim = x.shape[-1]
        width = dim // self.heads
        # Xavier's bound of the three maps as one matrix.
        into = nn.initializers.uniform(2 * (6 / (4 * dim)) ** 0.5)

        def centred(*given: Any) -> Array:
            return into(*given) - (6 / (4 * dim)) ** 0.5

        query, key, value = (
            split_heads(dim, self.heads, width, bias=True, init=centred, dtype=self.dtype, name=name)(x)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bgnhk,bgmhk->bghnm", query, key) * width**-0.5
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(self.dtype)
        weights = nn.Dropout(self.dropout, deterministic=not self.dropout)(weights)
        out_of = nn.initializers.variance_scaling(2.0, "fan_out", "normal", (0, 1), (2,))
        out = merge_heads(self.heads, width, dim, bias=True, init=out_of, dtype=self.dtype, name="out")
        return out(jnp.einsum("bghnm,bgmhk->bgnhk", weights, value))


class AllPatchesHead(nn.Module):
    """[B, C·A·D] → [B, classes]: linear to `wide`, to `narrow`, to classes; ELU and dropout between, as published."""

    classes: int
    wide: int
    narrow: int
    dropout: float = 0.1

    @nn.compact
    def __call__(self, pooled: Float[AnyArray, "B D"], *, train: bool = False) -> Float[Array, "B K"]:
        x = jnp.asarray(pooled)
        for number, features in enumerate((self.wide, self.narrow, self.classes), start=1):
            if number > 1:
                x = nn.Dropout(self.dropout, deterministic=not train)(nn.elu(x))
            bias = like_torch_bias(x.shape[-1])
            x = dense(features, (None, None), bias=True, init=LIKE_TORCH, bias_init=bias, name=f"linear_{number}")(x)
        return x


VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "cbramod_tiny": ({"depth": 4, "heads": 4, "conv_features": 5}, 75_960, "parity of its layers"),
    "cbramod_base": (
        {},
        4_883_600,
        "parity: tokens and logits of the official code and of braindecode within 1e-5 (relative), random weights: "
        "tests/parity/test_cbramod_peers.py",
    ),
}
"""Options, parameters (without the head of pretraining, 40,200, and the mask, 200 zeros), evidence. tiny is ours."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        CBraMod,
        _options,
        Card(
            title=f"CBraMod encoder, {_parameters / 1e6:.1f} M parameters",
            paper="Wang, Zhao, Luo, Zhou, Jiang, Li, Li, Pan. CBraMod: A Criss-Cross Brain Foundation Model for EEG "
            "Decoding. ICLR 2025, arXiv 2412.07236",
            code="github.com/wjq-learning/CBraMod",
            licence="MIT",
            inputs="EEG [B, C, A·200] at 200 Hz, 0.3–75 Hz, mains notched, µV/100; 19 channels in their order, or "
            "those named",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )


def _pair(source: str, target: str, how: str = "", into: str = "kernel", layer: str = "") -> tuple[Key, Key]:
    weight = Key(f"{source}.weight", f"params/{target}/{into}{layer}", how)
    return weight, Key(f"{source}.bias", f"params/{target}/bias{layer}")


_LAYER = "encoder.layers.{l}."
KEYS: tuple[Rule, ...] = (
    Ignore("patch_embedding.mask_encoding", "zeros that hide a patch, not learned"),
    Ignore("proj_out.0.weight", "the head of pretraining"),
    Ignore("proj_out.0.bias", "the head of pretraining"),
    *(
        key
        for number, (conv, group) in enumerate(((0, 1), (3, 4), (6, 7)), start=1)
        for key in (
            *_pair(f"patch_embedding.proj_in.{conv}", f"embed/conv{number}", "o i 1 t -> t i o"),
            *_pair(f"patch_embedding.proj_in.{group}", f"embed/norm{number}", into="scale"),
        )
    ),
    *_pair("patch_embedding.spectral_proj.0", "embed/spectrum", "o i -> i o"),
    *_pair("patch_embedding.positional_encoding.0", "embed/place", "o 1 c a -> c a 1 o"),
    *(
        Key(f"{_LAYER}self_attn_{which}.in_proj_{theirs}", f"params/layers/{ours}/{name}/{leaf}[{{l}}]", how, (part, 3))
        for which, ours in (("s", "across_channels"), ("t", "along_time"))
        for theirs, leaf, how in (("weight", "kernel", "(h k) d -> d h k"), ("bias", "bias", "(h k) -> h k"))
        for part, name in enumerate(("query", "key", "value"))
    ),
    *_pair(f"{_LAYER}self_attn_s.out_proj", "layers/across_channels/out", "d (h k) -> h k d", layer="[{l}]"),
    *_pair(f"{_LAYER}self_attn_t.out_proj", "layers/along_time/out", "d (h k) -> h k d", layer="[{l}]"),
    *_pair(f"{_LAYER}linear1", "layers/mlp_in", "o i -> i o", layer="[{l}]"),
    *_pair(f"{_LAYER}linear2", "layers/mlp_out", "o i -> i o", layer="[{l}]"),
    *_pair(f"{_LAYER}norm1", "layers/attention_norm", into="scale", layer="[{l}]"),
    *_pair(f"{_LAYER}norm2", "layers/mlp_norm", into="scale", layer="[{l}]"),
)
"""Of the official checkpoint, and of braindecode's CBraMod, which keeps the head of pretraining before its own."""
MEAN_HEAD_KEYS: tuple[Rule, ...] = _pair("classifier.3", "linear", "o i -> i o")
"""Of the official classifier of the mean."""
HEAD_KEYS: tuple[Rule, ...] = tuple(
    key
    for number, place in enumerate((1, 4, 7), start=1)
    for key in _pair(f"classifier.{place}", f"linear_{number}", "o i -> i o")
)
"""Of the official classifier of all patches."""
