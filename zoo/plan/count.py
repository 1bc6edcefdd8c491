"""Operations of a program, counted from its jaxpr: loops as often as they run, over all devices together.

The compiler's own count (`cost_analysis`) takes the body of a loop once and one device alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax


def operations(function: Callable[..., Any], *arguments: Any) -> float:
    """Operations in matmuls and convolutions of `function(*arguments)`, a multiply-add counting two.

    arguments may be shapes (`jax.ShapeDtypeStruct`). What is recomputed in the backward pass counts. Of branches the
    dearest counts; a `while` whose length is not known counts once.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> float:
    return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * inner
    if name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        # A kernel that is dilated or an input that is (in gradients of strides) meets zeros, which are no work.
        return 2.0 * math.prod(out) * math.prod(kernel) / outputs / math.prod(params["lhs_dilation"])
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    if name == "pallas_call":
        return _count(params["jaxpr"]) * math.prod(params["grid_mapping"].grid or (1,))
    times = float(params["length"]) if name == "scan" else 1.0
    if name == "shard_map":
        times = float(params["mesh"].size)
    return times * sum(_count(inner) for inner in _inner(params))


def _inner(params: Any) -> list[Any]:
    """The programs inside an equation's parameters."""
    found = []
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(each, "jaxpr", each)
            if hasattr(inner, "eqns"):
                found.append(inner)
    return found
