"""Sequences from a model that gives one token's successor at a time.

The model is a function `step(tokens[B] int32, state) -> (logits[B, V], state)`. Everything has fixed shapes and runs
under jit. Samplers:

    Greedy      the likeliest token
    TopP        from the smallest set of tokens with probability p (Holtzman et al., 1904.09751, §3.1)
    MirostatV1, MirostatV2   with a given mean surprise (Basu et al., ICLR 2021, 2007.14966; authors' code)

and `diverse_beams`, a search (Vijayakumar et al., 1610.02424; authors' code), of which one group is plain beam search.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from zoo.errors import ZooError
from zoo.types import Array

State = Any
Step = Callable[[Array, State], tuple[Array, State]]
"""Tokens [B], state → logits [B, V] of the next ones, state."""
Rows = Callable[[State, Array], State]
"""State, index [N] → the state of these rows."""


@runtime_checkable
class Sampler(Protocol):
    """How the next token is drawn."""

    def memory(self, batch: int) -> Any:
        """What it remembers of each sequence, before the first token: a pytree of [B, ...]."""

    def draw(self, log_probs: Array, memory: Any, key: Array) -> tuple[Array, Any]:
        """Log probabilities [B, V] → tokens [B], memory."""


@dataclass(frozen=True)
class Greedy:
    """The likeliest token; of several the one of the lowest number."""

    def memory(self, batch: int) -> tuple[()]:
        return ()

    def draw(self, log_probs: Float[Array, "B V"], memory: tuple[()], key: Array) -> tuple[Int[Array, " B"], tuple[()]]:
        return jnp.argmax(log_probs, axis=-1).astype(jnp.int32), memory


@dataclass(frozen=True)
class TopP:
    """Draws from the fewest tokens whose probabilities reach p together. p = 1 draws from all.

    temperature  divides logits before that
    k            at most so many tokens, the likeliest (1805.04833, §5.4); 0 for any number
    """

    p: float = 0.95
    temperature: float = 1.0
    k: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ZooError(f"TopP: p: got {self.p}, wanted 0 < p <= 1")
        if self.temperature <= 0:
            raise ZooError(f"TopP: temperature: got {self.temperature}, wanted more than 0 (Greedy is its limit)")
        if self.k < 0:
            raise ZooError(f"TopP: k: got {self.k}, wanted at least 1, or 0 for any number")

    def memory(self, batch: int) -> tuple[()]:
        return ()

    def draw(self, log_probs: Float[Array, "B V"], memory: tuple[()], key: Array) -> tuple[Int[Array, " B"], tuple[()]]:
        order, sharpened = _sorted(jax.nn.log_softmax(log_probs / self.temperature))
        probabilities = jnp.exp(sharpened)
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < self.p
        if self.k:
            kept &= jnp.arange(kept.shape[-1]) < self.k
        return _drawn(order, jnp.where(kept, sharpened, -jnp.inf), key), memory


@dataclass(frozen=True)
class MirostatV1:
    """Top-k whose k is that of a Zipf law with the surprise mu; mu follows what each token's surprise was.

    target   tau, mean surprise in bits; mu begins at 2 tau
    rate     mu −= rate · (surprise − tau), the surprise −log2 p under the whole distribution
    fitted   pairs of neighbouring probabilities, sorted, that the law's exponent s is fitted to
    """

    target: float = 3.0
    rate: float = 1.0
    fitted: int = 100

    def memory(self, batch: int) -> Float[Array, " B"]:
        return jnp.full(batch, 2 * self.target, jnp.float32)

    def draw(
        self, log_probs: Float[Array, "B V"], memory: Float[Array, " B"], key: Array
    ) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
        order, ranked = _sorted(log_probs)
        count = self._kept(ranked, memory)
        kept = jnp.arange(ranked.shape[-1]) < count[:, None]
        tokens = _drawn(order, jnp.where(kept, ranked, -jnp.inf), key)
        return tokens, _corrected(self, memory, log_probs, tokens)

    def _kept(self, ranked: Float[Array, "B V"], mu: Float[Array, " B"]) -> Float[Array, " B"]:
        """k = round((ε 2^mu / (1 − n^−ε))^(1/s)) + 1 with ε = s − 1 and n = V (Algorithm 1), from 1 to V."""
        vocabulary = ranked.shape[-1]
        pairs = min(self.fitted, vocabulary - 1)
        ranks = jnp.arange(1, pairs + 1, dtype=jnp.float32)
        t = jnp.log((ranks + 1) / ranks)
        # Tokens of probability 0 obey no power law.
        possible = jnp.isfinite(ranked[:, 1 : pairs + 1])
        b = jnp.where(possible, ranked[:, :pairs] - jnp.where(possible, ranked[:, 1 : pairs + 1], 0), 0)
        s = (t * b).sum(-1) / jnp.maximum((t**2 * possible).sum(-1), 1e-9)
        s = jnp.maximum(s, 1e-3)
        # ε / (1 − n^−ε) is 1 / ln n in the limit ε → 0.
        near = jnp.abs(s - 1) < 1e-3
        epsilon = jnp.where(near, 1.0, s - 1)
        log_n = math.log(vocabulary)
        factor = jnp.where(near, 1 / log_n, epsilon / -jnp.expm1(-epsilon * log_n))
        log_k = jnp.clip((mu * math.log(2) + jnp.log(factor)) / s, -10.0, log_n)
        return jnp.clip(jnp.round(jnp.exp(log_k)) + 1, 1, vocabulary)


@dataclass(frozen=True)
class MirostatV2:
    """Draws from the tokens of at most mu bits of surprise, at least one; mu moves as in `MirostatV1`."""

    target: float = 3.0
    rate: float = 1.0

    def memory(self, batch: int) -> Float[Array, " B"]:
        return jnp.full(batch, 2 * self.target, jnp.float32)

    def draw(
        self, log_probs: Float[Array, "B V"], memory: Float[Array, " B"], key: Array
    ) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
        order, ranked = _sorted(log_probs)
        kept = (-ranked / math.log(2) <= memory[:, None]) | (jnp.arange(ranked.shape[-1]) == 0)
        tokens = _drawn(order, jnp.where(kept, ranked, -jnp.inf), key)
        return tokens, _corrected(self, memory, log_probs, tokens)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Generated:
    """What `generate` gives."""

    tokens: Array
    """[B, L] int32; `end` from where a sequence has ended"""
    log_probs: Array
    """[B, L], natural, of each token under the model; 0 after the end"""
    state: State
    """The model's after the last token but one, to which the last is the next input"""


def generate(
    step: Step,
    state: State,
    prompt: Int[Array, " B"],
    length: int,
    sampler: Sampler,
    key: Array,
    end: int | None = None,
) -> Generated:
    """`length` tokens of each sequence after `prompt`, its last token so far; `state` knows those before it.

    end  the token that ends a sequence, if there is one
    """

    def turn(carry: Any, key: Array) -> tuple[Any, tuple[Array, Array]]:
        token, state, memory, ended = carry
        logits, state = step(token, state)
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
        drawn, memory = sampler.draw(log_probs, memory, key)
        likelihood = jnp.take_along_axis(log_probs, drawn[:, None], axis=-1)[:, 0]
        if end is not None:
            drawn, likelihood = jnp.where(ended, end, drawn), jnp.where(ended, 0.0, likelihood)
            ended |= drawn == end
        return (drawn, state, memory, ended), (drawn, likelihood)

    batch = len(prompt)
    carry = prompt.astype(jnp.int32), state, sampler.memory(batch), jnp.zeros(batch, bool)
    (_, state, _, _), (tokens, log_probs) = jax.lax.scan(turn, carry, jax.random.split(key, length))
    return Generated(tokens.T, log_probs.T, state)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Beams:
    """What `diverse_beams` finds, K beams in G groups, the best of a group first."""

    tokens: Array
    """[B, G, K / G, L] int32; `end` from where a sequence has ended"""
    scores: Array
    """[B, G, K / G] that they were ranked by; −inf where a group has not so many"""
    log_probs: Array
    """[B, G, K / G], natural, of the whole sequence under the model"""


def diverse_beams(
    step: Step,
    state: State,
    prompt: Int[Array, " B"],
    length: int,
    *,
    beams: int = 4,
    groups: int = 2,
    penalty: float = 0.5,
    keep_penalty: bool = True,
    end: int | None = None,
    rows: Rows | None = None,
) -> Beams:
    """Beam search in groups, each kept from choosing what earlier groups have chosen at the same time.

    beams         K, divided among the groups G
    penalty       lambda, natural log units: subtracted from a token's log probability for each beam of an earlier group
                  that chose it at this time (Hamming diversity; the paper uses 0.2 to 0.8). 0 gives G equal groups
    keep_penalty  a beam's score keeps the penalties that it has paid (authors' code); False ranks with this time's only
    end           the token that ends a sequence; a beam that ends leaves its group, whose others go on without it
    rows          (state, index [N]) → the state of these rows, such as `SequenceModel.rows`; unless given, the first
                  axis of every array of the state is the batch

    `state` is that of each sequence, repeated for its beams here. Raises ZooError where beams do not divide.
    """
    if groups < 1 or beams < groups or beams % groups:
        raise ZooError(f"diverse_beams: {beams} beams do not divide into {groups} groups")
    rows = first_axis if rows is None else rows
    batch, width = len(prompt), beams // groups
    shape = batch, groups, width

    def turn(carry: Any, time: Array) -> tuple[Any, None]:
        token, state, live, done = carry
        logits, state = step(token.reshape(-1), state)
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(*shape, -1)
        chosen = jnp.zeros((batch, log_probs.shape[-1]))
        after, parents, tokens = [], [], []
        for g in range(groups):
            own = Beams(live.tokens[:, g], live.scores[:, g], live.log_probs[:, g])
            grown, parent, drawn = _grown(own, log_probs[:, g], penalty * chosen, time, keep_penalty)
            counted = jax.nn.one_hot(drawn, chosen.shape[-1]) * jnp.isfinite(grown.scores)[..., None]
            chosen = chosen + counted.sum(1)
            after.append(grown)
            parents.append(parent + g * width)
            tokens.append(drawn)
        live = jax.tree.map(lambda *parts: jnp.stack(parts, axis=1), *after)
        origin = jnp.stack(parents, 1).reshape(batch, -1) + beams * jnp.arange(batch)[:, None]
        state = rows(state, origin.reshape(-1))
        token = jnp.stack(tokens, axis=1)
        if end is not None:
            ended = token == end
            done = _best(done, _only(ended, live))
            live = _only(~ended, live)
        return (token, state, live, done), None

    nothing = Beams(
        jnp.full((*shape, length), -1 if end is None else end, jnp.int32), jnp.full(shape, -jnp.inf), jnp.zeros(shape)
    )
    # All beams of a group are equal before the first token: one of them is enough.
    live = Beams(nothing.tokens, nothing.scores.at[..., 0].set(0.0), nothing.log_probs)
    token = jnp.broadcast_to(prompt.astype(jnp.int32)[:, None, None], shape)
    state = rows(state, jnp.repeat(jnp.arange(batch), beams))
    (_, _, live, done), _ = jax.lax.scan(turn, (token, state, live, nothing), jnp.arange(length))
    return _best(done, live)


def first_axis(state: State, index: Int[Array, " N"]) -> State:
    """Rows of a state whose arrays are all [B, ...]."""
    return jax.tree.map(lambda leaf: leaf[index], state)


def _grown(
    beams: Beams, log_probs: Float[Array, "B K V"], penalties: Float[Array, "B V"], time: Array, keep_penalty: bool
) -> tuple[Beams, Int[Array, "B K"], Int[Array, "B K"]]:
    """A group one token longer, and the beam that each of its beams comes from, and the token."""
    batch, width, vocabulary = log_probs.shape
    ranks = beams.scores[..., None] + log_probs - penalties[:, None]
    scores, place = jax.lax.top_k(ranks.reshape(batch, -1), width)
    parent, token = place // vocabulary, place % vocabulary
    likelihood = jnp.take_along_axis(log_probs.reshape(batch, -1), place, axis=1)
    if not keep_penalty:
        scores = jnp.take_along_axis(beams.scores, parent, axis=1) + likelihood
    tokens = jnp.take_along_axis(beams.tokens, parent[..., None], axis=1).at[:, :, time].set(token)
    return Beams(tokens, scores, jnp.take_along_axis(beams.log_probs, parent, axis=1) + likelihood), parent, token


def _only(kept: Array, beams: Beams) -> Beams:
    return Beams(beams.tokens, jnp.where(kept, beams.scores, -jnp.inf), beams.log_probs)


def _best(one: Beams, other: Beams) -> Beams:
    """The best of each group of both, as many as it has room for."""
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), one, other)
    scores, order = jax.lax.top_k(both.scores, one.scores.shape[2])
    tokens = jnp.take_along_axis(both.tokens, order[..., None], axis=2)
    return Beams(tokens, scores, jnp.take_along_axis(both.log_probs, order, axis=2))


def _sorted(log_probs: Float[Array, "B V"]) -> tuple[Int[Array, "B V"], Float[Array, "B V"]]:
    """Tokens from the likeliest on, of equal ones the lowest number first, and their log probabilities."""
    order = jnp.argsort(log_probs, axis=-1, descending=True, stable=True)
    return order, jnp.take_along_axis(log_probs, order, axis=-1)


def _drawn(order: Int[Array, "B V"], ranked: Float[Array, "B V"], key: Array) -> Int[Array, " B"]:
    place = jax.random.categorical(key, ranked)
    return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _corrected(sampler: MirostatV1 | MirostatV2, mu: Array, log_probs: Array, tokens: Array) -> Array:
    surprise = -jnp.take_along_axis(log_probs, tokens[:, None], axis=-1)[:, 0] / math.log(2)
    return mu - sampler.rate * (surprise - sampler.target)
