"""BrainOmni: EEG and MEG of any sensors, as the quantised sources of BrainTokenizer, through space and time by turns.

Source: "BrainOmni: A Brain Foundation Model for Unified EEG and MEG Signals", NeurIPS 2025, 2505.18185, section 3.3,
and the official code (github.com/OpenTSLab/BrainOmni, MIT).

Input: that of `zoo.tokenizers.brainomni`, windows of 30 s in pretraining, any of 2 s or more. The tokenizer is frozen,
in pretraining and after it (collection `tokenizer`); its windows overlap by a quarter. A token is one of its 16 sources
at one of 8 frames a window: the sum of the codes' vectors and the source's own, which does not learn either.

As features all blocks but the last are used, and tokens brought to length one: the last serves the prediction of codes
only, so it is there, with the token that hides, only where `mask` is given. Pretraining is
`zoo.objectives.masked_codes` with `symmetric=False`; of the hidden tokens a fifth become tokens of any place in the
batch in training.

Where this differs from the official code: attention drops weights in training only (there, in evaluation too). Rotary
rates fall over all heads of a block, not in each, as there: the first head has the fastest.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.encoders.tokenized import TokenizerEncoder
from zoo.errors import ZooError
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias, merge_heads, norm, partitioned, split_heads
from zoo.layers.post_norm import NORMAL
from zoo.layers.residual import REMAT
from zoo.registry import Card, register
from zoo.sensors import KINDS
from zoo.types import AnyArray, Array, Encoded, Sensors
from zoo.weights.keys import Ignore, Key, Rule

ANY = 0.2
"""Share of hidden tokens that another token of the batch stands in for, in training."""


class BrainOmni(TokenizerEncoder):
    """The encoder. Tokens are source by source, frame by frame; pooled is each source's mean over time, side by side.

    depth, dim, heads   blocks (the last for predicting codes alone), features, attention heads; half of the heads see
                        the sources of a frame, the other half the frames of a source
    dropout             of attention weights and after the MLP
    remat               "none", "full" (recompute all) or "dots" (keep matmul outputs)
    dtype               compute dtype; parameters and softmax stay float32
    tokenizer, tokenizer_options
                        see `zoo.encoders.tokenized`
    """

    tokenizer: str = "braintokenizer_base"
    overlap: float = 0.25
    depth: int = 12
    dim: int = 512
    heads: int = 16
    dropout: float = 0.1
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    TAKES: ClassVar[tuple[str, ...]] = KINDS[:3]

    @property
    def features(self) -> int:
        """Of all sources together."""
        tokenizer: Any = self.made_tokenizer()
        return tokenizer.latents * self.dim

    @nn.nowrap
    def made_tokenizer(self) -> Any:
        """The tokenizer, its windows overlapping."""
        return super().made_tokenizer().clone(overlap=self.overlap, parent=None)

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
        """signal [B, C, T], T of 512 or more → Encoded, N = sources · frames tokens.

        mask [B, N] or [B, sources, frames] hides tokens, and tokens are then what the last block makes of all, not of
        length one. `train` draws from the stream "dropout". Raises ZooError for windows and masks of other shapes, and
        for options that do not fit.
        """
        self._check_options()
        signal = self.present(signal, sensors)
        rows, frames = self.grid(*signal.shape[1:])
        quantized, neurons = self.from_tokenizer(signal, sensors, _sources)
        x = quantized.reshape(signal.shape[0], rows, frames, -1)
        if mask is not None:
            hidden = self.check_mask(jnp.asarray(mask), (rows, frames)).reshape(*x.shape[:3], 1)
            token = self.param("embed_mask", partitioned(nn.initializers.normal(1.0), None), x.shape[-1:])
            x = jnp.where(hidden, _stand_in(self, x, token) if train else token, x)
        x = (x + neurons[:, None]).astype(self.dtype)
        if x.shape[-1] != self.dim:
            x = dense(self.dim, (None, "embed"), bias=True, init=NORMAL, dtype=self.dtype, name="project")(x)
        block = Block if self.remat == "none" else nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False)
        options = (self.heads, self.dropout if train else 0.0, self.dtype)
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth - 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(*options, name="blocks")
        x, _ = stack(x, None)
        normal = x.astype(jnp.float32)
        normal = normal / jnp.maximum(jnp.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)
        tokens = normal if mask is None else Block(*options, name="last")(x, None)[0].astype(jnp.float32)
        valid = self.made_tokenizer().token_valid(sensors, signal.shape[-1])
        pooled = normal.mean(2).reshape(signal.shape[0], -1)
        return Encoded(tokens.reshape(*valid.shape, self.dim), pooled, valid)

    @nn.nowrap
    def head(self, classes: int) -> nn.Module:
        """Dropout, linear, SELU, linear."""
        return BrainOmniHead(classes, self.dim)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass, the tokenizer's with its decoder among them."""
        rows, frames = self.grid(channels, samples)
        tokenizer, half = self.made_tokenizer(), self.dim // 2
        token = 2 * 4 * half**2 + 2 * half * (rows + frames) + 8 * self.dim**2
        project = tokenizer.dim * self.dim if tokenizer.dim != self.dim else 0
        own = 2.0 * rows * frames * ((self.depth - 1) * token + project)
        return tokenizer.flops(channels, samples) + own

    def _check_options(self) -> None:
        if self.heads % 2 or self.dim % (2 * self.heads) or self.depth < 2:
            raise ZooError(
                "BrainOmni wants 2 or more blocks, an even number of heads, and dim a multiple of twice that: "
                f"got depth {self.depth}, heads {self.heads}, dim {self.dim}"
            )
        if self.remat not in REMAT:
            raise ZooError(f"BrainOmni remat must be one of {sorted(REMAT)}, got {self.remat!r}")


class Block(nn.Module):
    """x + [space, time], then x + mlp(norm x), the body of a scan over blocks.

    Of the normed features the second half goes among the sources of a frame and comes out first, the first half among
    the frames of a source and comes out second: so halves take turns.
    """

    heads: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B R F D"], _: None) -> tuple[Float[Array, "B R F D"], None]:
        dim = x.shape[-1]

        def linear(features: int, axes: tuple[str, str], name: str) -> nn.Dense:
            return dense(features, axes, bias=True, init=NORMAL, dtype=self.dtype, name=name)

        normal = norm("rms", dtype=self.dtype, name="attention_norm")(x)
        over_time, over_space = jnp.split(normal, 2, axis=-1)
        attention = (self.heads // 2, self.dropout, self.dtype)
        space = Attention(*attention, rotary=False, name="space")(jnp.swapaxes(over_space, 1, 2))
        time = Attention(*attention, rotary=True, name="time")(over_time)
        x = x + jnp.concatenate([jnp.swapaxes(space, 1, 2), time], axis=-1)
        hidden = jax.nn.selu(
            linear(4 * dim, ("embed", "mlp"), "mlp_in")(norm("rms", dtype=self.dtype, name="mlp_norm")(x))
        )
        out = linear(dim, ("mlp", "embed"), "mlp_out")(hidden)
        return x + nn.Dropout(self.dropout, deterministic=not self.dropout)(out), None


class Attention(nn.Module):
    """Softmax attention among the N tokens of each sequence [B, S, N, D]."""

    heads: int
    dropout: float
    dtype: DTypeLike
    rotary: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B S N D"]) -> Float[Array, "B S N D"]:
        dim = x.shape[-1]
        width = dim // self.heads
        query, key, value = (
            split_heads(dim, self.heads, width, bias=True, init=NORMAL, dtype=self.dtype, name=name)(x)
            for name in ("query", "key", "value")
        )
        if self.rotary:
            query, key = turned(query), turned(key)
        score = jnp.einsum("bsnhk,bsmhk->bshnm", query, key, preferred_element_type=jnp.float32) * width**-0.5
        weight = nn.Dropout(self.dropout, deterministic=not self.dropout)(jax.nn.softmax(score, axis=-1))
        mixed = jnp.einsum("bshnm,bsmhk->bsnhk", weight.astype(self.dtype), value)
        return merge_heads(self.heads, width, dim, bias=True, init=NORMAL, dtype=self.dtype, name="out")(mixed)


def turned(x: Float[Array, "B S N H K"]) -> Float[Array, "B S N H K"]:
    """Neighbouring features as pairs, turned by n · 10000^(−2i / (H·K)): pair i counts through all heads."""
    count, heads, width = x.shape[2:]
    pairs = heads * width // 2
    rate = 10_000.0 ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    angle = (jnp.arange(count, dtype=jnp.float32)[:, None] * rate).reshape(count, heads, width // 2)
    first, second = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    both = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return both.reshape(x.shape).astype(x.dtype)


def _sources(tokenizer: Any, signal: Array, sensors: Sensors) -> tuple[Float[Array, "B N D"], Float[Array, "R D"]]:
    """Sums of the vectors of each token's codes, and the vectors that the sources themselves are."""
    return tokenizer.quantizer.decode(tokenizer.encode(signal, sensors)), tokenizer.neurons


def _stand_in(module: nn.Module, x: Float[Array, "B R F D"], token: Float[Array, " D"]) -> Float[Array, "B R F D"]:
    """For every token the one that hides, or, for a fifth of them, one of any place in the batch."""
    flat = x.reshape(-1, x.shape[-1])
    among, whether = jax.random.split(module.make_rng("dropout"))
    others = jax.random.permutation(among, flat).reshape(x.shape)
    return jnp.where(jax.random.bernoulli(whether, ANY, (*x.shape[:3], 1)), others, token)


class BrainOmniHead(nn.Module):
    """[B, D] → [B, classes]: dropout, linear, SELU, linear."""

    classes: int
    hidden: int
    dropout: float = 0.1

    @nn.compact
    def __call__(self, pooled: Float[AnyArray, "B D"], *, train: bool = False) -> Float[Array, "B K"]:
        def linear(features: int, inputs: int, name: str) -> nn.Dense:
            bias = like_torch_bias(inputs)
            return dense(features, (None, None), bias=True, init=LIKE_TORCH, bias_init=bias, name=name)

        x = nn.Dropout(self.dropout, deterministic=not train)(jnp.asarray(pooled))
        x = jax.nn.selu(linear(self.hidden, x.shape[-1], "in")(x))
        return linear(self.classes, self.hidden, "out")(x)


def _linear(source: str, target: str, index: str = "") -> tuple[Rule, ...]:
    kernel, bias = (f"{target}/{name}{index}" for name in ("kernel", "bias"))
    return Key(f"{source}.weight", kernel, "o i -> i o"), Key(f"{source}.bias", bias)


def _heads(source: str, target: str, part: tuple[int, int], index: str = "") -> tuple[Rule, ...]:
    kernel, bias = (f"{target}/{name}{index}" for name in ("kernel", "bias"))
    return (
        Key(f"{source}.weight", kernel, "(h k) d -> d h k", part),
        Key(f"{source}.bias", bias, "(h k) -> h k", part),
    )


def _merged(source: str, target: str, index: str = "") -> tuple[Rule, ...]:
    kernel, bias = (f"{target}/{name}{index}" for name in ("kernel", "bias"))
    return Key(f"{source}.weight", kernel, "d (h k) -> h k d"), Key(f"{source}.bias", bias)


def _block(number: int, target: str, index: str = "") -> tuple[Rule, ...]:
    theirs = f"blocks.{number}."
    rules: list[Rule] = [
        Key(f"{theirs}pre_attn_norm.weight", f"{target}/attention_norm/scale{index}"),
        Key(f"{theirs}pre_ff_norm.weight", f"{target}/mlp_norm/scale{index}"),
        *_linear(f"{theirs}ff.layer.0", f"{target}/mlp_in", index),
        *_linear(f"{theirs}ff.layer.2", f"{target}/mlp_out", index),
        Ignore(f"{theirs}time_attn.rope_embedding_layer.freqs", "rates, computed here"),
        Ignore(f"{theirs}time_attn.rope_embedding_layer.rotate", "angles, computed here"),
    ]
    for source, ours in (("time_attn", "time"), ("spatial_attn", "space")):
        for part, name in enumerate(("query", "key", "value")):
            rules += _heads(f"{theirs}{source}.qkv", f"{target}/{ours}/{name}", (part, 3), index)
        rules += _merged(f"{theirs}{source}.proj", f"{target}/{ours}/out", index)
    return tuple(rules)


def _convolution(source: str, target: str, how: str = "o i t -> t i o") -> tuple[Rule, ...]:
    """Weight-normed; of a transposed one, as PyTorch has it, the norm is that of an input."""
    return (
        Key(f"{source}.weight_v", f"{target}/direction", how),
        Key(f"{source}.weight_g", f"{target}/length", "o 1 1 -> o"),
        Key(f"{source}.bias", f"{target}/bias"),
    )


def _seanet(source: str, target: str, units: tuple[int, ...], steps: tuple[int, ...], lstm: int) -> tuple[Rule, ...]:
    """The layers of an encoder or decoder: numbers of its residual units, of what changes the rate, of the LSTM."""
    rules: list[Rule] = [*_convolution(f"{source}.0.conv.conv", f"{target}/first")]
    rules += _convolution(f"{source}.12.conv.conv", f"{target}/last")
    up = "decoder" in target
    kind, change = ("convtr.convtr", "up") if up else ("conv.conv", "down")
    for stage, (unit, step) in enumerate(zip(units, steps, strict=True)):
        for name, ours in (("block.1", "in"), ("block.3", "out"), ("shortcut", "shortcut")):
            rules += _convolution(f"{source}.{unit}.{name}.conv.conv", f"{target}/unit{stage}/{ours}")
        how = "i o t -> t i o" if up else "o i t -> t i o"
        rules += _convolution(f"{source}.{step}.{kind}", f"{target}/{change}{stage}", how)
    for name, ours in (("weight_ih", "input"), ("weight_hh", "recurrent")):
        rules.append(Key(f"{source}.{lstm}.lstm.{name}_l{{l}}", f"{target}/lstm/{ours}[{{l}}]", "o i -> i o"))
        bias = name.replace("weight", "bias")
        rules.append(Key(f"{source}.{lstm}.lstm.{bias}_l{{l}}", f"{target}/lstm/{ours}_bias[{{l}}]"))
    return tuple(rules)


_T, _BOOK = "tokenizer/params/", "tokenizer/codebooks/quantizer/book/"
TOKENIZER_KEYS: tuple[Rule, ...] = (
    Key("tokenizer.sensor_embed.sensor_embedding_layer.weight", f"{_T}sensor_embedding/kind"),
    *_linear("tokenizer.sensor_embed.pos_embedding_layer.0", f"{_T}sensor_embedding/place_in"),
    *_linear("tokenizer.sensor_embed.pos_embedding_layer.2", f"{_T}sensor_embedding/place_out"),
    *_linear("tokenizer.sensor_embed.aggregate_mlp.layer.0", f"{_T}sensor_embedding/in"),
    *_linear("tokenizer.sensor_embed.aggregate_mlp.layer.2", f"{_T}sensor_embedding/out"),
    Key("tokenizer.sensor_embed.norm.weight", f"{_T}sensor_embedding/norm/scale"),
    Key("tokenizer.encoder.neuros", f"{_T}neurons"),
    *_seanet("tokenizer.encoder.seanet_encoder.model", f"{_T}encoder", (1, 4, 7), (3, 6, 9), 10),
    *_heads("tokenizer.encoder.k_proj", f"{_T}to_key", (0, 1)),
    *_heads("tokenizer.encoder.backwardsolution.v", f"{_T}to_value", (0, 1)),
    *_merged("tokenizer.encoder.backwardsolution.proj", f"{_T}to_latents"),
    *_heads("tokenizer.decoder.forwardsolution.kv", f"{_T}from_key", (0, 2)),
    *_heads("tokenizer.decoder.forwardsolution.kv", f"{_T}from_value", (1, 2)),
    *_merged("tokenizer.decoder.forwardsolution.proj", f"{_T}to_channels"),
    *_seanet("tokenizer.decoder.seanet_decoder.model", f"{_T}decoder", (4, 7, 10), (3, 6, 9), 1),
    Key("tokenizer.quantizer.rvq.layers.{l}._codebook.embed", f"{_BOOK}embedding[{{l}}]"),
    Key("tokenizer.quantizer.rvq.layers.{l}._codebook.embed_avg", f"{_BOOK}sums[{{l}}]"),
    Key("tokenizer.quantizer.rvq.layers.{l}._codebook.cluster_size", f"{_BOOK}usage[{{l}}]"),
    Key("tokenizer.quantizer.rvq.layers.{l}._codebook.inited", f"{_BOOK}ready[{{l}}]", "1 ->"),
)
"""Of the tokenizer in `BrainOmni.pt`."""


def keys(depth: int, projected: bool) -> tuple[Rule, ...]:
    """Of all of `BrainOmni.pt` but its `predict_head`, for variables made with a mask."""
    project = _linear("projection", "params/project") if projected else ()
    blocks = (rule for number in range(depth - 1) for rule in _block(number, "params/blocks", f"[{number}]"))
    last = _block(depth - 1, "params/last")
    return Key("mask_token", "params/embed_mask"), *project, *blocks, *last, *TOKENIZER_KEYS


KEYS: tuple[Rule, ...] = keys(12, projected=True)
"""Of base; tiny has no projection: `keys(12, projected=False)`."""
CODE_HEAD_KEYS: tuple[Rule, ...] = _linear("predict_head", "params/head")
"""Of the linear map from tokens to codes that `zoo.objectives.masked_codes` has."""
HEAD_KEYS: tuple[Rule, ...] = (*_linear("class_head.1", "params/in"), *_linear("class_head.3", "params/out"))

_PARITY = (
    "parity: features, logits and codes of hidden tokens of the official code, tokenizer and all, random weights, "
    "small, within 1e-5 (relative): tests/parity/test_brainomni_encoder_official.py"
)
VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "brainomni_mini": (
        {"tokenizer": "braintokenizer_tiny", "depth": 4, "dim": 64, "heads": 4},
        124_992,
        "parity of its layers",
    ),
    "brainomni_tiny": ({"dim": 256, "heads": 8}, 7_239_936, _PARITY),
    "brainomni_base": ({}, 29_029_376, _PARITY),
}
"""Options, parameters (without tokenizer, last block, mask token and head), evidence. The first is ours."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        BrainOmni,
        _options,
        Card(
            title=f"BrainOmni, {_parameters / 1e6:.1f} M parameters beside its tokenizer",
            paper="BrainOmni: A Brain Foundation Model for Unified EEG and MEG Signals. NeurIPS 2025, arXiv 2505.18185",
            code="https://github.com/OpenTSLab/BrainOmni",
            licence="MIT",
            inputs="EEG (V), magnetometers (T), gradiometers (T/m) [B, C, T ≥ 512] at 256 Hz, 0.1–96 Hz; positions "
            "(m), and orientations of MEG sensors",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
