"""The training loop's own steps, for tasks in tests: one device, a batch a step, no files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from zoo.train.config import Config, Mesh, Optimizer, Train
from zoo.train.mesh import AXES, BatchPlacer
from zoo.train.state import Program, State


def program(task: Any, batch: Any, optimizer: Optimizer, steps: int, **train: Any) -> Program:
    config = Config(task=task, optimizer=optimizer, train=Train(steps=steps, **train), mesh=Mesh(max_replicated=1.0))
    kinds = (AxisType.Auto,) * len(AXES)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape((1,) * len(AXES)), AXES, axis_types=kinds)
    place = BatchPlacer(mesh, config.rules, len(batch["signal"]), 1)
    return Program(config, task, mesh, place.abstract(batch))


def trained(
    task: Any,
    batches: Callable[[int], Any],
    optimizer: Optimizer,
    steps: int,
    variables: Any = None,
    **train: Any,
) -> tuple[Any, list[dict[str, float]]]:
    """Variables after some steps, from the task's own first ones or these, and what each step measured."""
    made = program(task, batches(0), optimizer, steps, **train)
    place = BatchPlacer(made.mesh, made.config.rules, len(batches(0)["signal"]), 1)
    state: State = made.initial()
    if variables is not None:
        # Copies: the first step takes its state's memory.
        given = jax.tree.map(np.asarray, variables["params"])
        state = state.replace(params=jax.device_put(given, made.shardings.params))
    figures = []
    with jax.set_mesh(made.mesh), made.context():
        for step in range(steps):
            state, metrics = made.train_step(state, place(batches(step)))
            figures.append({name: float(value) for name, value in metrics.items()})
    return made.variables(state), figures
