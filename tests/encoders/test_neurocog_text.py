"""The recurrent classifier: what its recurrence reads, and labels that mean something beside labels that do not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from electrodes import electrodes
from quick import compiled, init

import zoo
from zoo.encoders.neurocog_text import prompt
from zoo.errors import ZooError

SMALL = {"channels": 3, "samples": 64, "filters": (4, 4, 8), "width": 8, "hidden": 8, "mixed": 8}
SENSORS = electrodes([""] * 3, 32)


def batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The channel with fast waves is the label."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, 32)
    signal = rng.normal(size=(32, 3, 64))
    signal[np.arange(32), label] += 2 * np.sin(2 * np.pi * (0.2 * np.arange(64) + rng.uniform(size=(32, 1))))
    return signal.astype(np.float32), label


def test_a_prompt_names_what_was_seen_in_order() -> None:
    assert "shown cat, then dog." in prompt(["cat", "dog"])


def test_windows_that_pools_use_up_are_refused() -> None:
    encoder = zoo.create("neurocog_text_tiny", **{**SMALL, "samples": 32})
    with pytest.raises(ZooError, match="leave nothing of 32 samples"):
        jax.eval_shape(encoder.init, jax.random.key(0), *encoder.example())


@pytest.mark.slow
def test_it_learns_labels_that_mean_something_and_not_those_drawn_at_random() -> None:
    encoder = zoo.create("neurocog_text_tiny", **SMALL, dropout=0.0)
    head = encoder.head(3)
    rule = optax.adam(3e-3)

    @compiled
    def step(params: Any, stats: Any, state: Any, signal: Any, label: Any) -> Any:
        def loss(params: Any) -> Any:
            out, new = encoder.apply(
                {"params": params["encoder"], **stats}, signal, SENSORS, train=True, mutable=["batch_stats"]
            )
            logits = head.apply(params["head"], out.pooled)
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), new

        grads, stats = jax.grad(loss, has_aux=True)(params)
        updates, state = rule.update(grads, state)
        return optax.apply_updates(params, updates), stats, state

    @compiled
    def told(params: Any, stats: Any, signal: Any) -> Any:
        pooled = encoder.apply({"params": params["encoder"], **stats}, signal, SENSORS).pooled
        return head.apply(params["head"], pooled).argmax(-1)

    first = init(encoder, batch(0)[0], SENSORS)

    def accuracy(random: bool) -> float:
        params = {"encoder": first["params"], "head": init(head, jnp.zeros((1, encoder.features)))}
        stats, state = {"batch_stats": first["batch_stats"]}, rule.init(params)
        for seed in range(120):
            signal, label = batch(seed)
            label = np.random.default_rng(seed).permutation(label) if random else label
            params, stats, state = step(params, stats, state, signal, label)
        return float(np.mean([np.mean(told(params, stats, batch(s)[0]) == batch(s)[1]) for s in range(500, 504)]))

    assert accuracy(random=False) > 0.8
    assert accuracy(random=True) < 0.55
