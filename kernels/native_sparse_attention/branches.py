"""What the two forms of native sparse attention share: arguments given once or for each branch, and the gated sum."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels.checks import check_floating, check_shape
from kernels.chunks import compute_dtype

Branches = jax.Array | tuple[jax.Array, jax.Array, jax.Array]
"""One array for all branches, or those of the compressed, the selected and the window branch."""


def checked(
    op: str, q: Branches, k: Branches, v: Branches, gates: Any, leading: str
) -> tuple[dict[str, int], tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """The sizes by letter and the branches' queries, keys and values; `leading` axes are "B T" or "B".

    Raises:
      ValueError: an argument of another shape or dtype.
    """
    sizes: dict[str, int] = {}
    queries, keys, values = (by_branch(op, name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    for query, key, value in zip(queries, keys, values, strict=True):
        check_shape(op, "q", query, f"{leading} H K", sizes)
        check_shape(op, "k", key, f"{leading} G K", sizes)
        check_shape(op, "v", value, f"{leading} G V", sizes)
        check_floating(op, {"q": query, "k": key, "v": value})
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ValueError(f"{op}: k: got {sizes['G']} heads, wanted a divisor of the {sizes['H']} of q")
    check_shape(op, "gates", gates, f"{leading} H 3", sizes | {"3": 3})
    check_floating(op, {"gates": gates})
    return sizes, queries, keys, values


def by_branch(op: str, name: str, x: Branches) -> tuple[Any, ...]:
    """Three arrays; raises ValueError for another number of them."""
    if not isinstance(x, tuple | list):
        return x, x, x
    if len(x) != 3:
        raise ValueError(f"{op}: {name}: got {len(x)} arrays, wanted one or three: compressed, selected, window")
    return tuple(x)


def by_kind(op: str, compress: Any) -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
    """How keys and how values are compressed; raises ValueError for another number of functions."""
    if not isinstance(compress, tuple | list):
        return compress, compress
    if len(compress) != 2:
        raise ValueError(f"{op}: compress: got {len(compress)} functions, wanted one or two: for keys, for values")
    return compress[0], compress[1]


def gated_sum(gates: jax.Array, *branches: jax.Array) -> jax.Array:
    """gates [..., n], n branches [..., V] → their weighted sum [..., V] in the branches' dtype."""
    dtype, _ = compute_dtype(gates, *branches)
    out = jnp.zeros(branches[0].shape, dtype)
    for n, branch in enumerate(branches):
        out += gates[..., n, None].astype(dtype) * branch.astype(dtype)
    return out.astype(jnp.result_type(*branches))
