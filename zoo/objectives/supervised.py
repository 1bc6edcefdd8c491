"""Learning from labels: the losses, and the task that ties an encoder and its classifier to them.

Labels are int [B]; −1 is none, and such a row counts for nothing. All is float32.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from zoo.errors import ZooError
from zoo.types import AnyArray, Array, Sensors


def cross_entropy(
    logits: Float[AnyArray, "B K"],
    label: Int[AnyArray, " B"] | Float[AnyArray, "B K"],
    *,
    smoothing: float = 0.0,
    weights: Float[AnyArray, " K"] | None = None,
) -> Float[Array, ""]:
    """Mean of −Σ_k wanted_k · log softmax(logits)_k over rows that have a label.

    label      class numbers, or the wanted probabilities of every class (a row of zeros has no label)
    smoothing  share of a class's probability that is spread evenly over all (Szegedy et al., 1512.00567, §7)
    weights    of classes; the mean is weighed by that of each row's own class, as PyTorch's without smoothing
    """
    wanted, weight = wanted_and_weight(label, logits.shape[-1], smoothing=smoothing, weights=weights)
    each = -jnp.sum(wanted * jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)), axis=-1)
    return jnp.sum(weight * each) / jnp.maximum(weight.sum(), 1e-12)


def wanted_and_weight(
    label: Int[AnyArray, " B"] | Float[AnyArray, "B K"],
    classes: int,
    *,
    smoothing: float = 0.0,
    weights: Float[AnyArray, " K"] | None = None,
) -> tuple[Float[Array, "B K"], Float[Array, " B"]]:
    """Probabilities that are wanted of every row, and how much the row counts: 0 without a label."""
    label = jnp.asarray(label)
    hard = jax.nn.one_hot(label, classes) if label.ndim == 1 else label.astype(jnp.float32)
    weight = hard.sum(-1) if weights is None else hard @ jnp.asarray(weights, jnp.float32)
    return (1 - smoothing) * hard + smoothing / classes, weight


def ordinal_labels(label: Int[AnyArray, " B"], classes: int, spread: float = 0.5) -> Float[Array, "B K"]:
    """Probabilities ∝ exp(−½((k − label) / spread)²): classes in an order, near ones half right (HiSTN, 2408.15255)."""
    label = jnp.asarray(label)
    wanted = jax.nn.softmax(-0.5 * jnp.square((jnp.arange(classes) - label[:, None]) / spread), axis=-1)
    return jnp.where(label[:, None] >= 0, wanted, 0)


def binary_cross_entropy(
    logit: Float[AnyArray, " B"],
    label: Int[AnyArray, " B"],
    *,
    smoothing: float = 0.0,
    positive_weight: float = 1.0,
) -> Float[Array, ""]:
    """Mean of −log sigmoid(±logit) over rows that have a label, + for class 1, which counts `positive_weight` times.

    smoothing: share of a label that is spread evenly over both classes.
    """
    logit, label = jnp.asarray(logit, jnp.float32), jnp.asarray(label)
    wanted = (1 - smoothing) * label + smoothing / 2
    each = positive_weight * wanted * jax.nn.log_sigmoid(logit) + (1 - wanted) * jax.nn.log_sigmoid(-logit)
    there = label >= 0
    return -jnp.sum(each, where=there) / jnp.maximum(there.sum(), 1)


def class_weights(label: Int[np.ndarray, " N"], classes: int) -> Float[np.ndarray, " K"]:
    """N / (K · n_k) float32, on the host: every class weighs the same in all. Labels −1 do not count.

    Raises ZooError where a class has no example.
    """
    counts = np.bincount(label[label >= 0], minlength=classes)
    if len(counts) != classes or not counts.all():
        raise ZooError(
            f"class_weights: got {counts.tolist()} examples of the classes, wanted some of each of {classes}"
        )
    return (counts.sum() / (classes * counts)).astype(np.float32)


class Classifier(nn.Module):
    """An encoder with its published classifier: logits [B, K] float32.

    encoder  any `zoo.encoders.encoder.Encoder`
    classes  K
    dropout  share of the pooled features that training hides from the classifier, besides what it hides itself
    """

    encoder: Any
    classes: int
    dropout: float = 0.0

    def setup(self) -> None:
        self.head = self.encoder.head(self.classes)
        self.hide = nn.Dropout(self.dropout)

    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        *,
        subject: Int[AnyArray, " B"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B K"]:
        """subject reaches only encoders that have a subject layer."""
        whose = {"subject": subject} if self.encoder.subjects else {}
        pooled = self.encoder(signal, sensors, train=train, **whose).pooled
        logits: Array = self.head(self.hide(pooled, deterministic=not train), train=train)
        return jnp.asarray(logits, jnp.float32)
