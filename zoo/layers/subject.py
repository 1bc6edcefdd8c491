"""What is a person's own: a matrix for each of them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from zoo.errors import ZooError
from zoo.layers.parameters import partitioned
from zoo.types import AnyArray, Array

UNKNOWN = ("mean", "error")


class SubjectLayer(nn.Module):
    """x → x·M_s, M_s [D, D] of each example's person s (Défossez et al., 2208.12266, §2.3).

    subjects  S: rows of the table, [S, D, D]
    start     normal: entries with deviation D^-½; identity: a person begins as nobody in particular
    unknown   what −1, a person the table does not know, gets: the mean of all matrices, or an error. Inside `jax.jit`
              nobody can be refused, and the error is a result of NaN
    """

    subjects: int
    start: str = "normal"
    unknown: str = "mean"

    @nn.compact
    def __call__(self, x: Float[AnyArray, "B ... D"], subject: Int[AnyArray, " B"]) -> Float[Array, "B ... D"]:
        """Raises ZooError for another option, and for people beyond the table where they are known (numpy)."""
        if self.start not in ("normal", "identity") or self.unknown not in UNKNOWN:
            raise ZooError(
                f"SubjectLayer: got start {self.start!r} and unknown {self.unknown!r}, wanted normal or identity, and "
                f"{' or '.join(UNKNOWN)}"
            )
        lowest = -1 if self.unknown == "mean" else 0
        if (
            isinstance(subject, np.ndarray)
            and subject.size
            and not lowest <= subject.min() <= subject.max() < self.subjects
        ):
            wrong = subject[(subject < lowest) | (subject >= self.subjects)][0]
            raise ZooError(f"SubjectLayer: got person {wrong}, wanted {lowest} to {self.subjects - 1}")
        x, width = jnp.asarray(x), x.shape[-1]
        matrices = self.param("kernel", partitioned(self._init(width), None, None, None), (self.subjects, width, width))
        other = jnp.mean(matrices, axis=0) if self.unknown == "mean" else jnp.full((width, width), jnp.nan)
        subject = jnp.asarray(subject)
        chosen = jnp.concatenate([matrices, other[None]])[jnp.where(subject < 0, self.subjects, subject)]
        flat = x.reshape(x.shape[0], -1, width)
        return jnp.einsum("bnd,bde->bne", flat, chosen.astype(x.dtype)).reshape(x.shape)

    def _init(self, width: int) -> Any:
        if self.start == "identity":
            return lambda _, shape, dtype=jnp.float32: jnp.broadcast_to(jnp.eye(width, dtype=dtype), shape)
        return nn.initializers.normal(width**-0.5)
