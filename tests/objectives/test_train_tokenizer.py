"""The task that trains tokenizers: its loss, its figures, its codebooks over steps, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from patch_tokenizer import ENTRY, NAME

from zoo import registry
from zoo.errors import ZooError
from zoo.objectives.train_tokenizer import TrainTokenizer, code_health, r_squared
from zoo.train.checkpoint import Checkpoints
from zoo.train.config import Config, Mesh, Optimizer, Rules, Train
from zoo.train.mesh import AXES, BatchPlacer
from zoo.train.state import Program, State
from zoo.types import Sensors

BATCH, CHANNELS, SAMPLES = 8, 3, 40


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._ENTRIES, NAME, ENTRY)
        yield


def batch(seed: int = 0) -> dict[str, Any]:
    """Waves in noise; the last channel of the last example is missing."""
    rng = np.random.default_rng(seed)
    time = np.arange(SAMPLES)
    signal = np.sin(time * rng.uniform(0.1, 1, (BATCH, CHANNELS, 1))) + 0.3 * rng.normal(
        size=(BATCH, CHANNELS, SAMPLES)
    )
    valid = np.ones((BATCH, CHANNELS), bool)
    valid[-1, -1] = False
    blank = np.full((BATCH, CHANNELS, 3), np.nan, np.float32)
    number = np.zeros((BATCH, CHANNELS), np.int32)
    sensors = Sensors(blank, blank, number, number, valid)
    return {"signal": signal.astype(np.float32), "sensors": sensors, "record": np.arange(BATCH, dtype=np.int32)}


def program(task: TrainTokenizer, devices: int = 1, **train: Any) -> Program:
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:devices]).reshape(1, devices, 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 5
    )
    options = Train(**{"steps": 20, **train})
    config = Config(task=task, optimizer=Optimizer(warmup_steps=2, learning_rate=0.02), train=options, mesh=Mesh())
    return Program(config, task, mesh, placer(mesh, options.accumulate).abstract(batch()))


def placer(mesh: Any, accumulate: int) -> BatchPlacer:
    return BatchPlacer(mesh, Rules(), BATCH, accumulate)


def steps(made: Program, state: State, numbers: Any) -> tuple[State, list[dict[str, float]]]:
    place, figures = placer(made.mesh, made.config.train.accumulate), []
    with jax.set_mesh(made.mesh), made.context():
        for number in numbers:
            state, metrics = made.train_step(state, place(batch(number)))
            figures.append({name: float(value) for name, value in metrics.items()})
    return state, figures


def assert_equal(found: Any, wanted: Any) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


# The loss and its figures


@pytest.fixture(params=["ema", "gradient"], scope="module")
def task(request: pytest.FixtureRequest) -> TrainTokenizer:
    return TrainTokenizer(NAME, options={"learning": request.param})


def test_the_loss_is_the_weighed_sum_of_what_the_tokenizer_computes(task):
    given, key = jax.tree.map(jnp.asarray, batch()), jax.random.key(0)
    variables = nn.unbox(jax.jit(task.init)(key, given))
    for weights in ({}, {"commitment": 3.0}):
        chosen = TrainTokenizer(NAME, task.options, weights)
        value, metrics, new = jax.jit(chosen.loss, static_argnums=3)(variables, given, key, False)
        out = jax.jit(chosen.module().apply)(variables, given["signal"], given["sensors"])
        expected = {**chosen.module().loss_weights, **weights}
        assert set(out.losses) == set(expected)
        np.testing.assert_allclose(value, sum(expected[name] * out.losses[name] for name in expected), rtol=1e-6)
        for name in expected:
            np.testing.assert_allclose(metrics[name], out.losses[name], rtol=1e-6)
        assert metrics["weight"] == (BATCH * CHANNELS - 1) * SAMPLES / 10
        assert new == {}
    assert chosen.flops(given) == BATCH * chosen.module().flops(CHANNELS, SAMPLES) > 0


@pytest.mark.slow
def test_perplexity_and_live_share_count_each_codebook_alone():
    codes = np.array([[[0, 0], [1, 0], [2, 0], [3, 0], [-1, -1]]])  # four codes alike of 8; one code of 2
    perplexity, live = code_health(codes, (8, 2))
    np.testing.assert_allclose(perplexity, (4 + 1) / 2, rtol=1e-6)
    np.testing.assert_allclose(live, 5 / 10)
    left_out = codes.copy()
    left_out[..., 1] = -1
    np.testing.assert_allclose(code_health(left_out, (8, 2)), ((4 + 1) / 2, 4 / 10), rtol=1e-6)


def test_r_squared_is_of_valid_channels_about_their_means():
    given = batch()
    signal, valid = given["signal"] + 5.0, given["sensors"].valid
    spoiled = np.where(valid[:, :, None], signal, np.nan)
    assert r_squared(spoiled, spoiled, valid) == 1.0
    mean = np.broadcast_to(signal.mean(-1, keepdims=True), signal.shape)
    np.testing.assert_allclose(r_squared(signal, mean, valid), 0.0, atol=1e-5)
    halved = mean + 0.5 * (signal - mean)
    np.testing.assert_allclose(r_squared(signal, halved, valid), 0.75, atol=1e-5)


# Codebooks over steps


@pytest.fixture(scope="module")
def run(task: TrainTokenizer) -> tuple[Program, State, list[dict[str, float]]]:
    """A program with two micro-batches a step, its state after twelve steps, and their figures."""
    made = program(task, accumulate=2)
    return made, *steps(made, made.initial(), range(12))


def test_training_lowers_the_loss_and_moves_the_codebooks(run):
    made, state, figures = run
    assert figures[-1]["loss"] < 0.8 * figures[1]["loss"]
    assert figures[-1]["r2"] > figures[0]["r2"]
    assert {"waveform", "commitment", "perplexity", "live_share", "r2"} <= set(figures[-1])
    before, after = (each.collections["codebooks"]["quantizer"]["book"] for each in (made.initial(), state))
    assert after["ready"].all()
    assert (after["usage"] != before["usage"]).any()
    assert np.abs(after["embedding"]).max() > 0


def test_validation_changes_nothing_and_repeats(run):
    made, state, _ = run
    kept = jax.device_get(state)
    with jax.set_mesh(made.mesh), made.context():
        given = placer(made.mesh, 2)(batch(9))
        one, two = (jax.device_get(made.validate(state, given)) for _ in range(2))
    assert_equal(one, two)
    assert_equal(state, kept)


def test_a_run_that_was_stopped_goes_on_bit_for_bit_with_its_codebooks(run, tmp_path):
    made, state, figures = run
    half, _ = steps(made, made.initial(), range(6))
    saved = Checkpoints(tmp_path / "checkpoints", keep_last=1)
    saved.save(6, half, None)
    saved.close()
    restored = Checkpoints(tmp_path / "checkpoints").restore(6, made.abstract())
    resumed, rest = steps(made, restored, range(6, 12))
    assert_equal(resumed, state)
    assert rest == figures[6:]


@pytest.mark.slow
def test_eight_devices_train_as_one():
    task, results = TrainTokenizer(NAME), []
    for devices in (1, 8):
        made = program(task, devices)
        results.append(steps(made, made.initial(), range(4)))
    (one, wanted), (eight, found) = results
    for name in wanted[0]:
        np.testing.assert_allclose(
            [each[name] for each in found], [each[name] for each in wanted], rtol=1e-4, atol=1e-5, err_msg=name
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(eight.collections), jax.tree.leaves(one.collections), strict=True)
    for (path, a), b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path))


# What it refuses


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (TrainTokenizer("patch_tokeniser"), "no model is called 'patch_tokeniser'; the nearest name is 'patch_token"),
        (TrainTokenizer("labram_tiny"), "task.tokenizer: labram_tiny is not a tokenizer, such as"),
        (TrainTokenizer(NAME, {"code": 3}), "patch_tokenizer has no option 'code'; the nearest is 'codes'"),
        (TrainTokenizer(NAME, {}, {"comitment": 1.0}), "has no loss 'comitment'; the nearest is 'commitment'"),
        (TrainTokenizer(NAME, dtype="bfloat16"), "patch_tokenizer has no option 'dtype'"),
        (TrainTokenizer("mu_law"), "mu_law has nothing to train; `zoo tokenize DATASET --tokenizer mu_law OUT` fits"),
        (TrainTokenizer(NAME, {"patch": 7}), "got a window of 40 samples, wanted a multiple of 7"),
    ],
)
def test_what_cannot_be_trained_is_refused(task, says):
    with pytest.raises(ZooError, match=says):
        task.init(jax.random.key(0), batch())


def test_recordings_are_checked_by_the_tokenizer():
    task = TrainTokenizer(NAME)
    task.check_recording(100.0, ("eeg",), ("FP1",))
    with pytest.raises(ZooError, match="got a signal at 200 Hz, wanted 100 Hz"):
        task.check_recording(200.0, ("eeg",), ("FP1",))
    with pytest.raises(ZooError, match="got channels of kind 'mag', takes eeg"):
        task.check_recording(100.0, ("eeg", "mag"), ("FP1", ""))


def test_sensors_without_a_place_are_refused_by_a_tokenizer_that_needs_it():
    sensors = batch()["sensors"]
    TrainTokenizer(NAME).check_positions(sensors)
    with pytest.raises(ZooError, match="position"):
        TrainTokenizer("braintokenizer_tiny").check_positions(sensors)
