"""The loop around the step: what is reported when, what is saved, and how it ends."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import BATCH, CHANNELS, SAMPLES, toy_batch, toy_program

from zoo.errors import ZooError
from zoo.train.checkpoint import Checkpoints
from zoo.train.cluster import Cluster
from zoo.train.loop import fit
from zoo.train.mesh import BatchPlacer
from zoo.train.stop import Stopped


class Batches:
    """Stands in for the loader: the toy's batches, spoilt at a step when asked to."""

    batch_size, samples_per_batch = BATCH, BATCH * CHANNELS * SAMPLES

    def __init__(self, spoilt: int = 0, spoil: float = math.nan) -> None:
        self.given, self.spoilt, self.spoil = 0, spoilt, spoil

    def at(self, step):
        while True:
            batch = toy_batch(step)
            self.given = step = step + 1
            if step == self.spoilt:
                batch["signal"][:] = self.spoil
            yield batch


class Sink:
    """Keeps what is written, and does something at every step when asked to."""

    def __init__(self, at_step=lambda step: None) -> None:
        self.lines, self.at_step = [], at_step

    def write(self, step, figures):
        self.lines.append((step, dict(figures)))
        self.at_step(step)


@functools.cache
def compiled(**options):
    """A program of the toy and its compiled steps, for all tests that ask for the same."""
    program = toy_program(train={"checkpoint_every": 6, **options})
    return program, program.compile()


def train(folder, loader=None, validation=None, sink=None, **options):
    """A run of 20 steps in `folder`; returns its state and its checkpoints."""
    program, steps = compiled(**options)
    config = dataclasses.replace(program.config, runs=folder, name="toy")
    place = BatchPlacer(program.mesh, config.rules, BATCH, 1)
    checkpoints = Checkpoints(config.folder / "checkpoints", 9, 0)
    state = program.initial()
    if checkpoints.latest:
        state = checkpoints.restore(checkpoints.latest, program.abstract())
    sinks = [sink or Sink()]
    loader = loader or Batches()
    cluster = Cluster(config)
    return fit(config, program, steps, state, loader, validation, place, checkpoints, sinks, cluster), checkpoints


def test_every_step_is_written_once_and_one_step_late(tmp_path):
    loader = Batches()
    ahead = []
    sink = Sink(lambda step: ahead.append(loader.given - step))
    _, checkpoints = train(tmp_path, loader, sink=sink)
    assert [step for step, _ in sink.lines] == list(range(1, 21))
    # Only before a checkpoint does the loop wait for the step itself.
    assert [step for step, late in enumerate(ahead, start=1) if late == 0] == checkpoints.steps == [6, 12, 18, 20]
    assert set(ahead) == {0, 1}


def test_figures_of_a_step(tmp_path):
    sink = Sink()
    train(tmp_path, validation=Batches(), sink=sink, validate_every=10, validate_batches=2)
    names = {"loss", "twice", "weight", "gradient_norm", "learning_rate", "step_seconds", "examples_per_second"}
    names |= {"signal_samples_per_second", "loader_wait_share"}
    assert all(figures.keys() - {"validation_loss"} == names for _, figures in sink.lines)
    assert [step for step, figures in sink.lines if "validation_loss" in figures] == [10, 20]
    for _, figures in sink.lines:
        assert figures["twice"] == pytest.approx(2 * figures["loss"])
        assert figures["signal_samples_per_second"] == pytest.approx(
            figures["examples_per_second"] * CHANNELS * SAMPLES
        )
        assert 0 <= figures["loader_wait_share"] <= 1


def test_the_validation_loss_is_a_mean_by_weight_over_the_same_batches(tmp_path):
    sink = Sink()
    state, _ = train(tmp_path, validation=Batches(), sink=sink, validate_every=20, validate_batches=2)
    program, (_, validate) = compiled(validate_every=20, validate_batches=2)
    place = BatchPlacer(program.mesh, program.config.rules, BATCH, 1)
    parts = [validate(state, place(toy_batch(step))) for step in (0, 1)]
    weight, loss = (np.array([float(part[name]) for part in parts]) for name in ("weight", "loss"))
    assert sink.lines[-1][1]["validation_loss"] == pytest.approx((weight * loss).sum() / weight.sum(), rel=1e-6)


@pytest.mark.parametrize(("step", "good"), [(3, "none"), (6, "none"), (7, "step 6"), (12, "step 6")])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(step, good, tmp_path):
    sink = Sink()
    with pytest.raises(ZooError) as raised:
        train(tmp_path, Batches(spoilt=step), sink=sink)
    records = list(range(100 * (step - 1), 100 * (step - 1) + BATCH))
    assert (
        str(raised.value) == f"the loss of step {step} is nan; its records were {records}; last good checkpoint: {good}"
    )
    assert [line for line, _ in sink.lines] == list(range(1, step))
    assert Checkpoints(tmp_path / "toy/checkpoints").steps == ([] if good == "none" else [6])


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    # The loss is about 1e36 here, the square of its gradient too large for float32.
    with pytest.raises(ZooError, match=r"the gradient_norm of step 6 is inf"):
        train(tmp_path, Batches(spoilt=6, spoil=1e17))
    assert Checkpoints(tmp_path / "toy/checkpoints").steps == []


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_a_run_asked_to_stop_saves_its_last_step(asked, tmp_path):
    before = signal.getsignal(asked)
    sink = Sink(lambda step: os.kill(os.getpid(), asked) if step == 8 else None)
    with pytest.raises(Stopped, match=r"stopped after step 9, which is saved"):
        train(tmp_path, sink=sink)
    assert signal.getsignal(asked) is before
    assert [step for step, _ in sink.lines] == list(range(1, 10))
    straight, _ = train(tmp_path / "straight")
    resumed, checkpoints = train(tmp_path)
    assert checkpoints.steps[:2] == [6, 9]
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (resumed, straight)))


def test_a_transfer_nobody_asked_for_is_an_error(tmp_path):
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(tmp_path, sink=Sink(lambda step: jnp.zeros(3) + np.ones(3)))


@pytest.mark.slow
def test_a_trace_of_ten_steps(tmp_path):
    train(tmp_path, profile=True)
    traces = list((tmp_path / "toy/profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    assert traces[0].stat().st_size > 1000
    with pytest.raises(ZooError, match=r"train\.profile needs 20 steps, the run has 19 left"):
        train(tmp_path / "short", profile=True, steps=19)
