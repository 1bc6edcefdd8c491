"""Four tasks with known answers that tell memories apart. Batches are drawn inside the training program.

A batch is (inputs, targets, weights): inputs [B, T] tokens or [B, T, F] samples; targets [B, T] tokens or numbers; a
place counts where its weight [B, T] is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Batch = tuple[jax.Array, jax.Array, jax.Array]


@dataclass(frozen=True)
class Task:
    """A task: its data, the model's ends, how long to train, what else to test on.

    ends    vocabulary or features and outputs of the sequence model
    draw    (key, batch size) → batch
    others  name → draw of another distribution that is only tested
    """

    name: str
    source: str
    length: int
    batch: int
    steps: int
    ends: dict[str, Any]
    draw: Callable[[jax.Array, int], Batch]
    others: dict[str, Callable[[jax.Array, int], Batch]] = field(default_factory=dict)

    @property
    def regression(self) -> bool:
        """Whether targets are numbers rather than tokens."""
        return "features" in self.ends

    def loss(self, predictions: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """Mean over the places that count: cross-entropy, or squared error."""
        if self.regression:
            each = (predictions[..., 0] - targets) ** 2
        else:
            logs = jax.nn.log_softmax(predictions)
            each = -jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(each * weights) / jnp.sum(weights)

    def right(self, predictions: jax.Array, targets: jax.Array) -> jax.Array:
        """[B, T]: which are right; of numbers, those less than 0.04 off, as in the adding problem's literature."""
        if self.regression:
            return jnp.abs(predictions[..., 0] - targets) < 0.04
        return jnp.argmax(predictions, axis=-1) == targets


def associative_recall(key: jax.Array, batch: int, *, length: int, pairs: int, renewed: int, words: int) -> Batch:
    """Multi-query associative recall: pairs of key and value, then every key again in random order at random places.

    Ours beside the paper's: after the pairs, `renewed` of the keys come again with new values, and the last one counts.
    `words` keys are tokens 1 to words, values follow them, 0 is blank. The answer is due at the key.
    """
    count = pairs + renewed

    def row(key: jax.Array) -> Batch:
        of_keys, of_renewed, of_values, of_order, of_places = jax.random.split(key, 5)
        keys = 1 + jax.random.permutation(of_keys, words)[:pairs]
        said = jnp.concatenate([keys, jax.random.permutation(of_renewed, keys)[:renewed]])
        values = 1 + words + jax.random.randint(of_values, (count,), 0, words)
        last = jnp.argmax(jnp.where(said == keys[:, None], 1 + jnp.arange(count), 0), axis=1)
        order = jax.random.permutation(of_order, pairs)
        places = 2 * count + jnp.sort(jax.random.permutation(of_places, length - 2 * count)[:pairs])
        head = jnp.stack([said, values], axis=-1).reshape(-1)
        inputs = jnp.zeros(length, jnp.int32).at[: 2 * count].set(head).at[places].set(keys[order])
        targets = jnp.zeros(length, jnp.int32).at[places].set(values[last][order])
        return inputs, targets, jnp.zeros(length).at[places].set(1.0)

    return jax.vmap(row)(jax.random.split(key, batch))


def flip_flop(key: jax.Array, batch: int, *, length: int, ignore: float) -> Batch:
    """Instructions write (2), read (3) and ignore (4), each followed by a bit (0 or 1); after a read, the bit last
    written is due. The first instruction writes, the last reads; the rest ignore with probability `ignore`, and write
    or read with equal shares of what is left. Read bits are given as inputs where they stand, as in a language model.
    """
    of_kind, of_bit = jax.random.split(key)
    count = length // 2
    chance = jnp.array([(1 - ignore) / 2, (1 - ignore) / 2, ignore])
    kind = 2 + jax.random.choice(of_kind, 3, (batch, count), p=chance)
    kind = kind.at[:, 0].set(2).at[:, -1].set(3)
    bit = jax.random.bernoulli(of_bit, 0.5, (batch, count)).astype(jnp.int32)
    written = jax.lax.cummax(jnp.where(kind == 2, jnp.arange(count), 0), axis=1)
    bit = jnp.where(kind == 3, jnp.take_along_axis(bit, written, axis=1), bit)
    inputs = jnp.stack([kind, bit], axis=-1).reshape(batch, length)
    targets = jnp.stack([bit, bit], axis=-1).reshape(batch, length)
    weights = jnp.stack([kind == 3, jnp.zeros_like(kind, bool)], axis=-1).reshape(batch, length)
    return inputs, targets, weights.astype(jnp.float32)


def selective_copy(key: jax.Array, batch: int, *, length: int, words: int, count: int) -> Batch:
    """`count` words (tokens 2 to words + 1) at random places among blanks (0); at the end they are due in order, one at
    each of `count` marks (1)."""

    def row(key: jax.Array) -> Batch:
        of_words, of_places = jax.random.split(key)
        said = 2 + jax.random.randint(of_words, (count,), 0, words)
        places = jnp.sort(jax.random.permutation(of_places, length - count)[:count])
        inputs = jnp.zeros(length, jnp.int32).at[places].set(said).at[-count:].set(1)
        targets = jnp.zeros(length, jnp.int32).at[-count:].set(said)
        return inputs, targets, jnp.zeros(length).at[-count:].set(1.0)

    return jax.vmap(row)(jax.random.split(key, batch))


def adding(key: jax.Array, batch: int, *, length: int) -> Batch:
    """Numbers in [0, 1) of which two are marked, one in the first tenth and one before the middle; at the end their sum
    is due."""
    of_numbers, of_first, of_second = jax.random.split(key, 3)
    numbers = jax.random.uniform(of_numbers, (batch, length))
    first = jax.random.randint(of_first, (batch,), 0, length // 10)
    second = jax.random.randint(of_second, (batch,), length // 10, length // 2)
    marks = jax.nn.one_hot(first, length) + jax.nn.one_hot(second, length)
    total = jnp.sum(numbers * marks, axis=1, keepdims=True)
    weights = jnp.zeros((batch, length)).at[:, -1].set(1.0)
    return jnp.stack([numbers, marks], axis=-1), jnp.broadcast_to(total, (batch, length)), weights


def tasks(share: float = 1.0) -> dict[str, Task]:
    """The four tasks; `share` of the steps."""

    def steps(count: int) -> int:
        return max(1, round(share * count))

    recall: Any = partial(associative_recall, length=64, pairs=12, renewed=4, words=64)
    flips: Any = {p: partial(flip_flop, length=128, ignore=p) for p in (0.8, 0.98, 0.1)}
    copied: Any = partial(selective_copy, length=64, words=14, count=6)
    return {
        "recall": Task("recall", "MQAR, Arora et al. 2312.04927", 64, 32, steps(400), {"vocabulary": 129}, recall),
        "flip_flop": Task(
            "flip_flop",
            "flip-flop language, Liu et al. 2306.00946",
            128,
            16,
            steps(120),
            {"vocabulary": 5},
            flips[0.8],
            {"sparse": flips[0.98], "dense": flips[0.1]},
        ),
        "copy": Task(
            "copy", "selective copying, Gu and Dao 2312.00752", 64, 32, steps(240), {"vocabulary": 16}, copied
        ),
        "adding": Task(
            "adding",
            "long range: the adding problem, Hochreiter and Schmidhuber 1997",
            256,
            8,
            steps(160),
            {"features": 2, "outputs": 1},
            partial(adding, length=256),
        ),
    }
