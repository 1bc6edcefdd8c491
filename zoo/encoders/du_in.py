"""Du-IN's encoder: intracranial electrodes of one region together, a token every 100 ms.

Source: Zheng et al., "Du-IN: Discrete units-guided mask modeling for decoding speech from Intracranial Neural signals",
2405.11459, and the official code (github.com/liulab-repository/Du-IN, MIT).

Input: 16 channels at most of one person, 1000 Hz, each z-scored over its recording, windows of 4 s (3 s in the paper's
demonstrations). Every subject has a matrix of its own, so channels are in an order of the subject's; one that is not
valid is silence, as the published code pads fewer than 16.

Pretraining is `zoo.objectives.masked_codes` with a trained `du_in_base` for a tokenizer: the same layers as this
encoder's, but another model, whose codes are predicted from a half of the tokens, then from the other half. It stays as
it is: only this encoder learns.

Where this differs from the official code:
- Its classifier puts a sigmoid on the logits before the cross-entropy of a softmax, so that no class of K can be more
  likely than e / (e + K − 1). `sigmoid=True` does so.
- The running variance of batch norm is the mean square deviation, not the unbiased one.
- Each patch is convolved alone, as there; there is no activation between convolutions, as there.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import Encoder, blank
from zoo.errors import ZooError
from zoo.layers.parameters import dense, partitioned
from zoo.layers.post_norm import NORMAL, PostNormTransformer
from zoo.registry import Card, register
from zoo.tokenizers.du_in import PatchConvolution, SubjectMap
from zoo.types import AnyArray, Array, Encoded, Sensors
from zoo.weights.keys import Ignore, Key, Rule


class DuINEncoder(Encoder):
    """The encoder: A = patches tokens of D = patch / stride · filters; pooled is all of them, one after the other.

    channels, latents      the subjects' channels, and how many stand for them after the subject's matrix
    patches                tokens of a window
    patch, stride          samples of a token and from one convolved step to the next
    subjects               whose matrices there are (paper: 12; code: 10); 0: one for all, and no subject is asked for
    conv_width, filters    of the inner convolutions and of the last
    depth, heads, head_width, mlp_ratio, dropout
                           of the transformer; dropout of attention weights and inside the MLP
    hidden, sigmoid        width of the classifier, and whether its logits go through a sigmoid
    rate_hz                of the signal
    dtype                  compute dtype; parameters, statistics and softmax stay float32
    """

    channels: int | tuple[str, ...] = 16
    latents: int = 16
    patches: int = 40
    patch: int = 100
    stride: int = 10
    subjects: int = 0
    conv_width: int = 128
    filters: int = 16
    depth: int = 8
    heads: int = 8
    head_width: int = 64
    mlp_ratio: int = 2
    dropout: float = 0.2
    hidden: int = 128
    sigmoid: bool = False
    rate_hz: float = 1000.0
    dtype: DTypeLike = jnp.float32

    TAKES: ClassVar[tuple[str, ...]] = ("seeg", "ecog")
    ORDER_FREE: ClassVar[bool] = False

    @property
    def sampling_rate(self) -> float:
        """Hz."""
        return self.rate_hz

    @property
    def montage(self) -> int | tuple[str, ...]:
        """Its channels."""
        return self.channels

    @property
    def dim(self) -> int:
        """D of its tokens."""
        return self.patch // self.stride * self.filters

    @property
    def features(self) -> int:
        """Of all tokens together."""
        return self.patches * self.dim

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
        """signal [B, C, patches · patch], subject [B] → Encoded; mask [B, A] or [B, 1, A] hides tokens.

        subject only where there are several; one without a matrix makes the example NaN. `train` draws from the stream
        "dropout" and moves the averages in "batch_stats". Raises ZooError for another window, where a subject is wanted
        and not given, or given and not wanted, and for options that do not fit.
        """
        signal = self.present(signal, sensors)
        batch, channels, samples = signal.shape
        self.grid(channels, samples)
        if (subject is None) == (self.subjects > 0):
            wanted = f"whose each example is, 0 to {self.subjects - 1}" if self.subjects else "none"
            raise ZooError(f"DuINEncoder: got {'no' if subject is None else 'a'} subject, wanted {wanted}")
        who = jnp.zeros(batch, jnp.int32) if subject is None else jnp.asarray(subject)
        # A subject below 0 would count from the end.
        who = jnp.where(who < 0, max(self.subjects, 1), who)
        there = jnp.asarray(sensors.valid).any(1)
        x = SubjectMap(max(self.subjects, 1), channels, self.latents, name="subject_in")(
            jnp.swapaxes(signal, 1, 2), who
        )
        x = x.reshape(batch, self.patches, self.patch, self.latents)
        x = PatchConvolution(self.conv_width, self.filters, self.stride, self.dtype, name="embed")(x, there, train)
        if mask is not None:
            if mask.size != batch * self.patches:
                raise ZooError(f"DuINEncoder wants a mask of {[batch, self.patches]}, got {list(mask.shape)}")
            token = self.param("embed_mask", partitioned(NORMAL, "embed"), (self.dim,)).astype(x.dtype)
            x = jnp.where(mask.reshape(batch, -1, 1), token, x)
        x = self._transformer()(x, train).astype(jnp.float32)
        valid = jnp.broadcast_to(there[:, None], (batch, self.patches))
        return Encoded(x, x.reshape(batch, -1), valid)

    @nn.nowrap
    def grid(self, channels: int, samples: int) -> tuple[int, int]:
        """(1, tokens) of a window. Raises ZooError for one of another length, and for options that do not fit."""
        if self.patch % self.stride or self.dim % 2:
            raise ZooError(
                "DuINEncoder wants a stride that divides the patch, and an even patch / stride · filters: "
                f"got patch {self.patch}, stride {self.stride}, filters {self.filters}"
            )
        if samples != self.patches * self.patch:
            raise ZooError(f"DuINEncoder wants {self.patches} patches of {self.patch} samples, got {samples} samples")
        return 1, self.patches

    @nn.nowrap
    def head(self, classes: int) -> nn.Module:
        """Two linear maps with a ReLU between them, and a sigmoid after them where the option says so."""
        return DuINHead(classes, self.hidden, self.sigmoid)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two."""
        dim, width, steps = self.dim, self.conv_width, self.patch // self.stride
        embed = self.patch * channels * self.latents
        embed += steps * ((2 * self.stride - 1) * self.latents * width + 3 * width**2 + 3 * width * self.filters)
        block = dim * (4 * self.heads * self.head_width + 2 * self.mlp_ratio * dim)
        block += 2 * self.patches * self.heads * self.head_width
        return 2.0 * (samples // self.patch) * (embed + self.depth * block)

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """One window."""
        return blank(self.channels, self.patches * self.patch, "seeg")

    @nn.nowrap
    def _transformer(self) -> PostNormTransformer:
        return PostNormTransformer(
            self.depth, self.heads, self.head_width, self.mlp_ratio, self.dropout, self.dtype, name="encoder"
        )


class DuINHead(nn.Module):
    """[B, A·D] → [B, classes]: linear, ReLU, linear, and a sigmoid where asked."""

    classes: int
    hidden: int
    sigmoid: bool

    @nn.compact
    def __call__(self, pooled: Float[AnyArray, "B D"], *, train: bool = False) -> Float[Array, "B K"]:
        x = nn.relu(dense(self.hidden, (None, None), bias=True, init=NORMAL, name="in")(jnp.asarray(pooled)))
        x = dense(self.classes, (None, None), bias=True, init=NORMAL, name="out")(x)
        return nn.sigmoid(x) if self.sigmoid else x


_BLOCK, _OURS = "encoder.1.xfmr_blocks.{l}.", "params/encoder/blocks/"


def _linear(source: str, target: str, index: str = "") -> tuple[Rule, ...]:
    kernel, bias = (f"{target}/{name}{index}" for name in ("kernel", "bias"))
    return Key(f"{source}.weight", kernel, "o i -> i o"), Key(f"{source}.bias", bias)


def _norm(source: str, target: str, index: str = "") -> tuple[Rule, ...]:
    scale, bias = (f"{target}/{name}{index}" for name in ("scale", "bias"))
    return Key(f"{source}.weight", scale), Key(f"{source}.bias", bias)


def _convolution(layer: int) -> tuple[Rule, ...]:
    theirs, ours = f"tokenizer.conv_blocks.{layer}.", f"embed/{{}}_{layer + 1}"
    conv, norm = ours.format("conv"), ours.format("norm")
    return (
        Key(f"{theirs}0.1.weight", f"params/{conv}/kernel", "o i t -> t i o"),
        Key(f"{theirs}0.1.bias", f"params/{conv}/bias"),
        *_norm(f"{theirs}1.1", f"params/{norm}"),
        Key(f"{theirs}1.1.running_mean", f"batch_stats/{norm}/mean"),
        Key(f"{theirs}1.1.running_var", f"batch_stats/{norm}/var"),
        Ignore(f"{theirs}1.1.num_batches_tracked", "a counter"),
    )


def _heads(name: str) -> tuple[Rule, ...]:
    theirs, ours = f"{_BLOCK}mha.W_{name[0]}.W", f"{_OURS}{name}"
    return (
        Key(f"{theirs}.weight", f"{ours}/kernel[{{l}}]", "(h k) d -> d h k"),
        Key(f"{theirs}.bias", f"{ours}/bias[{{l}}]", "(h k) -> h k"),
    )


KEYS: tuple[Rule, ...] = (
    Key("subj_block.subj_layer.W.weight", "params/subject_in/kernel", "(i o) s -> s i o"),
    Key("subj_block.subj_layer.B.weight", "params/subject_in/bias", "o s -> s o"),
    *(rule for layer in range(3) for rule in _convolution(layer)),
    Ignore("emb_time.time_encodings", "sinusoids, computed here"),
    *(rule for name in ("query", "key", "value") for rule in _heads(name)),
    *_norm(f"{_BLOCK}mha.norm_q", f"{_OURS}query_norm", "[{l}]"),
    *_norm(f"{_BLOCK}mha.norm_k", f"{_OURS}key_norm", "[{l}]"),
    Ignore(f"{_BLOCK}mha.attention.scale", "one over the root of the heads' width"),
    Key(f"{_BLOCK}mha.proj.0.weight", f"{_OURS}out/kernel[{{l}}]", "d (h k) -> h k d"),
    Key(f"{_BLOCK}mha.proj.0.bias", f"{_OURS}out/bias[{{l}}]"),
    *_norm(f"{_BLOCK}norm_mha", f"{_OURS}attention_norm", "[{l}]"),
    *_linear(f"{_BLOCK}ffn.fc1.0", f"{_OURS}mlp_in", "[{l}]"),
    *_linear(f"{_BLOCK}ffn.fc2.0", f"{_OURS}mlp_out", "[{l}]"),
    *_norm(f"{_BLOCK}norm_ffn", f"{_OURS}mlp_norm", "[{l}]"),
)
"""Of the encoder in all files of the authors' code."""
MASK_KEYS: tuple[Rule, ...] = (Key("mask_emb", "params/embed_mask"),)
"""Besides, in files of `duin_mae`."""
_UNUSED = "a part of duin_cls that its logits do not use"
HEAD_KEYS: tuple[Rule, ...] = (
    *_linear("cls_block.cls_head.1.0", "params/in"),
    *_linear("cls_block.cls_head.2.0", "params/out"),
    *(
        Ignore(f"vq_block.{name}", _UNUSED)
        for name in ("counts", "codex.embeddings", "codex.initted")
        + tuple(
            f"{layer}.{kind}"
            for layer in ("pre_proj.0", "pre_proj.2", "layernorm", "post_proj.0")
            for kind in ("weight", "bias")
        )
    ),
    *(Ignore(f"contra_block.{name}", _UNUSED) for name in ("t", "proj_z.0.weight", "proj_z.0.bias")),
    *(Ignore(f"contra_block.proj_y.0.{kind}", _UNUSED) for kind in ("weight", "bias")),
)
"""Of the classifier, and the rest, in files of `duin_cls`."""

VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "du_in_encoder_tiny": (
        {
            "rate_hz": 100.0,
            "patches": 10,
            "patch": 10,
            "stride": 2,
            "conv_width": 32,
            "depth": 2,
            "heads": 4,
            "head_width": 20,
        },
        110_976,
        "parity of its layers",
    ),
    "du_in_encoder_base": (
        {},
        3_560_512,
        "parity: tokens, with and without hidden ones, and logits of the official code, random weights, within 1e-5 "
        "(relative): tests/parity/test_du_in_encoder_official.py",
    ),
}
"""Options, parameters (one subject; without mask token and head), evidence. tiny is ours, for electrodes at 100 Hz."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        DuINEncoder,
        _options,
        Card(
            title=f"Du-IN's encoder, {_parameters / 1e6:.1f} M parameters",
            paper="Zheng et al. Du-IN: Discrete units-guided mask modeling for decoding speech from Intracranial "
            "Neural signals. NeurIPS 2024, arXiv 2405.11459",
            code="github.com/liulab-repository/Du-IN",
            licence="MIT",
            inputs=f"sEEG or ECoG [B, 16, {_options.get('patches', 40) * _options.get('patch', 100)}] at "
            f"{_options.get('rate_hz', 1000.0):g} Hz, z-scored by channel",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
