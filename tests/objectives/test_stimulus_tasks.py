"""Speech, MEG-to-image and NeuroBridge decoding: their losses, and a known answer that each learns."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from electrodes import electrodes

from zoo.errors import ZooError
from zoo.evaluate.retrieval import ranks, retrieval
from zoo.objectives.meg_image import MEGImageDecoding, growing
from zoo.objectives.neurobridge import NeuroBridgeDecoding, held_out, smoothed_once
from zoo.objectives.speech import SpeechDecoding

NAMES = ("FZ", "C4", "OZ", "C3")
CONV: dict[str, Any] = {
    "virtual": 8,
    "frequencies": 3,
    "radius": 0.0,
    "mixed": 8,
    "width": 16,
    "depth": 2,
    "outputs": 6,
}
SPEECH = SpeechDecoding(options=CONV)
IMAGE = MEGImageDecoding(options={**CONV, "samples": 20}, projection=(16,))
BRIDGE = NeuroBridgeDecoding(options={"channels": NAMES, "samples": 20, "dim": 16}, width=8)
TASKS = [pytest.param(task, id=type(task).__name__) for task in (SPEECH, IMAGE, BRIDGE)]


def batch(task: Any, seed: int = 0, size: int = 16) -> dict[str, Any]:
    """Channels that are mixtures of what the stimulus is, in noise."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(4, 6))
    over_time = rng.normal(size=(size, 20, 6)).astype(np.float32)
    if task is not SPEECH:  # an image stays
        over_time = np.broadcast_to(over_time[:, :1], over_time.shape)
    signal = np.einsum("cf,btf->bct", mixing, over_time) + 0.1 * rng.normal(size=(size, 4, 20))
    if task is IMAGE:
        target = over_time[:, 0]
    else:
        target = over_time if task is SPEECH else np.repeat(over_time[:, :1], 3, axis=1)
    return {"signal": signal.astype(np.float32), "sensors": electrodes(NAMES, size), "target": np.asarray(target)}


MADE: dict[str, tuple[Any, Any]] = {}
"""What `prepared` made, so that each program is compiled once."""


def prepared(task: Any) -> tuple[Any, Any]:
    """The task's variables, and its loss as a program."""
    name = type(task).__name__
    if name not in MADE:
        MADE[name] = _prepared(task)
    return MADE[name]


def _prepared(task: Any) -> tuple[Any, Any]:
    quick = {"xla_backend_optimization_level": 0}
    variables = nn.meta.unbox(jax.jit(task.init, compiler_options=quick)(jax.random.key(0), batch(task)))
    return variables, jax.jit(task.loss, static_argnames="train", compiler_options=quick)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_it_learns_which_stimulus_it_was(task):
    variables, loss = prepared(task)
    before, _, _ = loss(variables, batch(task, 1000), jax.random.key(0), train=False)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(variables: Any, opt: Any, given: Any, key: Any) -> Any:
        def of(params: Any) -> Any:
            value, _, new = task.loss({**variables, "params": params}, given, key, train=True)
            return value, new

        grads, new = jax.grad(of, has_aux=True)(variables["params"])
        updates, opt = optimizer.update(grads, opt)
        return {**variables, **new, "params": optax.apply_updates(variables["params"], updates)}, opt

    opt = optimizer.init(variables["params"])
    for n in range(60):
        variables, opt = step(variables, opt, batch(task, n), jax.random.key(n))
    after, metrics, _ = loss(variables, batch(task, 1000), jax.random.key(0), train=False)
    assert after < 0.7 * before
    assert metrics["weight"] == 16
    found = metrics["top1" if task is SPEECH else "image_retrieval"]
    assert found > 3 / 16  # one of sixteen by chance


@pytest.mark.parametrize("task", TASKS)
def test_statistics_move_only_in_training(task):
    variables, loss = prepared(task)
    _, _, new = loss(variables, batch(task), jax.random.key(0), train=True)
    assert new.keys() == variables.keys() - {"params"}
    _, _, none = loss(variables, batch(task), jax.random.key(0), train=False)
    assert none == {}


@pytest.mark.parametrize("task", TASKS)
def test_the_same_stimulus_is_no_wrong_answer(task):
    variables, loss = prepared(task)
    given = batch(task)
    value, metrics, _ = loss(variables, given, jax.random.key(0), train=False)
    alone, without, _ = loss(variables, {**given, "segment": np.zeros(16, int)}, jax.random.key(0), train=False)
    rest = 0.25 * metrics["regression"] if task is IMAGE else 0
    assert value - rest > 0.1
    np.testing.assert_allclose(alone - rest, 0, atol=1e-5)
    assert without.keys() == metrics.keys()


def test_speech_scores_are_products_with_sounds_of_length_one():
    variables, loss = prepared(SPEECH)
    given = batch(SPEECH)
    value, _, _ = loss(variables, given, jax.random.key(0), train=False)
    inner = {name: each["encoder"] for name, each in variables.items()}
    tokens = np.asarray(SPEECH.encoder().apply(inner, given["signal"], given["sensors"]).tokens)
    norms = np.linalg.norm(given["target"].reshape(16, -1), axis=1)
    scores = np.einsum("btf,otf->bo", tokens, given["target"]) / norms
    log_probs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    np.testing.assert_allclose(value, -np.diagonal(log_probs).mean(), rtol=1e-4)


def test_the_image_loss_is_the_weighed_sum_of_its_terms():
    variables, loss = prepared(IMAGE)
    given = batch(IMAGE)
    value, metrics, _ = loss(variables, given, jax.random.key(0), train=False)
    predicted = IMAGE.predict(variables, given["signal"], given["sensors"])
    error = np.square(np.asarray(predicted["regression"]) - given["target"]).mean()
    np.testing.assert_allclose(metrics["regression"], error, rtol=1e-5)
    np.testing.assert_allclose(value, 0.75 * metrics["contrast"] + 0.25 * error, rtol=1e-5)
    np.testing.assert_allclose(metrics["scale"], 1 / 0.07, rtol=1e-5)


def test_bridge_logits_and_retrieval_by_cosine():
    variables, loss = prepared(BRIDGE)
    given = batch(BRIDGE)
    value, metrics, _ = loss(variables, given, jax.random.key(0), train=False)
    ours = np.asarray(BRIDGE.of_signals(variables, given["signal"], given["sensors"]))
    theirs = np.asarray(BRIDGE.of_images(variables, given["target"]))
    theirs = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
    logits = 14.2857 * ours @ theirs.T
    both = [-np.diagonal(each - np.log(np.exp(each).sum(1, keepdims=True))).mean() for each in (logits, logits.T)]
    np.testing.assert_allclose(value, np.mean(both), rtol=1e-4)
    cosines = ours / np.linalg.norm(ours, axis=1, keepdims=True) @ theirs.T
    np.testing.assert_allclose(metrics["image_retrieval"], (ranks(cosines) < 2).mean(), atol=1e-6)


def test_shuffled_pairs_are_found_by_chance():
    """200 ways, as in the paper: .5 % and 2.5 %."""
    rng = np.random.default_rng(0)
    scores = [rng.normal(size=(200, 200)) for _ in range(20)]
    found = retrieval(scores, top=(1, 5), permutations=200)
    assert found.chance == pytest.approx({1: 0.005, 5: 0.025})
    for k, chance in found.chance.items():
        assert found.top[k].low <= chance <= found.top[k].high
    assert found.p > 0.01


def test_a_channel_is_smoothed_or_left():
    signal = np.random.default_rng(0).normal(size=(50, 4, 9)).astype(np.float32)
    smooth = smoothed_once(signal, share=0.3)
    same = (smooth == signal).all(-1)
    assert 0.6 < same.mean() < 0.8
    row, channel = np.argwhere(~same)[0]
    wanted = [signal[row, channel, max(0, t - 2) : t + 3].mean() for t in range(9)]
    np.testing.assert_allclose(smooth[row, channel], wanted, atol=1e-6)
    np.testing.assert_array_equal(smooth, smoothed_once(signal, share=0.3))
    with pytest.raises(ZooError, match="width: got 4"):
        smoothed_once(signal, width=4)


def test_concepts_are_held_out_whole():
    concept = np.repeat(np.arange(30), 7)
    apart = held_out(concept, share=0.2)
    assert len(np.unique(concept[apart])) == 6
    assert not set(concept[apart]) & set(concept[~apart])


def test_growing_windows_know_nothing_of_what_is_to_come():
    signal = np.random.default_rng(0).normal(size=(2, 3, 10))
    grown = growing(signal, np.array([0, 4, 10]))
    assert grown.shape == (3, 2, 3, 10)
    assert not grown[0].any()
    np.testing.assert_array_equal(grown[1][..., :4], signal[..., :4])
    assert not grown[1][..., 4:].any()
    np.testing.assert_array_equal(grown[2], signal)
    with pytest.raises(ZooError, match="ends 0 to 11"):
        growing(signal, np.array([0, 11]))


def test_bad_tasks_are_refused():
    for task, given, says in (
        (SpeechDecoding("labram_vqnsp_tiny"), batch(SPEECH), "not an encoder"),
        (SPEECH, {**batch(SPEECH), "target": jnp.zeros((16, 20, 7))}, "features of sound"),
        (SPEECH, {name: each for name, each in batch(SPEECH).items() if name != "target"}, "stimulus of each example"),
        (MEGImageDecoding(options=dict(IMAGE.options), contrast=1.5), batch(IMAGE), "task.contrast: got 1.5"),
    ):
        with pytest.raises(ZooError, match=says):
            jax.eval_shape(task.init, jax.random.key(0), given)
