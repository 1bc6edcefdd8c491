"""What the forms of selected attention share beside the arrays.

Canonical arguments: q [B, T, H, K], k [B, T, L, K], v [B, T, L, V], H a multiple of L; blocks [B, T, L, n] int32, -1
for none; first and last [B, T] int32: a query sees the tokens from `first` to `last` of its chosen blocks, which says
all of causality and segments. No size is 0.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    scale: float
    block_size: int
