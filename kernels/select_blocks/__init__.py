"""Which blocks of keys a query attends to: the selection of native sparse attention, by scores of compressed keys."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels import dispatch
from kernels.checks import check_floating, check_segment_ids, check_shape
from kernels.packing import begins
from kernels.select_blocks import reference, tpu, xla
from kernels.select_blocks.form import Form, compressed_blocks


def select_blocks(
    q: jax.Array,
    k_compressed: jax.Array,
    *,
    block_size: int = 64,
    stride: int = 16,
    compression_block: int = 32,
    selected_blocks: int = 16,
    initial: int = 1,
    local: int = 2,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The blocks of keys with the largest scores for each query, shared by a group's heads.

    Native Sparse Attention (2502.11089), section 3.3.2, equations 8 to 12. A head's attention to the compressed keys it
    sees, softmax(scale · q · k_compressed), is shared out over the blocks of `block_size` tokens: a block's score is
    the sum over the compressed keys, times the number of strides each shares with it, and over the heads of a group.
    Counted from 0 (the equation as printed counts from 1) and with r = block_size / stride, c = compression_block /
    stride that is score[j] = sum_{m < r} sum_{n < c} p[r (j + 1) - 1 - m - n].

    Scores are float32 (float64 where an argument is): the result is the same list twice, and from every implementation
    but where scores differ by no more than rounding. It is not differentiable: gradients of the arguments are zero.

    Args:
      q: [B, T, H, K] queries.
      k_compressed: [B, N, G, K]; G divides H, each of its heads serves H / G neighbouring heads of q. Compressed key i
        stands for the tokens from i · stride to i · stride + compression_block - 1; a query sees it once the last of
        them has come, the query's own included. N = (T - compression_block) // stride + 1, or 0 where T is less.
      block_size, stride, compression_block: in tokens; both sizes are multiples of the stride.
      selected_blocks: n, how many blocks a query gets, the forced ones among them.
      initial: so many blocks are always among them from where the sequence begins,
      local: and so many up to the query's own.
      scale: of the scores; K**-0.5 unless given.
      segment_ids: [B, T] integers; a segment is a run of equal ids. Only compressed keys that lie wholly in the query's
        segment count, and only blocks that hold some of it are chosen; the initial one is where it begins.
      implementation: None (best for the platform), "reference", "xla" or "pallas".

    Returns:
      [B, T, G, n] int32, the blocks' numbers in ascending order, none twice; -1 at the end where there are fewer blocks
      that have begun. Of equal scores the lowest number is chosen.

    Raises:
      ValueError: an argument of another shape, dtype or range.
      NotImplementedError: "pallas" where it cannot serve.
    """
    op = "select_blocks"
    sizes: dict[str, int] = {}
    check_shape(op, "q", q, "B T H K", sizes)
    check_shape(op, "k_compressed", k_compressed, "B N G K", sizes)
    check_floating(op, {"q": q, "k_compressed": k_compressed})
    check_segment_ids(op, segment_ids, sizes)
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ValueError(f"{op}: k_compressed: got {sizes['G']} heads, wanted a divisor of the {sizes['H']} of q")
    check_blocks(op, block_size, stride, compression_block)
    scale = sizes["K"] ** -0.5 if scale is None else float(scale)
    form = Form(scale, block_size, stride, compression_block, selected_blocks, initial, local)
    check_selection(op, form)
    wanted = compressed_blocks(sizes["T"], compression_block, stride)
    if sizes["N"] != wanted:
        raise ValueError(f"{op}: k_compressed: got N={sizes['N']}, wanted {wanted} for T={sizes['T']}")
    q, k_compressed = lax.stop_gradient(jnp.asarray(q)), lax.stop_gradient(jnp.asarray(k_compressed))
    begun = jnp.zeros(q.shape[:2], jnp.int32) if segment_ids is None else begins(segment_ids)
    return select(form, q, k_compressed, begun, implementation)


def select(
    form: Form, q: jax.Array, k_compressed: jax.Array, begins: jax.Array, implementation: str | None
) -> jax.Array:
    """The same of canonical arguments (`kernels.select_blocks.form`), whose queries may be those of a stretch of time.

    Raises:
      NotImplementedError: "pallas" where it cannot serve.
    """
    batch, time, heads, width = q.shape
    groups = k_compressed.shape[2]
    refusal = tpu.refusal(form, time, heads // groups, width, jnp.result_type(q, k_compressed))
    dispatch.check_implementation("select_blocks", implementation, refusal)
    if q.size == 0:
        return jnp.full((batch, time, groups, form.selected), -1)
    if implementation == "reference":
        times = form.start + jnp.arange(time)[None]
        return reference.select_blocks(form, q, k_compressed, times, begins, form.blocks(form.start + time))
    by_blocks, by_tiles = partial(xla.select_blocks, form), partial(tpu.select_blocks, form)
    return dispatch.run(implementation, refusal, by_blocks, by_tiles, q, k_compressed, begins)


def check_blocks(op: str, block_size: int, stride: int, compression_block: int) -> None:
    """Raises ValueError unless the sizes are positive and both kinds of blocks are whole strides."""
    if stride < 1:
        raise ValueError(f"{op}: stride: got {stride}, wanted at least 1")
    for name, size in (("block_size", block_size), ("compression_block", compression_block)):
        if size < 1 or size % stride:
            raise ValueError(f"{op}: {name}: got {size}, wanted a positive multiple of stride {stride}")


def check_selection(op: str, form: Form) -> None:
    """Raises ValueError unless a query gets at least one block and all that are forced."""
    if form.initial < 0 or form.local < 0 or form.selected < max(form.initial + form.local, 1):
        raise ValueError(
            f"{op}: selected_blocks: got {form.selected}, wanted at least 1 and at least initial + local, "
            f"got {form.initial} + {form.local}"
        )
