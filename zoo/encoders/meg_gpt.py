"""MEG-GPT: a causal transformer over the tokens of every channel's samples, with ever longer patches of the past.

Source: "MEG-GPT", 2510.18080, and the official code with its configuration (github.com/OHBA-analysis/MEG-GPT, MIT).

Input: source-space time courses of 52 parcels, 250 Hz, standardised by session and channel: a token a sample and
channel, of a frozen tokenizer (collection `tokenizer`), EphysTokenizer unless another is named. Tokens of the first
samples hang on what its recurrent network has not seen: where that matters, make codes of longer stretches and give
`read` what follows. A channel that is not valid is silence.

A layer reads a sequence and gives its last steps only: of 100 steps 100, 80, 80, 64, 16. Queries are these steps; keys
and values are patches of the steps that it reads, each a mixture of a patch's steps over all heads, the same for every
feature of a head. A step sees the patches that end at it or before. What comes out for a step is to tell the token
after it. Channels do not see one another.

Where this differs from the official code: its attention over channels, which its released configuration switches off,
and rotary positions are left out. What a classifier is given neither says: here the mean over channels and steps.
`zoo.objectives.next_code` pretrains the same task with mixers of any kind in place of these patches.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import blank
from zoo.encoders.tokenized import TokenizerEncoder
from zoo.errors import ZooError
from zoo.layers.parameters import dense, merge_heads, norm, partitioned, split_heads
from zoo.registry import Card, register
from zoo.types import AnyArray, Array, Encoded, Sensors
from zoo.weights.keys import Ignore, Key, Rule

XAVIER = nn.initializers.glorot_uniform()
INTO = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", (0,), (1, 2))
OUT_OF = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", (0, 1), (2,))


class MegGPT(TokenizerEncoder):
    """The encoder: tokens of the last `steps` of a window, channel by channel; pooled is their mean.

    channels        the montage: names in their order, or how many
    subjects        sessions that have an embedding (the released model: 621), which `subject` then tells; 0: none has
    codes           V of the tokenizer
    layers          (patches, steps of a patch) that each layer reads; their product is what the layer before gives
    steps           what the last layer gives
    band            patches on either side that the first layer sees; None for all
    dim, heads, hidden, label_dim
                    features, attention heads, width of the MLP, numbers of a session's embedding, before a map to D
    dropout         of embeddings, of what attention gives and of what the MLP gives
    dtype           compute dtype; parameters and softmax stay float32
    tokenizer, tokenizer_options
                    see `zoo.encoders.tokenized`
    """

    tokenizer: str = "ephys_tokenizer"
    channels: int | tuple[str, ...] = 52
    subjects: int = 0
    codes: int = 66
    layers: tuple[tuple[int, int], ...] = ((100, 1), (25, 4), (20, 4), (10, 8), (8, 8))
    steps: int = 16
    band: int | None = 8
    dim: int = 256
    heads: int = 4
    hidden: int = 1024
    label_dim: int = 66
    dropout: float = 0.2
    dtype: DTypeLike = jnp.float32

    ORDER_FREE: ClassVar[bool] = False

    def setup(self) -> None:
        lengths = self._lengths()
        if self.dim % self.heads or tuple(sorted(lengths, reverse=True)) != lengths:
            raise ZooError(
                "MegGPT wants heads that divide dim, and layers that read what the one before gives, never more: "
                f"got dim {self.dim}, heads {self.heads}, layers {self.layers}, steps {self.steps}"
            )
        if self.made_tokenizer().code_sizes != (self.codes,):
            raise ZooError(f"MegGPT codes: got {self.codes} for a tokenizer of {self.made_tokenizer().code_sizes}")
        small = nn.initializers.uniform(0.1)

        def about_zero(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
            return small(key, shape, dtype) - 0.05

        def table(name: str, init: Any, rows: int, width: int) -> Any:
            return self.param(name, partitioned(init, None, "embed"), (rows, width))

        count = self.channels if isinstance(self.channels, int) else len(self.channels)
        self.embed_code = table("embed_code", about_zero, self.codes, self.dim)
        self.embed_step = table("embed_step", XAVIER, lengths[0], self.dim)
        self.embed_channel = table("embed_channel", XAVIER, count, self.dim)
        if self.subjects:
            self.embed_label = table("embed_label", about_zero, self.subjects, self.label_dim)
            self.label = dense(self.dim, (None, "embed"), bias=True, init=XAVIER)
        self.drop = nn.Dropout(self.dropout)
        self.blocks = [
            PatchedLayer(*read, kept, self.heads, self.hidden, None if number else self.band, self.dropout, self.dtype)
            for number, (read, kept) in enumerate(zip(self.layers, lengths[1:], strict=True))
        ]

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
        """signal [B, C, T], T what the first layer reads → Encoded, N = C · steps. subject [B]: whose session.

        Raises ZooError for another window, for a mask, and where a subject is wanted and not given, or given and not
        wanted.
        """
        if mask is not None:
            raise ZooError("MegGPT hides no tokens: got a mask, wanted none")
        signal = self.present(signal, sensors)
        if signal.shape[-1] != self._lengths()[0]:
            raise ZooError(f"MegGPT wants windows of {self._lengths()[0]} samples, got {signal.shape[-1]} samples")
        heard = dataclasses.replace(sensors, valid=jnp.ones(signal.shape[:2], bool))
        codes = self.from_tokenizer(signal, heard, "encode").reshape(signal.shape)
        tokens = self.read(codes, subject=subject, train=train)
        valid = jnp.repeat(jnp.asarray(sensors.valid), self.steps, axis=1)
        flat = tokens.reshape(tokens.shape[0], -1, self.dim)
        return Encoded(flat, flat.mean(1), valid)

    def read(
        self, codes: Int[AnyArray, "B C T"], *, subject: AnyArray | None = None, train: bool = False
    ) -> Float[Array, "B C A D"]:
        """The last `steps` tokens of every channel, of codes [B, C, T] that were made before."""
        if (subject is None) == (self.subjects > 0):
            wanted = f"whose session each example is, 0 to {self.subjects - 1}" if self.subjects else "none"
            raise ZooError(f"MegGPT: got {'no' if subject is None else 'a'} subject, wanted {wanted}")
        # Made whole before rows are taken of it: from a split table XLA would copy the batch to every device.
        table = nn.with_logical_constraint(self.embed_code, (None, None))
        x = jnp.take(table, jnp.asarray(codes), axis=0) + self.embed_step + self.embed_channel[:, None]
        if subject is not None:
            labels = nn.with_logical_constraint(self.embed_label, (None, None))
            # One below 0 would count from the end.
            who = jnp.where(jnp.asarray(subject) < 0, self.subjects, subject)
            own = jnp.take(labels, who, axis=0, mode="fill", fill_value=jnp.nan)
            x = x + self.label(own)[:, None, None]
        x = nn.with_logical_constraint(x, ("batch", None, None, None)).astype(self.dtype)
        x = self.drop(x, deterministic=not train)
        for block in self.blocks:
            x = block(x, train)
        return x.astype(jnp.float32)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass, the tokenizer's with its decoder among them."""
        own = 0.0
        for (patches, patch), kept in zip(self.layers, self._lengths()[1:], strict=True):
            mixing = 2 * patches * patch * self.heads * self.dim if patch > 1 else 0
            own += mixing + 2 * (patches + kept) * self.dim**2 + 2 * kept * patches * self.dim
            own += 2 * kept * self.dim * self.hidden
        return self.made_tokenizer().flops(channels, samples) + 2.0 * channels * own

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """One window."""
        return blank(self.channels, self._lengths()[0], "roi")

    @nn.nowrap
    def made_tokenizer(self) -> Any:
        """The tokenizer; EphysTokenizer with its codes numbered by frequency, unless its options say otherwise."""
        made: Any = super().made_tokenizer()
        numbered = self.tokenizer_options is None and hasattr(made, "known")
        return made.clone(known=self.codes - 1, parent=None) if numbered else made

    @nn.nowrap
    def _lengths(self) -> tuple[int, ...]:
        """Steps that each layer reads, and that the last one gives."""
        return (*(patches * patch for patches, patch in self.layers), self.steps)


class PatchedLayer(nn.Module):
    """x + attention(norm x) and x + mlp(norm x), for the last `kept` steps of [B, C, patches · patch, D]."""

    patches: int
    patch: int
    kept: int
    heads: int
    hidden: int
    band: int | None
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B C T D"], train: bool) -> Float[Array, "B C A D"]:
        dim = x.shape[-1]
        width = dim // self.heads
        drop = nn.Dropout(self.dropout, deterministic=not train)

        def into(name: str, x: Array) -> Array:
            return split_heads(dim, self.heads, width, bias=True, init=INTO, dtype=self.dtype, name=name)(x)

        normal = norm("layer", epsilon=1e-5, dtype=self.dtype, name="attention_norm")(x)
        query = into("query", normal[:, :, -self.kept :])
        key, value = (into(name, self._patched(f"{name}_patch", normal)) for name in ("key", "value"))
        sees = visible(self.patches, self.patch, self.kept, self.band)
        score = jnp.einsum("bcthk,bcnhk->bchtn", query, key, preferred_element_type=jnp.float32) * width**-0.5
        weight = jax.nn.softmax(score, axis=-1, where=sees).astype(self.dtype)
        mixed = jnp.einsum("bchtn,bcnhk->bcthk", jnp.where(sees.any(-1, keepdims=True), weight, 0), value)
        out = merge_heads(self.heads, width, dim, bias=True, init=OUT_OF, dtype=self.dtype, name="out")(mixed)
        x = x[:, :, -self.kept :] + drop(out)

        normal = norm("layer", epsilon=1e-5, dtype=self.dtype, name="mlp_norm")(x)
        hidden = dense(self.hidden, bias=True, init=XAVIER, dtype=self.dtype, name="mlp_in")(normal)
        out = dense(dim, ("mlp", "embed"), bias=True, init=XAVIER, dtype=self.dtype, name="mlp_out")(
            nn.gelu(hidden, approximate=False)
        )
        return x + drop(out)

    def _patched(self, name: str, x: Float[Array, "B C T D"]) -> Float[Array, "B C N D"]:
        """Head g of patch n: Σ over its steps p and heads h of w[p, h, g] · x[n, p, h], and a shift."""
        if self.patch == 1:
            return x
        batch, channels, _, dim = x.shape
        init = partitioned(nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", (0, 1), (2,)), None, None, None)
        kernel = self.param(f"{name}_kernel", init, (self.patch, self.heads, self.heads))
        bias = self.param(f"{name}_bias", partitioned(nn.initializers.zeros, None), (self.heads,))
        steps = x.reshape(batch * channels, self.patches, self.patch, self.heads, -1)
        mixed = jnp.einsum("bnphk,phg->bngk", steps, kernel.astype(self.dtype)) + bias.astype(self.dtype)[:, None]
        return mixed.reshape(batch, channels, self.patches, dim)


def visible(patches: int, patch: int, kept: int, band: int | None) -> Bool[np.ndarray, "A N"]:
    """Which patches each of the last `kept` steps sees: those that end at it or before, and lie within the band."""
    step, number = np.arange(kept)[:, None], np.arange(patches)
    sees = step >= (number + 1 - patches) * patch + kept - 1
    return sees if band is None else sees & (np.abs(number - step // patch) <= band)


def keys(layers: tuple[tuple[int, int], ...], labels: bool) -> tuple[Rule, ...]:
    """Of `model_state.pt` but its prediction head; whether there are embeddings of sessions."""
    embed = "input_embedding_layer."
    rules: list[Rule] = [
        Key(f"{embed}token_embed.base_module.weight", "params/embed_code"),
        Key(f"{embed}pos_embed.base_module.position_embeddings", "params/embed_step"),
        Key(f"{embed}channel_embed.base_module.position_embeddings", "params/embed_channel"),
    ]
    if labels:
        rules.append(Key(f"{embed}extra_embeds.0.base_module.weight", "params/embed_label"))
        rules += _linear(f"{embed}extra_embeds.0.proj", "params/label")
    for number, (_, patch) in enumerate(layers):
        theirs, ours = f"transformer_decoder.layers.{number}.", f"params/blocks_{number}/"
        attention = f"{theirs}gasp_time_attention."
        for source, name in (("norm_time1", "attention_norm"), ("norm_time2", "mlp_norm")):
            rules.append(Key(f"{theirs}{source}.norm_layer.weight", f"{ours}{name}/scale"))
            rules.append(Key(f"{theirs}{source}.norm_layer.bias", f"{ours}{name}/bias"))
        for source, name in (("query", "query"), ("patched_projection_k", "key"), ("patched_projection_v", "value")):
            whole = f"{attention}{source}" if "patched" in source else f"{attention}{source}_projection"
            rules.append(Key(f"{whole}.weight", f"{ours}{name}/kernel", "(h k) d -> d h k"))
            rules.append(Key(f"{whole}.bias", f"{ours}{name}/bias", "(h k) -> h k"))
        for source, name in (("k", "key"), ("v", "value")) if patch > 1 else ():
            mix = f"{attention}patch_projection_{source}"
            rules.append(Key(f"{mix}.weight", f"{ours}{name}_patch_kernel", "g (h p) -> p h g"))
            rules.append(Key(f"{mix}.bias", f"{ours}{name}_patch_bias"))
        rules.append(Key(f"{attention}output_projection.weight", f"{ours}out/kernel", "d (h k) -> h k d"))
        rules.append(Key(f"{attention}output_projection.bias", f"{ours}out/bias"))
        rules.append(Ignore(f"{attention}gasp_layer.attention_mask", "which patches are seen, computed here"))
        rules += _linear(f"{theirs}ff_time.net.0", f"{ours}mlp_in")
        rules += _linear(f"{theirs}ff_time.net.2", f"{ours}mlp_out")
    return tuple(rules)


def _linear(source: str, target: str) -> tuple[Rule, ...]:
    return Key(f"{source}.weight", f"{target}/kernel", "o i -> i o"), Key(f"{source}.bias", f"{target}/bias")


KEYS: tuple[Rule, ...] = keys(MegGPT.layers, labels=True)
"""Of the released configuration: all `params`. The tokenizer is in a file of its own."""
CODE_HEAD_KEYS: tuple[Rule, ...] = _linear("prediction_head", "params/head")
"""Of the linear map from a step's token to the code after it."""

VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "meg_gpt_tiny": (
        {
            "tokenizer": "mu_law",
            "channels": 8,
            "codes": 256,
            "layers": ((48, 1), (8, 4)),
            "steps": 8,
            "dim": 64,
            "hidden": 128,
        },
        87_048,
        "parity of its layers",
    ),
    "meg_gpt_base": (
        {},
        4_005_408,
        "parity: tokens and logits of the official code in its released configuration, random weights, within 1e-5 "
        "(relative): tests/parity/test_meg_gpt_encoder_official.py",
    ),
}
"""Options, parameters (without sessions and head), evidence. tiny is ours, on fixed levels."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        MegGPT,
        _options,
        Card(
            title=f"MEG-GPT, {_parameters / 1e6:.1f} M parameters beside its tokenizer",
            paper="MEG-GPT, arXiv 2510.18080",
            code="https://github.com/OHBA-analysis/MEG-GPT",
            licence="MIT",
            inputs=f"[B, {_options.get('channels', 52)}, {'48' if 'layers' in _options else '100'}] parcels, "
            "standardised by session and channel, at the tokenizer's rate (EphysTokenizer: 250 Hz)",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
