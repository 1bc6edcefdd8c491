"""Images from MEG: vectors of images found by contrast and predicted by regression at once.

    task = MEGImageDecoding(options={"samples": 181}, projection=(512,))

Source: Benchetrit et al., 2310.19812, §2.3 and equation 1: λ · CLIP + (1 − λ) · mean squared error, each on a
projection of its own of the encoder's pooled vector; CLIP both ways, of cosines times a learned factor. λ = .75 is from
a card, not checked against the paper. For retrieval the predictions of the contrast's projection are ranked by cosine
with a fixed bank (`zoo.evaluate.retrieval`); test images that were shown several times are to be reported apart, single
trials and averages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from zoo.encoders.encoder import Encoder
from zoo.errors import ZooError
from zoo.layers.parameters import norm, partitioned, torch_linear
from zoo.objectives.contrast import MAX_SCALE, retrieval, similarities
from zoo.objectives.stimulus import StimulusTask, both_ways
from zoo.types import AnyArray, Array, Sensors, Variables


@dataclass(frozen=True)
class MEGImageDecoding(StimulusTask):
    """The task; targets are vectors of images [B, F], such as DINOv2's or CLIP's.

    Attributes:
        projection: widths between the pooled vector and the prediction; none: a linear map, as in neuroai's benchmark
        contrast: λ, the share of the contrast in the loss
        temperature: 1 / the factor of cosines at first
    """

    model: str = "meg_image_tiny"
    projection: tuple[int, ...] = ()
    contrast: float = 0.75
    temperature: float = 0.07

    def module(self, target: AnyArray) -> MEGImageModel:
        """Raises ZooError for a share beyond 0 to 1."""
        if not 0 <= self.contrast <= 1:
            raise ZooError(f"task.contrast: got {self.contrast}, wanted 0 to 1")
        return MEGImageModel(self.encoder(), target.shape[-1], self.projection, self.contrast, self.temperature)

    def predict(self, variables: Variables, signal: AnyArray, sensors: Sensors, **more: Any) -> Mapping[str, Array]:
        """{"contrast", "regression"} → vectors [B, F]; `more` is the encoder's `subject`."""
        size = variables["params"]["regression"]["out"]["bias"].shape
        module: Any = self.module(jnp.zeros(size))
        return module.apply(variables, signal, sensors, **more, method="predict")


class MEGImageModel(nn.Module):
    """(loss; metrics: each term, retrieval among the batch, the factor)."""

    encoder: Encoder
    features: int
    projection: tuple[int, ...]
    share: float
    temperature: float

    def setup(self) -> None:
        self.contrast = Projection((*self.projection, self.features))
        self.regression = Projection((*self.projection, self.features))
        init = nn.initializers.constant(-math.log(self.temperature))
        self.log_scale = self.param("log_scale", partitioned(init), ())

    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        target: Float[AnyArray, "B F"],
        *,
        segment: Int[AnyArray, " B"] | None = None,
        subject: Int[AnyArray, " B"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, ""], Mapping[str, Array]]:
        target = jnp.asarray(target, jnp.float32)
        predicted = self.predict(signal, sensors, subject=subject, train=train)
        scale = jnp.minimum(jnp.exp(self.log_scale), MAX_SCALE)
        logits = scale * similarities(predicted["contrast"], target)
        error = jnp.mean(jnp.square(predicted["regression"] - target))
        contrast = both_ways(logits, segment)
        metrics = {
            "contrast": contrast,
            "regression": error,
            "image_retrieval": retrieval(logits),
            "scale": scale,
        }
        return self.share * contrast + (1 - self.share) * error, metrics

    def predict(
        self, signal: AnyArray, sensors: Sensors, *, subject: AnyArray | None = None, train: bool = False
    ) -> dict[str, Float[Array, "B F"]]:
        pooled = self.encoder(signal, sensors, subject=subject, train=train).pooled
        return {"contrast": self.contrast(pooled), "regression": self.regression(pooled)}


class Projection(nn.Module):
    """Linear maps to these widths, a layer norm and GELU after each but the last."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B F"]:
        for n, width in enumerate(self.widths[:-1]):
            x = torch_linear(width, x.shape[-1], f"linear{n}")(x)
            x = norm("layer", epsilon=1e-5, axis=None, name=f"norm{n}")(x)
            x = jax.nn.gelu(x, approximate=False)
        return torch_linear(self.widths[-1], x.shape[-1], "out")(x)


def growing(signal: Float[np.ndarray, "B C T"], ends: Int[np.ndarray, " W"]) -> Float[np.ndarray, "W B C T"]:
    """The same windows as they would look at each of these samples, silent from there on: [W, B, C, T].

    What a decoder that was trained on whole windows knows by then, as its retrieval of each shows; the paper trains one
    decoder a window. Raises ZooError for ends outside the window.
    """
    ends = np.asarray(ends)
    if ends.min() < 0 or ends.max() > signal.shape[-1]:
        raise ZooError(f"growing: got ends {ends.min()} to {ends.max()} of windows of {signal.shape[-1]} samples")
    return np.where(np.arange(signal.shape[-1]) < ends[:, None, None, None], signal, 0)
