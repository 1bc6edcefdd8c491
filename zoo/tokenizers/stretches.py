"""Codes of windows longer than a tokenizer was trained on, and on several devices: a frozen tokenizer at work.

codes = tokenised(tokenizer, variables, signal, sensors, stretch=1000)      # [B, N, Q], row by row
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from zoo.errors import ZooError
from zoo.layers.devices import on_devices, shared_out
from zoo.tokenizers.tokenizer import Tokenizer
from zoo.types import AnyArray, Array, Sensors


def grid_of(tokenizer: Tokenizer, channels: int, samples: int, stretch: int = 0) -> tuple[int, int]:
    """(rows, frames) of a window's codes; see `tokenised`. Raises ZooError where the tokenizer cannot cut it."""
    if not stretch:
        return tokenizer.grid(channels, samples)
    if samples % stretch:
        raise ZooError(f"task.stretch: got a window of {samples} samples, wanted a multiple of {stretch}")
    rows, frames = tokenizer.grid(channels, stretch)
    return rows, frames * (samples // stretch)


def tokenised(
    tokenizer: Tokenizer, variables: Any, signal: Float[AnyArray, "B C T"], sensors: Sensors, stretch: int = 0
) -> Int[Array, "B N Q"]:
    """Codes of a signal, row by row. With `stretch` each stretch of so many samples is tokenised by itself.

    A tokenizer knows windows as long as it was trained on; of a longer one it so makes the codes it knows. Under a mesh
    stretches are shared out among all devices that hold an example's tokens. Raises ZooError as `grid_of`.
    """
    batch, channels, samples = signal.shape
    rows, frames = grid_of(tokenizer, channels, samples, stretch)
    if not stretch:
        return _encoded(tokenizer, variables, signal, sensors)
    count = samples // stretch
    cut = jnp.asarray(signal).reshape(batch, channels, count, stretch).swapaxes(1, 2)
    each = jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), sensors)
    with shared_out(batch * count):
        codes = _encoded(tokenizer, variables, cut.reshape(-1, channels, stretch), each)
    codes = codes.reshape(batch, count, rows, frames // count, -1).swapaxes(1, 2)
    return codes.reshape(batch, rows * frames, -1)


def _encoded(tokenizer: Tokenizer, variables: Any, signal: AnyArray, sensors: Sensors) -> Array:
    """Codes of a frozen tokenizer, each device of a mesh those of its own examples: nothing travels."""
    given, tree = jax.tree.flatten((signal, sensors))
    kept, kept_tree = jax.tree.flatten(variables)
    arrays = [jnp.asarray(leaf) for leaf in (*given, *kept)]
    axes = [("batch" if n < len(given) else None, *(None,) * (x.ndim - 1))[: x.ndim] for n, x in enumerate(arrays)]

    def op(*leaves: Array) -> Any:
        signal, sensors = jax.tree.unflatten(tree, leaves[: len(given)])
        # On a device alone logical axes mean nothing.
        with nn.logical_axis_rules(()):
            return tokenizer.apply(
                jax.tree.unflatten(kept_tree, leaves[len(given) :]), signal, sensors, method="encode"
            )

    codes: Array = on_devices(op, arrays, axes, ("batch", None, None))
    return codes
