"""What the forward pass of a step keeps for its backward pass."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from zoo.train.state import Program


def kept_bytes(program: Program) -> float:
    """Bytes on one device of what a micro-batch's forward pass leaves to the backward pass, parameters apart.

    Counted as what grows with the batch among the residuals of the loss (`jax.vjp`), and taken to be split as examples
    and tokens are. The compiler keeps less where it fuses, and more where it pads.
    """
    rules, mesh = program.config.rules, program.mesh
    parts = math.prod(mesh.shape[axis] for axis in (*rules.batch, *rules.tokens))
    once, twice = (_residuals(program, factor) for factor in (1, 2))
    return (twice - once) / parts


def _residuals(program: Program, factor: int) -> float:
    """Bytes on all devices, for a batch `factor` times as large as a micro-batch."""
    state, count = program.abstract(), program.config.train.accumulate

    def resized(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((leaf.shape[0] * factor // count, *leaf.shape[1:]), leaf.dtype)

    def forward(params: Any, collections: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            return program.task.loss({"params": params, **collections}, batch, jax.random.key(0), True)[0]

        return jax.vjp(loss, params)[1]

    found = jax.eval_shape(forward, state.params, state.collections, jax.tree.map(resized, program.batch))
    return float(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(found)))
