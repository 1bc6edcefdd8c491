"""Contrast of what a model makes of brain signals with what is known of the stimulus: text, images, sound as vectors.

    head = ContrastHead(features=768, loss="clip")
    value, metrics = head.apply(variables, encoded.pooled, target)          # [B, D], [B, F]

Row i of both belongs together and every other row of the batch does not. Under a mesh the batch is the whole one, over
all devices. All is float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from zoo.errors import ZooError
from zoo.layers.devices import on_devices
from zoo.layers.parameters import dense, partitioned
from zoo.layers.quantizers import unit
from zoo.types import AnyArray, Array

MAX_SCALE = 100.0
"""The largest factor of similarities that CLIP's training lets through."""
ABSENT = -1e30
"""Logit of what may not be chosen. Not −inf: a row that is not there would have no answer at all, and NaN for a
gradient."""
BLOCK = 2**25
"""Logits that a device makes at a time where rows are searched for in a large batch: 128 MiB."""


def similarities(
    ours: Float[AnyArray, "B F"], theirs: Float[AnyArray, "B F"], *, cosine: bool = True
) -> Float[Array, "B B"]:
    """Cosines, or plain products, of every row of the one with every row of the other."""
    ours, theirs = (jnp.asarray(each, jnp.float32) for each in (ours, theirs))
    return unit(ours) @ unit(theirs).T if cosine else ours @ theirs.T


def candidate_scores(ours: Float[AnyArray, "B ..."], theirs: Float[AnyArray, "M ..."]) -> Float[Array, "B M"]:
    """Products with candidates of length one: what speech is found by (Défossez et al., 2208.12266, §2.2).

    Only candidates are brought to length one, over all their axes together, so ours keep a confidence of their own.
    With `info_nce` this is the one-directional loss of that work, which has no temperature.
    """
    flat = [jnp.asarray(each, jnp.float32).reshape(len(each), -1) for each in (ours, theirs)]
    return flat[0] @ unit(flat[1]).T


def info_nce(
    logits: Float[AnyArray, "B B"],
    valid: Bool[AnyArray, " B"] | None = None,
    *,
    segment: Int[AnyArray, " B"] | None = None,
) -> Float[Array, ""]:
    """Mean over rows of −log softmax_j(logits_ij) at j = i (van den Oord et al., 1807.03748, equation 4).

    valid    rows that are there; the others are neither asked nor an answer. 0 where none is
    segment  which stimulus each row belongs to: another row of the same one is no wrong answer, and is left out
    """
    valid = jnp.ones(len(logits), bool) if valid is None else jnp.asarray(valid)
    asked = jnp.broadcast_to(valid, logits.shape)
    if segment is not None:
        segment = jnp.asarray(segment)
        asked &= (segment[:, None] != segment) | jnp.eye(len(logits), dtype=bool)
    log_probs = jax.nn.log_softmax(jnp.where(asked, logits, ABSENT), axis=-1)
    return -jnp.sum(jnp.diagonal(log_probs), where=valid) / jnp.maximum(valid.sum(), 1)


def clip_loss(logits: Float[AnyArray, "B B"], valid: Bool[AnyArray, " B"] | None = None) -> Float[Array, ""]:
    """Half of `info_nce` one way and half the other (Radford et al., 2103.00020, figure 3). At first about ln B."""
    return 0.5 * (info_nce(logits, valid) + info_nce(logits.T, valid))


def soft_clip_loss(
    logits: Float[AnyArray, "B B"], likeness: Float[AnyArray, "B B"], valid: Bool[AnyArray, " B"] | None = None
) -> Float[Array, ""]:
    """Cross-entropy of softmax(logits) with softmax(likeness), half one way and half the other.

    likeness  similarities of the targets among themselves over their temperature, such as
              `similarities(targets, targets) / 0.1`: targets that are alike may be taken for each other
    valid     rows that are there

    Source: SoftCLIP as MindEye trains it (Scotti et al., 2305.18274, equation 3). Where targets are like none but
    themselves it is `clip_loss`.
    """
    valid = jnp.ones(len(logits), bool) if valid is None else jnp.asarray(valid)
    wanted = jax.nn.softmax(jnp.where(valid, likeness, ABSENT), axis=-1)

    def one_way(logits: Array) -> Array:
        log_probs = jax.nn.log_softmax(jnp.where(valid, logits, ABSENT), axis=-1)
        # Where a row is not there −1e30 meets a share of 0.
        each = jnp.sum(wanted * jnp.where(valid, log_probs, 0), axis=-1)
        return -jnp.sum(each, where=valid) / jnp.maximum(valid.sum(), 1)

    return 0.5 * (one_way(jnp.asarray(logits)) + one_way(jnp.asarray(logits).T))


def nt_xent(
    one: Float[AnyArray, "B F"],
    other: Float[AnyArray, "B F"],
    valid: Bool[AnyArray, " B"] | None = None,
    *,
    temperature: float = 0.2,
) -> Float[Array, ""]:
    """Two views of every row: each of the 2B looks for its other view among all that are not itself.

    Mean over rows of −log softmax of cosines / temperature (Chen et al., SimCLR, 2002.05709, equation 1). About
    ln(2B − 1) at first. valid: rows that are there, in both views.
    """
    count = len(one)
    valid = jnp.tile(jnp.ones(count, bool) if valid is None else jnp.asarray(valid), 2)
    both = jnp.concatenate([jnp.asarray(one, jnp.float32), jnp.asarray(other, jnp.float32)])
    asked = valid & ~jnp.eye(2 * count, dtype=bool)
    log_probs = jax.nn.log_softmax(jnp.where(asked, similarities(both, both) / temperature, ABSENT), axis=-1)
    counterpart = jnp.roll(jnp.arange(2 * count), count)
    found = jnp.take_along_axis(log_probs, counterpart[:, None], axis=1)[:, 0]
    return -jnp.sum(found, where=valid) / jnp.maximum(valid.sum(), 1)


def siglip_loss(logits: Float[AnyArray, "B B"], valid: Bool[AnyArray, " B"] | None = None) -> Float[Array, ""]:
    """−log sigmoid(±logits_ij), + where i = j, summed over j, a mean over i (Zhai et al., 2303.15343, algorithm 1)."""
    valid = jnp.ones(len(logits), bool) if valid is None else jnp.asarray(valid)
    sign = 2 * jnp.eye(len(logits)) - 1
    pairs = valid[:, None] & valid
    return -jnp.sum(jax.nn.log_sigmoid(sign * logits), where=pairs) / jnp.maximum(valid.sum(), 1)


def retrieval(
    logits: Float[AnyArray, "B B"], valid: Bool[AnyArray, " B"] | None = None, top: int = 1
) -> Float[Array, ""]:
    """Share of rows whose own column is among the `top` largest; of equals half rank before it."""
    valid = jnp.ones(len(logits), bool) if valid is None else jnp.asarray(valid)
    own = jnp.diagonal(logits)[:, None]
    others = valid & ~jnp.eye(len(logits), dtype=bool)
    rank = jnp.sum(logits > own, axis=1, where=others) + 0.5 * jnp.sum(logits == own, axis=1, where=others)
    return jnp.sum(rank < top, where=valid) / jnp.maximum(valid.sum(), 1)


def searched(
    ours: Float[AnyArray, "B F"],
    theirs: Float[AnyArray, "B F"],
    scale: Float[AnyArray, ""],
    offset: Float[AnyArray, ""] | None = None,
    *,
    valid: Bool[AnyArray, " B"],
    segment: Int[AnyArray, " B"],
    block: int = BLOCK,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """For each of our rows: its loss, and how many of their rows are likelier than its own, of equals half.

    Logits are scale · products (+ offset), of rows that are there (`valid`) and, but for its own, of another stimulus
    (`segment`). The loss is −log softmax at its own, as in `info_nce`; where there is an offset −Σ_j log sigmoid(±), as
    in `siglip_loss`. Each device takes its own rows against all of theirs, `block` logits at a time, and makes them
    again for the gradient: memory grows with B and not with B². Rows that are not there mean nothing.
    """
    rows = jnp.arange(len(ours))
    given = (ours, rows, segment, theirs, valid, segment, scale, *(() if offset is None else (offset,)))
    arrays = [jnp.asarray(each) for each in given]

    def op(
        ours: Array, rows: Array, stimulus: Array, theirs: Array, valid: Array, segment: Array, *learned: Array
    ) -> Any:
        def turn(_: None, part: tuple[Array, Array, Array]) -> tuple[None, tuple[Array, Array]]:
            return None, _found(*part, theirs, valid, segment, *learned)

        most = max(1, block // len(theirs))
        length = next(size for size in range(min(most, len(ours)), 0, -1) if len(ours) % size == 0)
        parts = jax.tree.map(lambda x: x.reshape(-1, length, *x.shape[1:]), (ours, rows, stimulus))
        found = jax.lax.scan(jax.checkpoint(turn, prevent_cse=False), None, parts)[1]
        return jax.tree.map(lambda x: x.reshape(-1), found)

    own, all_of = ("batch",), (None,)
    axes = (("batch", None), own, own, (None, None), all_of, all_of, *((),) * (len(arrays) - 6))
    nats, rank = on_devices(op, arrays, axes, (own, own))
    return nats, rank


def _found(
    ours: Array,
    rows: Array,
    stimulus: Array,
    theirs: Array,
    valid: Array,
    segment: Array,
    scale: Array,
    offset: Array | None = None,
) -> tuple[Array, Array]:
    """`searched` of these rows [b, F] of ours among all of theirs [B, F]."""
    own = rows[:, None] == jnp.arange(len(theirs))
    others = valid & (stimulus[:, None] != segment)
    logits = scale * (jnp.asarray(ours, jnp.float32) @ jnp.asarray(theirs, jnp.float32).T)
    right = jnp.sum(logits, axis=1, where=own)
    rank = jnp.sum(logits > right[:, None], axis=1, where=others) + 0.5 * jnp.sum(
        logits == right[:, None], axis=1, where=others
    )
    if offset is None:
        nats = jax.nn.logsumexp(jnp.where(own | others, logits, ABSENT), axis=1) - right
    else:
        signed = jnp.where(own, logits + offset, -logits - offset)
        nats = -jnp.sum(jax.nn.log_sigmoid(signed), axis=1, where=own | others)
    return nats, rank


class ContrastHead(nn.Module):
    """A linear map into the space of the targets, a learned factor of cosines, and for SigLIP a learned offset.

    features     F of the targets
    loss         clip or siglip
    temperature  1 / the factor at first; 0.07 as CLIP, 0.1 as SigLIP unless given
    """

    features: int
    loss: str = "clip"
    temperature: float | None = None

    @nn.compact
    def __call__(
        self,
        pooled: Float[AnyArray, "B D"],
        target: Float[AnyArray, "B F"],
        valid: Bool[AnyArray, " B"] | None = None,
    ) -> tuple[Float[Array, ""], Mapping[str, Array]]:
        """(loss; metrics: retrieval of the target and of the signal among the batch, the factor).

        Raises ZooError for another loss or targets of another width.
        """
        if self.loss not in ("clip", "siglip"):
            raise ZooError(f"ContrastHead loss: got {self.loss!r}, wanted 'clip' or 'siglip'")
        if target.shape[-1] != self.features:
            raise ZooError(f"ContrastHead: got targets of {target.shape[-1]} numbers, wanted {self.features}")
        first = self.temperature or (0.07 if self.loss == "clip" else 0.1)
        log_scale = self.param("log_scale", partitioned(nn.initializers.constant(-math.log(first))), ())
        scale = jnp.minimum(jnp.exp(log_scale), MAX_SCALE)
        ours = dense(self.features, ("embed", None), name="project")(jnp.asarray(pooled, jnp.float32))
        logits = scale * similarities(ours, target)
        if self.loss == "siglip":
            logits = logits + self.param("offset", partitioned(nn.initializers.constant(-10.0)), ())
        value = (clip_loss if self.loss == "clip" else siglip_loss)(logits, valid)
        metrics = {
            "target_retrieval": retrieval(logits, valid),
            "signal_retrieval": retrieval(logits.T, valid),
            "scale": scale,
        }
        return value, metrics
