"""Masks of which a part is at hand: a device holds a stretch of the queries and meets stretches of the keys."""

from dataclasses import dataclass
from typing import Any

from kernels.sparse_attention.mask import All, Causal, Compressed, Either, Full, Mask, Strided, Window

FAR = 2**40
"""Further than any two tokens are apart."""


@dataclass(frozen=True)
class Shifted(Mask):
    """`mask` where the first query is number `queries` of it and the first key number `keys`, both 0 or more."""

    mask: Mask
    queries: Any = 0
    keys: Any = 0

    def visible(self, t: Any, j: Any, bits: Any = 0) -> Any:
        return self.mask.visible(t + self.queries, j + self.keys, bits)

    def bounds(self, t: tuple[Any, Any], j: tuple[Any, Any]) -> tuple[Any, Any]:
        (t0, t1), (j0, j1) = t, j
        return self.mask.bounds((t0 + self.queries, t1 + self.queries), (j0 + self.keys, j1 + self.keys))


def distances(mask: Mask) -> tuple[int, int] | None:
    """The least and the most that t - j is where query t sees key j, FAR where there is no limit.

    None for a mask that tells of more than how far apart they are, such as of where a sequence begins.
    """
    match mask:
        case Full() | Strided():
            return -FAR, FAR
        case Causal():
            return 0, FAR
        case Window(size, symmetric):
            return (-(size // 2), size // 2) if symmetric else (0, size - 1)
        case Compressed(size, 1):
            return size - 1, FAR
        case All(left, right) | Either(left, right):
            one, other = distances(left), distances(right)
            if one is None or other is None:
                return None
            inner, outer = (max, min) if isinstance(mask, All) else (min, max)
            return inner(one[0], other[0]), outer(one[1], other[1])
    return None


def piece(mask: Mask, length: int, queries: int, keys: int) -> Mask | None:
    """What `length` queries from number `queries` on see of as many keys from number `keys` on, None for nothing."""
    some, whole = mask.bounds((queries, queries + length - 1), (keys, keys + length - 1))
    if not some:
        return None
    return Full() if whole else Shifted(mask, queries, keys)
