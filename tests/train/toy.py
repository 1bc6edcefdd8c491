"""A task that compiles in no time: three stacked layers that learn to sum a channel's samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from zoo.train.config import Config, Mesh, Optimizer, Train
from zoo.train.mesh import AXES, BatchPlacer, mesh_shape
from zoo.train.state import Program, State

BATCH, CHANNELS, SAMPLES, WIDTH, LAYERS = 16, 4, 8, 8, 3


@dataclass(frozen=True)
class Toy:
    """Signal [B, C, T] → sum over T where `mask` [B, C] is True; `dtype` is what it computes in."""

    dtype: str = "float32"

    def init(self, key: jax.Array, batch: Any) -> Any:
        def made(number: int, shape: tuple[int, ...], *names: str | None) -> Any:
            value = 0.3 * jax.random.normal(jax.random.fold_in(key, number), shape)
            return nn.LogicallyPartitioned(value, names)

        return {
            "params": {
                "embed_in": made(0, (SAMPLES, WIDTH), None, "embed"),
                "blocks": {
                    "kernel": made(1, (LAYERS, WIDTH, WIDTH), "layers", "embed", "mlp"),
                    "bias": made(2, (LAYERS, WIDTH), "layers", "mlp"),
                },
                "head": made(3, (WIDTH, 4), "embed", None),
            }
        }

    def loss(self, variables: Any, batch: Any, key: jax.Array, train: bool) -> Any:
        params = jax.tree.map(lambda leaf: leaf.astype(self.dtype), variables["params"])
        hidden = batch["signal"].astype(self.dtype) @ params["embed_in"]
        for kernel, bias in zip(params["blocks"]["kernel"], params["blocks"]["bias"], strict=True):
            hidden = hidden + jnp.tanh(hidden @ kernel + bias)
        found = (hidden @ params["head"]).sum(-1).astype(jnp.float32)
        weight = batch["mask"].sum()
        error = jnp.square(found - batch["signal"].sum(-1))
        value = jnp.sum(error * batch["mask"]) / jnp.maximum(weight, 1)
        return value, {"twice": 2 * value, "weight": weight.astype(jnp.float32)}, {}

    def flops(self, batch: Any) -> float:
        return 2.0 * batch["signal"].size * WIDTH * (LAYERS + 2)


def toy_batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Rows with very different numbers of masked channels, and as records the numbers 100 · seed onward."""
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=(BATCH, CHANNELS, SAMPLES)).astype(np.float32)
    masked = np.arange(CHANNELS) < rng.integers(0, CHANNELS + 1, (BATCH, 1))
    return {"signal": signal, "mask": masked, "record": np.arange(100 * seed, 100 * seed + BATCH, dtype=np.int32)}


def device_mesh(**sizes: int) -> jax.sharding.Mesh:
    """A mesh over as many devices as its sizes take."""
    mesh = Mesh(**{"data": 1, **sizes})
    count = int(np.prod([getattr(mesh, axis) for axis in AXES]))
    shape = tuple(mesh_shape(mesh, count).values())
    return jax.sharding.Mesh(np.array(jax.devices()[:count]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 5)


def toy_program(
    *, optimizer: Mapping[str, Any] = {}, train: Mapping[str, Any] = {}, dtype: str = "float32", **sizes: int
) -> Program:
    """A program of the toy with 20 steps, on a mesh of these sizes."""
    config = Config(
        task=Toy(dtype),
        optimizer=Optimizer(**{"warmup_steps": 2, "learning_rate": 0.01, **optimizer}),
        train=Train(**{"steps": 20, **train}),
        mesh=Mesh(max_replicated=1.0),
    )
    mesh = device_mesh(**sizes)
    place = BatchPlacer(mesh, config.rules, BATCH, config.train.accumulate)
    return Program(config, config.task, mesh, place.abstract(toy_batch()))


def run(program: Program, steps: int = 5) -> tuple[State, list[dict[str, float]]]:
    """The state after some steps, each on another batch, and what each step measured."""
    place = BatchPlacer(program.mesh, program.config.rules, BATCH, program.config.train.accumulate)
    state, figures = program.initial(), []
    with jax.set_mesh(program.mesh), program.context():
        for step in range(steps):
            state, metrics = program.train_step(state, place(toy_batch(step)))
            figures.append({name: float(value) for name, value in metrics.items()})
    return state, figures
