"""Next-code prediction: every row of a tokenizer's grid as a sequence, all codes of its next frame guessed at once.

MEG-GPT (2510.18080): a causal model along time, each channel by itself, one embedding of the channel; with several
codebooks the Q codes of a frame are read together and predicted side by side, each from the frames before. The first
frame of a window is only read.

    task = NextCode("runs/tokenizer")
    codes = task.generate(variables, key, sensors, frames=200)
    signal = tokenizer.apply(tokenizer_variables, codes, sensors, method="decode")

Where this differs from MEG-GPT: its keys and values of several steps are mixed to patches in deeper layers; here the
mixers are any causal ones, by default attention to the last 128 frames with rotary positions in place of a table, so
that generation may be longer than a window. Its labels of sessions are left out.

Beside the parameters and the tokenizer there is the collection `seen`: how often each code was met in training.
Generation draws its first frame by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from zoo.encoders.decoding import Sampler, TopP
from zoo.errors import ZooError
from zoo.objectives.over_codes import CodeTask, code_counts, prediction_sums
from zoo.types import AnyArray, Array, Batch, Sensors, Variables

SEEN = "seen"
PLAIN = TopP(1.0)
"""Draws every code with the probability that the model gives it."""


@dataclass(frozen=True)
class NextCode(CodeTask):
    """The task. A frozen dataclass: it is its own configuration.

    Attributes:
        tail: frames at the end of a window whose prediction counts (MEG-GPT: 16 of 100); 0 for all
    """

    model: str = "next_codes_tiny"
    tail: int = 0

    def init(self, key: Array, batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names. Raises ZooError for too short windows."""
        if not self.reads_codes or not self.reader().causal:
            raise ZooError(f"task.model: {self.model} is no causal encoder of codes, such as next_codes_tiny")
        kept = self.kept()
        codes, rows = self.tokenised(kept, batch)
        frames, sizes = codes.shape[1] // rows, self.frozen[0].code_sizes
        if frames < 2 or not 0 <= self.tail < frames:
            raise ZooError(
                f"task: got windows of {frames} frames and tail {self.tail}, wanted 2 or more and a tail less"
            )
        variables = self.module().init(key, codes, batch["sensors"], rows=rows)
        return {**variables, **kept, SEEN: {"counts": jnp.zeros((len(sizes), max(sizes)))}}

    def loss(
        self, variables: Variables, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """Cross-entropy in nats of the codes of the frames that count, a mean over tokens and codebooks.

        Metrics: cross_entropy_0, … of each codebook; entropy, in nats, of the same codes regardless of what precedes
        them: what the best constant guess would cost on this batch; accuracy; repeat_accuracy, of guessing the frame
        before; weight, the tokens that are predicted.
        """
        sizes = self.frozen[0].code_sizes
        codes, rows = self.tokenised(variables, batch)
        # Of each frame the next is wanted; of the last, and before the tail, nothing.
        grid = codes.reshape(len(codes), rows, -1, codes.shape[-1])
        target = jnp.pad(grid[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=-1)
        if self.tail:
            target = target.at[:, :, : -1 - self.tail].set(-1)
        found: Any = self.module().apply(
            variables,
            codes,
            batch["sensors"],
            rows=rows,
            wanted=target.reshape(codes.shape),
            groups=rows,
            train=train,
            rngs={"dropout": key, "noise": key},
            method="guesses",
        )
        there = (target >= 0).any(-1)
        guess, hit = (each.reshape(target.shape) for each in found)
        nats, right, count = prediction_sums(guess, hit, target, there)
        total = jnp.maximum(count.sum(), 1)
        counts = code_counts(target, sizes)
        entropy = -counts * jnp.log(jnp.maximum(counts / jnp.maximum(count, 1)[:, None], 1e-30))
        metrics = {f"cross_entropy_{book}": nats[book] / jnp.maximum(count[book], 1) for book in range(len(sizes))}
        metrics |= {
            "entropy": entropy.sum() / total,
            "accuracy": right.sum() / total,
            "repeat_accuracy": jnp.sum((grid == target) & (target >= 0)) / total,
            "weight": there.sum().astype(jnp.float32),
        }
        new: Variables = {}
        if train:
            new = {SEEN: {"counts": variables[SEEN]["counts"] + code_counts(codes, sizes)}}
        return nats.sum() / total, metrics, new

    def generate(
        self,
        variables: Variables,
        key: Array,
        sensors: Sensors,
        frames: int,
        *,
        prompt: Int[AnyArray, "B N Q"] | None = None,
        rows: int | None = None,
        sampler: Sampler = PLAIN,
    ) -> Int[Array, "B M Q"]:
        """`frames` new frames of every row [B, R · frames, Q], row by row, −1 in rows that are not there.

        prompt   codes of the frames before them; unless given one frame, every code drawn as often as it was seen in
                 training. What is returned does not have it
        rows     R of the grid; the channels unless given
        sampler  see `zoo.encoders.decoding`; each code of a frame is drawn by itself
        """
        tokenizer, module = self.frozen[0], self.module()
        sizes = tokenizer.code_sizes
        batch = sensors.valid.shape[0]
        rows = sensors.valid.shape[1] if rows is None else rows
        if frames < 1:
            raise ZooError(f"generate: got {frames} frames, wanted at least 1")
        valid = jnp.asarray(sensors.valid)
        if not tokenizer.CHANNEL_ROWS:
            valid = jnp.broadcast_to(valid.any(1, keepdims=True), (batch, rows))
        beginning, key = jax.random.split(key)
        if prompt is None:
            prompt = self._first_frame(variables, beginning, (batch, rows))
        prompt = jnp.where(jnp.repeat(valid, prompt.shape[1] // rows, axis=1)[..., None], prompt, -1)
        capacity = prompt.shape[1] // rows + frames
        encoder = self.reader()
        if encoder.time == "learned" and capacity > encoder.frames:
            raise ZooError(
                f"generate: got {capacity} frames with the prompt, wanted at most the table's {encoder.frames}"
            )

        def draw(logits: Array, memory: Any, key: Array) -> tuple[Array, Any]:
            log_probs = jax.nn.log_softmax(logits).reshape(-1, logits.shape[-1])
            drawn, memory = sampler.draw(log_probs, memory, key)
            return jnp.where(valid[..., None], drawn.reshape(logits.shape[:-1]), -1), memory

        def turn(carry: Any, key: Array) -> tuple[Any, Array]:
            codes, state, memory = carry
            logits, state = module.apply(variables, codes, sensors, state, method="step")
            codes, memory = draw(logits, memory, key)
            return (codes, state, memory), codes

        logits, state = module.apply(variables, prompt, sensors, rows, capacity, method="prefill")
        keys = jax.random.split(key, frames)
        first, memory = draw(logits, sampler.memory(batch * rows * len(sizes)), keys[0])
        _, rest = jax.lax.scan(turn, (first, state, memory), keys[1:])
        codes = jnp.concatenate([first[None], rest])
        return jnp.moveaxis(codes, 0, 2).reshape(batch, rows * frames, len(sizes))

    def _first_frame(self, variables: Variables, key: Array, shape: tuple[int, int]) -> Int[Array, "B R Q"]:
        counts: Float[Array, "Q K"] = jnp.asarray(variables[SEEN]["counts"])
        if not isinstance(counts, jax.core.Tracer) and not counts.sum():
            raise ZooError("generate: the model has seen no codes yet: train it, or give a prompt")
        return jax.random.categorical(key, jnp.log(counts), shape=(*shape, len(counts))).astype(jnp.int32)
