"""Attention of queries to the keys a mask shows them: windows, segments, block maps, global tokens and what joins them.

    from kernels.sparse_attention import Causal, Sinks, Window, sparse_attention

    out = sparse_attention(q, k, v, Causal() & (Window(512) | Sinks(4)))

Blocks of queries and keys between which nothing is visible cost nothing, neither time nor memory. Temporary memory
grows with the length, not with its square.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels import dispatch
from kernels.checks import check_floating, check_shape
from kernels.chunks import compute_dtype
from kernels.sparse_attention import cudnn, reference, tpu, xla
from kernels.sparse_attention.form import Form
from kernels.sparse_attention.mask import (
    Blocks,
    Causal,
    Compressed,
    Full,
    Global,
    Mask,
    Segments,
    Sinks,
    Strided,
    Window,
    map_bits,
    maps,
    predicate,
    with_maps,
)
from kernels.sparse_attention.tiles import Tiles, tiles

__all__ = [
    "Blocks",
    "Causal",
    "Compressed",
    "Full",
    "Global",
    "Mask",
    "Segments",
    "Sinks",
    "Strided",
    "Window",
    "attend",
    "sparse_attention",
    "sparse_attention_step",
]

SegmentIds = jax.Array | tuple[jax.Array, jax.Array]
FORMS: tuple[Any, Any] = (xla, tpu)


def sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    segment_ids: SegmentIds | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """out_t = sum_j p_tj v_j over the keys the mask shows query t, p_t = softmax_j(scale · q_t · k_j), for every head.

    Softmax and sums are float32 (float64 where an argument is). A query that sees nothing gets 0 and no gradient.

    Args:
      q: [B, Tq, H, K] queries.
      k: [B, Tk, G, K] keys; G divides H, each serves H / G neighbouring query heads.
      v: [B, Tk, G, V] values.
      mask: what is visible (`kernels.sparse_attention.mask`).
      scale: of the scores; K**-0.5 unless given.
      segment_ids: [B, T] integers, or a pair ([B, Tq], [B, Tk]): besides the mask the ids must be equal. Regions of
        equal ids need not hang together; blocks are skipped where those of queries and keys have no common range.
      implementation: None (best for the platform: on NVIDIA GPUs cuDNN for the masks it has), "reference", "xla" or
        "pallas".

    Returns:
      out [B, Tq, H, V] in v's dtype.

    Raises:
      ValueError: an argument of another shape or dtype; a mask that does not fit.
      NotImplementedError: "pallas" where it cannot serve.
    """

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return _attend_checked("sparse_attention", q, k, v, mask, scale, segment_ids, implementation)[0]

    if implementation is not None or segment_ids is not None or cudnn.refusal(q, k, v, mask):
        return ours(q, k, v)
    theirs = partial(cudnn.attention, mask=mask, scale=scale)
    return dispatch.on_cuda(theirs, ours, q, k, v)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    segment_ids: SegmentIds | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`sparse_attention` with the logarithm of the softmax's denominator, to merge attention over several sets of keys.

    Both are differentiable. Of disjoint sets with out_n and log_normalizer_n, that of their union is
    sum_n softmax_n(log_normalizer) out_n, with log_normalizer logsumexp_n.

    Returns:
      out [B, Tq, H, V] in v's dtype and log_normalizer [B, Tq, H] float32 (float64 where an argument is):
      log sum_j exp(scale · q_t · k_j), -inf where a query sees nothing.

    Raises:
      ValueError, NotImplementedError: as in `sparse_attention`.
    """
    return _attend_checked("attend", q, k, v, mask, scale, segment_ids, implementation)


def sparse_attention_step(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, position: jax.Array, *, scale: float | None = None
) -> jax.Array:
    """One query of `sparse_attention` over a cache of keys and values, for streaming.

    The query sees the keys the mask shows it at its position, and none after it, whatever the mask. Of a mask that
    looks back so far only (`Window`, `Segments`, with `Sinks` or `Global`), only that many keys are read.

    Args:
      q: [B, H, K].
      k: [B, S, G, K] keys at times 0 to S - 1; those after `position` may hold anything finite.
      v: [B, S, G, V].
      mask: for S queries and keys, as `Blocks` and `Segments` have sizes.
      position: [B] integers from 0 to S - 1, the query's time in each row.
      scale: of the scores; K**-0.5 unless given.

    Returns:
      out [B, H, V] in v's dtype.

    Raises:
      ValueError: an argument of another shape or dtype; a mask that does not fit.
    """
    op = "sparse_attention_step"
    sizes = _sizes(op, {"q": (q, "B H K"), "k": (k, "B S G K"), "v": (v, "B S G V"), "position": (position, "B")})
    if not jnp.issubdtype(jnp.result_type(position), jnp.integer):
        raise ValueError(f"{op}: position: got dtype {jnp.result_type(position)}, wanted an integer one")
    batch, time = sizes["B"], sizes["S"]
    mask = _by_head(op, mask, sizes, time, time, sizes["H"])
    first, last = mask.reach(time)
    if first + last >= time:
        first, last = time, 0
    begin = jnp.maximum(position - last + 1, 0)
    recent = begin[:, None] + jnp.arange(last)
    j = jnp.concatenate([jnp.broadcast_to(jnp.arange(first), (batch, first)), recent], axis=1)
    once = (j <= position[:, None]) & jnp.concatenate([j[:, :first] >= 0, recent >= first], axis=1)

    def read(cache: jax.Array) -> jax.Array:
        window = jax.vmap(partial(lax.dynamic_slice_in_dim, slice_size=last))(cache, begin)
        return jnp.concatenate([cache[:, :first], window], axis=1)

    def visible(t: jax.Array, j: jax.Array, *own: jax.Array) -> jax.Array:
        """[1 or H, keys] of one batch row."""
        arrays = iter(own)
        local = with_maps(mask, lambda leaf: Blocks(next(arrays), leaf.block_size))
        return predicate(local).visible(t, j, map_bits(local, t, j)).reshape(-1, j.shape[-1])

    own = [jnp.broadcast_to(leaf.map, (batch, *leaf.map.shape[1:])) for leaf in maps(mask)]
    seen = jax.vmap(visible)(position, j, *own) & once[:, None]
    dtype, _ = compute_dtype(q, k, v)
    scale = sizes["K"] ** -0.5 if scale is None else scale
    return reference.attend(q[:, None], read(k), read(v), seen[:, :, None], scale=scale, dtype=dtype)[0][:, 0]


def attend_piece(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    segment_ids: SegmentIds | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`attend` without its gradients: to one of several sets of keys, by whoever merges them."""
    choice, arrays = _prepared("attend_piece", q, k, v, mask, scale, segment_ids, implementation)
    return choice.run(_outputs, *arrays)


def piece_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *of_queries: jax.Array,
    scale: float | None = None,
    segment_ids: SegmentIds | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What one set adds to d_q, and its d_k, d_v; `of_queries`: out and log_normalizer of all, cotangents of both."""
    choice, arrays = _prepared("piece_gradients", q, k, v, mask, scale, segment_ids, implementation)
    return choice.run(_gradients, *arrays, *of_queries)


def _attend_checked(
    op: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: float | None,
    segment_ids: SegmentIds | None,
    implementation: str | None,
) -> tuple[jax.Array, jax.Array]:
    if implementation != "reference":
        choice, arrays = _prepared(op, q, k, v, mask, scale, segment_ids, implementation)
        return _attend(choice, *arrays)
    sizes = _sizes(op, {"q": (q, "B Tq H K"), "k": (k, "B Tk G K"), "v": (v, "B Tk G V")})
    q_ids, k_ids = _ids(op, segment_ids, sizes)
    time_q, time_k, heads = sizes["Tq"], sizes["Tk"], sizes["H"]
    visible = _by_head(op, mask, sizes, time_q, time_k, heads).dense(time_q, time_k)
    if q_ids is not None and k_ids is not None:
        visible = visible & (q_ids[:, None, :, None] == k_ids[:, None, None, :])
    dtype, _ = compute_dtype(q, k, v)
    scale = float(sizes["K"] ** -0.5 if scale is None else scale)
    return reference.attend(q, k, v, visible, scale=scale, dtype=dtype)


def _prepared(
    op: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: float | None,
    segment_ids: SegmentIds | None,
    implementation: str | None,
) -> tuple["_Choice", tuple[Any, ...]]:
    """The arguments of `_attend`, checked."""
    sizes = _sizes(op, {"q": (q, "B Tq H K"), "k": (k, "B Tk G K"), "v": (v, "B Tk G V")})
    q_ids, k_ids = _ids(op, segment_ids, sizes)
    heads = sizes["H"]
    listed = heads if any(_map_heads(leaf) == heads for leaf in maps(mask)) else sizes["G"]
    mask = _by_head(op, mask, sizes, sizes["Tq"], sizes["Tk"], listed)
    k, v = (jnp.repeat(x, listed // sizes["G"], axis=2) for x in (k, v))
    scale = float(sizes["K"] ** -0.5 if scale is None else scale)
    forms = tuple(module.form(scale, mask, q, k, v, segments=q_ids is not None) for module in FORMS)
    lists = tuple(tiles(form, mask, q_ids, k_ids) for form in forms)
    refusal = tpu.refusal(forms[1], q, k, v, *lists[1])
    dispatch.check_implementation(op, implementation, refusal)
    return _Choice(implementation, refusal, forms), (q, k, v, q_ids, k_ids, lists)


@dataclass(frozen=True)
class _Choice:
    implementation: str | None
    refusal: str | None
    forms: tuple[Form, ...]
    """One for each of FORMS, which have their own sizes of tiles, and so their own lists."""

    def run(self, function: Callable[..., Any], *arrays: Any) -> Any:
        by_xla, by_tpu = (partial(function, n, self.forms[n]) for n in range(len(FORMS)))
        return dispatch.run(self.implementation, self.refusal, by_xla, by_tpu, *arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(choice, q, k, v, q_ids, k_ids, lists):
    return choice.run(_outputs, q, k, v, q_ids, k_ids, lists)


def _attend_forward(choice, *arrays):
    results = _attend(choice, *arrays)
    return results, (*arrays, *results)


def _attend_backward(choice, kept, cotangents):
    return *choice.run(_gradients, *kept, *cotangents), None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _outputs(
    n: int,
    form: Form,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array | None,
    k_ids: jax.Array | None,
    lists: tuple[tuple[Tiles, Tiles], ...],
) -> tuple[jax.Array, jax.Array]:
    """By the n-th of FORMS."""
    arrays = _in_blocks(form, q, k, v, q_ids, k_ids)
    out, log_normalizer = FORMS[n].forward(form, *arrays, *lists[n])
    return out[:, : form.time_q], log_normalizer[:, : form.time_q]


def _gradients(
    n: int,
    form: Form,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array | None,
    k_ids: jax.Array | None,
    lists: tuple[tuple[Tiles, Tiles], ...],
    *of_queries: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """By the n-th of FORMS; `of_queries` are out, log_normalizer and the cotangents of both."""
    arrays = _in_blocks(form, q, k, v, q_ids, k_ids)
    of_queries = tuple(_whole_blocks(x, form.block_q) for x in of_queries)
    d_q, d_k, d_v = FORMS[n].backward(form, *arrays, *lists[n], *of_queries)
    return d_q[:, : form.time_q], d_k[:, : form.time_k], d_v[:, : form.time_k]


def _in_blocks(
    form: Form, q: jax.Array, k: jax.Array, v: jax.Array, q_ids: jax.Array | None, k_ids: jax.Array | None
) -> tuple[jax.Array | None, ...]:
    """The arrays padded in time as the forms take them."""
    sizes = (form.block_q, form.block_k, form.block_k, form.block_q, form.block_k)
    return tuple(
        None if x is None else _whole_blocks(x, size) for x, size in zip((q, k, v, q_ids, k_ids), sizes, strict=True)
    )


def _whole_blocks(x: jax.Array, block: int) -> jax.Array:
    """[B, T, …] with time padded with zeros to whole blocks."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), *((0, 0),) * (x.ndim - 2)))


def _sizes(op: str, arrays: dict[str, tuple[Any, str]]) -> dict[str, int]:
    """The sizes of arrays by the letters of their shapes, such as {"q": (q, "B Tq H K")}; G divides H.

    Raises:
      ValueError: an argument of another shape or dtype.
    """
    sizes: dict[str, int] = {}
    for name, (array, wanted) in arrays.items():
        check_shape(op, name, array, wanted, sizes)
    check_floating(op, {name: arrays[name][0] for name in "qkv"})
    for letter, size in sizes.items():
        if size == 0:
            raise ValueError(f"{op}: got {letter}=0, wanted at least 1")
    if sizes["H"] % sizes["G"]:
        raise ValueError(f"{op}: k: got {sizes['G']} heads, wanted a divisor of the {sizes['H']} of q")
    return sizes


def _ids(
    op: str, segment_ids: SegmentIds | None, sizes: dict[str, int]
) -> tuple[jax.Array, jax.Array] | tuple[None, None]:
    """int32 ids [B, Tq] and [B, Tk]."""
    if segment_ids is None:
        return None, None
    pair = segment_ids if isinstance(segment_ids, tuple | list) else (segment_ids, segment_ids)
    if len(pair) != 2:
        raise ValueError(f"{op}: segment_ids: got {len(pair)} arrays, wanted one or those of queries and of keys")
    for ids, time in zip(pair, ("Tq", "Tk"), strict=True):
        check_shape(op, "segment_ids", ids, f"B {time}", sizes)
        if not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
            raise ValueError(f"{op}: segment_ids: got dtype {jnp.result_type(ids)}, wanted an integer one")
    q_ids, k_ids = (jnp.asarray(ids, jnp.int32) for ids in pair)
    return q_ids, k_ids


def _map_heads(leaf: Blocks) -> int:
    return (1, 1, *np.shape(leaf.map))[-3]


def _by_head(op: str, mask: Mask, sizes: dict[str, int], time_q: int, time_k: int, heads: int) -> Mask:
    """The mask, checked, with maps [1 or B, 1 or `heads`, nq, nk]; `heads` is G or H.

    Raises:
      ValueError: something else than a mask, or one that does not fit.
    """
    if not isinstance(mask, Mask):
        raise ValueError(f"{op}: mask: got {type(mask).__name__}, wanted a mask such as Causal()")
    mask.check(op, time_q, time_k)
    batch, groups, most = (sizes[letter] for letter in "BGH")

    def change(leaf: Blocks) -> Blocks:
        shape = (1, 1, *np.shape(leaf.map))[-4:]
        if shape[0] not in (1, batch) or shape[1] not in (1, groups, most):
            wanted = f"[1 or {batch}, 1, {groups} or {most}, nq, nk]"
            raise ValueError(f"{op}: Blocks: map: got shape {list(np.shape(leaf.map))}, wanted {wanted}")
        whole = leaf.map.reshape(shape)
        own = whole if shape[1] == 1 else whole.repeat(heads // shape[1], axis=1)
        return Blocks(own, leaf.block_size)

    return with_maps(mask, change)
