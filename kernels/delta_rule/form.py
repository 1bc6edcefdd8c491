"""What the forms of the delta rule share beside the arrays.

Canonical arguments: q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V], beta [B, T, Hb], log_decay None or float32
[B, T, Hg, 1 or K], initial_state [B, H, K, V]; H is the largest head count and every other divides it. Resets at
segment starts are part of log_decay (`kernels.packing`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    scale: float
    chunk_size: int
