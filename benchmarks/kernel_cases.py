"""What `benchmarks/kernels.py` measures an operation on: shapes, random arrays, and counts of work.

Sizes go by letter: B batch, T time, H heads, K key width, V value width, and G heads of q and k where they are fewer
(linear_attention, delta_rule); D features (the scans) and N states (selective_scan).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kernels.checks import check_chunk_size
from zoo.errors import ZooError

Op = Literal["linear_attention", "delta_rule", "linear_scan", "selective_scan"]
Gate = Literal["none", "head", "scalar", "channel"]
Dtype = Literal["float32", "bfloat16"]
Mode = Literal["forward", "forward_backward", "step"]
Arrays = dict[str, jax.Array]

LETTERS: Mapping[str, str] = {
    "linear_attention": "BTHKV",
    "delta_rule": "BTHKV",
    "linear_scan": "BTD",
    "selective_scan": "BTDN",
}
ATTENTION_DEFAULTS = (
    ("B1,T8192,H96,K128,V128", "bfloat16"),
    ("B2,T16384,H16,K128,V128", "bfloat16"),
    ("B4,T2048,H16,K128,V128", "bfloat16"),
    ("B32,T1024,H8,K64,V64", "float32"),
    ("B8,T30000,H4,K32,V32", "float32"),
)
SCAN_DEFAULTS = (
    ("B1,T8192,D12288", "bfloat16"),
    ("B2,T16384,D2048", "bfloat16"),
    ("B4,T2048,D2048", "bfloat16"),
    ("B32,T1024,D512", "float32"),
    ("B8,T30000,D128", "float32"),
)
SELECTIVE_DEFAULTS = tuple((f"{shape},N16", dtype) for shape, dtype in SCAN_DEFAULTS)
DEFAULTS = {
    "linear_attention": ATTENTION_DEFAULTS,
    "delta_rule": ATTENTION_DEFAULTS,
    "linear_scan": SCAN_DEFAULTS,
    "selective_scan": SELECTIVE_DEFAULTS,
}
QUICK_ATTENTION = (("B1,T4096,H4,K64,V64", "float32"), ("B1,T16384,H4,K64,V64", "float32"))
QUICK_SCAN = (("B1,T4096,D256", "float32"), ("B1,T16384,D256", "float32"))
QUICK = {
    "linear_attention": QUICK_ATTENTION,
    "delta_rule": QUICK_ATTENTION,
    "linear_scan": QUICK_SCAN,
    "selective_scan": tuple((f"{shape},N16", dtype) for shape, dtype in QUICK_SCAN),
}
LOWEST = -5.0
"""The bound of bounded gates: log decay = LOWEST · sigmoid(gate)."""


@dataclass(frozen=True)
class Case:
    """One operation on one shape.

    `bounded` hands the decay over before its activation, as `gate`, for a comparison with code that activates inside.
    """

    op: Op
    sizes: Mapping[str, int]
    gate: Gate
    dtype: Dtype
    causal: bool = True
    bounded: bool = False

    def __str__(self) -> str:
        return " ".join(f"{letter}{size}" for letter, size in self.sizes.items())

    def small(self) -> Case:
        """The same widths, gates and rest of T after whole chunks, few enough tokens and heads for a float64 check."""
        most = {"B": 2, "T": 192 + self.sizes["T"] % 64, "H": 4, "D": 64}
        sizes = {letter: min(size, most.get(letter, size)) for letter, size in self.sizes.items()}
        if "G" in sizes:
            sizes["G"] = max(sizes["H"] * self.sizes["G"] // self.sizes["H"], 1)
        return replace(self, sizes=sizes)

    def shapes(self, step: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
        """Every array the operation takes; without the time axis for its one-step form."""
        s, dtype = self.sizes, jnp.dtype(self.dtype)
        given: dict[str, tuple[tuple[int, ...], jnp.dtype]]
        single = jnp.dtype("float32")
        time = (s["B"],) if step else (s["B"], s["T"])
        if self.op in ("linear_attention", "delta_rule"):
            few = s.get("G", s["H"])
            given = dict.fromkeys(("q", "k"), ((*time, few, s["K"]), dtype))
            given["v"] = ((*time, s["H"], s["V"]), dtype)
            if self.op == "delta_rule":
                given["beta"] = ((*time, s["H"]), dtype)
            if self.gate != "none":
                decay = {"head": (s["H"],), "scalar": (*time, s["H"]), "channel": (*time, s["H"], s["K"])}[self.gate]
                given["gate" if self.bounded else "log_decay"] = (decay, single)
            given["initial_state"] = ((s["B"], s["H"], s["K"], s["V"]), single)
        elif self.op == "linear_scan":
            given = {"x": ((*time, s["D"]), dtype), "log_decay": ((*time, s["D"]), single)}
            given["initial_state"] = ((s["B"], s["D"]), single)
        else:
            given = dict.fromkeys(("u", "delta"), ((*time, s["D"]), dtype))
            given |= {"A": ((s["D"], s["N"]), single)}
            given |= dict.fromkeys(("B", "C"), ((*time, s["N"]), dtype))
            given |= {"D": ((s["D"],), single), "initial_state": ((s["B"], s["D"], s["N"]), single)}
        return {name: jax.ShapeDtypeStruct(shape, kind) for name, (shape, kind) in given.items()}


def parse_shape(op: str, text: str) -> dict[str, int]:
    """ "B1,T8192,H96,K128,V128", letters in any order, → sizes in the operation's order; ZooError for anything else."""
    letters = LETTERS[op]
    optional = "G" if "H" in letters else ""
    parts = [re.fullmatch(r"([A-Z])([1-9][0-9]*)", part) for part in text.split(",")]
    found = {part[1]: int(part[2]) for part in parts if part}
    if len(found) != len(parts) or not set(letters) <= set(found) <= set(letters + optional):
        example = ",".join(f"{letter}{size}" for letter, size in zip(letters, (1, 4096, 4, 64, 64), strict=False))
        raise ZooError(f"--shape: got {text!r}, wanted each of {' '.join(letters)} once with its size, as in {example}")
    if "G" in found and (found["H"] % found["G"]):
        raise ZooError(f"--shape: got {text!r}: H={found['H']} is no multiple of G={found['G']}")
    return {letter: found[letter] for letter in letters + optional if letter in found}


def draw(shapes: Mapping[str, jax.ShapeDtypeStruct], seed: int = 0) -> Arrays:
    """Random arrays, each of the kind its name asks for: unit keys, strengths in (0, 1), decays at three strengths."""
    random = np.random.default_rng(seed)
    return {
        name: jnp.asarray(_of_kind(name, random.standard_normal(shape.shape, np.float32)), shape.dtype)
        for name, shape in shapes.items()
    }


def _of_kind(name: str, x: np.ndarray) -> np.ndarray:
    """Standard normal numbers → numbers that may be the array `name`."""
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


@dataclass(frozen=True)
class Counts:
    """Work of one call: floating-point operations of the chunked form, and bytes if each array moved once."""

    flops: float
    bytes: float


def counts(case: Case, mode: Mode, method: str) -> Counts:
    """The work of `method`: one of the operations, or "dot_product_attention".

    Backward bytes are those of reading the inputs and the output's cotangent and writing the gradients. States are left
    out except in a step, which does nothing but move them.
    """
    s = case.sizes
    elements = s["B"] * (1 if mode == "step" else s["T"]) * s.get("H", s.get("D", 1))
    if mode == "step":
        flops, size = _step(case)
        return Counts(elements * flops, elements * size)
    forward, backward = _flops(case, method)
    read, written, gates = _bytes(case, method)
    if mode == "forward":
        return Counts(elements * forward, elements * (read + written + gates))
    return Counts(elements * (forward + backward), elements * (3 * read + 2 * written + 3 * gates))


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
