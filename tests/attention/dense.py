"""Mixers with random parameters, and attention written out in numpy float64 to compare them with."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.layers.mixer import Mixer

QUICK = {"xla_backend_optimization_level": 0}  # each program runs once: the last optimisations only cost time


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def drawn(mixer: nn.Module, *arguments: Any) -> Any:
    """Parameters of a module, all of them random: ones and zeros would hide a slip."""
    shapes = nn.unbox(jax.eval_shape(mixer.init, jax.random.key(0), *arguments))
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [0.3 * normal(n + 1, *leaf.shape) for n, leaf in enumerate(leaves)])


def run(mixer: nn.Module, variables: Any, *arguments: Any, **options: Any) -> np.ndarray:
    return np.asarray(jax.jit(mixer.apply, compiler_options=QUICK)(variables, *arguments, **options))


def streamed(mixer: Mixer, variables: Any, x: jax.Array, state: Any) -> tuple[np.ndarray, Any]:
    """Tokens of x [B, T, D] one after another → their outputs and the last state."""

    @partial(jax.jit, compiler_options=QUICK)
    def steps(variables: Any, x: Any, state: Any) -> Any:
        def step(state: Any, token: Any) -> Any:
            out, state = mixer.apply(variables, token, state, method="step")
            return state, out

        return jax.lax.scan(step, state, x)

    state, out = steps(variables, x.swapaxes(0, 1), state)
    return np.asarray(out).swapaxes(0, 1), state


def prefilled(mixer: Mixer, variables: Any, x: jax.Array, capacity: int, length: Any = None) -> Any:
    """A prompt, of which `length` [B] tokens of each row count, at once → outputs and the state."""
    apply = jax.jit(partial(mixer.apply, capacity=capacity, method="prefill"), compiler_options=QUICK)
    return apply(variables, x, None if length is None else jnp.asarray(length))


def projected(variables: Any, name: str, x: np.ndarray) -> np.ndarray:
    """[B, T, D] → [B, T, H, K] by the kernel, and bias if there is one, called `name`."""
    part = variables["params"][name]
    return np.einsum("btd,dhk->bthk", np.float64(x), np.float64(part["kernel"])) + np.float64(part.get("bias", 0))


def merged(variables: Any, y: np.ndarray) -> np.ndarray:
    """[B, T, H, K] → [B, T, D] by `out`."""
    part = variables["params"]["out"]
    return np.einsum("bthk,hkd->btd", y, np.float64(part["kernel"])) + np.float64(part.get("bias", 0))


def scores(q: np.ndarray, k: np.ndarray, scale: float | None = None) -> np.ndarray:
    """q [B, T, H, K], k [B, S, G, K] → [B, H, T, S]."""
    k = np.repeat(np.float64(k), q.shape[2] // k.shape[2], axis=2)
    return np.einsum("bthk,bshk->bhts", np.float64(q), k) * (q.shape[-1] ** -0.5 if scale is None else scale)


def weights(q: np.ndarray, k: np.ndarray, visible: np.ndarray, scale: float | None = None) -> np.ndarray:
    """Softmax over the keys where `visible`, which broadcasts with [B, H, T, S]; 0 where there is none."""
    s = np.where(visible, scores(q, k, scale), -np.inf)
    p = np.exp(s - np.max(s, axis=-1, keepdims=True, initial=-1e30))
    return p / np.maximum(p.sum(-1, keepdims=True), 1e-300)


def mixed(p: np.ndarray, v: np.ndarray) -> np.ndarray:
    """p [B, H, T, S], v [B, S, G, V] → [B, T, H, V]."""
    return np.einsum("bhts,bshv->bthv", p, np.repeat(np.float64(v), p.shape[1] // v.shape[2], axis=2))


def causal(time: int) -> np.ndarray:
    return np.tril(np.ones((time, time), bool))


def close(got: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    """Rounding of float32, relative to the largest value."""
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * max(np.abs(wanted).max(), 1e-3))
