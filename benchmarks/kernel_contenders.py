"""What `benchmarks/kernels.py` compares: programs from named arrays to named arrays, and the check they must pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_cases import Arrays, Case, Mode, draw

BOUNDS = {"float32": (1e-4, 2e-3), "bfloat16": (5e-3, 2e-2)}
"""Largest RMS(error) / RMS(float64 reference), or share of wrong whole numbers, of values and of gradients."""


def unchanged(arrays: Arrays) -> Arrays:
    return arrays


@dataclass(frozen=True)
class Contender:
    """One way to compute an operation.

    Attributes:
        name: shown in the table
        call: inputs by name → results by name; what is timed
        definition: the same, defined; computed in float64 for the check
        takes: names of the inputs
        method: whose counts of work hold
        note: how it is set
        inward, outward: to and from its own layout, outside of the timing; gradients are named as their inputs are
    """

    name: str
    call: Callable[[Arrays], Arrays]
    definition: Callable[[Arrays], Arrays]
    takes: Sequence[str]
    method: str
    note: str = ""
    inward: Callable[[Arrays], Arrays] = unchanged
    outward: Callable[[Arrays], Arrays] = unchanged


def implementation(case: Case, name: str | None, label: str = "") -> Contender:
    """The operation in one of its implementations."""
    operation = case.family.operation
    return Contender(
        label or str(name), operation(case, name), operation(case, "reference"), tuple(case.shapes()), case.op
    )


def one_step(case: Case) -> Contender:
    """The operation's one-step form."""
    call, definition, inward = case.family.step(case)
    return Contender("step", call, definition, tuple(case.shapes(step=True)), case.op, inward=inward)


def program(call: Callable[[Arrays], Arrays], mode: Mode) -> Callable[..., Arrays]:
    """What is run: inputs → results, or inputs and the results' cotangents → results and gradients ("d_q", …)."""
    if mode != "forward_backward":
        return call

    def both(arrays: Arrays, cotangents: Arrays) -> Arrays:
        chosen = {name: array for name, array in arrays.items() if not jnp.issubdtype(array.dtype, jnp.floating)}
        moving = {name: array for name, array in arrays.items() if name not in chosen}
        results, pull = jax.vjp(lambda moving: call(moving | chosen), moving)
        (gradients,) = pull(cotangents)
        return {**results, **{f"d_{name}": gradient for name, gradient in gradients.items()}}

    return both


def inputs(contender: Contender, case: Case, mode: Mode) -> tuple[Arrays, ...]:
    """Random arguments of the contender's program, in the public layout."""
    shapes = case.shapes(step=mode == "step")
    arrays = {name: array for name, array in draw(case, shapes).items() if name in contender.takes}
    if mode != "forward_backward":
        return (arrays,)
    return arrays, draw(case, results(contender, arrays), seed=1)


def results(contender: Contender, arrays: Any) -> Any:
    """Shapes of the results, in the public layout; asked of the contender, as a definition may lay out all pairs."""
    return jax.eval_shape(lambda arrays: contender.outward(contender.call(contender.inward(arrays))), arrays)


def check(contender: Contender, case: Case, mode: Mode) -> dict[str, float]:
    """Relative RMS errors by result, at a cut-down size, against the definition in float64."""
    arguments = inputs(contender, case.small(), mode)
    got = contender.outward(run_exactly(program(contender.call, mode), *map(contender.inward, arguments)))
    with jax.enable_x64(True):
        exact = jax.tree.map(_in_float64, arguments)
        wanted = jax.jit(program(contender.definition, mode))(*exact)
    return {name: _relative_error(np.asarray(got[name], np.float64), np.asarray(wanted[name])) for name in wanted}


def failures(errors: dict[str, float], dtype: str) -> dict[str, float]:
    """Those of the errors that are above their bound; NaN is."""
    value, gradient = BOUNDS[dtype]
    return {
        name: error for name, error in errors.items() if not error <= (gradient if name.startswith("d_") else value)
    }


def run_exactly(function: Callable[..., Any], *arguments: Any) -> Any:
    compiled = lowered(function, *arguments).compile()
    return jax.block_until_ready(compiled(*arguments))


def lowered(function: Callable[..., Any], *arguments: Any) -> Any:
    """Lowers with full float32 matrix products where every input is float32, so that all contenders compute alike."""
    half = any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(arguments))
    with jax.default_matmul_precision("default" if half else "highest"):
        return jax.jit(function).lower(*arguments)


def _in_float64(x: jax.Array) -> jax.Array:
    return jnp.asarray(np.asarray(x), jnp.float64 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)


def _relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    """RMS(got - wanted) / RMS(wanted); of whole numbers the share that differs."""
    if np.issubdtype(wanted.dtype, np.integer):
        return float(np.mean(got != wanted))
    return float(np.sqrt(np.mean((got - wanted) ** 2)) / (np.sqrt(np.mean(wanted**2)) + 1e-8))
