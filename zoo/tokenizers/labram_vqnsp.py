"""VQ-NSP, LaBraM's tokenizer: one code for each second of each electrode, learned by predicting its Fourier spectrum.

Source: Jiang, Zhao and Lu, "Large Brain Model for Learning Generic Representations with Tremendous EEG Data in BCI",
ICLR 2024, §2.2 ("vector-quantized neural spectrum prediction"), and the official code (github.com/935963004/LaBraM,
MIT).

Input: EEG at 200 Hz, 0.1–75 Hz, mains notched, microvolt / 100 (recipe `labram`), cut into patches of 200 samples.

The encoder is LaBraM's, but with biases of queries and values, without layer-normalised queries and keys, and without
residual scales; the decoder is three more layers of it over the codes' vectors. Two heads predict the amplitude and
the phase of the 200 bins of each patch, each standardised over the channels, patches and bins of its example. Phase is
predicted as a number, so it is punished for wrapping at ±π, and its error is large by design: read the two apart.

What the paper has not: a signal again. `scale` gives the mean and deviation of amplitude and of phase, four numbers an
example, and with them `decode` inverts the predicted spectrum (its real part; predicted amplitudes below 0 count as
0). Without them the least amplitude predicted in an example counts as 0, phases as spread evenly over the circle (mean
0, deviation π/√3), and the signal is brought to mean 0 and deviation 1 over the example's channels.

Where this differs from the official code: samples of channels that are not valid are never read, and neither their
tokens nor their bins count; an example with a channel that the electrode table does not know, or with a sample that is
not finite, has no codes at all (−1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from zoo.encoders.labram import ROWS, block_keys, conv_keys, electrode_rows, linear_keys, norm_keys, table_keys
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias, norm
from zoo.layers.patch_transformer import TemporalConv
from zoo.objectives.signal import from_spectrum, mean_square, spectrum, standardised_where
from zoo.registry import Card, register
from zoo.sensors import LABRAM_NAMES
from zoo.tokenizers.spectral import SpectralTokenizer, token_valid
from zoo.types import AnyArray, Array, Sensors, Tokenized
from zoo.weights.keys import Ignore, Key, Rule, below


class LaBraMVQNSP(SpectralTokenizer):
    """The tokenizer. Q = 1. Fields beside those of `SpectralTokenizer`:

    code_dim        64 in the published command, 32 in the published code's default
    per_patch_norm  the embedding's group norms see each patch alone, not all of the example as published

    Losses: amplitude and phase, mean squared errors of the standardised spectra over all bins, and commitment.
    """

    ELECTRODES: ClassVar[tuple[str, ...]] = LABRAM_NAMES[: ROWS - 1]

    per_patch_norm: bool = False

    def setup(self) -> None:
        self.check_options()
        self.embed_patch = TemporalConv(self.conv_features, self.per_patch_norm, self.dtype, like_torch=True)
        self.encoder, self.decoder = (
            self.transformer(depth, qk_norm=False, electrodes=ROWS) for depth in (self.depth, self.decoder_depth)
        )
        self.encoder_norm, self.decoder_norm = norm("layer", dtype=self.dtype), norm("layer", dtype=self.dtype)
        self.code_head = self.head(self.code_dim)
        self.quantizer = self.book()
        self.embed_code = dense(
            self.dim, (None, "embed"), bias=True, init=LIKE_TORCH, bias_init=like_torch_bias(self.code_dim)
        )
        self.amplitude_head, self.phase_head = self.head(self.patch), self.head(self.patch)

    @property
    def code_sizes(self) -> tuple[int, ...]:
        return (self.codes,)

    @property
    def loss_weights(self) -> Mapping[str, float]:
        names = ("amplitude", "phase", "commitment") + ("codebook",) * (self.learning == "gradient")
        return dict.fromkeys(names, 1.0)

    def __call__(self, signal: Float[AnyArray, "B C T"], sensors: Sensors, *, train: bool = False) -> Tokenized:
        patches, valid = self.patches(signal, sensors)
        features = self.encoder(self.embed_patch(patches, valid), _rows(sensors), sensors.valid, train=train)
        features = self.code_head(self.encoder_norm(features).astype(jnp.float32))
        known = valid & jnp.isfinite(features).all(-1)
        found = self.quantizer(features, valid=known, train=train)

        predicted = self._spectra(found.quantized, sensors, train)
        true, scale = _standardised_spectra(patches, valid)
        losses = {
            name: mean_square(prediction, truth, valid)
            for name, prediction, truth in zip(("amplitude", "phase"), predicted, true, strict=True)
        }
        reconstruction = _signal(predicted, valid, scale).reshape(signal.shape)
        return Tokenized(found.codes, found.quantized, reconstruction, {**losses, **found.losses}, valid)

    def decode(self, codes: Int[AnyArray, "B N Q"], sensors: Sensors, scale: Any = None) -> Float[Array, "B C T"]:
        """scale [B, 4]: what `scale` gives; None for a standardised signal."""
        valid = token_valid(codes, sensors)
        predicted = self._spectra(self.quantizer.decode(jnp.asarray(codes)), sensors, False)
        return _signal(predicted, valid, scale).reshape(*sensors.valid.shape, -1)

    @nn.nowrap
    def scale(self, signal: Float[AnyArray, "B C T"], sensors: Sensors) -> Float[Array, "B 4"]:
        """[B, 4]: mean and deviation of amplitude, mean and deviation of phase, over an example's bins."""
        return _standardised_spectra(*self.patches(signal, sensors))[1]

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        rows, frames = self.grid(channels, samples)
        tokens, steps = rows * frames, self.patch // 8
        conv = steps * (15 * self.conv_features + 2 * 3 * self.conv_features**2)
        heads = self.dim * (3 * self.dim + 2 * self.code_dim + 2 * self.patch) + self.codes * self.code_dim
        layers = sum(self.transformer(depth).flops(tokens, self.dim) for depth in (self.depth, self.decoder_depth))
        return layers + 2.0 * tokens * (conv + heads)

    def _spectra(
        self, quantized: Float[Array, "B N D"], sensors: Sensors, train: bool
    ) -> tuple[Float[Array, "B N P"], Float[Array, "B N P"]]:
        """Predicted amplitude and phase, standardised, of each patch."""
        x = self.embed_code(quantized).astype(self.dtype)
        x = self.decoder_norm(self.decoder(x, _rows(sensors), sensors.valid, train=train)).astype(jnp.float32)
        return self.amplitude_head(x), self.phase_head(x)


def _rows(sensors: Sensors) -> Int[Array, "B C"]:
    """Row of the electrode table for each channel, −1 where it has none."""
    rows = electrode_rows(sensors)
    return jnp.where(rows > 0, rows, -1)


def _standardised_spectra(
    patches: Float[Array, "B N P"], valid: Bool[Array, "B N"]
) -> tuple[tuple[Float[Array, "B N P"], Float[Array, "B N P"]], Float[Array, "B 4"]]:
    """Amplitude and phase of each patch, standardised over the valid patches of an example, and its scale."""
    (amplitude, *first), (phase, *second) = (standardised_where(part, valid) for part in spectrum(patches))
    return (amplitude, phase), jnp.concatenate([*first, *second], axis=-1)[:, 0]


def _signal(
    spectra: tuple[Float[Array, "B N P"], Float[Array, "B N P"]],
    valid: Bool[Array, "B N"],
    scale: Float[AnyArray, "B 4"] | None,
) -> Float[Array, "B N P"]:
    """Patches whose standardised spectra these are; 0 where not valid."""
    amplitude, phase = spectra
    if scale is None:
        least = jnp.min(amplitude, axis=(1, 2), keepdims=True, where=valid[..., None], initial=jnp.inf)
        amplitude, phase = amplitude - least, phase * (np.pi / np.sqrt(3))
    else:
        mean, deviation, phase_mean, phase_deviation = jnp.moveaxis(jnp.asarray(scale), -1, 0)[..., None, None]
        amplitude = jnp.maximum(amplitude * deviation + mean, 0)
        phase = phase * phase_deviation + phase_mean
    patches = jnp.where(valid[..., None], from_spectrum(amplitude, jnp.cos(phase), jnp.sin(phase)), 0)
    return standardised_where(patches, valid)[0] if scale is None else patches


_TRANSFORMER = (*table_keys(), *block_keys(biases="apart", qk_norm=False, layer_scale=False))

KEYS: tuple[Rule, ...] = (
    *conv_keys("encoder.patch_embed"),
    *(rule for part in ("encoder", "decoder") for rule in below(_TRANSFORMER, part, f"{part}.")),
    *norm_keys("encoder.fc_norm", "encoder_norm"),
    *norm_keys("decoder.fc_norm", "decoder_norm"),
    Key("decoder.patch_embed.proj.weight", "params/embed_code/kernel", "o i 1 1 -> i o"),
    Key("decoder.patch_embed.proj.bias", "params/embed_code/bias"),
    *(
        key
        for source, target in (
            ("encode_task_layer", "code_head"),
            ("decode_task_layer", "amplitude_head"),
            ("decode_task_layer_angle", "phase_head"),
        )
        for layer in (0, 2)
        for key in linear_keys(f"{source}.{layer}", f"{target}/layers_{layer}")
    ),
    Key("quantize.embedding.weight", "codebooks/quantizer/embedding"),
    Key("quantize.embedding.initted", "codebooks/quantizer/ready", "1 -> "),
    Key("quantize.cluster_size", "codebooks/quantizer/usage"),
    Ignore("quantize.embedding.cluster_size", "never used"),
    Ignore("quantize.embedding.embed_avg", "never used"),
)
"""Of the official tokenizer."""

VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "labram_vqnsp_tiny": (
        {"depth": 2, "decoder_depth": 1, "dim": 100, "heads": 4, "conv_features": 4, "codes": 256, "code_dim": 16}
        | {"commitment": 0.25, "decay": 0.95, "restart_below": 1.0, "table_std": 0.2},
        467_408,
        "its layers' parity; 10,000 steps without a burst of gradients: tests/tokenizers/test_labram_vqnsp.py",
    ),
    "labram_vqnsp_base": (
        {},
        7_522_640,
        "parity: tokens, codes, both spectra and all losses within 1e-5 of the official code, random weights",
    ),
}
"""Options, trainable parameters, evidence. tiny is ours; its commitment is a quarter of the published one, with which
all features of a model as small as this soon point one way."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        LaBraMVQNSP,
        _options,
        Card(
            title=f"VQ-NSP, LaBraM's tokenizer, {_parameters / 1e6:.1f} M parameters",
            paper="Jiang, Zhao, Lu. Large Brain Model for Learning Generic Representations with Tremendous EEG Data in "
            "BCI. ICLR 2024, arXiv 2405.18765",
            code="github.com/935963004/LaBraM",
            licence="MIT",
            inputs="EEG [B, C, A·200] at 200 Hz, 0.1–75 Hz, mains notched, µV/100; electrodes of LaBraM's table; "
            "A ≤ 16",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
