"""What tasks share that tie what an encoder makes of a brain signal to vectors of the stimulus.

A batch has, besides signal and sensors, "target": the stimulus of each example; where the encoder has layers of
subjects, "subject" [B]; and where several examples may have the same stimulus, "segment" [B], its number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from zoo.encoders.encoder import Encoder
from zoo.errors import ZooError
from zoo.objectives.contrast import info_nce
from zoo.registry import create
from zoo.types import AnyArray, Array, Batch, Sensors, Variables


@dataclass(frozen=True)
class StimulusTask:
    """A task whose module is called with (signal, sensors, target, segment=, subject=, train=) → (loss, metrics).

    Attributes:
        model: registered encoder
        options: replacements for its options
    """

    model: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def encoder(self) -> Encoder:
        """The encoder alone. Its variables are what is called "encoder" in each collection.

        Raises ZooError for a model that is none.
        """
        encoder = create(self.model, **self.options)
        if not isinstance(encoder, Encoder):
            raise ZooError(f"task.model: {self.model} is not an encoder of signals, such as simple_conv_tiny")
        return encoder

    def module(self, target: Any) -> nn.Module:
        """The encoder as `encoder`, with what the loss needs, for targets of this shape."""
        raise NotImplementedError

    def init(self, key: Array, batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names. Raises ZooError without targets."""
        if "target" not in batch:
            raise ZooError(f'{type(self).__name__}: wanted the stimulus of each example as batch["target"], got none')
        params, dropout = jax.random.split(key)
        keys = {"params": params, "dropout": dropout}
        return self.module(batch["target"]).init(keys, *_given(batch), **self._more(batch))

    def loss(
        self, variables: Variables, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """(loss, metrics with weight, the number of examples; statistics as they are after the batch)."""
        module: Any = self.module(batch["target"])
        new: Variables = {}
        if train:
            collections = [name for name in variables if name != "params"]
            (value, metrics), new = module.apply(
                variables, *_given(batch), **self._more(batch), train=True, mutable=collections, rngs={"dropout": key}
            )
        else:
            value, metrics = module.apply(variables, *_given(batch), **self._more(batch))
        return value, {**metrics, "weight": jnp.float32(len(batch["signal"]))}, new

    def flops(self, batch: Batch) -> float:
        """Operations of one forward pass of the encoder over `batch`."""
        examples, channels, samples = batch["signal"].shape
        return examples * self.encoder().flops(channels, samples)

    def _more(self, batch: Batch) -> dict[str, Any]:
        wanted = ("segment", "subject") if getattr(self.encoder(), "subjects", 0) else ("segment",)
        return {name: batch[name] for name in wanted if name in batch}

    def check_recording(self, rate_hz: float, kinds: Sequence[str], names: Sequence[str]) -> None:
        """Raises ZooError when the encoder cannot take a recording of this rate and these channels."""
        self.encoder().check_recording(rate_hz, kinds, names)

    def check_positions(self, sensors: Sensors) -> None:
        """Raises ZooError when the encoder must know where these sensors are, and does not."""
        self.encoder().check_positions(sensors)


def both_ways(logits: Float[Array, "B B"], segment: Int[AnyArray, " B"] | None = None) -> Float[Array, ""]:
    """`clip_loss` in which rows of the same stimulus are no wrong answers to each other."""
    return 0.5 * (info_nce(logits, segment=segment) + info_nce(logits.T, segment=segment))


def _given(batch: Batch) -> tuple[Any, ...]:
    return batch["signal"], batch["sensors"], batch["target"]
