"""The linear scan as Pallas TPU kernels."""

import jax
import jax.numpy as jnp


def refusal(batch: int, time: int, features: int, dtype: jnp.dtype) -> str | None:
    return "not built yet"


def forward(reverse: bool, x: jax.Array, log_decay: jax.Array, initial_state: jax.Array) -> tuple[jax.Array, jax.Array]:
    raise NotImplementedError


def backward(reverse: bool, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    raise NotImplementedError
