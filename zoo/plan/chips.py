"""What chips can do, from their makers' data sheets: memory, arithmetic, and the wires between them.

TPU: cloud.google.com/tpu/docs, the page of each version. NVIDIA: data sheets of A100, H100, H200 and B200. Bandwidths
are of one direction, all links of a chip together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zoo.errors import ZooError


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    memory      bytes
    flops       dense bfloat16, operations a second
    bandwidth   of its memory, bytes a second
    wires       to its neighbours (ICI, NVLink), bytes a second
    network     its share of the data-centre network, bytes a second
    kinds       `device_kind`s that it goes by
    node        devices that share a host
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    wires: float
    network: float
    kinds: tuple[str, ...]
    node: int


_GIB = 2.0**30
_TABLE = (
    Chip("v4", 32 * _GIB, 275e12, 1.228e12, 150e9, 6.25e9, ("TPU v4",), 4),
    Chip("v5e", 16 * _GIB, 197e12, 0.819e12, 100e9, 3.125e9, ("TPU v5 lite", "TPU v5e"), 8),
    Chip("v5p", 95 * _GIB, 459e12, 2.765e12, 300e9, 6.25e9, ("TPU v5", "TPU v5p"), 4),
    Chip("v6e", 32 * _GIB, 918e12, 1.640e12, 224e9, 6.25e9, ("TPU v6 lite", "TPU v6e"), 8),
    # A 7x chip is two devices: half of the data sheet each.
    Chip("7x", 96 * _GIB, 1153.5e12, 3.690e12, 300e9, 6.25e9, ("TPU7x", "TPU v7x"), 8),
    Chip("a100", 80e9, 312e12, 2.039e12, 300e9, 25e9, ("NVIDIA A100-SXM4-80GB",), 8),
    Chip("h100", 80e9, 989e12, 3.350e12, 450e9, 50e9, ("NVIDIA H100 80GB HBM3",), 8),
    Chip("h200", 141e9, 989e12, 4.800e12, 450e9, 50e9, ("NVIDIA H200",), 8),
    Chip("b200", 180e9, 2250e12, 8.000e12, 900e9, 50e9, ("NVIDIA B200",), 8),
)
CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in _TABLE}
NVIDIA = ("a100", "h100", "h200", "b200")


def chip(name: str) -> Chip:
    """The chip of that name; ZooError with all names for another."""
    if name not in CHIPS:
        raise ZooError(f"no chip is called {name!r}; there are {', '.join(CHIPS)}")
    return CHIPS[name]
