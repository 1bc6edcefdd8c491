"""MTAM: EEG and text told apart by label together, while their projections are drawn to one another.

    task = AlignText("mtam_zuco", classes=3)        # batches with "label" [B] and "text" [B, F], such as BERT's vectors

Source: Qiu et al., arXiv 2208.06348, section 3. Two towers of the same kind (`zoo.encoders.mtam`) read the numbers of
the EEG and of the text; the tokens of both, one after the other, are summed with learned weights and classified; the
towers' own projections are aligned by canonical correlation and by a Wasserstein distance.

Where this differs from the authors' code: its Wasserstein distance is computed outside of what has gradients and so
teaches nothing; here it is the same exact distance of the projections' numbers, with its gradient. Its cross-entropy is
a sum over the batch, of 64; here it is a mean, so `optimizer.learning_rate` and the two weights are for a mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Key

from zoo.encoders.encoder import LinearHead
from zoo.encoders.mtam import MTAM, Tower, tower_flops
from zoo.errors import ZooError
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias
from zoo.objectives.adversarial import mean_over
from zoo.objectives.alignment import cca_loss, wasserstein
from zoo.objectives.supervised import cross_entropy
from zoo.registry import create
from zoo.types import AnyArray, Array, Batch, Sensors, Variables


class Towers(nn.Module):
    """The encoder, a tower like its own for text, and their fusion."""

    encoder: MTAM
    classes: int

    @nn.compact
    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        text: Float[AnyArray, "B F"],
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B K"], Float[Array, "B D"], Float[Array, "B D"]]:
        """(logits, projection of the EEG, projection of the text). Numbers of the text that are 0 are padding."""
        eeg, text = self.encoder(signal, sensors, train=train), jnp.asarray(text, jnp.float32)
        given = self.encoder
        tower = Tower(given.dim, given.heads, given.width, given.hidden, given.depth, given.dropout, name="text")
        words, projected = tower(text, text != 0, train=train)
        tokens = jnp.concatenate([words, eeg.tokens], axis=1)
        bias = like_torch_bias(tokens.shape[1])
        fuse = dense(1, (None, None), bias=True, init=LIKE_TORCH, bias_init=bias, name="fuse")
        logits = LinearHead(self.classes, name="head")(fuse(tokens.swapaxes(1, 2))[..., 0])
        return logits, eeg.pooled, projected


@dataclass(frozen=True)
class AlignText:
    """The task. As published: Adam with β (0.9, 0.98) and decay 0.01, 2000 steps of warm-up, batches of 64.

    Canonical correlations need more rows than components: batches above 16.

    Attributes:
        model: registered encoder
        options: replacements for its options
        classes: K
        components: canonical correlations that count; 0 as many as classes, as published
        correlation: weight of the correlations
        transport: weight of the Wasserstein distance
    """

    model: str = "mtam_zuco"
    options: Mapping[str, Any] = field(default_factory=dict)
    classes: int = 3
    components: int = 0
    correlation: float = 1.0
    transport: float = 1.0

    def encoder(self) -> MTAM:
        """The EEG tower. Its variables are `{"params": variables["params"]["encoder"]}`."""
        encoder = create(self.model, **self.options)
        if not isinstance(encoder, MTAM):
            raise ZooError(f"task.model: {self.model} is not MTAM, such as mtam_zuco")
        return encoder

    def module(self) -> Towers:
        """Both towers and their fusion."""
        return Towers(self.encoder(), self.classes)

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names."""
        return self.module().init(key, batch["signal"], batch["sensors"], _text(batch))

    def loss(
        self, variables: Variables, batch: Batch, key: Key[Array, ""], train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """Cross-entropy + correlation · (−Σ canonical correlations) + transport · distance; rows with a label alone.

        Metrics: each term, unweighed, and accuracy; weight, how many rows.
        """
        found: Any = self.module().apply(
            {"params": variables["params"]},
            batch["signal"],
            batch["sensors"],
            _text(batch),
            train=train,
            rngs={"dropout": key},
        )
        logits, eeg, text = found
        valid = jnp.asarray(batch["label"]) >= 0
        terms = {
            "naming": cross_entropy(logits, batch["label"]),
            "correlation": cca_loss(eeg, text, self.components or self.classes, valid),
            "transport": distance(eeg, text, valid),
        }
        value = terms["naming"] + self.correlation * terms["correlation"] + self.transport * terms["transport"]
        right = (logits.argmax(-1) == batch["label"]).astype(jnp.float32)
        return value, {**terms, "accuracy": mean_over(right, valid), "weight": valid.sum().astype(jnp.float32)}, {}

    def flops(self, batch: Batch) -> float:
        """Operations of one pass of both towers over `batch`."""
        encoder, (examples, channels, samples) = self.encoder(), batch["signal"].shape
        return examples * (encoder.flops(channels, samples) + tower_flops(encoder, _text(batch).shape[1]))

    def check_recording(self, rate_hz: float, kinds: Sequence[str], names: Sequence[str]) -> None:
        """Raises ZooError when the encoder cannot take a recording of this rate and these channels."""
        self.encoder().check_recording(rate_hz, kinds, names)


def distance(eeg: Float[Array, "B D"], text: Float[Array, "B D"], valid: Bool[Array, " B"]) -> Float[Array, ""]:
    """Wasserstein-1 distance of all numbers of the one side's rows and all of the other's.

    Rows that are not valid are put at the same place on both sides, where moving them costs nothing.
    """
    far = jax.lax.stop_gradient(jnp.maximum(jnp.abs(eeg).max(), jnp.abs(text).max())) + 1
    placed = [jnp.where(valid[:, None], each, far).reshape(-1) for each in (eeg, text)]
    return wasserstein(*placed) * len(valid) / jnp.maximum(valid.sum(), 1)


def _text(batch: Batch) -> Array:
    if "text" not in batch:
        raise ZooError("MTAM aligns EEG with text: the task needs batches with vectors of text")
    return jnp.asarray(batch["text"])
