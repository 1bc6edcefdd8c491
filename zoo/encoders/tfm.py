"""The encoder of TFM-Tokenizer's codes: every half second of every channel a code, linear attention over them all.

Source: Pradeepkumar et al., "Tokenizing Single-Channel EEG with Time-Frequency Motif Learning", 2502.16060, and the
official code (github.com/Jathurshan0330/TFM-Tokenizer, MIT), which gives trained encoders, but no trained tokenizer.

Input: EEG at 200 Hz, any unit, of windows of 200 + 100·k samples (5 or 10 s published); 16 channels at most, known by
their place in the montage. A channel that is not valid is silence, and has the codes of silence.

    variables = {"params": trained["params"], "tokenizer": tokenizer_variables}
    encoder.apply(variables, signal, sensors)
    encoder.apply({"params": trained["params"]}, codes, method="read")          # of codes that are made already

Pretraining is `zoo.objectives.masked_codes` as it stands: half the codes hidden, then the other half; a linear head.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import blank
from zoo.encoders.tokenized import TokenizerEncoder
from zoo.errors import ZooError
from zoo.layers.linear_transformer import KEYS as TRANSFORMER_KEYS
from zoo.layers.linear_transformer import LinearTransformer
from zoo.layers.parameters import partitioned
from zoo.layers.post_norm import sinusoids
from zoo.registry import Card, register
from zoo.types import AnyArray, Array, Encoded, Sensors
from zoo.weights.keys import Ignore, Key, Rule, below

ROWS = 16
"""Of the published table of channels."""


class TFMEncoder(TokenizerEncoder):
    """The encoder. Tokens are channel by channel, frame by frame; pooled is what the CLS token has become.

    channels        the montage: names in their order, or how many; at most 16
    codes           K; row K of the table stands for a code that is hidden
    dim, depth, heads, dropout
                    of the linear transformer; `dropout` is that of what attention gives
    embed_dropout   of embedded codes
    dtype           compute dtype; parameters and softmax stay float32
    tokenizer, tokenizer_options
                    see `zoo.encoders.tokenized`
    """

    tokenizer: str = "tfm_base"
    channels: int | tuple[str, ...] = 16
    codes: int = 8192
    dim: int = 64
    depth: int = 4
    heads: int = 8
    dropout: float = 0.2
    embed_dropout: float = 0.1
    dtype: DTypeLike = jnp.float32

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)
    ORDER_FREE: ClassVar[bool] = False

    def setup(self) -> None:
        count = self.channels if isinstance(self.channels, int) else len(self.channels)
        if not 0 < count <= ROWS:
            raise ZooError(f"TFMEncoder channels: got {count}, wanted 1 to {ROWS}")
        if self.made_tokenizer().code_sizes != (self.codes,):
            raise ZooError(
                f"TFMEncoder codes: got {self.codes} for a tokenizer of {self.made_tokenizer().code_sizes[0]}"
            )
        table = partitioned(nn.initializers.normal(1.0), None, "embed")
        self.embed_code = self.param("embed_code", table, (self.codes + 1, self.dim))
        self.embed_channel = self.param("embed_channel", table, (ROWS, self.dim))
        self.embed_cls = self.param("embed_cls", partitioned(nn.initializers.zeros, "embed"), (self.dim,))
        self.drop = nn.Dropout(self.embed_dropout)
        self.transformer = self._transformer()

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
        """signal [B, C, 200 + 100·k] → Encoded, N = C·(k + 1) tokens; mask [B, N] or [B, C, k + 1] hides codes."""
        signal = self.present(signal, sensors)
        heard = dataclasses.replace(sensors, valid=jnp.ones(signal.shape[:2], bool))
        codes = self.from_tokenizer(signal, heard, "encode")[..., 0].reshape(*signal.shape[:2], -1)
        encoded = self.read(codes, mask=mask, train=train)
        valid = jnp.repeat(jnp.asarray(sensors.valid), codes.shape[2], axis=1)
        return Encoded(encoded.tokens, encoded.pooled, valid)

    def read(self, codes: Int[AnyArray, "B C A"], *, mask: AnyArray | None = None, train: bool = False) -> Encoded:
        """The same, of codes [B, C, A] that were made before."""
        codes = jnp.asarray(codes)
        batch, channels, frames = codes.shape
        if mask is not None:
            codes = jnp.where(self.check_mask(mask, (channels, frames)).reshape(codes.shape), self.codes, codes)
        # Made whole before rows are taken of it: from a split table XLA would copy the batch to every device.
        table = nn.with_logical_constraint(self.embed_code, (None, None))
        x = jnp.take(table, codes, axis=0) + self.embed_channel[:channels, None] + sinusoids(frames, self.dim)
        x = self.drop(x, deterministic=not train).reshape(batch, -1, self.dim)
        cls = jnp.broadcast_to(self.embed_cls, (batch, 1, self.dim))
        x = nn.with_logical_constraint(jnp.concatenate([cls, x], axis=1), ("batch", "tokens", None))
        x = self.transformer(x, train=train).astype(jnp.float32)
        return Encoded(x[:, 1:], x[:, 0], jnp.ones((batch, channels * frames), bool))

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass, the tokenizer's with its decoder among them."""
        rows, frames = self.grid(channels, samples)
        reading = self._transformer().flops(rows * frames + 1, self.dim)
        return self.made_tokenizer().flops(channels, samples) + reading

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """One window of its channels."""
        return blank(self.channels, self.made_tokenizer().example()[0].shape[-1])

    @nn.nowrap
    def _transformer(self) -> LinearTransformer:
        return LinearTransformer(self.depth, self.heads, dropout=self.dropout, dtype=self.dtype)


KEYS: tuple[Rule, ...] = (
    Key("eeg_token_embedding.weight", "params/embed_code"),
    Key("channel_embed.weight", "params/embed_channel"),
    Key("cls_token", "params/embed_cls", "1 1 d -> d"),
    Ignore("index", "the numbers 0 to 15"),
    Ignore("temporal_pos_embed.pe", "sinusoids, computed here"),
    *below(TRANSFORMER_KEYS, "transformer", "LAT."),
)
"""Of `tfm_encoder_best_model.pth`: all `params`. The tokenizer's variables are in no published file."""
HEAD_KEYS: tuple[Rule, ...] = (
    Key("classification_head.weight", "params/linear/kernel", "o i -> i o"),
    Key("classification_head.bias", "params/linear/bias"),
)

VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "tfm_encoder_tiny": (
        {"tokenizer": "tfm_tiny", "codes": 256, "depth": 2},
        117_120,
        "parity of its layers",
    ),
    "tfm_encoder": (
        {},
        724_608,
        "parity: features and logits of the official code with its released weights (TUEV) within 1e-5 (relative): "
        "tests/parity/test_tfm_encoder_official.py",
    ),
}
"""Options, parameters (of the encoder without tokenizer and head), evidence. tiny is ours."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        TFMEncoder,
        _options,
        Card(
            title=f"Encoder of TFM-Tokenizer's codes, {_parameters / 1e3:.0f} k parameters",
            paper="Pradeepkumar, Piao, Chen, Sun. Tokenizing Single-Channel EEG with Time-Frequency Motif Learning. "
            "arXiv 2502.16060",
            code="github.com/Jathurshan0330/TFM-Tokenizer",
            licence="MIT",
            inputs="EEG [B, C ≤ 16, 200 + 100·k] at 200 Hz, any unit; the montage in a fixed order",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
