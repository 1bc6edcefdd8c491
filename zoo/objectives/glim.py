"""GLIM: vectors of EEG that a frozen language model reads, drawn to those of the sentence that was read.

    task = ReadText("glim_base", language=frozen_decoder)
    task.generate(variables, batch, length=64)        # ids [B, 64], from EEG alone

Source: Liu et al., 2025, and facts of the authors' code (github.com/justin-xzliu/GLIM, CC BY-NC-SA). The published
language model is Flan-T5-large, frozen: its encoder's states are part of a batch, and its decoder is the callable
`language(states [B, N, E], ids [B, L]) → logits [B, L, V]`, where logits at l predict ids at l from those before it.

A batch has "text" [B, M, E], the states of the sentence as it was read, "text_valid" [B, M], and "target" [B, P, L],
ids of its paraphrases (P = 8), −1 where they have ended; one of them is drawn for each example and step of training.
Optional: "prompt" [B, 3].

Where this differs from the authors' code: the temperature of the contrast is an option; theirs is 1, at which cosines
can hardly tell more than a few rows apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key

from zoo.encoders.glim import GLIM, attention_keys
from zoo.errors import ZooError
from zoo.layers.multi_head import MultiHead
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias, partitioned
from zoo.objectives.contrast import clip_loss, retrieval, similarities
from zoo.objectives.signal import mean_square
from zoo.registry import create
from zoo.types import AnyArray, Array, Batch, Sensors, Variables
from zoo.weights.keys import Key as WeightKey
from zoo.weights.keys import Rule

Language = Callable[[Array, Array], Array]


class Reader(nn.Module):
    """The encoder and the aligner: states for the language model, and a vector of the EEG and one of the text.

    width  E, the language model's features
    heads  of the two poolings, each a learned query over all states
    """

    encoder: GLIM
    width: int
    heads: int = 8

    def setup(self) -> None:
        bias = like_torch_bias(self.encoder.dim)
        self.project = dense(self.width, (None, "embed"), bias=True, init=LIKE_TORCH, bias_init=bias)
        init = partitioned(nn.initializers.normal(1.0), "embed")
        self.eeg_query = self.param("eeg_query", init, (self.width,))
        self.text_query = self.param("text_query", init, (self.width,))
        self.eeg_pool, self.text_pool = MultiHead(self.heads), MultiHead(self.heads)

    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        text: Float[AnyArray, "B M E"],
        text_valid: Bool[AnyArray, "B M"],
        prompt: Int[AnyArray, "B 3"],
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B N E"], Float[Array, "B E"], Float[Array, "B E"]]:
        """(states, vector of the EEG, vector of the text)."""
        states = self.project(self.encoder(signal, sensors, prompt=prompt, train=train).tokens)
        text = jnp.asarray(text, jnp.float32)
        eeg = self.eeg_pool(self._asked(self.eeg_query, states), states)[:, 0]
        return (
            states,
            eeg,
            self.text_pool(self._asked(self.text_query, text), text, valid=jnp.asarray(text_valid))[:, 0],
        )

    def _asked(self, query: Array, states: Array) -> Array:
        return jnp.broadcast_to(query, (len(states), 1, self.width))


@dataclass(frozen=True)
class ReadText:
    """The task. As published: Adam 1e-4, 8 × 72 examples a step.

    Attributes:
        model: registered encoder
        options: replacements for its options
        language: the frozen decoder
        contrast: weight of the contrast; the language model's loss has 1 less it
        commitment: weight of the square distance of states and the text's states, which must then be as many
        temperature: of the contrast
        heads: of the aligner's poolings
    """

    model: str = "glim_base"
    options: Mapping[str, Any] = field(default_factory=dict)
    language: Language | None = None
    contrast: float = 0.5
    commitment: float = 0.0
    temperature: float = 1.0
    heads: int = 8

    def encoder(self) -> GLIM:
        """The encoder alone. Its variables are `{"params": variables["params"]["encoder"]}`."""
        encoder = create(self.model, **self.options)
        if not isinstance(encoder, GLIM):
            raise ZooError(f"task.model: {self.model} is not GLIM, such as glim_base")
        return encoder

    def module(self, width: int) -> Reader:
        """Encoder and aligner for a language model of so many features."""
        return Reader(self.encoder(), width, self.heads)

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names."""
        return self.module(batch["text"].shape[-1]).init(key, *_given(batch))

    def loss(
        self, variables: Variables, batch: Batch, key: Key[Array, ""], train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """contrast · CLIP + (1 − contrast) · language + commitment · distance.

        The language model's loss is the mean over a paraphrase's ids of −log p; validation reads the first paraphrase.
        Metrics: each term, unweighed; retrieval, how often a row's text is the nearest of the batch; weight, examples.
        Raises ZooError without a language model.
        """
        if self.language is None:
            raise ZooError("task.language: reading needs a language model's decoder, (states, ids) → logits")
        keys = jax.random.split(key)
        states, eeg, text = self.read(variables, batch, keys[0], train)
        target, rows = jnp.asarray(batch["target"]), jnp.arange(len(eeg))
        drawn = jax.random.randint(keys[1], rows.shape, 0, target.shape[1]) if train else jnp.zeros_like(rows)
        ids = target[rows, drawn]
        logits = similarities(eeg, text) / self.temperature
        terms = {
            "contrast": clip_loss(logits),
            "language": language_loss(self.language(states, jnp.maximum(ids, 0)), ids),
        }
        value = self.contrast * terms["contrast"] + (1 - self.contrast) * terms["language"]
        if self.commitment:
            terms["commitment"] = mean_square(states, batch["text"])
            value += self.commitment * terms["commitment"]
        return value, {**terms, "retrieval": retrieval(logits), "weight": jnp.float32(len(eeg))}, {}

    def read(
        self, variables: Variables, batch: Batch, key: Key[Array, ""] | None = None, train: bool = False
    ) -> tuple[Float[Array, "B N E"], Float[Array, "B E"], Float[Array, "B E"]]:
        """(states, vector of the EEG, vector of the text) of a batch: for retrieval among any candidates."""
        found: Any = self.module(batch["text"].shape[-1]).apply(
            {"params": variables["params"]},
            *_given(batch),
            train=train,
            rngs={} if key is None else {"dropout": key},
        )
        return found

    def generate(self, variables: Variables, batch: Batch, length: int) -> Int[Array, "B L"]:
        """The likeliest id after those before it, `length` times, from EEG alone. Raises ZooError as `loss` does."""
        if self.language is None:
            raise ZooError("task.language: reading needs a language model's decoder, (states, ids) → logits")
        language, states = self.language, self.read(variables, batch)[0]

        def one_more(ids: Array, place: Array) -> tuple[Array, None]:
            likeliest = jnp.argmax(language(states, ids)[:, place], axis=-1)
            return ids.at[:, place].set(likeliest.astype(ids.dtype)), None

        return jax.lax.scan(one_more, jnp.zeros((len(states), length), jnp.int32), jnp.arange(length))[0]

    def flops(self, batch: Batch) -> float:
        """Operations of the encoder and of the projection over `batch`; the language model's are not counted."""
        encoder, (examples, channels, samples) = self.encoder(), batch["signal"].shape
        projection = 2.0 * encoder.queries * encoder.dim * batch["text"].shape[-1]
        return examples * (encoder.flops(channels, samples) + projection)

    def check_recording(self, rate_hz: float, kinds: Sequence[str], names: Sequence[str]) -> None:
        """Raises ZooError when the encoder cannot take a recording of this rate and these channels."""
        self.encoder().check_recording(rate_hz, kinds, names)


def language_loss(logits: Float[Array, "B L V"], ids: Int[Array, "B L"]) -> Float[Array, ""]:
    """Mean of −log p over the ids of all examples; −1 is none."""
    there = ids >= 0
    each = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), jnp.maximum(ids, 0)[..., None], -1)
    return -jnp.sum(each[..., 0], where=there) / jnp.maximum(there.sum(), 1)


def noise_for(key: Key[Array, ""], batch: Batch) -> Batch:
    """The batch with noise in place of EEG, of the whole batch's mean and deviation in every channel of every example:
    what is still read of it, the language model made up."""
    signal = jnp.asarray(batch["signal"], jnp.float32)
    return {**batch, "signal": signal.mean() + signal.std() * jax.random.normal(key, signal.shape)}


def _given(batch: Batch) -> tuple[Any, ...]:
    for name in ("text", "text_valid", "target"):
        if name not in batch:
            raise ZooError(f"GLIM reads text: the task needs batches with {name!r}")
    prompt = batch.get("prompt", jnp.zeros((len(batch["signal"]), 3), jnp.int32))
    return batch["signal"], batch["sensors"], batch["text"], batch["text_valid"], prompt


ALIGNER_KEYS: tuple[Rule, ...] = (
    WeightKey("aligner.in_proj.weight", "params/project/kernel", "o i -> i o"),
    WeightKey("aligner.in_proj.bias", "params/project/bias"),
    WeightKey("aligner.q_x", "params/eeg_query", "1 1 d -> d"),
    WeightKey("aligner.q_y", "params/text_query", "1 1 d -> d"),
    *attention_keys("aligner.cross_attn_x", "eeg_pool"),
    *attention_keys("aligner.cross_attn_y", "text_pool"),
)
"""The official aligner; beside it `below(KEYS, "encoder")` of `zoo.encoders.glim`."""
