"""How two sets of vectors are brought together where no row is anyone's answer: correlation and transport.

All is float32 and has gradients for both sides.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from zoo.errors import ZooError
from zoo.types import AnyArray, Array


def cca_loss(
    ours: Float[AnyArray, "B D"],
    theirs: Float[AnyArray, "B E"],
    components: int = 0,
    valid: Bool[AnyArray, " B"] | None = None,
    *,
    regulariser: float = 1e-3,
) -> Float[Array, ""]:
    """Minus the sum of the largest canonical correlations of the batch (Andrew et al., Deep CCA, ICML 2013, §3).

    components   how many count; 0 all min(D, E)
    valid        rows that are there
    regulariser  added to the diagonals of both covariances

    The correlations are the singular values of Σ₁^-½ Σ₁₂ Σ₂^-½. They are taken of L₁^-1 Σ₁₂ L₂^-T here, L the Cholesky
    factors: a rotation of the same matrix, whose gradient stays finite where covariances have equal eigenvalues.
    Raises ZooError for more components than there are.
    """
    most = min(ours.shape[1], theirs.shape[1])
    if not 0 <= components <= most:
        raise ZooError(f"cca_loss components: got {components}, wanted 0 to {most}")
    here = jnp.ones(len(ours), bool) if valid is None else jnp.asarray(valid)
    count = jnp.maximum(here.sum(), 2)

    def centred(rows: AnyArray) -> Array:
        rows = jnp.where(here[:, None], jnp.asarray(rows, jnp.float32), 0)
        return jnp.where(here[:, None], rows - rows.sum(0) / count, 0)

    a, b = centred(ours), centred(theirs)
    between = a.T @ b / (count - 1)
    for side, rows in enumerate((a, b)):
        within = rows.T @ rows / (count - 1) + regulariser * jnp.eye(rows.shape[1])
        factor = jnp.linalg.cholesky(within)
        between = jax.scipy.linalg.solve_triangular(factor, between if side == 0 else between.T, lower=True)
    correlations = jnp.linalg.svd(between, compute_uv=False)
    return -jnp.sum(correlations[: components or most])


def wasserstein(ours: Float[AnyArray, "*rows N"], theirs: Float[AnyArray, "*rows M"]) -> Float[Array, "*rows"]:
    """Wasserstein-1 distance of two sets of numbers, along the last axis, each number of a set counting the same.

    Exact: ∫ |F⁻¹(q) − G⁻¹(q)| dq over sorted numbers (Villani, Topics in Optimal Transportation, 2003, remark 2.19).
    Where N = M it is the mean difference of the sorted sets.
    """
    a, b = (jnp.sort(jnp.asarray(each, jnp.float32), axis=-1) for each in (ours, theirs))
    n, m = a.shape[-1], b.shape[-1]
    # In parts of 1 / (n·m) both quantile functions step at whole numbers.
    edges = np.unique(np.concatenate([np.arange(n + 1) * m, np.arange(m + 1) * n]))
    share = np.diff(edges).astype(np.float32) / (n * m)
    return jnp.sum(share * jnp.abs(a[..., edges[:-1] // m] - b[..., edges[:-1] // n]), axis=-1)


def sinkhorn(
    ours: Float[AnyArray, "N D"],
    theirs: Float[AnyArray, "M D"],
    *,
    blur: float = 0.1,
    iterations: int = 100,
) -> Float[Array, ""]:
    """Cost of moving one cloud of points onto the other, distances not squared, blurred by entropy (Cuturi, 1306.0895).

    min over plans P of Σ P·‖x_i − y_j‖ + blur · KL(P ‖ 1/NM), every point of a cloud weighing the same, found by
    `iterations` of Sinkhorn's in log space. Towards blur 0 it is Wasserstein-1, and needs more iterations. The
    gradient is that of the minimum: the plan stands still, the distances move.
    """
    a, b = jnp.asarray(ours, jnp.float32), jnp.asarray(theirs, jnp.float32)
    square = jnp.sum(jnp.square(a[:, None] - b), axis=-1)
    apart = square > 0
    distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1)), 0)
    cost = jax.lax.stop_gradient(distance) / blur

    def turn(potentials: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        f, g = potentials
        f = np.log(len(b)) - jax.nn.logsumexp(g - cost, axis=1)
        g = np.log(len(a)) - jax.nn.logsumexp(f[:, None] - cost, axis=0)
        return (f, g), None

    (f, g), _ = jax.lax.scan(turn, (jnp.zeros(len(a)), jnp.zeros(len(b))), None, length=iterations)
    relative = f[:, None] + g - cost
    plan = jnp.exp(relative) / (len(a) * len(b))
    return jnp.sum(plan * distance) + blur * jnp.sum(plan * relative)
