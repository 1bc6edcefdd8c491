"""Attention to chosen blocks with time split over devices, for the inside of `jax.shard_map`.

Every device has a stretch of the tokens, whole blocks of them, in order. Summaries of blocks (compressed keys and
values, mean keys) are T / stride or T / block_size and go to all devices, so each chooses blocks of the whole past for
its own queries. The keys themselves go round (`kernels.ring`), and each query meets the chosen blocks of the stretch
that is visiting; a window needs its neighbours only (`kernels.split_attention`).

A device sees the gathered summaries turned round the ring so that its own come last: where its queries stand among them
is then the same number on every device, and what comes before its first token is marked as nobody's.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels.heads import repeat_heads
from kernels.moba import block_means, chosen_blocks
from kernels.native_sparse_attention.branches import Branches, by_branch, by_kind, gated_sum
from kernels.native_sparse_attention.compression import Compress, Compressions, compress_blocks
from kernels.packing import begins, runs
from kernels.ring import Keys, Queries, Results, Ring, Rounds, go_round
from kernels.select_blocks import select
from kernels.select_blocks.form import Form as Selection
from kernels.select_blocks.form import compressed_blocks
from kernels.selected_attention import attend_piece, piece_gradients
from kernels.selected_attention.form import Form
from kernels.sparse_attention import sparse_attention
from kernels.sparse_attention.mask import Causal, Compressed, Window
from kernels.sparse_attention.shifted import Shifted
from kernels.split_attention import split_attention, with_neighbours

NONE = -(2**30)
"""Instead of a block, before all others."""


def split_native_sparse_attention(
    q: Branches,
    k: Branches,
    v: Branches,
    gates: jax.Array,
    *,
    axis: str,
    block_size: int = 64,
    stride: int = 16,
    selected_blocks: int = 16,
    window: int = 512,
    compress: Compressions = None,
    compression_block: int | None = None,
    initial: int = 1,
    local: int = 2,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`native_sparse_attention` of this device's queries to the keys of all devices of the mesh axis `axis`.

    Arguments, result and errors are the operation's, of this device's tokens: a multiple of block_size, and no fewer
    than a compressed block is longer than the stride. Of all tokens there are summaries on every device, 1 / stride of
    the keys and values of one branch; of the rest two stretches at most.

    Raises:
      ValueError: a stretch of another length.
      NotImplementedError: "pallas" where one of the parts cannot serve.
    """
    op = "native_sparse_attention"
    queries, keys, values = (by_branch(op, name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    compression_block = 2 * stride if compression_block is None else compression_block
    whole = Whole.of(op, axis, queries[0], segment_ids, block_size)
    of_keys, of_values = by_kind(op, compress)
    summaries = (
        whole.summaries(keys[0], compression_block, stride, of_keys),
        whole.summaries(values[0], compression_block, stride, of_values),
    )
    selection = Selection(0.0, block_size, stride, compression_block, selected_blocks, initial, local)
    compressed, selected = split_branches(
        queries[:2], summaries, (keys[1], values[1]), whole, selection, scale, implementation
    )
    ids = None if whole.runs is None else (whole.runs, whole.runs)
    sight = Causal() & Window(window)
    options: dict[str, Any] = {"scale": scale, "segment_ids": ids, "implementation": implementation}
    recent = split_attention(queries[2], keys[2], values[2], sight, axis=axis, **options)
    return gated_sum(gates, compressed, selected, recent)


def split_moba(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis: str,
    block_size: int = 256,
    top_k: int = 4,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`moba` of this device's queries to the keys of all devices of the mesh axis `axis`.

    Arguments, result and errors are the operation's, of this device's tokens, a multiple of block_size.

    Raises:
      ValueError: a stretch of another length.
      NotImplementedError: "pallas" where it cannot serve.
    """
    whole = Whole.of("moba", axis, q, segment_ids, block_size)
    ids = jnp.zeros(q.shape[:2], jnp.int32) if whole.runs is None else whole.runs
    means = lax.all_gather(block_means(lax.stop_gradient(k), ids, block_size), axis, axis=1, tiled=True)
    blocks = chosen_blocks(lax.stop_gradient(q), means, whole.begins, whole.start, block_size, top_k)
    return split_selected_attention(q, k, v, blocks, whole, block_size, scale, implementation)


@dataclass(frozen=True)
class Whole:
    """Where this device's tokens stand among those of all."""

    axis: str
    size: int
    length: int
    """Of a stretch."""
    begins: jax.Array
    """[B, T / P] the time of all at which each token's segment begins."""
    runs: jax.Array | None
    """[B, T / P] segments as all devices number them."""
    all_runs: jax.Array | None
    """[B, T] those of all."""

    @classmethod
    def of(cls, op: str, axis: str, q: jax.Array, segment_ids: jax.Array | None, block: int) -> "Whole":
        """For the tokens of q [B, T / P, H, K].

        Raises:
          ValueError: a stretch is not whole blocks.
        """
        size, length = lax.axis_size(axis), q.shape[1]
        if length % block:
            raise ValueError(f"{op}: got {length} tokens on each device of {axis!r}, wanted a multiple of {block}")
        if segment_ids is None:
            return cls(axis, size, length, jnp.zeros(q.shape[:2], jnp.int32), None, None)
        ids = lax.all_gather(segment_ids, axis, axis=1, tiled=True)
        all_runs, start = runs(ids), lax.axis_index(axis) * length
        own_begins, own_runs = (lax.dynamic_slice_in_dim(x, start, length, axis=1) for x in (begins(ids), all_runs))
        return cls(axis, size, length, own_begins, own_runs, all_runs)

    @property
    def start(self) -> jax.Array:
        """The time of this device's first token."""
        return lax.axis_index(self.axis) * self.length

    @property
    def before(self) -> int:
        """How many tokens stand before a device's own once they are turned."""
        return (self.size - 1) * self.length

    @property
    def later(self) -> jax.Array:
        """How many of those are later ones."""
        return self.before - self.start

    def turned(self, x: jax.Array, stride: int) -> jax.Array:
        """[B, T / stride, …] of all in order → with this device's last."""
        return jnp.roll(x, self.later // stride, axis=1)

    def summaries(self, x: jax.Array, block_size: int, stride: int, compress: Compress | None) -> jax.Array:
        """`compress_blocks` of [B, T / P, G, F]: [B, N, G, F'] of those blocks that begin here.

        That of a block past the end of time is made of zeros.

        Raises:
          ValueError: a stretch is shorter than what a block has of the next.
        """
        after = block_size - stride
        if after > self.length or self.length % stride:
            raise ValueError(
                f"compress_blocks: got {self.length} tokens on each device, wanted a multiple of the stride, {stride}, "
                f"and at least {after}"
            )
        near = with_neighbours(x, self.axis, 0, after)
        return compress_blocks(near, block_size=block_size, stride=stride, compress=compress)

    def gathered(self, x: jax.Array, stride: int) -> jax.Array:
        """[B, N, …], one for every stride of this device, → those of all, this device's last."""
        return self.turned(lax.all_gather(x, self.axis, axis=1, tiled=True), stride)

    def segments(self, block_size: int, stride: int) -> tuple[jax.Array, jax.Array]:
        """Ids [B, T / P] of queries and [B, T / stride] of turned summaries, -1 for those that nobody here sees."""
        time = self.size * self.length
        batch = self.begins.shape[0]
        run = jnp.zeros((batch, time), jnp.int32) if self.all_runs is None else self.all_runs
        last = jnp.pad(run[:, block_size - 1 :], ((0, 0), (0, block_size - 1)), constant_values=-1)[:, ::stride]
        first = run[:, ::stride]
        ids = self.turned(jnp.where(first == last, first, -1), stride)
        queries = jnp.zeros(self.begins.shape, jnp.int32) if self.runs is None else self.runs
        return queries, jnp.where(jnp.arange(ids.shape[1]) * stride >= self.later, ids, -1)


def split_branches(
    queries: tuple[jax.Array, jax.Array],
    summaries: tuple[jax.Array, jax.Array],
    keys: tuple[jax.Array, jax.Array],
    whole: Whole,
    selection: Selection,
    scale: float | None,
    implementation: str | None,
) -> tuple[jax.Array, jax.Array]:
    """The compressed and the selected branch, [B, T / P, H, V] each.

    Args:
      queries: [B, T / P, H, K] of each branch.
      summaries: [B, N, G, K] and [B, N, G, V] of this device (`Whole.summaries`).
      keys: [B, T / P, G, K] keys and values of the selected branch.
      selection: sizes and numbers of blocks; its scale and start are those given here.
      scale: of the scores; each branch's K**-0.5 unless given.
    """
    block, stride = selection.compression_block, selection.stride
    count = compressed_blocks(whole.size * whole.length, block, stride)
    k, v = (whole.gathered(x, stride)[:, :count] for x in summaries)
    own, ids = whole.segments(block, stride)
    compressed = sparse_attention(
        queries[0],
        k,
        v,
        Shifted(Compressed(block, stride), whole.before),
        scale=scale,
        segment_ids=(own, ids[:, :count]),
        implementation=implementation,
    )
    factor = queries[0].shape[3] ** -0.5 if scale is None else scale
    sizes = selection.block_size, stride, block, selection.selected, selection.initial, selection.local
    form = Selection(factor, *sizes, start=whole.before)
    begun = whole.begins + whole.later
    blocks = select(form, lax.stop_gradient(queries[0]), lax.stop_gradient(k), begun, implementation)
    blocks = jnp.where(blocks < 0, -1, blocks - whole.later // selection.block_size)
    selected = split_selected_attention(queries[1], *keys, blocks, whole, selection.block_size, scale, implementation)
    return compressed, selected


def split_selected_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: jax.Array,
    whole: Whole,
    block_size: int,
    scale: float | None,
    implementation: str | None,
) -> jax.Array:
    """`selected_attention`, causal, of [B, T / P, H, K]; blocks [B, T / P, L, n] are numbered over all devices."""
    form = Form(q.shape[3] ** -0.5 if scale is None else float(scale), block_size)
    own = jnp.where(blocks < 0, NONE, blocks - whole.start // block_size)
    time = jnp.broadcast_to(jnp.arange(whole.length, dtype=jnp.int32), q.shape[:2])
    chosen = _Chosen(form, implementation)
    rounds = [Rounds(0, 0, chosen, chosen)]
    if whole.size > 1:
        rounds.append(Rounds(1, whole.size - 1, chosen, None))
    ring = Ring(whole.axis, whole.size, tuple(rounds))
    return go_round(ring, (q, (own, whole.begins - whole.start, time)), (k, v, None))[0]


@dataclass(frozen=True)
class _Chosen:
    """Keys seen in chosen blocks. Blocks and times are counted from this device's first token."""

    form: Form
    implementation: str | None

    def forward(self, distance: Any, queries: Queries, keys: Keys) -> Results:
        return attend_piece(self.form, self.implementation, *self._arrays(distance, queries, keys))

    def backward(
        self, distance: Any, queries: Queries, keys: Keys, *of_queries: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        arrays = self._arrays(distance, queries, keys)
        d_q, *d_keys = piece_gradients(self.form, self.implementation, *arrays, *of_queries)
        d_k, d_v = (
            jnp.sum(d.reshape(*x.shape[:3], -1, x.shape[3]), axis=3) for d, x in zip(d_keys, keys[:2], strict=True)
        )
        return d_q, d_k, d_v

    def _arrays(self, distance: Any, queries: Queries, keys: Keys) -> tuple[jax.Array, ...]:
        """As if the visiting stretch were this device's own."""
        q, (blocks, first, last) = queries
        length, lists = q.shape[1], blocks.shape[2]
        blocks = blocks + distance * (length // self.form.block_size)
        blocks = jnp.where((blocks >= 0) & (blocks < length // self.form.block_size), blocks, -1).astype(jnp.int32)
        first = jnp.maximum(first + distance * length, 0).astype(jnp.int32)
        last = jnp.minimum(last + distance * length, length - 1).astype(jnp.int32)
        return q, repeat_heads(keys[0], lists), repeat_heads(keys[1], lists), blocks, first, last
