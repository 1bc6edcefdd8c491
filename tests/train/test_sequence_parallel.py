"""The loop's step with time split over eight devices is that of one: loss, gradients and parameters after three steps.

Errors are relative to the largest number of each array, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.collectives import moved
from benchmarks.sequence_parallel import NextToken, program
from zoo.encoders.sequence import SequenceModel
from zoo.train.config import Optimizer

QUICK = {"xla_backend_optimization_level": 0}
BATCH, FEATURES, TOKENS, DIM, STEPS = 2, 3, 128, 16, 3
# Where a gradient is nothing but rounding, Adam would divide it by itself: eps keeps what is small small.
OPTIMIZER = Optimizer(learning_rate=0.01, warmup_steps=1, eps=1e-3)

ENCODERS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "softmax": ("softmax", {"heads": 2}),
    "softmax both ways": ("softmax", {"heads": 2, "causal": False}),
    "gla": ("gla", {"heads": 2}),
    "native_sparse": (
        "native_sparse",
        {"heads": 2, "block_size": 8, "stride": 4, "compression_block": 8, "selected_blocks": 4, "window": 12},
    ),
    "titans": ("titans", {"heads": 2, "chunk": 8, "segment": 16, "persistent": 2, "expansion": 2}),
}


def batches() -> list[dict[str, np.ndarray]]:
    """Signals, and tokens that are not there in places of each row."""
    rng = np.random.default_rng(0)
    mask = np.ones((BATCH, TOKENS), bool)
    mask[0, 25:38] = mask[1, 5] = mask[1, 120:] = False
    signals = rng.standard_normal((STEPS, BATCH, FEATURES, TOKENS)).astype(np.float32)
    return [{"signal": signal, "mask": mask} for signal in signals]


def trained(name: str, devices: int, packed: bool) -> tuple[str, list[dict[str, float]], Any, Any]:
    """The compiled step, figures of each, gradients of the first, and the parameters after the last."""
    mixer, options = ENCODERS[name]
    model = SequenceModel(
        dim=DIM, mixers=(mixer,), features=FEATURES, convolution=4, mixer_options={mixer: options}, remat="full"
    )
    given = batches() if packed else [{"signal": batch["signal"]} for batch in batches()]
    made, place = program(NextToken(model, segments=packed), devices, given[0], OPTIMIZER)
    state, figures = made.initial(), []
    with jax.set_mesh(made.mesh), made.context():
        first = place(given[0])
        pull = jax.jit(lambda state, batch: made._gradient(state, batch, jax.random.key(0))[0])
        gradients = jax.device_get(pull.lower(state, first).compile(QUICK)(state, first))
        step = made.train_step.lower(state, first).compile(QUICK)
        for batch in given:
            state, metrics = step(state, place(batch))
            figures.append({key: float(value) for key, value in metrics.items()})
    return step.as_text(), figures, gradients, jax.device_get(state.params)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_eight_devices_train_as_one(name, packed):
    (_, wanted, *trees), (text, got, *others) = (trained(name, devices, packed) for devices in (1, 8))
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(others), jax.tree.leaves(trees), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    # Nothing as large as the tokens of a layer is brought together.
    gathered = [size for kind in ("all-gather", "all-to-all") for size in moved(text).get(kind, [])]
    assert max(gathered, default=0) < BATCH * TOKENS * DIM / 2
    assert wanted[0]["loss"] != pytest.approx(wanted[-1]["loss"], rel=1e-3)
