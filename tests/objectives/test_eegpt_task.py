"""EEGPT's alignment and reconstruction."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from electrodes import electrodes

from zoo.encoders.eegpt import CHANNELS, VARIANTS
from zoo.errors import ZooError
from zoo.objectives.eegpt import AlignAndReconstruct

QUICK = {"xla_backend_optimization_level": 0}
NAMES = ("CZ", "FP1", "O2", "PZ")
SMALL = {"dim": 16, "heads": 2, "summaries": 2, "depth": 1, "patch": 16, "stride": 16}


@pytest.mark.parametrize(
    ("size", "predictor", "reconstructor", "parts", "total"),
    [
        ("tiny1", 2, 4, (108_288, 108_480, 212_416), None),
        pytest.param("tiny3", 8, 8, None, 1_229_312, marks=pytest.mark.slow),
        pytest.param("little", 8, 8, None, 4_842_432, marks=pytest.mark.slow),
        pytest.param("base1", 6, 6, None, 14_480_192, marks=pytest.mark.slow),
        pytest.param("base2", 8, 8, None, 19_220_288, marks=pytest.mark.slow),
        pytest.param("base3", 6, 6, None, 57_665_088, marks=pytest.mark.slow),
        ("large", 8, 8, (25_287_168, 25_747_456, 25_547_840), 76_582_464),
    ],
)
def test_published_counts(size: str, predictor: int, reconstructor: int, parts: Any, total: int | None):
    task = AlignAndReconstruct(f"eegpt_{size}", predictor_depth=predictor, reconstructor_depth=reconstructor)
    batch = {"signal": np.zeros((1, 2, 1024), np.float32), "sensors": electrodes(NAMES[:2], 1)}
    params = jax.eval_shape(task.init, jax.random.key(0), batch)["params"]
    counts = [sum(leaf.size for leaf in jax.tree.leaves(params[part])) for part in ("encoder", "predictor", "rebuild")]
    assert counts[0] == VARIANTS[f"eegpt_{size}"][1]
    assert parts in (None, tuple(counts))
    assert total in (None, sum(counts))


def test_masks_are_the_published_ones():
    task = AlignAndReconstruct("eegpt_tiny")
    sensors = electrodes(CHANNELS[:58], 64)
    sensors.valid[:, -8:] = False
    kept, asked = map(
        np.asarray, task.masks(jax.random.key(0), {"signal": np.zeros((64, 58, 1024)), "sensors": sensors})
    )
    shown = kept.any(1)
    assert shown.any(1).all()
    assert abs(shown.mean() - 0.5) < 0.05
    assert (kept.sum(1)[shown] == 12).all()
    assert not (kept | asked)[:, -8:].any()
    assert not (kept & asked).any()
    whole = np.broadcast_to(~shown[:, None], asked.shape)[:, :50]
    assert asked[:, :50][whole].all()
    left = ~whole & ~kept[:, :50]
    assert abs(asked[:, :50][left].mean() - 0.2) < 0.02


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any, Any]:
    task = AlignAndReconstruct(
        "eegpt_tiny", SMALL, predictor_depth=1, reconstructor_depth=1, visible=2, steps=150, momentum=(0.9, 1.0)
    )
    rng = np.random.default_rng(0)
    waves = np.sin(np.arange(64) * 0.4 + rng.uniform(0, 6, (8, 4, 1))) + 0.1 * rng.normal(size=(8, 4, 64))
    batch = {"signal": waves.astype(np.float32), "sensors": electrodes(NAMES, 8)}
    return task, nn.unbox(jax.jit(task.init, compiler_options=QUICK)(jax.random.key(0), batch)), batch


@pytest.fixture(scope="module")
def learn(made) -> Any:
    task, _, batch = made

    def loss(params: Any, target: Any, key: Any) -> Any:
        value, metrics, new = task.loss({"params": params, "target": target}, batch, key, True)
        return value, (metrics, new)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True), compiler_options=QUICK)


def test_no_gradient_reaches_the_average_which_moves_by_itself(made, learn):
    _, variables, _ = made
    moved = jax.tree.map(lambda leaf: leaf + 0.01, variables["params"])
    (_, (metrics, new)), (grads, of_target) = learn(moved, variables["target"], jax.random.key(1))
    assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(of_target["params"]))
    norms = [np.abs(leaf).max() for leaf in jax.tree.leaves(grads)]
    assert np.isfinite(norms).all()
    assert metrics["weight"] == 8
    old = variables["target"]["params"]["embed_summary"]
    np.testing.assert_allclose(new["target"]["params"]["embed_summary"], old + 0.1 * 0.01, atol=1e-6)
    assert new["target"]["step"] == 1


@pytest.mark.slow
def test_both_errors_fall(made, learn):
    _, variables, _ = made
    params, target = variables["params"], variables["target"]
    optimiser = optax.adam(1e-2)
    state, seen = optimiser.init(params), []
    apply = jax.jit(lambda g, s, p: (lambda u: (optax.apply_updates(p, u[0]), u[1]))(optimiser.update(g, s, p)))
    for number in range(150):
        (_, (metrics, new)), (grads, _) = learn(params, target, jax.random.key(number))
        params, state = apply(grads, state, params)
        target = new["target"]
        seen.append((float(metrics["alignment"]), float(metrics["reconstruction"])))
    first, last = np.mean(seen[:3], axis=0), np.mean(seen[-3:], axis=0)
    assert (last < 0.8 * first).all(), (first, last)


def test_another_encoder_is_refused_and_a_recording_of_another_rate():
    with pytest.raises(ZooError, match="labram_tiny has no summaries"):
        AlignAndReconstruct("labram_tiny").encoder()
    with pytest.raises(ZooError, match="wanted 256 Hz"):
        AlignAndReconstruct().check_recording(200.0, ("eeg",), ("CZ",))
    assert AlignAndReconstruct().flops({"signal": np.zeros((2, 20, 256))}) > 0
