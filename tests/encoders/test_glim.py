"""GLIM: sizes, prompts and padding of its encoder; reading with a stand-in for the language model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from electrodes import electrodes
from loop import trained
from quick import compiled, init, run

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
    """Four sentences, each with waves of its own frequency, states of its own and two paraphrases."""
    fixed, rng = np.random.default_rng(7), np.random.default_rng(seed)
    text, target = fixed.normal(size=(4, 5, WIDTH)), fixed.integers(0, WORDS, (4, 2, LENGTH))
    target[:, 1] = target[:, 0]
    target[1, :, -1] = -1
    which = rng.integers(0, 4, size)
    phase = rng.uniform(size=(size, 4, 1))
    waves = np.sin(2 * np.pi * (np.array([2, 5, 9, 14])[which, None, None] * np.arange(40) / 40 + phase))
    return {
        "signal": (waves + 0.2 * rng.normal(size=waves.shape)).astype(np.float32),
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


def test_padding_is_what_a_window_ends_with() -> None:
    signal = jnp.zeros((2, 2, 6)).at[0, 1, 1].set(1.0).at[0, 0, 3].set(1.0)
    np.testing.assert_array_equal(before_the_end(signal), [[True] * 4 + [False] * 2, [True] * 6])
    encoder = zoo.create("glim_tiny", **SMALL)
    given = batch(size=2)
    variables = opened(init(encoder, given["signal"], given["sensors"]))
    signal = given["signal"].copy()
    signal[:, :, 30:] = 0
    there = run(encoder, variables, signal, given["sensors"]).tokens
    assert np.abs(there - run(encoder, variables, given["signal"], given["sensors"]).tokens).max() > 1e-3
    assert before_the_end(jnp.asarray(signal)).sum(1).tolist() == [30, 30]


def test_the_task_alone_acts_unless_the_others_are_let_in() -> None:
    given = batch(size=2)
    for drop, acts in (((0.0, 1.0, 1.0), [True, False, False]), ((0.0, 0.0, 0.0), [True, True, True])):
        encoder = zoo.create("glim_tiny", **SMALL, drop=drop)
        variables = opened(init(encoder, given["signal"], given["sensors"]))
        tell = compiled(
            lambda prompt, encoder=encoder, variables=variables: (
                encoder.apply(variables, given["signal"], given["sensors"], prompt=prompt).tokens
            )
        )
        unknown = tell(np.zeros((2, 3), np.int32))
        for place in range(3):
            prompt = np.zeros((2, 3), np.int32)
            prompt[:, place] = 2
            assert (np.abs(tell(prompt) - unknown).max() > 1e-4) == acts[place]


def test_a_fresh_encoder_leaves_samples_as_they_are() -> None:
    """Gates begin closed: the tokens do not depend on what is inside the layers over samples."""
    encoder, given = zoo.create("glim_tiny", **SMALL), batch(size=2)
    variables = init(encoder, given["signal"], given["sensors"])
    other = jax.tree.map(lambda leaf: leaf, variables)
    other["params"]["samples"]["mlp_in"]["kernel"] = 3 + variables["params"]["samples"]["mlp_in"]["kernel"]
    a, b = (run(encoder, each, given["signal"], given["sensors"]).tokens for each in (variables, other))
    np.testing.assert_array_equal(a, b)


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
    samples = variables["params"]["samples"]
    for name in ("rule", "rule_samples"):
        kernel = samples[name]["kernel"]
        samples[name]["kernel"] = 5 * np.random.default_rng(0).normal(size=kernel.shape).astype(np.float32)
        samples[name]["bias"] = np.full(samples[name]["bias"].shape, 0.3, np.float32)
    return variables


@pytest.mark.slow
def test_it_finds_and_says_what_was_read_and_not_of_noise() -> None:
    task = ReadText("glim_tiny", SMALL, language=stand_in, temperature=0.1, heads=2)
    variables, figures = trained(task, batch, Optimizer(learning_rate=3e-3, weight_decay=0.0, warmup_steps=5), 250)
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
