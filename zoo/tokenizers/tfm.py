"""TFM-Tokenizer: one channel of EEG, half-second steps, codes of what its spectrum and its samples say together.

Source: Pradeepkumar et al., "Tokenizing Single-Channel EEG with Time-Frequency Motif Learning", 2502.16060, and the
official code (github.com/Jathurshan0330/TFM-Tokenizer, MIT).

Input: EEG at 200 Hz, any unit: each channel is divided here by the 95th percentile of its magnitude.

What it gives back is a magnitude: the decoder estimates the short-time spectrum, and neither paper nor code has a
phase. `reconstruction` and `decode` find a signal with that magnitude (Griffin and Lim, 1984; a fixed number of
iterations). At a hop of half a window the magnitude does not tell the signal: expect its spectrum, not its samples.
`scale` is the 95th percentile of each channel.

Losses: in training the spectrum goes in twice, with random bands and frames left out, and with these alone; the raw
samples always go in whole, so masking hides little. Both terms here are means over the passes and weigh 2, which makes
the published sum; without training there is one pass, nothing left out. Masks are drawn of the stream "noise", one for
the whole batch, as published. The codes given are those of the first pass.

Where this differs from the official code:
- Its quantiser loss, mean((s − sg z)²) + beta · mean((sg s − z)²), is written with the output s = z + sg(q − z) of the
  straight-through estimator: at its beta, 1, the gradients of the two cancel exactly (and below 1 they would push
  inputs away from their codes). So its encoder learns from the spectrum alone. `commitment` 0 is that; a positive one
  weighs mean((sg(q) − z)²) with the codes themselves.
- A code that the first batch does not use keeps its place (`zoo.layers.quantizers.VectorQuantizer`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.errors import ZooError
from zoo.layers.linear_transformer import KEYS as TRANSFORMER_KEYS
from zoo.layers.linear_transformer import LinearTransformer
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias, partitioned
from zoo.layers.quantizers import Quantized, VectorQuantizer, unit
from zoo.layers.spectra import frames, griffin_lim, hann, stft
from zoo.objectives.signal import mean_square
from zoo.registry import Card, register
from zoo.sensors import KINDS
from zoo.tokenizers.tokenizer import Tokenizer
from zoo.types import AnyArray, Array, Sensors, Tokenized
from zoo.weights.keys import Fresh, Key, Rule, below


class PatchEmbedding(nn.Module):
    """Three times linear, exact GELU, group norm: patches [..., N, P] → [..., N, features].

    A norm's groups are over its features and all N patches; there are D / 4 of them, D the width before the last.
    """

    dim: int
    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*lead N P"]) -> Float[Array, "*lead N D"]:
        widths = (self.dim, self.dim, self.features)
        sides = ((None, "embed"), ("embed", "mlp"), ("mlp", None))
        for layer, (width, axes) in enumerate(zip(widths, sides, strict=True), start=1):
            bias = like_torch_bias(x.shape[-1])
            x = dense(
                width, axes, bias=True, init=LIKE_TORCH, bias_init=bias, dtype=self.dtype, name=f"linear_{layer}"
            )(x)
            x = nn.GroupNorm(
                num_groups=self.dim // 4,
                epsilon=1e-5,
                reduction_axes=(-2, -1),
                dtype=self.dtype,
                scale_init=partitioned(nn.initializers.ones, None),
                bias_init=partitioned(nn.initializers.zeros, None),
                name=f"norm_{layer}",
            )(nn.gelu(x, approximate=False))
        return x


class TFMTokenizer(Tokenizer):
    """TFM-Tokenizer: A = (T − window) / hop + 1 frames a channel, one code each.

    dim, heads             features of every part, attention heads
    band_layers            of the transformer over the bands of a frame
    frame_layers           of that over the frames of a channel
    decoder_layers         of that over their codes
    window, hop            samples of a frame and from one to the next
    bins, band             of the spectrum that are used, from 0 Hz; how many make a band, and how many bands a group
    masked                 share of the bands and of the frames left out in training
    dropout                of what attention gives
    rate_hz                of the signal
    iterations             of Griffin and Lim
    codes to restart_below those of VectorQuantizer
    dtype                  compute dtype; parameters, spectra, codebook and losses stay float32
    """

    TAKES = ("eeg",)
    SINGLE_CHANNEL = True

    dim: int = 64
    heads: int = 8
    band_layers: int = 2
    frame_layers: int = 2
    decoder_layers: int = 8
    window: int = 200
    hop: int = 100
    bins: int = 100
    band: int = 5
    masked: float = 0.5
    dropout: float = 0.2
    rate_hz: float = 200.0
    iterations: int = 32
    codes: int = 8192
    learning: str = "ema"
    decay: float = 0.99
    commitment: float = 0.0
    estimator: str = "straight_through"
    kmeans: int = 0
    restart_below: float = 0.0
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self._check_options()
        groups = self.bins // self.band**2

        def linear(features: int, inputs: int, axes: tuple[str | None, str | None]) -> nn.Dense:
            bias = like_torch_bias(inputs)
            return dense(features, axes, bias=True, init=LIKE_TORCH, bias_init=bias, dtype=self.dtype)

        def transformer(depth: int) -> LinearTransformer:
            return LinearTransformer(depth, self.heads, dropout=self.dropout, dtype=self.dtype)

        self.embed_bands = PatchEmbedding(self.dim, self.dim, self.dtype)
        self.band_encoder = transformer(self.band_layers)
        self.group_gate, self.group_value = (
            linear(self.dim // (2 * groups), self.band * self.dim, (None, None)) for _ in range(2)
        )
        self.embed_samples = PatchEmbedding(self.dim, self.dim // 2, self.dtype)
        self.frame_encoder = transformer(self.frame_layers)
        self.quantizer = VectorQuantizer(
            self.codes,
            self.dim,
            learning=self.learning,
            decay=self.decay,
            commitment=self.commitment,
            estimator=self.estimator,
            kmeans=self.kmeans,
            restart_below=self.restart_below,
        )
        self.decoder = transformer(self.decoder_layers)
        self.head_in = linear(self.dim, self.dim, ("embed", "mlp"))
        self.head_out = linear(self.bins, self.dim, ("mlp", None))

    @property
    def sampling_rate(self) -> float:
        return self.rate_hz

    @property
    def code_sizes(self) -> tuple[int, ...]:
        return (self.codes,)

    @property
    def loss_weights(self) -> Mapping[str, float]:
        weights = {"spectrum": 2.0, "commitment": 2.0}
        return {**weights, "codebook": 2.0} if self.learning == "gradient" else weights

    @nn.nowrap
    def grid(self, channels: int, samples: int) -> tuple[int, int]:
        if samples < self.window or (samples - self.window) % self.hop:
            raise ZooError(
                f"TFMTokenizer: got a window of {samples} samples, wanted {self.window} or more by steps of {self.hop}"
            )
        return channels, (samples - self.window) // self.hop + 1

    def __call__(self, signal: Float[AnyArray, "B C T"], sensors: Sensors, *, train: bool = False) -> Tokenized:
        _, count = self.grid(*signal.shape[1:])
        valid = self.token_valid(sensors, signal.shape[-1])
        there = valid.reshape(*signal.shape[:2], count)
        scale = self.scale(signal, sensors)
        signal = jnp.where(sensors.valid[..., None], signal, 0) / scale[..., None]
        spectrum = jnp.abs(stft(signal, hann(self.window), self.hop))[..., : self.bins]

        def look(seen: Bool[Array, "A F"]) -> tuple[Quantized, Array, dict[str, Array]]:
            z = self._embed(jnp.where(seen, spectrum, 0), signal, train)
            found = self.quantizer(unit(z), valid=there, train=train)
            estimate = self._estimate(found.quantized, train)
            return found, estimate, {"spectrum": mean_square(estimate, spectrum, there), **found.losses}

        training = train and not self.is_initializing()
        # One after the other: the second pass is quantised by codes that the first has moved.
        passes = [look(seen) for seen in (self._masks(count) if training else [jnp.ones((count, self.bins), bool)])]
        found, estimate, _ = passes[0]
        losses = jax.tree.map(lambda *terms: sum(terms) / len(terms), *(each for _, _, each in passes))
        return Tokenized(
            found.codes.reshape(*valid.shape, 1),
            found.quantized.reshape(*valid.shape, self.dim),
            self._signal(estimate, sensors, scale),
            losses,
            valid,
        )

    def decode(self, codes: Int[AnyArray, "B N 1"], sensors: Sensors, scale: Any = None) -> Float[Array, "B C T"]:
        quantized = self.quantizer.decode(jnp.asarray(codes))
        estimate = self._estimate(quantized.reshape(*sensors.valid.shape, -1, self.dim), train=False)
        return self._signal(estimate, sensors, scale)

    @nn.nowrap
    def scale(self, signal: Float[AnyArray, "B C T"], sensors: Sensors) -> Float[Array, "B C"]:
        """The 95th percentile of each channel's magnitude, plus 1e-8; that of zeros where it is not valid."""
        there = jnp.where(sensors.valid[..., None], jnp.asarray(signal, jnp.float32), 0)
        return jnp.quantile(jnp.abs(there), 0.95, axis=-1) + 1e-8

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        _, count = self.grid(channels, samples)
        bands, dim = self.bins // self.band, self.dim

        def transformer(depth: int, tokens: int) -> float:
            return LinearTransformer(depth, self.heads).flops(tokens, dim)

        frame = transformer(self.band_layers, bands) + 2 * bands * dim * (self.band + 2 * dim)
        frame += 2 * self.band * dim**2 + 2 * dim * (self.window + 1.5 * dim)
        frame += 2 * dim * (self.codes + dim + self.bins)
        return channels * (count * frame + transformer(self.frame_layers + self.decoder_layers, count))

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """One frame of one channel of one example."""
        blank = jnp.zeros((1, 1, 3))
        kind = jnp.full((1, 1), KINDS.index("eeg"))
        return jnp.zeros((1, 1, self.window)), Sensors(blank, blank, kind, kind, jnp.ones((1, 1), bool))

    def _masks(self, count: int) -> Bool[Array, "2 A F"]:
        """What the two passes of training see: bands and frames both kept, and all the rest."""
        bands = self.bins // self.band

        def kept(key: Array, length: int) -> Array:
            return jax.random.permutation(key, jnp.arange(length) >= int(self.masked * length))

        of_bands, of_frames = jax.random.split(self.make_rng("noise"))
        seen = kept(of_frames, count)[:, None] & jnp.repeat(kept(of_bands, bands), self.band)
        return jnp.stack([seen, ~seen])

    def _embed(
        self, spectrum: Float[Array, "B C A F"], signal: Float[Array, "B C T"], train: bool
    ) -> Float[Array, "B C A D"]:
        """What is quantised, before it is brought to length one."""
        bands = spectrum.reshape(*spectrum.shape[:3], -1, self.band)
        x = self.band_encoder(self.embed_bands(bands), train=train)
        groups = x.reshape(*x.shape[:3], -1, self.band * self.dim)
        groups = self.group_value(groups) * nn.sigmoid(self.group_gate(groups))
        frequency = jnp.swapaxes(groups, -1, -2).reshape(*x.shape[:3], -1)
        time = self.embed_samples(frames(signal, self.window, self.hop))
        x = jnp.concatenate([frequency, time], axis=-1)
        return self.frame_encoder(nn.with_logical_constraint(x, ("batch", None, None, None)), train=train)

    def _estimate(self, quantized: Float[Array, "B C A D"], train: bool) -> Float[Array, "B C A F"]:
        """The magnitude of the spectrum that codes stand for."""
        x = self.decoder(quantized, train=train)
        return self.head_out(jnp.tanh(self.head_in(x))).astype(jnp.float32)

    def _signal(self, estimate: Float[Array, "B C A F"], sensors: Sensors, scale: Any) -> Float[Array, "B C T"]:
        magnitude = jnp.maximum(jax.lax.stop_gradient(estimate), 0)
        magnitude = jnp.pad(magnitude, [(0, 0)] * 3 + [(0, self.window // 2 + 1 - self.bins)])
        signal = griffin_lim(magnitude, hann(self.window), self.hop, self.iterations)
        signal = jnp.where(sensors.valid[..., None], signal, 0)
        return signal if scale is None else signal * scale[..., None]

    def _check_options(self) -> None:
        groups, rest = divmod(self.bins, self.band**2)
        if rest or self.dim % (2 * groups) or self.dim % 4 or self.dim % self.heads:
            raise ZooError(
                "TFMTokenizer wants bins a multiple of band², and dim one of 2·bins/band², of 4 and of heads: "
                f"got bins {self.bins}, band {self.band}, dim {self.dim}, heads {self.heads}"
            )
        if self.window % self.hop or self.bins > self.window // 2 + 1:
            raise ZooError(
                "TFMTokenizer wants a hop that divides the window and at most window/2 + 1 bins: "
                f"got window {self.window}, hop {self.hop}, bins {self.bins}"
            )
        if not 0 <= self.masked < 1:
            raise ZooError(f"TFMTokenizer masked: got {self.masked}, wanted a share from 0 to below 1")


VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "tfm_tiny": (
        {
            "band_layers": 1,
            "frame_layers": 1,
            "decoder_layers": 2,
            "codes": 256,
            "commitment": 0.25,
            "kmeans": 10,
            "restart_below": 0.2,
        },
        243_476,
        "parity of its layers; learns waves: tests/tokenizers/test_tfm.py",
    ),
    "tfm_base": (
        {},
        641_812,
        "parity: codes equal, spectra and parameter gradients within 1e-5 (relative) of the official code, random "
        "weights: tests/parity/test_tfm_official.py",
    ),
}
"""Options, parameters, evidence. The official code counts 1,166,100, of which 524,288 are codes, no parameters here."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        TFMTokenizer,
        _options,
        Card(
            title=f"TFM-Tokenizer, {_parameters / 1e6:.2f} M parameters and {_options.get('codes', 8192):,} codes",
            paper="Pradeepkumar, Piao, Chen, Sun. Tokenizing Single-Channel EEG with Time-Frequency Motif Learning. "
            "arXiv 2502.16060",
            code="github.com/Jathurshan0330/TFM-Tokenizer",
            licence="MIT",
            inputs="EEG [B, C, 200 + 100·k] at 200 Hz, any unit, every channel by itself",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )


def _linear(source: str, target: str, how: str = "o i -> i o") -> tuple[Rule, ...]:
    return Key(f"{source}.weight", f"params/{target}/kernel", how), Key(f"{source}.bias", f"params/{target}/bias")


def _embedding(source: str, target: str) -> tuple[Rule, ...]:
    """Three of convolution, GELU, norm; a convolution of patches is a linear map of each, position by position."""
    rules: list[Rule] = []
    for layer in range(3):
        rules += _linear(f"{source}.{3 * layer}", f"{target}/linear_{layer + 1}", "o i w -> (w i) o")
        rules.append(Key(f"{source}.{3 * layer + 2}.weight", f"params/{target}/norm_{layer + 1}/scale"))
        rules.append(Key(f"{source}.{3 * layer + 2}.bias", f"params/{target}/norm_{layer + 1}/bias"))
    return tuple(rules)


KEYS: tuple[Rule, ...] = (
    *_embedding("freq_patch_embedding", "embed_bands"),
    *below(TRANSFORMER_KEYS, "band_encoder", "trans_freq_encoder.transformer."),
    *_linear("freq_patch_embedding_2_atten.0", "group_gate", "o i w -> (w i) o"),
    *_linear("freq_patch_embedding_2.0", "group_value", "o i w -> (w i) o"),
    *_embedding("temporal_patch_embedding", "embed_samples"),
    *below(TRANSFORMER_KEYS, "frame_encoder", "trans_temporal_encoder.transformer."),
    *below(TRANSFORMER_KEYS, "decoder", "trans_decoder.transformer."),
    *_linear("decoder.0", "head_in"),
    *_linear("decoder.2", "head_out"),
    Key("quantizer.embedding.weight", "codebooks/quantizer/embedding"),
    Key("quantizer.cluster_size", "codebooks/quantizer/usage"),
    Key("quantizer.ema_w", "codebooks/quantizer/sums"),
    Fresh("codebooks/quantizer/ready", "whether k-means has placed the codes, which is not published"),
)
"""Of what the official `tfm_tokenizer_token_learning.py` saves. No trained tokenizer is published."""
