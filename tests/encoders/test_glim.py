"""GLIM: sizes, prompts and padding of its encoder; reading with a stand-in for the language model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from electrodes import electrodes
from loop import trained
from quick import compiled, init

import zoo
from zoo.encoders.glim import before_the_end
from zoo.errors import ZooError
from zoo.objectives.glim import Reader, ReadText, language_loss, noise_for
from zoo.train.config import Optimizer

SMALL = {"channels": 4, "samples": 40, "dim": 16, "queries": 4, "depth": 1, "heads": 2}
WORDS, WIDTH, LENGTH = 6, 8, 3


def stand_in(states: Any, ids: Any) -> Any:
    """A language model that cannot learn: at l it reads the l-th state and knows the id before."""
    rng = np.random.default_rng(5)
    words, chain = rng.normal(size=(WIDTH, WORDS)), rng.normal(size=(WORDS, WORDS))
    before = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)))
    return states[:, :LENGTH] @ jnp.asarray(words, jnp.float32) + 0.1 * jnp.asarray(chain, jnp.float32)[before]


def batch(seed: int = 0, size: int = 16) -> dict[str, Any]:
    """Four sentences, each with a pattern over channels, states of its own and two paraphrases."""
    fixed, rng = np.random.default_rng(7), np.random.default_rng(seed)
    text, target = fixed.normal(size=(4, 5, WIDTH)), fixed.integers(0, WORDS, (4, 2, LENGTH))
    target[:, 1] = target[:, 0]
    target[1, :, -1] = -1
    which = rng.integers(0, 4, size)
    signal = 2 * np.eye(4)[which][:, :, None] + 0.5 * rng.normal(size=(size, 4, 40))
    return {
        "signal": signal.astype(np.float32),
        "sensors": electrodes([""] * 4, size),
        "text": text[which].astype(np.float32),
        "text_valid": np.ones((size, 5), bool),
        "target": target[which].astype(np.int32),
    }


def test_counts_of_encoder_and_aligner() -> None:
    module = Reader(zoo.create("glim_base"), 1024)
    signal, sensors = zoo.create("glim_base").example()
    given = signal, sensors, jnp.zeros((1, 2, 1024)), jnp.ones((1, 2), bool), jnp.zeros((1, 3), jnp.int32)
    params = dict(jax.eval_shape(module.init, jax.random.key(0), *given)["params"])
    encoder = dict(params.pop("encoder"))
    prompts = [encoder.pop(name) for name in ("embed_task", "embed_dataset", "embed_person", "prompt_weight")]
    counts = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (encoder, params, prompts)]
    assert counts == [10_141_696, 8_662_016, 37 * 128 + 3]


@pytest.fixture(scope="module")
def program() -> Any:
    """(its first variables, variables × signal × prompt → tokens) of the published form, in small."""
    return made(SMALL)


def made(options: dict[str, Any]) -> Any:
    encoder, given = zoo.create("glim_tiny", **options), batch(size=2)
    variables = init(encoder, given["signal"], given["sensors"])

    def tokens(variables: Any, signal: Any, prompt: Any) -> Any:
        return encoder.apply(variables, signal, given["sensors"], prompt=prompt).tokens

    return variables, compiled(tokens)


UNKNOWN = np.zeros((2, 3), np.int32)


def test_padding_is_what_a_window_ends_with(program: Any) -> None:
    """And it is not read: other positions there, as other zeros would have, change nothing."""
    signal = jnp.zeros((2, 2, 6)).at[0, 1, 1].set(1.0).at[0, 0, 3].set(1.0)
    np.testing.assert_array_equal(before_the_end(signal), [[True] * 4 + [False] * 2, [True] * 6])
    fresh, tokens = program
    variables, whole = opened(fresh), batch(size=2)["signal"]
    short = whole.copy()
    short[:, :, 30:] = 0
    # What padding holds after the rules of samples: were it read, these would matter.
    other = opened(fresh)
    for part in (slice(30, 40), slice(70, 80)):
        other["params"]["samples"]["rule_samples"]["bias"][:, part] = 7.0
    np.testing.assert_allclose(tokens(other, short, UNKNOWN), tokens(variables, short, UNKNOWN), atol=1e-5)
    assert np.abs(tokens(other, whole, UNKNOWN) - tokens(variables, whole, UNKNOWN)).max() > 1e-3


def acting(program: Any) -> list[bool]:
    """Whether another task, dataset or person makes a difference."""
    fresh, tokens = program
    variables, signal = opened(fresh), batch(size=2)["signal"]
    unknown = tokens(variables, signal, UNKNOWN)
    prompts = 2 * np.eye(3, dtype=np.int32)[:, None].repeat(2, 1)
    return [bool(np.abs(tokens(variables, signal, prompt) - unknown).max() > 1e-4) for prompt in prompts]


def test_the_task_alone_acts(program: Any) -> None:
    assert acting(program) == [True, False, False]


@pytest.mark.slow
def test_dataset_and_person_act_where_they_are_let_in() -> None:
    assert acting(made({**SMALL, "drop": (0.0, 0.0, 0.0)})) == [True, True, True]


def test_a_fresh_encoder_leaves_samples_as_they_are(program: Any) -> None:
    """Gates begin closed: the tokens do not depend on what is inside the layers over samples."""
    variables, tokens = program
    other = jax.tree.map(np.array, variables)
    other["params"]["samples"]["mlp_in"]["kernel"] += 3
    signal = batch(size=2)["signal"]
    np.testing.assert_array_equal(tokens(other, signal, UNKNOWN), tokens(variables, signal, UNKNOWN))


def test_the_language_models_loss_is_the_mean_over_ids() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    ids = np.array([[0, 3, -1], [2, -1, -1]], np.int32)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = -np.mean([log_probs[0, 0, 0], log_probs[0, 1, 3], log_probs[1, 0, 2]])
    np.testing.assert_allclose(language_loss(jnp.asarray(logits), jnp.asarray(ids)), wanted, rtol=1e-5)


def test_what_reading_lacks_is_told() -> None:
    given = batch(size=2)
    with pytest.raises(ZooError, match="reading needs a language model"):
        ReadText("glim_tiny", SMALL).loss({"params": {}}, given, jax.random.key(0), True)
    del given["text_valid"]
    with pytest.raises(ZooError, match="needs batches with 'text_valid'"):
        ReadText("glim_tiny", SMALL).init(jax.random.key(0), given)


def opened(variables: Any) -> Any:
    """With rules and gates that are not zero."""
    variables = jax.tree.map(np.array, variables)
    samples = variables["params"]["samples"]
    for name in ("rule", "rule_samples"):
        samples[name]["kernel"] += 5 * np.random.default_rng(0).normal(size=samples[name]["kernel"].shape)
        samples[name]["bias"] += 0.3
    return variables


@pytest.mark.slow
def test_it_finds_and_says_what_was_read_and_not_of_noise() -> None:
    task = ReadText("glim_tiny", SMALL, language=stand_in, temperature=0.1, heads=2)
    variables, figures = trained(task, batch, Optimizer(learning_rate=3e-3, weight_decay=0.0, warmup_steps=5), 150)
    assert figures[-1]["language"] < 0.5 * figures[0]["language"]
    given = batch(seed=99)
    say = compiled(lambda given: task.generate(variables, given, LENGTH))
    wanted = given["target"][:, 0]

    def right(said: Any) -> float:
        return float(np.mean((np.asarray(said) == wanted)[wanted >= 0]))

    assert right(say(given)) > 0.8
    assert right(say(noise_for(jax.random.key(0), given))) < right(say(given)) - 0.2

    # Among sentences in the batch, by the vectors alone: every row's nearest text is one of its own sentence.
    _, eeg, text = compiled(lambda given: task.read(variables, given))(given)
    cosine = (eeg / np.linalg.norm(eeg, axis=1, keepdims=True)) @ (text / np.linalg.norm(text, axis=1, keepdims=True)).T
    nearest = given["text"][np.argmax(cosine, 1), 0, 0]
    assert np.mean(nearest == given["text"][:, 0, 0]) > 0.8
