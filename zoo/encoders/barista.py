"""BaRISTA: intracranial electrodes in quarter seconds, each known by where in the brain it is.

Source: "BaRISTA", NeurIPS 2025, 2512.12135; written from its facts, as the authors' code may not be used commercially.

Input: sEEG or ECoG, 2,048 Hz, any unit the recording is standardised to, windows of 3 s: 12 segments of 512 samples of
each electrode. Where an electrode is, is one of (`regions`):
- its coordinates: a table each for x, y and z, a row a millimetre, 100 mm either way of the head's origin, added. The
  published tables have 200 rows, too; which coordinate has which row is our choice;
- its parcel (Destrieux: 121 rows) or lobe (21), given by the option `region_of`, since sensors do not tell it: then
  channels come in the order of that option.

A convolutional encoder reads each segment by itself; then tokens of all electrodes and segments see one another. Only
the segment's number turns queries and keys, so electrodes may come in any order. Tokens are electrode by electrode here
(there, segment by segment).

The published classifier weighs all tokens of one montage (`weights`, how many) and maps their sum to classes; without
it, pooled is their mean, of any electrodes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import Encoder
from zoo.errors import ZooError
from zoo.layers.convolution import Convolution
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias, merge_heads, norm, partitioned, split_heads
from zoo.layers.residual import REMAT
from zoo.layers.rotary import rotate
from zoo.registry import Card, register
from zoo.sensors import KINDS
from zoo.types import AnyArray, Array, Encoded, Sensors

ROWS = 200
"""Of a coordinate's table; row r is r − 100 mm."""
WIDTHS = (5, 5, 5, 5, 1)
"""Features of the convolutional blocks."""


class Barista(Encoder):
    """The encoder.

    regions, region_of  rows of the table of parcels or lobes, and each channel's row; 0 and none: coordinates
    segment             samples of a token
    rate_hz             of the signal
    depth, dim, heads, hidden, dropout
                        of the transformer
    weights             tokens whose weighted sum `pooled` is; 0: the mean of those there are
    remat               "none", "full" (recompute all) or "dots" (keep matmul outputs)
    dtype               compute dtype; parameters, statistics and softmax stay float32
    """

    regions: int = 0
    region_of: tuple[int, ...] = ()
    segment: int = 512
    rate_hz: float = 2048.0
    depth: int = 12
    dim: int = 64
    heads: int = 4
    hidden: int = 256
    dropout: float = 0.1
    weights: int = 0
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    TAKES: ClassVar[tuple[str, ...]] = ("seeg", "ecog")

    def setup(self) -> None:
        self._check_options()
        self.temporal = TemporalEncoder(self.dim, self.dtype)
        init = partitioned(nn.initializers.normal(0.02), None, "embed")
        if self.regions:
            self.embed_region = self.param("embed_region", init, (self.regions, self.dim))
        else:
            init = partitioned(nn.initializers.normal(0.02), None, None, "embed")
            self.embed_place = self.param("embed_place", init, (3, ROWS, self.dim))
        block = Block if self.remat == "none" else nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.heads, self.hidden, self.dropout, self.dtype)
        self.norm = norm("rms", epsilon=1e-8, dtype=self.dtype)
        if self.weights:
            shape, bias = (self.weights, 1), like_torch_bias(self.weights)
            self.weight = self.param("weight", partitioned(LIKE_TORCH, None, None), shape)
            self.shift = self.param("shift", partitioned(bias, None), (1,))

    @property
    def sampling_rate(self) -> float:
        """Hz."""
        return self.rate_hz

    @property
    def montage(self) -> int | None:
        """How many channels, where each has its region."""
        return len(self.region_of) if self.regions else None

    @property
    def patch(self) -> int:
        """Samples of a token, which a mask [B, C, A] hides."""
        return self.segment

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
        """signal [B, C, A · segment] → Encoded, N = C · A tokens, channel by channel.

        mask [B, C, A] puts the mask token in the place of what the convolutions made; where it is stays known. An
        electrode of no known place makes its example NaN. `train` draws from the stream "dropout". Raises ZooError for
        windows and masks of other shapes, and for options that do not fit.
        """
        signal = self.present(signal, sensors)
        samples = signal.shape[-1]
        if not samples or samples % self.segment:
            raise ZooError(f"Barista wants a multiple of {self.segment} samples, got {samples} samples")
        latents = self.temporal(signal.reshape(*signal.shape[:2], -1, self.segment))
        batch, channels, count, dim = latents.shape
        if mask is not None:
            if mask.shape != latents.shape[:3]:
                raise ZooError(f"Barista wants a mask of shape {latents.shape[:3]}, got {mask.shape}")
            token = self.param("embed_mask", partitioned(nn.initializers.normal(0.02), "embed"), (dim,))
            latents = jnp.where(jnp.asarray(mask)[..., None], token.astype(latents.dtype), latents)
        x = latents + self._places(sensors)[:, :, None].astype(latents.dtype)
        x = nn.with_logical_constraint(x.reshape(batch, -1, dim), ("batch", "tokens", None))
        valid = jnp.repeat(jnp.asarray(sensors.valid), count, axis=1)
        number = jnp.tile(jnp.arange(count), channels)[None]
        x, _ = self.blocks(x, valid, number, train)
        x = self.norm(x).astype(jnp.float32)
        if not self.weights:
            # Nothing valid: zeros.
            return Encoded(x, (x * valid[..., None]).sum(1) / jnp.maximum(valid.sum(1), 1)[:, None], valid)
        if self.weights != x.shape[1]:
            raise ZooError(f"Barista weights: got {x.shape[1]} tokens, wanted {self.weights}")
        return Encoded(x, jnp.einsum("bnd,n->bd", x * valid[..., None], self.weight[:, 0]) + self.shift, valid)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two."""
        tokens, before, convolved = channels * (samples // self.segment), 1, 0
        for width in WIDTHS:
            convolved += 3 * width * (before + width) + before * width
            before = width
        own = self.segment * (convolved + self.dim)
        layer = 4 * self.dim**2 + 3 * self.dim * self.hidden + 2 * tokens * self.dim
        return 2.0 * tokens * (own + self.depth * layer)

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """One segment of one electrode, or of as many as have a region or a weight."""
        channels = len(self.region_of) or 1
        segments = max(self.weights // channels, 1)
        there, kind = jnp.zeros((1, channels, 3)), jnp.full((1, channels), KINDS.index("seeg"), jnp.int32)
        sensors = Sensors(there, there, kind, jnp.full_like(kind, -1), jnp.ones((1, channels), bool))
        return jnp.zeros((1, channels, segments * self.segment)), sensors

    @nn.nowrap
    def check_positions(self, sensors: Sensors) -> None:
        """Raises ZooError for valid channels, on the host, of no known place, where coordinates tell it."""
        unknown = np.asarray(sensors.valid) & ~np.isfinite(np.asarray(sensors.position)).all(-1)
        if not self.regions and unknown.any():
            raise ZooError(
                f"Barista: got {unknown.sum()} channels of no known position, wanted none; regions need no positions"
            )

    def _places(self, sensors: Sensors) -> Float[Array, "_ C D"]:
        if self.regions:
            table = nn.with_logical_constraint(self.embed_region, (None, None))
            return jnp.take(table, jnp.asarray(self.region_of), axis=0)[None]
        position = jnp.asarray(sensors.position)
        known = jnp.isfinite(position)
        row = jnp.clip(jnp.floor(1000 * jnp.where(known, position, 0)) + ROWS // 2, 0, ROWS - 1).astype(jnp.int32)
        tables = nn.with_logical_constraint(self.embed_place, (None, None, None))
        place = sum(jnp.take(tables[axis], row[..., axis], axis=0) for axis in range(3))
        valid = jnp.asarray(sensors.valid)[..., None]
        # An electrode of no known place must not pass for another.
        return jnp.where(valid, jnp.where(known.all(-1, keepdims=True), place, jnp.nan), 0)

    @nn.nowrap
    def _check_options(self) -> None:
        if self.dim % (2 * self.heads):
            raise ZooError(f"Barista dim: got {self.dim}, wanted a multiple of twice its {self.heads} heads")
        if bool(self.regions) != bool(self.region_of) or any(not 0 <= row < self.regions for row in self.region_of):
            raise ZooError(
                f"Barista: got {self.regions} regions and rows {self.region_of}, wanted such a row for each channel"
            )
        if self.remat not in REMAT:
            raise ZooError(f"Barista remat must be one of {sorted(REMAT)}, got {self.remat!r}")


class TemporalEncoder(nn.Module):
    """Segments [B, C, A, P] → [B, C, A, D], each by itself: dilated convolutions, then a map of all its samples."""

    dim: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, segments: Float[Array, "B C A P"]) -> Float[Array, "B C A D"]:
        x = segments.reshape(-1, segments.shape[-1], 1).astype(self.dtype)
        for number, width in enumerate(WIDTHS):

            def convolve(x: Array, name: str, width: int = width, spread: int = 2**number) -> Array:
                x = Convolution(width, (3,), (), (spread,), "same", dtype=self.dtype, name=name)(x)
                return nn.gelu(_over_time(x), approximate=False)

            inner = convolve(convolve(x, f"conv_{number}_in"), f"conv_{number}_out")
            if width != x.shape[-1] or number == len(WIDTHS) - 1:
                x = Convolution(width, (1,), dtype=self.dtype, name=f"conv_{number}_past")(x)
            x = inner + x
        bare = dense(self.dim, (None, "embed"), init=LIKE_TORCH, dtype=self.dtype, name="out")
        return bare(x.reshape(*segments.shape))


def _over_time(x: Float[Array, "R P F"]) -> Float[Array, "R P F"]:
    """Each feature with mean 0 and variance 1 over a segment's samples, without parameters; eps 1e-5."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.square(centred).mean(1, keepdims=True) + 1e-5)).astype(x.dtype)


class Block(nn.Module):
    """x + attention(norm x), then x + W_out (gelu(W_gate norm x) · W_in norm x), the body of a scan."""

    heads: int
    hidden: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], valid: Bool[Array, "B N"], number: Int[Array, "1 N"], train: bool
    ) -> tuple[Float[Array, "B N D"], None]:
        dim = x.shape[-1]
        width = dim // self.heads
        drop = nn.Dropout(self.dropout, deterministic=not train)

        def linear(features: int, axes: tuple[str, str], name: str) -> nn.Dense:
            bias = like_torch_bias(dim if axes[0] == "embed" else self.hidden)
            return dense(features, axes, bias=True, init=LIKE_TORCH, bias_init=bias, dtype=self.dtype, name=name)

        normal = norm("rms", epsilon=1e-8, dtype=self.dtype, name="attention_norm")(x)
        into = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", (0,), (1, 2))
        query, key, value = (
            split_heads(dim, self.heads, width, bias=True, init=into, dtype=self.dtype, name=name)(normal)
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(
            rotate(query, number), rotate(key, number), value, mask=valid[:, None, None, :]
        )
        out_of = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", (0, 1), (2,))
        out = merge_heads(self.heads, width, dim, bias=True, init=out_of, dtype=self.dtype, name="out")
        x = x + drop(out(mixed))
        normal = norm("rms", epsilon=1e-8, dtype=self.dtype, name="mlp_norm")(x)
        gate = nn.gelu(linear(self.hidden, ("embed", "mlp"), "mlp_gate")(normal), approximate=False)
        hidden = gate * linear(self.hidden, ("embed", "mlp"), "mlp_in")(normal)
        return x + drop(linear(dim, ("mlp", "embed"), "mlp_out")(hidden)), None


VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "barista_tiny": (
        {"segment": 64, "rate_hz": 256.0, "depth": 3, "dim": 32, "hidden": 64},
        53_672,
        "invariances: tests/encoders/test_barista.py",
    ),
    "barista_base": ({}, 869_800, "counts: those of the published checkpoints less 96 rates of rotation"),
    "barista_parcels": (
        {"regions": 121, "region_of": (0,)},
        839_144,
        "counts: those of the published checkpoints less 96 rates of rotation",
    ),
    "barista_lobes": ({"regions": 21, "region_of": (0,)}, 832_744, "counts: the same with another table"),
}
"""Options, parameters (without mask token and head), evidence. tiny is ours, for 256 Hz. Parcels and lobes want a row
for each channel in `region_of`."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        Barista,
        _options,
        Card(
            title=f"BaRISTA, {_parameters / 1e3:.0f} k parameters",
            paper="BaRISTA. NeurIPS 2025, arXiv 2512.12135",
            code="github.com/ShanechiLab/BaRISTA (read for facts: not for commercial use)",
            licence="Apache-2.0, ours",
            inputs=f"sEEG or ECoG [B, C, A·{_options.get('segment', 512)}] at {_options.get('rate_hz', 2048.0):g} Hz; "
            + ("a region for each channel" if "regions" in _options else "positions (m)"),
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
