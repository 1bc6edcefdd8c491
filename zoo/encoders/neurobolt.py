"""NeuroBOLT: values of brain regions, as fMRI would show them, from sixteen seconds of EEG.

Source: Li et al., "NeuroBOLT: Resting-state EEG-to-fMRI Synthesis with Multi-dimensional Feature Mapping", NeurIPS
2024, 2410.05341, section 3.

Input: EEG at 200 Hz, microvolt / 100, the 16 s that end with the volume. Target, of a task: each region's value at that
volume, standardised over the scan. The delay of the haemodynamic response is inside the window, so windows of near
volumes overlap: parts of a recording for training and for testing want a gap of a window between them.

Two branches are added: LaBraM's pooled vector, and the mean of a linear transformer over spectra of four window
lengths, 100 to 800 samples, each without overlap. A scale's frames are led to as many as the shortest window gives by
a linear map over time, and the scales are summed. `head` is GELU and a linear map to the regions.

Where this differs from the official code (GPL-3, from which nothing is copied):
- The channel tokens of both branches are chosen by name, so channels come in any order, and those that are missing or
  not valid take no part. The code goes by a channel's place, and is given indices where some are missing.
- The spectral branch begins as PyTorch's layers do, not with kernels of 0.02.
- Dropout (.1) is that of the spectral branch's words, and of drop-path in LaBraM, which has no other here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.encoders.biot import LAYER_KEYS, channel_table, check_rows
from zoo.encoders.encoder import Encoder, LinearHead, blank
from zoo.encoders.labram import KEYS as LABRAM_KEYS
from zoo.encoders.labram import LaBraM, check_electrodes
from zoo.errors import ZooError
from zoo.layers.linear_transformer import LinearTransformer
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias
from zoo.layers.post_norm import sinusoids
from zoo.layers.spectra import stft
from zoo.registry import Card, register
from zoo.types import AnyArray, Array, Encoded, Sensors
from zoo.weights.keys import Ignore, Key, Rule, below

_VANDERBILT = "FP1 FP2 F3 F4 C3 C4 P3 P4 O1 O2 F7 F8 T7 T8 P7 P8 FPZ FZ CZ PZ POZ OZ FT9 FT10 TP9 TP10"
VANDERBILT: tuple[str, ...] = tuple(_VANDERBILT.split())
"""The 26 channels of the published recordings."""


class NeuroBOLT(Encoder):
    """The NeuroBOLT encoder. Tokens are LaBraM's, then those of the spectral branch, both channel by channel.

    channels        names of the rows of the spectral branch's table
    samples         T, of every window
    labram          options of LaBraM other than its published ones; its D is that of both branches
    depth, heads    layers and attention heads of the spectral branch
    window, scales  samples of the shortest window, and how many there are, each twice the one before
    drop_path       of LaBraM
    embed_dropout   of the words of the spectral branch
    dropout         of what its attention gives
    dtype           compute dtype; the published training found half precision to give NaN
    """

    channels: tuple[str, ...] = VANDERBILT
    samples: int = 3200
    labram: Mapping[str, Any] = field(default_factory=dict)
    depth: int = 4
    heads: int = 8
    window: int = 100
    scales: int = 4
    drop_path: float = 0.1
    embed_dropout: float = 0.1
    dropout: float = 0.2
    dtype: DTypeLike = jnp.float32

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)

    @property
    def sampling_rate(self) -> float:
        """Hz: LaBraM's."""
        return self._labram().sampling_rate

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return self._labram().features

    @nn.compact
    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        *,
        mask: Bool[AnyArray, "B _ _"] | None = None,
        subject: Int[AnyArray, " B"] | None = None,
        train: bool = False,
    ) -> Encoded:
        """signal [B, C, 3200] (µV/100, 200 Hz) → Encoded, N = C·(16 + 32); pooled is the sum of both branches.

        A channel of a name that a table has not makes its example NaN; `check_recording` says so before. Raises
        ZooError for windows of another length, and for a mask, since it hides nothing.
        """
        if mask is not None:
            raise ZooError("NeuroBOLT hides nothing: got a mask")
        signal = self.present(signal, sensors)
        if signal.shape[-1] != self.samples:
            raise ZooError(f"NeuroBOLT wants windows of {self.samples} samples, got {signal.shape[-1]}")
        waveform = self._labram(name="waveform")(signal, sensors, train=train)
        spectrum = Spectral(
            self.channels,
            self.features,
            self.depth,
            self.heads,
            self._windows(),
            self.embed_dropout,
            self.dropout,
            self.dtype,
            name="spectrum",
        )(signal, sensors, train=train)
        tokens, valid = (
            jnp.concatenate([getattr(waveform, part), getattr(spectrum, part)], axis=1) for part in ("tokens", "valid")
        )
        return Encoded(tokens, waveform.pooled + spectrum.pooled, valid)

    @nn.nowrap
    def head(self, classes: int) -> nn.Module:
        """GELU and a linear map, to the values of so many regions."""
        return RegionHead(classes)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two."""
        dim, windows = self.features, self._windows()
        longest = self.samples // self.window
        words = sum(self.samples // width * dim * (width // 2 + 1 + longest) for width in windows)
        layers = LinearTransformer(self.depth, self.heads).flops(channels * longest, dim)
        return self._labram().flops(channels, samples) + 2.0 * channels * words + layers

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """One window of its channels."""
        return blank(self.channels, self.samples)

    @nn.nowrap
    def check_sensors(self, names: Sequence[str]) -> None:
        """Raises ZooError for a canonical name that has no row in LaBraM's table, or none here."""
        check_electrodes(names)
        check_rows("NeuroBOLT", self.channels, names)

    @nn.nowrap
    def _labram(self, name: str | None = None) -> LaBraM:
        options = {"drop_path": self.drop_path, "dtype": self.dtype, **self.labram}
        return LaBraM(**options, name=name)

    @nn.nowrap
    def _windows(self) -> tuple[int, ...]:
        windows = tuple(self.window * 2**scale for scale in range(self.scales))
        if not windows or self.samples % windows[-1]:
            raise ZooError(
                f"NeuroBOLT wants samples that the longest window divides: got {self.samples}, windows {windows}"
            )
        return windows


class Spectral(nn.Module):
    """The spectral branch: signal [B, C, T] → tokens [B, C·T/w, D], w the shortest window, and their mean."""

    channels: tuple[str, ...]
    dim: int
    depth: int
    heads: int
    windows: tuple[int, ...]
    embed_dropout: float
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, signal: Float[Array, "B C T"], sensors: Sensors, *, train: bool = False) -> Encoded:
        batch, channels, samples = signal.shape
        frames = samples // self.windows[0]

        def linear(features: int, inputs: int, name: str) -> nn.Dense:
            bias = like_torch_bias(inputs)
            return dense(
                features, (None, None), bias=True, init=LIKE_TORCH, bias_init=bias, dtype=self.dtype, name=name
            )

        words = jnp.zeros((batch, channels, frames, self.dim), self.dtype)
        for number, width in enumerate(self.windows):
            amplitude = jnp.abs(stft(signal, np.ones(width, np.float32), width))
            each = linear(self.dim, width // 2 + 1, f"bins_{number}")(amplitude)
            over_time = linear(frames, samples // width, f"frames_{number}")
            words = words + over_time(each.swapaxes(-1, -2)).swapaxes(-1, -2)
        place = channel_table(self, sensors, self.channels, self.dim)
        x = (words + place[:, :, None] + sinusoids(frames, self.dim)).astype(self.dtype)
        x = nn.Dropout(self.embed_dropout, deterministic=not train)(x.reshape(batch, channels * frames, self.dim))
        valid = jnp.repeat(jnp.asarray(sensors.valid), frames, axis=1)
        transformer = LinearTransformer(
            self.depth, self.heads, dropout=self.dropout, dtype=self.dtype, name="transformer"
        )
        x = transformer(x, valid, train=train).astype(jnp.float32)
        return Encoded(x, jnp.mean(x, axis=1, where=valid[..., None]), valid)


class RegionHead(nn.Module):
    """[B, D] → [B, regions]: exact GELU, then a linear map that begins a thousandth as large as others."""

    regions: int

    @nn.compact
    def __call__(self, pooled: Float[AnyArray, "B D"], *, train: bool = False) -> Float[Array, "B R"]:
        x = nn.gelu(jnp.asarray(pooled), approximate=False)
        return LinearHead(self.regions, 0.001, name="map")(x, train=train)


VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "neurobolt_tiny": (
        {
            "labram": {"depth": 1, "dim": 100, "heads": 4, "conv_features": 4},
            "depth": 1,
            "heads": 4,
            "scales": 3,
        },
        297_380,
        "trained: an invented haemodynamic response, better than a ridge of lagged band power: "
        "tests/encoders/test_neurobolt.py",
    ),
    "neurobolt_base": (
        {},
        7_906_784,
        "parity: region values of the official code within 1e-5 (relative), random weights: "
        "tests/parity/test_neurobolt_official.py",
    ),
}
"""Options, parameters (without the head, 201 for one region), evidence. tiny is ours."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        NeuroBOLT,
        _options,
        Card(
            title=f"NeuroBOLT encoder, {_parameters / 1e6:.1f} M parameters",
            paper="Li, Lou, Xu, Goodale, Hu, Ma, Chang et al. NeuroBOLT: Resting-state EEG-to-fMRI Synthesis with "
            "Multi-dimensional Feature Mapping. NeurIPS 2024, arXiv 2410.05341",
            code="github.com/soupeeli/NeuroBOLT (GPL-3)",
            licence="Apache-2.0 (written from the paper)",
            inputs="EEG [B, C, 3200] at 200 Hz, µV/100, the 16 s that end with a volume; 26 channels or some of them",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )

KEYS: tuple[Rule, ...] = (
    *below(LABRAM_KEYS, "waveform"),
    *(
        Key(f"mss_module.{theirs}_embedding.{scale}.projection.{part}", f"params/spectrum/{ours}_{scale}/{leaf}", how)
        for theirs, ours in (("patch", "bins"), ("ts", "frames"))
        for scale in range(4)
        for part, leaf, how in (("weight", "kernel", "o i -> i o"), ("bias", "bias", ""))
    ),
    Key("mss_module.channel_tokens.weight", "params/spectrum/embed_channel"),
    Ignore("mss_module.index", "the numbers of the rows"),
    Ignore("mss_module.positional_encoding.pe", "sinusoids, computed here"),
    *below(LAYER_KEYS, "spectrum/transformer", "mss_module.transformer."),
)
"""Of the official model, but for its last map."""
HEAD_KEYS: tuple[Rule, ...] = (
    Key("head.weight", "params/map/linear/kernel", "o i -> i o"),
    Key("head.bias", "params/map/linear/bias"),
)
