"""Files as others would have written them: variables of ours, by a key map read backwards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
from einops import rearrange

from zoo.weights.keys import Key, Rule


def drawn(module: Any, *given: Any) -> dict[str, Any]:
    """Variables of a module, all random: integers too."""
    shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *(given or module.example())))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: (3 * rng.normal(size=leaf.shape)).astype(leaf.dtype), dict(shapes))


def written(rules: Sequence[Rule], variables: Any) -> dict[str, np.ndarray]:
    """The tensors that a map without parts reads as these variables."""
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    file = {}
    for rule in rules:
        if not isinstance(rule, Key):
            continue
        before, _, after = rule.how.partition(" -> ")
        leaf, stacked = flat[rule.target.removesuffix("[{l}]")], rule.target.endswith("[{l}]")
        for number, layer in enumerate(leaf if stacked else [leaf]):
            tensor = rearrange(layer, f"{after} -> {before}") if rule.how else layer
            file[re.sub(r"\{l\}", str(number), rule.source)] = tensor
    return file
