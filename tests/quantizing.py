"""Training steps of quantizers, compiled as tests want them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from zoo.layers.quantizers import Quantizer, VectorQuantizer

EMA = VectorQuantizer(12, 6, kmeans=0, spread=1.0, decay=0.9)
COSINE = VectorQuantizer(12, 6, metric="cosine", kmeans=0, spread=1.0, decay=0.9)
GRADIENT = VectorQuantizer(12, 6, learning="gradient", kmeans=0, spread=1.0)

QUICK = {"xla_backend_optimization_level": 0}
"""Compilation takes longer than these small programs run."""


def rows(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def compiled(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    return jax.jit(function).lower(*arguments).compile(QUICK)


def start(quantizer: Quantizer, x: Any) -> Any:
    keys = {"params": jax.random.key(0), "codes": jax.random.key(1)}
    return compiled(lambda x: nn.meta.unbox(quantizer.init(keys, x)), x)(x)


def stepper(quantizer: Quantizer, seed: int = 2) -> Callable[..., Any]:
    """(variables, x, valid) → what a training step returns, and the variables after it."""

    def step(variables: Any, x: Any, valid: Any = None) -> Any:
        rngs = {"codes": jax.random.key(seed)}
        out, new = quantizer.apply(variables, x, valid=valid, train=True, mutable=["codebooks"], rngs=rngs)
        return out, {**variables, **new}

    return step


def train(quantizer: Quantizer, variables: Any, x: Any) -> tuple[Any, Any]:
    return compiled(stepper(quantizer), variables, x)(variables, x)


def apply(quantizer: Quantizer, variables: Any, *arguments: Any, **options: Any) -> Any:
    return compiled(lambda *given: quantizer.apply(*given, **options), variables, *arguments)(variables, *arguments)


def gradients(quantizer: Quantizer, variables: Any, x: Any, weigh: Callable[[Any], Any]) -> Any:
    """Of `weigh(what a training step returns)`: to the parameters and to x."""

    def value(params: Any, x: Any) -> Any:
        return weigh(stepper(quantizer)({**variables, "params": params}, x)[0])

    params = variables.get("params", {})
    return compiled(jax.grad(value, (0, 1)), params, x)(params, x)


def books(variables: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in variables["codebooks"].items()}


def close(a: Any, b: Any, **tolerance: float) -> None:
    """Trees of the same structure, and equal numbers."""
    (here, one), (there, other) = jax.tree.flatten(a), jax.tree.flatten(b)
    assert one == other
    for p, q in zip(here, there, strict=True):
        np.testing.assert_allclose(p, q, **tolerance)
