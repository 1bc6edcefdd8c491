"""A linear classifier whose weights of a class are held within a ball, as EEGNet's and EEGPT's are."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from zoo.layers.convolution import limited
from zoo.layers.parameters import LIKE_TORCH, like_torch_bias, partitioned
from zoo.types import AnyArray, Array


class MaxNormHead(nn.Module):
    """[B, D] → [B, classes]; the norm of a class's weights counts as `max_norm` where it is larger; 0: no limit.

    Keras moves the weights back into the ball after each step; here, as in braindecode, they are used scaled down.

    dropout      of what comes in
    kernel_init, bias_init
                 as PyTorch's Linear unless given
    """

    classes: int
    max_norm: float
    dropout: float = 0.0
    kernel_init: Any = LIKE_TORCH
    bias_init: Any = None

    @nn.compact
    def __call__(self, pooled: Float[AnyArray, "B D"], *, train: bool = False) -> Float[Array, "B K"]:
        x = nn.Dropout(self.dropout, deterministic=not train)(jnp.asarray(pooled, jnp.float32))
        inputs = x.shape[-1]
        kernel = self.param("kernel", partitioned(self.kernel_init, None, None), (inputs, self.classes))
        init = self.bias_init or like_torch_bias(inputs)
        bias = self.param("bias", partitioned(init, None), (self.classes,))
        return x @ (limited(kernel, self.max_norm, (0,)) if self.max_norm else kernel) + bias
