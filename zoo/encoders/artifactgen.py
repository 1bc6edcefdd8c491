"""ArtifactGen: a critic and a denoiser of short windows of artifacts, which train two generators of them.

Source: "ArtifactGen: Benchmarking WGAN-GP vs Diffusion for Label-Aware EEG Artifact Synthesis", arXiv 2509.08188, and
the official code (github.com/ahritik/ArtifactGen, MIT). The generators and what trains them are in
`zoo.objectives.artifactgen`; as encoders, the critic gives its last feature map and the denoiser that of its middle.

Input: EEG at 250 Hz of eight electrodes, in any unit. The critic reads windows of one second scaled to [−1, 1], which
removes their amplitude; the denoiser windows of two seconds with every channel standardised.

Where this differs from the official code:
- An electrode that is not valid stays out of the window's least and largest value, and is 0.
- The denoiser has group norms, as the paper says, and hands its levels' features to the way up, as a U-Net does. The
  released one has neither: `groups=0`, and `skips=False` of the task.
- As an encoder the denoiser is told the cleanest step and no class.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import Encoder, blank
from zoo.errors import ZooError
from zoo.layers.convolution import Convolution
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias, partitioned
from zoo.objectives.signal import standardised_where
from zoo.registry import Card, register
from zoo.types import AnyArray, Array, Encoded, Sensors
from zoo.weights.keys import Key, Rule

TUAR = ("FP1", "FP2", "C3", "C4", "O1", "O2", "T3", "T4")
"""The eight electrodes, of the Temple University Artifact corpus."""
STEP_FEATURES = 128
"""Features of a step's sinusoids and of a class."""


class ArtifactCritic(Encoder):
    """Three strided convolutions and their mean over time: what the critic of the WGAN sees.

    channels  names of the electrodes, or how many
    rate      sampling rate in Hz
    width     features of the first convolution; those after it have twice and four times as many
    """

    channels: int | tuple[str, ...] = TUAR
    rate: float = 250.0
    width: int = 64

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)
    ORDER_FREE: ClassVar[bool] = False

    def setup(self) -> None:
        self.convolutions = [Convolution(self.width * 2**level, (5,), (2,), paddings=(2,)) for level in range(3)]

    @property
    def sampling_rate(self) -> float:
        """Hz."""
        return self.rate

    @property
    def montage(self) -> int | tuple[str, ...]:
        """Its electrodes."""
        return self.channels

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return 4 * self.width

    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        *,
        mask: Bool[AnyArray, "B _"] | Bool[AnyArray, "B _ _"] | None = None,
        subject: Int[AnyArray, " B"] | None = None,
        train: bool = False,
    ) -> Encoded:
        """signal [B, C, T], any unit → Encoded, a token every 8 samples. Raises ZooError for a mask."""
        if mask is not None:
            raise ZooError("ArtifactCritic hides no tokens: it takes no mask")
        tokens = self.describe(self.scaled(signal, sensors))
        return Encoded(tokens=tokens, pooled=tokens.mean(1), valid=jnp.ones(tokens.shape[:2], bool))

    def describe(self, scaled: Float[Array, "B C T"]) -> Float[Array, "B A D"]:
        """Its last feature map, of a window in [−1, 1]."""
        x = scaled.swapaxes(1, 2)
        for convolution in self.convolutions:
            x = nn.leaky_relu(convolution(x), 0.2)
        return x

    @nn.nowrap
    def scaled(self, signal: Float[AnyArray, "B C T"], sensors: Sensors) -> Float[Array, "B C T"]:
        """Its least value as −1, its largest as 1, over the valid channels; what does not vary becomes −1."""
        signal = self.present(signal, sensors)
        here = jnp.asarray(sensors.valid)[:, :, None]
        least = signal.min((1, 2), keepdims=True, where=here, initial=jnp.inf)
        span = signal.max((1, 2), keepdims=True, where=here, initial=-jnp.inf) - least
        return jnp.where(here, 2 * (signal - least) / jnp.where(span > 0, span, 1) - 1, 0)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in convolutions, a multiply-add counting two."""
        total, inputs = 0.0, channels
        for level in range(3):
            samples, outputs = -(-samples // 2), self.width * 2**level
            total, inputs = total + 2.0 * samples * 5 * inputs * outputs, outputs
        return total

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """A second."""
        return blank(self.channels, round(self.rate))


class ArtifactUNet(Encoder):
    """The way down of the denoiser, and its middle.

    channels   names of the electrodes, or how many
    rate       sampling rate in Hz
    classes    K of the labels it may be told; label K is none
    width      features of the first level
    multiples  features of each level, in widths; between levels there are half as many steps
    blocks     residual blocks a level
    dilate     convolutions of level i look 2^i steps apart
    groups     of the group norms; 0 leaves them out
    condition  features of what the blocks are told of step and class
    dropout    in every residual block
    """

    channels: int | tuple[str, ...] = TUAR
    rate: float = 250.0
    classes: int = 5
    width: int = 64
    multiples: tuple[int, ...] = (1, 2, 4)
    blocks: int = 2
    dilate: bool = True
    groups: int = 8
    condition: int = 128
    dropout: float = 0.1

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)
    ORDER_FREE: ClassVar[bool] = False

    def setup(self) -> None:
        widths = [self.width * multiple for multiple in self.multiples]
        self.first = Convolution(self.width, (3,), paddings=(1,))
        self.down = [
            [self.block(width, 2**level if self.dilate else 1) for _ in range(self.blocks)]
            for level, width in enumerate(widths)
        ]
        self.halve = [Convolution(width, (4,), (2,), paddings=(1,)) for width in widths[:-1]]
        self.middle = self.block(widths[-1])
        normal = partitioned(nn.initializers.normal(1.0), None, None)
        self.label = nn.Embed(self.classes + 1, STEP_FEATURES, embedding_init=normal)
        self.told_in = _linear(self.condition, STEP_FEATURES)
        self.told_out = _linear(self.condition, self.condition)

    @property
    def sampling_rate(self) -> float:
        """Hz."""
        return self.rate

    @property
    def montage(self) -> int | tuple[str, ...]:
        """Its electrodes."""
        return self.channels

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return self.width * self.multiples[-1]

    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        *,
        mask: Bool[AnyArray, "B _"] | Bool[AnyArray, "B _ _"] | None = None,
        subject: Int[AnyArray, " B"] | None = None,
        train: bool = False,
    ) -> Encoded:
        """signal [B, C, T], any unit → Encoded, a token every 4 samples (2 to the levels, less one).

        Raises ZooError for a mask and where T is not a multiple of these.
        """
        if mask is not None:
            raise ZooError("ArtifactUNet hides no tokens: it takes no mask")
        standard = self.standardised(signal, sensors)
        count = standard.shape[0]
        told = self.tell(jnp.zeros(count, jnp.int32), jnp.full(count, self.classes))
        tokens, _ = self.describe(standard, told, train=train)
        return Encoded(tokens=tokens, pooled=tokens.mean(1), valid=jnp.ones(tokens.shape[:2], bool))

    def tell(self, step: Int[Array, " B"], label: Int[Array, " B"]) -> Float[Array, "B M"]:
        """What every block is told of the step of diffusion and of the class."""
        told = self.told_in(sinusoids(step) + self.label(label))
        return self.told_out(nn.silu(told))

    def describe(
        self, standard: Float[Array, "B C T"], told: Float[Array, "B M"], *, train: bool = False
    ) -> tuple[Float[Array, "B A D"], list[Float[Array, "B _ _"]]]:
        """(the middle's features, those that each level ends with)."""
        period = 2 ** (len(self.multiples) - 1)
        if standard.shape[-1] % period:
            raise ZooError(f"ArtifactUNet wants a multiple of {period} samples, got {standard.shape[-1]}")
        x, levels = self.first(standard.swapaxes(1, 2)), []
        for level, blocks in enumerate(self.down):
            for block in blocks:
                x = block(x, told, train)
            levels.append(x)
            if level < len(self.halve):
                x = self.halve[level](x)
        return self.middle(x, told, train), levels

    @nn.nowrap
    def standardised(self, signal: Float[AnyArray, "B C T"], sensors: Sensors) -> Float[Array, "B C T"]:
        """Every valid channel with mean 0 and deviation 1 over the window; what does not vary is 0."""
        return standardised_where(self.present(signal, sensors), sensors.valid, axes=(2,))[0]

    @nn.nowrap
    def block(self, features: int, dilation: int = 1, **options: Any) -> ResidualBlock:
        """A residual block with the options of this one."""
        return ResidualBlock(features, dilation, self.groups, self.dropout, **options)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in convolutions, a multiply-add counting two."""
        total, inputs = 6.0 * samples * channels * self.width, self.width
        for level, multiple in enumerate(self.multiples):
            features, steps = self.width * multiple, samples >> level
            for _ in range(self.blocks):
                total += 2.0 * steps * features * (3 * inputs + 3 * features + (inputs != features) * inputs)
                inputs = features
        halves = [2.0 * (samples >> (level + 1)) * 4 * (self.width * m) ** 2 for level, m in enumerate(self.multiples)]
        return total + sum(halves[:-1]) + 12.0 * (samples >> (len(self.multiples) - 1)) * inputs**2

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """Two seconds."""
        return blank(self.channels, round(2 * self.rate))


class ResidualBlock(nn.Module):
    """Two convolutions of three steps, each with norm, SiLU and a scale and shift that it is told; and the input."""

    features: int
    dilation: int = 1
    groups: int = 0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "B A F"], told: Float[Array, "B M"], train: bool) -> Float[Array, "B A G"]:
        def convolved(name: str, x: Array, dilation: int) -> Array:
            y = Convolution(self.features, (3,), dilations=(dilation,), paddings=(dilation,), name=name)(x)
            if self.groups:
                y = _group_norm(self.groups, f"{name}_norm")(y)
            return nn.silu(y)

        def modulated(name: str, x: Array) -> Array:
            scale, shift = (
                _linear(self.features, told.shape[-1], f"{name}_{each}")(told)[:, None] for each in ("scale", "shift")
            )
            return x * (1 + scale) + shift

        y = modulated("first", convolved("first", x, self.dilation))
        y = nn.Dropout(self.dropout, deterministic=not train)(convolved("second", y, 1))
        y = modulated("second", y)
        return y + (x if x.shape[-1] == self.features else Convolution(self.features, (1,), name="beside")(x))


def sinusoids(step: Int[Array, " B"]) -> Float[Array, "B _"]:
    """Sines, then cosines, of step / 10000^(2i / 128)."""
    half = STEP_FEATURES // 2
    angle = step[:, None] * np.exp(-np.log(1e4) * np.arange(half) / half).astype(np.float32)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def _group_norm(groups: int, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(
        groups,
        epsilon=1e-5,
        scale_init=partitioned(nn.initializers.ones, None),
        bias_init=partitioned(nn.initializers.zeros, None),
        name=name,
    )


def _linear(features: int, inputs: int, name: str | None = None) -> nn.Dense:
    bias = like_torch_bias(inputs)
    return dense(features, (None, None), bias=True, init=LIKE_TORCH, bias_init=bias, name=name)


CONV = "o i t -> t i o"
CRITIC_KEYS: tuple[Rule, ...] = tuple(
    key
    for level in range(3)
    for key in (
        Key(f"conv.{2 * level}.weight", f"params/convolutions_{level}/kernel", CONV),
        Key(f"conv.{2 * level}.bias", f"params/convolutions_{level}/bias"),
    )
)
"""The official critic without its scores."""


def block_keys(source: str, target: str, wider: bool) -> tuple[Rule, ...]:
    """Of one residual block without norms; `wider` where its input is convolved beside it."""
    kernels = {"conv1": ("first", CONV), "conv2": ("second", CONV), "skip": ("beside", CONV)}
    for number, place in (("1", "first"), ("2", "second")):
        for part in ("scale", "shift"):
            kernels[f"film{number}.to_{part}"] = (f"{place}_{part}", "o i -> i o")
    if not wider:
        del kernels["skip"]
    return tuple(
        key
        for name, (place, how) in kernels.items()
        for key in (
            Key(f"{source}.{name}.weight", f"params/{target}/{place}/kernel", how),
            Key(f"{source}.{name}.bias", f"params/{target}/{place}/bias"),
        )
    )


UNET_KEYS: tuple[Rule, ...] = (
    Key("in_conv.weight", "params/first/kernel", CONV),
    Key("in_conv.bias", "params/first/bias"),
    Key("class_embed.weight", "params/label/embedding"),
    Key("time_mlp.0.weight", "params/told_in/kernel", "o i -> i o"),
    Key("time_mlp.0.bias", "params/told_in/bias"),
    Key("time_mlp.2.weight", "params/told_out/kernel", "o i -> i o"),
    Key("time_mlp.2.bias", "params/told_out/bias"),
    *(key for level in range(3) for key in block_keys(f"downs.{2 * level}.0", f"down_{level}_0", wider=level > 0)),
    *(key for level in range(3) for key in block_keys(f"downs.{2 * level}.1", f"down_{level}_1", wider=False)),
    *(
        key
        for level in range(2)
        for key in (
            Key(f"downs.{2 * level + 1}.0.weight", f"params/halve_{level}/kernel", CONV),
            Key(f"downs.{2 * level + 1}.0.bias", f"params/halve_{level}/bias"),
        )
    ),
    *block_keys("mid", "middle", wider=False),
)
"""The official denoiser (`groups=0`) without its way up."""

_PARITY = "parity with the official code, random weights"
VARIANTS: dict[str, tuple[type[Encoder], dict[str, Any], int, str]] = {
    "artifactgen_tiny": (ArtifactCritic, {"width": 16}, 13_552, "its layers are those of artifactgen_wgan"),
    "artifactgen_wgan": (ArtifactCritic, {}, 207_808, f"{_PARITY}: scores, generator; a WGAN of it trained on a toy"),
    "artifactgen_unet_tiny": (
        ArtifactUNet,
        {"width": 16, "blocks": 1, "condition": 32},
        87_616,
        "its layers are those of artifactgen_ddpm; trained on a toy, samples have the spectra of their classes",
    ),
    "artifactgen_ddpm": (ArtifactUNet, {}, 2_062_720, "the released one with the norms of the paper"),
    "artifactgen_ddpm_released": (ArtifactUNet, {"groups": 0}, 2_058_112, f"{_PARITY}: predicted noise"),
}
"""Constructor, options, parameters (encoder without score, generator and way up), evidence. tiny ones are ours."""

for _name, (_class, _options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        _class,
        _options,
        Card(
            title=f"ArtifactGen's {'critic' if _class is ArtifactCritic else 'denoiser'}, {_parameters / 1e3:.0f} k",
            paper="ArtifactGen: Benchmarking WGAN-GP vs Diffusion for Label-Aware EEG Artifact Synthesis. "
            "arXiv 2509.08188",
            code="github.com/ahritik/ArtifactGen",
            licence="MIT",
            inputs="EEG [B, 8, T] of FP1 FP2 C3 C4 O1 O2 T3 T4 at 250 Hz, any unit; T 250 (critic) or a multiple of 4, "
            "500 as published (denoiser)",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
