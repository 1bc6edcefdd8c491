"""Soft choices among codes that training hardens: annealed mixtures and Gumbel samples of one-hot vectors.

Source: the annealed mixture is that of EphysTokenizer ("tokenizers for MEG foundation models", 2602.16626, and its
code); Gumbel-softmax and its straight-through form are Jang et al., 1611.01144, section 2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from zoo.types import Array


def annealed_one_hot(logits: Float[Array, "*rows M"], tau: Float[Array, ""] | float) -> Float[Array, "*rows M"]:
    """tau · softmax(logits) + (1 − tau) · the one-hot vector of the largest, which has no gradient.

    At tau 1 it is a softmax, at 0 one-hot, and then nothing learns: a schedule should end above it.
    """
    hard = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=logits.dtype)
    return tau * jax.nn.softmax(logits, axis=-1) + (1 - tau) * hard
