"""A vector quantiser's search for the nearest code, and the statistics its codebook is updated with.

Neither is differentiable: gradients of their arguments are zero. Rows may be split over the devices of a mesh along any
leading axis: under `jax.jit` the XLA forms then work on every device's own rows. The compiler cannot split the Pallas
kernels; on several TPUs call both on every device's own part:

    def local(x, codebook):  # x [B / devices, N, D]
        codes = nearest_code(x, codebook)
        return codes, jax.lax.psum(code_statistics(x, codes, len(codebook)), "data")

    jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P("data"), P()), check_vma=False)
"""

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax import lax

from kernels import dispatch
from kernels.checks import check_floating, check_shape
from kernels.chunks import compute_dtype
from kernels.nearest_code import reference as definition
from kernels.nearest_code import tpu, xla

METRICS = ("l2", "cosine")


def nearest_code(
    x: jax.Array, codebook: jax.Array, *, metric: str = "l2", implementation: str | None = None
) -> jax.Array:
    """The index of the code nearest to each row; of equally near ones the lowest.

    Section 3.1 of VQ-VAE (1711.00937, "l2"); the cosine form is that of LaBraM's tokenizer (2405.18765, section 2.2).
    Distances are compared as |c|² / 2 - x · c, rounded to float32 (float64 where an argument is): codes whose distances
    differ by less than the rounding of |x| |c| count as equally near, and either may be found. Equal codes give equal
    numbers. The distances of all rows and codes never exist together.

    Args:
      x: [..., D] with any leading axes.
      codebook: [M, D].
      metric: "l2", the smallest Euclidean distance, or "cosine", the largest cosine; that of a vector of zeros with any
        other is 0.
      implementation: None (best for the platform), "reference", "xla" or "pallas".

    Returns:
      codes: [...] int32. A row that holds NaN or infinity gets code 0; a code that holds one is never found while there
      are others.

    Raises:
      ValueError: an argument of another shape or dtype, an unknown metric.
      NotImplementedError: "pallas" where it cannot serve.
    """
    op = "nearest_code"
    check_floating(op, {"x": x, "codebook": codebook})
    sizes = {"D": _width(op, x)}
    check_shape(op, "codebook", codebook, "M D", sizes)
    if sizes["M"] == 0:
        raise ValueError(f"{op}: codebook: got no codes, wanted at least one")
    if metric not in METRICS:
        raise ValueError(f"{op}: metric: got {metric!r}, wanted one of {METRICS}")
    x, codebook = lax.stop_gradient(jnp.asarray(x)), lax.stop_gradient(jnp.asarray(codebook))
    refusal = tpu.refusal(jnp.result_type(x, codebook), prod(x.shape[:-1]), sizes["D"])
    dispatch.check_implementation(op, implementation, refusal)
    dtype, precision = compute_dtype(x, codebook)
    codebook = codebook.astype(dtype)

    if implementation == "reference":
        return definition.nearest_code(x.astype(dtype), codebook, metric=metric)
    usable = jnp.all(jnp.isfinite(codebook), axis=-1)
    codebook = jnp.where(usable[:, None], codebook, 0)
    if metric == "cosine":  # the length of x does not change which code is nearest
        codebook, offset = definition.unit(codebook), jnp.zeros(sizes["M"], dtype)
    else:
        offset = jnp.sum(codebook**2, axis=-1) / 2
    codes = dispatch.run(
        implementation,
        refusal,
        partial(xla.nearest_code, precision),
        partial(tpu.nearest_code, precision),
        x,
        codebook,
        jnp.where(usable, offset, jnp.inf),
    )
    return jnp.where(jnp.all(jnp.isfinite(x), axis=-1), codes, 0)


def code_statistics(
    x: jax.Array, codes: jax.Array, size: int, *, valid: jax.Array | None = None, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """How many rows have each code, and their sum: what an exponential moving average of a codebook is updated with.

    Section A.1 of VQ-VAE (1711.00937). The same result twice, bit for bit, on one device.

    Args:
      x: [..., D] with any leading axes.
      codes: [...] integers. Rows with a code outside 0 to M - 1 are left out, as are rows of x that hold NaN or
        infinity; the sum of `counts` tells how many were not.
      size: M, the number of codes.
      valid: [...] bool; rows where it is false, such as masked tokens, are left out.
      implementation: None (best for the platform), "reference", "xla" or "pallas".

    Returns:
      counts [M] and sums [M, D], float32 (float64 where x is).

    Raises:
      ValueError: an argument of another shape or dtype.
      NotImplementedError: "pallas" where it cannot serve.
    """
    op = "code_statistics"
    check_floating(op, {"x": x})
    width, rows = _width(op, x), jnp.shape(x)[:-1]
    for name, array, kind in (("codes", codes, jnp.integer), ("valid", valid, jnp.bool)):
        if array is None:
            continue
        if jnp.shape(array) != rows:
            raise ValueError(f"{op}: {name}: got shape {jnp.shape(array)}, wanted {rows} as x has rows")
        if not jnp.issubdtype(jnp.result_type(array), kind):
            raise ValueError(f"{op}: {name}: got dtype {jnp.result_type(array)}, wanted {kind.__name__}")
    if size < 1:
        raise ValueError(f"{op}: size: got {size}, wanted at least 1")
    x, codes = lax.stop_gradient(jnp.asarray(x)), jnp.asarray(codes)
    codes = codes.astype(jnp.promote_types(codes.dtype, jnp.int32))  # one of few bits cannot be compared with `size`
    refusal = tpu.refusal(x.dtype, prod(rows), width)
    dispatch.check_implementation(op, implementation, refusal)
    dtype, precision = compute_dtype(x)

    kept = (codes >= 0) & (codes < size) & jnp.all(jnp.isfinite(x), axis=-1)
    if valid is not None:
        kept &= valid
    x = jnp.where(kept[..., None], x, 0).astype(dtype)
    codes = jnp.where(kept, codes, size).astype(jnp.int32)
    if implementation == "reference":
        return definition.code_statistics(x, codes, size)
    return dispatch.run(
        implementation,
        refusal,
        partial(xla.code_statistics, size, precision),
        partial(tpu.code_statistics, size, precision),
        x,
        codes,
    )


def _width(op: str, x: jax.Array) -> int:
    """D of x [..., D]; raises ValueError where there is none."""
    shape = jnp.shape(x)
    if not shape or shape[-1] == 0:
        raise ValueError(f"{op}: x: got shape {shape}, wanted [..., D] with D at least 1")
    return shape[-1]
