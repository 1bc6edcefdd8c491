"""Next-code prediction and generation: against plain numpy, one frame at a time, and on codes that follow a rule."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from electrodes import electrodes
from patch_tokenizer import PatchTokenizer

from zoo.encoders.codes import COLLECTION
from zoo.encoders.decoding import Greedy, TopP
from zoo.errors import ZooError
from zoo.objectives.next_code import SEEN, NextCode
from zoo.objectives.over_codes import code_counts
from zoo.registry import create

QUICK = {"xla_backend_optimization_level": 0}
NAMES = ("F3", "FZ", "F4")
CODES, LEVELS, PATCH, FRAMES = 16, 2, 10, 6
TOKENIZER = PatchTokenizer(patch=PATCH, codes=CODES, levels=LEVELS, rate=None, kmeans=0)
OPTIONS: dict[str, Any] = {"dim": 32, "mixers": ("softmax",), "mixer_options": {}, "mlp": "none"}
PLAIN = NextCode(options=OPTIONS)


def make_batch(seed: int = 0, size: int = 4) -> dict[str, Any]:
    """White noise; the last channel of the first example is missing."""
    rng = np.random.default_rng(seed)
    signal = rng.standard_normal((size, len(NAMES), PATCH * FRAMES)).astype(np.float32)
    sensors = electrodes(NAMES, size)
    sensors.valid[0, 2] = False
    signal[0, 2] = np.nan
    return {"signal": signal, "sensors": sensors}


def quick(function: Any) -> Any:
    return jax.jit(function, compiler_options=QUICK)


@pytest.fixture(scope="module")
def frozen() -> Any:
    batch = make_batch()
    return nn.unbox(quick(TOKENIZER.init)(jax.random.key(5), np.nan_to_num(batch["signal"]), batch["sensors"]))


@pytest.fixture(scope="module")
def task(frozen: Any) -> NextCode:
    return PLAIN.using(TOKENIZER, frozen)


@pytest.fixture(scope="module")
def variables(task: NextCode) -> Any:
    return nn.unbox(quick(task.init)(jax.random.key(0), make_batch()))


@pytest.mark.parametrize("tail", [0, 2])
def test_the_loss_is_a_plain_mean_over_the_frames_that_count(tail, task, variables):
    batch = make_batch()
    own = dataclasses.replace(task, tail=tail).using(*task.frozen)
    value, metrics, new = quick(partial(own.loss, train=False))(variables, batch, jax.random.key(1))
    assert value == pytest.approx(math.log(CODES), rel=0.05)
    assert new == {}
    codes = np.asarray(own.tokenised(variables, {**batch, "signal": np.nan_to_num(batch["signal"])})[0])
    predict = quick(lambda own, codes, sensors: task.module().apply(own, codes, sensors, rows=3))
    logits = np.asarray(predict(variables, codes, batch["sensors"])).reshape(4, 3, FRAMES, LEVELS, CODES)
    codes = codes.reshape(4, 3, FRAMES, LEVELS)
    nats: list[list[float]] = [[], []]
    right, again, counts = [], [], np.zeros((LEVELS, CODES))
    for example, row, frame in np.ndindex(4, 3, FRAMES - 1):
        if (example, row) == (0, 2) or (tail and frame < FRAMES - 1 - tail):
            continue
        for book in range(LEVELS):
            guess, wanted = logits[example, row, frame, book].astype(float), codes[example, row, frame + 1, book]
            nats[book].append(np.log(np.exp(guess).sum()) - guess[wanted])
            right.append(guess.argmax() == wanted)
            again.append(codes[example, row, frame, book] == wanted)
            counts[book, wanted] += 1
    np.testing.assert_allclose(value, np.mean(nats), rtol=1e-5)
    for book in range(LEVELS):
        np.testing.assert_allclose(metrics[f"cross_entropy_{book}"], np.mean(nats[book]), rtol=1e-5)
    shares = counts / counts.sum(1, keepdims=True)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(1).mean()
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(right), atol=1e-6)
    np.testing.assert_allclose(metrics["repeat_accuracy"], np.mean(again), atol=1e-6)
    assert metrics["weight"] == len(nats[0])


def test_training_counts_codes_and_leaves_the_tokenizer(task, variables):
    batch = make_batch()

    def loss(params: Any) -> Any:
        value, _, new = task.loss({**variables, "params": params}, batch, jax.random.key(1), True)
        return value, new

    gradient, new = quick(jax.grad(loss, has_aux=True))(variables["params"])
    assert set(variables) == {"params", COLLECTION, SEEN}
    assert set(new) == {SEEN}
    codes = np.asarray(task.tokenised(variables, batch)[0])
    for book in range(LEVELS):
        own = codes[..., book].ravel()
        np.testing.assert_array_equal(new[SEEN]["counts"][book], np.bincount(own[own >= 0], minlength=CODES))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.abs(gradient["head"]["kernel"]).max() > 0


@pytest.mark.slow
def test_books_of_unequal_sizes_keep_to_their_codes():
    codes = jnp.asarray([[[0, 4], [1, -1]], [[1, 2], [1, 2]]])
    np.testing.assert_array_equal(code_counts(codes, (2, 5)), [[1, 3, 0, 0, 0], [0, 0, 2, 0, 1]])

    class Unequal(PatchTokenizer):
        @property
        def code_sizes(self) -> tuple[int, ...]:
            return (3, 9)

    task = PLAIN.using(Unequal(), {})
    given = jnp.zeros((1, 6, 2), jnp.int32), electrodes(NAMES, 1)
    variables = nn.unbox(quick(partial(task.module().init, rows=3))(jax.random.key(0), *given))
    logits = quick(partial(task.module().apply, rows=3))(variables, *given)
    np.testing.assert_array_equal(np.isfinite(logits[0, 0]), [[True] * 3 + [False] * 6, [True] * 9])
    counts = {"counts": jnp.asarray([[0, 2.0, 1] + [0] * 6, [1.0] * 9])}
    make = quick(lambda own, key, sensors: task.generate(own, key, sensors, 40))
    codes = make({**variables, SEEN: counts}, jax.random.key(0), given[1])
    assert codes.shape == (1, 120, 2)
    assert codes[..., 0].max() == 2
    assert codes[..., 1].max() == 8
    assert codes.min() == 0


@pytest.mark.slow
def test_the_likeliest_frames_are_those_of_the_whole_model(task, variables):
    """Greedy generation, frame by frame, is a fixed point of the model over all frames at once."""
    batch = make_batch()
    prompt = np.asarray(task.tokenised(variables, batch)[0]).reshape(4, 3, FRAMES, LEVELS)[:, :, :2]
    flat = jnp.asarray(prompt.reshape(4, 6, LEVELS))
    make = quick(
        lambda own, prompt, sensors: task.generate(own, jax.random.key(0), sensors, 3, prompt=prompt, sampler=Greedy())
    )
    drawn = np.asarray(make(variables, flat, batch["sensors"])).reshape(4, 3, 3, LEVELS)
    assert (drawn[0, 2] == -1).all()
    whole = np.concatenate([prompt, drawn], 2)
    predict = quick(lambda own, codes, sensors: task.module().apply(own, codes, sensors, rows=3))
    logits = np.asarray(predict(variables, whole.reshape(4, 15, LEVELS), batch["sensors"]))
    guess = logits.argmax(-1).reshape(4, 3, 5, LEVELS)[:, :, 1:4]
    there = batch["sensors"].valid
    np.testing.assert_array_equal(drawn[there], guess[there])


def test_the_first_frame_is_drawn_as_codes_were_seen(task, variables):
    counts = np.zeros((LEVELS, CODES), np.float32)
    counts[0, 3], counts[1, [5, 6]] = 7, (3, 1)
    first = np.asarray(task._first_frame({SEEN: {"counts": counts}}, jax.random.key(0), (500, 3)))
    assert (first[..., 0] == 3).all()
    # Four standard errors of a share of 1,500 draws.
    assert abs((first[..., 1] == 5).mean() - 0.75) < 0.045
    assert ((first[..., 1] == 5) | (first[..., 1] == 6)).all()
    with pytest.raises(ZooError, match="the model has seen no codes yet"):
        task.generate(variables, jax.random.key(0), electrodes(NAMES), 3)


def trained(task: NextCode, batches: Any, steps: int, rate: float = 5e-3) -> tuple[Any, list[dict[str, float]]]:
    """The task's variables after some steps of Adam, and the metrics of each."""
    variables = nn.unbox(quick(task.init)(jax.random.key(0), batches(0)))
    rule = optax.adam(rate)

    @jax.jit
    def step(variables: Any, moments: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            value, metrics, new = task.loss({**variables, "params": params}, batch, jax.random.key(1), True)
            return value, ({**metrics, "loss": value}, new)

        (_, (metrics, new)), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, moments = rule.update(gradient, moments)
        params = optax.apply_updates(variables["params"], updates)
        return {**variables, **new, "params": params}, moments, metrics

    moments, figures = rule.init(variables["params"]), []
    for number in range(steps):
        variables, moments, metrics = step(variables, moments, batches(number))
        figures.append({name: float(value) for name, value in metrics.items()})
    return variables, figures


@pytest.mark.slow
def test_generated_waves_have_the_spectrum_of_real_ones():
    """Sines of 8 to 12 Hz in noise at 100 Hz: nearer in spectrum than the same tokens in any order."""
    from zoo.generate import shuffled, spectra, spectral_distance

    tokenizer: Any = create("quantile", vocabulary=24)

    def batches(number: int, size: int = 32) -> dict[str, Any]:
        rng = np.random.default_rng(number)
        cycles = rng.uniform(8, 12, (size, 2, 1)) * np.arange(100) / 100 + rng.uniform(size=(size, 2, 1))
        signal = np.sin(2 * np.pi * cycles) + 0.1 * rng.normal(size=cycles.shape)
        return {"signal": signal.astype(np.float32), "sensors": electrodes(NAMES[:2], size)}

    task = NextCode(
        options={"dim": 64, "mixers": ("sliding_window",), "mixer_options": {"sliding_window": {"window": 64}}}
    )
    task = task.using(tokenizer, tokenizer.fit(batches(1000)["signal"]))
    variables, figures = trained(task, batches, 250)
    assert figures[-1]["loss"] < 0.7 * figures[-1]["entropy"]
    batch = batches(1001)
    make = jax.jit(lambda own, key, sensors: task.generate(own, key, sensors, 200, sampler=TopP(0.95)))
    codes = np.asarray(make(variables, jax.random.key(1), batch["sensors"]))
    real = np.asarray(task.tokenised(variables, batch)[0])
    control = shuffled(real, np.random.default_rng(0), rows=2)

    def decoded(codes: Any) -> np.ndarray:
        return np.asarray(tokenizer.apply(task.frozen[1], codes, batch["sensors"], method="decode"))

    of_real = spectra(batch["signal"], 100.0)
    made, random = (spectral_distance(spectra(decoded(each), 100.0), of_real) for each in (codes, control))
    assert made < 0.5 * random, (made, random)


@pytest.mark.parametrize(
    ("task", "samples", "says"),
    [
        (NextCode(), 60, "wanted the folder of a run"),
        (NextCode(model="labram_tiny"), 60, "labram_tiny is no causal encoder of codes, such as next_codes_tiny"),
        (NextCode(model="codes_tiny"), 60, "codes_tiny is no causal encoder of codes"),
        (NextCode(), 10, "got windows of 1 frames and tail 0"),
        (NextCode(tail=6), 60, "got windows of 6 frames and tail 6"),
    ],
)
def test_what_does_not_fit_is_refused(task, samples, says, frozen):
    if "folder" not in says:
        task = task.using(TOKENIZER, frozen)
    batch = make_batch()
    with pytest.raises(ZooError, match=says):
        jax.eval_shape(task.init, jax.random.key(0), {**batch, "signal": batch["signal"][..., :samples]})


def test_no_frames_are_refused(task, variables):
    with pytest.raises(ZooError, match="got 0 frames, wanted at least 1"):
        task.generate(variables, jax.random.key(0), electrodes(NAMES), 0)
