"""EEGPT's pretraining: what a slow average of the encoder says of every patch, and the samples that were hidden.

Source: Wang et al., "EEGPT", NeurIPS 2024, section 2.2 and equations 4 to 8, and the official code
(github.com/BINE022/EEGPT, Apache-2.0).

Of each window half of the patches of time are hidden whole; of the others a few channels stay. The encoder reads what
stays. A predictor, a transformer over the summaries of all patches in time with mask tokens for those hidden, says what
the average of the encoder makes of the whole window (alignment). A reconstructor, a transformer over the encoder's
summaries where there are any, else the predictor's, and one question a hidden patch of a channel, gives its samples
(reconstruction): of patches hidden whole all channels are asked for, of the others a fifth of those left out. Targets
of both are layer-normalised, and the two mean squared errors are added.

Where this differs from the official code: masks are drawn for each window, not once for a batch. Questions that are not
asked are in the sequence, but seen by none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from zoo.encoders.biot import channel_table
from zoo.encoders.eegpt import CHANNELS, EEGPT, TABLE_STD, encoder_keys
from zoo.encoders.labram import block_keys, linear_keys, norm_keys
from zoo.errors import ZooError
from zoo.layers.parameters import dense, norm, partitioned
from zoo.layers.patch_transformer import WEIGHT_INIT, Stack
from zoo.layers.spectra import frames
from zoo.objectives.jepa import first_target, layer_normalised, next_target
from zoo.registry import create, entry
from zoo.types import AnyArray, Array, Batch, Encoded, Sensors, Variables
from zoo.weights.keys import Fresh, Ignore, Key, Rule, below

INTERPOLATION = 2.0
"""Patches a step of the rotary positions."""


@dataclass(frozen=True)
class AlignAndReconstruct:
    """The task. A frozen dataclass: it is its own configuration.

    Attributes:
        model: a registered EEGPT
        options: replacements for its options
        dtype: compute dtype; parameters and statistics stay float32
        remat: what the encoder recomputes in the backward pass: none, full or dots
        predictor_depth: layers of the predictor; published 2, 6 or 8 as the encoder's
        reconstructor_depth: layers of the reconstructor; published as the encoder's, 4 for tiny1 and tiny2
        steps: of the run, over which the average slows down; as `train.steps`
        momentum: of the average, at first and at the end
        hidden: share of patches of time that are hidden whole
        visible: channels that stay of the others
        asked: share of the channels left out of these whose samples are asked for
    """

    model: str = "eegpt_tiny"
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    remat: str = "none"
    predictor_depth: int = 2
    reconstructor_depth: int = 4
    steps: int = 1000
    momentum: tuple[float, float] = (0.996, 1.0)
    hidden: float = 0.5
    visible: int = 12
    asked: float = 0.2

    def encoder(self) -> EEGPT:
        """The encoder alone. Its variables are `{"params": variables["params"]["encoder"]}`.

        Raises ZooError for a model that is no EEGPT.
        """
        if entry(self.model).constructor is not EEGPT:
            raise ZooError(f"task.model: {self.model} has no summaries, wanted an EEGPT, such as eegpt_tiny")
        given = {"dtype": jnp.dtype(self.dtype), "remat": self.remat, "visible": self.visible, **self.options}
        encoder: Any = create(self.model, **given)
        return encoder

    def module(self) -> Dual:
        """Encoder, predictor and reconstructor."""
        return Dual(self.encoder(), self.predictor_depth, self.reconstructor_depth)

    def init(self, key: Array, batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names. The average begins as the encoder."""
        kept, asked = self.masks(jax.random.key(0), batch)
        params = self.module().init(key, batch["signal"], batch["sensors"], kept, asked)["params"]
        return {"params": params, "target": first_target(params["encoder"])}

    def loss(
        self, variables: Variables, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """Alignment and reconstruction, means over windows that have channels; metrics: both, and how many windows."""
        masks, dropout = jax.random.split(key)
        kept, asked = self.masks(masks, batch)
        return self.loss_of(variables, batch, kept, asked, dropout, train)

    def loss_of(
        self,
        variables: Variables,
        batch: Batch,
        kept: Bool[AnyArray, "B C A"],
        asked: Bool[AnyArray, "B C A"],
        key: Array,
        train: bool,
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """The same for given masks: what the encoder reads, and what the reconstructor is asked for."""
        signal, sensors = batch["signal"], batch["sensors"]
        out: Any = self.module().apply(
            {"params": variables["params"]}, signal, sensors, kept, asked, train=train, rngs={"dropout": key}
        )
        encoder = self.encoder()
        average = jax.lax.stop_gradient(variables["target"]["params"])
        whole: Any = encoder.apply({"params": average}, signal, sensors)
        wanted = jax.lax.stop_gradient(layer_normalised(whole.tokens))
        samples = layer_normalised(frames(jnp.asarray(signal, jnp.float32), encoder.patch, encoder.stride))

        there = jnp.asarray(sensors.valid).any(1)
        aligned = jnp.square(out["predicted"] - wanted).mean((1, 2))
        errors = jnp.square(out["samples"] - samples).mean(-1)
        rebuilt = jnp.sum(errors, axis=(1, 2), where=asked) / jnp.maximum(jnp.sum(asked, axis=(1, 2)), 1)
        weight = there.sum()

        def mean(each: Array) -> Array:
            return jnp.sum(each, where=there) / jnp.maximum(weight, 1)

        metrics = {"alignment": mean(aligned), "reconstruction": mean(rebuilt), "weight": weight.astype(jnp.float32)}
        value = metrics["alignment"] + metrics["reconstruction"]
        if not train:
            return value, metrics, {}
        new = next_target(variables["target"], variables["params"]["encoder"], self.steps, *self.momentum)
        return value, metrics, {"target": new}

    def masks(self, key: Array, batch: Batch) -> tuple[Bool[Array, "B C A"], Bool[Array, "B C A"]]:
        """Which patches of channels the encoder reads, and which the reconstructor is asked for.

        At least one patch of time of each window is not hidden. Channels that are not valid are neither.
        """
        valid = jnp.asarray(batch["sensors"].valid)[:, :, None]
        examples, channels, samples = batch["signal"].shape
        encoder = self.encoder()
        count = (samples - encoder.patch) // encoder.stride + 1
        of_patch, of_channel, of_question = jax.random.split(key, 3)
        draw = jax.random.uniform(of_patch, (examples, 1, count))
        shown = (draw >= self.hidden) | (draw == draw.max(-1, keepdims=True))
        # Channels that are not valid come last.
        order = jax.random.uniform(of_channel, (examples, channels, count)) + 2.0 * ~valid
        rank = jnp.argsort(jnp.argsort(order, axis=1), axis=1)
        kept = shown & valid & (rank < self.visible)
        question = jax.random.uniform(of_question, (examples, channels, count)) < self.asked
        return kept, valid & ~kept & (~shown | question)

    def flops(self, batch: Batch) -> float:
        """Operations of one forward pass over `batch`: encoder, predictor, reconstructor, and a third of the average's,
        which has no backward pass."""
        examples, channels, samples = batch["signal"].shape
        encoder = self.encoder()
        count, dim = (samples - encoder.patch) // encoder.stride + 1, encoder.dim
        summaries = count * encoder.summaries
        read = encoder.flops(min(channels, self.visible), samples)
        predictor = Stack(self.predictor_depth, encoder.heads).flops(summaries, dim)
        reconstructor = Stack(self.reconstructor_depth, encoder.heads).flops(summaries + count * channels, dim)
        return examples * (read + predictor + reconstructor + encoder.flops(channels, samples) / 3)

    def check_recording(self, rate_hz: float, kinds: Sequence[str], names: Sequence[str]) -> None:
        """Raises ZooError when a recording is not the encoder's."""
        self.encoder().check_recording(rate_hz, kinds, names)


class Dual(nn.Module):
    """Encoder, predictor and reconstructor: predicted summaries [B, A·S, D] and samples [B, C, A, P]."""

    encoder: EEGPT
    predictor_depth: int
    reconstructor_depth: int

    @nn.compact
    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        kept: Bool[AnyArray, "B C A"],
        asked: Bool[AnyArray, "B C A"],
        *,
        train: bool = False,
    ) -> dict[str, Float[Array, "*shape"]]:
        encoder = self.encoder
        encoded: Encoded = encoder(signal, sensors, mask=~jnp.asarray(kept), train=train)
        read = jnp.repeat(jnp.asarray(kept).any(1), encoder.summaries, axis=1)
        predicted = Predictor(self.predictor_depth, encoder.heads, encoder.summaries, encoder.dtype, name="predictor")(
            encoded.tokens, read
        )
        known = jnp.where(read[..., None], encoded.tokens, predicted)
        samples = Reconstructor(self.reconstructor_depth, encoder.heads, encoder.patch, encoder.dtype, name="rebuild")(
            known, sensors, jnp.asarray(asked)
        )
        return {"predicted": predicted, "samples": samples}


class Predictor(nn.Module):
    """Summaries [B, A·S, D], mask tokens in place of those not `read`, → what is predicted of all of them."""

    depth: int
    heads: int
    summaries: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens: Float[Array, "B N D"], read: Bool[Array, "B N"]) -> Float[Array, "B N D"]:
        batch, length, dim = tokens.shape
        token = self.param("embed_mask", partitioned(WEIGHT_INIT, None, "embed"), (self.summaries, dim))
        x = _linear(dim, self.dtype, "embed")(tokens)
        x = jnp.where(read[..., None], x, jnp.tile(token, (length // self.summaries, 1)).astype(x.dtype))
        patch = tuple(each // self.summaries for each in range(length))
        x = _stack(self.depth, self.heads, patch, self.dtype)(x, jnp.ones((batch, length), bool))
        x = norm("layer", dtype=self.dtype, name="norm")(x)
        return _linear(dim, self.dtype, "out")(x).astype(jnp.float32)


class Reconstructor(nn.Module):
    """Summaries [B, A·S, D] and questions `asked` → samples [B, C, A, P], of no meaning where nothing was asked."""

    depth: int
    heads: int
    patch: int
    dtype: Any

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "B N D"], sensors: Sensors, asked: Bool[Array, "B C A"]
    ) -> Float[Array, "B C A P"]:
        batch, length, dim = tokens.shape
        _, channels, count = asked.shape
        token = self.param("embed_mask", partitioned(WEIGHT_INIT, "embed"), (dim,))
        place = channel_table(self, sensors, CHANNELS, dim, TABLE_STD)
        questions = jnp.broadcast_to((token + place)[:, None], (batch, count, channels, dim))
        x = _linear(dim, self.dtype, "embed")(tokens)
        x = jnp.concatenate([x, questions.reshape(batch, -1, dim).astype(x.dtype)], axis=1)
        seen = jnp.concatenate([jnp.ones((batch, length), bool), asked.swapaxes(1, 2).reshape(batch, -1)], axis=1)
        patch = (*(each // (length // count) for each in range(length)), *np.repeat(range(count), channels).tolist())
        x = _stack(self.depth, self.heads, patch, self.dtype)(x, seen)[:, length:]
        x = norm("layer", dtype=self.dtype, name="norm")(x)
        samples = _linear(self.patch, self.dtype, "out")(x).astype(jnp.float32)
        return samples.reshape(batch, count, channels, self.patch).swapaxes(1, 2)


@dataclass(frozen=True)
class Turn:
    """Rotary positions of patches: neighbouring features of the first half of a head turn together (2104.09864).

    patch: of each token; half of it is its position.
    """

    patch: tuple[int, ...]

    def __call__(self, x: Float[Array, "B N H K"]) -> Float[Array, "B N H K"]:
        half = x.shape[-1] // 2
        rate = 10_000.0 ** (-np.arange(0, half, 2) / half)
        angle = np.asarray(self.patch)[:, None, None] / INTERPOLATION * rate
        cos, sin = (each.astype(np.float32) for each in (np.cos(angle), np.sin(angle)))
        even, odd = x[..., 0:half:2].astype(jnp.float32), x[..., 1:half:2].astype(jnp.float32)
        turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
        return jnp.concatenate([turned.reshape(*x.shape[:-1], half).astype(x.dtype), x[..., half:]], axis=-1)


def _stack(depth: int, heads: int, patch: tuple[int, ...], dtype: Any) -> Stack:
    return Stack(
        depth, heads, qkv_bias=True, key_bias=True, qk_norm=False, turn=Turn(patch), dtype=dtype, name="layers"
    )


def _linear(features: int, dtype: Any, name: str) -> nn.Dense:
    return dense(features, (None, None), bias=True, init=WEIGHT_INIT, dtype=dtype, name=name)


def _part_keys(part: str, ours: str, token: Key, *more: Rule) -> tuple[Rule, ...]:
    """The keys of the predictor or the reconstructor."""
    blocks = (
        replace(key, source=f"{part}_{key.source}")
        for key in block_keys(biases="fused", qk_norm=False, layer_scale=False)
    )
    keys = (
        token,
        *linear_keys(f"{part}_embed", "embed"),
        *below(blocks, "layers"),
        *norm_keys(f"{part}_norm", "norm"),
        *linear_keys(f"{part}_proj", "out"),
        Ignore("time_embed.freqs", "frequencies, computed here"),
        *more,
    )
    return below(keys, ours, f"{part}.")


KEYS: tuple[Rule, ...] = (
    *below(encoder_keys("encoder."), "encoder"),
    *(replace(key, target=f"target/{key.target}") for key in encoder_keys("target_encoder.") if isinstance(key, Key)),
    Fresh("target/step", "no file says how long it was trained"),
    *_part_keys("predictor", "predictor", Key("mask_token", "params/embed_mask", "1 1 s d -> s d")),
    *_part_keys(
        "reconstructor",
        "rebuild",
        Key("mask_token", "params/embed_mask", "1 1 d -> d"),
        Key("chan_embed.weight", "params/embed_channel"),
    ),
)
"""Of the official checkpoint, whole."""
