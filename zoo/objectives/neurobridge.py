"""NeuroBridge: images from EEG, both brought into one space by a linear map of their own each.

    signal = smoothed_once(signal, seed=2025)                    # asymmetric augmentation, before training
    task = NeuroBridgeDecoding("neurobridge_intra")              # targets: copies of each image's vector [B, M, F]
    known = ~held_out(concept, share=0.1)                        # train on these, choose the epoch by the others

Source: NeuroBridge, 2511.06836, and facts of its authors' code. Logits are 1/.07, fixed, times the product of the EEG's
vector, of any length, with the image's, of length one; cross-entropy both ways. Retrieval is by cosine
(`zoo.evaluate.retrieval`). An image's vector is the mean over augmented copies of the image (blur, noise, low
resolution, mosaic), in test as in training; of the EEG a share of the channels is smoothed, drawn once.

Where this differs from the authors' code: that chooses the epoch by the loss on the test set; `held_out` sets training
concepts aside for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import Encoder
from zoo.errors import ZooError
from zoo.layers.parameters import torch_linear
from zoo.layers.quantizers import unit
from zoo.objectives.contrast import retrieval, similarities
from zoo.objectives.stimulus import StimulusTask, both_ways
from zoo.types import AnyArray, Array, Sensors, Variables


@dataclass(frozen=True)
class NeuroBridgeDecoding(StimulusTask):
    """The task; targets are vectors of images [B, F], or of M copies of each [B, M, F].

    Attributes:
        width: features of the space that both are brought into
        temperature: 1 / the factor of similarities, which is not learned
    """

    model: str = "neurobridge_intra_tiny"
    width: int = 512
    temperature: float = 0.07

    def module(self, target: Any) -> NeuroBridgeModel:
        return NeuroBridgeModel(self.encoder(), self.width, self.temperature)

    def of_signals(self, variables: Variables, signal: AnyArray, sensors: Sensors) -> Float[Array, "B W"]:
        """Where signals lie in the space of both."""
        module: Any = self.module(None)
        return module.apply(variables, signal, sensors, method="of_signals")

    def of_images(
        self, variables: Variables, target: Float[AnyArray, "B F"] | Float[AnyArray, "B M F"]
    ) -> Float[Array, "B W"]:
        """Where images lie in it."""
        module: Any = self.module(None)
        return module.apply(variables, target, method="of_images")


class NeuroBridgeModel(nn.Module):
    """(loss; metrics: retrieval of the image, by cosine, and of the signal among the batch)."""

    encoder: Encoder
    width: int
    temperature: float

    @nn.compact
    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        target: Float[AnyArray, "B F"] | Float[AnyArray, "B M F"],
        *,
        segment: Int[AnyArray, " B"] | None = None,
        subject: Int[AnyArray, " B"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, ""], Mapping[str, Array]]:
        ours, theirs = self.of_signals(signal, sensors, subject=subject, train=train), self.of_images(target)
        cosines = similarities(ours, theirs)
        metrics = {"image_retrieval": retrieval(cosines), "signal_retrieval": retrieval(cosines.T)}
        return both_ways(ours @ unit(theirs).T / self.temperature, segment), metrics

    @nn.compact
    def of_signals(
        self, signal: AnyArray, sensors: Sensors, *, subject: AnyArray | None = None, train: bool = False
    ) -> Float[Array, "B W"]:
        pooled = self.encoder(signal, sensors, subject=subject, train=train).pooled
        return torch_linear(self.width, pooled.shape[-1], "project_signal")(pooled)

    @nn.compact
    def of_images(self, target: Float[AnyArray, "B F"] | Float[AnyArray, "B M F"]) -> Float[Array, "B W"]:
        target = jnp.asarray(target, jnp.float32)
        mean = target.mean(1) if target.ndim == 3 else target
        return torch_linear(self.width, mean.shape[-1], "project_image")(mean)


def smoothed_once(
    signal: Float[np.ndarray, "B C T"], *, share: float = 0.3, width: int = 5, seed: int = 0
) -> Float[np.ndarray, "B C T"]:
    """Each channel of each example, with probability `share`, as its moving average over `width` samples.

    Fewer at both ends. width is odd, or ZooError.
    """
    if not width % 2:
        raise ZooError(f"smoothed_once width: got {width}, wanted an odd number")
    half, samples = width // 2, signal.shape[-1]
    sums = np.cumsum(np.pad(signal.astype(np.float64), ((0, 0), (0, 0), (1, 0))), axis=-1)
    first, last = np.maximum(np.arange(samples) - half, 0), np.minimum(np.arange(samples) + half + 1, samples)
    smooth = (sums[..., last] - sums[..., first]) / (last - first)
    chosen = np.random.default_rng(seed).random(signal.shape[:2]) < share
    return np.where(chosen[..., None], smooth, signal).astype(np.float32)


def held_out(concept: Int[np.ndarray, " B"], *, share: float = 0.1, seed: int = 0) -> Bool[np.ndarray, " B"]:
    """Examples of a share of the concepts, at least one, all of whose examples they are: what to choose settings by."""
    concepts = np.unique(concept)
    count = max(1, round(share * len(concepts)))
    return np.isin(concept, np.random.default_rng(seed).permutation(concepts)[:count])
