"""What `benchmarks/kernels.py` compares: programs from named arrays to named arrays, and the check they must pass."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_cases import LOWEST, Arrays, Case, Mode, draw
from zoo.errors import ZooError

BOUNDS = {"float32": (1e-4, 2e-3), "bfloat16": (5e-3, 2e-2)}
"""Largest RMS(error) / RMS(float64 reference) of values and of gradients."""
TOKAMAX = "tokamax==0.0.17"


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
    return Contender(
        label or str(name), _operation(case, name), _operation(case, "reference"), tuple(case.shapes()), case.op
    )


def one_step(case: Case) -> Contender:
    """The operation's one-step form; its definition is the operation on one token."""
    shapes = case.shapes(step=True)
    step = getattr(importlib.import_module(f"kernels.{case.op}"), f"{case.op}_step")
    timed = set(case.shapes()) - {name for name, shape in case.shapes().items() if shape == shapes[name]}
    whole = _operation(case, "reference")

    def call(arrays: Arrays) -> Arrays:
        rest = {name: array for name, array in arrays.items() if name != "initial_state"}
        out, state = step(**rest, state=arrays["initial_state"])
        return {"out": out, "final_state": state}

    def definition(arrays: Arrays) -> Arrays:
        results = whole({name: array[:, None] if name in timed else array for name, array in arrays.items()})
        return {**results, "out": results["out"][:, 0]}

    return Contender("step", call, definition, tuple(shapes), case.op)


def softmax_attention(case: Case) -> Contender:
    """`jax.nn.dot_product_attention` on the same q, k and v, without any gate or state."""
    if case.op != "linear_attention":
        raise ZooError(f"--against dot_product_attention: serves linear_attention, got --op {case.op}")
    s = case.sizes
    if s["K"] != s["V"] or "G" in s:
        raise ZooError(f"--against dot_product_attention: wanted as wide values as keys, and no G, got {case}")

    def call(arrays: Arrays) -> Arrays:
        return {"out": jax.nn.dot_product_attention(arrays["q"], arrays["k"], arrays["v"], is_causal=case.causal)}

    def definition(arrays: Arrays) -> Arrays:
        scores = jnp.einsum("bthk,bshk->bhts", arrays["q"], arrays["k"]) * s["K"] ** -0.5
        if case.causal:
            scores = jnp.where(jnp.tri(scores.shape[-1], dtype=bool), scores, -jnp.inf)
        return {"out": jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores), arrays["v"])}

    name = "dot_product_attention"
    return Contender(name, call, definition, ("q", "k", "v"), name, "softmax, no gate, no state")


def tokamax(case: Case) -> Contender:
    """tokamax's KDA in its chunked XLA form, which takes gates before their activation and heads first."""
    if case.op != "delta_rule" or case.gate != "channel" or "G" in case.sizes:
        raise ZooError(
            "--against tokamax: its only chunked XLA form is KDA: wanted --op delta_rule --gate channel without G, "
            f"got --op {case.op} --gate {case.gate} and {case}"
        )
    try:
        kda = importlib.import_module("tokamax._src.ops.kda.api").kimi_delta_attention
    except ModuleNotFoundError as missing:
        raise ZooError(
            f"--against tokamax: {missing.name} is not installed; pip install {TOKAMAX} (Python 3.12)"
        ) from None

    def call(arrays: Arrays) -> Arrays:
        out, state = kda(
            arrays["q"],
            arrays["k"],
            arrays["v"],
            arrays["gate"],
            arrays["beta"],
            a_log=jnp.zeros(case.sizes["H"]),
            initial_state=arrays["initial_state"],
            output_final_state=True,
            use_gate_in_kernel=True,
            lower_bound=LOWEST,
            implementation="xla_chunked",
        )
        return {"out": out, "final_state": state}

    def relaid(order: Sequence[int], heads_first: bool) -> Callable[[Arrays], Arrays]:
        def relay(arrays: Arrays) -> Arrays:
            return {
                name: (array[:, None] if heads_first else array[:, 0])
                if name.endswith("_state")
                else jnp.transpose(array, (*order, *range(3, array.ndim)))
                for name, array in arrays.items()
            }

        return relay

    return Contender(
        "tokamax",
        call,
        _operation(case, "reference"),
        tuple(case.shapes()),
        case.op,
        f"{TOKAMAX} KDA, xla_chunked, chunks of 64, gates {LOWEST:g}·sigmoid inside",
        relaid((2, 0, 1), heads_first=True),
        relaid((1, 2, 0), heads_first=False),
    )


def _operation(case: Case, name: str | None) -> Callable[[Arrays], Arrays]:
    op = getattr(importlib.import_module(f"kernels.{case.op}"), case.op)
    options: dict[str, Any] = {"implementation": name}
    if not case.causal:
        options["causal"] = False

    def call(arrays: Arrays) -> Arrays:
        arrays = dict(arrays)
        if "gate" in arrays:
            arrays["log_decay"] = LOWEST * jax.nn.sigmoid(arrays.pop("gate"))
        out, final_state = op(**arrays, **options)
        return {"out": out, "final_state": final_state}

    return call


def program(call: Callable[[Arrays], Arrays], mode: Mode) -> Callable[..., Arrays]:
    """What is run: inputs → results, or inputs and the results' cotangents → results and gradients ("d_q", …)."""
    if mode != "forward_backward":
        return call

    def both(arrays: Arrays, cotangents: Arrays) -> Arrays:
        results, pull = jax.vjp(call, arrays)
        (gradients,) = pull(cotangents)
        return {**results, **{f"d_{name}": gradient for name, gradient in gradients.items()}}

    return both


def inputs(contender: Contender, case: Case, mode: Mode) -> tuple[Arrays, ...]:
    """Random arguments of the contender's program, in the public layout."""
    shapes = case.shapes(step=mode == "step")
    arrays = {name: array for name, array in draw(shapes).items() if name in contender.takes}
    if mode != "forward_backward":
        return (arrays,)
    return arrays, draw(jax.eval_shape(contender.definition, arrays), seed=1)


def check(contender: Contender, case: Case, mode: Mode) -> dict[str, float]:
    """Relative RMS errors by result, at a cut-down size, against the definition in float64."""
    arguments = inputs(contender, case.small(), mode)
    got = contender.outward(run_exactly(program(contender.call, mode), *map(contender.inward, arguments)))
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), arguments)
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


def _relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - wanted) ** 2)) / (np.sqrt(np.mean(wanted**2)) + 1e-8))
