"""Native sparse attention: compressed blocks, the blocks that matter most, and a window, each query's own mixture.

Source: Yuan et al., "Native Sparse Attention" (2502.11089), §3; sizes §4.1. The authors' code is not public: where the
paper is silent the choices are ours, and said to be.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from kernels.native_sparse_attention import (
    NativeSparseCache,
    native_sparse_attention,
    native_sparse_attention_step,
    native_sparse_cache,
)
from kernels.packing import runs
from kernels.ring import reordered as reordered_on_devices
from kernels.split_blocks import split_native_sparse_attention
from zoo.attention.softmax import SPLIT_HEADS, SPLIT_IDS, group_count, prompt_length
from zoo.errors import ZooError
from zoo.layers.devices import Axes, over_time, splits_time
from zoo.layers.mixer import Mixer, head_count
from zoo.layers.parameters import fan_in, merge_heads, partitioned, split_heads
from zoo.layers.rotary import BASE, rotate, times
from zoo.types import Array

Branches = tuple[Array, Array, Array]
"""Of the compressed, the selected and the window branch."""
BLOCKS = ("block_size", "stride", "compression_block")
SELECTION = ("selected_blocks", "initial", "local")


class BlockCompression(nn.Module):
    """phi: the tokens of a block [B, N, L, G, F] → one [B, N, G, F] (§3.3.1, eq. 7).

    kind  "mlp": a learned position in the block is added, then W_2 gelu(W_1 · all L tokens), as wide as F inside and
          shared by the groups (the paper names an MLP and the positions, its shape is ours); "linear": one map of all L
          tokens for each group; "pool": their mean weighted by a learned softmax for each group; "mean"

    Kernels run it within `on_devices`, where a module cannot go: `weights`, `axes` and `compress` are what they take.
    """

    kind: str
    size: int
    groups: int
    width: int

    def setup(self) -> None:
        size, groups, width = self.size, self.groups, self.width
        self.weights: tuple[Array, ...] = ()
        match self.kind:
            case "mlp":
                position = partitioned(nn.initializers.normal(0.02), None, None)
                first, second = partitioned(fan_in((0, 1), (2,)), None, None, "mlp"), fan_in((0,), (1,))
                self.weights = (
                    self.param("position", position, (size, width)),
                    self.param("first", first, (size, width, width)),
                    self.param("second", partitioned(second, "mlp", None), (width, width)),
                )
            case "linear":
                of_group = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", (1, 2), 3, batch_axis=0)
                linear = partitioned(of_group, "heads", None, None, None)
                self.weights = (self.param("linear", linear, (groups, size, width, width)),)
            case "pool":
                pool = partitioned(nn.initializers.zeros, "heads", None)
                self.weights = (self.param("pool", pool, (groups, size)),)
            case kind if kind != "mean":
                raise ZooError(f"compress: got {kind!r}, wanted mlp, linear, pool or mean")

    def __call__(self) -> tuple[Array, ...]:
        return self.weights

    @property
    def axes(self) -> tuple[Axes, ...]:
        """Of the weights while a kernel runs."""
        return {
            "mlp": ((None, None), (None, None, None), (None, None)),
            "linear": (("heads", None, None, None),),
            "pool": (("heads", None),),
            "mean": (),
        }[self.kind]


def compress(kind: str, weights: tuple[Array, ...], blocks: Array) -> Array:
    """[B, N, L, G, F] → [B, N, G, F], see `BlockCompression`."""
    weights = tuple(x.astype(blocks.dtype) for x in weights)
    match kind:
        case "mlp":
            position, first, second = weights
            inner = jnp.einsum("bnlgf,lfm->bngm", blocks + position[:, None], first)
            return jax.nn.gelu(inner, approximate=False) @ second
        case "linear":
            return jnp.einsum("bnlgf,glfm->bngm", blocks, weights[0])
        case "pool":
            return jnp.einsum("bnlgf,gl->bngf", blocks, jax.nn.softmax(weights[0], axis=-1))
    return jnp.mean(blocks, axis=2, dtype=jnp.float32).astype(blocks.dtype)


class NativeSparse(Mixer):
    """out = sum over branches of sigmoid(g) · attention(q, K, V): blocks as one token each, selected ones, a window.

    heads, kv_heads   H and G; unless given G is H / 16, or a smaller divisor of H (the paper has 64 and 4)
    key_width, value_width   of a head; D / H unless given (the paper has 192 and 128 for D = 2560)
    compression_block, stride   tokens of a compressed block, and from one to the next
    block_size        tokens of a block that is selected
    selected_blocks   how many a query selects, the first `initial` and the last `local` of them always
    window            tokens of the window branch
    compress          see `BlockCompression`
    shared_kv         all branches have the same keys and values (flash-linear-attention); the paper's have their own
    rotary, base      positions turn queries and keys of selected blocks and of the window
    rotary_compressed and of compressed ones (flash-linear-attention); the paper does not say, ours is no, for blocks
                      know the order of their tokens

    Gates are one for each head and branch, a linear map of the input. Tokens that are not there are left out before
    blocks are counted; those of a segment lie on the grid of the row. Where time is split over devices compressed keys
    and values go to all of them, those of selected blocks go round, and the window asks the neighbours.
    """

    heads: int | None = None
    kv_heads: int | None = None
    key_width: int | None = None
    value_width: int | None = None
    compression_block: int = 32
    stride: int = 16
    block_size: int = 64
    selected_blocks: int = 16
    initial: int = 1
    local: int = 2
    window: int = 512
    compress: str = "mlp"
    shared_kv: bool = False
    rotary: bool = True
    rotary_compressed: bool = False
    base: float = BASE

    def setup(self) -> None:
        heads, groups, key, value = self.head_sizes()
        check_blocks("native_sparse", self)
        if self.window < 1:
            raise ZooError(f"native_sparse: window: got {self.window}, wanted at least 1")
        count = 1 if self.shared_kv else 3
        self.query = split_heads(self.dim, heads, key, dtype=self.dtype)
        self.keys = tuple(split_heads(self.dim, groups, key, dtype=self.dtype) for _ in range(count))
        self.values = tuple(split_heads(self.dim, groups, value, dtype=self.dtype) for _ in range(count))
        self.gate = split_heads(self.dim, heads, 3, dtype=self.dtype)
        self.out = merge_heads(heads, value, self.dim, dtype=self.dtype)
        self.compressions = [
            BlockCompression(self.compress, self.compression_block, groups, width) for width in (key, value)
        ]

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        arrays = self.projected(x, times(x.shape[1], segment_ids))
        return self.out(closing_gaps(self.mixed, arrays, segment_ids, mask))

    def initial_state(self, batch: int, capacity: int = 2048) -> NativeSparseCache:
        _, groups, key, value = self.head_sizes()
        k, v = (jnp.zeros((batch, 0, groups, width), self.dtype) for width in (key, value))
        return self.remembered(k, v, None, capacity)

    def prefill(
        self, x: Float[Array, "B T D"], length: Int[Array, " B"] | None = None, capacity: int = 2048
    ) -> tuple[Float[Array, "B T D"], NativeSparseCache]:
        """A prompt at once, see `Softmax.prefill`."""
        length = prompt_length("native_sparse", x, length, capacity)
        arrays = self.projected(x, times(x.shape[1], None))
        return self.out(self.mixed(arrays, None)), self.remembered(*arrays[1:3], length, capacity)

    def step(self, x: Float[Array, "B D"], state: NativeSparseCache) -> tuple[Float[Array, "B D"], NativeSparseCache]:
        """One token. A row whose cache is full gives NaN, and nothing is written."""
        token = self.projected(x[:, None], state.length[:, None])
        q, k, v, gates = jax.tree.map(lambda y: y[:, 0], token)
        out, state = native_sparse_attention_step(q, k, v, gates, state, **self.options(self.compression_weights()))
        return self.out(out), state

    @nn.nowrap
    def head_sizes(self) -> tuple[int, int, int, int]:
        """(H, G, K, V). Raises ZooError where they do not divide."""
        heads = head_count("native_sparse", self.dim, self.heads)
        groups = group_count("native_sparse", heads, sixteenth(heads) if self.kv_heads is None else self.kv_heads)
        key, value = (width or self.dim // heads for width in (self.key_width, self.value_width))
        return heads, groups, key, value

    @nn.nowrap
    def options(self, weights: tuple[Any, Any]) -> dict[str, Any]:
        """Of the kernel, with the weights of the compressions."""
        sizes = {name: getattr(self, name) for name in (*BLOCKS, *SELECTION, "window")}
        return {**sizes, "compress": tuple(partial(compress, self.compress, each) for each in weights)}

    def remembered(
        self, k: Array | Branches, v: Array | Branches, length: Array | None, capacity: int
    ) -> NativeSparseCache:
        """The state after these tokens [B, T, ...], of which the first `length` [B] count."""
        options = self.options(self.compression_weights())
        kept = {name: option for name, option in options.items() if name not in SELECTION}
        return native_sparse_cache(k, v, capacity=capacity, length=length, **kept)

    def compression_weights(self) -> tuple[Any, Any]:
        """Of keys and of values."""
        keys, values = (each() for each in self.compressions)
        return keys, values

    def projected(self, x: Float[Array, "B T D"], positions: Array) -> tuple[Branches, Branches, Branches, Array]:
        """Queries, keys and values of each branch [B, T, H or G, K or V] and gates [B, T, H, 3]."""

        def turned(x: Branches) -> Branches:
            if not self.rotary:
                return x
            first = rotate(x[0], positions, self.base) if self.rotary_compressed else x[0]
            return first, rotate(x[1], positions, self.base), rotate(x[2], positions, self.base)

        q = self.query(x)
        k, v = (self.of_branches(project, x) for project in (self.keys, self.values))
        gates = jax.nn.sigmoid(self.gate(x).astype(jnp.float32))
        return turned((q, q, q)), turned(k), v, gates

    def of_branches(self, project: tuple[nn.Einsum, ...], x: Array) -> Branches:
        """Three arrays, one and the same where keys and values are shared."""
        first, *others = (each(x) for each in project)
        return (first, others[0], others[1]) if others else (first, first, first)

    def mixed(self, arrays: tuple[Branches, Branches, Branches, Array], segment_ids: Array | None) -> Array:
        """[B, T, H, V]: each head's output."""
        weights = self.compression_weights()
        ids = () if segment_ids is None else (segment_ids,)
        leaves, tree = jax.tree.flatten((arrays, weights, ids))

        def op(*leaves: Array, axis: str | None) -> Array:
            (q, k, v, gates), weights, ids = jax.tree.unflatten(tree, leaves)
            options = {"segment_ids": ids[0] if ids else None, **self.options(weights)}
            if axis is None:
                return native_sparse_attention(q, k, v, gates, **options)
            return split_native_sparse_attention(q, k, v, gates, axis=axis, **options)

        axes = (SPLIT_HEADS,) * 10 + self.compressions[0].axes * 2 + (SPLIT_IDS,) * len(ids)
        return over_time(op, leaves, axes, SPLIT_HEADS, stretch(self))


def sixteenth(heads: int) -> int:
    """The largest divisor of so many heads with at least 16 of them to a group, as in the paper."""
    return max(groups for groups in range(1, max(1, heads // 16) + 1) if heads % groups == 0)


def check_blocks(mixer: str, options: Any) -> None:
    """Raises ZooError unless blocks are whole strides and a query gets all blocks that are always selected."""
    if options.stride < 1:
        raise ZooError(f"{mixer}: stride: got {options.stride}, wanted at least 1")
    for name in ("block_size", "compression_block"):
        size = getattr(options, name)
        if size < 1 or size % options.stride:
            raise ZooError(f"{mixer}: {name}: got {size}, wanted a multiple of stride {options.stride}")
    forced = options.initial + options.local
    if min(options.initial, options.local) < 0 or options.selected_blocks < max(forced, 1):
        raise ZooError(
            f"{mixer}: selected_blocks: got {options.selected_blocks}, wanted at least 1 and initial + local, "
            f"got {options.initial} + {options.local}"
        )


def stretch(options: Any) -> int:
    """What the tokens of a device are a multiple of where time is split: blocks, and as long as a compressed one."""
    return options.block_size * max(-(-(options.compression_block - options.stride) // options.block_size), 1)


def closing_gaps(mix: Any, arrays: Any, segment_ids: Array | None, mask: Array | None) -> Array:
    """mix(arrays, segment_ids) of the tokens that are there, moved together; a pytree of [B, T, ...] → [B, T, ...].

    What works on blocks of tokens knows no mask: a block would hold tokens that are not there. Those of a row go to its
    end, as a segment of their own, and what becomes of them back to their places.
    """
    if mask is None:
        return mix(arrays, segment_ids)
    order = jnp.argsort(~mask, axis=1, stable=True)
    ids = jnp.zeros(mask.shape, jnp.int32) if segment_ids is None else runs(segment_ids)
    ids = jnp.where(mask, ids, mask.shape[1])
    back = jnp.argsort(order, axis=1)
    arrays, ids = reordered((arrays, ids), order, back)
    return reordered(mix(arrays, ids), back, order)


def reordered(tree: Any, order: Array, back: Array) -> Any:
    """Arrays [B, T, ...] with their tokens in the order [B, T], which `back` undoes.

    Where time is split over devices the tokens go round, unless all are in their places.
    """
    if not splits_time(order.shape[1]):
        return jax.tree.map(lambda x: jnp.take_along_axis(x, jnp.expand_dims(order, range(2, x.ndim)), axis=1), tree)
    in_place = jnp.all(order == jnp.arange(order.shape[1]))
    leaves, structure = jax.tree.flatten((tree, order, back, in_place))

    def op(*leaves: Array, axis: str | None) -> tuple[Array, ...]:
        assert axis is not None
        return tuple(jax.tree.leaves(reordered_on_devices(axis, *jax.tree.unflatten(structure, leaves))))

    axes = tuple((*SPLIT_HEADS, None)[: x.ndim] if x.ndim > 3 else (*SPLIT_IDS, None)[: x.ndim] for x in leaves)
    return jax.tree.unflatten(jax.tree.structure(tree), over_time(op, leaves, axes, axes[:-3]))
