"""Samplers and searches against what they are by definition, for vocabularies small enough to list everything."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.encoders.decoding import Beams, Greedy, MirostatV1, MirostatV2, TopP, diverse_beams, generate
from zoo.errors import ZooError

QUICK = {"xla_backend_optimization_level": 0}
VOCABULARY = 5
TABLE = np.random.default_rng(0).standard_normal((7, VOCABULARY)).astype(np.float32) * 2


def step(tokens: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits that depend on all tokens so far: the state is their weighted sum modulo 7."""
    state = (3 * state + tokens) % 7
    return jnp.asarray(TABLE)[state], state


def log_probs(sequence: tuple[int, ...], prompt: int) -> list[float]:
    """Each token's, by following the model in numpy."""
    state, before, each = 0, prompt, []
    for token in sequence:
        state = (3 * state + before) % 7
        logits = TABLE[state].astype(float)
        each.append(float(logits[token] - np.log(np.exp(logits).sum())))
        before = token
    return each


def test_greedy_takes_the_likeliest_and_hands_the_state_on():
    prompt = jnp.array([0, 3])
    whole = jax.jit(lambda key: generate(step, jnp.zeros(2, int), prompt, 6, Greedy(), key))(jax.random.key(0))
    for row in range(2):
        state, token = 0, int(prompt[row])
        for got in np.asarray(whole.tokens[row]):
            state = (3 * state + token) % 7
            token = int(TABLE[state].argmax())
            assert got == token
        np.testing.assert_allclose(
            whole.log_probs[row], log_probs(tuple(whole.tokens[row].tolist()), int(prompt[row])), atol=1e-5
        )
    first = generate(step, jnp.zeros(2, int), prompt, 4, Greedy(), jax.random.key(0))
    rest = generate(step, first.state, first.tokens[:, -1], 2, Greedy(), jax.random.key(0))
    np.testing.assert_array_equal(rest.tokens, whole.tokens[:, 4:])


def test_sequences_end():
    logits = jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.5]]))
    got = generate(
        lambda tokens, state: (logits, state), (), jnp.zeros(2, int), 40, TopP(1.0), jax.random.key(1), end=1
    )
    for tokens, each in zip(np.asarray(got.tokens), np.asarray(got.log_probs), strict=True):
        ended = int(tokens.argmax())
        assert 0 < ended + 1 < 40
        assert tokens[ended:].all()
        np.testing.assert_allclose(each[: ended + 1], -math.log(2), rtol=1e-6)
        assert not each[ended + 1 :].any()


def shares(sampler: Any, probabilities: Any, count: int = 5000) -> np.ndarray:
    """How often each token is drawn."""
    logits = np.broadcast_to(np.log(np.asarray(probabilities, np.float32)), (count, len(probabilities)))
    draw = jax.jit(lambda logits, key: sampler.draw(logits, sampler.memory(count), key)[0], compiler_options=QUICK)
    return np.bincount(draw(logits, jax.random.key(2)), minlength=len(probabilities)) / count


@pytest.mark.parametrize(
    ("p", "temperature", "kept"),
    [(0.5, 1.0, [2]), (0.51, 1.0, [2, 0]), (0.81, 1.0, [2, 0, 3]), (1.0, 1.0, [2, 0, 3, 1]), (0.7, 0.5, [2, 0])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float, temperature: float, kept: list[int]):
    probabilities = np.array([0.3, 0.05, 0.5, 0.15])
    sharpened = probabilities ** (1 / temperature)
    sharpened /= sharpened.sum()
    # 0.5² / (0.25 + 0.09 + 0.0225 + 0.0025) = 0.68: with temperature 0.5 one token does not reach 0.7, two do.
    wanted = np.zeros(4)
    wanted[kept] = sharpened[kept] / sharpened[kept].sum()
    # Four standard errors of a share of 5,000 draws.
    np.testing.assert_allclose(shares(TopP(p, temperature), probabilities), wanted, atol=0.03)


@pytest.mark.parametrize(("p", "k", "kept"), [(1.0, 2, [2, 0]), (0.51, 3, [2, 0]), (1.0, 9, [2, 0, 3, 1])])
def test_top_p_keeps_at_most_k(p: float, k: int, kept: list[int]):
    probabilities = np.array([0.3, 0.05, 0.5, 0.15])
    wanted = np.zeros(4)
    wanted[kept] = probabilities[kept] / probabilities[kept].sum()
    np.testing.assert_allclose(shares(TopP(p, k=k), probabilities), wanted, atol=0.03)


def zipf(exponent: float, vocabulary: int) -> np.ndarray:
    probabilities = np.arange(1, vocabulary + 1) ** -exponent
    return probabilities / probabilities.sum()


@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.3])
def test_mirostat_keeps_as_many_tokens_as_the_papers_formula(exponent: float):
    vocabulary, mu = 200, 5.0
    probabilities = zipf(exponent, vocabulary)
    b = np.log(probabilities[:100] / probabilities[1:101])
    t = np.log((np.arange(100) + 2) / (np.arange(100) + 1))
    s = (t * b).sum() / (t**2).sum()
    assert s == pytest.approx(exponent)
    epsilon = s - 1
    factor = 1 / math.log(vocabulary) if exponent == 1.0 else epsilon / (1 - vocabulary**-epsilon)
    k = round((factor * 2**mu) ** (1 / s)) + 1
    assert 1 < k < vocabulary
    # With mu = 2 tau = 5 at the start, the first draw is from the k likeliest.
    got = shares(MirostatV1(mu / 2), probabilities)
    np.testing.assert_allclose(got[:k], probabilities[:k] / probabilities[:k].sum(), atol=0.03)
    assert not got[k:].any()


def test_mirostat_v2_keeps_what_surprises_less_than_mu():
    probabilities = [0.5, 0.25, 0.15, 0.1]
    np.testing.assert_allclose(shares(MirostatV2(1.01), probabilities), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(MirostatV2(0.1), probabilities), [1, 0, 0, 0])


@pytest.mark.parametrize("sampler", [MirostatV1(3.0, 0.5), MirostatV2(3.0, 0.5)], ids=["v1", "v2"])
def test_mirostats_mean_surprise_is_the_target(sampler: Any):
    """From two models side by side, of more entropy, whose likeliest tokens surprise less."""
    logits = jnp.log(jnp.asarray(np.stack([zipf(1.1, 300), zipf(1.3, 300)]), jnp.float32))
    run = jax.jit(lambda key: generate(lambda _, s: (logits, s), (), jnp.zeros(2, int), 800, sampler, key))
    surprise = -run(jax.random.key(3)).log_probs / math.log(2)
    # mu stays within a few bits, so that a mean over n tokens is off by a few bits / (rate · n) at most.
    np.testing.assert_allclose(surprise.mean(axis=1), 3.0, atol=0.05)
    entropies = -(jnp.exp(logits) * logits).sum(-1) / math.log(2)
    assert entropies.min() > 3.5
    assert -logits[:, 0].max() / math.log(2) < 2.5


def test_mirostat_bears_flat_certain_and_impossible_tokens():
    flat, certain = jnp.zeros(6), jnp.array([0.0, -jnp.inf, -jnp.inf, -jnp.inf, -jnp.inf, -jnp.inf])
    log_p = jax.nn.log_softmax(jnp.stack([flat, certain]))
    for sampler in (MirostatV1(1.0), MirostatV2(1.0)):
        tokens, mu = jax.jit(sampler.draw, compiler_options=QUICK)(log_p, sampler.memory(2), jax.random.key(4))
        assert np.isfinite(mu).all()
        assert tokens[1] == 0
        assert mu[0] == pytest.approx(2 - (math.log2(6) - 1), abs=1e-5)
        assert mu[1] == pytest.approx(3, abs=1e-5)


def found(**options: Any) -> Beams:
    prompt = jnp.array([0, 3])
    length = options.pop("length", 4)
    return jax.jit(partial(diverse_beams, step, length=length, **options), compiler_options=QUICK)(
        jnp.zeros(2, int), prompt
    )


def everything(prompt: int, length: int, end: int | None = None) -> dict[tuple[int, ...], float]:
    """All sequences, up to the first end, padded with it, and their log probabilities."""
    table = {}
    for sequence in itertools.product(range(VOCABULARY), repeat=length):
        stop = sequence.index(end) + 1 if end in sequence else length
        if all(token == end for token in sequence[stop:]):
            table[sequence] = sum(log_probs(sequence[:stop], prompt))
    return table


@pytest.mark.parametrize("end", [None, 2])
def test_a_beam_wide_enough_finds_the_best_of_all(end: int | None):
    got = found(beams=VOCABULARY**3, groups=1, end=end)
    for row, prompt in enumerate((0, 3)):
        table = everything(prompt, 4, end)
        best = sorted(table.values(), reverse=True)[:20]
        np.testing.assert_allclose(got.scores[row, 0, :20], best, atol=1e-5)
        np.testing.assert_allclose(got.log_probs[row, 0, :20], best, atol=1e-5)
        for tokens, score in zip(got.tokens[row, 0, :20].tolist(), got.scores[row, 0, :20], strict=True):
            assert table[tuple(tokens)] == pytest.approx(float(score), abs=1e-5)


def naive(prompt: int, length: int, width: int, groups: int, penalty: float, keep: bool, end: int | None) -> list[Any]:
    """The paper's algorithm over lists of (score, log probability, tokens): groups at each time, one after another."""
    live: list[list[Any]] = [[(0.0, 0.0, ())] for _ in range(groups)]
    done: list[list[Any]] = [[] for _ in range(groups)]
    for _ in range(length):
        chosen = [0] * VOCABULARY
        for g in range(groups):
            candidates = []
            for score, total, tokens in live[g]:
                for token in range(VOCABULARY):
                    each = log_probs((*tokens, token), prompt)[-1]
                    paid = score + each - penalty * chosen[token]
                    candidates.append((paid, paid if keep else score + each, total + each, (*tokens, token)))
            best = [entry[1:] for entry in sorted(candidates, reverse=True)[:width]]
            for _, _, tokens in best:
                chosen[tokens[-1]] += 1
            done[g] += [entry for entry in best if entry[2][-1] == end]
            live[g] = [entry for entry in best if entry[2][-1] != end]
    return [sorted(done[g] + live[g], reverse=True)[:width] for g in range(groups)]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("end", [None, 1])
def test_diverse_beams_are_the_papers(keep: bool, end: int | None):
    got = found(beams=6, groups=3, penalty=0.8, keep_penalty=keep, end=end, length=5)
    for row, prompt in enumerate((0, 3)):
        for g, group in enumerate(naive(prompt, 5, 2, 3, 0.8, keep, end)):
            for n, (score, total, tokens) in enumerate(group):
                assert got.scores[row, g, n] == pytest.approx(score, abs=1e-4)
                assert got.log_probs[row, g, n] == pytest.approx(total, abs=1e-4)
                assert tuple(got.tokens[row, g, n, : len(tokens)].tolist()) == tokens
                assert all(token == end for token in got.tokens[row, g, n, len(tokens) :].tolist())
            assert np.isneginf(got.scores[row, g, len(group) :]).all()


def test_without_penalty_all_groups_are_equal_and_with_it_they_differ():
    equal, diverse = found(beams=6, groups=3, penalty=0.0), found(beams=6, groups=3, penalty=2.0)
    alone = found(beams=2, groups=1)
    for g in range(3):
        np.testing.assert_array_equal(equal.tokens[:, g], alone.tokens[:, 0])
    np.testing.assert_array_equal(diverse.tokens[:, 0], alone.tokens[:, 0])
    assert len(np.unique(diverse.tokens[0].reshape(6, -1), axis=0)) > len(
        np.unique(equal.tokens[0].reshape(6, -1), axis=0)
    )


def test_wrong_options_are_named():
    with pytest.raises(ZooError, match="5 beams do not divide into 2 groups"):
        found(beams=5, groups=2)
    with pytest.raises(ZooError, match=r"p: got 0\.0, wanted 0 < p <= 1"):
        TopP(0.0)
    with pytest.raises(ZooError, match=r"temperature: got 0\.0, wanted more than 0"):
        TopP(temperature=0.0)
    with pytest.raises(ZooError, match="k: got -1, wanted at least 1, or 0"):
        TopP(k=-1)
