"""Masked-code prediction: hide tokens, predict the codes that a trained tokenizer gives them.

LaBraM's pretraining (ICLR 2024, §2.3) with any tokenizer. The encoder reads either
- the signal, with patches hidden (model="labram_base"): tokenizer and encoder must cut it alike, a token a channel and
  patch; the targets are codes of the signal as it is, hidden patches too; or
- the codes (model="codes_tiny"), with codes hidden: any tokenizer. So TFM (2502.16060) and BERT pretrain.

Masking is symmetric unless switched off: the encoder is run with the mask and with its complement, and both losses are
added (LaBraM, equation 8), so at first the loss is about 2 ln K.

Where this differs from the published code: the loss is a mean over hidden tokens of the whole batch, also where
examples hide unequal numbers of them; codes that are not there (−1: channels that are not valid, residual stages left
out) are not hidden and not predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from zoo.errors import ZooError
from zoo.objectives.over_codes import CodeTask, prediction_sums
from zoo.types import AnyArray, Array, Batch, Variables


@dataclass(frozen=True)
class MaskedCodes(CodeTask):
    """The task. A frozen dataclass: it is its own configuration.

    Attributes:
        ratio: share of an example's valid tokens that is hidden, where the batch brings no mask of its own
        symmetric: hide the complement, too
    """

    ratio: float = 0.5
    symmetric: bool = True

    def init(self, key: Array, batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names.

        Raises ZooError where tokenizer and encoder do not cut a signal alike.
        """
        self._check(batch)
        kept = self.kept()
        codes, rows = self.tokenised(kept, batch)
        given, options = self._given(batch, codes, rows, codes[..., 0] >= 0)
        return {**self.module().init(key, *given, **options), **kept}

    def loss(
        self, variables: Variables, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """Cross-entropy in nats, a mean over hidden tokens and codebooks, of the mask and of its complement together.

        Metrics: cross_entropy (the mean of both); of_uniform, it as a share of ln K; accuracy; weight, the tokens that
        the mask hides.
        """
        sizes = self.frozen[0].code_sizes
        codes, rows = self.tokenised(variables, batch)
        drawing, *dropouts = jax.random.split(key, 3)
        there = (codes >= 0).any(-1)
        mask = self._mask(batch, there, drawing)
        sides = (mask, there & ~mask) if self.symmetric else (mask,)
        found = []
        for side, dropout in zip(sides, dropouts, strict=False):
            given, options = self._given(batch, codes, rows, side)
            guessed: Any = self.module().apply(
                variables,
                *given,
                **options,
                wanted=codes,
                train=train,
                rngs={"dropout": dropout, "noise": dropout},
                method="guesses",
            )
            nats, right, count = prediction_sums(guessed[0], guessed[1], codes, side)
            total = jnp.maximum(count.sum(), 1)
            uniform = nats / jnp.log(jnp.maximum(jnp.asarray(sizes, jnp.float32), 2))
            found.append([figure.sum() / total for figure in (nats, right, uniform)])
        losses, accuracy, of_uniform = (jnp.stack(each) for each in zip(*found, strict=True))
        metrics = {
            "cross_entropy": losses.mean(),
            "of_uniform": of_uniform.mean(),
            "accuracy": accuracy.mean(),
            "weight": mask.sum().astype(jnp.float32),
        }
        return losses.sum(), metrics, {}

    def flops(self, batch: Batch) -> float:
        """Operations of one forward pass over `batch`, in which encoder and head run once for each side of the mask."""
        return self.tokenizer_flops(batch) + (2 if self.symmetric else 1) * self.model_flops(batch)

    def _given(self, batch: Batch, codes: Array, rows: int, mask: Array) -> tuple[tuple[Any, Any], dict[str, Any]]:
        """What the encoder is called with."""
        if self.reads_codes:
            return (codes, batch["sensors"]), {"rows": rows, "mask": mask}
        more = {"mask": mask.reshape(len(mask), rows, -1)}
        if getattr(self.reader(), "subjects", 0):
            if "subject" not in batch:
                raise ZooError(f"task: {self.model} wants whose each example is, got batches without 'subject'")
            more["subject"] = jnp.asarray(batch["subject"])
        return (batch["signal"], batch["sensors"]), more

    def _mask(self, batch: Batch, there: Bool[Array, "B N"], key: Array) -> Bool[Array, "B N"]:
        """The batch's own mask, of patches that are the tokens, or one drawn, on tokens that are there."""
        if "mask" not in batch:
            return random_mask(key, there, self.ratio)
        mask = jnp.asarray(batch["mask"])
        rows, frames = self.grid(*batch["signal"].shape[1:])
        if mask.shape[1:] != (rows, frames):
            raise ZooError(
                f"task: got a mask of {mask.shape[1:]} patches, wanted the tokenizer's {(rows, frames)} tokens: set "
                "data.mask_patch to its hop, or to 0"
            )
        return mask.reshape(there.shape) & there

    def _check(self, batch: Batch) -> None:
        encoder = self.reader()
        if not 0 < self.ratio < 1:
            raise ZooError(f"task.ratio: got {self.ratio}, wanted between 0 and 1")
        if self.reads_codes:
            if encoder.causal:
                raise ZooError(f"task.model: {self.model} is causal: hidden codes want an encoder that looks both ways")
            return
        channels, samples = batch["signal"].shape[1:]
        rows, frames = self.grid(channels, samples)
        own = encoder.grid(channels, samples) if hasattr(encoder, "grid") else self._patches(channels, samples)
        if own != (rows, frames):
            raise ZooError(
                f"task: of {channels} channels of {samples} samples the tokenizer makes {rows} rows of {frames} tokens "
                f"and {self.model} {own[0]} of {own[1]}: wanted the same grid; codes_tiny reads any tokenizer's codes"
            )

    def _patches(self, channels: int, samples: int) -> tuple[int, int]:
        """The grid of an encoder that cuts each channel into patches."""
        patch = getattr(self.reader(), "patch", 0)
        return channels, samples // patch if patch and samples % patch == 0 else 0


def random_mask(key: Array, there: Bool[AnyArray, "B N"], ratio: float) -> Bool[Array, "B N"]:
    """True at exactly round(ratio · count) of the tokens of each example that are there."""
    there = jnp.asarray(there)
    noise = jnp.where(there, jax.random.uniform(key, there.shape), 2.0)
    rank: Int[Array, "B N"] = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1)
    return rank < jnp.round(ratio * there.sum(-1, keepdims=True)).astype(int)
