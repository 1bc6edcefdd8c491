"""Optimiser, learning-rate schedule, weight decay, layer-wise rates and freezing, from optax."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
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
    axes = _axes(boxed)
    for pattern in options.freeze:
        if not any(re.search(pattern, name) for name in axes):
            raise ZooError(f"optimizer.freeze: no parameter matches {pattern!r}")

    def decays(name: str) -> bool:
        matrix = len(axes[name]) - axes[name].count("layers") > 1
        return matrix and not _matches((*options.no_decay, "bias$"), name)

    def label(name: str) -> str:
        if _matches(options.freeze, name):
            return "frozen"
        return "matrix" if options.name == "muon" and _muon_axes(axes[name]) else "other"

    decayed = _for_names(decays)
    rules = {
        "matrix": optax.contrib.muon(
            rate,
            beta=0.95,
            weight_decay=options.weight_decay,
            weight_decay_mask=decayed,
            # Without these optax takes only 2-D parameters, and layers stacked by scan are 3-D and more.
            muon_weight_dimension_numbers=_for_names(lambda name: _muon_axes(axes[name])),
            consistent_rms=0.2,
        ),
        "other": optax.lion(rate, options.b1, options.b2, weight_decay=options.weight_decay, mask=decayed)
        if options.name == "lion"
        else optax.adamw(rate, options.b1, options.b2, options.eps, weight_decay=options.weight_decay, mask=decayed),
        "frozen": optax.set_to_zero(),
    }
    chain = [optax.partition(rules, _for_names(label))]
    if options.clip_norm:
        chain.insert(0, optax.clip_by_global_norm(options.clip_norm))
    if options.freeze:  # first, so that what does not move does not count in the norm
        chain.insert(0, optax.masked(optax.set_to_zero(), _for_names(lambda name: label(name) == "frozen")))
    if options.layer_decay != 1.0:
        chain.append(_scale_by(_layer_rates(options.layer_decay, boxed)))
    return optax.chain(*chain)


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _for_names(value: Callable[[str], Any]) -> Callable[[Any], Any]:
    """Parameters, or the part of them that optax shows to a rule → the tree of each one's value, by its name."""
    return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: value(_name(path)), params)


def _axes(boxed: Any) -> dict[str, tuple[str | None, ...]]:
    """Logical axes of every parameter, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=_is_boxed)
    return {_name(path): tuple(leaf.names) if _is_boxed(leaf) else (None,) * leaf.ndim for path, leaf in leaves}


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _muon_axes(axes: tuple[str | None, ...]) -> MuonDimensionNumbers | None:
    """Which axes of a stacked kernel are inputs and outputs of its matrix; None where AdamW takes it."""
    inner = [index for index, axis in enumerate(axes) if axis != "layers"]
    if "layers" not in axes or len(inner) < 2 or not all(axes[index] in MATRIX_AXES for index in inner):
        return None
    if axes[inner[0]] == "embed":
        return MuonDimensionNumbers(reduction_axis=(inner[0],), output_axis=tuple(inner[1:]))
    return MuonDimensionNumbers(reduction_axis=tuple(inner[:-1]), output_axis=(inner[-1],))


def _layer_rates(decay: float, boxed: Any) -> dict[str, jax.Array]:
    """Multiplier of each parameter's update, by name, shaped to broadcast along its stacked layers."""
    axes, shapes = (
        _axes(boxed),
        {_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(nn.unbox(boxed))},
    )
    stacked = {name: shapes[name][axis.index("layers")] for name, axis in axes.items() if "layers" in axis}
    depth = max(stacked.values(), default=0)

    def rate(name: str) -> jax.Array:
        if name not in stacked:
            return jnp.asarray(decay ** (depth + 1) if "/embed" in f"/{name}" else 1.0)
        layer = jnp.arange(1.0, stacked[name] + 1.0)
        return (decay ** (depth + 1 - layer)).reshape([-1 if axis == "layers" else 1 for axis in axes[name]])

    return {name: rate(name) for name in axes}


def _scale_by(rates: Mapping[str, jax.Array]) -> optax.GradientTransformation:
    def scale(path: Any, change: jax.Array) -> jax.Array:
        return change * rates[_name(path)]

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates))
