"""Which key a query sees, as one object that is composed with & and |.

    Causal() & Window(512)                                  the last 512 tokens
    Causal() & (Window(512) | Sinks(4))                     a sleep night as a stream: recent tokens and a few sinks
    Window(512, symmetric=True) | Global(2)                 Longformer (2004.05150): local, with two global tokens
    Window(192, symmetric=True) | Global(64) | Blocks(random, 64)    BigBird (2007.14062), `random` bool [T/64, T/64]
    Causal() & (Window(128) | Strided(128))                 sparse transformer (1904.10509)
    Segments((400, 250, 350)) & Causal()                    three recordings in one row

Queries and keys are counted from 0, so where there are fewer queries than keys query t is the key at t, too. A mask has
no size; `dense(time_q, time_k)` shows it, `block_map` tells which blocks of it are empty. Masks are immutable; all but
`Blocks`, which holds an array, are equal where they say the same.
"""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FIRST_MAP, MOST_MAPS = 2, 29  # the bit of a tile that tells of the first map, and how many there are but the sign


class Mask:
    """Any of the masks below, or several of them joined: `a & b` sees what both see, `a | b` what either sees."""

    def __post_init__(self) -> None:
        for number in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, number.name)
            if number.type is int and not (isinstance(value, int | np.integer) and value >= 1):
                wanted = "wanted a whole number of at least 1"
                raise ValueError(f"{type(self).__name__}: {number.name}: got {value}, {wanted}")

    def __and__(self, other: "Mask") -> "Mask":
        return All(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return Either(self, other) if isinstance(other, Mask) else NotImplemented

    def visible(self, t: Any, j: Any, bits: Any = 0) -> Any:
        """Whether query t sees key j: integer arrays of NumPy, JAX or inside a Pallas kernel that broadcast, → bool.

        `bits` are those of the tile that holds (t, j): what the maps of `Blocks` say there (`tiles.Tiles`).
        """
        raise NotImplementedError

    def bounds(self, t: tuple[Any, Any], j: tuple[Any, Any]) -> tuple[Any, Any]:
        """For queries t[0] … t[1] and keys j[0] … j[1], arrays that broadcast: may a pair be seen, are all of them?

        Never False for the first where a pair is seen, never True for the second where one is not.
        """
        raise NotImplementedError

    def reach(self, time: int) -> tuple[int, int]:
        """(first, last): what a query t sees of the keys j <= t has j < first or t - j < last; at most `time` each."""
        return 0, time

    def check(self, op: str, time_q: int, time_k: int) -> None:
        """Raises ValueError where the mask is not one of so many queries and keys."""

    def block_map(self, time_q: int, time_k: int, block_q: int, block_k: int) -> np.ndarray:
        """[…, time_q / block_q, time_k / block_k] uint8 (rounded up): 0 nothing of a block is visible, 1 some, 2 all.

        Where masks are joined, it may be 1 where 0 or 2 were right, never the other way round. Leading axes are those
        of the maps of `Blocks`.

        Raises:
          ValueError: the mask does not fit the sizes, a block crosses the border of a map's, or a map is traced.
        """
        self.check("block_map", time_q, time_k)
        check_divides("block_map", self, block_q, block_k)
        if any(leaf.traced for leaf in maps(self)):
            raise ValueError("block_map: Blocks: map: got a traced array, wanted one whose values are known")
        some, whole = self.bounds(*grid(time_q, time_k, block_q, block_k))
        return np.where(some, 1 + whole, 0).astype(np.uint8)

    def dense(self, time_q: int, time_k: int) -> Any:
        """[…, time_q, time_k] bool, for people and tests: a NumPy array, or a JAX one where a map is traced.

        Raises:
          ValueError: the mask does not fit the sizes.
        """
        self.check("dense", time_q, time_k)
        t, j = np.arange(time_q)[:, None], np.arange(time_k)
        seen = predicate(self).visible(t, j, map_bits(self, t, j))
        return seen | np.zeros((time_q, time_k), bool)


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def visible(self, t: Any, j: Any, bits: Any = 0) -> Any:
        return (t >= 0) & (j >= 0)

    def bounds(self, t: tuple[Any, Any], j: tuple[Any, Any]) -> tuple[Any, Any]:
        return self.visible(t[0], j[0]), self.visible(t[0], j[0])


@dataclass(frozen=True)
class Causal(Mask):
    """Keys up to and with the query's own: j <= t."""

    def visible(self, t: Any, j: Any, bits: Any = 0) -> Any:
        return j <= t

    def bounds(self, t: tuple[Any, Any], j: tuple[Any, Any]) -> tuple[Any, Any]:
        return j[0] <= t[1], j[1] <= t[0]


@dataclass(frozen=True)
class Window(Mask):
    """The last `size` keys, the query's own among them: t - size < j <= t; symmetric: |t - j| <= size // 2."""

    size: int
    symmetric: bool = False

    @property
    def _distances(self) -> tuple[int, int]:
        return (-(self.size // 2), self.size // 2) if self.symmetric else (0, self.size - 1)

    def visible(self, t: Any, j: Any, bits: Any = 0) -> Any:
        least, most = self._distances
        return (t - j >= least) & (t - j <= most)

    def bounds(self, t: tuple[Any, Any], j: tuple[Any, Any]) -> tuple[Any, Any]:
        least, most = self._distances
        near, far = t[0] - j[1], t[1] - j[0]
        return (far >= least) & (near <= most), (near >= least) & (far <= most)

    def reach(self, time: int) -> tuple[int, int]:
        return 0, min(self._distances[1] + 1, time)


@dataclass(frozen=True)
class Segments(Mask):
    """Neighbouring tokens cut into segments of these lengths, each of which sees itself.

    The lengths add up to the number of queries and to that of keys. Where they are all the same (the last may be
    shorter) a token's segment is one division, otherwise a comparison for every border: for hundreds of unlike ones
    give `segment_ids` to the operation instead.
    """

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(int(length) for length in self.lengths))
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"Segments: lengths: got {self.lengths}, wanted one length or more of at least 1 token")

    def _segment(self, t: Any) -> Any:
        """A number that is the same for the tokens of a segment and grows from one to the next."""
        *others, last = self.lengths
        if len(set(others)) <= 1 and last <= max(others, default=last):
            return t - t % max(others, default=last)  # its first token; in TPU kernels there is no // but %
        segment = t * 0
        for border in np.cumsum(others).tolist():
            segment += (t >= border).astype(segment.dtype)
        return segment

    def visible(self, t: Any, j: Any, bits: Any = 0) -> Any:
        return self._segment(t) == self._segment(j)

    def bounds(self, t: tuple[Any, Any], j: tuple[Any, Any]) -> tuple[Any, Any]:
        (t0, t1), (j0, j1) = ([self._segment(bound) for bound in pair] for pair in (t, j))
        return (t0 <= j1) & (j0 <= t1), (t0 == t1) & (j0 == j1) & (t0 == j0)

    def reach(self, time: int) -> tuple[int, int]:
        return 0, min(max(self.lengths), time)

    def check(self, op: str, time_q: int, time_k: int) -> None:
        if not sum(self.lengths) == time_q == time_k:
            wanted = f"wanted as many as queries ({time_q}) and keys ({time_k})"
            raise ValueError(f"{op}: Segments: lengths: got {sum(self.lengths)} tokens in all, {wanted}")


@dataclass(frozen=True)
class Global(Mask):
    """The first `count` tokens see all keys and are seen by all queries."""

    count: int

    def visible(self, t: Any, j: Any, bits: Any = 0) -> Any:
        return (t < self.count) | (j < self.count)

    def bounds(self, t: tuple[Any, Any], j: tuple[Any, Any]) -> tuple[Any, Any]:
        return self.visible(t[0], j[0]), self.visible(t[1], j[1])

    def reach(self, time: int) -> tuple[int, int]:
        return min(self.count, time), 0


@dataclass(frozen=True)
class Sinks(Mask):
    """The first `count` keys are seen by all queries (2309.17453)."""

    count: int

    def visible(self, t: Any, j: Any, bits: Any = 0) -> Any:
        return (j < self.count) & (t >= 0)

    def bounds(self, t: tuple[Any, Any], j: tuple[Any, Any]) -> tuple[Any, Any]:
        return self.visible(t[0], j[0]), self.visible(t[0], j[1])

    def reach(self, time: int) -> tuple[int, int]:
        return min(self.count, time), 0


@dataclass(frozen=True)
class Strided(Mask):
    """Every `stride`-th key, counted from the query's own: t - j is a multiple of `stride` (1904.10509, section 4.2).

    Alone it skips no work, for nearly every block holds such a key.
    """

    stride: int

    def visible(self, t: Any, j: Any, bits: Any = 0) -> Any:
        return t % self.stride == j % self.stride

    def bounds(self, t: tuple[Any, Any], j: tuple[Any, Any]) -> tuple[Any, Any]:
        near, far = t[0] - j[1], t[1] - j[0]
        multiple = far // self.stride * self.stride >= near
        return multiple, multiple & ((near == far) | (self.stride == 1))


@dataclass(frozen=True)
class Compressed(Mask):
    """Key j stands for the `block_size` tokens from j * stride on; it is seen once the last of them has passed.

    That is, by queries t with j * stride + block_size <= t + 1 (native sparse attention, 2502.11089, section 3.3.1).
    """

    block_size: int
    stride: int

    def _end(self, j: Any) -> Any:
        return j * self.stride + (self.block_size - 1)

    def visible(self, t: Any, j: Any, bits: Any = 0) -> Any:
        return self._end(j) <= t

    def bounds(self, t: tuple[Any, Any], j: tuple[Any, Any]) -> tuple[Any, Any]:
        return self._end(j[0]) <= t[1], self._end(j[1]) <= t[0]


@dataclass(frozen=True, eq=False)
class Blocks(Mask):
    """Blocks of queries see blocks of keys where `map` is true.

    Args:
      map: bool [nq, nk], [H, nq, nk], or [B, H, nq, nk] where B may be 1 and H may be 1, the number of query heads or
        that of key heads; nq blocks hold all queries, nk all keys, the last ones may be short. Values that are known
        when a program is traced cost nothing; a map that is traced itself is read when the program runs, and its blocks
        are skipped as well.
      block_size: tokens of a block, one number or (of queries, of keys). Blocks are what is worked on at once: those of
        fewer than about 64 tokens are slow.
    """

    map: Any = field(repr=False)
    block_size: int | tuple[int, int] = 64

    def __post_init__(self) -> None:
        shape, sizes = np.shape(self.map), (self.block_size,) if isinstance(self.block_size, int) else self.block_size
        if len(shape) not in (2, 3, 4) or not jnp.issubdtype(jnp.result_type(self.map), jnp.bool_):
            wanted = "wanted bool [nq, nk], [H, nq, nk] or [B, H, nq, nk]"
            raise ValueError(f"Blocks: map: got {jnp.result_type(self.map)} {list(shape)}, {wanted}")
        if len(sizes) not in (1, 2) or min(sizes) < 1:
            raise ValueError(f"Blocks: block_size: got {self.block_size}, wanted one or two numbers of at least 1")
        if not self.traced:
            object.__setattr__(self, "map", np.asarray(self.map))

    @property
    def traced(self) -> bool:
        return isinstance(self.map, jax.core.Tracer)

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens of a block of queries and of one of keys."""
        return (self.block_size, self.block_size) if isinstance(self.block_size, int) else self.block_size

    def at(self, t: Any, j: Any) -> Any:
        """[…, *broadcast shape of t and j]: the map where query t and key j are."""
        block_q, block_k = self.sizes
        return self.map[..., t // block_q, j // block_k]

    def bounds(self, t: tuple[Any, Any], j: tuple[Any, Any]) -> tuple[Any, Any]:
        on = self.at(t[0], j[0])
        return on, on

    def check(self, op: str, time_q: int, time_k: int) -> None:
        wanted = tuple(-(-time // block) for time, block in zip((time_q, time_k), self.sizes, strict=True))
        if np.shape(self.map)[-2:] != wanted:
            sizes = f"blocks of {self.sizes} for {time_q} queries and {time_k} keys"
            raise ValueError(f"{op}: Blocks: map: got shape {np.shape(self.map)}, wanted {list(wanted)} {sizes}")


@dataclass(frozen=True)
class MapBit(Mask):
    """What a kernel sees of a mask's `Blocks`: a bit of the tile."""

    bit: int

    def visible(self, t: Any, j: Any, bits: Any = 0) -> Any:
        return (bits >> self.bit) & 1 > t * 0 + j * 0

    def bounds(self, t: tuple[Any, Any], j: tuple[Any, Any]) -> tuple[Any, Any]:
        somewhere = (t[0] >= 0) & (j[0] >= 0)
        return somewhere, ~somewhere


@dataclass(frozen=True)
class _Joined(Mask):
    left: Mask
    right: Mask

    def __post_init__(self) -> None:
        if len(maps(self)) > MOST_MAPS:
            raise ValueError(f"{type(self).__name__}: got {len(maps(self))} maps of blocks, wanted at most {MOST_MAPS}")

    def check(self, op: str, time_q: int, time_k: int) -> None:
        self.left.check(op, time_q, time_k)
        self.right.check(op, time_q, time_k)


@dataclass(frozen=True)
class All(_Joined):
    """What both masks see, `left & right`."""

    def visible(self, t: Any, j: Any, bits: Any = 0) -> Any:
        return self.left.visible(t, j, bits) & self.right.visible(t, j, bits)

    def bounds(self, t: tuple[Any, Any], j: tuple[Any, Any]) -> tuple[Any, Any]:
        (some, whole), (other_some, other_whole) = self.left.bounds(t, j), self.right.bounds(t, j)
        return some & other_some, whole & other_whole

    def reach(self, time: int) -> tuple[int, int]:
        return min(self.left.reach(time), self.right.reach(time), key=sum)


@dataclass(frozen=True)
class Either(_Joined):
    """What at least one of the masks sees, `left | right`."""

    def visible(self, t: Any, j: Any, bits: Any = 0) -> Any:
        return self.left.visible(t, j, bits) | self.right.visible(t, j, bits)

    def bounds(self, t: tuple[Any, Any], j: tuple[Any, Any]) -> tuple[Any, Any]:
        (some, whole), (other_some, other_whole) = self.left.bounds(t, j), self.right.bounds(t, j)
        return some | other_some, whole | other_whole

    def reach(self, time: int) -> tuple[int, int]:
        (first, last), (other_first, other_last) = self.left.reach(time), self.right.reach(time)
        return max(first, other_first), max(last, other_last)


def maps(mask: Mask) -> tuple[Blocks, ...]:
    """The maps of a mask, from left to right."""
    if isinstance(mask, _Joined):
        return maps(mask.left) + maps(mask.right)
    return (mask,) if isinstance(mask, Blocks) else ()


def with_maps(mask: Mask, change: Callable[[Blocks], Mask]) -> Mask:
    """The mask with each of its maps, from left to right, replaced by what `change` makes of it."""
    if isinstance(mask, _Joined):
        return dataclasses.replace(mask, left=with_maps(mask.left, change), right=with_maps(mask.right, change))
    return change(mask) if isinstance(mask, Blocks) else mask


def predicate(mask: Mask) -> Mask:
    """The mask without arrays: in the place of its n-th map stands the bit of a tile that tells of it."""
    free = itertools.count(FIRST_MAP)
    return with_maps(mask, lambda leaf: MapBit(next(free)))


def map_bits(mask: Mask, t: Any, j: Any) -> Any:
    """int32, 0 without maps: what the maps say at (t, j), as bits of a tile."""
    bits = np.int32(0)
    for bit, leaf in enumerate(maps(mask), FIRST_MAP):
        bits = bits | (leaf.at(t, j).astype(np.int32) << bit)
    return bits


def grid(time_q: int, time_k: int, block_q: int, block_k: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """First and last query of each block of queries, [nq, 1] each, and of keys, [nk] each."""
    t, j = np.arange(0, time_q, block_q)[:, None], np.arange(0, time_k, block_k)
    return (t, np.minimum(t + block_q, time_q) - 1), (j, np.minimum(j + block_k, time_k) - 1)


def check_divides(op: str, mask: Mask, block_q: int, block_k: int) -> None:
    """Raises ValueError where a block crosses the border of a map's, which would have no bits."""
    for leaf in maps(mask):
        if leaf.sizes[0] % block_q or leaf.sizes[1] % block_k:
            raise ValueError(f"{op}: block sizes: got {(block_q, block_k)}, wanted divisors of {leaf.sizes} of the map")
