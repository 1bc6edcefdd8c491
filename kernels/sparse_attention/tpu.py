"""Sparse attention as Pallas TPU kernels: a step is one tile of the lists (`tiles.py`), and copies in what it lists.

Keys are the rows of a tile and queries its columns, those of a group's heads side by side: keys and values come in once
for all of them, and the statistics of the softmax are rows of one number a lane, on the chip and in memory.
A tile is worked on in parts whose intermediates fit the registers: where sums of queries are kept, of more keys, where
sums of keys, of more queries.

The online softmax is that of Milakov and Gimelshein (1805.02867), the backward pass that of FlashAttention-2
(2307.08691): probabilities again from the log-normalizer, d_q walking the keys of a block of queries, d_k and d_v
walking the queries of a block of keys.

JAX's own kernel for this, splash attention, is not used: it asks a mask for every pair of tokens while a program is
traced (4e9 of them for 65,536), gives NaN or a mean of values where a query sees nothing, has no gradient of the
log-normalizer and keeps 128 copies of it in memory, and reads keys and values again for each head of a group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.chunks import compute_dtype
from kernels.dispatch import known_sizes
from kernels.sparse_attention.form import Form
from kernels.sparse_attention.mask import Mask, maps, predicate
from kernels.sparse_attention.tiles import LIVE, WHOLE, Tiles, allowed
from kernels.tiles import dot

LANES = 128
LOWEST = -1e30  # below every score, and finite: differences from it are numbers
BLOCKS = ((512, 512), (256, 256), (128, 128), (64, 128), (32, 128), (16, 128))  # of queries and of keys
BLOCK_BYTES = 2**20  # of the queries of a group's heads; the kernels hold up to eight such blocks, of 16 MiB
MAX_TILES = 84_000  # of a list: 12 bytes each in 1 MiB of scalar memory
STEP_PARTS = 3  # what a step of the grid costs of itself (about 0.35 µs), in parts of 128 × 128


def form(scale: float, mask: Mask, q: jax.Array, k: jax.Array, v: jax.Array, segments: bool) -> Form:
    """The sizes of tiles, within the blocks of the mask's maps, that should make the mask cheapest.

    q [B, Tq, H, K], k [B, Tk, G, K] and v [B, Tk, G, V], not padded, may be anything with a shape and a dtype; maps are
    [1 or B, 1 or G, nq, nk].
    """
    group = q.shape[2] // k.shape[2]
    own_lists = segments and isinstance(q.shape[0], int)  # the kernels serve no batch of unknown size, see `refusal`
    batch = max([q.shape[0] if own_lists else 1, *(leaf.map.shape[0] for leaf in maps(mask))])
    lists = batch * max([1, *(leaf.map.shape[1] for leaf in maps(mask))])

    def sized(most: tuple[int, int]) -> Form:
        block_q, block_k = (
            _block(x.shape[1], most[axis], [leaf.sizes[axis] for leaf in maps(mask)]) for axis, x in enumerate((q, k))
        )
        return Form(scale, predicate(mask), block_q, block_k, q.shape[1], k.shape[1], segments)

    def cost(form: Form) -> tuple[bool, float]:
        tiles = int(allowed(form, mask).sum())
        return tiles * lists > MAX_TILES, tiles * (STEP_PARTS + group * form.block_q * form.block_k / LANES**2)

    forms = [sized(most) for most in BLOCKS]
    fitting = [form for form in forms if _block_bytes(form, q, k, v) <= BLOCK_BYTES] or forms[-1:]
    return min(fitting[:3], key=cost)


def _block(time: int, most: int, maps: list[int]) -> int:
    """At most `most` tokens that divide the blocks of all maps: the most, multiples of 128 before others."""
    most = min(most, -(-time // LANES) * LANES if time > LANES else -(-time // 16) * 16)
    sizes = (n for n in range(1, most + 1) if all(size % n == 0 for size in maps))
    return max(sizes, key=lambda n: (n % LANES == 0, n))


def _block_bytes(form: Form, q: jax.Array, k: jax.Array, v: jax.Array) -> int:
    group, width = q.shape[2] // k.shape[2], max(q.shape[3], v.shape[3])
    return group * form.block_q * width * jnp.result_type(q, k, v).itemsize


def refusal(form: Form, q: jax.Array, k: jax.Array, v: jax.Array, by_query: Tiles, by_key: Tiles) -> str | None:
    """Why these kernels do not serve, or None where they do."""
    if not known_sizes(q, k, v):
        return f"runs over so many blocks, got a batch of {q.shape[0]} and {q.shape[1]} queries"
    dtype = jnp.result_type(q, k, v)
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"computes in float32 and bfloat16, got {jnp.dtype(dtype).name}"
    for name, width in (("K", q.shape[3]), ("V", v.shape[3])):
        if width > 512:
            return f"takes widths up to 512, got {name}={width}"
    if _block_bytes(form, q, k, v) > 2 * BLOCK_BYTES:
        return f"{form.block_q} queries of the {q.shape[2] // k.shape[2]} heads of a group are too much at once"
    tiles = max(by_query.row.size, by_key.row.size)
    if tiles > MAX_TILES:
        return f"takes lists of {MAX_TILES} tiles in all, this mask has {tiles} of {form.block_q} × {form.block_k}"
    return None


def _columns(x: jax.Array, block: int, groups: int) -> jax.Array:
    """[B, T, H, F] → [B, G, blocks, F, H / G · block], one head's block of time after the other."""
    batch, time, heads, width = x.shape
    x = x.reshape(batch, time // block, block, groups, heads // groups, width)
    return jnp.transpose(x, (0, 3, 1, 5, 4, 2)).reshape(batch, groups, time // block, width, -1)


def _from_columns(x: jax.Array, block: int) -> jax.Array:
    """[B, G, blocks, F, H / G · block] → [B, T, H, F]."""
    batch, groups, blocks, width, lanes = x.shape
    x = x.reshape(batch, groups, blocks, width, lanes // block, block)
    return jnp.transpose(x, (0, 2, 5, 1, 4, 3)).reshape(batch, blocks * block, groups * (lanes // block), width)


def _rows(x: jax.Array, block: int) -> jax.Array:
    """[B, T, G, F] → [B, G, blocks, block, F]."""
    batch, time, groups, width = x.shape
    return jnp.transpose(x, (0, 2, 1, 3)).reshape(batch, groups, time // block, block, width)


def _from_rows(x: jax.Array) -> jax.Array:
    """[B, G, blocks, block, F] → [B, T, G, F]."""
    batch, groups, blocks, block, width = x.shape
    return jnp.transpose(x.reshape(batch, groups, blocks * block, width), (0, 2, 1, 3))


def _part(size: int, most: int) -> int:
    """How much of `size` to work on at once: `most` or 128 where that divides it, else all."""
    return next((n for n in (most, LANES) if size % n == 0), size)


def _for_parts(size: int, most: int, work: Callable[[Any], None], together: int = 1) -> None:
    """Calls `work` for every part of `size`, `together` of them scheduled as one."""
    length = _part(size, most)

    def part(n: Any, _: None) -> None:
        work(pl.ds(pl.multiple_of(n * length, length), length))

    lax.fori_loop(0, size // length, part, None, unroll=min(together, size // length))


@dataclass(frozen=True)
class Step:
    """A step of the grid: a tile, and whether it is the first or last one of its block in the list."""

    form: Form
    precision: lax.Precision
    row: jax.Array
    column: jax.Array
    bits: jax.Array
    begins: jax.Array
    ends: jax.Array

    def parts(self, work: Callable[[bool, Any, Any], None], lanes: int, keys: int, queries: int, together: int) -> None:
        """Calls `work(masked, keys, queries)` for every part of a live tile, of so many keys and queries if they fit.

        `together` parts with the same keys are scheduled as one, but where ids are compared, which takes registers.
        """
        for masked in (False, True):
            at_once = 1 if masked and self.form.segments else together

            def row(keys: Any, masked: bool = masked, at_once: int = at_once) -> None:
                _for_parts(lanes, queries, partial(work, masked, keys), at_once)

            @pl.when((self.bits & (LIVE | WHOLE)) == (LIVE if masked else LIVE | WHOLE))
            def _(row: Callable[[Any], None] = row) -> None:
                _for_parts(self.form.block_k, keys, row)

    def scores(self, masked: bool, keys: Any, queries: Any, q: Any, k: Any, q_ids: Any, k_ids: Any) -> jax.Array:
        """[keys, queries], -inf where nothing is to be seen."""
        scores = self.form.scale * dot(k[keys, :], q[:, queries], "nn", self.precision)
        if not masked:
            return scores
        lane = queries.start + lax.broadcasted_iota(jnp.int32, (1, queries.size), 1)
        t = self.row * self.form.block_q + lax.rem(lane, np.int32(self.form.block_q))
        j = self.column * self.form.block_k + keys.start + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        seen = self.form.visible(jnp.broadcast_to(t, scores.shape), j, self.bits)
        if q_ids is not None:
            k_ids = jnp.broadcast_to(k_ids[:, keys], (queries.size, keys.size)).T
            seen &= k_ids == jnp.broadcast_to(q_ids[:, queries], scores.shape)
        return jnp.where(seen, scores, -jnp.inf)


def _forward_kernel(step: Step, *refs: Any) -> None:
    """q [K, L], k [block, K], v [V, block], ids [1, L] and [1, block] → out [V, L], log_normalizer [1, L]."""
    q, k, v, q_ids, k_ids, out, log_normalizer, highest, total, sums = refs

    def begin(queries: Any) -> None:
        highest[:, queries] = jnp.full((1, queries.size), LOWEST)
        total[:, queries] = jnp.zeros((1, queries.size))
        sums[:, queries] = jnp.zeros((sums.shape[0], queries.size))

    @pl.when(step.begins)
    def _() -> None:
        _for_parts(q.shape[1], LANES, begin)

    def attend(masked: bool, keys: Any, queries: Any) -> None:
        scores = step.scores(masked, keys, queries, q, k, q_ids, k_ids)
        before = highest[:, queries]
        now = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
        kept, weights = jnp.exp(before - now), jnp.exp(scores - now)
        highest[:, queries] = now
        total[:, queries] = kept * total[:, queries] + jnp.sum(weights, axis=0, keepdims=True)
        sums[:, queries] = kept * sums[:, queries] + dot(v[:, keys], weights.astype(v.dtype), "nn", step.precision)

    step.parts(attend, q.shape[1], keys=LANES, queries=LANES, together=2)

    def finish(queries: Any) -> None:
        weight = total[:, queries]
        out[:, queries] = (sums[:, queries] / jnp.where(weight > 0, weight, 1.0)).astype(out.dtype)
        log_normalizer[:, queries] = jnp.where(weight > 0, highest[:, queries] + jnp.log(weight), -jnp.inf)

    @pl.when(step.ends)
    def _() -> None:
        _for_parts(q.shape[1], LANES, finish)


def _d_scores(step: Step, masked: bool, keys: Any, queries: Any, inputs: Any) -> tuple[jax.Array, jax.Array]:
    """Probabilities and the cotangents of the scores, [keys, queries] each, in the dtype they are multiplied in."""
    q, k, v, q_ids, k_ids, d_out, statistics = inputs
    scores = step.scores(masked, keys, queries, q, k, q_ids, k_ids)
    weights = jnp.exp(scores - statistics[0:1, queries])
    d_weights = dot(v[keys, :], d_out[:, queries], "nn", step.precision)
    d_scores = weights * (d_weights - statistics[1:2, queries])
    return weights.astype(v.dtype), d_scores.astype(k.dtype)


def _d_queries_kernel(step: Step, *refs: Any) -> None:
    """q [K, L], k [block, K], v [block, V], ids, d_out [V, L], statistics [2, L], k again [K, block] → d_q [K, L]."""
    *inputs, k_columns, d_q, sums = refs

    def begin(queries: Any) -> None:
        sums[:, queries] = jnp.zeros((sums.shape[0], queries.size))

    @pl.when(step.begins)
    def _() -> None:
        _for_parts(sums.shape[1], LANES, begin)

    def pull(masked: bool, keys: Any, queries: Any) -> None:
        _, d_scores = _d_scores(step, masked, keys, queries, inputs)
        sums[:, queries] += dot(k_columns[:, keys], d_scores, "nn", step.precision)

    step.parts(pull, sums.shape[1], keys=2 * LANES, queries=LANES, together=1)

    def finish(queries: Any) -> None:
        d_q[:, queries] = (step.form.scale * sums[:, queries]).astype(d_q.dtype)

    @pl.when(step.ends)
    def _() -> None:
        _for_parts(sums.shape[1], LANES, finish)


def _d_keys_kernel(step: Step, *refs: Any) -> None:
    """As for the queries → d_k [block, K], d_v [block, V]; the heads of a group are summed with the queries."""
    *inputs, d_k, d_v, k_sums, v_sums = refs
    q, d_out = inputs[0], inputs[5]

    @pl.when(step.begins)
    def _() -> None:
        k_sums[...] = jnp.zeros_like(k_sums)
        v_sums[...] = jnp.zeros_like(v_sums)

    def pull(masked: bool, keys: Any, queries: Any) -> None:
        weights, d_scores = _d_scores(step, masked, keys, queries, inputs)
        v_sums[keys, :] += dot(weights, d_out[:, queries], "nt", step.precision)
        k_sums[keys, :] += dot(d_scores, q[:, queries], "nt", step.precision)

    step.parts(pull, q.shape[1], keys=LANES, queries=2 * LANES, together=1)

    @pl.when(step.ends)
    def _() -> None:
        d_k[...] = (step.form.scale * k_sums[...]).astype(d_k.dtype)
        d_v[...] = v_sums[...].astype(d_v.dtype)


def _call(
    kernel: Callable[..., None],
    form: Form,
    tiles: Tiles,
    walked: str,
    inputs: Sequence[tuple[Any, str]],
    outputs: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[tuple[int, int]],
) -> Any:
    """Runs a kernel over a list of tiles, those of one block after the other.

    `walked` says whether that is a block of queries, "row", or of keys, "column", as the outputs are; the words beside
    the inputs say the same of them.
    """
    q = inputs[0][0]
    lists, heads, steps = tiles.row.shape

    def place(b: Any, g: Any, n: Any) -> Any:
        return ((b if lists > 1 else 0) * heads + (g if heads > 1 else 0)) * steps + n

    def spec(x: Any, cut: str) -> pl.BlockSpec | None:
        def index(b: Any, g: Any, n: Any, row: Any, column: Any, bits: Any) -> tuple[Any, ...]:
            block = (row if cut == "row" else column)[place(b, g, n)]
            return (b, g, block, 0, 0) if x.ndim == 5 else (b, block, 0, 0)

        return None if x is None else pl.BlockSpec((*(None,) * (x.ndim - 2), *x.shape[-2:]), index)

    def body(row: Any, column: Any, bits: Any, *refs: Any) -> None:
        n, last = pl.program_id(2), steps - 1
        at = place(pl.program_id(0), pl.program_id(1), n)
        block = row if walked == "row" else column
        begins = (n == 0) | (block[at] != block[jnp.maximum(at - 1, 0)])
        ends = (n == last) | (block[at] != block[jnp.minimum(at + 1, lists * heads * steps - 1)])
        _, precision = compute_dtype(q)
        kernel(Step(form, precision, row[at], column[at], bits[at], begins, ends), *refs)

    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(*q.shape[:2], steps),
            in_specs=[spec(x, cut) for x, cut in inputs],
            out_specs=[spec(x, walked) for x in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name=f"sparse_attention{kernel.__name__.removesuffix('_kernel')}",
    )(*(x.reshape(-1) for x in (tiles.row, tiles.column, tiles.bits)), *(x for x, _ in inputs))


def _inputs(form: Form, q: Any, k: Any, v: Any, q_ids: Any, k_ids: Any) -> list[tuple[Any, str]]:
    """The arrays the kernels share, cut into blocks, and by what; `v` has its keys as rows or as columns already."""
    heads, dtype = q.shape[2] // k.shape[2], jnp.result_type(q, k, v)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    if q_ids is not None:
        q_ids = jnp.tile(q_ids.reshape(q_ids.shape[0], -1, 1, form.block_q), heads)
        k_ids = k_ids.reshape(k_ids.shape[0], -1, 1, form.block_k)
    q, k = _columns(q, form.block_q, k.shape[2]), _rows(k, form.block_k)
    return [(q, "row"), (k, "column"), (v, "column"), (q_ids, "row"), (k_ids, "column")]


def forward(
    form: Form, q: Any, k: Any, v: Any, q_ids: Any, k_ids: Any, by_query: Tiles, by_key: Tiles
) -> tuple[jax.Array, jax.Array]:
    """Canonical arguments, see `form.py`. Returns out [B, Tq, H, V] in v's dtype, log_normalizer [B, Tq, H] float32."""
    inputs = _inputs(form, q, k, _columns(v, form.block_k, v.shape[2]), q_ids, k_ids)
    shape, lanes, width = inputs[0][0].shape[:3], inputs[0][0].shape[4], v.shape[3]
    results = _call(
        _forward_kernel,
        form,
        by_query,
        "row",
        inputs,
        [
            jax.ShapeDtypeStruct((*shape, width, lanes), v.dtype),
            jax.ShapeDtypeStruct((*shape, 1, lanes), jnp.float32),
        ],
        [(1, lanes), (1, lanes), (width, lanes)],
    )
    out, log_normalizer = (_from_columns(x, form.block_q) for x in results)
    return out, log_normalizer[..., 0]


def backward(
    form: Form,
    q: Any,
    k: Any,
    v: Any,
    q_ids: Any,
    k_ids: Any,
    by_query: Tiles,
    by_key: Tiles,
    out: jax.Array,
    log_normalizer: jax.Array,
    d_out: jax.Array,
    d_log_normalizer: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Arguments, results and the cotangents of the results → d_q, d_k, d_v."""
    empty = log_normalizer == -jnp.inf  # then every probability is exp(-inf - …), and 0
    shift = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_log_normalizer
    statistics = jnp.stack([jnp.where(empty, 0, log_normalizer), jnp.where(empty, 0, shift)], axis=-1)
    inputs = _inputs(form, q, k, _rows(v, form.block_k), q_ids, k_ids)
    dtype = inputs[0][0].dtype
    inputs += [(_columns(x, form.block_q, k.shape[2]), "row") for x in (d_out.astype(dtype), statistics)]
    again = (_columns(k.astype(dtype), form.block_k, k.shape[2]), "column")
    queries, keys, values = (
        jax.ShapeDtypeStruct(x.shape, given.dtype) for (x, _), given in zip(inputs, (q, k, v), strict=False)
    )
    (d_q,) = _call(_d_queries_kernel, form, by_query, "row", [*inputs, again], [queries], [queries.shape[3:]])
    d_k, d_v = _call(_d_keys_kernel, form, by_key, "column", inputs, [keys, values], [keys.shape[3:], values.shape[3:]])
    return _from_columns(d_q, form.block_q), _from_rows(d_k), _from_rows(d_v)
