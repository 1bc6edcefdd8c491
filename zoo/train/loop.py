"""The training loop: one for every task."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from zoo.data.loader import Batches
from zoo.errors import ZooError
from zoo.train.checkpoint import Checkpoints
from zoo.train.cluster import Cluster
from zoo.train.config import Config
from zoo.train.health import Health
from zoo.train.mesh import BatchPlacer
from zoo.train.metrics import Sink
from zoo.train.plan import peak_flops, step_flops
from zoo.train.state import Program, State
from zoo.train.stop import Stopped, StopSignal
from zoo.types import Batch

PROFILED_STEPS = range(10, 20)
"""Steps after the first that `train.profile` traces: late enough for everything to be warm."""


@dataclass(frozen=True)
class Pending:
    """A step whose figures are still on the device."""

    step: int
    metrics: Mapping[str, jax.Array]
    records: np.ndarray
    waited: float
    dispatched: float
    """Seconds that giving it to the device took, which may hold the host up until the others have come."""


def fit(
    config: Config,
    program: Program,
    compiled: tuple[Any, Any],
    state: State,
    loader: Batches,
    validation: Batches | None,
    place: BatchPlacer,
    checkpoints: Checkpoints,
    sinks: list[Sink],
    cluster: Cluster,
) -> State:
    """Trains from `state.step` to `config.train.steps` and returns the last state.

    Figures of a step are fetched after the next has been given to the device, so the device never waits for them.
    Raises Stopped after saving when asked to end, and ZooError when the loss is not finite.
    """
    return _Run(config, program, compiled, loader, validation, place, checkpoints, sinks, cluster).fit(state)


class _Run:
    def __init__(
        self,
        config: Config,
        program: Program,
        compiled: tuple[Any, Any],
        loader: Batches,
        validation: Batches | None,
        place: BatchPlacer,
        checkpoints: Checkpoints,
        sinks: list[Sink],
        cluster: Cluster,
    ) -> None:
        self.options = config.train
        self.folder = config.folder
        self.train_step, self.validate_step = compiled
        self.loader, self.place, self.checkpoints, self.sinks = loader, place, checkpoints, sinks
        self.flops, self.peak = step_flops(program), peak_flops()
        self.validation = [] if validation is None else _first_batches(validation, self.options.validate_batches, place)
        self.clock = time.perf_counter()
        self.cluster, self.watchdog = cluster, cluster.watchdog

    def fit(self, state: State) -> State:
        first = int(state.step)
        left = self.options.steps - first
        if self.options.profile and left < PROFILED_STEPS.stop:
            raise ZooError(f"train.profile needs {PROFILED_STEPS.stop} steps, the run has {left} left")
        batches = self.loader.at(first)
        pending: Pending | None = None
        self.clock = time.perf_counter()
        # Anything that slipped onto or off the device unasked would stall it: make it an error.
        health = Health(self.folder, self.cluster, first, self.options.log_every)
        with contextlib.closing(health) as self.health, StopSignal() as stop, jax.transfer_guard("disallow"):
            for step in range(first + 1, self.options.steps + 1):
                if self.options.profile:
                    self._trace(step - first)
                self.watchdog.expect("step", step)
                started = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - started
                records, batch = batch["record"], self.place(batch)
                started = time.perf_counter()
                state, metrics = self.train_step(state, batch)
                dispatched = time.perf_counter() - started
                if pending is not None:
                    self._report(pending, None)
                pending = Pending(step, metrics, records, waited, dispatched)
                self.checkpoints.list_files()
                last, asked = step == self.options.steps, stop.at(step)
                validates = bool(self.validation) and (last or step % self.options.validate_every == 0)
                saves = last or asked or step % self.options.checkpoint_every == 0
                if validates or saves:
                    loss = self._validate(state, step) if validates else None
                    # Settle this step's figures first: a state whose loss is not finite is never saved.
                    self._report(pending, loss)
                    pending = None
                    if saves:
                        self.watchdog.expect("checkpoint", step)
                        self.checkpoints.save(step, state, loss)
                if asked and not last:
                    self.checkpoints.wait()
                    raise Stopped(f"stopped after step {step}, which is saved; the same command goes on from there")
        self.watchdog.expect("checkpoint", self.options.steps)
        self.checkpoints.wait()
        self.watchdog.rest()
        return state

    def _validate(self, state: State, step: int) -> float:
        parts = []
        for batch in self.validation:
            self.watchdog.expect("validation", step)
            parts.append(jax.device_get(self.validate_step(state, batch)))
        weights = np.array([part["weight"] for part in parts], np.float64)
        return float(np.dot([part["loss"] for part in parts], weights) / weights.sum())

    def _report(self, pending: Pending, validation_loss: float | None) -> None:
        started = time.perf_counter()
        figures = {name: float(value) for name, value in jax.device_get(dict(pending.metrics)).items()}
        for name in ("loss", "gradient_norm"):
            if np.isfinite(figures[name]):
                continue
            self.checkpoints.wait()
            good = self.checkpoints.latest
            raise ZooError(
                f"the {name} of step {pending.step} is {figures[name]}; its records were "
                f"{pending.records.tolist()}; last good checkpoint: {'none' if good is None else f'step {good}'}"
            )
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        own_seconds = seconds - pending.dispatched - (now - started)
        figures |= {
            "step_seconds": seconds,
            "examples_per_second": self.loader.batch_size / seconds,
            "signal_samples_per_second": self.loader.samples_per_batch / seconds,
            "loader_wait_share": min(1.0, pending.waited / seconds),
        }
        if self.peak:
            figures["mfu"] = self.flops / seconds / self.peak
        if validation_loss is not None:
            figures["validation_loss"] = validation_loss
        figures |= self.health.of_step(pending.step, figures, own_seconds)
        for sink in self.sinks:
            sink.write(pending.step, figures)

    def _trace(self, step: int) -> None:
        if step == PROFILED_STEPS.start:
            jax.profiler.start_trace(str(self.folder / "profile"))
        elif step == PROFILED_STEPS.stop:
            jax.profiler.stop_trace()


def _first_batches(loader: Batches, count: int, place: BatchPlacer) -> list[Batch]:
    batches = loader.at(0)
    return [place(next(batches)) for _ in range(count)]
