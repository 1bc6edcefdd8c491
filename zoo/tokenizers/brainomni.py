"""BrainTokenizer, BrainOmni's tokenizer: EEG and MEG of any sensors → residual codes of a few latent sources.

Source: "BrainOmni: A Brain Foundation Model for Unified EEG and MEG Signals", NeurIPS 2025, 2505.18185, section 3.2,
and the official code (github.com/OpenTSLab/BrainOmni, MIT).

Input: EEG in volts, magnetometers in tesla, gradiometers in tesla per metre, 256 Hz, 0.1–96 Hz (recipe `brainomni`),
with the position of every sensor, and the orientation of MEG sensors. Each group of sensors (EEG, magnetometers,
gradiometers) is brought to its mean over channels as reference and divided by its deviation: official preprocessing
does so on segments of 10 s, here it is done on the window given. Windows of 512 samples become 8 frames of 16 latents.

What comes out: the decoder draws each channel of each window standardised, as it was trained to. `scale` is the mean
and deviation of every referenced channel in every window, so `decode` with it, and `Tokenized.reconstruction`, give the
signal in its units, less the mean over the channels of its group. That mean is not sent: it would be a waveform.

Where this differs from the official code:
- Sensors that are not valid, unknown in place (NaN; MEG: or in orientation), or of another kind take no part, and are
  reconstructed as 0. Ask `check_positions` first: inside a compiled function nothing can be refused. A group of a
  single channel has no reference taken off, which would leave zeros.
- Each example loses channels of its own in training (official: the batch loses the same), and keeps at least one.
  Shuffling the channels, as official training does, changes nothing here: order plays no part.
- Codes that die are really replaced, and codebooks do not shrink at first: `zoo.layers.quantizers.VectorQuantizer`. In
  the official code the update that follows takes replaced codes back, and sums begin as if of one vector a code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.errors import ZooError
from zoo.layers.parameters import merge_heads, partitioned, split_heads
from zoo.layers.quantizers import ResidualQuantizer, VectorQuantizer, unit
from zoo.layers.seanet import SEANetDecoder, SEANetEncoder, check_seanet, seanet_flops
from zoo.layers.sensor_embedding import EMBEDDED, SensorEmbedding, described
from zoo.objectives.signal import mean_absolute, pearson, spectrum
from zoo.registry import Card, register
from zoo.tokenizers.tokenizer import Tokenizer
from zoo.types import AnyArray, Array, Sensors, Tokenized


class BrainTokenizer(Tokenizer):
    """The tokenizer. Rows are latents, frames those of window after window.

    window, overlap         samples of a window; share of it that the next one covers too. Without overlap a signal is
                            whole windows; with overlap its tail is filled up with zeros, and `decode`, which averages
                            where windows overlap, gives the filled-up length
    filters, ratios, width  of the convolutions: `zoo.layers.seanet`
    dim, heads, latents     features, attention heads, latent sources
    codes, levels           codes of a codebook, residual codebooks
    learning, decay, smoothing, commitment, estimator, kmeans, kmeans_rows, restart_below
                            of the codebooks: `zoo.layers.quantizers.VectorQuantizer`
    removed, noise          in training, the share of channels (rounded down, at least one) and the deviation of the
                            noise by which the encoder's input is less than what is to be reconstructed
    floors                  added to the deviations of EEG, magnetometers and gradiometers, in the signal's units. The
                            published ones are for V, T and T/m, and 10 µV is as much as quiet EEG has
    spread                  of the first weights of sensor embedding and attention
    dtype                   of convolutions and attention; parameters, softmax, states and codebooks stay float32
    """

    TAKES = EMBEDDED
    CHANNEL_ROWS = False

    window: int = 512
    overlap: float = 0.0
    filters: int = 32
    ratios: tuple[int, ...] = (2, 4, 8)
    width: int = 5
    dim: int = 256
    heads: int = 4
    latents: int = 16
    codes: int = 512
    levels: int = 4
    learning: str = "ema"
    decay: float = 0.99
    smoothing: float = 1e-6
    commitment: float = 0.25
    estimator: str = "rotation"
    kmeans: int = 10
    kmeans_rows: int = 4096
    restart_below: float = 2.0
    removed: float = 0.25
    noise: float = 0.1
    floors: tuple[float, float, float] = (1e-5, 1e-13, 1e-13)
    spread: float = 0.02
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self._check_options()
        options: dict[str, Any] = {"filters": self.filters, "ratios": self.ratios, "width": self.width}
        self.sensor_embedding = SensorEmbedding(self.dim, self.spread)
        self.encoder = SEANetEncoder(self.dim, **options, dtype=self.dtype)
        self.decoder = SEANetDecoder(self.dim, **options, dtype=self.dtype)
        neurons = partitioned(nn.initializers.normal(1.0), None, "embed")
        self.neurons = self.param("neurons", neurons, (self.latents, self.dim))
        heads, width = self.heads, self.dim // self.heads
        projection: dict[str, Any] = {"bias": True, "init": nn.initializers.normal(self.spread), "dtype": self.dtype}
        self.to_key = split_heads(self.dim, heads, width, **projection)
        self.to_value = split_heads(self.dim, heads, width, **projection)
        self.to_latents = merge_heads(heads, width, self.dim, **projection)
        self.from_key = split_heads(self.dim, heads, width, **projection)
        self.from_value = split_heads(self.dim, heads, width, **projection)
        self.to_channels = merge_heads(heads, width, self.dim, **projection)
        book = VectorQuantizer(
            self.codes,
            self.dim,
            learning=self.learning,
            decay=self.decay,
            smoothing=self.smoothing,
            commitment=self.commitment,
            estimator=self.estimator,
            kmeans=self.kmeans,
            kmeans_rows=self.kmeans_rows,
            restart_below=self.restart_below,
        )
        self.quantizer = ResidualQuantizer(book, self.levels, gradient="each")

    @property
    def sampling_rate(self) -> float:
        return 256.0

    @property
    def code_sizes(self) -> tuple[int, ...]:
        return (self.codes,) * self.levels

    @property
    def loss_weights(self) -> Mapping[str, float]:
        weights = {"waveform": 1.0, "correlation": 1.0, "amplitude": 1.0, "phase": 0.5, "commitment": 1.0}
        return {**weights, "codebook": 1.0} if self.learning == "gradient" else weights

    @nn.nowrap
    def grid(self, channels: int, samples: int) -> tuple[int, int]:
        if samples < self.window or (not self.overlap and samples % self.window):
            wanted = f"at least {self.window}" if self.overlap else f"a multiple of {self.window}"
            raise ZooError(f"BrainTokenizer: got a signal of {samples} samples, wanted {wanted}")
        return self.latents, self._windows(samples) * self._frames()

    def __call__(self, signal: Float[AnyArray, "B C T"], sensors: Sensors, *, train: bool = False) -> Tokenized:
        """Codes and reconstruction; terms of the loss: waveform L1, exp(−r), and amplitude and phase L1 of windows.

        The reconstruction is in the signal's units, about the mean over the channels of a group (see above). Terms
        compare standardised windows of all channels. Spectra are those of Hamming windows, orthonormal; phases are
        compared as published, by |difference|, which jumps at ±π.
        """
        windows, size = self._windowed(signal, sensors)
        target, mean, deviation = _standardised(windows)
        here = described(sensors)
        given, there = windows, here
        if train:
            given = given + self.noise * jax.random.normal(self.make_rng("noise"), given.shape)
            there = _kept(self.make_rng("noise"), here, self.removed)
        embedding = self.sensor_embedding(sensors)
        valid = self.token_valid(sensors, signal.shape[-1])
        found = self.quantizer(self._latents(given, embedding, there), valid=valid, train=train)
        drawn = self._drawn(found.quantized, embedding)
        rows = jnp.broadcast_to(here[:, :, None], drawn.shape[:3])
        amplitude, phase = _spectrum(drawn)
        true_amplitude, true_phase = _spectrum(target)
        losses = {
            "waveform": mean_absolute(drawn, target, rows),
            "correlation": jnp.exp(-pearson(drawn, target, rows)),
            "amplitude": mean_absolute(amplitude, true_amplitude, rows),
            "phase": mean_absolute(phase, true_phase, rows),
            **found.losses,
        }
        reconstruction = self._joined(drawn, here, _scale(mean, deviation, size))[..., : signal.shape[-1]]
        return Tokenized(found.codes, found.quantized, reconstruction, losses, valid)

    def encode(self, signal: Float[AnyArray, "B C T"], sensors: Sensors) -> Int[Array, "B N Q"]:
        windows, _ = self._windowed(signal, sensors)
        latents = self._latents(windows, self.sensor_embedding(sensors), described(sensors))
        return self.quantizer(latents, valid=self.token_valid(sensors, signal.shape[-1])).codes

    def decode(self, codes: Int[AnyArray, "B N Q"], sensors: Sensors, scale: Any = None) -> Float[Array, "B C T"]:
        """What codes say of these sensors; without a scale they need not be those that were encoded."""
        drawn = self._drawn(self.quantizer.decode(jnp.asarray(codes)), self.sensor_embedding(sensors))
        return self._joined(drawn, described(sensors), scale)

    @nn.nowrap
    def scale(self, signal: Float[AnyArray, "B C T"], sensors: Sensors) -> dict[str, Float[Array, "B C W"]]:
        """mean and deviation of each referenced channel in each window, in the signal's units."""
        windows, size = self._windowed(signal, sensors)
        return _scale(*_standardised(windows)[1:], size)

    @nn.nowrap
    def token_valid(self, sensors: Sensors, samples: int) -> Bool[Array, "B N"]:
        return super().token_valid(dataclasses.replace(sensors, valid=described(sensors)), samples)

    @nn.nowrap
    def check_positions(self, sensors: Sensors) -> None:
        lost = np.argwhere(np.asarray(sensors.valid) & ~np.asarray(described(sensors)))
        if len(lost):
            raise ZooError(
                f"BrainTokenizer: channel {lost[0, 1]} of example {lost[0, 0]} ({len(lost)} in all) is not of "
                f"{', '.join(EMBEDDED)}, or without a known position (MEG: or orientation), which it reads"
            )

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        count, dim = self._windows(samples), self.dim
        frames = count * self._frames()
        rows = channels * count
        convolutions = 2 * rows * seanet_flops(dim, self.filters, self.ratios, self.width, self.window)
        projections = 2 * dim**2 * frames * 3 * (channels + self.latents)
        attention = 8 * self.latents * channels * frames * dim
        embedding = 2 * channels * (3 * dim + 8.5 * dim**2)
        codes = 2 * self.latents * frames * self.levels * self.codes * dim
        return convolutions + projections + attention + embedding + codes

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        blank, one = jnp.zeros((1, 1, 3)), jnp.zeros((1, 1), jnp.int32)
        return jnp.zeros((1, 1, self.window)), Sensors(blank, blank, one, one, jnp.ones((1, 1), bool))

    def _latents(
        self, windows: Float[Array, "B C W L"], embedding: Float[Array, "B C D"], there: Bool[Array, "B C"]
    ) -> Float[Array, "B N D"]:
        """Unit vectors, latent by latent, of the channels that are there."""
        batch, channels, _, samples = windows.shape
        x = self.encoder(windows.reshape(-1, samples)).reshape(batch, channels, -1, self.dim)
        x = nn.with_logical_constraint(x, ("batch", None, None, None))
        key = self.to_key(x + embedding[:, :, None].astype(x.dtype))
        query = jnp.broadcast_to(self.neurons, (batch, *self.neurons.shape))
        mixed = self._attended(query, key, self.to_value(x), there)
        return unit(self.to_latents(mixed).astype(jnp.float32)).reshape(batch, -1, self.dim)

    def _drawn(self, quantized: Float[Array, "B N D"], embedding: Float[Array, "B C D"]) -> Float[Array, "B C W L"]:
        """Standardised windows of the channels that the embedding describes."""
        batch, channels = embedding.shape[:2]
        latents = quantized.reshape(batch, self.latents, -1, self.dim)
        x = self.to_channels(self._attended(embedding, self.from_key(latents), self.from_value(latents)))
        x = nn.with_logical_constraint(x, ("batch", None, None, None))
        rows = self.decoder(x.reshape(-1, self._frames(), self.dim))
        return rows.astype(jnp.float32).reshape(batch, channels, -1, self.window)

    def _attended(self, query: Array, key: Array, value: Array, there: Array | None = None) -> Array:
        """Each query [B, R, D] over the sources [B, S, F, H, K] that are there, frame by frame: [B, R, F, H, K]."""
        query = query.astype(self.dtype).reshape(*query.shape[:2], *key.shape[3:])
        logits = jnp.einsum("brhk,bsfhk->bfhrs", query, key).astype(jnp.float32) * key.shape[-1] ** -0.5
        if there is not None:
            logits = jnp.where(there[:, None, None, None], logits, jnp.finfo(jnp.float32).min)
        weight = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        return jnp.einsum("bfhrs,bsfhk->brfhk", weight, value)

    @nn.nowrap
    def _windowed(
        self, signal: Float[AnyArray, "B C T"], sensors: Sensors
    ) -> tuple[Float[Array, "B C W L"], Float[Array, "B C 1"]]:
        """Windows of the referenced signal, each group of sensors over its deviation; and that deviation."""
        self.grid(*signal.shape[1:])
        here, kind = described(sensors), jnp.asarray(sensors.kind)
        signal = jnp.where(here[..., None], signal, 0).astype(jnp.float32)
        windowed, size = jnp.zeros_like(signal), jnp.ones((*kind.shape, 1))
        for index, floor in enumerate(self.floors):
            group = (here & (kind == index))[..., None]
            count = group.sum(1, keepdims=True)
            over = jnp.where(group, signal, 0).sum(1, keepdims=True)
            reference = jnp.where(count > 1, over / jnp.maximum(count, 1), over.mean(-1, keepdims=True))
            centred = jnp.where(group, signal - reference, 0)
            square = jnp.square(centred).mean(-1, keepdims=True).sum(1, keepdims=True)
            deviation = jnp.sqrt(square / jnp.maximum(count, 1)) + floor
            windowed, size = windowed + centred / deviation, jnp.where(group, deviation, size)
        starts = [number * self._hop() for number in range(self._windows(signal.shape[-1]))]
        padded = jnp.pad(windowed, ((0, 0), (0, 0), (0, starts[-1] + self.window - signal.shape[-1])))
        return jnp.stack([padded[..., start : start + self.window] for start in starts], axis=2), size

    @nn.nowrap
    def _joined(
        self, windows: Float[Array, "B C W L"], here: Bool[Array, "B C"], scale: Mapping[str, Array] | None
    ) -> Float[Array, "B C T"]:
        """The signal of the windows, their mean where they overlap; standardised where there is no scale."""
        if scale is not None:
            windows = windows * scale["deviation"][..., None] + scale["mean"][..., None]
        batch, channels, count, _ = windows.shape
        places = np.arange(count)[:, None] * self._hop() + np.arange(self.window)
        total = jnp.zeros((batch, channels, places.max() + 1)).at[..., places].add(windows)
        return jnp.where(here[..., None], total / np.bincount(places.ravel()), 0)

    @nn.nowrap
    def _windows(self, samples: int) -> int:
        return 1 - (self.window - samples) // self._hop()

    @nn.nowrap
    def _hop(self) -> int:
        return int(self.window * (1 - self.overlap))

    @nn.nowrap
    def _frames(self) -> int:
        """Frames of one window."""
        return self.window // math.prod(self.ratios)

    def _check_options(self) -> None:
        check_seanet(self.ratios, self.width, self.window)
        if self.dim % (2 * self.heads):
            raise ZooError(f"BrainTokenizer dim: got {self.dim}, wanted a multiple of twice its {self.heads} heads")
        for name in ("overlap", "removed"):
            if not 0 <= getattr(self, name) < 1:
                raise ZooError(f"BrainTokenizer {name}: got {getattr(self, name)}, wanted 0 or more, below 1")


def _kept(key: Array, here: Bool[Array, "B C"], removed: float) -> Bool[Array, "B C"]:
    """The channels that training leaves to the encoder."""
    if not removed:
        return here
    count = here.sum(1, keepdims=True)
    gone = jnp.minimum(jnp.maximum(jnp.floor(removed * count), 1), count - 1)
    drawn = jnp.where(here, jax.random.uniform(key, here.shape), jnp.inf)
    return here & (jnp.argsort(jnp.argsort(drawn, axis=1), axis=1) >= gone)


def _standardised(
    windows: Float[Array, "B C W L"],
) -> tuple[Float[Array, "B C W L"], Float[Array, "B C W"], Float[Array, "B C W"]]:
    """Windows with mean 0 and deviation 1, each on its own; the means and the deviations."""
    mean = windows.mean(-1)
    deviation = windows.std(-1, ddof=1) + 1e-6
    return (windows - mean[..., None]) / deviation[..., None], mean, deviation


def _scale(mean: Array, deviation: Array, size: Array) -> dict[str, Array]:
    return {"mean": mean * size, "deviation": deviation * size}


def _spectrum(windows: Float[Array, "B C W L"]) -> tuple[Float[Array, "B C W F"], Float[Array, "B C W F"]]:
    """Amplitude and phase of the one-sided orthonormal transform of Hamming windows."""
    samples = windows.shape[-1]
    taper = 0.54 - 0.46 * np.cos(2 * np.pi * np.arange(samples) / samples)
    amplitude, phase = spectrum(windows * taper)
    half = slice(samples // 2 + 1)
    return amplitude[..., half] / samples**0.5, phase[..., half]


_PARITY = (
    "parity: codes equal, reconstruction within 1e-5 and gradients within 1e-4 (relative) of the official code, with "
    "random weights at a small size"
)

VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "braintokenizer_base": ({}, 5_050_338, _PARITY),
    "braintokenizer_tiny": ({"filters": 8, "dim": 64, "codes": 256, "spread": 0.125}, 319_866, "parity of its layers"),
}
"""Options, parameters (codebooks follow averages and do not count), evidence. tiny is ours: with the published spread
of first weights its latents would begin as one vector, and stay so for hundreds of steps."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        BrainTokenizer,
        _options,
        Card(
            title=f"BrainTokenizer of BrainOmni, {_parameters / 1e6:.1f} M parameters",
            paper="BrainOmni: A Brain Foundation Model for Unified EEG and MEG Signals. NeurIPS 2025, arXiv 2505.18185",
            code="https://github.com/OpenTSLab/BrainOmni",
            licence="MIT",
            inputs="EEG (V), magnetometers (T), gradiometers (T/m) [B, C, W·512] at 256 Hz, 0.1–96 Hz; positions (m), "
            "and orientations of MEG sensors",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
