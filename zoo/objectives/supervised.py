"""Learning from labels: the losses, and the task that ties an encoder and its classifier to them.

Labels are int [B]; −1 is none, and such a row counts for nothing. All is float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from zoo.encoders.adapted import Adapted
from zoo.encoders.encoder import Encoder
from zoo.errors import ZooError
from zoo.layers.channel_adapter import ChannelAdapter
from zoo.registry import create
from zoo.types import AnyArray, Array, Batch, Sensors, Variables


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


@dataclass(frozen=True)
class Supervised:
    """The task: an encoder and its published classifier learn the labels of windows. Its own configuration.

    Attributes:
        model: registered encoder
        options: replacements for its options
        classes: K of the classifier; 1 tells two classes apart by one logit (binary cross-entropy)
        smoothing: of labels
        ordinal_spread: above 0, classes have an order, and near ones are half right: see `ordinal_labels`
        class_weights: one a class; empty counts every window the same
        dropout: before the classifier, besides its own
        channels: how the recording's channels become the encoder's: identity, learned or interpolate
        montage: names of the encoder's channels where an adapter leads to them; empty for those it asks for itself
        inputs: how many channels recordings have, for a learned map
        max_norm: largest norm of an output's weights in a learned map; 0 for none
    """

    model: str = "eegnet_base"
    options: Mapping[str, Any] = field(default_factory=dict)
    classes: int = 2
    smoothing: float = 0.0
    ordinal_spread: float = 0.0
    class_weights: tuple[float, ...] = ()
    dropout: float = 0.0
    channels: Literal["identity", "learned", "interpolate"] = "identity"
    montage: tuple[str, ...] = ()
    inputs: int = 0
    max_norm: float = 0.0

    def encoder(self) -> Any:
        """The encoder, behind its adapter where it has one. Raises ZooError for a model that is none."""
        encoder = create(self.model, **self.options)
        if not isinstance(encoder, Encoder):
            raise ZooError(f"task.model: {self.model} is not an encoder of signals, such as eegnet_base")
        if self.channels == "identity":
            return encoder
        outputs = self.montage or encoder.montage
        if not outputs:
            raise ZooError(f"task.montage: {self.model} takes any channels; wanted the names of those to lead to")
        adapter = ChannelAdapter(self.channels, outputs, self.inputs or None, self.max_norm)
        return Adapted(encoder, adapter)

    def module(self) -> Classifier:
        """Encoder and classifier."""
        return Classifier(self.encoder(), self.classes, self.dropout)

    def init(self, key: Array, batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names."""
        variables: Variables = self.module().init(key, batch["signal"], batch["sensors"], subject=_subject(batch))
        return variables

    def loss(
        self, variables: Variables, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """Cross-entropy, a mean over labelled windows by their class's weight.

        Metrics: accuracy, balanced accuracy (the mean over the classes that the batch has), the weight.
        """
        statistics = [name for name in variables if name != "params"]
        logits: Any
        logits, new = self.module().apply(
            variables,
            batch["signal"],
            batch["sensors"],
            subject=_subject(batch),
            train=train,
            rngs={"dropout": key},
            mutable=statistics if train else [],
        )
        label = jnp.asarray(batch["label"])
        weights = jnp.asarray(self.class_weights, jnp.float32) if self.class_weights else None
        if self.classes == 1:
            count = jnp.sum(label >= 0).astype(jnp.float32)
            value = binary_cross_entropy(logits[:, 0], label, smoothing=self.smoothing)
            chosen = (logits[:, 0] > 0).astype(jnp.int32)
        else:
            wanted: Any = ordinal_labels(label, self.classes, self.ordinal_spread) if self.ordinal_spread else label
            value = cross_entropy(logits, wanted, smoothing=self.smoothing, weights=weights)
            count = wanted_and_weight(wanted, self.classes, weights=weights)[1].sum()
            chosen = logits.argmax(-1)
        return value, {**accuracies(chosen, label, max(2, self.classes)), "weight": count}, new

    def predict(self, variables: Variables, batch: Batch) -> Float[Array, "B K"]:
        """Class probabilities of every window; two of them for one logit."""
        logits: Any = self.module().apply(variables, batch["signal"], batch["sensors"], subject=_subject(batch))
        if self.classes == 1:
            logits = jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)
        return jax.nn.softmax(logits)

    def flops(self, batch: Batch) -> float:
        """Operations of the encoder's forward pass over `batch`; its classifier's do not count."""
        examples, channels, samples = batch["signal"].shape
        return float(examples * self.encoder().flops(channels, samples))

    def check_recording(self, rate_hz: float, kinds: tuple[str, ...], names: tuple[str, ...]) -> None:
        """Raises ZooError when the encoder, or its adapter, cannot take such a recording."""
        self.encoder().check_recording(rate_hz, kinds, names)

    def check_positions(self, sensors: Sensors) -> None:
        """Raises ZooError for sensors, on the host, whose place it must know and does not."""
        self.encoder().check_positions(sensors)

    def check_labels(self, classes: tuple[str, ...], people: int) -> None:
        """Raises ZooError when recordings have other classes or more people than this learns."""
        if len(classes) != max(2, self.classes):
            raise ZooError(
                f"task.classes: got {self.classes}, windows have {len(classes)}, {', '.join(classes) or 'no labels'}; "
                "wanted as many as probe.classes, or as the events of the recipe's window"
            )
        if self.class_weights and len(self.class_weights) != self.classes:
            raise ZooError(f"task.class_weights: got {len(self.class_weights)} of them, wanted {self.classes}")
        rows = self.encoder().subjects
        if rows and rows < people:
            raise ZooError(f"task.options: {self.model} has a subject layer of {rows} people, the recordings {people}")


def accuracies(chosen: Int[AnyArray, " B"], label: Int[AnyArray, " B"], classes: int) -> dict[str, Array]:
    """Share of right answers among labelled rows, and the mean of that over the classes that are there."""
    chosen, label = jnp.asarray(chosen), jnp.asarray(label)
    right = (chosen == label).astype(jnp.float32)
    of_class = jax.nn.one_hot(label, classes)
    counts = of_class.sum(0)
    recall = right @ of_class / jnp.maximum(counts, 1)
    return {
        "accuracy": jnp.sum(right, where=label >= 0) / jnp.maximum(counts.sum(), 1),
        "balanced_accuracy": jnp.sum(recall) / jnp.maximum(jnp.sum(counts > 0), 1),
    }


def _subject(batch: Batch) -> Array:
    """The person of every example, −1 where the batch does not say."""
    return jnp.asarray(batch["subject"]) if "subject" in batch else jnp.full(len(batch["signal"]), -1, jnp.int32)


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
