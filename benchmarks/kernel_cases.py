"""What `benchmarks/kernels.py` measures an operation on: shapes, random arrays, and counts of work.

A family of operations is a module: letters of its shapes, default shapes, arrays, the operation, its one-step form and
the work of a call. `Case` is one operation on one shape; its methods ask the family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import codes, recurrences, sparse
from zoo.errors import ZooError

Op = Literal[
    "linear_attention",
    "delta_rule",
    "linear_scan",
    "selective_scan",
    "sparse_attention",
    "compressed_attention",
    "select_blocks",
    "selected_attention",
    "native_sparse_attention",
    "moba",
    "local_latent_attention",
    "global_latent_attention",
    "nearest_code",
    "code_statistics",
]
Gate = Literal["none", "head", "scalar", "channel"]
Dtype = Literal["float32", "bfloat16"]
Mode = Literal["forward", "forward_backward", "step"]
Mask = Literal["causal", "window", "symmetric_window", "segments", "longformer", "strided", "blocks"]
Arrays = dict[str, jax.Array]

FAMILIES: Mapping[str, ModuleType] = {
    op: family for family in (recurrences, sparse, codes) for op in get_args(Op) if op in family.LETTERS
}


@dataclass(frozen=True)
class Case:
    """One operation on one shape.

    Attributes:
        op: the operation
        sizes: by letter
        gate: of a recurrence
        dtype: of q, k, v, x and the like
        causal: whether a recurrence looks only back
        bounded: hands the decay over before its activation, as `gate`, for a comparison with code that activates inside
        mask: of sparse_attention
        window: tokens of a window, of a segment, and the stride of a strided mask
        block_size: tokens of a block that is chosen
        stride: of compressed blocks, which are twice as long
        chosen: blocks a query chooses
        density: share of the blocks that a mask of blocks has on
        metric: of nearest_code
    """

    op: Op
    sizes: Mapping[str, int]
    gate: Gate
    dtype: Dtype
    causal: bool = True
    bounded: bool = False
    mask: Mask = "window"
    window: int = 512
    block_size: int = 64
    stride: int = 16
    chosen: int = 16
    density: float = 0.25
    metric: Literal["l2", "cosine"] = "l2"

    def __str__(self) -> str:
        return " ".join(f"{letter}{size}" for letter, size in self.sizes.items())

    @property
    def family(self) -> ModuleType:
        return FAMILIES[self.op]

    @property
    def length(self) -> int:
        """Tokens, or vectors."""
        return self.sizes["T" if "T" in self.sizes else "N"]

    @property
    def variant(self) -> str:
        """What else than the shape tells this case from others, in a word or two."""
        return str(self.family.variant(self))

    def small(self) -> Case:
        """The same widths and rest of T after whole chunks, few enough tokens and heads for a float64 check."""
        most = dict(self.family.SMALL)
        if "T" in most and self.sizes["T"] > most["T"]:
            most["T"] += self.sizes["T"] % 64
        sizes = {letter: min(size, most.get(letter, size)) for letter, size in self.sizes.items()}
        if "G" in sizes:
            sizes["G"] = max(sizes["H"] * self.sizes["G"] // self.sizes["H"], 1)
        return replace(self, sizes=sizes)

    def shapes(self, step: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
        """Every array the operation takes; for its one-step form with `step`."""
        shapes: dict[str, jax.ShapeDtypeStruct] = self.family.shapes(self, step)
        return shapes


def parse_shape(op: str, text: str) -> dict[str, int]:
    """ "B1,T8192,H96,K128,V128", letters in any order, → sizes in the operation's order; ZooError for anything else."""
    letters = FAMILIES[op].LETTERS[op]
    optional = "G" if "H" in letters else ""
    parts = [re.fullmatch(r"([A-Z])([1-9][0-9]*)", part) for part in text.split(",")]
    found = {part[1]: int(part[2]) for part in parts if part}
    if len(found) != len(parts) or not set(letters) <= set(found) <= set(letters + optional):
        example = ",".join(f"{letter}{size}" for letter, size in zip(letters, (1, 4096, 4, 64, 64), strict=False))
        raise ZooError(f"--shape: got {text!r}, wanted each of {' '.join(letters)} once with its size, as in {example}")
    if "G" in found and (found["H"] % found["G"]):
        raise ZooError(f"--shape: got {text!r}: H={found['H']} is no multiple of G={found['G']}")
    return {letter: found[letter] for letter in letters + optional if letter in found}


def draw(case: Case, shapes: Mapping[str, jax.ShapeDtypeStruct], seed: int = 0) -> Arrays:
    """Random arrays, each of the kind its name asks for."""
    random = np.random.default_rng(seed)
    return {
        name: jnp.asarray(case.family.numbers(case, name, random, each.shape), each.dtype)
        for name, each in shapes.items()
    }


@dataclass(frozen=True)
class Counts:
    """Work of one call: floating-point operations of the form that is timed, and bytes if each array moved once."""

    flops: float
    bytes: float


def counts(case: Case, mode: Mode, method: str) -> Counts:
    """The work of `method`: one of the operations, or what it is compared with."""
    return Counts(*case.family.work(case, mode, method))
