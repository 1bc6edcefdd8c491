"""The neural memory of Titans: a small network that is taught by gradient descent, while it reads, to answer keys with
their values.

Source: Behrouz, Zhong and Mirrokni, "Titans: Learning to Memorize at Test Time" (2501.00663), eq. 8–15, and §3.2 for
chunks. With M the weights and l(M; k, v) = ‖M(k) − v‖² (a sum over features, eq. 12):

    S_t = eta_t S_{t−1} − theta_t ∇l(M_{t−1}; k_t, v_t)      surprise, with momentum
    M_t = (1 − alpha_t) M_{t−1} + S_t                        forgetting
    out_t = M_t(q_t)

Gradients of a chunk's tokens are all taken at the weights before the chunk, so M_t is linear in them:
M_t = b_t M_0 + f_t S_0 − sum over j ≤ t of G_tj u_j. The gradient of a layer is an outer product x_j ⊗ delta_j of what
goes in and what comes back, so a query meets it as (q · x_j) delta_j, and no token ever has weights of its own. With
chunks of one token this is the recurrence above, word for word.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float

from kernels.packing import RESET
from zoo.types import Array

GRANULARITIES = ("token", "chunk")
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
}
EPSILON = 1e-5
"""Of the layer norm."""

Weights = tuple[Array, ...]
"""Of the layers in turn [B or 1, H, F_in, F_out]. A vector [B or 1, H, V] at the end makes the output
x + (1 + vector) · layer_norm(network(x)), as in TTT (2407.04620), here with a scale that is part of the memory."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """What is remembered: float32."""

    weights: Weights
    """M"""
    momentum: Weights
    """S, of the same shapes"""


def layer_shapes(width: int, depth: int, expansion: int, residual: bool) -> list[tuple[int, ...]]:
    """Shapes of one head's weights: `depth` layers, those between `expansion` · width wide."""
    sizes = [width, *[expansion * width] * (depth - 1), width]
    return [*itertools.pairwise(sizes), *([(width,)] if residual else [])]


def neural_memory(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    theta: Float[Array, "B T H"],
    log_keep: Float[Array, "B _ H"],
    log_momentum: Float[Array, "B _ H"],
    *,
    initial: Memory,
    state: Memory | None = None,
    fresh: Bool[Array, "B T"] | None = None,
    chunk: int = 16,
    granularity: str = "token",
    activation: str = "gelu",
) -> tuple[Float[Array, "B T H V"], Memory]:
    """What the memory answers to queries, and the memory after the last token.

    theta         step size. Tokens of a chunk step from one place, and momentum repeats each step up to 1 / (1 − eta)
                  times: a memory of one layer cannot grow without bound where the sum of theta · ‖k‖² over a chunk is
                  at most 1 − eta, whatever the keys
    log_keep      log(1 − alpha), log_momentum log(eta): at most 0, -inf allowed. A token that is not there has
                  theta = log_keep = log_momentum = 0
    initial       the memory where a segment begins, [1 or B, H, …]
    state         the memory before the first token, if another. One that was handed over goes on exactly where it had
                  read a whole number of chunks
    fresh         True where a segment begins. Chunks lie on a grid of times; one in which a segment begins is cut there
    granularity   "token": each token has its own gates, and sees the memory with itself. "chunk", as
                  lucidrains/titans-pytorch: gates are one a chunk, [B, ceil(T / chunk), H]; the memory steps at the
                  chunk's end, whose token is the first to see it
    activation    between layers, "gelu" (exact) or "silu"

    Arithmetic is float32 (float64 where an input is), out has v's dtype.
    """
    batch, time = k.shape[:2]
    count = -(-time // chunk)
    dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)

    def chunked(x: Array) -> Array:
        """[B, T, …] → [chunks, B, chunk, …]; zeros, which change nothing, fill the last."""
        padded = jnp.pad(x, ((0, 0), (0, count * chunk - time), *((0, 0),) * (x.ndim - 2)))
        return jnp.swapaxes(padded.reshape(batch, count, chunk, *x.shape[2:]), 0, 1)

    def by_head(x: Array) -> Array:
        return jnp.swapaxes(chunked(x.astype(dtype)), 2, 3)

    by_gate = by_head if granularity == "token" else lambda x: jnp.swapaxes(x.astype(dtype), 0, 1)
    logs = tuple(by_gate(jnp.maximum(log, RESET)) for log in (log_keep, log_momentum))
    arrays = (by_head(q), by_head(k), by_head(v), by_head(theta), *logs, None if fresh is None else chunked(fresh))
    initial = jax.tree.map(lambda x: x.astype(dtype), initial)
    before = initial if state is None else state
    before = jax.tree.map(lambda x: jnp.broadcast_to(x.astype(dtype), (batch, *x.shape[1:])), before)
    paths = token_paths if granularity == "token" else chunk_paths
    body = jax.checkpoint(partial(_chunk, paths, activation, initial), prevent_cse=False)
    after, out = lax.scan(body, before, arrays)
    out = jnp.swapaxes(out, 2, 3)
    return jnp.swapaxes(out, 0, 1).reshape(batch, count * chunk, *out.shape[3:])[:, :time].astype(v.dtype), after


def retrieve(
    q: Float[Array, "B T H K"], memory: Memory, initial: Memory, fresh: Bool[Array, "B T"] | None, activation: str
) -> Float[Array, "B T H V"]:
    """What `memory` answers, and `initial` from the first token on at which a segment begins."""
    source = _sources_of(jnp.swapaxes(q, 1, 2), fresh)
    sources = _sources(memory, initial, fresh)
    x = jnp.swapaxes(q, 1, 2).astype(source.dtype)
    out, _ = _run(lambda n, x: _mixed(x, [each.weights[n] for each in sources], source), x, sources[0], activation)
    return jnp.swapaxes(out, 1, 2).astype(q.dtype)


@dataclass(frozen=True)
class Paths:
    """How much of everything there is in the weights M_t at each token of a chunk, and in the momentum at its end.

    The last axis R is of sources: the memory before the chunk and, where segments begin, the initial memory.
    """

    weights: Array
    """[B, H, C, R] of a source's M, b_t"""
    momentum: Array
    """[B, H, C, R] of a source's S, f_t"""
    steps: Array
    """[B, H, C, C] of the gradient of token j, −G_tj"""
    last_momentum: Array
    """[B, H, R] of a source's S in S_C"""
    last_steps: Array
    """[B, H, C] of the gradient of token j in −S_C"""


def token_paths(theta: Array, log_keep: Array, log_momentum: Array, fresh: Array | None) -> Paths:
    """Gates [B, H, C] and starts [B, C] of a chunk → its paths.

    A source enters at the chunk's first token, or where a segment begins. The path of a gradient is to stay in the
    momentum from j to i and then in the weights from i to t: G = decays(1 − alpha) decays(eta) diag(theta).
    """
    first = (jnp.arange(theta.shape[-1]) == 0)[None]
    enters = jnp.stack([first] if fresh is None else [first & ~fresh, fresh], axis=-1)[:, None].astype(theta.dtype)
    reset = 0.0 if fresh is None else jnp.where(fresh, RESET, 0.0)[:, None]
    kept, carried = decays(log_keep + reset), decays(log_momentum + reset)
    momentum = carried @ (enters * jnp.exp(log_momentum)[..., None])
    steps = carried * theta[..., None, :]
    weights = kept @ (enters * jnp.exp(log_keep)[..., None])
    return Paths(weights, kept @ momentum, kept @ steps, momentum[:, :, -1], steps[:, :, -1])


def chunk_paths(theta: Array, log_keep: Array, log_momentum: Array, fresh: Array | None) -> Paths:
    """theta [B, H, C], one pair of gates [B, H] and starts [B, C] of a chunk → its paths.

    All but the last token see the memory as it was. Where segments begin, only the last of them is remembered.
    """
    source = _sources_of(theta[..., None], fresh)
    if fresh is not None:
        theta = jnp.where(_last_segment(fresh)[:, None], theta, 0)
    keep, eta = (jnp.exp(log)[..., None] * source[:, :, -1] for log in (log_keep, log_momentum))
    last = (jnp.arange(theta.shape[-1]) == theta.shape[-1] - 1)[:, None]
    weights = jnp.where(last, keep[:, :, None], source)
    steps = jnp.where(last, theta[:, :, None], 0)
    return Paths(weights, jnp.where(last, eta[:, :, None], 0), steps, eta, theta)


def pooled(
    logits: Float[Array, "B T H"], chunk: int, fresh: Bool[Array, "B T"] | None, mask: Bool[Array, "B T"] | None
) -> tuple[Float[Array, "B N H"], Bool[Array, "B N"]]:
    """Mean over the tokens of each chunk that are there, and whether any is; where segments begin, over the last's."""
    batch, time, heads = logits.shape
    count = -(-time // chunk)

    def chunked(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, count * chunk - time))).reshape(batch, count, chunk)

    there = chunked(jnp.ones((batch, time), bool) if mask is None else mask)
    if fresh is not None:
        there &= _last_segment(chunked(fresh))
    number = jnp.sum(there, axis=-1)
    padded = jnp.pad(logits, ((0, 0), (0, count * chunk - time), (0, 0))).reshape(batch, count, chunk, heads)
    total = jnp.sum(jnp.where(there[..., None], padded, 0), axis=2)
    return total / jnp.maximum(number, 1)[..., None], number > 0


def decays(log: Float[Array, "*lead C"]) -> Float[Array, "*lead C C"]:
    """exp of the sum of log over j < i ≤ t at [t, j], 0 above the diagonal.

    Each sum is taken for itself: differences of running sums would be lost beside a reset.
    """
    time = jnp.arange(log.shape[-1])
    sums = jnp.cumsum(jnp.where(time[:, None] > time, log[..., None], 0), axis=-2)
    return jnp.where(time[:, None] >= time, jnp.exp(sums), 0)


def _chunk(
    paths: Callable[..., Paths], activation: str, initial: Memory, memory: Memory, arrays: tuple[Any, ...]
) -> tuple[Memory, Array]:
    """One chunk: q, k, v [B, H, C, ·], gates and starts → the memory after it, and its answers [B, H, C, V]."""
    q, k, v, theta, log_keep, log_momentum, fresh = arrays
    source = _sources_of(k, fresh)
    sources = _sources(memory, initial, fresh)
    given = paths(theta, log_keep, log_momentum, fresh)
    weights = [[each.weights[n] for each in sources] for n in range(len(memory.weights))]
    momentum = [[each.momentum[n] for each in sources] for n in range(len(memory.weights))]

    def loss(shifts: list[Array]) -> tuple[Array, list[Array]]:
        answers, inputs = _run(lambda n, x: _mixed(x, weights[n], source) + shifts[n], k, memory, activation)
        return jnp.sum((answers - v) ** 2), inputs

    # The gradient with respect to a shift of what a layer gives is what comes back to it, for each token.
    shifts = [jnp.zeros((*k.shape[:3], w.shape[-1]), k.dtype) for w in memory.weights]
    deltas, inputs = jax.grad(loss, has_aux=True)(shifts)

    def read(n: int, x: Array) -> Array:
        held = _mixed(x, weights[n], given.weights) + _mixed(x, momentum[n], given.momentum)
        if weights[n][0].ndim == 3:
            return held - x * (given.steps @ (inputs[n] * deltas[n]))
        return held - (given.steps * (x @ jnp.swapaxes(inputs[n], -1, -2))) @ deltas[n]

    def stepped(n: int, parts: Sequence[tuple[Array, Sequence[Array]]], steps: Array) -> Array:
        """Sum of shares [B, H, R] of sources, less `steps` [B, H, C] of the gradients."""
        vector = weights[n][0].ndim == 3
        held = [jnp.expand_dims(s[..., r], (2,) if vector else (2, 3)) * w for s, ws in parts for r, w in enumerate(ws)]
        taken = inputs[n] * steps[..., None]
        return sum(held) - (jnp.sum(taken * deltas[n], axis=2) if vector else jnp.swapaxes(taken, -1, -2) @ deltas[n])

    answers, _ = _run(read, q, memory, activation)
    layers = range(len(memory.weights))
    ends = (given.weights[:, :, -1], given.momentum[:, :, -1], given.steps[:, :, -1])
    after = Memory(
        tuple(stepped(n, [(ends[0], weights[n]), (ends[1], momentum[n])], ends[2]) for n in layers),
        tuple(stepped(n, [(given.last_momentum, momentum[n])], given.last_steps) for n in layers),
    )
    return after, answers


def _run(layer: Callable[[int, Array], Array], x: Array, memory: Memory, activation: str) -> tuple[Array, list[Array]]:
    """M(x) and what goes into each layer, where `layer(n, x)` is x by the n-th weights."""
    residual = memory.weights[-1].ndim == 3
    inputs = [x]
    y = layer(0, x)
    for n in range(1, len(memory.weights) - residual):
        inputs.append(ACTIVATIONS[activation](y))
        y = layer(n, inputs[-1])
    if residual:
        inputs.append(_standardised(y))
        y = x + inputs[-1] + layer(len(memory.weights) - 1, inputs[-1])
    return y, inputs


def _standardised(x: Array) -> Array:
    mean, variance = jnp.mean(x, axis=-1, keepdims=True), jnp.var(x, axis=-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + EPSILON)


def _mixed(x: Array, weights: Sequence[Array], shares: Array) -> Array:
    """Sum over sources of shares [B, H, C, R] · (x by their weights)."""
    products = [x * w[..., None, :] if w.ndim == 3 else x @ w for w in weights]
    return jnp.asarray(sum(shares[..., r : r + 1] * y for r, y in enumerate(products)))


def _sources(memory: Memory, initial: Memory, fresh: Array | None) -> tuple[Memory, ...]:
    return (memory,) if fresh is None else (memory, initial)


def _sources_of(x: Array, fresh: Array | None) -> Array:
    """[B or 1, 1, C, R]: 1 for the source of each token's segment, for x [B, H, C, K]."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if fresh is None:
        return jnp.ones((1, 1, x.shape[2], 1), dtype)
    begun = lax.cummax(fresh.astype(dtype), axis=1)
    return jnp.stack([1 - begun, begun], axis=-1)[:, None]


def _last_segment(fresh: Array) -> Array:
    """[…, C] starts → whether a token is in the last of the segments."""
    run = jnp.cumsum(fresh, axis=-1)
    return run == run[..., -1:]
