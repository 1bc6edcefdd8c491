"""MTAM: a window's band amplitudes as a sequence of numbers, for a transformer that is aligned with text.

Source: Qiu et al., "Can Brain Signals Reveal Inner Alignment with Human Languages?", Findings of EMNLP 2023, arXiv
2208.06348, and facts of the authors' code (github.com/Jason-Qiu/EEG_Language_Alignment, no licence: none is here).
What aligns it with text is in `zoo.objectives.mtam`.

Input: raw EEG. The published features are amplitudes in eight bands, of 104 electrodes (ZuCo, 832 numbers), or of one
electrode in six parts of the window (K-EmoCon, 48); both are computed here.

Where this differs from the authors' code:
- An amplitude is √2 times the deviation of what the window's Fourier transform has in the band, and all amplitudes of a
  window together are standardised. ZuCo's are means of a Hilbert envelope, K-EmoCon's come from the headset.
- Attention is a softmax over keys. The code's scores pass a batch norm, and its softmax then runs over the batch and
  the heads, so that an example's features depend on its neighbours in the batch.
- A feature is left out of attention where its channel is not valid or silent, not where its number happens to be 0.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import blank
from zoo.encoders.windowed import OneMontage
from zoo.errors import ZooError
from zoo.layers.convolution import Convolution
from zoo.layers.multi_head import MultiHead, multi_head_flops
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias, norm
from zoo.layers.post_norm import sinusoids
from zoo.layers.spectra import band_variance
from zoo.objectives.signal import standardised_where
from zoo.registry import Card, register
from zoo.types import AnyArray, Array, Encoded, Sensors

ZUCO = ((4.0, 6.0), (6.5, 8.0), (8.5, 10.0), (10.5, 13.0), (13.5, 18.0), (18.5, 30.0), (30.5, 40.0), (40.0, 49.5))
"""Two thetas, alphas, betas and gammas, in Hz."""
NEUROSKY = (
    (0.5, 2.75),
    (7.5, 9.25),
    (10.0, 11.75),
    (13.0, 16.75),
    (18.0, 29.75),
    (31.0, 39.75),
    (41.0, 49.75),
    (3.5, 6.75),
)
"""Delta, the lower and upper of alpha, beta and gamma, and theta last, in Hz, as the headset of K-EmoCon has them."""


class MTAM(OneMontage):
    """The tower of EEG.

    channels  names of the electrodes, or how many
    rate      sampling rate in Hz
    bands     limits in Hz
    parts     of the window, equally long, each with amplitudes of its own
    dim       features of a number
    heads, width, hidden, depth
              attention heads, features of each, width of the MLP, layers
    dropout   of what the branches give; attention weights have a third of it, as published
    """

    channels: int | tuple[str, ...] = 104
    rate: float = 500.0
    bands: tuple[tuple[float, float], ...] = ZUCO
    parts: int = 1
    dim: int = 16
    heads: int = 5
    width: int = 64
    hidden: int = 32
    depth: int = 1
    dropout: float = 0.3

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)

    @property
    def sampling_rate(self) -> float:
        """Hz."""
        return self.rate

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return self.dim

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
        """signal [B, C, T], any unit → Encoded, a token for each part, band and channel, channel by channel.

        Pooled is a learned weighed sum of the tokens, the published projection. Raises ZooError for a mask, a window
        that does not divide into parts, and parts too short to have a frequency in every band.
        """
        if mask is not None:
            raise ZooError("MTAM hides no tokens: it takes no mask")
        signal = self.present(signal, sensors)
        amplitude, there = amplitudes(signal, jnp.asarray(sensors.valid), self.rate, self.bands, self.parts)
        tower = Tower(self.dim, self.heads, self.width, self.hidden, self.depth, self.dropout, name="tower")
        tokens, pooled = tower(standardised_where(amplitude, there)[0], there, train=train)
        return Encoded(tokens=tokens, pooled=pooled, valid=there)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two."""
        return tower_flops(self, channels * len(self.bands) * self.parts)

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """Two seconds for each part."""
        return blank(self.channels, 2 * round(self.rate) * self.parts)


def tower_flops(tower: MTAM | Tower, numbers: int) -> float:
    """Operations over a sequence of `numbers`, of an encoder's tower or another's."""
    inner = tower.heads * tower.width
    layer = multi_head_flops(numbers, numbers, tower.dim, tower.dim, inner) + 4.0 * numbers * tower.dim * tower.hidden
    return numbers * tower.dim * 8.0 + tower.depth * layer


class Tower(nn.Module):
    """Numbers [B, N] → a token for each [B, N, D] and their learned weighed sum [B, D]. N is fixed once it is made."""

    dim: int
    heads: int
    width: int
    hidden: int
    depth: int
    dropout: float

    @nn.compact
    def __call__(
        self, numbers: Float[Array, "B N"], there: Bool[Array, "B N"], *, train: bool = False
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B D"]]:
        count = numbers.shape[1]
        x = Convolution(self.dim, (3,), paddings=(1,), name="embed")(numbers[..., None])
        x = x + sinusoids(count + 1, self.dim)[1:]
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.heads, self.width, self.hidden, self.dropout, name="layers")
        tokens = layers(x, there, train)[0]
        project = dense(1, (None, None), bias=True, init=LIKE_TORCH, bias_init=like_torch_bias(count), name="project")
        return tokens, project(tokens.swapaxes(1, 2))[..., 0]


class Layer(nn.Module):
    """norm(x + attention), norm(x + MLP with ReLU), each 0 where nothing is there; the body of a scan."""

    heads: int
    width: int
    hidden: int
    dropout: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], there: Bool[Array, "B N"], train: bool
    ) -> tuple[Float[Array, "B N D"], None]:
        dim = x.shape[-1]

        def added(name: str, x: Array, branch: Array) -> Array:
            branch = nn.Dropout(self.dropout, deterministic=not train)(branch)
            normed = norm("layer", epsilon=1e-5, axis=None, name=name)(x + branch)
            return jnp.where(there[..., None], normed, 0)

        attention = MultiHead(
            self.heads,
            self.width,
            dropout=self.dropout / 3,
            init=nn.initializers.normal((2 / (dim + self.width)) ** 0.5),
            out_init=nn.initializers.variance_scaling(1.0, "fan_avg", "normal", (0, 1), (2,)),
            name="attention",
        )
        x = added("attention_norm", x, attention(x, x, valid=there, train=train))
        bias = like_torch_bias(dim)
        hidden = dense(self.hidden, (None, "mlp"), bias=True, init=LIKE_TORCH, bias_init=bias, name="mlp_in")(x)
        bias = like_torch_bias(self.hidden)
        out = dense(dim, ("mlp", None), bias=True, init=LIKE_TORCH, bias_init=bias, name="mlp_out")(nn.relu(hidden))
        return added("mlp_norm", x, out), None


def amplitudes(
    signal: Float[Array, "B C T"],
    valid: Bool[Array, "B C"],
    rate_hz: float,
    bands: tuple[tuple[float, float], ...],
    parts: int,
) -> tuple[Float[Array, "B N"], Bool[Array, "B N"]]:
    """Amplitudes in the signal's unit, channel by channel, in it part by part, in it band by band; and which are there.

    A channel that is silent in a part has none there. Raises ZooError where T does not divide into parts.
    """
    count, channels, samples = signal.shape
    if samples % parts:
        raise ZooError(f"MTAM wants a window of {parts} equal parts, got {samples} samples")
    pieces = signal.reshape(count, channels, parts, samples // parts)
    amplitude = jnp.sqrt(2 * jnp.maximum(band_variance(pieces, rate_hz, bands), 1e-20))
    varies = jnp.ptp(pieces, axis=-1) > 0
    there = jnp.repeat(valid[..., None] & varies, len(bands), axis=-1)
    return jnp.where(there, amplitude.reshape(there.shape), 0).reshape(count, -1), there.reshape(count, -1)


VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "mtam_tiny": (
        {"channels": 4, "rate": 200.0, "heads": 2, "width": 8},
        2_321,
        "trained on a toy with text: accuracy, alignment",
    ),
    "mtam_zuco": ({}, 23_489, "its layers are those of mtam_tiny; sizes of the authors' code"),
    "mtam_kemocon": ({"channels": 1, "rate": 512.0, "bands": NEUROSKY, "parts": 6}, 22_705, "as mtam_zuco"),
}
"""Options, parameters (the EEG tower with its projection), evidence. tiny is ours; the others are the paper's."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        MTAM,
        _options,
        Card(
            title=f"MTAM's EEG tower, band amplitudes as a sequence, {_parameters / 1e3:.0f} k parameters",
            paper="Qiu et al. Can Brain Signals Reveal Inner Alignment with Human Languages? Findings of EMNLP 2023, "
            "arXiv 2208.06348",
            code="github.com/Jason-Qiu/EEG_Language_Alignment",
            licence="none; facts only, no code taken",
            inputs="EEG [B, C, T] of one montage, any unit: 104 electrodes at 500 Hz (ZuCo) or one at 512 Hz, "
            "six parts of two seconds or more (K-EmoCon)",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
