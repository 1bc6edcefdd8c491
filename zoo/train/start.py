"""Fine-tuning's first step: what another run has learned instead of what is random, every array accounted for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

from zoo.errors import ZooError
from zoo.train.config import Start
from zoo.train.state import State


def begin_from(state: State, params: Any, collections: Any, options: Start) -> State:
    """`state` with the nested parameters and collections (codebooks, say) of another run, where names agree.

    Every array of the other run is used once and every one of the state filled once, with equal shapes; the exceptions
    are those that `options.new` and `options.unused` match. Raises ZooError with all disagreements at once.
    """
    have, want = _flat(params) | _flat(collections), _flat(state.params) | _flat(state.collections)
    wrong = [
        f"{name}: {options.run} has {_shape(have.get(name))}, this run {_shape(want.get(name))}"
        for name in sorted(have.keys() | want.keys())
        if _shape(have.get(name)) != _shape(want.get(name))
        and not (name not in have and _matches(options.new, name))
        and not (name not in want and _matches(options.unused, name))
    ]
    idle = [
        pattern for pattern in options.new if not any(re.search(pattern, name) for name in want.keys() - have.keys())
    ]
    idle += [p for p in options.unused if not any(re.search(p, name) for name in have.keys() - want.keys())]
    wrong += [f"pattern {pattern!r} allows nothing" for pattern in idle]
    if wrong:
        raise ZooError(f"cannot begin from {options.run}: {'; '.join(wrong)}")

    def begin(path: Any, leaf: jax.Array) -> jax.Array:
        name = _name(path)
        return jax.device_put(have[name], leaf.sharding) if name in have else leaf

    params = jax.tree_util.tree_map_with_path(begin, state.params)
    collections = jax.tree_util.tree_map_with_path(begin, state.collections)
    # A copy: the training step gives both back to the device, and one buffer cannot be given twice.
    ema = None if state.ema is None else jax.tree.map(jax.numpy.copy, params)
    return dataclasses.replace(state, params=params, collections=collections, ema=ema)


def _flat(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _shape(leaf: Any) -> str:
    return "nothing" if leaf is None else str(tuple(leaf.shape))


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
