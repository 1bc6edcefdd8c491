"""Shape legend and the contracts every room keeps.

Shape letters, used in every docstring and annotation:
    B batch, C channels (sensors, regions), T time samples, A patches a channel, P samples a patch,
    N tokens, D features, H heads, K key width, V value width, Q codebooks, S subjects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import numpy as np

Array = jax.Array
AnyArray = jax.Array | np.ndarray
"""What a user may pass in."""
Batch = dict[str, Any]
"""One batch: see `zoo.data.loader` for its keys."""
Variables = Mapping[str, Any]
"""Flax variables: `{"params": …}` and, where a model has them, mutable collections."""


@flax.struct.dataclass
class Sensors:
    """Where and what the channels of a batch are; a pytree that travels with the signal, of numpy arrays on the host.

    position     [B, C, 3] float32, metres, head coordinates (+x right ear, +y nose, +z vertex); NaN when unknown
    orientation  [B, C, 3] float32, unit vector of the sensor's axis; NaN where the kind has none
    kind         [B, C] int32, index into `zoo.sensors.KINDS`
    name         [B, C] int32, index into `zoo.sensors.NAMES`, −1 for a channel with no canonical name
    valid        [B, C] bool, False for padding and for channels marked bad
    """

    position: Array | np.ndarray
    orientation: Array | np.ndarray
    kind: Array | np.ndarray
    name: Array | np.ndarray
    valid: Array | np.ndarray


@flax.struct.dataclass
class Encoded:
    """What an encoder returns: tokens [B, N, D], pooled [B, D], valid [B, N] bool."""

    tokens: Array
    pooled: Array
    valid: Array


@flax.struct.dataclass
class Tokenized:
    """What a tokenizer returns.

    codes           [B, N, Q] int32, −1 for a token that is not there
    quantized       [B, N, D], what its decoder is given
    reconstruction  [B, C, T], in the units of the signal
    losses          name → one term of its loss, not weighed
    valid           [B, N] bool
    """

    codes: Array
    quantized: Array
    reconstruction: Array
    losses: Mapping[str, Array]
    valid: Array


@runtime_checkable
class Task(Protocol):
    """What the training loop knows of a model: nothing but these three.

    A task ties a model to a loss. `loss` must be a mean over `metrics["weight"]` units (masked samples, say), so that
    micro-batches of unequal weight accumulate to the same gradient as one large batch.
    """

    def init(self, key: Array, batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names."""

    def loss(
        self, variables: Variables, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """(value, metrics with "weight", new mutable collections)."""

    def flops(self, batch: Batch) -> float:
        """Analytic floating-point operations of one forward pass over `batch` (a multiply-add counts two)."""
