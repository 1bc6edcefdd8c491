"""Selected attention as Pallas TPU kernels, one tile a grid step.

Scores lie with keys in sublanes and queries in lanes: 128 lanes are full however short a block is, and what is one
number a query is a row. The tiles of a block follow each other: its keys are copied once, and the gradients of its keys
and values add up where they lie. Tiles that are not live repeat the copies of the one before.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.chunks import compute_dtype
from kernels.selected_attention import stretches
from kernels.selected_attention.form import Form
from kernels.selected_attention.routing import Routes
from kernels.selected_attention.stretches import Cotangents, Queries
from kernels.tiles import dot

ROWS = 256  # of a tile
MAX_WIDTH = 256
MAX_ROWS, MAX_SCORES = 2**10, 2**17  # of a tile
MAX_BLOCKS = 2**15  # the blocks of all tiles of a stretch, up to five times as many, lie in scalar memory
SUBLANES = 8


def refusal(dtype: jnp.dtype, time: int, widths: tuple[int, int], heads: int, block_size: int) -> str | None:
    """Why these kernels do not serve widths K and V, and `heads` that share their blocks; None where they do."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"computes in float32 or bfloat16, these arguments need {dtype}"
    if not all(SUBLANES <= width <= MAX_WIDTH for width in widths):
        return f"takes widths from {SUBLANES} to {MAX_WIDTH}, got K={widths[0]} and V={widths[1]}"
    if block_size % SUBLANES:
        return f"takes blocks of a multiple of {SUBLANES} tokens, got {block_size}"
    rows, tokens = max(ROWS, heads * stretches.SLOTS), stretches.block_size(block_size)
    if time > MAX_BLOCKS * tokens:
        return f"takes at most {MAX_BLOCKS} blocks of {tokens} tokens, got {time} tokens"
    if rows > MAX_ROWS or rows * tokens > MAX_SCORES:
        return f"{heads} heads share blocks of {block_size} tokens, too many for a tile"
    return None


def forward(form: Form, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    return stretches.forward(form, _forward_tiles, ROWS, 1, *arrays)


def backward(form: Form, *arrays: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return stretches.backward(form, _backward_tiles, ROWS, 1, *arrays)


def _scores(
    form: Form, precision: lax.Precision, block: jax.Array, q: jax.Array, k: jax.Array, seen: jax.Array
) -> jax.Array:
    """q [R, K], k [C, K], first and last token seen [2, R] → [C, R], -inf for what a query does not see."""
    scores = form.scale * dot(k, q, "nt", precision)
    token = block * form.block_size + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    return jnp.where((token >= seen[:1]) & (token <= seen[1:]), scores, -jnp.inf)


def _forward_kernel(
    form: Form,
    precision: lax.Precision,
    block_ref: Any,
    live_ref: Any,
    q_ref: Any,
    seen_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    log_normalizer_ref: Any,
) -> None:
    n = pl.program_id(0)

    @pl.when(n < live_ref[0])
    def _() -> None:
        scores = _scores(form, precision, block_ref[n], q_ref[...], k_ref[...], seen_ref[...])
        highest = jnp.max(scores, axis=0, keepdims=True)
        highest = jnp.where(highest == -jnp.inf, 0.0, highest)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=0, keepdims=True)
        some = total > 0
        weights *= 1 / jnp.where(some, total, 1.0)
        out_ref[...] = dot(weights.astype(v_ref.dtype), v_ref[...], "tn", precision)
        log_normalizer_ref[...] = jnp.where(some, highest + jnp.log(total), -jnp.inf)

    @pl.when(n == live_ref[0])
    def _() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)
        log_normalizer_ref[...] = jnp.full_like(log_normalizer_ref, -jnp.inf)


def _backward_kernel(
    form: Form,
    precision: lax.Precision,
    block_ref: Any,
    live_ref: Any,
    q_ref: Any,
    seen_ref: Any,
    d_out_ref: Any,
    known_ref: Any,
    k_ref: Any,
    v_ref: Any,
    d_k_before_ref: Any,
    d_v_before_ref: Any,
    d_q_ref: Any,
    d_k_ref: Any,
    d_v_ref: Any,
) -> None:
    n = pl.program_id(0)

    @pl.when((n == 0) | (block_ref[n] != block_ref[jnp.maximum(n - 1, 0)]))
    def _() -> None:
        d_k_ref[...], d_v_ref[...] = d_k_before_ref[...], d_v_before_ref[...]

    @pl.when(n < live_ref[0])
    def _() -> None:
        q, k, d_out = q_ref[...], k_ref[...], d_out_ref[...]
        log_normalizer, delta = known_ref[:1], known_ref[1:]
        weights = jnp.exp(_scores(form, precision, block_ref[n], q, k, seen_ref[...]) - log_normalizer)
        d_scores = form.scale * weights * (dot(v_ref[...], d_out, "nt", precision) - delta)
        weights, d_scores = weights.astype(d_out.dtype), d_scores.astype(q.dtype)
        d_v_ref[...] += dot(weights, d_out, "nn", precision)
        d_k_ref[...] += dot(d_scores, q, "nn", precision)
        d_q_ref[...] = dot(d_scores, k, "tn", precision)

    @pl.when(n == live_ref[0])
    def _() -> None:
        d_q_ref[...] = jnp.zeros_like(d_q_ref)


def _alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """In one dtype, as the matrix unit takes them."""
    return tuple(x.astype(jnp.result_type(*arrays)) for x in arrays)


def _of_tile(rows: int, width: int) -> pl.BlockSpec:
    """[S, rows, width]."""
    return pl.BlockSpec((None, rows, width), lambda n, block, live: (jnp.minimum(n, live[0]), 0, 0))


def _of_block(x: jax.Array) -> pl.BlockSpec:
    """[N + 1, block_size, F]."""
    return pl.BlockSpec((None, *x.shape[1:]), lambda n, block, live: (block[n], 0, 0))


def _rows(x: jax.Array, query: jax.Array) -> jax.Array:
    """[s + 1, g, F] and queries [S, m] → [S, m × g, F]."""
    return x[query].reshape(query.shape[0], -1, x.shape[2])


def _by_slot(x: jax.Array, heads: int) -> jax.Array:
    """[S, 1, m × g] → [S × m, g]; with the tiles in lanes meanwhile: to split lanes takes the compiler minutes."""
    tiles = x.shape[0]
    return x.reshape(tiles, -1).T.reshape(-1, heads, tiles).transpose(2, 0, 1).reshape(-1, heads)


def _numbers(x: jax.Array, query: jax.Array) -> jax.Array:
    """[s + 1, g] and queries [S, m] → [S, m × g]; gathered as they will lie, the compiler being slow to move lanes."""
    heads = x.shape[1]
    return x.reshape(-1)[jnp.repeat(query * heads, heads, axis=1) + jnp.tile(jnp.arange(heads), query.shape[1])]


def _seen(queries: Queries, query: jax.Array) -> jax.Array:
    """[S, 2, m × g]."""
    return jnp.stack([jnp.repeat(x[query], queries.q.shape[1], axis=1) for x in (queries.first, queries.last)], axis=1)


def _forward_tiles(
    form: Form, routes: Routes, queries: Queries, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    _, precision = compute_dtype(queries.q, k, v)
    q, k, v = _alike(queries.q, k, v)
    heads, width = q.shape[1:]
    tiles, rows = routes.block.size, routes.query.shape[1] * heads
    out, log_normalizer = pl.pallas_call(
        partial(_forward_kernel, form, precision),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(tiles,),
            in_specs=[_of_tile(rows, width), _of_tile(2, rows), _of_block(k), _of_block(v)],
            out_specs=[_of_tile(rows, v.shape[-1]), _of_tile(1, rows)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((tiles, rows, v.shape[-1]), jnp.float32),
            jax.ShapeDtypeStruct((tiles, 1, rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="selected_attention_forward",
    )(routes.block, routes.live[None], _rows(q, routes.query), _seen(queries, routes.query), k, v)
    return out.reshape(-1, heads, v.shape[-1]), _by_slot(log_normalizer, heads)


def _backward_tiles(
    form: Form,
    routes: Routes,
    queries: Queries,
    cotangents: Cotangents,
    k: jax.Array,
    v: jax.Array,
    d_k: jax.Array,
    d_v: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    _, precision = compute_dtype(queries.q, k, v)
    q, k, v, d_out = _alike(queries.q, k, v, cotangents.d_out)
    heads, width = q.shape[1:]
    tiles, rows = routes.block.size, routes.query.shape[1] * heads
    known = [_numbers(x, routes.query) for x in (cotangents.log_normalizer, cotangents.delta)]
    operands = {
        "block": routes.block,
        "live": routes.live[None],
        "q": _rows(q, routes.query),
        "seen": _seen(queries, routes.query),
        "d_out": _rows(d_out, routes.query),
        "known": jnp.stack(known, axis=1),
        "k": k,
        "v": v,
        "d_k": d_k,
        "d_v": d_v,
    }
    place = list(operands).index
    d_q, d_k, d_v = pl.pallas_call(
        partial(_backward_kernel, form, precision),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(tiles,),
            in_specs=[
                *(_of_tile(*operands[name].shape[1:]) for name in ("q", "seen", "d_out", "known")),
                *(_of_block(operands[name]) for name in ("k", "v", "d_k", "d_v")),
            ],
            out_specs=[_of_tile(rows, width), _of_block(d_k), _of_block(d_v)],
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((tiles, rows, width), d_k.shape, d_v.shape)],
        input_output_aliases={place("d_k"): 1, place("d_v"): 2},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="selected_attention_backward",
    )(*operands.values())
    return d_q.reshape(-1, heads, width), d_k, d_v
