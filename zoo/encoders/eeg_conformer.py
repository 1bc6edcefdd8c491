"""EEG Conformer: ShallowFBCSPNet's filters and means over time, then a small transformer over what is left of time.

Source: Song, Zheng, Liu and Gao, "EEG Conformer: Convolutional Transformer for EEG Decoding and Visualization", IEEE
TNSRE 31, 2023, §III; what the paper leaves open from the facts of the official code (github.com/eeyhsong/EEG-Conformer,
GPL-3.0; none of it is used here) and from braindecode 1.8.1 (BSD-3).

Input: EEG of 22 electrodes at 250 Hz, 4 s, band-passed 4–40 Hz, standardised by the training set's mean and deviation.

The official code divides scores by √D of all features, the paper's equation 2 and braindecode by √(D / heads):
`scores="model"` (the variant `eeg_conformer_official`) and "head" (`eeg_conformer_base`). Nothing else differs.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.encoders.windowed import Windowed, all_there
from zoo.errors import ZooError
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias, merge_heads, norm, split_heads
from zoo.layers.temporal_filters import TemporalSpatial, average_pool, batch_norm
from zoo.registry import Card, register
from zoo.types import AnyArray, Array, Encoded, Sensors
from zoo.weights.keys import Ignore, Key, Rule

EPSILON = 1e-5
SCORES = ("head", "model")
HIDDEN = (256, 32)
"""Features of the classifier's two hidden layers."""


class EEGConformer(Windowed):
    """EEG Conformer; tokens are the transformer's output, pooled all of that, times by features.

    dim, width       D, also how many filters over time; their samples
    pool, stride     samples of a mean, and between two
    depth, heads     of the transformer
    dropout          of the means, of attention, of both residual branches and within the second
    scores           head: divided by √(D / heads); model: by √D
    dtype            compute dtype of the transformer; parameters, statistics and softmax stay float32
    """

    dim: int = 40
    width: int = 25
    pool: int = 75
    stride: int = 15
    depth: int = 6
    heads: int = 10
    dropout: float = 0.5
    scores: str = "head"
    dtype: DTypeLike = jnp.float32

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return self.dim * self._times()

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
        """signal [B, C, T] → tokens [B, A, D], A windows. A channel that is not valid is silence.

        Raises ZooError for another montage or T, for a mask, where T is too short and for an option out of range.
        """
        signal = self.window(signal, sensors, mask)
        self.refuse_unless_positive(self._times())
        if self.scores not in SCORES or self.dim % self.heads:
            raise ZooError(
                f"EEGConformer wants scores of {SCORES} and dim divisible by heads: got {self.scores!r}, "
                f"{self.dim} and {self.heads}"
            )
        first = TemporalSpatial(
            self.dim,
            self.width,
            self.dim,
            True,
            # One filter reads one channel: its kernel's fan-in is its first axis, that of the sums their first two.
            LIKE_TORCH,
            nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", (0, 1), (2,)),
            (like_torch_bias(self.width), like_torch_bias(self.count * self.dim)),
            name="first",
        )
        x = nn.elu(batch_norm(train, EPSILON, name="norm")(first(signal)))
        x = nn.Dropout(self.dropout, deterministic=not train)(average_pool(x, self.pool, self.stride))
        x = torch_dense(self.dim, (None, "embed"), self.dim, name="project")(x)
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.heads, self.dropout if train else 0.0, self.scores, self.dtype, name="blocks")
        tokens = blocks(x.astype(self.dtype), None)[0].astype(jnp.float32)
        return all_there(tokens, tokens.reshape(tokens.shape[0], -1))

    @nn.nowrap
    def head(self, classes: int) -> nn.Module:
        """A perceptron of two hidden layers."""
        return ConformerHead(classes)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two.

        As published: filters first, on every channel.
        """
        filters = (samples - self.width + 1) * channels * self.dim * (self.width + self.dim)
        tokens = (samples - self.width + 1 - self.pool) // self.stride + 1
        return 2.0 * (filters + tokens * self.dim**2 + self.depth * tokens * (12 * self.dim**2 + 2 * tokens * self.dim))

    @nn.nowrap
    def _times(self) -> int:
        """Windows."""
        return (self.samples - self.width + 1 - self.pool) // self.stride + 1


class Block(nn.Module):
    """One pre-norm layer, the body of a scan."""

    heads: int
    dropout: float
    scores: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B A D"], _: None) -> tuple[Float[Array, "B A D"], None]:
        dim = x.shape[-1]

        def dropped(x: Array) -> Array:
            return nn.Dropout(self.dropout, deterministic=self.dropout == 0)(x)

        normed = norm("layer", epsilon=EPSILON, dtype=self.dtype, name="attention_norm")(x)
        x = x + dropped(self._attention(normed, dropped))
        hidden = torch_dense(4 * dim, ("embed", "mlp"), dim, self.dtype, "mlp_in")(
            norm("layer", epsilon=EPSILON, dtype=self.dtype, name="mlp_norm")(x)
        )
        hidden = dropped(nn.gelu(hidden, approximate=False))
        return x + dropped(torch_dense(dim, ("mlp", "embed"), 4 * dim, self.dtype, "mlp_out")(hidden)), None

    def _attention(self, x: Array, dropped: Any) -> Array:
        dim = x.shape[-1]
        width = dim // self.heads
        bias = like_torch_bias(dim)

        def project(name: str) -> Array:
            init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", (0,), (1, 2))
            return split_heads(
                dim, self.heads, width, bias=True, init=init, bias_init=bias, dtype=self.dtype, name=name
            )(x)

        scores = jnp.einsum("bqhk,bshk->bhqs", project("query"), project("key")).astype(jnp.float32)
        scores /= (width if self.scores == "head" else dim) ** 0.5
        weights = dropped(jax.nn.softmax(scores)).astype(self.dtype)
        mixed = jnp.einsum("bhqs,bshk->bqhk", weights, project("value"))
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", (0, 1), (2,))
        return merge_heads(self.heads, width, dim, bias=True, init=init, bias_init=bias, dtype=self.dtype, name="out")(
            mixed
        )


class ConformerHead(nn.Module):
    """[B, A · D] → 256 → 32 → [B, classes], with ELU; dropout .5 and .3."""

    classes: int

    @nn.compact
    def __call__(self, pooled: Float[AnyArray, "B F"], *, train: bool = False) -> Float[Array, "B K"]:
        x = jnp.asarray(pooled, jnp.float32)
        for layer, (features, rate) in enumerate(zip(HIDDEN, (0.5, 0.3), strict=True)):
            x = nn.elu(torch_dense(features, (None, None), x.shape[-1], name=f"hidden{layer}")(x))
            x = nn.Dropout(rate, deterministic=not train)(x)
        return torch_dense(self.classes, (None, None), x.shape[-1], name="classes")(x)


def torch_dense(
    features: int, axes: tuple[str | None, str | None], inputs: int, dtype: DTypeLike = jnp.float32, name: str = ""
) -> nn.Dense:
    """A linear map of `inputs` that begins as PyTorch's does."""
    return dense(features, axes, bias=True, init=LIKE_TORCH, bias_init=like_torch_bias(inputs), dtype=dtype, name=name)


def _keys(embed: str, blocks: str) -> tuple[Rule, ...]:
    """The map of either code: what it calls its convolutions and its layers."""
    first, second = blocks + ".{l}.0.fn.", blocks + ".{l}.1.fn."
    norms = ((first, "attention_norm"), (second, "mlp_norm"))
    projections = (("queries", "query"), ("keys", "key"), ("values", "value"))
    return (
        Key(f"{embed}.shallownet.0.weight", "params/first/temporal", "i 1 1 w -> w i"),
        Key(f"{embed}.shallownet.0.bias", "params/first/temporal_bias"),
        Key(f"{embed}.shallownet.1.weight", "params/first/spatial", "o i c 1 -> c i o"),
        Key(f"{embed}.shallownet.1.bias", "params/first/spatial_bias"),
        Key(f"{embed}.shallownet.2.weight", "params/norm/scale"),
        Key(f"{embed}.shallownet.2.bias", "params/norm/bias"),
        Key(f"{embed}.shallownet.2.running_mean", "batch_stats/norm/mean"),
        Key(f"{embed}.shallownet.2.running_var", "batch_stats/norm/var"),
        Ignore(f"{embed}.shallownet.2.num_batches_tracked", "a counter"),
        Key(f"{embed}.projection.0.weight", "params/project/kernel", "o i 1 1 -> i o"),
        Key(f"{embed}.projection.0.bias", "params/project/bias"),
        *(Key(f"{at}0.weight", f"params/blocks/{ours}/scale[{{l}}]") for at, ours in norms),
        *(Key(f"{at}0.bias", f"params/blocks/{ours}/bias[{{l}}]") for at, ours in norms),
        *(
            Key(f"{first}1.{theirs}.weight", f"params/blocks/{ours}/kernel[{{l}}]", "(h k) d -> d h k")
            for theirs, ours in projections
        ),
        *(
            Key(f"{first}1.{theirs}.bias", f"params/blocks/{ours}/bias[{{l}}]", "(h k) -> h k")
            for theirs, ours in projections
        ),
        Key(f"{first}1.projection.weight", "params/blocks/out/kernel[{l}]", "d (h k) -> h k d"),
        Key(f"{first}1.projection.bias", "params/blocks/out/bias[{l}]"),
        Key(f"{second}1.0.weight", "params/blocks/mlp_in/kernel[{l}]", "o i -> i o"),
        Key(f"{second}1.0.bias", "params/blocks/mlp_in/bias[{l}]"),
        Key(f"{second}1.3.weight", "params/blocks/mlp_out/kernel[{l}]", "o i -> i o"),
        Key(f"{second}1.3.bias", "params/blocks/mlp_out/bias[{l}]"),
    )


def _head_keys(*layers: str) -> tuple[Rule, ...]:
    rules: list[Rule] = []
    for theirs, ours in zip(layers, ("hidden0", "hidden1", "classes"), strict=True):
        rules += [
            Key(f"{theirs}.weight", f"params/{ours}/kernel", "o i -> i o"),
            Key(f"{theirs}.bias", f"params/{ours}/bias"),
        ]
    return tuple(rules)


KEYS = _keys("patch_embedding", "transformer")
HEAD_KEYS = _head_keys("fc.fc.0", "fc.fc.3", "final_layer")
"""braindecode's EEGConformer, and its classifier."""

_UNREAD = "a second classifier that the code never reads"
OFFICIAL_KEYS = _keys("0", "1")
OFFICIAL_HEAD_KEYS = (
    *_head_keys("2.fc.0", "2.fc.3", "2.fc.6"),
    *(Ignore(f"2.clshead.{layer}.{part}", _UNREAD) for layer in (1, 2) for part in ("weight", "bias")),
)
"""The authors' code's, and its classifier."""

VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "eeg_conformer_tiny": (
        {"channels": 8, "samples": 64, "dim": 16, "width": 9, "pool": 16, "stride": 8, "depth": 2, "heads": 4},
        9_088,
        "parity of its layers",
    ),
    "eeg_conformer_official": (
        {"scores": "model"},
        156_320,
        "parity: tokens and logits within 2e-6 (relative) of the authors' code, random weights",
    ),
    "eeg_conformer_base": ({}, 156_320, "parity: tokens and logits within 1e-6 (relative) of braindecode's"),
}
"""Options, parameters without the classifier, evidence. tiny is ours."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        EEGConformer,
        _options,
        Card(
            title=f"EEG Conformer, {_parameters:,} parameters without its classifier",
            paper="Song et al. EEG Conformer: Convolutional Transformer for EEG Decoding and Visualization. IEEE TNSRE "
            "31, 2023",
            code="github.com/eeyhsong/EEG-Conformer, github.com/braindecode/braindecode",
            licence="GPL-3.0 (facts only), BSD-3-Clause",
            inputs="EEG [B, C, T] of one montage and window length, in the paper 250 Hz, 4–40 Hz, standardised",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
