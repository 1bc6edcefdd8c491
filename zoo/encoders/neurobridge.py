"""NeuroBridge: two encoders of EEG for decoding the image that is seen, one for a person, one across people.

Source: "NeuroBridge: Bio-Inspired Self-Supervised EEG-to-Image Decoding via Cognitive Priors and Bidirectional Semantic
Alignment", AAAI 2026, 2511.06836, and facts of its authors' code (github.com/feroooooo/NeuroBridge, no licence: none of
it is here). The projections of both modalities and the loss are the task's (`zoo.objectives.neurobridge`).

Input: EEG at 250 Hz, the second after the image, less the mean of the 200 ms before it, whitened by the noise
covariance of the training trials, the mean of 4 repetitions in training and of 80 in test.

`neurobridge_intra` (EEGProject in the code): the window flattened and mapped, for 17 occipital and parietal electrodes
of one person. `neurobridge_inter` (TSConv): convolutions over time, then over all 63 electrodes, for many people. Both
end in the same block: a linear map, a residual GELU layer and a layer norm. What lies in channels that are not valid is
silence.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import Encoder, blank
from zoo.errors import ZooError
from zoo.layers.convolution import Convolution
from zoo.layers.parameters import norm, torch_linear
from zoo.layers.temporal_filters import batch_norm
from zoo.registry import Card, register
from zoo.types import AnyArray, Array, Encoded, Sensors
from zoo.weights.keys import Ignore, Key, Rule

_POSTERIOR = "P7 P5 P3 P1 PZ P2 P4 P6 P8 PO7 PO3 POZ PO4 PO8 O1 OZ O2"
POSTERIOR = tuple(_POSTERIOR.split())
"""The 17 electrodes of decoding within a person."""
_ANTERIOR = """
FP1 FP2 AF7 AF3 AFZ AF4 AF8 F7 F5 F3 F1 F2 F4 F6 F8 FT9 FT7 FC5 FC3 FC1 FCZ FC2 FC4 FC6 FT8 FT10 T7 C5 C3 C1 CZ C2 C4 C6
T8 TP9 TP7 CP5 CP3 CP1 CPZ CP2 CP4 CP6 TP8 TP10
"""
WHOLE = (*_ANTERIOR.split(), *POSTERIOR)
"""The 63 electrodes of THINGS-EEG2 in the code's order."""
POOL, STEP = 51, 5
"""Samples of the mean that follows the convolution over time, and from one to the next."""


class NeuroBridge(Encoder):
    """What both have: a montage, a window, and the block that ends them.

    channels  names of the electrodes, or how many
    samples   of its windows
    dim       D of the pooled vector
    dropout   of the residual layer, and of TSConv's convolutions
    """

    channels: int | tuple[str, ...] = POSTERIOR
    samples: int = 250
    dim: int = 1024
    dropout: float = 0.3

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)
    ORDER_FREE: ClassVar[bool] = False

    @property
    def sampling_rate(self) -> float:
        """Hz that its windows are measured in."""
        return 250.0

    @property
    def montage(self) -> int | tuple[str, ...]:
        """Names of its electrodes in their order, or how many."""
        return self.channels

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return self.dim

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """A window of its montage."""
        return blank(self.channels, self.samples)

    def _checked(self, signal: AnyArray, sensors: Sensors, mask: Any, subject: Any) -> Float[Array, "B C T"]:
        name = type(self).__name__
        if mask is not None or subject is not None:
            raise ZooError(
                f"{name}: hides nothing and knows no subjects, got a {'subject' if mask is None else 'mask'}"
            )
        if signal.shape[-1] != self.samples:
            raise ZooError(f"{name}: got a window of {signal.shape[-1]} samples, wanted {self.samples}")
        return self.present(signal, sensors)

    def _mapped(self, x: Float[Array, "B F"], train: bool) -> Float[Array, "B D"]:
        """linear, x + dropout(linear(GELU x)), layer norm."""
        x = torch_linear(self.dim, x.shape[-1], "map")(x)
        y = torch_linear(self.dim, self.dim, "residual")(jax.nn.gelu(x, approximate=False))
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        return norm("layer", epsilon=1e-5, axis=None, name="norm")(x + y)

    def _count(self) -> int:
        return self.channels if isinstance(self.channels, int) else len(self.channels)


class EEGProject(NeuroBridge):
    """The window flattened and mapped. Its only token is the vector that the residual layer reads."""

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
        """signal [B, C, T] → Encoded: pooled [B, D], and the same as the one token [B, 1, D].

        `train` draws dropout from the stream "dropout". Raises ZooError for a mask or a subject, another montage or
        another window.
        """
        x = self._checked(signal, sensors, mask, subject)
        pooled = self._mapped(x.reshape(x.shape[0], -1), train)
        return Encoded(tokens=pooled[:, None], pooled=pooled, valid=jnp.ones((x.shape[0], 1), bool))

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two."""
        return 2.0 * self.dim * (channels * samples + self.dim)


class TSConv(NeuroBridge):
    """Convolution over time, mean pooling, convolution over electrodes, a map of features, all flattened and mapped.

    filters  of each convolution
    width    samples of the convolution over time
    """

    channels: int | tuple[str, ...] = WHOLE
    dropout: float = 0.5
    filters: int = 40
    width: int = 25

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
        """signal [B, C, T] → Encoded: tokens [B, A, filters], a time step each, and pooled [B, D].

        `train` draws dropout from the stream "dropout". Raises ZooError for a mask or a subject, another montage or
        another window.
        """
        x = self._checked(signal, sensors, mask, subject)
        if self._steps() < 1:
            raise ZooError(f"TSConv: got a window of {self.samples} samples, wanted {self.width + POOL - 1} at least")
        x = Convolution(self.filters, (1, self.width), name="over_time")(x[..., None])
        x = nn.avg_pool(x, (1, POOL), (1, STEP))
        x = jax.nn.elu(batch_norm(train, 1e-5, name="time_norm")(x))
        x = Convolution(self.filters, (self._count(), 1), name="over_channels")(x)[:, 0]
        x = jax.nn.elu(batch_norm(train, 1e-5, name="channel_norm")(x))
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = Convolution(self.filters, (1,), name="over_features")(x)
        # Flattened feature by feature, as PyTorch lays a map out.
        pooled = self._mapped(x.swapaxes(1, 2).reshape(x.shape[0], -1), train)
        return Encoded(tokens=x, pooled=pooled, valid=jnp.ones(x.shape[:2], bool))

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two."""
        filters, steps = self.filters, self._steps()
        time = channels * (samples - self.width + 1) * self.width * filters
        return 2.0 * (time + steps * filters**2 * (channels + 1) + self.dim * (steps * filters + self.dim))

    def _steps(self) -> int:
        return (self.samples - self.width + 1 - POOL) // STEP + 1


_EVIDENCE = "parity: pooled within 1e-5 (relative) of the authors' code, random weights; its parameter count"

VARIANTS: dict[str, tuple[type[NeuroBridge], dict[str, Any], int, str]] = {
    "neurobridge_intra_tiny": (EEGProject, {"dim": 48}, 206_496, "parity of its layers; learns a known answer"),
    "neurobridge_intra": (EEGProject, {}, 5_404_672, _EVIDENCE),
    "neurobridge_inter_tiny": (TSConv, {"dim": 64, "filters": 8}, 27_136, "parity of its layers"),
    "neurobridge_inter": (TSConv, {}, 2_630_912, _EVIDENCE),
}
"""Class, options, parameters (encoder without projections), evidence. The tiny ones are ours."""

for _name, (_class, _options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        _class,
        _options,
        Card(
            title=f"NeuroBridge, {_class.__name__}, {_parameters / 1e6:.1f} M parameters",
            paper="NeuroBridge: Bio-Inspired Self-Supervised EEG-to-Image Decoding via Cognitive Priors and "
            "Bidirectional Semantic Alignment. AAAI 2026, arXiv 2511.06836",
            code="github.com/feroooooo/NeuroBridge",
            licence="none given; this implementation is Apache-2.0",
            inputs=f"EEG [B, {17 if _class is EEGProject else 63}, 250] at 250 Hz, 0–1 s after the image, baseline, "
            "whitened, repetitions averaged",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )


def _mapping(*names: str) -> tuple[Rule, ...]:
    """Where the authors keep the block that ends both: linear, residual, norm."""
    linear, residual, last = names
    return (
        Key(f"{linear}.weight", "params/map/kernel", "o i -> i o"),
        Key(f"{linear}.bias", "params/map/bias"),
        Key(f"{residual}.weight", "params/residual/kernel", "o i -> i o"),
        Key(f"{residual}.bias", "params/residual/bias"),
        Key(f"{last}.weight", "params/norm/scale"),
        Key(f"{last}.bias", "params/norm/bias"),
    )


def _normalised(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        Key(f"{theirs}.weight", f"params/{ours}/scale"),
        Key(f"{theirs}.bias", f"params/{ours}/bias"),
        Key(f"{theirs}.running_mean", f"batch_stats/{ours}/mean"),
        Key(f"{theirs}.running_var", f"batch_stats/{ours}/var"),
        Ignore(f"{theirs}.num_batches_tracked", "a counter"),
    )


PROJECT_KEYS = _mapping("model.0", "model.1.f.1", "model.2")
TSCONV_KEYS: tuple[Rule, ...] = (
    Key("tsconv.0.weight", "params/over_time/kernel", "o i c t -> c t i o"),
    Key("tsconv.0.bias", "params/over_time/bias"),
    *_normalised("tsconv.2", "time_norm"),
    Key("tsconv.4.weight", "params/over_channels/kernel", "o i c t -> c t i o"),
    Key("tsconv.4.bias", "params/over_channels/bias"),
    *_normalised("tsconv.5", "channel_norm"),
    Key("projection.weight", "params/over_features/kernel", "o i 1 t -> t i o"),
    Key("projection.bias", "params/over_features/bias"),
    *_mapping("proj_eeg.0", "proj_eeg.1.f.1", "proj_eeg.2"),
)
"""The authors' EEGProject and TSConv."""
