"""Du-IN's VQ-VAE: intracranial electrodes of one region together, a code every 100 ms.

Source: Zheng et al., "Du-IN: Discrete units-guided mask modeling for decoding speech from Intracranial Neural signals",
2405.11459, and the official code (github.com/liulab-repository/Du-IN, MIT).

Input: 16 channels at most, 1000 Hz, each z-scored over its recording, in stretches of 100 ms (the paper: 4 s). Fewer
channels stand for 16 of which the last are zero, and the loss is over those that are valid, as published. Which channel
comes in which place matters, and whose they are: every subject has a matrix of its own at either end. `subject` [B]
says whose each example is, from 0; unless given all are subject 0. It is an argument of `__call__`, `encode` and
`decode`, because sensors do not tell it. A subject without a matrix makes the example NaN, and so the loss.

The published convolutions have no activation between them: with their batch norms they are one linear map of a patch.
Each patch is convolved alone, zeros beyond its ends; time comes in by the transformers.

Where this differs from the official code:
- The running variance of batch norm is the mean square deviation, not the unbiased one: n / (n − 1) apart, n the steps
  of a batch. Examples without a valid channel stay out of it.
- Codes that no batch has set are zeros until k-means, not drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.errors import ZooError
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias, norm, partitioned
from zoo.layers.post_norm import NORMAL, PostNormTransformer
from zoo.layers.quantizers import Quantized, VectorQuantizer
from zoo.objectives.signal import mean_square
from zoo.registry import Card, register
from zoo.sensors import KINDS
from zoo.tokenizers.tokenizer import Tokenizer
from zoo.types import AnyArray, Array, Sensors, Tokenized


class SubjectMap(nn.Module):
    """x W_s + b_s, a matrix and a shift for every subject s."""

    subjects: int
    inputs: int
    outputs: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T I"], subject: Int[Array, " B"]) -> Float[Array, "B T O"]:
        shape = (self.subjects, self.inputs, self.outputs)
        kernel = self.param("kernel", partitioned(NORMAL, None, None, None), shape)
        bias = self.param("bias", partitioned(nn.initializers.zeros, None, None), shape[::2])
        # A subject that is not there must not pass for another.
        own = (jnp.take(table, subject, axis=0, mode="fill", fill_value=jnp.nan) for table in (kernel, bias))
        own_kernel, own_bias = own
        return jnp.einsum("bti,bio->bto", x, own_kernel) + own_bias[:, None]


class PatchConvolution(nn.Module):
    """Three convolutions with batch norms: patches [B, A, P, E] → [B, A, P / stride · filters], step by step."""

    width: int
    filters: int
    stride: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B A P E"], valid: Bool[Array, " B"], train: bool) -> Float[Array, "B A D"]:
        layers = ((self.width, 2 * self.stride - 1, self.stride), (self.width, 3, 1), (self.filters, 3, 1))
        for layer, (features, span, stride) in enumerate(layers, start=1):
            x = nn.Conv(
                features,
                (span,),
                strides=(stride,),
                padding=[(span // 2, span // 2)],
                kernel_init=partitioned(LIKE_TORCH, None, None, None),
                bias_init=partitioned(like_torch_bias(span * x.shape[-1]), None),
                dtype=self.dtype,
                name=f"conv_{layer}",
            )(x)
            x = nn.BatchNorm(
                momentum=0.9,
                epsilon=1e-5,
                dtype=self.dtype,
                scale_init=partitioned(nn.initializers.ones, None),
                bias_init=partitioned(nn.initializers.zeros, None),
                name=f"norm_{layer}",
            )(x, use_running_average=not train, mask=valid[:, None, None, None])
        return x.reshape(*x.shape[:2], -1)


class TimeHead(nn.Module):
    """Five transposed convolutions and a linear map: tokens [B, A, D] → [B, A · patch, E]."""

    width: int
    filters: int
    outputs: int
    patch: int
    stride: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B A D"]) -> Float[Array, "B T E"]:
        steps = self.patch // self.stride
        layers = ((self.width, 3, 1), (self.width, 3, 1), (self.width, steps, steps), (self.width, 9, 1))
        for layer, (features, span, stride) in enumerate(
            (*layers, (self.filters, 2 * self.stride - 1, self.stride)), 1
        ):
            # As PyTorch pads: what is cut at the start, one more at the end where that is needed for stride · length.
            cut = -(-(span - stride) // 2)
            x = nn.ConvTranspose(
                features,
                (span,),
                strides=(stride,),
                padding=[(span - 1 - cut, stride - 1 + cut)],
                kernel_init=partitioned(_LIKE_TORCH_TRANSPOSED, None, None, None),
                bias_init=partitioned(like_torch_bias(span * features), None),
                dtype=self.dtype,
                name=f"conv_{layer}",
            )(x)
        return dense(self.outputs, (None, None), bias=True, init=NORMAL, dtype=self.dtype, name="out")(x)


_LIKE_TORCH_TRANSPOSED = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")
"""PyTorch takes the outputs of a transposed convolution for its inputs."""


class DuIN(Tokenizer):
    """Du-IN's VQ-VAE: A = T / patch tokens of D = patch / stride · filters, all channels in each.

    patch, stride          samples of a token and from one convolved step to the next
    channels, latents      most channels of an input, and how many stand for them after the subject's matrix
    subjects               whose matrices there are. The paper has 12 subjects; its 5,806,480 parameters are of 10
    conv_width, filters    of the inner convolutions and of the last
    depth, decoder_depth   blocks before and after the codes
    heads, head_width      of attention
    mlp_ratio, dropout     width of the MLP in D; dropout of attention weights and inside the MLP
    code_dim               numbers of a code, of length one
    rate_hz                of the signal
    codes to restart_below those of VectorQuantizer
    dtype                  compute dtype; parameters, statistics, softmax, codebook and losses stay float32
    """

    TAKES = ("seeg", "ecog")
    CHANNEL_ROWS = False
    ORDER_FREE = False

    patch: int = 100
    stride: int = 10
    channels: int = 16
    latents: int = 16
    subjects: int = 12
    conv_width: int = 128
    filters: int = 16
    depth: int = 8
    decoder_depth: int = 4
    heads: int = 8
    head_width: int = 64
    mlp_ratio: int = 2
    dropout: float = 0.2
    rate_hz: float = 1000.0
    codes: int = 2048
    code_dim: int = 64
    learning: str = "ema"
    decay: float = 0.99
    commitment: float = 1.0
    estimator: str = "straight_through"
    kmeans: int = 10
    restart_below: float = 0.0
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        if self.patch % self.stride or self._dim % 2:
            raise ZooError(
                "DuIN wants a stride that divides the patch, and an even patch / stride · filters: "
                f"got patch {self.patch}, stride {self.stride}, filters {self.filters}"
            )

        def transformer(depth: int) -> PostNormTransformer:
            return PostNormTransformer(depth, self.heads, self.head_width, self.mlp_ratio, self.dropout, self.dtype)

        def linear(features: int, axes: tuple[str | None, str | None]) -> nn.Dense:
            return dense(features, axes, bias=True, init=NORMAL, dtype=self.dtype)

        self.subject_in = SubjectMap(self.subjects, self.channels, self.latents)
        self.embed = PatchConvolution(self.conv_width, self.filters, self.stride, self.dtype)
        self.encoder = transformer(self.depth)
        self.code_hidden, self.code_in = linear(self._dim, ("embed", "mlp")), linear(self.code_dim, ("mlp", None))
        self.quantizer = VectorQuantizer(
            self.codes,
            self.code_dim,
            metric="cosine",
            learning=self.learning,
            decay=self.decay,
            commitment=self.commitment,
            estimator=self.estimator,
            kmeans=self.kmeans,
            restart_below=self.restart_below,
        )
        self.code_norm = norm("layer", epsilon=1e-5, axis=None, dtype=self.dtype)
        self.code_out = linear(self._dim, (None, "embed"))
        self.decoder = transformer(self.decoder_depth)
        self.head = TimeHead(self.conv_width, self.filters, self.latents, self.patch, self.stride, self.dtype)
        self.subject_out = SubjectMap(self.subjects, self.latents, self.channels)

    @property
    def sampling_rate(self) -> float:
        return self.rate_hz

    @property
    def code_sizes(self) -> tuple[int, ...]:
        return (self.codes,)

    @property
    def loss_weights(self) -> Mapping[str, float]:
        weights = {"waveform": 1.0, "commitment": 1.0}
        return {**weights, "codebook": 1.0} if self.learning == "gradient" else weights

    @nn.nowrap
    def grid(self, channels: int, samples: int) -> tuple[int, int]:
        if not samples or samples % self.patch:
            raise ZooError(f"DuIN: got a window of {samples} samples, wanted a multiple of {self.patch}")
        if channels > self.channels:
            raise ZooError(f"DuIN: got {channels} channels, wanted {self.channels} or fewer")
        return 1, samples // self.patch

    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        *,
        subject: Int[AnyArray, " B"] | None = None,
        train: bool = False,
    ) -> Tokenized:
        found, valid = self._quantized(signal, sensors, subject, train)
        reconstruction = self._signal(found.quantized, sensors, subject, train)
        losses = {"waveform": mean_square(reconstruction, signal, sensors.valid), **found.losses}
        return Tokenized(found.codes, found.quantized, reconstruction, losses, valid)

    def encode(
        self, signal: Float[AnyArray, "B C T"], sensors: Sensors, *, subject: Int[AnyArray, " B"] | None = None
    ) -> Int[Array, "B N 1"]:
        return self._quantized(signal, sensors, subject, train=False)[0].codes

    def decode(
        self,
        codes: Int[AnyArray, "B N 1"],
        sensors: Sensors,
        scale: Any = None,
        *,
        subject: Int[AnyArray, " B"] | None = None,
    ) -> Float[Array, "B C T"]:
        return self._signal(self.quantizer.decode(jnp.asarray(codes)), sensors, subject, train=False)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        _, count = self.grid(channels, samples)
        dim, width, steps = self._dim, self.conv_width, self.patch // self.stride
        span = 2 * self.stride - 1
        subjects = 2 * self.patch * self.channels * self.latents
        embed = steps * (span * self.latents * width + 3 * width**2 + 3 * width * self.filters)
        head = 3 * width * (dim + width) + steps * width**2 * (1 + 9) + steps * span * width * self.filters
        head += self.patch * self.filters * self.latents
        block = dim * (4 * self.heads * self.head_width + 2 * self.mlp_ratio * dim)
        block += 2 * count * self.heads * self.head_width
        codes = dim * (dim + 2 * self.code_dim) + self.code_dim * self.codes
        return 2.0 * count * (subjects + embed + head + (self.depth + self.decoder_depth) * block + codes)

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """One patch of one channel of one example."""
        blank, kind = jnp.zeros((1, 1, 3)), jnp.full((1, 1), KINDS.index("seeg"))
        name = jnp.full((1, 1), -1)
        return jnp.zeros((1, 1, self.patch)), Sensors(blank, blank, kind, name, jnp.ones((1, 1), bool))

    @property
    def _dim(self) -> int:
        return self.patch // self.stride * self.filters

    def _quantized(
        self, signal: Float[AnyArray, "B C T"], sensors: Sensors, subject: AnyArray | None, train: bool
    ) -> tuple[Quantized, Bool[Array, "B N"]]:
        batch, channels, samples = signal.shape
        valid = self.token_valid(sensors, samples)
        x = jnp.where(sensors.valid[..., None], jnp.asarray(signal, jnp.float32), 0)
        x = jnp.pad(x, ((0, 0), (0, self.channels - channels), (0, 0)))
        x = self.subject_in(jnp.swapaxes(x, 1, 2), _of(subject, signal))
        x = self.embed(x.reshape(batch, -1, self.patch, self.latents), valid[:, 0], train)
        x = self.encoder(x, train)
        z = self.code_in(jnp.tanh(self.code_hidden(x)))
        return self.quantizer(z, valid=valid, train=train), valid

    def _signal(
        self, quantized: Float[Array, "B N D"], sensors: Sensors, subject: AnyArray | None, train: bool
    ) -> Float[Array, "B C T"]:
        x = self.decoder(self.code_out(self.code_norm(quantized)), train)
        x = self.subject_out(self.head(x).astype(jnp.float32), _of(subject, x))
        x = jnp.swapaxes(x, 1, 2)[:, : sensors.valid.shape[1]]
        return jnp.where(sensors.valid[..., None], x, 0)


def _of(subject: AnyArray | None, x: AnyArray) -> Int[Array, " B"]:
    """Whose each example of x [B, ...] is: the first person's unless told."""
    return jnp.zeros(x.shape[0], jnp.int32) if subject is None else jnp.asarray(subject)


VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "du_in_tiny": (
        {
            "rate_hz": 100.0,
            "patch": 10,
            "stride": 2,
            "subjects": 1,
            "conv_width": 32,
            "depth": 2,
            "decoder_depth": 2,
            "heads": 4,
            "head_width": 20,
            "codes": 256,
            "code_dim": 32,
            "restart_below": 0.2,
        },
        254_384,
        "parity of its layers; learns waves: tests/tokenizers/test_du_in.py",
    ),
    "du_in_base": (
        {},
        5_807_568,
        "parity: codes equal, signal, loss and gradients of the official code, random weights: "
        "tests/parity/test_du_in_official.py",
    ),
}
"""Options, parameters, evidence. tiny is ours, for electrodes at 100 Hz; base is the paper's."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        DuIN,
        _options,
        Card(
            title=f"Du-IN's VQ-VAE, {_parameters / 1e6:.1f} M parameters",
            paper="Zheng et al. Du-IN: Discrete units-guided mask modeling for decoding speech from Intracranial "
            "Neural signals. NeurIPS 2024, arXiv 2405.11459",
            code="github.com/liulab-repository/Du-IN",
            licence="MIT",
            inputs=f"sEEG or ECoG [B, C ≤ 16, A·{_options.get('patch', 100)}] at {_options.get('rate_hz', 1000.0):g} "
            "Hz, channels z-scored and always in the same place",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
