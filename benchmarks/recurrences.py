"""Linear attention, the delta rule and the scans, as `benchmarks/kernels.py` measures them.

Sizes go by letter: B batch, T time, H heads, K key width, V value width, and G heads of q and k where they are fewer
(linear_attention, delta_rule); D features (the scans) and N states (selective_scan).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.checks import check_chunk_size

if TYPE_CHECKING:
    from benchmarks.kernel_cases import Arrays, Case, Mode

LETTERS: Mapping[str, str] = {
    "linear_attention": "BTHKV",
    "delta_rule": "BTHKV",
    "linear_scan": "BTD",
    "selective_scan": "BTDN",
}
_ATTENTION = (
    ("B1,T8192,H96,K128,V128", "bfloat16"),
    ("B2,T16384,H16,K128,V128", "bfloat16"),
    ("B4,T2048,H16,K128,V128", "bfloat16"),
    ("B32,T1024,H8,K64,V64", "float32"),
    ("B8,T30000,H4,K32,V32", "float32"),
)
_SCANS = (
    ("B1,T8192,D12288", "bfloat16"),
    ("B2,T16384,D2048", "bfloat16"),
    ("B4,T2048,D2048", "bfloat16"),
    ("B32,T1024,D512", "float32"),
    ("B8,T30000,D128", "float32"),
)
_SELECTIVE = tuple((f"{shape},N16", dtype) for shape, dtype in _SCANS)
DEFAULTS = {
    "linear_attention": _ATTENTION,
    "delta_rule": _ATTENTION,
    "linear_scan": _SCANS,
    "selective_scan": _SELECTIVE,
}
_QUICK_ATTENTION = (("B1,T4096,H4,K64,V64", "float32"), ("B1,T16384,H4,K64,V64", "float32"))
_QUICK_SCAN = (("B1,T4096,D256", "float32"), ("B1,T16384,D256", "float32"))
QUICK = {
    "linear_attention": _QUICK_ATTENTION,
    "delta_rule": _QUICK_ATTENTION,
    "linear_scan": _QUICK_SCAN,
    "selective_scan": tuple((f"{shape},N16", dtype) for shape, dtype in _QUICK_SCAN),
}
MODES = dict.fromkeys(LETTERS, ("forward", "forward_backward", "step"))
SMALL = {"B": 2, "T": 192, "H": 4, "D": 64}
"""Sizes of the check, at most; the rest of T after whole chunks is kept."""
LOWEST = -5.0
"""The bound of bounded gates: log decay = LOWEST · sigmoid(gate)."""


def variant(case: Case) -> str:
    return case.gate


def shapes(case: Case, step: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """Every array the operation takes; without the time axis for its one-step form."""
    s, dtype = case.sizes, jnp.dtype(case.dtype)
    given: dict[str, tuple[tuple[int, ...], jnp.dtype]]
    single = jnp.dtype("float32")
    time = (s["B"],) if step else (s["B"], s["T"])
    if case.op in ("linear_attention", "delta_rule"):
        few = s.get("G", s["H"])
        given = dict.fromkeys(("q", "k"), ((*time, few, s["K"]), dtype))
        given["v"] = ((*time, s["H"], s["V"]), dtype)
        if case.op == "delta_rule":
            given["beta"] = ((*time, s["H"]), dtype)
        if case.gate != "none":
            decay = {"head": (s["H"],), "scalar": (*time, s["H"]), "channel": (*time, s["H"], s["K"])}[case.gate]
            given["gate" if case.bounded else "log_decay"] = (decay, single)
        given["initial_state"] = ((s["B"], s["H"], s["K"], s["V"]), single)
    elif case.op == "linear_scan":
        given = {"x": ((*time, s["D"]), dtype), "log_decay": ((*time, s["D"]), single)}
        given["initial_state"] = ((s["B"], s["D"]), single)
    else:
        given = dict.fromkeys(("u", "delta"), ((*time, s["D"]), dtype))
        given |= {"A": ((s["D"], s["N"]), single)}
        given |= dict.fromkeys(("B", "C"), ((*time, s["N"]), dtype))
        given |= {"D": ((s["D"],), single), "initial_state": ((s["B"], s["D"], s["N"]), single)}
    return {name: jax.ShapeDtypeStruct(shape, kind) for name, (shape, kind) in given.items()}


def numbers(case: Case, name: str, random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """What may be the array `name`: unit keys, strengths in (0, 1), decays at three strengths."""
    x = random.standard_normal(shape, np.float32)
    if name in ("q", "k"):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)
    if name == "beta":
        return 1 / (1 + np.exp(-x))
    if name == "delta":
        return np.logaddexp(0, x - 2)
    if name == "A":
        return -np.broadcast_to(np.arange(1, x.shape[1] + 1, dtype=np.float32), x.shape)
    if name == "log_decay":
        axis = {1: 0, 2: 1, 3: 2, 4: 2}[x.ndim]
        strength = np.resize(np.array([10, 1, 0.1], np.float32), x.shape[axis])
        return -np.logaddexp(0, -x) * strength.reshape(-1, *[1] * (x.ndim - 1 - axis))
    return x


def operation(case: Case, name: str | None) -> Callable[[Arrays], Arrays]:
    """The operation in one of its implementations, from named arrays to named arrays."""
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


def step(case: Case) -> tuple[Callable[[Arrays], Arrays], ...]:
    """The one-step form, its definition (the operation on one token), and what arranges its arguments."""
    shapes_ = shapes(case, step=True)
    one = getattr(importlib.import_module(f"kernels.{case.op}"), f"{case.op}_step")
    timed = set(shapes(case, step=False)) - {
        name for name, shape in shapes(case, step=False).items() if shape == shapes_[name]
    }
    whole = operation(case, "reference")

    def call(arrays: Arrays) -> Arrays:
        rest = {name: array for name, array in arrays.items() if name != "initial_state"}
        out, state = one(**rest, state=arrays["initial_state"])
        return {"out": out, "final_state": state}

    def definition(arrays: Arrays) -> Arrays:
        results = whole({name: array[:, None] if name in timed else array for name, array in arrays.items()})
        return {**results, "out": results["out"][:, 0]}

    return call, definition, lambda arrays: arrays


def work(case: Case, mode: Mode, method: str) -> tuple[float, float]:
    """Operations and bytes of one call of the chunked form.

    Backward bytes are those of reading the inputs and the output's cotangent and writing the gradients. States are left
    out except in a step, which does nothing but move them.
    """
    s = case.sizes
    elements = s["B"] * (1 if mode == "step" else s["T"]) * s.get("H", s.get("D", 1))
    if mode == "step":
        flops, size = _step(case)
        return elements * flops, elements * size
    forward, backward = _flops(case, method)
    read, written, gates = _bytes(case, method)
    if mode == "forward":
        return elements * forward, elements * (read + written + gates)
    return elements * (forward + backward), elements * (3 * read + 2 * written + 3 * gates)


def _flops(case: Case, method: str) -> tuple[float, float]:
    """Forward and backward, for a token and head (or feature)."""
    s = case.sizes
    if method == "linear_scan":
        return 2, 6  # backward: states again, reversed scan, d_log_decay = decay · d_state · state before
    if method == "selective_scan":
        return 9 * s["N"], 26 * s["N"]  # backward: states again, then 17 an element of the state for six gradients
    key, value, chunk = s["K"], s["V"], check_chunk_size(method, None)
    if method == "delta_rule":
        return (
            2 * chunk * (3 * key + 2 * value) + 6 * key * value,
            2 * chunk * (6 * key + 5 * value) + 16 * key * value,
        )
    if method == "dot_product_attention":
        seen = s["T"] / 2 if case.causal else s["T"]
        return 2 * (key + value) * seen, 2 * (3 * key + 2 * value) * seen
    if not case.causal and case.gate == "none":
        return 4 * key * value, 10 * key * value
    directions = 1 if case.causal else 2
    return (
        directions * (2 * chunk * (key + value) + 4 * key * value),
        directions * (2 * chunk * (3 * key + 2 * value) + 10 * key * value),
    )


def _bytes(case: Case, method: str) -> tuple[float, float, float]:
    """Read and written without gates, and gates, for a token and head (or feature)."""
    s, size = case.sizes, jnp.dtype(case.dtype).itemsize
    if method == "linear_scan":
        return size, size, 4
    if method == "selective_scan":
        return (2 + 2 * s["N"] / s["D"]) * size, size, 0
    shared = s.get("G", s["H"]) / s["H"]
    read = (2 * shared * s["K"] + s["V"]) * size
    if method == "delta_rule":
        read += size
    gates = 0 if method == "dot_product_attention" else {"scalar": 4, "channel": 4 * s["K"]}.get(case.gate, 0)
    return read, s["V"] * size, gates


def _step(case: Case) -> tuple[float, float]:
    """Operations, and bytes of the float32 state read and written, of one token's step for a head (or feature)."""
    s = case.sizes
    if case.op == "linear_scan":
        return 2, 8
    if case.op == "selective_scan":
        return 9 * s["N"], 8 * s["N"]
    of_gate = {"linear_attention": {"scalar": 5, "channel": 5}, "delta_rule": {"channel": 8}}[case.op]
    per_entry = of_gate.get(case.gate, 4 if case.op == "linear_attention" else 7)
    return per_entry * s["K"] * s["V"], 8 * s["K"] * s["V"]
