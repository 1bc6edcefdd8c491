"""EEGDM: what a denoiser of single channels sees of a signal, fused over layers, channels and seconds.

Source: "EEG Representation Learning via Generative Diffusion Model" (EEGDM), 2025; written from its facts, the authors'
code has no licence.

Input: EEG at 200 Hz, 0.1–75 Hz, microvolt / 100, windows of whole seconds (paper: 5), 22 bipolar channels in an order;
each is denoised alone, and known by its number. A channel that is not valid is silence.

The denoiser is pretrained by `zoo.objectives.eegdm`, and frozen for the classifier (`frozen`). It is given the signal
as it is, said to be noisy by a step; what its gates let through is reduced to its deviation in every second. Each
layer's is read, in turn, by 16 tokens, which then pass through a transformer; their mean is classified.

Where the source is silent: the fusing layers are PyTorch's (post-norm, ReLU, dropout .1), deviations are unbiased, the
last block gives no residual, which its published count of parameters says. Not invariant to the sampling rate.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import Encoder, blank
from zoo.errors import ZooError
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias, merge_heads, norm, partitioned, split_heads
from zoo.layers.post_norm import sinusoids
from zoo.registry import Card, register
from zoo.state_space.s4d import DiagonalStateSpace
from zoo.types import AnyArray, Array, Encoded, Sensors

MU = 255.0


class EEGDM(Encoder):
    """The encoder. Tokens are those that fuse; pooled is their mean.

    channels          the montage: names in their order, or how many
    depth, dim, states, condition
                      the denoiser's blocks, features, states of each (half of them kept), width of what it is told
    step              of the noise that the clean signal is said to have
    fusion, fusing    tokens that read the layers, layers of the transformer after it
    heads, hidden     attention heads and width of the MLP of both
    dropout           of attention's and the MLP's results in both
    frozen            no gradient reaches the denoiser
    second            samples of a deviation
    """

    channels: int | tuple[str, ...] = 22
    depth: int = 20
    dim: int = 128
    states: int = 128
    condition: int = 512
    step: int = 1
    fusion: int = 16
    fusing: int = 8
    heads: int = 8
    hidden: int = 512
    dropout: float = 0.1
    frozen: bool = True
    second: int = 200

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)
    ORDER_FREE: ClassVar[bool] = False

    def setup(self) -> None:
        if self.depth < 2 or self.dim % 2 or self.dim % self.heads:
            raise ZooError(
                "EEGDM wants 2 or more blocks, and dim even and a multiple of its heads: "
                f"got depth {self.depth}, dim {self.dim}, heads {self.heads}"
            )
        count = self.channels if isinstance(self.channels, int) else len(self.channels)
        self.denoiser = Denoiser(count, self.depth, self.dim, self.states, self.condition, self.second)
        init = partitioned(nn.initializers.normal(0.02), None, "embed")
        self.fusion_tokens = self.param("fusion_tokens", init, (self.fusion, self.dim))
        options = (self.heads, self.hidden, self.dropout)
        self.read = _stack(ReadLayer, self.depth)(*options)
        self.fuse = _stack(FuseLayer, self.fusing)(*options)

    @property
    def sampling_rate(self) -> float:
        """Hz of the published seconds of 200 samples; where `second` is another, so is the rate."""
        return float(self.second)

    @property
    def montage(self) -> int | tuple[str, ...]:
        """Its channels."""
        return self.channels

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return self.dim

    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        *,
        mask: Bool[AnyArray, "B _"] | Bool[AnyArray, "B _ _"] | None = None,
        subject: Int[AnyArray, " B"] | None = None,
        train: bool = False,
    ) -> Encoded:
        """signal [B, C, T] (µV/100, 200 Hz) → Encoded, N = fusion tokens. `train` draws from the stream "dropout".

        Raises ZooError for a window that is not whole seconds, for a mask, and for options that do not fit.
        """
        if mask is not None:
            raise ZooError("EEGDM hides nothing: got a mask, wanted none")
        signal = self.present(signal, sensors)
        batch = signal.shape[0]
        _, seen = self.denoise(staged_mu_law(signal), jnp.full(signal.shape[:2], self.step))
        if self.frozen:
            seen = jax.lax.stop_gradient(seen)
        layers = jnp.moveaxis(seen, 1, 0).reshape(self.depth, batch, -1, self.dim)
        x = jnp.broadcast_to(self.fusion_tokens, (batch, *self.fusion_tokens.shape))
        x = nn.with_logical_constraint(x, ("batch", None, None))
        x, _ = self.read(x, layers, train)
        x, _ = self.fuse(x, None, train)
        return Encoded(x, x.mean(1), jnp.broadcast_to(jnp.asarray(sensors.valid).any(1)[:, None], x.shape[:2]))

    def denoise(
        self, noisy: Float[AnyArray, "B C T"], step: Int[AnyArray, "B C"]
    ) -> tuple[Float[Array, "B C T"], Float[Array, "B L C A D"]]:
        """(prediction of each channel of a noisy signal that was staged before, deviations of the gates in each
        second), channels alone, each at a step of its own."""
        channels, samples = noisy.shape[1:]
        if not samples or samples % self.second:
            raise ZooError(f"EEGDM wants windows of a multiple of {self.second} samples, got {samples} samples")
        channel = jnp.broadcast_to(jnp.arange(channels), noisy.shape[:2])
        found, seen = self.denoiser(jnp.asarray(noisy).reshape(-1, samples), jnp.asarray(step).ravel(), channel.ravel())
        seen = seen.reshape(self.depth, *noisy.shape[:2], -1, self.dim)
        return found.reshape(noisy.shape), jnp.moveaxis(seen, 1, 0)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls, a multiply-add counting two; not of the transforms."""
        dim, tokens = self.dim, channels * (samples // self.second)
        block = channels * (samples * 4 * dim**2 + self.condition * dim)
        attention = 2 * self.fusion * dim * (dim + self.fusion)
        mlp = 2 * self.fusion * dim * self.hidden
        cross = 2 * (tokens + self.fusion) * dim**2 + 2 * self.fusion * tokens * dim
        read = 2 * attention / 2 + 2 * self.fusion * dim**2 + cross + mlp
        return 2.0 * (self.depth * (block + read) + self.fusing * (attention + 2 * self.fusion * dim**2 + mlp))

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """One second of its channels."""
        return blank(self.channels, self.second)


class Denoiser(nn.Module):
    """Noisy single channels [R, T], their steps and numbers [R] → (prediction [R, T], deviations [L, R, A, D])."""

    channels: int
    depth: int
    dim: int
    states: int
    condition: int
    second: int

    @nn.compact
    def __call__(
        self, noisy: Float[Array, "R T"], step: Int[Array, " R"], channel: Int[Array, " R"]
    ) -> tuple[Float[Array, "R T"], Float[Array, "L R A D"]]:
        dim = self.dim
        # Row t of the sinusoids is step t; a thousand are more than any schedule here.
        told = _mlp(jnp.take(jnp.asarray(sinusoids(1000, dim)), step, axis=0), self.condition, "step")
        table = self.param("embed_channel", partitioned(nn.initializers.normal(1.0), None, None), (self.channels, dim))
        told = told + _mlp(jnp.take(table, channel, axis=0), self.condition, "channel")
        x = nn.relu(_linear(dim, 1, "in")(noisy[..., None]))
        x = nn.with_logical_constraint(x, ("batch", None, None))
        blocks = nn.scan(
            GatedBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth - 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.states, self.second, name="blocks")
        carry, seen = blocks((x, jnp.zeros_like(x)), told)
        (_, skips), last = GatedBlock(self.states, self.second, last=True, name="last")(carry, told)
        hidden = nn.relu(_linear(dim, dim, "out_in")(skips))
        zero = nn.initializers.zeros
        out = dense(1, (None, None), bias=True, init=zero, name="out")(hidden)
        return out[..., 0], jnp.concatenate([seen, last[None]])


class GatedBlock(nn.Module):
    """One block, the body of a scan: (x, sum of skips) and what is told → the same, and deviations [R, A, D]."""

    states: int
    second: int
    last: bool = False

    @nn.compact
    def __call__(
        self, carry: tuple[Float[Array, "R T D"], Float[Array, "R T D"]], told: Float[Array, "R E"]
    ) -> tuple[tuple[Float[Array, "R T D"], Float[Array, "R T D"]], Float[Array, "R A D"]]:
        x, skips = carry
        dim = x.shape[-1]
        zero = nn.initializers.zeros
        inner = norm("layer", epsilon=1e-5, axis=None, name="norm")(x)
        inner = inner + dense(dim, (None, None), bias=True, init=zero, name="condition")(told)[:, None]
        inner = _linear(2 * dim, dim, "widen")(inner)
        inner = DiagonalStateSpace(2 * dim, self.states, causal=False, name="system")(inner)
        gate, value = jnp.split(inner, 2, axis=-1)
        let = nn.sigmoid(gate) * jnp.tanh(value)
        skips = skips + _linear(dim, dim, "skip")(let)
        if not self.last:
            x = x + _linear(dim, dim, "next")(let)
        seconds = let.reshape(let.shape[0], -1, self.second, dim)
        # The root has no slope at zero, which silence has.
        deviation = jnp.sqrt(seconds.var(2, ddof=1) + 1e-12)
        return (x, skips), deviation


class ReadLayer(nn.Module):
    """Tokens attend to one another, then to what a layer saw; then an MLP. The body of a scan over layers."""

    heads: int
    hidden: int
    dropout: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], seen: Float[Array, "B M D"] | None, train: bool
    ) -> tuple[Float[Array, "B N D"], None]:
        def normed(name: str, x: Array, branch: Array) -> Array:
            branch = nn.Dropout(self.dropout, deterministic=not train)(branch)
            return norm("layer", epsilon=1e-5, name=name)(x + branch)

        x = normed("self_norm", x, Attention(self.heads, name="self")(x, x))
        if seen is not None:
            x = normed("cross_norm", x, Attention(self.heads, name="cross")(x, seen))
        hidden = nn.relu(_linear(self.hidden, x.shape[-1], "mlp_in", ("embed", "mlp"))(x))
        return normed("mlp_norm", x, _linear(x.shape[-1], self.hidden, "mlp_out", ("mlp", "embed"))(hidden)), None


class FuseLayer(ReadLayer):
    """The same without anything to read."""


class Attention(nn.Module):
    """Softmax attention of N tokens to M others, float32."""

    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], others: Float[Array, "B M D"]) -> Float[Array, "B N D"]:
        dim = x.shape[-1]
        width = dim // self.heads
        into = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", (0,), (1, 2))
        query, key, value = (
            split_heads(dim, self.heads, width, bias=True, init=into, name=name)(given)
            for name, given in (("query", x), ("key", others), ("value", others))
        )
        mixed = jax.nn.dot_product_attention(query, key, value)
        out_of = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", (0, 1), (2,))
        return merge_heads(self.heads, width, dim, bias=True, init=out_of, name="out")(mixed)


def staged_mu_law(x: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """x where |x| ≤ 1, else sgn(x) · ln(1 + 255 |x|) / ln 256: what is large grows as its logarithm does."""
    size = jnp.abs(x)
    return jnp.where(size <= 1, x, jnp.sign(x) * jnp.log1p(MU * size) / jnp.log1p(MU))


def _stack(layer: Any, depth: int) -> Any:
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0 if layer is ReadLayer else nn.broadcast, nn.broadcast),
        length=depth,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def _linear(features: int, inputs: int, name: str, axes: tuple[str | None, str | None] = (None, None)) -> nn.Dense:
    return dense(features, axes, bias=True, init=LIKE_TORCH, bias_init=like_torch_bias(inputs), name=name)


def _mlp(x: Float[Array, "R D"], width: int, name: str) -> Float[Array, "R E"]:
    hidden = nn.silu(_linear(width, x.shape[-1], f"{name}_in")(x))
    return nn.silu(_linear(width, width, f"{name}_out")(hidden))


VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "eegdm_tiny": (
        {"depth": 4, "dim": 32, "states": 32, "condition": 64, "fusion": 8, "fusing": 2, "heads": 4, "hidden": 64},
        140_769,
        "counts of its parts, its beginning at zero: tests/encoders/test_eegdm.py",
    ),
    "eegdm_base": ({}, 12_811_393, "counts: 5,931,649 in the denoiser as measured, 6.9 M in the rest as stated"),
}
"""Options, parameters (without head), evidence. tiny is ours, for 22 channels too."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        EEGDM,
        _options,
        Card(
            title=f"EEGDM, a denoiser's latents fused, {_parameters / 1e6:.1f} M parameters",
            paper="EEG Representation Learning via Generative Diffusion Model (EEGDM), 2025",
            code="github.com/jhpuah/EEGDM (read for facts: it has no licence)",
            licence="Apache-2.0, ours",
            inputs="EEG [B, 22, A·200] at 200 Hz, 0.1–75 Hz, 50 Hz notched, µV/100, bipolar",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
