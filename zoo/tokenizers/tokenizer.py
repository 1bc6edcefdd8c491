"""What every tokenizer is: signal in, codes out, and from codes a signal again.

    tokenizer = zoo.create("labram_vqnsp_base")
    out = tokenizer.apply(variables, signal, sensors)                          # zoo.types.Tokenized
    codes = tokenizer.apply(variables, signal, sensors, method="encode")       # [B, N, Q]
    again = tokenizer.apply(variables, codes, sensors, method="decode")        # [B, C, T]

Its tokens lie on a grid of R rows and A frames, N = R · A, row by row: a row is a channel where the tokenizer reads
channels one by one, else a latent; a frame is a stretch of time. `grid` tells R and A of an input.

A tokenizer has the variables of any Flax module: `params`, and in collections what is not learned by gradient, as in
`zoo.layers.quantizers`. In training (`train=True`) these collections must be mutable, and the streams "codes" (what
quantizers draw), "dropout" and "noise" be given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from zoo.errors import ZooError
from zoo.sensors import KINDS
from zoo.types import AnyArray, Array, Sensors, Tokenized


class Tokenizer(nn.Module):
    """The contract, and the checks that all share. A tokenizer's own fields are its configuration.

    TAKES          kinds of channel it takes
    CHANNEL_ROWS   rows are channels; else rows are latents, or all channels together
    SINGLE_CHANNEL a channel's codes do not depend on the other channels (only where rows are channels)
    ORDER_FREE     channels may come in any order: codes move with their channels where these are rows, and stay where
                   rows are latents
    """

    TAKES: ClassVar[tuple[str, ...]] = KINDS
    CHANNEL_ROWS: ClassVar[bool] = True
    SINGLE_CHANNEL: ClassVar[bool] = False
    ORDER_FREE: ClassVar[bool] = True

    @property
    def sampling_rate(self) -> float | None:
        """Hz that its windows are measured in; None where any will do."""
        return None

    @property
    def code_sizes(self) -> tuple[int, ...]:
        """How many codes each of the Q codebooks has: a code of codebook q is in 0 to code_sizes[q] − 1."""
        raise NotImplementedError

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Name of each term in `Tokenized.losses` → its published weight. Training minimises the weighed sum."""
        raise NotImplementedError

    @nn.nowrap
    def grid(self, channels: int, samples: int) -> tuple[int, int]:
        """(R rows, A frames) of a window. Raises ZooError for one it cannot cut into frames, saying what it can."""
        raise NotImplementedError

    def __call__(self, signal: Float[AnyArray, "B C T"], sensors: Sensors, *, train: bool = False) -> Tokenized:
        """Codes of a signal and its reconstruction, with the terms of the published loss."""
        raise NotImplementedError

    def encode(self, signal: Float[AnyArray, "B C T"], sensors: Sensors) -> Int[Array, "B N Q"]:
        """The codes alone. A token without a valid channel has code −1."""
        return self(signal, sensors).codes

    def decode(self, codes: Int[AnyArray, "B N Q"], sensors: Sensors, scale: Any = None) -> Float[Array, "B C T"]:
        """The signal that codes stand for, zero in channels that are not valid.

        Where codes carry no absolute scale (`scale` below gives something), the signal is standardised unless the
        scale is given.
        """
        raise NotImplementedError

    @nn.nowrap
    def scale(self, signal: Float[AnyArray, "B C T"], sensors: Sensors) -> Any:
        """What must be sent beside the codes to get the signal's units back: a tree of arrays [B, ...], or None."""
        return None

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's `__call__` in matmuls and convolutions, a multiply-add counting two."""
        raise NotImplementedError

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """The smallest input."""
        raise NotImplementedError

    @nn.nowrap
    def check_recording(self, rate_hz: float, kinds: Sequence[str], names: Sequence[str]) -> None:
        """Raises ZooError when a recording of this rate and of channels of these kinds and canonical names is not its.

        Names are upper case, "" for a channel that has none.
        """
        wanted = self.sampling_rate
        if wanted is not None and abs(rate_hz - wanted) > 1e-6 * wanted:
            raise ZooError(f"{type(self).__name__}: got a signal at {rate_hz:g} Hz, wanted {wanted:g} Hz")
        for kind in dict.fromkeys(kinds):
            if kind not in self.TAKES:
                raise ZooError(f"{type(self).__name__}: got channels of kind {kind!r}, takes {', '.join(self.TAKES)}")

    @nn.nowrap
    def check_positions(self, sensors: Sensors) -> None:
        """Raises ZooError for sensors, on the host, with valid channels whose place it must know and does not."""

    @nn.nowrap
    def check_codes(self, codes: np.ndarray, channels: int | None = None) -> None:
        """Raises ZooError for codes [B, N, Q], on the host, whose shape or range is not this tokenizer's."""
        sizes, name = self.code_sizes, type(self).__name__
        if codes.ndim != 3 or codes.shape[-1] != len(sizes) or not np.issubdtype(codes.dtype, np.integer):
            raise ZooError(f"{name}: got codes {codes.dtype}{list(codes.shape)}, wanted integers [B, N, {len(sizes)}]")
        for book, size in enumerate(sizes):
            least, most = int(codes[..., book].min(initial=0)), int(codes[..., book].max(initial=0))
            if least < -1 or most >= size:
                wrong = least if least < -1 else most
                raise ZooError(f"{name}: got code {wrong} of codebook {book}, wanted 0 to {size - 1}, or -1 for none")
        if channels is not None and self.CHANNEL_ROWS and codes.shape[1] % channels:
            raise ZooError(f"{name}: got {codes.shape[1]} tokens for {channels} channels, wanted as many of each")

    @nn.nowrap
    def token_valid(self, sensors: Sensors, samples: int) -> Bool[Array, "B N"]:
        """Which tokens of a window are there: of valid channels; where rows are latents, all if any channel is."""
        valid = jnp.asarray(sensors.valid)
        rows, frames = self.grid(valid.shape[1], samples)
        if self.CHANNEL_ROWS:
            return jnp.repeat(valid, frames, axis=1)
        return jnp.broadcast_to(valid.any(1, keepdims=True), (valid.shape[0], rows * frames))
