"""Training a tokenizer on its own published loss, with the health of its codebooks beside it.

    task = TrainTokenizer("labram_vqnsp_tiny", options={"codes": 512}, weights={"commitment": 2.0})

The loss is the weighed sum of the terms that the tokenizer computes (`Tokenized.losses`, `Tokenizer.loss_weights`).
Codebooks that follow statistics are mutable collections: every micro-batch of a step updates them, so with
`train.accumulate` n their averages move n times a step. They follow the parameters of the last step, not an average of
them: `train.ema` must be 0.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from zoo.errors import ZooError
from zoo.registry import create
from zoo.tokenizers.tokenizer import Tokenizer
from zoo.types import AnyArray, Array, Batch, Sensors, Tokenized, Variables

STREAMS = ("codes", "dropout", "noise")
"""What a tokenizer draws from in training."""


@dataclass(frozen=True)
class TrainTokenizer:
    """The task. A frozen dataclass: it is its own configuration.

    Attributes:
        tokenizer: registered tokenizer
        options: replacements for its options
        weights: replacements for the published weights of its losses, by name
        dtype: compute dtype of a tokenizer that has the option; parameters and statistics stay float32
    """

    tokenizer: str = "labram_vqnsp_tiny"
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    dtype: str = "float32"

    def module(self) -> Tokenizer:
        """The tokenizer. Its variables are the task's, whole.

        Raises ZooError for a model that is not a tokenizer, and for a weight of a loss that it does not have.
        """
        computed = {} if self.dtype == "float32" else {"dtype": jnp.dtype(self.dtype)}
        tokenizer = create(self.tokenizer, **{**computed, **self.options})
        if not isinstance(tokenizer, Tokenizer):
            raise ZooError(f"task.tokenizer: {self.tokenizer} is not a tokenizer, such as labram_vqnsp_tiny")
        for name in self.weights:
            if name not in tokenizer.loss_weights:
                near = difflib.get_close_matches(name, tokenizer.loss_weights, n=1, cutoff=0.0)[0]
                raise ZooError(f"task.weights: {self.tokenizer} has no loss {name!r}; the nearest is {near!r}")
        return tokenizer

    def init(self, key: Array, batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names.

        Raises ZooError for a tokenizer without parameters, and for windows that it cannot cut into frames.
        """
        tokenizer = self.module()
        tokenizer.grid(*batch["signal"].shape[1:])
        keys = dict(zip(("params", *STREAMS), jax.random.split(key, 4), strict=True))
        variables = tokenizer.init(keys, batch["signal"], batch["sensors"])
        if not jax.tree.leaves(variables.get("params", {})):
            raise ZooError(
                f"task.tokenizer: {self.tokenizer} has nothing to train; "
                f"`zoo tokenize DATASET --tokenizer {self.tokenizer} OUT` fits it"
            )
        return variables

    def loss(
        self, variables: Variables, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """The weighed sum of the tokenizer's terms over a batch, and its collections as they are after it.

        Metrics: each term, unweighed; perplexity and live_share, see `code_health`; r2, see `r_squared`; weight, the
        number of valid tokens, over which the terms are means.
        """
        tokenizer, collections = self.module(), [name for name in variables if name != "params"]
        given = batch["signal"], batch["sensors"]
        new: Variables = {}
        if train:
            rngs = dict(zip(STREAMS, jax.random.split(key, len(STREAMS)), strict=True))
            out, new = tokenizer.apply(variables, *given, train=True, mutable=collections, rngs=rngs)
        else:
            out = tokenizer.apply(variables, *given)
        assert isinstance(out, Tokenized)
        weights = {**tokenizer.loss_weights, **self.weights}
        value = sum((weight * out.losses[name] for name, weight in weights.items()), jnp.zeros(()))
        perplexity, live_share = code_health(out.codes, tokenizer.code_sizes)
        metrics = {
            **out.losses,
            "perplexity": perplexity,
            "live_share": live_share,
            "r2": r_squared(batch["signal"], out.reconstruction, batch["sensors"].valid),
            "weight": out.valid.sum().astype(jnp.float32),
        }
        return value, metrics, new

    def reconstruct(self, variables: Variables, batch: Batch) -> Array:
        """The batch's signal [B, C, T] after encoding and decoding."""
        out = self.module().apply(variables, batch["signal"], batch["sensors"])
        assert isinstance(out, Tokenized)
        return out.reconstruction

    def flops(self, batch: Batch) -> float:
        """Operations of one forward pass over `batch`."""
        examples, channels, samples = batch["signal"].shape
        return examples * self.module().flops(channels, samples)

    def check_recording(self, rate_hz: float, kinds: Sequence[str], names: Sequence[str]) -> None:
        """Raises ZooError when the tokenizer cannot take a recording of this rate and these channels."""
        self.module().check_recording(rate_hz, kinds, names)

    def check_positions(self, sensors: Sensors) -> None:
        """Raises ZooError when the tokenizer must know where these sensors are, and does not."""
        self.module().check_positions(sensors)


def code_health(codes: Int[AnyArray, "B N Q"], sizes: Sequence[int]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(perplexity, live share) of the codes of a batch, −1 not counted.

    Perplexity is 2 to the entropy of a codebook's use, the mean over codebooks: how many codes it is as good as. The
    live share is that of all codes of all codebooks that are used at all, which few tokens keep below 1.
    """
    book = jnp.repeat(jnp.arange(len(sizes)), jnp.asarray(sizes), total_repeat_length=sum(sizes))
    first = jnp.cumsum(jnp.asarray(sizes)) - jnp.asarray(sizes)
    used = jnp.asarray(codes) >= 0
    counts = jnp.zeros(sum(sizes)).at[jnp.where(used, codes + first, 0)].add(used.astype(jnp.float32))
    share = counts / jnp.maximum(used.sum((0, 1)), 1)[book]
    nats = -jax.ops.segment_sum(share * jnp.log(jnp.maximum(share, 1e-30)), book, len(sizes))
    return jnp.exp(nats).mean(), (counts > 0).mean()


def r_squared(
    signal: Float[AnyArray, "B C T"], reconstruction: Float[AnyArray, "B C T"], valid: Bool[AnyArray, "B C"]
) -> Float[Array, ""]:
    """Share of the variance of the valid channels, each about its mean in the window, that is in the reconstruction."""
    where = jnp.asarray(valid)[:, :, None]
    error = jnp.sum(jnp.square(signal - reconstruction), where=where)
    about = jnp.square(signal - signal.mean(-1, keepdims=True))
    return 1.0 - error / jnp.maximum(jnp.sum(about, where=where), 1e-30)
