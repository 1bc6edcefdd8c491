"""Training of small tokenizers for tests: what they learn from, and steps compiled as one program."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from zoo.types import Sensors


def brain_like(shape: tuple[int, ...], seed: int = 0, rate: float = 200.0) -> np.ndarray:
    """Signals [..., T] float32 of deviation 1: 1/f noise, and a sine of 4 to 30 Hz as strong, at a random phase."""
    rng = np.random.default_rng(seed)
    samples = shape[-1]
    frequency = np.fft.rfftfreq(samples)
    bins = rng.normal(size=(*shape[:-1], len(frequency), 2)) @ (1, 1j) / np.maximum(frequency, frequency[1])
    noise = np.fft.irfft(bins, samples)
    noise /= noise.std(-1, keepdims=True)
    one = (*shape[:-1], 1)
    turns = np.arange(samples) / rate * rng.uniform(4, 30, one) + rng.uniform(size=one)
    return ((noise + np.sqrt(2) * np.sin(2 * np.pi * turns)) / np.sqrt(2)).astype(np.float32)


def train(
    tokenizer: Any, batches: np.ndarray, sensors: Sensors, steps: int, rate: float, clip: float = 3.0
) -> tuple[Any, dict[str, np.ndarray]]:
    """AdamW over the batches [n, B, C, T] in turn → variables, and of each step: loss, its terms, the gradient's norm.

    The rate rises over the first tenth and then stays; the norm is taken before gradients are clipped.
    """
    keys = {"params": jax.random.key(0), "codes": jax.random.key(1), "noise": jax.random.key(2)}
    variables = nn.meta.unbox(jax.jit(lambda: tokenizer.init(keys, batches[0], sensors))())
    schedule = optax.linear_schedule(0.0, rate, steps // 10)
    optimiser = optax.chain(optax.clip_by_global_norm(clip), optax.adamw(schedule, 0.9, 0.99, weight_decay=1e-4))
    pool = jnp.asarray(batches)

    def step(carry: Any, index: Any) -> Any:
        params, collections, state = carry

        def loss(params: Any) -> Any:
            out, new = tokenizer.apply(
                {"params": params, **collections},
                pool[index % len(pool)],
                sensors,
                train=True,
                mutable=list(collections),
                rngs={
                    name: jax.random.fold_in(jax.random.key(seed), index)
                    for seed, name in enumerate(("codes", "dropout", "noise"))
                },
            )
            total = sum(weight * out.losses[name] for name, weight in tokenizer.loss_weights.items())
            return total, (new, {**out.losses, "loss": total})

        (_, (new, record)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimiser.update(gradient, state, params)
        record = {**record, "norm": optax.tree.norm(gradient)}
        return (optax.apply_updates(params, updates), new, state), record

    params, collections = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps)))
    (params, collections, _), record = run((params, collections, optimiser.init(params)))
    return {"params": params, **collections}, jax.tree.map(np.asarray, record)
