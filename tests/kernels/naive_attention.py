"""Attention and block selection written out pair by pair and block by block, for the tests of what is built on them."""

import jax
import jax.numpy as jnp
import numpy as np


def attention(q, k, v, visible, scale=None):
    """[B, T, H, V] and the weights [B, H, T, S], for visible [B, 1 or H, T, S]; k and v of G heads."""
    shared, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5 if scale is None else scale
    k, v = jnp.repeat(k, shared, 2), jnp.repeat(v, shared, 2)
    scores = scale * jnp.einsum("bthk,bshk->bhts", q, k, precision="highest")
    weights = jnp.where(visible, jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1), 0)
    return jnp.einsum("bhts,bshv->bthv", weights, v, precision="highest"), weights


def segments(*starts, time, batch):
    """[B, T] ids that come back: 5, 6, 5, 6, …"""
    return jnp.broadcast_to(5 + np.searchsorted(starts, np.arange(time), side="right") % 2, (batch, time))


def numbered(segment_ids, batch, time):
    """[B, T] numbers of the runs of equal ids."""
    ids = np.zeros((batch, time), int) if segment_ids is None else np.asarray(segment_ids)
    return np.cumsum(np.diff(ids, axis=1, prepend=ids[:, :1]) != 0, axis=1)


def ended(run, size, stride):
    """[B, T, N] bool: which compressed blocks have ended by each time and lie in its run; run [B, T]."""
    ends = np.arange(size - 1, run.shape[1], stride)
    inside = run[:, ends] == run[:, ends - size + 1]
    seen = inside[:, None] & (run[:, :, None] == run[:, None, ends])
    return seen & (ends <= np.arange(run.shape[1])[:, None])


def softmax(scores, visible):
    """Along the last axis, zeros where nothing is visible."""
    weights = np.where(visible, np.exp(scores - np.max(scores, axis=-1, keepdims=True, initial=-1e300)), 0)
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total > 0, total, 1)


def chosen(weights, run, *, block_size, stride, compression_block, selected_blocks, initial, local):
    """Weights [B, G, T, N] of a group's heads together, run [B, T] → which blocks: [B, G, T, blocks] bool.

    Scores count the strides that a compressed block and a block share.
    """
    *leading, time, compressed = weights.shape
    blocks = [set(range(j * block_size, (j + 1) * block_size)) for j in range(-(-time // block_size))]
    shared = np.zeros((compressed, len(blocks)))
    for i, j in np.ndindex(shared.shape):
        shared[i, j] = len(blocks[j] & set(range(i * stride, i * stride + compression_block))) // stride
    scores = weights @ shared
    found = np.zeros(scores.shape, bool)
    for b, g, t in np.ndindex(*leading, time):
        first, last = np.flatnonzero(run[b] == run[b, t])[0] // block_size, t // block_size
        forced = [j for j in range(first, last + 1) if j < first + initial or j > last - local]
        others = sorted(set(range(first, last + 1)) - set(forced), key=lambda j: (-scores[b, g, t, j], j))
        found[b, g, t, [*forced, *others][:selected_blocks]] = True
    return found


def listed(found, most):
    """[B, G, T, blocks] bool → [B, T, G, most] ids, ascending, filled up with -1."""
    ids = np.full((*found.shape[:-1], most), -1)
    for place in np.ndindex(found.shape[:-1]):
        here = np.flatnonzero(found[place])
        ids[place][: len(here)] = here
    return np.swapaxes(ids, 1, 2)
