"""GLIM's EEG encoder: ten seconds of reading as 96 vectors that a language model may read on.

Source: Liu et al., "Learning Interpretable Representations Leads to Semantically Faithful EEG-to-Text Generation",
2025, and facts of the authors' code (github.com/justin-xzliu/GLIM, CC BY-NC-SA: none of it is here). What aligns the
vectors with text, and the language model's part, are in `zoo.objectives.glim`.

Input: EEG of ZuCo, 128 channels of which it has 104 or 105 (the others are zero), 1280 samples, zeros after a sentence
that is shorter. Every sample is a token whose features are the channels.

A prompt tells the task, the dataset and the person, each by a row of a table whose row 0 is "unknown". As published the
last two are always unknown (`drop`), so the task alone acts.

Where this differs from the authors' code: padding is told by the zeros that a window ends with, not by a mask beside
it; channels that are not valid are zeros; `pooled` is the mean of the 96 vectors, where the code has only the aligned
one.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import blank
from zoo.encoders.windowed import OneMontage
from zoo.errors import ZooError
from zoo.layers.multi_head import MultiHead, multi_head_flops
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias, norm, partitioned
from zoo.layers.residual import REMAT
from zoo.registry import Card, register
from zoo.types import AnyArray, Array, Encoded, Sensors
from zoo.weights.keys import Ignore, Key, Rule

PROMPTS = (3, 3, 31)
"""Rows for tasks (unknown, natural reading, task-specific reading), datasets and people."""


class GLIM(OneMontage):
    """The encoder.

    channels  names of the electrodes, or how many; the features of the first layers
    samples   T of its windows
    rate      sampling rate in Hz
    dim       features of the vectors
    queries   how many vectors a window becomes
    depth     layers over samples, and again over vectors
    heads     attention heads
    mlp_ratio width of the MLPs, in features
    drop      probability, in training, that task, dataset and person are unknown; at 1 they are in use, too
    remat     "none", "full" (recompute all) or "dots" (keep matmul outputs)
    dtype     compute dtype; parameters, statistics and softmax stay float32
    """

    channels: int | tuple[str, ...] = 128
    samples: int = 1280
    rate: float = 128.0
    dim: int = 256
    queries: int = 96
    depth: int = 6
    heads: int = 8
    mlp_ratio: int = 4
    drop: tuple[float, float, float] = (0.0, 1.0, 1.0)
    remat: str = "none"
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
        prompt: Int[AnyArray, "B 3"] | None = None,
        train: bool = False,
    ) -> Encoded:
        """signal [B, C, T] → Encoded, N = `queries` tokens.

        prompt: rows of task, dataset and person; all unknown unless given. Raises ZooError for a mask and for windows
        of another length.
        """
        if mask is not None:
            raise ZooError("GLIM hides no tokens: it takes no mask")
        signal = self.present(signal, sensors)
        count, channels, samples = signal.shape
        if samples != self.samples:
            raise ZooError(f"GLIM wants windows of {self.samples} samples, got {samples}")
        if self.remat not in REMAT:
            raise ZooError(f"GLIM remat: wanted one of {sorted(REMAT)}, got {self.remat!r}")
        told = self._told(jnp.zeros((count, 3), jnp.int32) if prompt is None else jnp.asarray(prompt), channels, train)
        x = (signal.swapaxes(1, 2) + positions(samples, channels)).astype(self.dtype)
        there = before_the_end(signal)

        def stack(layer: Any, name: str) -> Any:
            if self.remat != "none":
                layer = nn.remat(layer, prevent_cse=False, policy=REMAT[self.remat])
            return nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.depth,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(self.heads, self.mlp_ratio, self.dtype, name=name)

        x = stack(SampleLayer, "samples")(x, (there, told))[0]
        x = _linear(self.dim, channels, ("embed", None), self.dtype, "widen")(x)
        x = norm("layer", dtype=self.dtype, name="sample_norm")(x)
        init = partitioned(nn.initializers.normal(1.0), None, "embed")
        vectors = self.param("embed_queries", init, (self.queries, self.dim)).astype(self.dtype)
        vectors = jnp.broadcast_to(vectors, (count, self.queries, self.dim))
        vectors = stack(QueryLayer, "queries")(vectors, (x, there))[0]
        tokens = norm("layer", name="norm")(vectors.astype(jnp.float32))
        return Encoded(tokens=tokens, pooled=tokens.mean(1), valid=jnp.ones(tokens.shape[:2], bool))

    def _told(self, prompt: Int[Array, "B 3"], channels: int, train: bool) -> Float[Array, "B F"]:
        """The weighed sum of the rows."""
        total = sum(PROMPTS)
        weight = self.param(
            "prompt_weight", partitioned(lambda _, shape: jnp.array(PROMPTS, jnp.float32) / total, None), (3,)
        )
        told = jnp.zeros((prompt.shape[0], channels))
        for place, (name, rows) in enumerate(zip(("task", "dataset", "person"), PROMPTS, strict=True)):
            row, rate = prompt[:, place], self.drop[place]
            if rate == 1.0:
                row = jnp.zeros_like(row)
            elif train and rate:
                row = jnp.where(jax.random.uniform(self.make_rng("dropout"), row.shape) < rate, 0, row)
            init = partitioned(nn.initializers.normal(0.02), None, None)
            table = nn.Embed(rows, channels, embedding_init=init, name=f"embed_{name}")
            told = told + weight[place] * table(row)
        return told

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls, a multiply-add counting two."""
        over_samples = multi_head_flops(samples, samples, channels, channels, channels)
        over_samples += 4.0 * samples * self.mlp_ratio * channels**2 + 2.0 * channels * (6 * channels + 2 * samples)
        over_queries = multi_head_flops(self.queries, self.queries, self.dim, self.dim, self.dim)
        over_queries += multi_head_flops(self.queries, samples, self.dim, self.dim, self.dim)
        over_queries += 4.0 * self.queries * self.mlp_ratio * self.dim**2
        return self.depth * (over_samples + over_queries) + 2.0 * samples * channels * self.dim

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """One window."""
        return blank(self.channels, self.samples)


class SampleLayer(nn.Module):
    """A layer over samples that is scaled, shifted and let through as it is told; it begins as nothing (adaLN-zero)."""

    heads: int
    mlp_ratio: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T F"], given: tuple[Bool[Array, "B T"], Float[Array, "B F"]]
    ) -> tuple[Float[Array, "B T F"], None]:
        there, told = given
        samples, dim = x.shape[1:]
        told = nn.silu(told)

        def ruled(name: str, features: int) -> Array:
            return dense(features, (None, None), bias=True, init=nn.initializers.zeros, name=name)(told)

        def normed(x: Array, shift: Array, scale: Array) -> Array:
            plain = nn.LayerNorm(epsilon=1e-6, use_scale=False, use_bias=False, dtype=self.dtype)(x)
            return (plain * (1 + scale[:, None]) + shift[:, None]).astype(self.dtype)

        scale, shift = jnp.split(ruled("rule_samples", 2 * samples), 2, axis=-1)
        x = (x * (1 + scale[..., None]) + shift[..., None]).astype(self.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(ruled("rule", 6 * dim), 6, axis=-1)
        normal = normed(x, shift1, scale1)
        attended = MultiHead(self.heads, dtype=self.dtype, name="attention")(normal, normal, valid=there)
        x = x + (gate1[:, None] * attended).astype(self.dtype)
        made = _mlp(normed(x, shift2, scale2), self.mlp_ratio, self.dtype)
        return x + (gate2[:, None] * made).astype(self.dtype), None


class QueryLayer(nn.Module):
    """A layer over vectors: each sees itself and those before it, then all samples that are there."""

    heads: int
    mlp_ratio: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], given: tuple[Float[Array, "B T D"], Bool[Array, "B T"]]
    ) -> tuple[Float[Array, "B N D"], None]:
        samples, there = given

        def normed(name: str, x: Array) -> Array:
            return norm("layer", dtype=self.dtype, name=name)(x)

        normal = normed("attention_norm", x)
        x = x + MultiHead(self.heads, dtype=self.dtype, name="attention")(normal, normal, causal=True)
        across = MultiHead(self.heads, dtype=self.dtype, name="across")
        x = x + across(normed("across_norm", x), samples, valid=there)
        return x + _mlp(normed("mlp_norm", x), self.mlp_ratio, self.dtype), None


def before_the_end(signal: Float[Array, "B C T"]) -> Bool[Array, "B T"]:
    """True up to the last sample that is not zero in all channels; everywhere where none is."""
    any_here = jnp.any(signal != 0, axis=1)
    there = jnp.flip(jnp.cumsum(jnp.flip(any_here, 1), axis=1), 1) > 0
    return there | ~there.any(1, keepdims=True)


def positions(count: int, dim: int) -> Float[np.ndarray, "T F"]:
    """Sines, then cosines, of t / 10000^(2i / F)."""
    angle = np.arange(count)[:, None] / 1e4 ** (np.arange(dim // 2) / (dim / 2))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def _mlp(x: Array, ratio: int, dtype: DTypeLike) -> Array:
    dim = x.shape[-1]
    hidden = nn.gelu(_linear(ratio * dim, dim, ("embed", "mlp"), dtype, "mlp_in")(x), approximate=True)
    return _linear(dim, ratio * dim, ("mlp", "embed"), dtype, "mlp_out")(hidden)


def _linear(features: int, inputs: int, axes: tuple[str | None, str | None], dtype: DTypeLike, name: str) -> nn.Dense:
    bias = like_torch_bias(inputs)
    return dense(features, axes, bias=True, init=LIKE_TORCH, bias_init=bias, dtype=dtype, name=name)


def attention_keys(source: str, target: str, index: str = "") -> tuple[Rule, ...]:
    """Of PyTorch's MultiheadAttention, whose queries, keys and values lie in one tensor."""
    parts = [
        key
        for part, name in enumerate(("query", "key", "value"))
        for key in (
            Key(f"{source}.in_proj_weight", f"params/{target}/{name}/kernel{index}", "(h k) d -> d h k", (part, 3)),
            Key(f"{source}.in_proj_bias", f"params/{target}/{name}/bias{index}", "(h k) -> h k", (part, 3)),
        )
    ]
    return (
        *parts,
        Key(f"{source}.out_proj.weight", f"params/{target}/out/kernel{index}", "d (h k) -> h k d"),
        Key(f"{source}.out_proj.bias", f"params/{target}/out/bias{index}"),
    )


def _linear_keys(source: str, target: str) -> tuple[Rule, ...]:
    kernel, bias = ("kernel[{l}]", "bias[{l}]") if "{l}" in source else ("kernel", "bias")
    return (
        Key(f"{source}.weight", f"params/{target}/{kernel}", "o i -> i o"),
        Key(f"{source}.bias", f"params/{target}/{bias}"),
    )


def _norm_keys(source: str, target: str) -> tuple[Rule, ...]:
    index = "[{l}]" if "{l}" in source else ""
    return (
        Key(f"{source}.weight", f"params/{target}/scale{index}"),
        Key(f"{source}.bias", f"params/{target}/bias{index}"),
    )


_IN, _OUT = "eeg_encoder.in_blocks.{l}", "eeg_encoder.out_blocks.{l}"
KEYS: tuple[Rule, ...] = (
    Ignore("eeg_encoder.pos_embed", "sines and cosines, which are computed"),
    Key("p_embedder.sigma", "params/prompt_weight"),
    *(
        Key(f"p_embedder.embedders.{place}.weight", f"params/embed_{name}/embedding")
        for place, name in enumerate(("task", "dataset", "person"))
    ),
    *_linear_keys(f"{_IN}.t_adaLN.1", "samples/rule_samples"),
    *_linear_keys(f"{_IN}.adaLN.1", "samples/rule"),
    *attention_keys(f"{_IN}.attn", "samples/attention", "[{l}]"),
    *_linear_keys(f"{_IN}.mlp.fc1", "samples/mlp_in"),
    *_linear_keys(f"{_IN}.mlp.fc2", "samples/mlp_out"),
    *_linear_keys("eeg_encoder.x_proj", "widen"),
    *_norm_keys("eeg_encoder.norm1", "sample_norm"),
    Key("eeg_encoder.shared_queries", "params/embed_queries", "1 n d -> n d"),
    *_norm_keys(f"{_OUT}.norm1", "queries/attention_norm"),
    *attention_keys(f"{_OUT}.self_attn", "queries/attention", "[{l}]"),
    *_norm_keys(f"{_OUT}.norm2", "queries/across_norm"),
    *attention_keys(f"{_OUT}.cross_attn", "queries/across", "[{l}]"),
    *_norm_keys(f"{_OUT}.norm3", "queries/mlp_norm"),
    *_linear_keys(f"{_OUT}.mlp.fc1", "queries/mlp_in"),
    *_linear_keys(f"{_OUT}.mlp.fc2", "queries/mlp_out"),
    *_norm_keys("eeg_encoder.norm2", "norm"),
)
"""The official encoder and prompt tables, without aligner and language model."""

VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "glim_tiny": (
        {"channels": 16, "samples": 128, "dim": 32, "queries": 8, "depth": 2, "heads": 4},
        53_907,
        "trained on a toy with a stand-in language model: retrieval, free generation, noise",
    ),
    "glim_base": ({}, 10_146_435, "counts of the paper; parity in small: vectors within 1e-5 of the authors' code"),
}
"""Options, parameters (encoder and prompt tables), evidence. base has the paper's sizes."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        GLIM,
        _options,
        Card(
            title=f"GLIM's EEG encoder, {_parameters / 1e6:.1f} M parameters",
            paper="Liu et al. Learning Interpretable Representations Leads to Semantically Faithful EEG-to-Text "
            "Generation. 2025",
            code="github.com/justin-xzliu/GLIM",
            licence="CC BY-NC-SA 4.0; facts only, no code taken",
            inputs="EEG [B, 128, 1280] of ZuCo, a channel that it lacks as zeros, zeros after the sentence",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
