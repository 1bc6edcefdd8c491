"""DeWave: EEG of reading as a sequence of codes, one for each word looked at, or one for each stretch of raw waves.

Source: Duan et al., "DeWave: Discrete EEG Waves Encoding for Brain Dynamics to Text Translation", 2309.14030, NeurIPS
2023. There is no official code. From the paper: the two inputs, the codex (2048 codes of 512 numbers, nearest by L2,
straight-through gradient), its loss |sg(z) − e|² + beta |z − sg(e)|², the contrastive alignment of quantized vectors
and word embeddings, and that the raw path learns to rebuild its waves through the codex.

Ours, as the paper is silent: depths, heads and widths; beta 0.25; a codex that follows averages (decay 0.99, which
replaces the first of the two terms) and replaces codes used less than once in twenty batches, as a sentence has fewer
words than the codex has codes; k-means on the first batch; rotary positions; layer norms where Conformers have batch
norms, so that examples do not mix; a decoder for both paths, two layers and a linear map from each code to its word's
features or its stretch of waves; temperature 0.07 between vectors of unit length.

The paper goes on from codes to text with BART. That part is not here yet, and nothing here says that it works: its
published scores were computed with teacher forcing, and its table looks alike for all people, which is the mark of a
language model that does without EEG (2405.06459). What can be tested here is retrieval: `TextAligned` with the true
words, with shuffled ones, and with noise in place of EEG.

Input: `DeWaveWord` takes features of words, [B, C, words · bands]: element w · bands + b of a channel is its power in
band b while word w was looked at (ZuCo: 8 bands of 105 channels, 840 numbers a word). Word boundaries are thus given,
by eye tracking. A word whose features are all zero is padding and has code −1. `DeWaveRaw` takes waves [B, C, T] at
500 Hz. Both want all channels, in one order, standardised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.errors import ZooError
from zoo.layers.conformer import Stack
from zoo.layers.parameters import dense, fan_in, partitioned
from zoo.layers.quantizers import VectorQuantizer
from zoo.objectives.contrast import info_nce, similarities
from zoo.objectives.signal import mean_square
from zoo.registry import Card, register
from zoo.tokenizers.tokenizer import Tokenizer
from zoo.types import AnyArray, Array, Sensors, Tokenized


class DeWave(Tokenizer):
    """What both paths share: an encoder, the codex, a decoder. Tokens are one row of A frames, Q = 1.

    channels        C, all of them in one order
    dim             D, also of the codes
    depth, decoder_depth, heads, hidden, dropout
                    layers, attention heads, width of feed-forward parts
    kernel          of the Conformer's convolution over tokens (2005.08100), odd; 0 makes layers a transformer's
    codes, learning, decay, commitment, restart_below, kmeans
                    of the codex, see `VectorQuantizer`; with learning "gradient" codes follow the paper's first term

    Losses: reconstruction (mean square), commitment and, with learning "gradient", codebook.
    """

    TAKES = ("eeg",)
    CHANNEL_ROWS = False
    ORDER_FREE = False
    channels: int = 105
    dim: int = 512
    depth: int = 6
    decoder_depth: int = 2
    heads: int = 8
    hidden: int = 2048
    kernel: int = 0
    dropout: float = 0.1
    codes: int = 2048
    learning: str = "ema"
    decay: float = 0.99
    commitment: float = 0.25
    restart_below: float = 0.05
    kmeans: int = 10
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        if self.dim % self.heads:
            raise ZooError(f"{type(self).__name__}: dim {self.dim} does not divide into {self.heads} heads")
        if self.kernel and self.kernel % 2 == 0:
            raise ZooError(f"{type(self).__name__} kernel: got {self.kernel}, wanted an odd number, or 0")
        options = (self.heads, self.hidden, self.kernel, self.dropout, self.dtype)
        self.embed = self._embedding()
        self.encoder = Stack(self.depth, options)
        self.codex = VectorQuantizer(
            self.codes,
            self.dim,
            learning=self.learning,
            decay=self.decay,
            commitment=self.commitment,
            kmeans=self.kmeans,
            restart_below=self.restart_below,
        )
        self.decoder = Stack(self.decoder_depth, options)
        self.out = dense(self.channels * self.frame, ("embed", None), bias=True)

    @property
    def frame(self) -> int:
        """Samples a token."""
        raise NotImplementedError

    @property
    def code_sizes(self) -> tuple[int, ...]:
        return (self.codes,)

    @property
    def loss_weights(self) -> Mapping[str, float]:
        names = ("reconstruction", "commitment") + (("codebook",) if self.learning == "gradient" else ())
        return dict.fromkeys(names, 1.0)

    @nn.nowrap
    def grid(self, channels: int, samples: int) -> tuple[int, int]:
        name = type(self).__name__
        if channels != self.channels:
            raise ZooError(f"{name}: got {channels} channels, wanted {self.channels} (option channels)")
        if samples < self.frame or samples % self.frame:
            raise ZooError(f"{name}: got a window of {samples} samples, wanted a multiple of {self.frame}")
        return 1, samples // self.frame

    @nn.nowrap
    def check_recording(self, rate_hz: float, kinds: Sequence[str], names: Sequence[str]) -> None:
        super().check_recording(rate_hz, kinds, names)
        if len(names) != self.channels:
            raise ZooError(f"{type(self).__name__}: got {len(names)} channels, wanted {self.channels}")

    def __call__(self, signal: Float[AnyArray, "B C T"], sensors: Sensors, *, train: bool = False) -> Tokenized:
        valid = jnp.asarray(sensors.valid)
        here = self.token_valid(sensors, signal.shape[-1])
        signal = jnp.where(valid[..., None], jnp.asarray(signal, jnp.float32), 0)
        frames = jnp.moveaxis(signal, 1, 2).reshape(signal.shape[0], -1, self.frame, self.channels)
        here = self._present(frames, here)
        x = self.encoder(self.embed(frames).astype(self.dtype), here, train=train)
        found = self.codex(x.astype(jnp.float32), valid=here, train=train)
        reconstruction = self._rebuilt(found.quantized, here, valid, train=train)
        counted = valid[..., None] & jnp.repeat(here, self.frame, axis=1)[:, None]
        losses = {"reconstruction": mean_square(reconstruction, signal, counted), **found.losses}
        return Tokenized(found.codes, found.quantized, reconstruction, losses, here)

    def decode(self, codes: Int[AnyArray, "B N Q"], sensors: Sensors, scale: Any = None) -> Float[Array, "B C T"]:
        codes = jnp.asarray(codes)
        return self._rebuilt(self.codex.decode(codes), codes[..., 0] >= 0, jnp.asarray(sensors.valid))

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        tokens = samples // self.frame
        mlp, dim = 4.0 * self.dim * self.hidden, self.dim
        layer = 8.0 * dim**2 + 4 * tokens * dim + mlp
        if self.kernel:
            layer += mlp + 6 * dim**2 + 2 * self.kernel * dim
        ends = 2 * dim * (self.codes + channels * self.frame)
        return tokens * (self._embedding_flops() + (self.depth + self.decoder_depth) * layer + ends)

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        blank, one = jnp.zeros((1, self.channels, 3)), jnp.zeros((1, self.channels), jnp.int32)
        sensors = Sensors(blank, blank, one, one, jnp.ones((1, self.channels), bool))
        return jnp.ones((1, self.channels, self.frame)), sensors

    def _rebuilt(
        self, quantized: Float[Array, "B N D"], here: Bool[Array, "B N"], valid: Bool[Array, "B C"], train: bool = False
    ) -> Float[Array, "B C T"]:
        x = self.decoder(quantized.astype(self.dtype), here, train=train)
        frames = self.out(x.astype(jnp.float32)).reshape(x.shape[0], -1, self.channels)
        counted = valid[..., None] & jnp.repeat(here, self.frame, axis=1)[:, None]
        return jnp.where(counted, jnp.moveaxis(frames, 1, 2), 0)

    def _embedding(self) -> Any:
        """Frames [B, N, frame, C] → [B, N, D]."""
        raise NotImplementedError

    def _embedding_flops(self) -> float:
        """Of a token."""
        raise NotImplementedError

    def _present(self, frames: Float[Array, "B N P C"], here: Bool[Array, "B N"]) -> Bool[Array, "B N"]:
        """Which tokens there are, of those in examples with a valid channel."""
        return here


class DeWaveWord(DeWave):
    """Features of words → one code a word; transformer layers.

    bands  numbers a word and channel
    """

    bands: int = 8

    @property
    def frame(self) -> int:
        return self.bands

    def _embedding(self) -> Any:
        return WordEmbedding(self.dim)

    def _embedding_flops(self) -> float:
        return 2.0 * self.channels * self.bands * self.dim

    def _present(self, frames: Float[Array, "B N P C"], here: Bool[Array, "B N"]) -> Bool[Array, "B N"]:
        return here & (frames != 0).any((-2, -1))


class DeWaveRaw(DeWave):
    """Waves → one code for each product-of-strides samples (80, 0.16 s); convolutions, then Conformer layers.

    kernels, strides  of the convolutions, each of D features, as in wav2vec 2.0 (2006.11477) but fewer
    rate_hz           of its windows; None for any
    """

    kernels: tuple[int, ...] = (10, 3, 3, 3, 2)
    strides: tuple[int, ...] = (5, 2, 2, 2, 2)
    kernel: int = 31
    rate_hz: float | None = 500.0

    @property
    def sampling_rate(self) -> float | None:
        return self.rate_hz

    @property
    def frame(self) -> int:
        return math.prod(self.strides)

    def _embedding(self) -> Any:
        sizes = tuple(zip(self.kernels, self.strides, strict=False))
        if len(self.kernels) != len(self.strides) or any(kernel < stride for kernel, stride in sizes):
            raise ZooError(
                f"DeWaveRaw: got kernels {self.kernels} for strides {self.strides}, wanted one each, none smaller"
            )
        return WaveEmbedding(self.dim, sizes, self.dtype)

    def _embedding_flops(self) -> float:
        total, inputs, steps = 0.0, self.channels, self.frame
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            steps //= stride
            total, inputs = total + 2.0 * steps * kernel * inputs * self.dim, self.dim
        return total


class WordEmbedding(nn.Module):
    """All numbers of a word, [B, N, bands, C] → [B, N, D], by one linear map."""

    dim: int

    @nn.compact
    def __call__(self, frames: Float[Array, "B N P C"]) -> Float[Array, "B N D"]:
        return dense(self.dim, (None, "embed"), bias=True, name="linear")(frames.reshape(*frames.shape[:2], -1))


class WaveEmbedding(nn.Module):
    """Strided convolutions, each with GELU, over time: [B, N, frame, C] → [B, N, D].

    Each is padded with kernel − stride zeros, so that a token has a whole number of samples.
    """

    dim: int
    sizes: tuple[tuple[int, int], ...]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, frames: Float[Array, "B N P C"]) -> Float[Array, "B N D"]:
        x = frames.reshape(frames.shape[0], -1, frames.shape[-1])
        for n, (kernel, stride) in enumerate(self.sizes):
            before = (kernel - stride) // 2
            x = nn.Conv(
                self.dim,
                (kernel,),
                strides=(stride,),
                padding=[(before, kernel - stride - before)],
                kernel_init=partitioned(fan_in((0, 1), (2,)), None, None, None),
                bias_init=partitioned(nn.initializers.zeros, None),
                dtype=self.dtype,
                name=f"conv{n + 1}",
            )(x)
            x = nn.gelu(x, approximate=False)
        return x


class TextAligned(nn.Module):
    """A tokenizer of words whose quantized vectors, through a linear map, are drawn to the words' embeddings.

    width        of the embeddings; 1024 are those of BART-large
    temperature  of the contrast
    """

    tokenizer: DeWaveWord
    width: int = 1024
    temperature: float = 0.07

    def setup(self) -> None:
        self.to_text = dense(self.width, ("embed", None), bias=True)

    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        words: Float[AnyArray, "B N E"],
        *,
        train: bool = False,
    ) -> Tokenized:
        """The tokenizer's own, with `contrast` among its losses; words [B, N, E] embeds the word of each token.

        It is −mean over tokens i of log softmax_j(s_ij / temperature) at j = i, over all words of the batch. A word
        that occurs twice competes with itself.
        """
        out = self.tokenizer(signal, sensors, train=train)
        tokens = self.to_text(out.quantized).reshape(-1, self.width)
        logits = similarities(tokens, jnp.reshape(words, (-1, self.width))) / self.temperature
        contrast = info_nce(logits, out.valid.reshape(-1))
        losses = {**out.losses, "contrast": contrast}
        return Tokenized(out.codes, out.quantized, out.reconstruction, losses, out.valid)

    def aligned(self, signal: Float[AnyArray, "B C T"], sensors: Sensors) -> Float[Array, "B N E"]:
        """Each token where its word's embedding should be."""
        return self.to_text(self.tokenizer(signal, sensors).quantized)


_TINY = {"dim": 64, "depth": 2, "decoder_depth": 1, "heads": 4, "hidden": 256, "codes": 256}
VARIANTS: dict[str, tuple[type[DeWave], dict[str, Any], int]] = {
    "dewave_word": (DeWaveWord, {}, 26_082_632),
    "dewave_word_tiny": (DeWaveWord, _TINY, 258_632),
    "dewave_raw": (DeWaveRaw, {}, 56_219_344),
    "dewave_raw_tiny": (DeWaveRaw, {**_TINY, "kernels": (10, 3, 3), "strides": (5, 2, 2), "kernel": 15}, 519_988),
}
"""Class, options, parameters. tiny is ours; of the others the codex is the paper's, the rest our choice."""

for _name, (_class, _options, _parameters) in VARIANTS.items():
    _word = _class is DeWaveWord
    register(
        _name,
        _class,
        _options,
        Card(
            title=f"DeWave for {'features of words' if _word else 'raw waves'}, {_parameters / 1e6:.1f} M parameters",
            paper="DeWave, arXiv 2309.14030, NeurIPS 2023",
            code="none official",
            licence="none: written from the paper",
            inputs="EEG of reading: "
            + ("band features [B, 105, words · 8], word by word" if _word else "waves [B, 105, T · 80] at 500 Hz")
            + ", standardised; other montages by the option channels",
            parameters=_parameters,
            evidence="made data only (tests/tokenizers/test_dewave.py): waves rebuilt through a codex that is in use; "
            "words told apart by their own EEG, and not by shuffled pairs or noise; no published number is reproduced",
        ),
    )
