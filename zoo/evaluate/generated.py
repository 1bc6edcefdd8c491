"""How near made windows are to real ones: spectra by class, and the discrepancy of two sets.

Source: ArtifactGen, arXiv 2509.08188. The bandwidth of the discrepancy is the median distance of what is real, always,
so that two makers are measured by the same kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from zoo.types import AnyArray, Array


def class_spectra(signal: Float[AnyArray, "B C T"], label: Int[AnyArray, " B"], classes: int) -> Float[Array, "K C F"]:
    """Mean power spectrum of each class's windows, T/2 + 1 bins, orthonormal transform; 0 where a class has none."""
    power = jnp.square(jnp.abs(jnp.fft.rfft(jnp.asarray(signal, jnp.float32), norm="ortho")))
    own = jax.nn.one_hot(jnp.asarray(label), classes)
    return jnp.einsum("bk,bcf->kcf", own, power) / jnp.maximum(own.sum(0), 1)[:, None, None]


def median_distance(real: Float[AnyArray, "B ..."]) -> Float[Array, ""]:
    """Median distance of two different windows: the bandwidth of `mmd`, always that of what is real."""
    rows = jnp.asarray(real, jnp.float32).reshape(len(real), -1)
    return jnp.median(jnp.sqrt(_squares(rows, rows))[jnp.triu_indices(len(rows), 1)])


def mmd(
    real: Float[AnyArray, "B ..."], made: Float[AnyArray, "M ..."], bandwidth: float | Float[Array, ""]
) -> Float[Array, ""]:
    """Squared maximum mean discrepancy with the kernel exp(−‖x − y‖² / (2·bandwidth²)), without bias.

    Source: Gretton et al., A Kernel Two-Sample Test, JMLR 13, 2012, equation 3. May be a little below 0 for equal ones.
    """
    a, b = (jnp.asarray(each, jnp.float32).reshape(len(each), -1) for each in (real, made))

    def kernel(x: Array, y: Array) -> Array:
        return jnp.exp(-_squares(x, y) / (2 * bandwidth**2))

    def within(x: Array) -> Array:
        return (kernel(x, x).sum() - len(x)) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * kernel(a, b).mean()


def _squares(a: Array, b: Array) -> Array:
    return jnp.maximum(jnp.square(a).sum(1)[:, None] + jnp.square(b).sum(1) - 2 * a @ b.T, 0)
