"""Small modules in tests, compiled as one program each, without what makes programs fast and their compilation slow."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

QUICK = {"xla_backend_optimization_level": 0}


def init(module: nn.Module, *given: Any, **options: Any) -> Any:
    """Its variables, without boxes of logical axes."""
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return compiled(lambda *given: nn.meta.unbox(module.init(keys, *given, **options)))(*given)


def run(module: nn.Module, variables: Any, *given: Any, **options: Any) -> Any:
    """What it makes of arrays."""
    return compiled(lambda variables, *given: module.apply(variables, *given, **options))(variables, *given)


def compiled(function: Any) -> Any:
    return jax.jit(function, compiler_options=QUICK)
