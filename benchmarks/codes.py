"""Nearest-code search and a codebook's statistics, as `benchmarks/kernels.py` measures them.

Sizes go by letter: N vectors, D their width, M codes. Neither has a gradient.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from benchmarks.kernel_cases import Arrays, Case, Mode

LETTERS = {"nearest_code": "NDM", "code_statistics": "NDM"}
_SHAPES = (
    ("N65536,D64,M8192", "float32"),
    ("N262144,D32,M8192", "float32"),
    ("N65536,D256,M1024", "bfloat16"),
)
DEFAULTS = dict.fromkeys(LETTERS, _SHAPES)
QUICK = dict.fromkeys(LETTERS, (("N8192,D64,M1024", "float32"), ("N65536,D64,M1024", "float32")))
SMALL = {"N": 512, "M": 256}
MODES = dict.fromkeys(LETTERS, ("forward",))


def variant(case: Case) -> str:
    return case.metric if case.op == "nearest_code" else ""


def shapes(case: Case, step: bool) -> dict[str, jax.ShapeDtypeStruct]:
    s, dtype = case.sizes, jnp.dtype(case.dtype)
    x = jax.ShapeDtypeStruct((s["N"], s["D"]), dtype)
    if case.op == "nearest_code":
        return {"x": x, "codebook": jax.ShapeDtypeStruct((s["M"], s["D"]), dtype)}
    return {"x": x, "codes": jax.ShapeDtypeStruct((s["N"],), jnp.dtype("int32"))}


def numbers(case: Case, name: str, random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal vectors and codes; which code a vector has is drawn from those of the smallest codebook."""
    if name == "codes":
        return random.integers(0, SMALL["M"], shape)
    return random.standard_normal(shape, np.float32)


def operation(case: Case, name: str | None) -> Callable[[Arrays], Arrays]:
    """The operation in one of its implementations, from named arrays to named arrays."""
    module = importlib.import_module("kernels.nearest_code")

    def call(arrays: Arrays) -> Arrays:
        if case.op == "nearest_code":
            return {"codes": module.nearest_code(**arrays, metric=case.metric, implementation=name)}
        counts, sums = module.code_statistics(**arrays, size=case.sizes["M"], implementation=name)
        return {"counts": counts, "sums": sums}

    return call


def work(case: Case, mode: Mode, method: str) -> tuple[float, float]:
    """Operations and bytes of one call."""
    n, d, m = (case.sizes[letter] for letter in "NDM")
    size = jnp.dtype(case.dtype).itemsize
    if case.op == "nearest_code":
        return 2 * n * d * m, (n + m) * d * size + 4 * n
    return n * d, n * d * size + 4 * n + 4 * m * (d + 1)
