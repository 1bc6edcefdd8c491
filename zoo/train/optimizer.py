"""Optimiser, learning-rate schedule, weight decay, layer-wise rates and freezing, from optax."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from zoo.errors import ZooError
from zoo.train.config import Optimizer

MATRIX_AXES = {"embed", "heads", "head_width", "mlp"}
"""Logical axes of the matrices inside repeated layers, the parameters Muon is made for."""


def schedule(options: Optimizer, steps: int) -> optax.Schedule:
    """Step → learning rate: linear warm-up, then cosine or a plateau with a linear end."""
    peak, final = options.learning_rate, options.learning_rate * options.final_fraction
    if options.warmup_steps >= steps:
        raise ZooError(f"optimizer.warmup_steps {options.warmup_steps} leaves nothing of {steps} steps")
    if options.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, options.warmup_steps, steps, final)
    decay = max(1, round(options.decay_fraction * steps))
    if options.warmup_steps + decay > steps:
        raise ZooError(
            f"optimizer: warm-up of {options.warmup_steps} and decay of {decay} steps exceed the {steps} of the run"
        )
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, options.warmup_steps),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, final, decay),
        ],
        [options.warmup_steps, steps - decay],
    )


def build(options: Optimizer, steps: int, boxed: Any) -> optax.GradientTransformation:
    """The update rule for abstract parameters `boxed` with logical axis names.

    Raises ZooError for a pattern in `freeze` that no parameter matches.
    """
    rate = schedule(options, steps)
    names = _names(boxed)
    axes = _axes(boxed)
    decayed = jax.tree.map(
        lambda name, axis: len(axis) - axis.count("layers") > 1 and not _matches((*options.no_decay, "bias$"), name),
        names,
        axes,
        is_leaf=_is_axes,
    )
    if options.name == "muon":
        rule = optax.contrib.muon(
            rate,
            beta=0.95,
            weight_decay=options.weight_decay,
            weight_decay_mask=decayed,
            adam_b1=options.b1,
            adam_b2=options.b2,
            adam_weight_decay=options.weight_decay,
            # Without these optax takes only 2-D parameters, and layers stacked by scan are 3-D and more.
            muon_weight_dimension_numbers=jax.tree.map(_muon_axes, axes, is_leaf=_is_axes),
            consistent_rms=0.2,
        )
    elif options.name == "lion":
        rule = optax.lion(rate, b1=options.b1, b2=options.b2, weight_decay=options.weight_decay, mask=decayed)
    else:
        rule = optax.adamw(rate, options.b1, options.b2, options.eps, weight_decay=options.weight_decay, mask=decayed)
    if options.clip_norm:
        rule = optax.chain(optax.clip_by_global_norm(options.clip_norm), rule)
    if options.layer_decay != 1.0:
        rule = optax.chain(rule, _scale_by(_layer_rates(options.layer_decay, boxed)))
    if options.freeze:
        labels = jax.tree.map(lambda name: "frozen" if _matches(options.freeze, name) else "trained", names)
        unused = [pattern for pattern in options.freeze if not _any_match(pattern, names)]
        if unused:
            raise ZooError(f"optimizer.freeze: no parameter matches {unused[0]!r}")
        rule = optax.partition({"trained": rule, "frozen": optax.set_to_zero()}, labels)
    return rule


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def _is_axes(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and all(axis is None or isinstance(axis, str) for axis in leaf)


def _names(boxed: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"),
        nn.unbox(boxed),
    )


def _axes(boxed: Any) -> Any:
    return jax.tree.map(
        lambda leaf: tuple(leaf.names) if _is_boxed(leaf) else (None,) * leaf.ndim, boxed, is_leaf=_is_boxed
    )


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _any_match(pattern: str, names: Any) -> bool:
    return any(re.search(pattern, name) for name in jax.tree.leaves(names))


def _muon_axes(axes: tuple[str | None, ...]) -> MuonDimensionNumbers | None:
    """Which axes of a stacked kernel are inputs and outputs of its matrix; None where AdamW takes it."""
    inner = [index for index, axis in enumerate(axes) if axis != "layers"]
    if "layers" not in axes or len(inner) < 2 or not all(axes[index] in MATRIX_AXES for index in inner):
        return None
    if axes[inner[0]] == "embed":
        return MuonDimensionNumbers(reduction_axis=(inner[0],), output_axis=tuple(inner[1:]))
    return MuonDimensionNumbers(reduction_axis=tuple(inner[:-1]), output_axis=(inner[-1],))


def _layer_rates(decay: float, boxed: Any) -> Any:
    """Multiplier of each parameter's update, shaped to broadcast along its stacked layers."""
    names, axes, shapes = _names(boxed), _axes(boxed), nn.unbox(boxed)
    depth = max(
        (
            shape.shape[axis.index("layers")]
            for axis, shape in zip(jax.tree.leaves(axes, is_leaf=_is_axes), jax.tree.leaves(shapes), strict=True)
            if "layers" in axis
        ),
        default=0,
    )

    def rate(name: str, axis: tuple[str | None, ...], leaf: Any) -> jax.Array:
        if "layers" in axis:
            where = axis.index("layers")
            layer = jnp.arange(1.0, leaf.shape[where] + 1.0)
            return (decay ** (depth + 1 - layer)).reshape([-1 if index == where else 1 for index in range(leaf.ndim)])
        return jnp.asarray(decay ** (depth + 1) if "/embed" in f"/{name}" else 1.0)

    return jax.tree.map(rate, names, axes, shapes, is_leaf=lambda leaf: isinstance(leaf, str))


def _scale_by(rates: Any) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda change, rate: change * rate, updates, rates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
