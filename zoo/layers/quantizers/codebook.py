"""Vector quantisation: the nearest of a set of learned vectors.

Source: van den Oord et al., "Neural Discrete Representation Learning", 1711.00937, section 3.2 (commitment and codebook
losses) and appendix A.1 (moving averages); the cosine form is that of LaBraM's tokenizer (ICLR 2024, section 2.2, and
the official code); k-means and dead codes as in SoundStream, 2107.03312, section III.C; the rotation trick from Fifty
et al., 2410.06424, equation 5.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from kernels.nearest_code import METRICS, code_statistics, nearest_code
from zoo.errors import ZooError
from zoo.layers.devices import on_devices
from zoo.layers.parameters import partitioned
from zoo.layers.quantizers.quantizer import (
    COLLECTION,
    RNG,
    Quantized,
    Quantizer,
    mean_where,
    straight_through,
    unit,
)
from zoo.types import Array

LEARNING = ("ema", "gradient")
ESTIMATORS = ("straight_through", "rotation")
LARGEST_RATIO = 10.0
"""By which the rotation trick lengthens a gradient at most."""


class VectorQuantizer(Quantizer):
    """One codebook.

    codes, dim     M codes of D numbers
    metric         l2, or cosine: inputs and codes have length one
    learning       ema: codes follow the mean of what is assigned to them; gradient: they are parameters
    decay          of the averages, also of the counts that find dead codes
    smoothing      Laplace smoothing of the counts (ema of l2)
    commitment     weight of mean((sg(q) − x)²), the term that draws inputs to their codes
    estimator      how a gradient passes: straight_through, or rotation (the angle and ratio to the code are constants)
    kmeans         iterations on the first training batch that set the codes; 0 starts uniform within ±spread
    kmeans_rows    vectors drawn of that batch; 0 takes all
    restart_below  a code whose averaged count of a batch falls below is replaced by a vector of the batch; 0: never
    spread         of uniform first codes; 0 stands for 1/codes

    Losses: commitment (weighed), and with learning gradient codebook, mean((q − sg(x))²).

    Counts begin at one, with sums to match: where they begin at zero, as in common code, the first update flings codes
    that the first batch did not use out of reach. The cosine update keeps codes that a batch does not use where they
    are. Codes learned by gradient are a parameter plus an origin in the collection, which is what k-means and restarts
    move: so they need not reach into the optimiser. Statistics, distances and updates are float32.
    """

    codes: int
    dim: int
    metric: str = "l2"
    learning: str = "ema"
    decay: float = 0.99
    smoothing: float = 1e-5
    commitment: float = 0.25
    estimator: str = "straight_through"
    kmeans: int = 10
    kmeans_rows: int = 0
    restart_below: float = 0.0
    spread: float = 0.0

    def setup(self) -> None:
        for name, options in (("metric", METRICS), ("learning", LEARNING), ("estimator", ESTIMATORS)):
            if getattr(self, name) not in options:
                raise ZooError(f"VectorQuantizer {name}: got {getattr(self, name)!r}, wanted one of {options}")
        shape = (self.codes, self.dim)
        # The origin of codes that are learned by gradient, else the codes themselves.
        self.origin = self.variable(COLLECTION, "embedding", self._first_codes)
        self.usage = self.variable(COLLECTION, "usage", jnp.ones, (self.codes,), jnp.float32)
        self.ready = self.variable(COLLECTION, "ready", lambda: jnp.asarray(self.kmeans == 0))
        if self.learning == "gradient":
            self.embedding = self.param("embedding", partitioned(nn.initializers.zeros, None, None), shape)
        elif self.metric == "l2":
            self.sums = self.variable(COLLECTION, "sums", lambda: self.origin.value)

    @property
    def code_sizes(self) -> tuple[int, ...]:
        return (self.codes,)

    def __call__(
        self, x: Float[Array, "*rows D"], *, valid: Bool[Array, "*rows"] | None = None, train: bool = False
    ) -> Quantized:
        if x.shape[-1] != self.dim:
            raise ZooError(f"VectorQuantizer: got vectors of {x.shape[-1]} numbers, wanted {self.dim}")
        x = x.astype(jnp.float32)
        if self.metric == "cosine":
            x = unit(x)
        if train and not self.is_initializing():
            self._start(x, valid)
        codebook = self.codebook()
        codes = _nearest(x, lax.stop_gradient(codebook), self.metric)
        nearest = jnp.take(codebook, codes, axis=0)
        losses = {
            "commitment": self.commitment * mean_where(jnp.square(x - lax.stop_gradient(nearest)).mean(-1), valid)
        }
        if self.learning == "gradient":
            losses["codebook"] = mean_where(jnp.square(nearest - lax.stop_gradient(x)).mean(-1), valid)
        if train and not self.is_initializing():
            self._update(lax.stop_gradient(x), codes, valid)
        quantized = self.passed(x, lax.stop_gradient(nearest))
        if valid is not None:
            codes, quantized = jnp.where(valid, codes, -1), jnp.where(valid[..., None], quantized, 0)
        return Quantized(quantized, codes[..., None], losses)

    def decode(self, codes: Int[Array, "*rows 1"]) -> Float[Array, "*rows D"]:
        rows = jnp.take(self.codebook(), jnp.maximum(codes[..., 0], 0), axis=0)
        return jnp.where(codes >= 0, rows, 0)

    @nn.nowrap
    def passed(self, x: Float[Array, "*rows D"], value: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        return (_rotated if self.estimator == "rotation" else straight_through)(x, value)

    def codebook(self) -> Float[Array, "M D"]:
        """The codes as they are now."""
        if self.learning == "ema":
            return self.origin.value
        codes = self.origin.value + self.embedding
        return unit(codes) if self.metric == "cosine" else codes

    def _first_codes(self) -> Array:
        if self.kmeans:
            return jnp.zeros((self.codes, self.dim))
        spread = self.spread or 1 / self.codes
        codes = jax.random.uniform(self.make_rng("params"), (self.codes, self.dim), minval=-spread, maxval=spread)
        return unit(codes) if self.metric == "cosine" else codes

    def _start(self, x: Array, valid: Array | None) -> None:
        """Sets the codes by k-means where no batch has yet."""
        if not self.kmeans:
            return
        rows, weight = lax.stop_gradient(_flat(x, valid))
        key = self.make_rng(RNG)

        def first(_: None) -> tuple[Array, Array]:
            codes, counts = kmeans(
                key, rows, weight, self.codes, metric=self.metric, iterations=self.kmeans, most=self.kmeans_rows
            )
            return codes, jnp.maximum(counts, 1.0)

        codes, usage = lax.cond(
            self.ready.value, lambda _: (lax.stop_gradient(self.codebook()), self.usage.value), first, None
        )
        some = (weight > 0).any()  # a level that stage dropout left without a vector waits for the next batch
        self._place(codes, usage, ~self.ready.value & some)
        self.ready.value |= some

    def _update(self, x: Array, codes: Array, valid: Array | None) -> None:
        """Averages over what this batch assigned, then new places for dead codes."""
        counts, sums = _statistics(x, codes, self.codes, jnp.ones(codes.shape, bool) if valid is None else valid)
        usage = self.decay * self.usage.value + (1 - self.decay) * counts
        self.usage.value = usage
        if self.learning == "ema" and self.metric == "cosine":
            mean = jnp.where(counts[:, None] > 0, unit(sums / jnp.maximum(counts, 1)[:, None]), self.origin.value)
            self.origin.value = unit(self.decay * self.origin.value + (1 - self.decay) * mean)
        elif self.learning == "ema":
            self.sums.value = self.decay * self.sums.value + (1 - self.decay) * sums
            total = usage.sum()
            smoothed = (usage + self.smoothing) / (total + self.codes * self.smoothing) * total
            self.origin.value = self.sums.value / smoothed[:, None]
        if self.restart_below:
            rows, weight = _flat(x, valid)
            drawn = jax.random.choice(self.make_rng(RNG), len(rows), (self.codes,), p=weight)
            dead = (usage < self.restart_below) & (weight > 0).any()
            usage = jnp.where(dead, self.restart_below, usage)
            codebook = jnp.where(dead[:, None], rows[drawn], lax.stop_gradient(self.codebook()))
            self._place(codebook, usage, dead)

    def _place(self, codes: Array, usage: Array, moved: Array) -> None:
        """Puts the codes that `moved` where they are to be, as if `usage` vectors had been assigned to each."""
        self.usage.value = usage
        moved = jnp.broadcast_to(moved, usage.shape)[:, None]
        origin = codes if self.learning == "ema" else codes - lax.stop_gradient(self.embedding)
        self.origin.value = jnp.where(moved, origin, self.origin.value)
        if self.learning == "ema" and self.metric == "l2":
            self.sums.value = jnp.where(moved, codes * usage[:, None], self.sums.value)


def kmeans(
    key: Array,
    x: Float[Array, "R D"],
    weight: Float[Array, " R"],
    codes: int,
    *,
    metric: str = "l2",
    iterations: int = 10,
    most: int = 0,
) -> tuple[Float[Array, "M D"], Float[Array, " M"]]:
    """Means [M, D] of M clusters of the rows x [R, D], and how many rows each has; Lloyd's iterations.

    weight is 1 for a row that is there and 0 for one that is not. The first means are different rows drawn at random,
    some of them twice where there are fewer rows than codes. A mean that no row is nearest to stays. `most` rows are
    drawn first; 0 takes all. With the metric cosine, rows and means have length one.
    """
    if 0 < most < len(x):
        key, draw = jax.random.split(key)
        chosen = jax.random.choice(draw, len(x), (most,), replace=False, p=weight)
        x, weight = x[chosen], weight[chosen]
    first = jax.random.choice(key, len(x), (codes,), p=weight)
    if len(x) >= codes:
        different = jax.random.choice(key, len(x), (codes,), replace=False, p=weight)
        first = jnp.where(weight[different] > 0, different, first)
    means = x[first]

    def step(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        means = carry[0]
        counts, sums = _statistics(x, _nearest(x, means, metric), codes, weight > 0)
        new = sums / jnp.maximum(counts, 1)[:, None]
        if metric == "cosine":
            new = unit(new)
        return jnp.where(counts[:, None] > 0, new, means), counts

    return lax.fori_loop(0, iterations, step, (means, jnp.zeros(codes, jnp.float32)))


def _nearest(x: Array, codebook: Array, metric: str) -> Array:
    """`nearest_code`, each device of a mesh its own rows: the compiler cannot split the kernel."""
    axes = ("batch", *(None,) * (x.ndim - 1))
    found: Array = on_devices(partial(nearest_code, metric=metric), (x, codebook), (axes, (None, None)), axes[:-1])
    return found


def _statistics(x: Array, codes: Array, size: int, valid: Array) -> tuple[Array, Array]:
    """`code_statistics`, each device of a mesh those of its own rows, which are then added."""

    def op(x: Array, codes: Array, valid: Array) -> tuple[Array, Array]:
        counts, sums = code_statistics(x, codes, size, valid=valid)
        return counts[None], sums[None]

    axes = ("batch", *(None,) * (x.ndim - 1))
    counts, sums = on_devices(
        op, (x, codes, valid), (axes, axes[:-1], axes[:-1]), (("batch", None), ("batch", None, None))
    )
    return counts.sum(0), sums.sum(0)


def _flat(x: Array, valid: Array | None) -> tuple[Array, Array]:
    """x as rows [R, D], and 1 or 0 for each: whether it is there."""
    rows = x.reshape(-1, x.shape[-1])
    return rows, jnp.ones(rows.shape[0]) if valid is None else valid.reshape(-1).astype(jnp.float32)


def _rotated(x: Array, value: Array) -> Array:
    """`value` as a constant rotation and scaling of x: gradients keep their angle to it (2410.06424, equation 5).

    The scaling of gradients ends at `LARGEST_RATIO`, where the paper's does not end: of a residual that is next to
    nothing, which a code taken from the data leaves, it would make gradients of 10⁷.
    """
    length = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
    ratio = jnp.linalg.norm(value, axis=-1, keepdims=True) / length
    here, there = lax.stop_gradient(unit(x)), unit(value)
    half = lax.stop_gradient(unit(here + there))
    turned = x - 2 * jnp.sum(x * half, -1, keepdims=True) * half + 2 * jnp.sum(x * here, -1, keepdims=True) * there
    # The sum of the two is `value` to the last bit but one, whatever the rounding of the rotation.
    return straight_through(lax.stop_gradient(jnp.minimum(ratio, LARGEST_RATIO)) * turned, value)
