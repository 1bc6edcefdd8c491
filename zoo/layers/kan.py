"""Selectable Kolmogorov–Arnold layers: learned functions on edges, each input choosing what family they come from.

Source: Yang et al., "Activation Space Selectable Kolmogorov-Arnold Networks" (2408.08338); B-splines with a SiLU branch
Liu et al., KAN (2404.19756), eq. 2.10–2.11; other families after the networks named beside them. The paper trains all
families, then their choice, then prunes; how the choice is weighted we did not find: here a softmax over families for
each input, and its argmax once `hard`.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from zoo.errors import ZooError
from zoo.layers.parameters import fan_in, norm, partitioned
from zoo.types import Array

GRID, ORDER, DEGREE = 5, 3, 4
"""Intervals on [−1, 1] and order of splines (KAN's defaults); degree of polynomials."""
CENTRES = GRID + ORDER
"""Bumps of the local families, as many as there are B-splines."""
GRAM_POINTS = 16
"""Equidistant points on which Gram polynomials are orthogonal."""


def spline(x: Float[Array, "*lead"]) -> Float[Array, "*lead n"]:
    """SiLU, and the B-splines of KAN: grid extended by `ORDER` knots on both sides. They are 0 off the grid."""
    knots = -1 + 2 / GRID * jnp.arange(-ORDER, GRID + ORDER + 1, dtype=x.dtype)
    x = x[..., None]
    basis = ((x >= knots[:-1]) & (x < knots[1:])).astype(x.dtype)
    for p in range(1, ORDER + 1):
        rising = (x - knots[: -p - 1]) / (knots[p:-1] - knots[: -p - 1]) * basis[..., :-1]
        falling = (knots[p + 1 :] - x) / (knots[p + 1 :] - knots[1:-p]) * basis[..., 1:]
        basis = rising + falling
    return jnp.concatenate([jax.nn.silu(x), basis], axis=-1)


def gaussian(x: Float[Array, "*lead"]) -> Float[Array, "*lead n"]:
    """exp(−u²), u the distance to each centre in steps between them (FastKAN, 2405.06721)."""
    return jnp.exp(-(_steps(x) ** 2))


def switch(x: Float[Array, "*lead"]) -> Float[Array, "*lead n"]:
    """1 − tanh²(u), reflectional switches (FasterKAN)."""
    return 1 - jnp.tanh(_steps(x)) ** 2


def wavelet(x: Float[Array, "*lead"]) -> Float[Array, "*lead n"]:
    """Mexican hats 2 / (√3 π^¼) (1 − u²) exp(−u² / 2) (Wav-KAN, 2405.12832)."""
    u = _steps(x)
    return 2 / (3**0.5 * jnp.pi**0.25) * (1 - u**2) * jnp.exp(-(u**2) / 2)


def relu(x: Float[Array, "*lead"]) -> Float[Array, "*lead n"]:
    """(relu(e − x) relu(x − s))² · 16 / (e − s)⁴, bumps of height 1 on [s, e] (ReLU-KAN, 2406.02075)."""
    starts = -1 + 2 / GRID * jnp.arange(-ORDER, GRID, dtype=x.dtype)
    width = 2 / GRID * (ORDER + 1)
    x = x[..., None]
    return (jax.nn.relu(starts + width - x) * jax.nn.relu(x - starts)) ** 2 * 16 / width**4


def chebyshev(x: Float[Array, "*lead"]) -> Float[Array, "*lead n"]:
    """T_0 to T_4 of tanh x (ChebyKAN)."""
    return _polynomials(jnp.tanh(x), lambda n: (1.0 if n == 0 else 2.0, 1.0))


def gram(x: Float[Array, "*lead"]) -> Float[Array, "*lead n"]:
    """Monic polynomials of tanh x, orthogonal on `GRAM_POINTS` equidistant points."""
    m = GRAM_POINTS
    return _polynomials(jnp.tanh(x), lambda n: (1.0, n**2 * (m**2 - n**2) / (m**2 * (4 * n**2 - 1))))


def jacobi(x: Float[Array, "*lead"]) -> Float[Array, "*lead n"]:
    """Jacobi polynomials of tanh x with alpha = beta = 1, the first derivatives of Legendre's (JacobiKAN)."""

    def factors(n: int) -> tuple[float, float]:
        return (2 * n + 3) * (n + 2) / ((n + 1) * (n + 3)), (n + 2) / (n + 3)

    return _polynomials(jnp.tanh(x), factors)


BASES: dict[str, Callable[[Array], Array]] = {
    each.__name__: each for each in (spline, gaussian, switch, chebyshev, gram, wavelet, jacobi, relu)
}


class KAN(nn.Module):
    """Two layers of y_o = sum_i sum_m pi_im phi^m_oi(x_i), D → hidden → D, each after a layer norm.

    phi^m_oi is a linear combination of the functions of family m; pi_i = softmax(logits_i / temperature).

    hidden       width; D unless given
    bases        the families, names of `BASES`
    temperature  1 at the beginning of training, .1 at its end (our choice)
    hard         only each input's best family is used; gradients are those of the softmax (straight through)
    """

    dim: int
    hidden: int | None = None
    bases: tuple[str, ...] = tuple(BASES)
    temperature: float = 1.0
    hard: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*lead D"], *, train: bool = False) -> Float[Array, "*lead D"]:
        unknown = [name for name in self.bases if name not in BASES]
        if unknown or not self.bases:
            raise ZooError(f"kan: bases are some of {', '.join(BASES)}, got {self.bases}")
        if self.temperature <= 0:
            raise ZooError(f"kan: temperature: got {self.temperature}, wanted more than 0")
        hidden = self.dim if self.hidden is None else self.hidden
        for name, axes, width in (("in", ("embed", "mlp"), hidden), ("out", ("mlp", "embed"), self.dim)):
            x = norm("layer", axis=axes[0], name=f"{name}_norm")(x)
            x = self._layer(x, name, axes, width)
        return x

    def _layer(
        self, x: Float[Array, "*lead I"], name: str, axes: tuple[str, str], outputs: int
    ) -> Float[Array, "*lead O"]:
        families = [BASES[each](x) for each in self.bases]
        if len(families) > 1:
            shape = x.shape[-1], len(families)
            logits = self.param(f"{name}_choice", partitioned(nn.initializers.zeros, axes[0], None), shape)
            pi = jax.nn.softmax(logits / self.temperature, axis=-1)
            if self.hard:
                pi = pi + jax.lax.stop_gradient(jax.nn.one_hot(pi.argmax(-1), len(families)) - pi)
            families = [family * pi[:, m, None] for m, family in enumerate(families)]
        basis = jnp.concatenate(families, axis=-1).astype(self.dtype)
        initial = partitioned(fan_in((0, 1), (2,)), axes[0], None, axes[1])
        kernel = self.param(name, initial, (*basis.shape[-2:], outputs))
        return jnp.einsum("...in,ino->...o", basis, kernel.astype(self.dtype))


def _steps(x: Float[Array, "*lead"]) -> Float[Array, "*lead n"]:
    """Distance to `CENTRES` places on [−1, 1], in steps between them."""
    return (x[..., None] - jnp.linspace(-1, 1, CENTRES, dtype=x.dtype)) * (CENTRES - 1) / 2


def _polynomials(x: Float[Array, "*lead"], factors: Callable[[int], tuple[float, float]]) -> Float[Array, "*lead n"]:
    """p_0 to p_DEGREE with p_{n+1} = a_n x p_n − b_n p_{n−1} and (a_n, b_n) = factors(n)."""
    before, now = jnp.zeros_like(x), jnp.ones_like(x)
    each = [now]
    for n in range(DEGREE):
        a, b = factors(n)
        before, now = now, a * x * now - b * before
        each.append(now)
    return jnp.stack(each, axis=-1)
