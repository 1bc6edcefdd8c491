"""What a run carries from step to step, and the step itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from zoo.train import mesh as meshes
from zoo.train.config import Config
from zoo.types import Array, Batch, Task, Variables


@flax.struct.dataclass
class State:
    """step [] int32 (updates done), params, collections (a task's mutable variables), optimizer, ema (or None)."""

    step: Array
    params: Any
    collections: Any
    optimizer: Any
    ema: Any


class Program:
    """The compiled side of a run: how its state is made and laid out, and its training and validation steps.

    boxed        abstract parameters with logical axis names
    shardings    a State of NamedShardings
    initial()    the State of step 0
    train_step   (state, batch) → (state, metrics); the state is donated
    validate     (state, batch) → metrics, with the averaged parameters when the run keeps them
    """

    def __init__(self, config: Config, task: Task, mesh: jax.sharding.Mesh, batch: Batch) -> None:
        """`batch` holds shapes and shardings (jax.ShapeDtypeStruct). Raises ZooError when model and mesh do not fit."""
        from zoo.train.optimizer import build, schedule

        self.config, self.task, self.mesh, self.batch = config, task, mesh, batch
        self._rate = schedule(config.optimizer, config.train.steps)
        with self.context():
            variables = jax.eval_shape(task.init, jax.random.key(0), batch)
        self.boxed = variables["params"]
        self._rule = build(config.optimizer, config.train.steps, self.boxed)
        self.shardings = self._state_shardings(variables)
        meshes.check_replication(nn.unbox(self.boxed), self.shardings.params, mesh, config.mesh.max_replicated)
        whole = meshes.replicated(mesh)
        self._initial = jax.jit(self._make, out_shardings=self.shardings)
        self.train_step = jax.jit(self.step, donate_argnums=0, out_shardings=(self.shardings, whole))
        self.validate = jax.jit(self._validate, out_shardings=whole)

    def context(self) -> Any:
        """Logical axis names mean mesh axes inside it."""
        return nn.logical_axis_rules(meshes.logical_rules(self.config.rules))

    def initial(self) -> State:
        """The state of step 0, made in place on the devices that hold it."""
        with jax.set_mesh(self.mesh), self.context():
            return self._initial()

    def abstract(self) -> State:
        """Shapes, dtypes and shardings of the state."""
        shapes = jax.eval_shape(self._initial)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            self.shardings,
        )

    def compile(self) -> tuple[Any, Any]:
        """(training step, validation) compiled ahead for the run's shapes."""
        with jax.set_mesh(self.mesh), self.context():
            state = self.abstract()
            return (
                self.train_step.lower(state, self.batch).compile(),
                self.validate.lower(state, self.batch).compile(),
            )

    def variables(self, state: State) -> Variables:
        """What `task` is applied with: the averaged parameters when there are any."""
        return {"params": state.params if state.ema is None else state.ema, **state.collections}

    def _make(self) -> State:
        batch = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.batch)
        variables = nn.unbox(self.task.init(jax.random.key(self.config.seed), batch))
        params = variables["params"]
        return State(
            step=jnp.zeros((), jnp.int32),
            params=params,
            collections={name: value for name, value in variables.items() if name != "params"},
            optimizer=self._rule.init(params),
            ema=jax.tree.map(jnp.copy, params) if self.config.train.ema else None,
        )

    def _state_shardings(self, variables: Variables) -> Any:
        whole: Any = meshes.replicated(self.mesh)
        rules = self.config.rules
        params = meshes.parameter_shardings(self.boxed, rules, self.mesh)
        others = {name: value for name, value in variables.items() if name != "params"}
        optimizer = jax.eval_shape(self._rule.init, nn.unbox(self.boxed))
        of_parameter = dict(jax.tree_util.tree_leaves_with_path(params))

        def moment(path: Any, _: Any) -> NamedSharding:
            # Moments lie where their parameters lie, and have paths that end alike; counters are whole.
            ends = (path[start:] for start in range(len(path)))
            return next((of_parameter[end] for end in ends if end in of_parameter), whole)

        return State(
            step=whole,
            params=params,
            collections=meshes.parameter_shardings(others, rules, self.mesh),
            optimizer=jax.tree_util.tree_map_with_path(moment, optimizer),
            ema=params if self.config.train.ema else None,
        )

    def step(self, state: State, batch: Batch) -> tuple[State, Mapping[str, Array]]:
        """One update: what `train_step` compiles."""
        key = jax.random.fold_in(jax.random.key(self.config.seed + 1), state.step)
        gradient, metrics, collections = self._gradient(state, batch, key)
        updates, optimizer = self._rule.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            decay = self.config.train.ema
            ema = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, ema, params)
        metrics = {
            **metrics,
            "gradient_norm": optax.tree.norm(gradient),
            "learning_rate": jnp.asarray(self._rate(state.step), jnp.float32),
        }
        return State(state.step + 1, params, collections, optimizer, ema), metrics

    def _gradient(self, state: State, batch: Batch, key: Array) -> tuple[Any, dict[str, Array], Any]:
        """Gradient and metrics of the mean loss over the whole batch, by weight over its micro-batches."""
        micro = self._micro_batches(batch)

        def accumulate(carry: Any, inputs: Any) -> tuple[Any, None]:
            sums, collections = carry
            index, examples = inputs
            (value, metrics), collections, gradient = self._value_and_gradient(
                state.params, collections, examples, jax.random.fold_in(key, index)
            )
            weight = metrics["weight"]
            new = {"gradient": gradient, "metrics": {**metrics, "loss": value}}
            weighed = jax.tree.map(lambda leaf: weight * leaf, new)
            weighed["metrics"]["weight"] = weight
            return (jax.tree.map(jnp.add, sums, weighed), collections), None

        count = self.config.train.accumulate
        if count == 1:
            (value, metrics), collections, gradient = self._value_and_gradient(
                state.params, state.collections, batch, jax.random.fold_in(key, 0)
            )
            return gradient, {**metrics, "loss": value}, collections
        first = jax.tree.map(lambda leaf: leaf[0], micro)
        shape = jax.eval_shape(self._value_and_gradient, state.params, state.collections, first, key)
        (value, metrics), _, gradient = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)
        zero = {"gradient": gradient, "metrics": {**metrics, "loss": value}}
        (sums, collections), _ = jax.lax.scan(accumulate, (zero, state.collections), (jnp.arange(count), micro))
        weight = jnp.maximum(sums["metrics"].pop("weight"), 1e-30)
        means = jax.tree.map(lambda leaf: leaf / weight, sums)
        return means["gradient"], {**means["metrics"], "weight": weight}, collections

    def _value_and_gradient(self, params: Any, collections: Any, batch: Batch, key: Array) -> Any:
        def loss(params: Any) -> Any:
            value, metrics, new = self.task.loss({"params": params, **collections}, batch, key, True)
            return value, (metrics, {**collections, **new})

        (value, (metrics, new)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return (value, metrics), new, gradient

    def _micro_batches(self, batch: Batch) -> Batch:
        """[B, …] → [accumulate, B/accumulate, …], every device's own rows divided evenly among micro-batches."""
        count = self.config.train.accumulate
        layout = NamedSharding(self.mesh, PartitionSpec(None, self.config.rules.batch))

        def divide(leaf: Array) -> Array:
            divided = leaf.reshape(-1, count, *leaf.shape[1:]).swapaxes(0, 1)
            return jax.lax.with_sharding_constraint(divided, layout)

        return jax.tree.map(divide, batch)

    def _validate(self, state: State, batch: Batch) -> Mapping[str, Array]:
        value, metrics, _ = self.task.loss(self.variables(state), batch, jax.random.key(0), False)
        return {**metrics, "loss": value}
