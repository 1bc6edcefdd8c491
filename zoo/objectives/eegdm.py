"""Denoising single channels of EEG: EEGDM's pretraining.

Source: "EEG Representation Learning via Generative Diffusion Model" (EEGDM), 2025: 50 steps of a squared cosine
(2102.09672), v as the target (2202.00512, §4), mean square error. The mu-law stages signals before noise is added.
Every channel of every example draws a step and noise of its own; published batches are single channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from zoo.encoders.eegdm import EEGDM, staged_mu_law
from zoo.errors import ZooError
from zoo.objectives.diffusion import linear, noised, squared_cosine, target
from zoo.registry import create
from zoo.types import Array, Batch, Variables

SCHEDULES = {"squared_cosine": squared_cosine, "linear": linear}


@dataclass(frozen=True)
class Denoise:
    """The task. A frozen dataclass: it is its own configuration.

    Attributes:
        model: registered encoder with a denoiser in it
        options: replacements for its options
        steps: of the schedule
        schedule: squared_cosine or linear
        predict: what is predicted: v, noise or clean
    """

    model: str = "eegdm_tiny"
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 50
    schedule: str = "squared_cosine"
    predict: str = "v"

    def encoder(self) -> EEGDM:
        """The encoder: its variables are `{"params": variables["params"]["encoder"]}`. Raises ZooError for another."""
        made = create(self.model, **self.options)
        if not isinstance(made, EEGDM):
            raise ZooError(f"task.model: {self.model} has no denoiser, such as eegdm_tiny")
        if self.schedule not in SCHEDULES:
            raise ZooError(f"task.schedule: got {self.schedule!r}, wanted one of {', '.join(SCHEDULES)}")
        return made

    def init(self, key: Array, batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names. What fuses latents does not learn."""
        made = self.encoder().init(key, batch["signal"], batch["sensors"])
        return {"params": {"encoder": made["params"]}}

    def loss(
        self, variables: Variables, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """Mean square error of the prediction, over the samples of valid channels.

        Metrics: error, the same as a share of the target's mean square, 1 for a prediction of zero; weight, channels.
        """
        encoder, schedule = self.encoder(), SCHEDULES[self.schedule](self.steps)
        there = jnp.asarray(batch["sensors"].valid)
        clean = staged_mu_law(encoder.present(batch["signal"], batch["sensors"]))
        of_step, of_noise = jax.random.split(key)
        step = jax.random.randint(of_step, clean.shape[:2], 0, self.steps)
        noise = jax.random.normal(of_noise, clean.shape)
        flat = clean.reshape(-1, clean.shape[-1]), step.ravel(), noise.reshape(-1, clean.shape[-1])
        noisy, wanted = noised(schedule, *flat), target(schedule, self.predict, *flat)
        params = {"params": variables["params"]["encoder"]}
        found, _ = encoder.apply(params, noisy.reshape(clean.shape), step, method="denoise")
        wanted = wanted.reshape(clean.shape)
        weight = there.sum().astype(jnp.float32)

        def mean(square: Array) -> Array:
            return jnp.sum(square.mean(-1), where=there) / jnp.maximum(weight, 1)

        value = mean(jnp.square(found - wanted))
        share = value / jnp.maximum(mean(jnp.square(wanted)), 1e-12)
        return value, {"error": share, "weight": weight}, {}

    def flops(self, batch: Batch) -> float:
        """Operations of one forward pass of the denoiser over `batch`."""
        examples, channels, samples = batch["signal"].shape
        encoder = self.encoder()
        block = samples * 4 * encoder.dim**2 + encoder.condition * encoder.dim
        return 2.0 * examples * channels * encoder.depth * block

    def check_recording(self, rate_hz: float, kinds: Sequence[str], names: Sequence[str]) -> None:
        """Raises ZooError when the encoder cannot take a recording of this rate and these channels."""
        self.encoder().check_recording(rate_hz, kinds, names)
