"""Learning from labels: losses against plain numpy and PyTorch's definitions, and the task on a signal that tells."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from electrodes import electrodes
from quick import compiled

from zoo.errors import ZooError
from zoo.objectives.supervised import (
    Supervised,
    accuracies,
    binary_cross_entropy,
    class_weights,
    cross_entropy,
    ordinal_labels,
)

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, 3)).astype(np.float32)
LABEL = np.array([0, 2, -1, 1, 2, 2])
NAMES = ("F3", "FZ", "F4", "P3")
TASK = Supervised("eegnet_tiny", {"channels": NAMES, "samples": 64}, classes=3, smoothing=0.1)


def log_probs(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def test_cross_entropy_smooths_and_weighs_as_defined() -> None:
    rows = LABEL >= 0
    hard = np.eye(3)[LABEL[rows]]
    each = log_probs(LOGITS.astype(float))[rows]
    np.testing.assert_allclose(cross_entropy(LOGITS, LABEL), -(hard * each).sum(1).mean(), rtol=1e-5)
    soft = 0.8 * hard + 0.2 / 3
    np.testing.assert_allclose(cross_entropy(LOGITS, LABEL, smoothing=0.2), -(soft * each).sum(1).mean(), rtol=1e-5)
    weights = np.array([3.0, 1.0, 0.5])
    weighed = -(weights[LABEL[rows]] * (hard * each).sum(1)).sum() / weights[LABEL[rows]].sum()
    np.testing.assert_allclose(cross_entropy(LOGITS, LABEL, weights=weights), weighed, rtol=1e-5)
    assert cross_entropy(LOGITS, np.full(6, -1)) == 0


def test_classes_in_an_order_share_with_their_neighbours() -> None:
    soft = np.asarray(ordinal_labels(LABEL, 3))
    wanted = np.exp(-0.5 * ((np.arange(3) - 2) / 0.5) ** 2)
    np.testing.assert_allclose(soft[1], wanted / wanted.sum(), rtol=1e-5)
    assert not soft[2].any()
    np.testing.assert_allclose(
        cross_entropy(LOGITS[:2], soft[:2]), -(soft[:2] * log_probs(LOGITS[:2])).sum(1).mean(), rtol=1e-5
    )
    np.testing.assert_allclose(
        cross_entropy(LOGITS, soft), cross_entropy(np.delete(LOGITS, 2, 0), np.delete(soft, 2, 0)), rtol=1e-5
    )


def test_one_logit_is_two_classes() -> None:
    label, logit = np.array([0, 1, -1, 1, 0, 1]), LOGITS[:, 0]
    two = np.stack([0 * logit, logit], axis=1)
    np.testing.assert_allclose(binary_cross_entropy(logit, label), cross_entropy(two, label), rtol=1e-5)
    np.testing.assert_allclose(
        binary_cross_entropy(logit, label, smoothing=0.1), cross_entropy(two, label, smoothing=0.1), rtol=1e-5
    )
    positive = log_probs(two.astype(float))[label == 1, 1].sum()
    negative = log_probs(two.astype(float))[label == 0, 0].sum()
    np.testing.assert_allclose(
        binary_cross_entropy(logit, label, positive_weight=4.0), -(4 * positive + negative) / 5, rtol=1e-5
    )


def test_rare_classes_weigh_more() -> None:
    np.testing.assert_allclose(class_weights(LABEL, 3), [5 / 3, 5 / 3, 5 / 9])
    with pytest.raises(ZooError, match=r"got \[1, 1, 3, 0\] examples of the classes"):
        class_weights(LABEL, 4)


def test_accuracy_counts_labelled_rows_and_balances_the_classes_that_are_there() -> None:
    found = accuracies(np.array([0, 2, 0, 0, 2, 0]), LABEL, 5)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["balanced_accuracy"] == pytest.approx((1 + 0 + 2 / 3) / 3)


def make_batch(rows: int = 48, seed: int = 0) -> dict[str, Any]:
    """Noise with a wave on one channel, that of the label; row 5 has no label."""
    rng = np.random.default_rng(seed)
    label = rng.integers(3, size=rows).astype(np.int32)
    signal = rng.normal(size=(rows, len(NAMES), 64)).astype(np.float32)
    signal[np.arange(rows), label] += np.sin(np.arange(64) / 2)
    label[5] = -1
    return {"signal": signal, "sensors": electrodes(NAMES, rows), "label": label, "subject": np.zeros(rows, np.int32)}


def test_the_task_learns_and_leaves_statistics_behind() -> None:
    batch = make_batch()
    variables = nn.unbox(compiled(TASK.init)(jax.random.key(0), batch))
    rule = optax.adam(0.01)

    def step(variables: Any, moments: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            value, metrics, new = TASK.loss({**variables, "params": params}, batch, key, True)
            return value, (metrics, new)

        (value, (metrics, new)), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, moments = rule.update(gradient, moments)
        return {"params": optax.apply_updates(variables["params"], updates), **new}, moments, value, metrics

    run, moments = compiled(step), rule.init(variables["params"])
    first = None
    for count in range(60):
        variables, moments, value, metrics = run(variables, moments, jax.random.key(count))
        first = value if first is None else first
    assert metrics["weight"] == 47
    assert value < 0.6 * first
    assert variables["batch_stats"]["encoder"]
    held = make_batch(seed=1)
    value, metrics, new = compiled(lambda v, b: TASK.loss(v, b, jax.random.key(0), False))(variables, held)
    assert metrics["balanced_accuracy"] > 0.8
    assert not new
    probability = np.asarray(compiled(TASK.predict)(variables, held))
    np.testing.assert_allclose(probability.sum(1), 1, rtol=1e-5)
    right = probability.argmax(1) == held["label"]
    assert metrics["accuracy"] == pytest.approx(right[held["label"] >= 0].mean())


@pytest.mark.slow
def test_weights_of_classes_are_the_weight_of_a_batch() -> None:
    batch = make_batch(8)
    task = dataclasses.replace(TASK, class_weights=(1.0, 2.0, 4.0))
    variables = nn.unbox(compiled(task.init)(jax.random.key(0), batch))

    def parts(batch: Any) -> Any:
        return task.loss(variables, batch, jax.random.key(0), False)[:2]

    whole, metrics = compiled(parts)(batch)
    assert metrics["weight"] == sum((1.0, 2.0, 4.0)[each] for each in batch["label"] if each >= 0)
    halves = [compiled(parts)(jax.tree.map(lambda x, rows=rows: x[rows], batch)) for rows in (slice(0, 4), slice(4, 8))]
    weights = [part["weight"] for _, part in halves]
    np.testing.assert_allclose(np.average([value for value, _ in halves], weights=weights), whole, rtol=1e-5)


def test_an_adapter_stands_before_the_encoder() -> None:
    task = dataclasses.replace(TASK, channels="learned", inputs=7)
    batch = {"signal": np.zeros((2, 7, 64), np.float32), "sensors": electrodes(("",) * 7)}
    shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
    assert nn.unbox(shapes)["params"]["encoder"]["adapter"]["mix"]["kernel"].shape == (1, 7, 4)
    task.check_recording(128.0, ("eeg",) * 7, ("",) * 7)
    with pytest.raises(ZooError, match="got 6 channels, wanted 7"):
        task.check_recording(128.0, ("eeg",) * 6, ("",) * 6)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ZooError, match="got 3, windows have 2, face, house"):
        TASK.check_labels(("face", "house"), 1)
    with pytest.raises(ZooError, match="class_weights: got 2 of them, wanted 3"):
        dataclasses.replace(TASK, class_weights=(1.0, 2.0)).check_labels(("a", "b", "c"), 1)
    with pytest.raises(ZooError, match="is not an encoder of signals"):
        Supervised("labram_vqnsp_tiny").encoder()
    with pytest.raises(ZooError, match="wanted the names of those to lead to"):
        Supervised("labram_tiny", channels="interpolate").encoder()
