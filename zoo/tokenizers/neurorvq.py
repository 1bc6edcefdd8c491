"""NeuroRVQ: each second of each electrode seen at four time scales, each scale with eight codes in turn.

Source: "NeuroRVQ: Multi-Scale EEG Tokenization for Generative Large Brainwave Models", 2510.13068, and facts (sizes,
rules, initial values) of the official code, github.com/KonstantinosBarmpas/NeuroRVQ, whose licence (CC BY-NC 4.0) is
why none of it is here.

Input: EEG at 200 Hz, 0.5–44.5 Hz, mains notched, clipped at ±500 µV, and, our choice, in microvolt / 100, cut into
patches of 200 samples. The published limit is 256 patches in all, channels times seconds.

Four pairs of convolutions, of short to long kernels, make four embeddings of each patch. One transformer, LaBraM's
layers with other options, reads each of the four on its own; each has a head and a residual quantizer of its own. The
decoder is three layers that again read each scale on its own; then all four together predict log amplitude, sine and
cosine of each of the patch's 200 Fourier bins.

A signal comes back as the real part of the inverse transform of expm1(amplitude) · (cosine + i sine). The log
amplitudes predicted are standardised over an example, so codes alone have no scale, and the published reconstruction
takes the true mean and deviation: `scale` gives these two numbers an example. Without them `decode` takes the least log
amplitude of an example as 0 and their deviation as 1, and brings the signal to mean 0 and deviation 1.

Where this differs from the official code: samples of channels that are not valid are never read, and neither their
tokens nor their bins count; an example with a channel that the electrode table does not know, or with a sample that is
not finite, has no codes at all (−1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.errors import ZooError
from zoo.layers.parameters import dense, norm, partitioned
from zoo.layers.patch_transformer import WEIGHT_INIT, GroupNorm, PatchTransformer
from zoo.layers.quantizers import (
    COLLECTION,
    RNG,
    GroupedQuantizer,
    Quantized,
    Quantizer,
    ResidualQuantizer,
    unit,
)
from zoo.layers.quantizers.quantizer import mean_where
from zoo.objectives.signal import from_spectrum, mean_square, sine_cosine, spectrum, standardised_where
from zoo.registry import Card, register
from zoo.sensors import KINDS, NAMES
from zoo.tokenizers.spectral import SpectralTokenizer, token_valid
from zoo.types import AnyArray, Array, Sensors, Tokenized

KERNELS = ((21, 9), (15, 7), (9, 5), (5, 3))
"""Widths of the first and second convolution of each scale."""
POOLS = (2, 4)
"""Samples averaged after each."""
SCALES = len(KERNELS)

_ELECTRODES = """
A1 A2 AF3 AF4 AF7 AF8 AFZ C1 C2 C3 C4 C5 C6 CCP1 CCP2 CCP3 CCP4 CCP5 CCP6 CCP7 CCP8 CFC1 CFC2 CFC3 CFC4 CFC5 CFC6 CFC7
CFC8 CP1 CP2 CP3 CP4 CP5 CP6 CPZ CZ EOG F1 F10 F2 F3 F4 F5 F6 F7 F8 F9 FC1 FC2 FC3 FC4 FC5 FC6 FCZ FP1 FP2 FPZ FT7 FT8
FZ IZ LOC O1 O2 OZ P08 P1 P10 P2 P3 P4 P5 P6 P7 P8 P9 PO1 PO10 PO2 PO3 PO4 PO7 PO8 PO9 POZ PZ ROC SP1 SP2 T1 T10 T2 T3
T4 T5 T6 T7 T8 T9 TP10 TP7 TP8 TP9
"""
ELECTRODES: tuple[str, ...] = tuple(_ELECTRODES.split())
"""Published names of the first rows of the electrode table. The CLS token takes row 0 too, as published."""
ADDED = ("AF9", "AF5", "AF1", "AF2", "AF6", "AF10", "FT9", "FT10", "PO5", "PO6", "O9", "CB1", "CB2", "O10")
"""Electrodes of the scalp that LaBraM knows and the published names lack, in rows these leave free: ours."""


class ScaleConv(nn.Module):
    """Patch embedding of one time scale: [B, N, P] → [B, N, D], D = P/8 · features, element t·features + f."""

    kernels: tuple[int, int]
    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, patches: Float[Array, "B N P"], valid: Bool[Array, "B N"]) -> Float[Array, "B N D"]:
        x = patches[..., None]
        for layer, (width, pool) in enumerate(zip(self.kernels, POOLS, strict=True), start=1):
            x = nn.Conv(
                self.features,
                (width,),
                kernel_init=partitioned(WEIGHT_INIT, None, None, None),
                bias_init=partitioned(nn.initializers.zeros, None),
                dtype=self.dtype,
                name=f"conv{layer}",
            )(x)
            x = nn.gelu(GroupNorm(4, False, name=f"norm{layer}")(x, valid), approximate=False)
            x = x.reshape(*x.shape[:2], -1, pool, self.features).mean(3)
        return x.reshape(*patches.shape[:2], -1)


class UnitStepQuantizer(ResidualQuantizer):
    """NeuroRVQ's residual rule: r ← r − q, q the unit code nearest to the direction of r; quantized is the sum of q.

    `book` must be a cosine one. Codes of length one are taken off a residual that keeps its length, so what later
    levels see depends on the scale of x; `unit_residual` brings each residual to length one first (not published).
    Gradients pass through every q to its residual, and from there to all before it (so `gradient` and `dropout` of a
    plain residual quantizer have no say).

    Losses: those of the book, and pull, 0.4 · mean((q − sg(r))²), r the residual that q left. It moves no code that
    follows averages, but since q stands for the direction it was taken for, it reaches the input.
    """

    def __call__(
        self, x: Float[Array, "*rows D"], *, valid: Bool[Array, "*rows"] | None = None, train: bool = False
    ) -> Quantized:
        here = jnp.ones(x.shape[:-1], bool) if valid is None else valid

        def level(book: Quantizer, carry: tuple[Array, Array], _: None) -> Any:
            residual, total = carry
            residual = unit(residual) if self.unit_residual else residual
            found = book(residual, valid=here, train=train)
            residual = residual - found.quantized
            error = jnp.square(found.quantized - jax.lax.stop_gradient(residual)).mean(-1)
            losses = {**found.losses, "pull": 0.4 * mean_where(error, here)}
            return (residual, total + found.quantized), (found.codes[..., 0], losses)

        (_, total), (codes, losses) = nn.scan(
            level,
            length=self.levels,
            variable_axes={"params": 0, COLLECTION: 0},
            split_rngs={"params": True, RNG: True},
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.book, (x.astype(jnp.float32), jnp.zeros(x.shape)), None)
        return Quantized(total, jnp.moveaxis(codes, 0, -1), jax.tree.map(lambda each: each.mean(), losses))


class CodeHead(nn.Module):
    """What the encoder says of one scale, [B, N, D] → [B, N, features]."""

    dim: int
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N K"]:
        x = norm("layer", epsilon=1e-5, name="norm")(x.astype(jnp.float32))
        x = jnp.tanh(dense(self.dim, ("embed", None), bias=True, init=WEIGHT_INIT, name="hidden")(x))
        return dense(self.features, ("embed", None), bias=True, init=WEIGHT_INIT, name="out")(x)


class NeuroRVQ(SpectralTokenizer):
    """The tokenizer. Q = 4 scales · levels, scale by scale. Fields beside those of `SpectralTokenizer`:

    max_patches    the last patch of a window has the last row of the time tables
    electrodes     rows of the electrode tables, published names first; the released weights have 105
    levels         codes of each scale, one after the other
    unit_residual  each residual has length one before the next code is taken off it: see `UnitStepQuantizer`

    Losses, all of weight one: amplitude, the mean squared error of standardised log amplitudes; phase, `sine_cosine`;
    waveform, the mean squared error of the signal that comes back, both standardised over the example; commitment and
    pull (`UnitStepQuantizer`), means over levels, summed over scales.
    """

    ELECTRODES: ClassVar[tuple[str, ...]] = ELECTRODES + ADDED

    max_patches: int = 256
    code_dim: int = 128
    electrodes: int = 128
    levels: int = 8
    unit_residual: bool = False

    def setup(self) -> None:
        self.check_options()
        if self.electrodes < len(ELECTRODES):
            raise ZooError(f"NeuroRVQ electrodes: got {self.electrodes}, wanted at least {len(ELECTRODES)}")
        self.embed_patch = [ScaleConv(kernels, self.conv_features, self.dtype) for kernels in KERNELS]
        self.encoder, self.decoder = (
            self.transformer(depth, epsilon=1e-5, electrodes=self.electrodes)
            for depth in (self.depth, self.decoder_depth)
        )
        self.code_head = _each_scale(CodeHead, 1, 2)(self.dim, self.code_dim)
        stack = UnitStepQuantizer(self.book(), self.levels, unit_residual=self.unit_residual)
        self.quantizer = GroupedQuantizer(stack, SCALES)
        self.embed_code = _each_scale(nn.Dense, 2, 1)(
            self.dim,
            kernel_init=partitioned(WEIGHT_INIT, None, "embed"),
            bias_init=partitioned(nn.initializers.zeros, "embed"),
        )
        self.decoder_norm = _each_scale(nn.LayerNorm, 1, 2)(
            epsilon=1e-5,
            scale_init=partitioned(nn.initializers.ones, "embed"),
            bias_init=partitioned(nn.initializers.zeros, "embed"),
        )
        self.amplitude_head = self.head(self.patch, lambda x: nn.gelu(x, approximate=False))
        self.sine_head, self.cosine_head = self.head(self.patch), self.head(self.patch)

    @property
    def code_sizes(self) -> tuple[int, ...]:
        return (self.codes,) * (SCALES * self.levels)

    @property
    def loss_weights(self) -> Mapping[str, float]:
        names = ("amplitude", "phase", "waveform", "commitment", "pull")
        return dict.fromkeys(names + ("codebook",) * (self.learning == "gradient"), 1.0)

    def __call__(self, signal: Float[AnyArray, "B C T"], sensors: Sensors, *, train: bool = False) -> Tokenized:
        patches, valid = self.patches(signal, sensors)
        each = jnp.stack([embed(patches, valid) for embed in self.embed_patch], axis=1)
        features = self.code_head(self._read(self.encoder, each, sensors, train))
        features = features.reshape(*valid.shape, -1)
        known = valid & jnp.isfinite(features).all(-1)
        found = self.quantizer(features, valid=known, train=train)

        amplitude, sine, cosine = self._spectra(found.quantized, sensors, train)
        true_amplitude, true_phase, scale = _targets(patches, valid)
        waveform = _waveform(amplitude, sine, cosine, scale)
        standard, truth = (standardised_where(each, valid)[0] for each in (waveform, patches))
        losses = {
            "amplitude": mean_square(amplitude, true_amplitude, valid),
            "phase": sine_cosine(sine, cosine, jnp.sin(true_phase), jnp.cos(true_phase), valid),
            "waveform": mean_square(standard, truth, valid),
            **{name: SCALES * value for name, value in found.losses.items()},
        }
        reconstruction = jnp.where(valid[..., None], waveform, 0).reshape(signal.shape)
        return Tokenized(found.codes, found.quantized, reconstruction, losses, valid)

    def decode(self, codes: Int[AnyArray, "B N Q"], sensors: Sensors, scale: Any = None) -> Float[Array, "B C T"]:
        """scale [B, 2]: what `scale` gives; None for a standardised signal."""
        codes = jnp.asarray(codes)
        valid = token_valid(codes, sensors)
        amplitude, sine, cosine = self._spectra(self.quantizer.decode(codes), sensors, False)
        if scale is None:
            least = jnp.min(amplitude, axis=(1, 2), where=valid[..., None], initial=jnp.inf)
            scale = jnp.stack([-least, jnp.ones_like(least)], axis=-1)
            patches = standardised_where(_waveform(amplitude, sine, cosine, scale), valid)[0]
        else:
            patches = jnp.where(valid[..., None], _waveform(amplitude, sine, cosine, jnp.asarray(scale)), 0)
        return patches.reshape(*sensors.valid.shape, -1)

    @nn.nowrap
    def scale(self, signal: Float[AnyArray, "B C T"], sensors: Sensors) -> Float[Array, "B 2"]:
        """[B, 2]: mean and deviation of log(1 + amplitude) over an example's bins."""
        return _targets(*self.patches(signal, sensors))[2]

    @nn.nowrap
    def first_levels(self, codes: Int[AnyArray, "B N Q"], levels: int) -> Int[Array, "B N Q"]:
        """The codes with all but the first `levels` of each scale left out (−1), for a coarser decode."""
        level = jnp.arange(SCALES * self.levels) % self.levels
        return jnp.where(level < levels, codes, -1)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        tokens = int(np.prod(self.grid(channels, samples)))
        width = self.conv_features
        conv = sum(self.patch * width * (first + width * second / POOLS[0]) for first, second in KERNELS)
        heads = SCALES * self.dim * (self.dim + 2 * self.code_dim) + 3 * self.dim * (SCALES * self.dim + self.patch)
        books = SCALES * self.levels * self.codes * self.code_dim
        layers = sum(self.transformer(depth).flops(tokens, self.dim) for depth in (self.depth, self.decoder_depth))
        return SCALES * layers + 2.0 * tokens * (conv + heads + books)

    @property
    def known_electrodes(self) -> tuple[str, ...]:
        return self.ELECTRODES[: self.electrodes]

    @nn.nowrap
    def _rows(self) -> np.ndarray:
        """The row of each of `zoo.sensors.NAMES`, −1 where it has none."""
        known = self.known_electrodes
        return np.array([known.index(name) if name in known else -1 for name in NAMES], np.int32)

    def _read(
        self, transformer: PatchTransformer, each: Float[Array, "B 4 N D"], sensors: Sensors, train: bool
    ) -> Float[Array, "B 4 N D"]:
        """The transformer over each scale on its own."""
        batch, _, tokens, dim = each.shape
        known = (sensors.name >= 0) & (sensors.kind == KINDS.index("eeg"))
        rows = jnp.where(known, jnp.asarray(self._rows())[jnp.maximum(sensors.name, 0)], -1)
        rows, valid = (jnp.repeat(jnp.asarray(of_channel), SCALES, axis=0) for of_channel in (rows, sensors.valid))
        first = self.max_patches - tokens // rows.shape[1]
        x = each.reshape(batch * SCALES, tokens, dim).astype(self.dtype)
        return transformer(x, rows, valid, first=first, train=train).reshape(each.shape)

    def _spectra(
        self, quantized: Float[Array, "B N K"], sensors: Sensors, train: bool
    ) -> tuple[Float[Array, "B N P"], Float[Array, "B N P"], Float[Array, "B N P"]]:
        """Predicted standardised log amplitude, sine and cosine of each patch."""
        each = self.embed_code(quantized.reshape(*quantized.shape[:2], SCALES, -1))
        x = self.decoder_norm(self._read(self.decoder, each, sensors, train).astype(jnp.float32))
        x = x.reshape(*x.shape[:2], -1)
        return self.amplitude_head(x), jnp.tanh(self.sine_head(x)), jnp.tanh(self.cosine_head(x))


def _each_scale(module: type[nn.Module], in_axis: int, out_axis: int) -> Any:
    """The module with parameters of its own for each scale, along these axes of what it is given and gives."""
    return nn.vmap(
        module,
        in_axes=in_axis,
        out_axes=out_axis,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def _targets(
    patches: Float[Array, "B N P"], valid: Bool[Array, "B N"]
) -> tuple[Float[Array, "B N P"], Float[Array, "B N P"], Float[Array, "B 2"]]:
    """Standardised log amplitude and phase of each patch, and the scale of the former."""
    amplitude, phase = spectrum(patches)
    standard, mean, deviation = standardised_where(jnp.log1p(amplitude), valid)
    return standard, phase, jnp.concatenate([mean, deviation], axis=-1)[:, 0]


def _waveform(
    amplitude: Float[Array, "B N P"],
    sine: Float[Array, "B N P"],
    cosine: Float[Array, "B N P"],
    scale: Float[Array, "B 2"],
) -> Float[Array, "B N P"]:
    mean, deviation = scale[:, :1, None], scale[:, 1:, None]
    return from_spectrum(jnp.expm1(amplitude * deviation + mean), cosine, sine)


_PARITY = (
    "parity, run outside the tree: codes equal, all losses, signal and codebooks after a step within 1e-6 of the "
    "official code, random weights; gradients within 4e-5"
)

VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "neurorvq_tiny": (
        {"depth": 2, "decoder_depth": 1, "dim": 100, "heads": 4, "conv_features": 4, "mlp_ratio": 2, "levels": 4}
        | {"codes": 256, "code_dim": 32, "commitment": 0.25, "decay": 0.95, "restart_below": 1.0}
        | {"table_std": 0.2, "unit_residual": True},
        570_008,
        "learns made signals: tests/tokenizers/test_neurorvq.py",
    ),
    "neurorvq_base": ({}, 8_364_640, _PARITY),
}
"""Options, trainable parameters, evidence. tiny is ours: untrained features are much shorter than one, so that by
the published rule the second code would hardly be more than the opposite of the first."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        NeuroRVQ,
        _options,
        Card(
            title=f"NeuroRVQ tokenizer, {_parameters / 1e6:.1f} M parameters",
            paper="NeuroRVQ: Multi-Scale EEG Tokenization for Generative Large Brainwave Models. arXiv 2510.13068",
            code="github.com/KonstantinosBarmpas/NeuroRVQ",
            licence="CC BY-NC 4.0 (official code and weights; this file is ours)",
            inputs="EEG [B, C, A·200] at 200 Hz, 0.5–44.5 Hz, mains notched, µV/100; electrodes of its table; A ≤ 256",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
