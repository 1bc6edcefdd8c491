"""REVE: patches of any electrodes, known by where they are in space and time.

Source: El Ouahidi et al., "REVE: A Foundation Model for EEG", NeurIPS 2025, 2510.21585, section 3, and the official
code (github.com/elouayas/reve_eeg, MIT). The published weights are behind a form.

Input: EEG at 200 Hz, 0.5–99.5 Hz, standardised, clipped at 15 deviations; electrode positions in metres. Patches have
200 samples and begin every 180, so neighbours share 20: what a mask hides is partly seen beside it. What fills no patch
at the end of a window is left out.

A place is (x, y, z, t), t a tenth of the patch's number in the waves and the number itself beside them. All products of
`frequencies` waves of each axis, of which the first D/2 are kept, and a small map of the four numbers are added and
normalised.

Where this differs from the official code: patches that a mask hides and channels that are not valid are not attended
to, which is what leaving them out of the sequence gives; pooling is the published one by a learned query.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import Encoder, blank
from zoo.errors import ZooError
from zoo.layers.parameters import dense, merge_heads, norm, partitioned, split_heads
from zoo.layers.residual import REMAT
from zoo.registry import Card, register
from zoo.types import AnyArray, Array, Encoded, Sensors
from zoo.weights.keys import Ignore, Key, Rule

MARGIN, TENTH = 0.4, 0.1
INIT = nn.initializers.normal(0.02)


class REVE(Encoder):
    """The REVE encoder.

    dim, depth, heads  features, layers, attention heads of 64
    mlp_ratio          width of the gated MLP, in D
    patch, hop         samples of a patch, and from one to the next
    frequencies        of each axis of a place; their fourth power is at least D/2
    position_noise     metres: spread of what is added to positions in training, from the stream "dropout"
    remat              "none", "full" (recompute all) or "dots" (keep matmul outputs)
    dtype              compute dtype; positions, parameters, statistics and softmax stay float32
    """

    dim: int = 512
    depth: int = 22
    heads: int = 8
    mlp_ratio: float = 2.66
    patch: int = 200
    hop: int = 180
    frequencies: int = 4
    position_noise: float = 0.0025
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)

    @property
    def sampling_rate(self) -> float:
        """Hz of the published patches of a second; where `patch` is another, so is a second."""
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
        """signal [B, C, T], 200 Hz → Encoded, N = C·A tokens, A = (T − 200) // 180 + 1 a channel, channel-major.

        mask [B, C, A]: True where a patch is hidden, so that its token is not valid. A valid channel of unknown place
        makes its example NaN; `check_positions` says so before. Raises ZooError for windows of less than a patch, for a
        mask of another shape, and for options out of range.
        """
        signal = self.present(signal, sensors)
        batch, channels, samples = signal.shape
        count = self._patches(samples)
        if mask is not None and mask.shape != (batch, channels, count):
            raise ZooError(f"REVE wants a mask of shape {(batch, channels, count)}, got {mask.shape}")
        starts = self.hop * np.arange(count)
        patches = signal[..., starts[:, None] + np.arange(self.patch)]
        valid = jnp.broadcast_to(jnp.asarray(sensors.valid)[..., None], (batch, channels, count))
        if mask is not None:
            valid = valid & ~jnp.asarray(mask)
        valid = valid.reshape(batch, -1)

        x = self._linear(self.dim, "embed_patch", bias=True)(patches).reshape(batch, -1, self.dim)
        x = x + self._place(sensors, count, train).astype(x.dtype)
        x = nn.with_logical_constraint(x, ("batch", "tokens", None))
        layer = nn.remat(Layer, policy=REMAT[self.remat], prevent_cse=False) if self.remat != "none" else Layer
        stack: Any = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        width, out = int(self.mlp_ratio * self.dim), 0.02 / (2 * self.depth) ** 0.5
        x = stack(self.heads, width, out, self.dtype, name="layers")(x, valid)[0].astype(jnp.float32)

        query = self.param("query", partitioned(nn.initializers.normal(1.0), "embed"), (self.dim,))
        scores = jnp.where(valid, x @ query * self.dim**-0.5, -1e30)
        pooled = jnp.einsum("bn,bnd->bd", jax.nn.softmax(scores, axis=-1), x)
        return Encoded(x, pooled, valid)

    @nn.nowrap
    def head(self, classes: int) -> nn.Module:
        """Layer norm and a linear map."""
        return NormHead(classes)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls, a multiply-add counting two."""
        tokens, inner = channels * self._patches(samples), 64 * self.heads
        layer = 4 * self.dim * inner + 3 * self.dim * int(self.mlp_ratio * self.dim) + 2 * tokens * inner
        return 2.0 * tokens * (self.dim * (self.patch + 6) + self.depth * layer)

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """One patch of one electrode."""
        return blank(("CZ",), self.patch)

    @nn.nowrap
    def check_positions(self, sensors: Sensors) -> None:
        """Raises ZooError for sensors, on the host, with valid channels of unknown place."""
        unknown = np.isnan(np.asarray(sensors.position)).any(-1) & np.asarray(sensors.valid)
        if unknown.any():
            raise ZooError(f"REVE wants positions: got {int(unknown.any(0).sum())} channels of unknown place")

    def _place(self, sensors: Sensors, count: int, train: bool) -> Float[Array, "B N D"]:
        position = jnp.asarray(sensors.position, jnp.float32)
        position = jnp.where(jnp.asarray(sensors.valid)[..., None], position, 0)
        if train and self.position_noise:
            noise = jax.random.normal(self.make_rng("dropout"), position.shape)
            position = position + self.position_noise * noise
        batch, channels = position.shape[:2]
        space = jnp.broadcast_to(position[:, :, None], (batch, channels, count, 3))
        time = jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32)[:, None], (batch, channels, count, 1))
        place = jnp.concatenate([space, time], axis=-1).reshape(batch, -1, 4)

        steps = np.stack(np.meshgrid(*[np.arange(self.frequencies)] * 4, indexing="ij"), -1).reshape(-1, 4)
        turns = 2 * np.pi / (1 + 2 * MARGIN) * steps[: self.dim // 2].T
        scaled = place * jnp.array([1, 1, 1, TENTH]) + MARGIN
        phase = jnp.einsum("bnk,kf->bnf", scaled, turns.astype(np.float32), precision="highest")
        waves = jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)
        small = nn.gelu(self._linear(self.dim, "embed_place", bias=False)(place), approximate=False)
        small = norm("layer", epsilon=1e-5, dtype=self.dtype, name="place_norm")(small)
        return norm("layer", epsilon=1e-5, dtype=self.dtype, name="embed_norm")(waves + small)

    @nn.nowrap
    def _linear(self, features: int, name: str, bias: bool) -> nn.Dense:
        return dense(features, (None, "embed"), bias=bias, init=INIT, dtype=self.dtype, name=name)

    @nn.nowrap
    def _patches(self, samples: int) -> int:
        if self.dim % 2 or self.frequencies**4 < self.dim // 2 or self.remat not in REMAT:
            raise ZooError(
                f"REVE wants an even dim of at most 2 · frequencies⁴, and remat one of {sorted(REMAT)}: got "
                f"{self.dim}, {self.frequencies}, {self.remat!r}"
            )
        if samples < self.patch:
            raise ZooError(f"REVE wants patches of {self.patch} samples, got {samples} samples")
        return (samples - self.patch) // self.hop + 1


class Layer(nn.Module):
    """x + attention(norm x), then x + gated MLP(norm x), nothing with a bias; the body of a scan over layers."""

    heads: int
    width: int
    out_std: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], valid: Bool[Array, "B N"]) -> tuple[Float[Array, "B N D"], None]:
        dim, out_init = x.shape[-1], nn.initializers.normal(self.out_std)
        normal = norm("rms", dtype=self.dtype, name="attention_norm")(x)
        query, key, value = (
            split_heads(dim, self.heads, 64, init=INIT, dtype=self.dtype, name=name)(normal)
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(query, key, value, mask=valid[:, None, None, :])
        x = x + merge_heads(self.heads, 64, dim, init=out_init, dtype=self.dtype, name="out")(mixed)
        normal = norm("rms", dtype=self.dtype, name="mlp_norm")(x)
        content, gate = (
            dense(self.width, ("embed", "mlp"), init=INIT, dtype=self.dtype, name=name)(normal)
            for name in ("mlp_in", "mlp_gate")
        )
        hidden = nn.gelu(gate, approximate=False) * content
        return x + dense(dim, ("mlp", "embed"), init=out_init, dtype=self.dtype, name="mlp_out")(hidden), None


class NormHead(nn.Module):
    """[B, D] → [B, classes]: layer norm, then a linear map."""

    classes: int

    @nn.compact
    def __call__(self, pooled: Float[AnyArray, "B D"], *, train: bool = False) -> Float[Array, "B K"]:
        x = norm("layer", epsilon=1e-5, axis=None, name="norm")(jnp.asarray(pooled))
        return dense(self.classes, (None, None), bias=True, init=INIT, name="linear")(x)


_PARITY = "tokens, pooled vector and logits of braindecode within 1e-5 (relative), random weights"
VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "reve_mini": ({"dim": 64, "depth": 2, "heads": 2}, 144_512, "parity of its layers"),
    "reve_tiny": ({"dim": 200, "depth": 4, "heads": 4}, 2_139_600, "shapes: published parameter count"),
    "reve_small": ({"depth": 4}, 12_667_904, f"parity: {_PARITY}: tests/parity/test_reve_braindecode.py"),
    "reve_base": ({}, 69_189_632, "shapes: published parameter count; parity of reve_small"),
    "reve_large": (
        {"dim": 1216, "heads": 19, "frequencies": 5},
        389_978_496,
        "shapes: published parameter count; parity of reve_small",
    ),
}
"""Options, parameters (with the query of its pooling), evidence. mini is ours; the others are the paper's."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        REVE,
        _options,
        Card(
            title=f"REVE encoder, {_parameters / 1e6:.1f} M parameters",
            paper="El Ouahidi, Lys, Thölke et al. REVE: A Foundation Model for EEG - Adapting to Any Setup with "
            "Large-Scale Pretraining on 25,000 Subjects. NeurIPS 2025, arXiv 2510.21585",
            code="github.com/elouayas/reve_eeg",
            licence="MIT (code); weights on request",
            inputs="EEG [B, C, T] at 200 Hz, 0.5–99.5 Hz, standardised, ±15; positions in metres",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )

_LAYER = "transformer.layers.{l}."
KEYS: tuple[Rule, ...] = (
    Key("to_patch_embedding.0.weight", "params/embed_patch/kernel", "o i -> i o"),
    Key("to_patch_embedding.0.bias", "params/embed_patch/bias"),
    Key("mlp4d.0.weight", "params/embed_place/kernel", "o i -> i o"),
    Key("mlp4d.2.weight", "params/place_norm/scale"),
    Key("mlp4d.2.bias", "params/place_norm/bias"),
    Key("ln.weight", "params/embed_norm/scale"),
    Key("ln.bias", "params/embed_norm/bias"),
    Key("cls_query_token", "params/query", "1 1 d -> d"),
    Ignore("_position_bank.embedding", "places of electrodes, which come with a recording here"),
    Key(f"{_LAYER}0.norm.weight", "params/layers/attention_norm/scale[{l}]"),
    *(
        Key(f"{_LAYER}0.to_qkv.weight", f"params/layers/{name}/kernel[{{l}}]", "(h k) d -> d h k", part=(part, 3))
        for part, name in enumerate(("query", "key", "value"))
    ),
    Key(f"{_LAYER}0.to_out.weight", "params/layers/out/kernel[{l}]", "d (h k) -> h k d"),
    Key(f"{_LAYER}1.net.0.weight", "params/layers/mlp_norm/scale[{l}]"),
    Key(f"{_LAYER}1.net.1.weight", "params/layers/mlp_in/kernel[{l}]", "o i -> i o", part=(0, 2)),
    Key(f"{_LAYER}1.net.1.weight", "params/layers/mlp_gate/kernel[{l}]", "o i -> i o", part=(1, 2)),
    Key(f"{_LAYER}1.net.3.weight", "params/layers/mlp_out/kernel[{l}]", "o i -> i o"),
)
"""Of braindecode's REVE with attention pooling, which calls its parts as the official model does."""
HEAD_KEYS: tuple[Rule, ...] = (
    Key("final_layer.0.weight", "params/norm/scale"),
    Key("final_layer.0.bias", "params/norm/bias"),
    Key("final_layer.1.weight", "params/linear/kernel", "o i -> i o"),
    Key("final_layer.1.bias", "params/linear/bias"),
)
