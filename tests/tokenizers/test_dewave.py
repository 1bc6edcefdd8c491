"""DeWave: padding words, the codex's gradients and use, and what tells words apart: their EEG and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from zoo.errors import ZooError
from zoo.objectives.contrast import similarities
from zoo.tokenizers.dewave import TextAligned
from zoo.types import Sensors

WORD = {"channels": 4, "bands": 2, "dim": 16, "heads": 2, "hidden": 16, "codes": 8, "depth": 1, "kmeans": 0}
RAW = {"channels": 2, "dim": 32, "heads": 2, "hidden": 64, "codes": 64, "depth": 1, "rate_hz": 200.0}


def sensors(examples: int, channels: int) -> Sensors:
    blank, none = np.full((examples, channels, 3), np.nan, np.float32), np.zeros((examples, channels), np.int32)
    return Sensors(blank, blank, none, none, np.ones((examples, channels), bool))


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    return jax.jit(function).lower(*arguments).compile({"xla_backend_optimization_level": 0})(*arguments)


def drawn(module: nn.Module, *given: Any) -> Any:
    """Variables drawn with numpy, which takes no compilation."""
    shapes = nn.unbox(jax.eval_shape(module.init, {name: jax.random.key(0) for name in ("params", "codes")}, *given))
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> Any:
        values = np.ones(leaf.shape) if path[-1].key == "scale" else 0.3 * rng.normal(size=leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def test_padding_words_have_no_code_and_do_not_touch_the_others():
    tokenizer = zoo.create("dewave_word_tiny", **WORD)
    features = np.random.default_rng(0).normal(size=(1, 4, 6)).astype(np.float32)
    padded = np.concatenate([features, np.zeros((1, 4, 4), np.float32)], axis=-1)
    variables = drawn(tokenizer, features, sensors(1, 4))
    short, long = (run(tokenizer.apply, variables, each, sensors(1, 4)) for each in (features, padded))
    np.testing.assert_array_equal(long.codes[0, 3:], -1)
    np.testing.assert_array_equal(long.codes[0, :3], short.codes[0])
    np.testing.assert_allclose(long.reconstruction[..., :6], short.reconstruction, atol=1e-5)
    assert not np.asarray(long.reconstruction[..., 6:]).any()
    np.testing.assert_allclose(long.losses["reconstruction"], short.losses["reconstruction"], rtol=1e-5)


def test_a_word_is_its_bands_of_all_channels():
    """The published 840 numbers a word: 8 bands of 105 channels."""
    tokenizer = zoo.create("dewave_word")
    assert tokenizer.grid(105, 3 * 8) == (1, 3)
    shapes = nn.unbox(jax.eval_shape(tokenizer.init, jax.random.key(0), *tokenizer.example()))
    assert shapes["params"]["embed"]["linear"]["kernel"].shape == (840, 512)
    assert shapes["codebooks"]["codex"]["embedding"].shape == (2048, 512)


def test_a_token_of_waves_is_80_samples():
    tokenizer = zoo.create("dewave_raw")
    assert tokenizer.frame == 80
    assert tokenizer.grid(105, 2500 - 20) == (1, 31)
    assert tokenizer.sampling_rate == 500


@pytest.mark.parametrize(("learning", "terms"), [("ema", {"commitment"}), ("gradient", {"commitment", "codebook"})])
def test_the_codex_learns_as_its_option_says(learning, terms):
    tokenizer = zoo.create("dewave_word_tiny", **{**WORD, "learning": learning})
    assert set(tokenizer.loss_weights) == {"reconstruction"} | terms
    shapes = jax.eval_shape(tokenizer.init, jax.random.key(0), *tokenizer.example())
    assert ("codex" in shapes["params"]) == (learning == "gradient")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("dewave_word_tiny", {"heads": 3}, "dim 64 does not divide into 3 heads"),
        ("dewave_raw_tiny", {"kernel": 4}, "kernel: got 4, wanted an odd number"),
        ("dewave_raw_tiny", {"kernels": (10, 3)}, "wanted one each, none smaller"),
        ("dewave_raw_tiny", {"kernels": (10, 3, 1)}, "wanted one each, none smaller"),
    ],
)
def test_bad_options_are_refused(name, options, says):
    tokenizer = zoo.create(name, **options)
    with pytest.raises(ZooError, match=says):
        jax.eval_shape(tokenizer.init, jax.random.key(0), *tokenizer.example())


def test_another_number_of_channels_is_refused():
    tokenizer = zoo.create("dewave_raw")
    with pytest.raises(ZooError, match=r"got 64 channels, wanted 105 \(option channels\)"):
        tokenizer.grid(64, 800)
    with pytest.raises(ZooError, match="got 64 channels, wanted 105"):
        tokenizer.check_recording(500.0, ("eeg",) * 64, ("",) * 64)
    with pytest.raises(ZooError, match="kind 'mag'"):
        tokenizer.check_recording(500.0, ("mag",) * 105, ("",) * 105)


def trained(module: nn.Module, batch: Callable[[int], tuple[Any, ...]], weights: Any, steps: int) -> Any:
    """Variables after `steps` steps of Adam on the weighed losses."""
    keys = {name: jax.random.key(n) for n, name in enumerate(("params", "codes", "dropout"))}
    variables = nn.unbox(jax.jit(module.init)(keys, *batch(0)))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(2e-3, steps)))

    @jax.jit
    def step(variables: Any, state: Any, key: Any, given: Any) -> Any:
        def loss(params: Any) -> Any:
            out, new = module.apply(
                {"params": params, "codebooks": variables["codebooks"]},
                *given,
                train=True,
                mutable=["codebooks"],
                rngs={"codes": key, "dropout": key},
            )
            return sum(weight * out.losses[name] for name, weight in weights.items()), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(grads, state)
        return {"params": optax.apply_updates(variables["params"], updates), **new}, state

    state = optimizer.init(variables["params"])
    for n in range(steps):
        variables, state = step(variables, state, jax.random.key(n), batch(n))
    return variables


def waves(examples: int, seed: int) -> np.ndarray:
    """Two channels at 200 Hz: a rhythm of 6 to 14 Hz, seen with a lag by the second, and a little noise."""
    rng = np.random.default_rng(seed)
    phase = 2 * np.pi * (np.arange(200) / 200 * rng.uniform(6, 14, (examples, 1)) + rng.uniform(size=(examples, 1)))
    both = np.stack([np.sin(phase), np.sin(phase - 0.7)], axis=1) * np.sqrt(2)
    return (both + 0.1 * rng.normal(size=both.shape)).astype(np.float32)


@pytest.mark.slow
def test_waves_are_rebuilt_through_a_codex_that_is_in_use():
    tokenizer = zoo.create("dewave_raw_tiny", **RAW)
    where = sensors(16, 2)
    variables = trained(tokenizer, lambda n: (waves(16, n), where), tokenizer.loss_weights, 800)
    new = waves(64, 10**6)
    out = tokenizer.apply(variables, new, sensors(64, 2))
    explained = 1 - np.square(out.reconstruction - new).sum() / np.square(new).sum()
    live = len(np.unique(out.codes)) / 64
    assert explained > 0.9
    assert live > 0.6


VOCABULARY, NUMBERS = 10, 8
_RNG = np.random.default_rng(0)
FEATURES, EMBEDDINGS = _RNG.normal(size=(VOCABULARY, 4, 2)), _RNG.normal(size=(VOCABULARY, NUMBERS))


def sentences(seed: int, *, shuffled: bool = False, silent: bool = False) -> tuple[Any, ...]:
    """Eight sentences of five words: noisy features of each word, and its embedding.

    shuffled: features of other words than those of the embeddings; silent: noise alone.
    """
    rng = np.random.default_rng(seed)
    word = rng.integers(VOCABULARY, size=(8, 5))
    seen = rng.integers(VOCABULARY, size=(8, 5)) if shuffled else word
    features = (0 if silent else FEATURES[seen]) + 0.5 * rng.normal(size=(8, 5, 4, 2))
    signal = np.moveaxis(features, 2, 1).reshape(8, 4, 10).astype(np.float32)
    return signal, sensors(8, 4), EMBEDDINGS[word].astype(np.float32), word


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["true", "shuffled", "silent"])
def test_words_are_told_apart_by_their_own_eeg_and_by_nothing_else(kind):
    """Retrieval among ten words: far above one in ten for true pairs, at it for shuffled ones and for noise."""
    options = {kind: True} if kind != "true" else {}
    tokenizer = zoo.create("dewave_word_tiny", **{**WORD, "codes": 32, "kmeans": 5})
    aligned = TextAligned(tokenizer, width=NUMBERS)
    weights = {**tokenizer.loss_weights, "contrast": 1.0}
    variables = trained(aligned, lambda n: sentences(n, **options)[:3], weights, 300)
    directions = EMBEDDINGS / np.linalg.norm(EMBEDDINGS, axis=1, keepdims=True)
    encode = jax.jit(lambda *given: aligned.apply(*given, method="aligned"))
    right = []
    for seed in range(20):
        signal, where, _, word = sentences(10**6 + seed, **options)
        found = np.asarray(encode(variables, signal, where)).reshape(-1, NUMBERS)
        right.append(np.argmax(found @ directions.T, axis=1) == word.ravel())
    share = np.mean(right)
    if kind == "true":
        assert share > 0.8
    else:
        # Of 800 words: chance, and four of its standard errors.
        assert abs(share - 1 / VOCABULARY) < 0.045


@pytest.mark.slow
def test_the_contrast_is_over_all_words_that_are_there():
    tokenizer = zoo.create("dewave_word_tiny", **WORD)
    aligned = TextAligned(tokenizer, width=NUMBERS, temperature=0.5)
    signal, where, words, _ = sentences(0)
    signal[:, :, -2:] = 0
    variables = drawn(aligned, signal, where, words)
    out = run(aligned.apply, variables, signal, where, words)
    found = run(lambda *given: aligned.apply(*given, method="aligned"), variables, signal, where)[:, :4]
    assert len(np.unique(out.codes[:, :4])) > 3
    scores = similarities(found.reshape(-1, NUMBERS), words[:, :4].reshape(-1, NUMBERS)) / 0.5
    wanted = -np.mean(np.diagonal(jax.nn.log_softmax(scores, axis=1)))
    np.testing.assert_allclose(out.losses["contrast"], wanted, rtol=1e-5)
