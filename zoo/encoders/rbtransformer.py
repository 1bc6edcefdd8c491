"""RBTransformer: electrodes as tokens, each the differential entropies of its bands, in a transformer.

Source: Kumar, Bhandari and Maragatham, "A Brain Wave Encodes a Thousand Tokens: Modeling Inter-Cortical Neural
Interactions for Effective EEG-based Emotion Recognition", arXiv 2511.13954.

Input: raw EEG of one window; the encoder standardises each channel over it and takes, in theta, alpha, beta and gamma,
½ ln(2πe · variance), the entropy in nats of a Gaussian of that variance.

Where this differs from the paper:
- A band's variance is the power of the window's Fourier transform between the band's limits, where the paper filters.
- The paper subtracts the entropies of a baseline recorded before the trial. Here a baseline is the first `baseline`
  samples of the window; its entropies are subtracted from those of the rest. 0, the default, subtracts nothing.
- An electrode that is not valid takes no part in attention and in the mean; the paper has none.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import blank
from zoo.encoders.windowed import OneMontage
from zoo.errors import ZooError
from zoo.layers.multi_head import MultiHead, multi_head_flops
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias, norm, partitioned
from zoo.layers.spectra import band_variance
from zoo.objectives.signal import standardised_where
from zoo.registry import Card, register
from zoo.types import AnyArray, Array, Encoded, Sensors

BANDS = ((4.0, 8.0), (8.0, 13.0), (13.0, 30.0), (30.0, 45.0))
"""Theta, alpha, beta and gamma, in Hz."""
SILENCE = 1e-6
"""Least variance of a band, as a share of the channel's: what is below counts as this much."""


class RBTransformer(OneMontage):
    """The encoder.

    channels      names of the electrodes in the table's order, or how many
    rate          sampling rate in Hz: SEED's 200; DEAP and DREAMER have 128
    bands         limits in Hz
    baseline      samples at the window's beginning whose entropies are subtracted
    dim, depth    features, layers
    heads, width  attention heads, features of each: wider together than dim
    hidden        width of the MLP
    dropout       of the tokens, of attention weights and of what the branches give
    dtype         compute dtype; entropies and softmax stay float32
    """

    channels: int | tuple[str, ...] = 62
    rate: float = 200.0
    bands: tuple[tuple[float, float], ...] = BANDS
    baseline: int = 0
    dim: int = 128
    depth: int = 4
    heads: int = 6
    width: int = 32
    hidden: int = 128
    dropout: float = 0.1
    dtype: DTypeLike = jnp.float32

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)

    @property
    def sampling_rate(self) -> float:
        """Hz."""
        return self.rate

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
        mask: Bool[AnyArray, "B _"] | Bool[AnyArray, "B _ _"] | None = None,
        subject: Int[AnyArray, " B"] | None = None,
        train: bool = False,
    ) -> Encoded:
        """signal [B, C, T], any unit → Encoded, N = C tokens, one an electrode; pooled is the mean of the valid ones.

        Raises ZooError for channels that are not its own, for a window too short to have a frequency in every band,
        for a baseline that is not shorter than the window, and for a mask.
        """
        if mask is not None:
            raise ZooError("RBTransformer hides no tokens: it takes no mask")
        signal = self.present(signal, sensors)
        valid = jnp.asarray(sensors.valid)
        entropy = differential_entropy(signal[..., self.baseline :], self.rate, self.bands)
        if self.baseline:
            entropy -= differential_entropy(signal[..., : self.baseline], self.rate, self.bands)
        entropy = jnp.where(valid[..., None], entropy, 0)

        bands = len(self.bands)
        embed = dense(
            self.dim, (None, "embed"), bias=True, init=LIKE_TORCH, bias_init=like_torch_bias(bands), name="embed_bands"
        )
        table = self.param(
            "embed_electrode", partitioned(nn.initializers.normal(1.0), None, "embed"), (signal.shape[1], self.dim)
        )
        x = nn.Dropout(self.dropout, deterministic=not train)(embed(entropy) + table)
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.heads, self.width, self.hidden, self.dropout, self.dtype, name="blocks")
        tokens = blocks(x.astype(self.dtype), valid, train)[0].astype(jnp.float32)
        share = valid / jnp.maximum(valid.sum(1, keepdims=True), 1)
        return Encoded(tokens=tokens, pooled=jnp.einsum("bnd,bn->bd", tokens, share), valid=valid)

    @nn.nowrap
    def head(self, classes: int) -> nn.Module:
        """The published MLP: norm, then D → 256 → 256 → 128 → classes."""
        return Head(classes, self.dropout)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls, a multiply-add counting two."""
        attention = multi_head_flops(channels, channels, self.dim, self.dim, self.heads * self.width)
        block = attention + 4 * channels * self.dim * self.hidden
        return 2.0 * channels * len(self.bands) * self.dim + self.depth * block

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """A second of every electrode, and the baseline before it."""
        return blank(self.channels, round(self.rate) + self.baseline)


class Block(nn.Module):
    """x += attention(norm x), x += mlp(norm x), exact GELU; the body of a scan."""

    heads: int
    width: int
    hidden: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], valid: Bool[Array, "B N"], train: bool
    ) -> tuple[Float[Array, "B N D"], None]:
        dim = x.shape[-1]

        def dropped(x: Array) -> Array:
            return nn.Dropout(self.dropout, deterministic=not train)(x)

        normed = norm("layer", epsilon=1e-5, dtype=self.dtype, name="attention_norm")(x)
        attention = MultiHead(
            self.heads, self.width, bias=False, dropout=self.dropout, dtype=self.dtype, name="attention"
        )
        x = x + dropped(attention(normed, normed, valid=valid, train=train))
        normed = norm("layer", epsilon=1e-5, dtype=self.dtype, name="mlp_norm")(x)
        hidden = _linear(self.hidden, dim, ("embed", "mlp"), self.dtype, "mlp_in")(normed)
        hidden = dropped(nn.gelu(hidden, approximate=False))
        return x + dropped(_linear(dim, self.hidden, ("mlp", "embed"), self.dtype, "mlp_out")(hidden)), None


class Head(nn.Module):
    """pooled [B, D] → logits [B, K]."""

    classes: int
    dropout: float

    @nn.compact
    def __call__(self, pooled: Float[AnyArray, "B D"], *, train: bool = False) -> Float[Array, "B K"]:
        x = norm("layer", epsilon=1e-5, name="norm")(jnp.asarray(pooled))
        for index, size in enumerate((256, 256, 128)):
            x = nn.gelu(_linear(size, x.shape[-1], (None, None), jnp.float32, f"hidden{index}")(x), approximate=False)
            x = nn.Dropout(self.dropout if index == 0 else 0.0, deterministic=not train)(x)
        return _linear(self.classes, x.shape[-1], (None, None), jnp.float32, "linear")(x)


def differential_entropy(
    signal: Float[Array, "B C T"], rate_hz: float, bands: tuple[tuple[float, float], ...] = BANDS
) -> Float[Array, "B C F"]:
    """½ ln(2πe · variance) of each band of each channel, standardised over the window. A silent band has SILENCE."""
    if signal.shape[-1] < 2:
        raise ZooError(f"differential entropy: got a window of {signal.shape[-1]} samples, wanted two or more")
    standard = standardised_where(signal, axes=(2,))[0]
    variance = jnp.maximum(band_variance(standard, rate_hz, bands), SILENCE)
    return 0.5 * jnp.log(2 * np.pi * np.e * variance)


def _linear(features: int, inputs: int, axes: tuple[str | None, str | None], dtype: DTypeLike, name: str) -> nn.Dense:
    bias = like_torch_bias(inputs)
    return dense(features, axes, bias=True, init=LIKE_TORCH, bias_init=bias, dtype=dtype, name=name)


VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "rbtransformer_tiny": (
        {"channels": 14, "rate": 128.0, "dim": 64, "depth": 2, "heads": 4, "width": 16, "hidden": 64},
        51_264,
        "its layers are those of the published sizes",
    ),
    "rbtransformer_seed": ({}, 536_448, "counts of the paper's classifiers; equivariance; learns a band's place"),
    "rbtransformer_deap": ({"channels": 32, "rate": 128.0}, 532_608, "counts of the paper's classifiers"),
    "rbtransformer_dreamer": ({"channels": 14, "rate": 128.0}, 530_304, "counts of the paper's classifiers"),
}
"""Options, parameters (encoder without head), evidence. tiny is ours; the others are the paper's three datasets."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        RBTransformer,
        _options,
        Card(
            title=f"RBTransformer, electrodes as tokens of band entropies, {_parameters / 1e3:.0f} k parameters",
            paper="Kumar, Bhandari, Maragatham. A Brain Wave Encodes a Thousand Tokens. arXiv 2511.13954",
            code="github.com/nnilayy/RBTransformer",
            licence="unclear; facts only, no code taken",
            inputs="EEG [B, C, T] of one montage at 200 Hz (SEED) or 128 Hz (DEAP, DREAMER), any unit; T of a quarter "
            "second or more; figures above 99 % in the paper are from windows of one trial on both sides of the split",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
