"""The short causal convolution before a recurrence."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels.packing import runs
from zoo.layers.parameters import LIKE_TORCH, partitioned
from zoo.types import Array


class ShortConvolution(nn.Module):
    """y_t = sum over j < width of kernel_j · x_{t−width+1+j} (+ bias), every feature on its own (Mamba, 2312.00752).

    Tokens before the sequence, of another segment, or that are not there count as zeros. kernel [width, F], its last
    row for the token itself.

    features, width   F and how many tokens are seen
    bias              whether there is one
    kernel_init       how it is drawn; uniform in ±width^-½ unless given, as PyTorch's Conv1d
    """

    features: int
    width: int = 4
    bias: bool = False
    kernel_init: Any = LIKE_TORCH
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.kernel = self.param("kernel", partitioned(self.kernel_init, None, "mlp"), (self.width, self.features))
        if self.bias:
            self.offset = self.param("bias", partitioned(nn.initializers.zeros, "mlp"), (self.features,))

    def __call__(
        self,
        x: Float[Array, "B T F"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T F"]:
        x = x.astype(self.dtype)
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)
        run = None if segment_ids is None else runs(segment_ids)
        kernel = self.kernel.astype(self.dtype)
        y = x * kernel[-1]
        for lag in range(1, min(self.width, x.shape[1])):
            earlier = jnp.pad(x[:, :-lag], ((0, 0), (lag, 0), (0, 0)))
            if run is not None:
                same = jnp.pad(run[:, :-lag], ((0, 0), (lag, 0)), constant_values=-1) == run
                earlier = jnp.where(same[..., None], earlier, 0)
            y += earlier * kernel[-1 - lag]
        return y + self.offset.astype(self.dtype) if self.bias else y

    def initial_state(self, batch: int) -> Float[Array, "B W F"]:
        """The last width − 1 tokens: none yet, so zeros."""
        return jnp.zeros((batch, self.width - 1, self.features), self.dtype)

    def step(
        self, x: Float[Array, "B F"], state: Float[Array, "B W F"]
    ) -> tuple[Float[Array, "B F"], Float[Array, "B W F"]]:
        """One token and the new state."""
        window = jnp.concatenate([state, x[:, None].astype(self.dtype)], axis=1)
        y = jnp.sum(window * self.kernel.astype(self.dtype), axis=1)
        return (y + self.offset.astype(self.dtype) if self.bias else y), window[:, 1:]
