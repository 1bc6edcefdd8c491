"""What tokenizers share that read patches of EEG with LaBraM's layers and learn by predicting Fourier spectra.

A subclass says what it embeds patches with, what it predicts, and which rows of a table its electrodes have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from zoo.errors import ZooError
from zoo.layers.parameters import dense
from zoo.layers.patch_transformer import WEIGHT_INIT, PatchTransformer
from zoo.layers.quantizers import VectorQuantizer
from zoo.sensors import NAME_INDEX
from zoo.tokenizers.tokenizer import Tokenizer
from zoo.types import AnyArray, Array, Sensors


class SpectralTokenizer(Tokenizer):
    """N = C · A tokens, all patches of a channel in turn.

    depth, decoder_depth   layers of encoder and decoder
    dim, heads             features, attention heads; dim must be patch/8 · conv_features
    patch                  samples
    max_patches            rows of the time tables, so the longest window in patches
    table_std              initial spread of the position tables
    codes, code_dim        of each codebook (cosine): M codes of so many numbers
    learning, decay, commitment, kmeans, kmeans_rows, restart_below   of each codebook: see `VectorQuantizer`
    remat                  what layers recompute in the backward pass: none, full or dots
    dtype                  compute dtype of embedding and transformers; all else is float32
    """

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)
    ELECTRODES: ClassVar[tuple[str, ...]]

    depth: int = 12
    decoder_depth: int = 3
    dim: int = 200
    heads: int = 10
    conv_features: int = 8
    patch: int = 200
    mlp_ratio: int = 4
    max_patches: int = 16
    table_std: float = 0.02
    codes: int = 8192
    code_dim: int = 64
    learning: str = "ema"
    decay: float = 0.99
    commitment: float = 1.0
    kmeans: int = 10
    kmeans_rows: int = 0
    restart_below: float = 0.0
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    @property
    def sampling_rate(self) -> float:
        return 200.0

    @nn.nowrap
    def grid(self, channels: int, samples: int) -> tuple[int, int]:
        if samples % self.patch or not 0 < samples // self.patch <= self.max_patches:
            raise ZooError(
                f"{type(self).__name__}: got a window of {samples} samples, wanted 1 to {self.max_patches} patches of "
                f"{self.patch}"
            )
        return channels, samples // self.patch

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        blank, one = jnp.zeros((1, 1, 3)), jnp.zeros((1, 1), jnp.int32)
        sensors = Sensors(blank, blank, one, one + NAME_INDEX["CZ"], jnp.ones((1, 1), bool))
        return jnp.zeros((1, 1, self.patch)), sensors

    @property
    def known_electrodes(self) -> tuple[str, ...]:
        """Names of the rows of the electrode table."""
        return self.ELECTRODES

    @nn.nowrap
    def check_recording(self, rate_hz: float, kinds: Sequence[str], names: Sequence[str]) -> None:
        """As every tokenizer's, and for a name that the electrode table lacks."""
        super().check_recording(rate_hz, kinds, names)
        for name in names:
            if name not in self.known_electrodes:
                who = type(self).__name__
                raise ZooError(f"{who} has no electrode {name!r}; a recipe's sensor_names='nearest' maps by position")

    @nn.nowrap
    def check_options(self) -> None:
        """Raises ZooError for sizes that do not fit together."""
        if self.patch % 8 or self.conv_features % 4 or self.dim != self.patch // 8 * self.conv_features:
            raise ZooError(
                f"{type(self).__name__} wants dim = patch/8 · conv_features, patch a multiple of 8, conv_features of "
                f"4: got dim {self.dim}, patch {self.patch}, conv_features {self.conv_features}"
            )

    @nn.nowrap
    def patches(
        self, signal: Float[AnyArray, "B C T"], sensors: Sensors
    ) -> tuple[Float[Array, "B N P"], Bool[Array, "B N"]]:
        """The patches of a signal in float32, 0 where not valid, and which are."""
        rows, frames = self.grid(*signal.shape[1:])
        valid = self.token_valid(sensors, signal.shape[-1])
        patches = jnp.asarray(signal, jnp.float32).reshape(signal.shape[0], rows * frames, self.patch)
        return jnp.where(valid[..., None], patches, 0), valid

    @nn.nowrap
    def book(self) -> VectorQuantizer:
        """A codebook."""
        return VectorQuantizer(
            self.codes,
            self.code_dim,
            "cosine",
            self.learning,
            self.decay,
            commitment=self.commitment,
            kmeans=self.kmeans,
            kmeans_rows=self.kmeans_rows,
            restart_below=self.restart_below,
        )

    @nn.nowrap
    def transformer(self, depth: int, **options: Any) -> PatchTransformer:
        """LaBraM's layers, queries and values with a bias."""
        return PatchTransformer(
            depth,
            self.heads,
            self.mlp_ratio,
            qkv_bias=True,
            max_patches=self.max_patches,
            table_std=self.table_std,
            remat=self.remat,
            dtype=self.dtype,
            **options,
        )

    @nn.nowrap
    def head(self, features: int, inner: Any = jnp.tanh) -> nn.Sequential:
        """Two linear layers, `inner` between them."""
        return nn.Sequential(
            [
                dense(self.dim, ("embed", None), bias=True, init=WEIGHT_INIT),
                inner,
                dense(features, ("embed", None), bias=True, init=WEIGHT_INIT),
            ]
        )


def token_valid(codes: AnyArray, sensors: Sensors) -> Bool[Array, "B N"]:
    """Which of the codes [B, N, Q] are of valid channels."""
    valid = jnp.asarray(sensors.valid)
    return jnp.repeat(valid, codes.shape[1] // valid.shape[1], axis=1)
