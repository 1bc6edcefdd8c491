"""Diffusion: how a signal is drowned in noise step by step, what a model learns of it, and how it is drawn back.

    schedule = squared_cosine(50)
    noisy = noised(schedule, clean, step, noise)                             # [B, …], step [B] of 0 … 49
    value = mean_square(model(noisy, step), target(schedule, "v", clean, step, noise))
    drawn = sample_ddim(model, schedule, noise, "v", steps=20)

A step t keeps a_t of the signal and adds s_t of noise, x_t = a_t·x + s_t·ε with a_t² + s_t² = 1 (Ho, Jain and Abbeel,
DDPM, 2006.11239; a_t² is their ᾱ of step t + 1). All is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Key

from zoo.errors import ZooError
from zoo.types import AnyArray, Array

KINDS = ("noise", "v", "clean")
"""What a model may predict: ε, v = a·ε − s·x (Salimans and Ho, 2202.00512, §4), or x itself."""
Predict = Callable[[Any, Any], Any]
"""(noisy [B, …], step [B] int32) → prediction [B, …]."""


@flax.struct.dataclass
class Schedule:
    """signal [L] and noise [L] float32: a_t and s_t of each step, from the cleanest to the noisiest."""

    signal: Array | np.ndarray
    noise: Array | np.ndarray

    @property
    def steps(self) -> int:
        """L."""
        return len(self.signal)


def linear(steps: int, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """β from `first` to `last` in equal steps (DDPM, §4)."""
    return _of_betas(np.linspace(first, last, steps))


def squared_cosine(steps: int, offset: float = 0.008, largest: float = 0.999) -> Schedule:
    """ᾱ is a squared cosine, β at most `largest` (Nichol and Dhariwal, 2102.09672, equation 17)."""
    place = (np.arange(steps + 1) / steps + offset) / (1 + offset)
    kept = np.cos(0.5 * np.pi * place) ** 2
    return _of_betas(np.minimum(1 - kept[1:] / kept[:-1], largest))


def noised(
    schedule: Schedule, clean: Float[AnyArray, "B ..."], step: Int[AnyArray, " B"], noise: Float[AnyArray, "B ..."]
) -> Float[Array, "B ..."]:
    """a·clean + s·noise."""
    a, s = _at(schedule, step, clean)
    return a * clean + s * noise


def target(
    schedule: Schedule,
    kind: str,
    clean: Float[AnyArray, "B ..."],
    step: Int[AnyArray, " B"],
    noise: Float[AnyArray, "B ..."],
) -> Float[Array, "B ..."]:
    """What a model of this kind predicts. Raises ZooError for another kind than `KINDS`."""
    _check(kind)
    a, s = _at(schedule, step, clean)
    if kind == "v":
        return a * noise - s * clean
    return jnp.asarray(noise if kind == "noise" else clean, jnp.float32)


def parts(
    schedule: Schedule,
    kind: str,
    prediction: Float[AnyArray, "B ..."],
    noisy: Float[AnyArray, "B ..."],
    step: Int[AnyArray, " B"],
) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."]]:
    """(clean, noise) that the prediction says `noisy` is made of: undoes `target`. Raises ZooError for another kind."""
    _check(kind)
    a, s = _at(schedule, step, noisy)
    prediction, noisy = jnp.asarray(prediction, jnp.float32), jnp.asarray(noisy, jnp.float32)
    if kind == "v":
        return a * noisy - s * prediction, s * noisy + a * prediction
    if kind == "noise":
        return (noisy - s * prediction) / a, prediction
    return prediction, (noisy - a * prediction) / s


def drop_labels(key: Key[Array, ""], label: Int[AnyArray, " B"], rate: float, none: int) -> Int[Array, " B"]:
    """Labels, a share `rate` of them replaced by `none`, as guidance needs it (Ho and Salimans, 2207.12598)."""
    return jnp.where(jax.random.uniform(key, label.shape) < rate, none, label)


def guided(
    conditional: Float[AnyArray, "*shape"], unconditional: Float[AnyArray, "*shape"], scale: float
) -> Float[Array, "*shape"]:
    """unconditional + scale · (conditional − unconditional): 0 forgets the label, 1 is the model as it is.

    A scale g here is 1 + w of Ho and Salimans (2207.12598, equation 6). The mean of predictions is right for each of
    `KINDS`, which are linear in one another.
    """
    return jnp.asarray(unconditional) + scale * (jnp.asarray(conditional) - unconditional)


def sample_ddpm(
    predict: Predict,
    schedule: Schedule,
    noise: Float[AnyArray, "B ..."],
    kind: str,
    key: Key[Array, ""],
    *,
    limit: float = 0.0,
) -> Float[Array, "B ..."]:
    """From `noise` back through every step, with new noise at each but the last (DDPM, algorithm 2).

    limit  largest magnitude of the clean signal that is guessed on the way; 0 lets it be

    The spread of the new noise is that of the true step back when the signal is known, (s_{t−1}/s_t)²·β_t. Raises
    ZooError for another kind than `KINDS`.
    """
    return sample_ddim(predict, schedule, noise, kind, steps=schedule.steps, eta=1.0, key=key, limit=limit)


def sample_ddim(
    predict: Predict,
    schedule: Schedule,
    noise: Float[AnyArray, "B ..."],
    kind: str,
    *,
    steps: int,
    eta: float = 0.0,
    key: Key[Array, ""] | None = None,
    limit: float = 0.0,
) -> Float[Array, "B ..."]:
    """From `noise` back through `steps` of the schedule's steps, evenly chosen (DDIM, 2010.02502, equation 12).

    eta    how much of the noise is new at every step: 0 none, and then what comes out is a function of `noise`; 1 all
           of it, and with every step that is `sample_ddpm`
    key    of the new noise; needed unless eta is 0
    limit  largest magnitude of the clean signal that is guessed on the way; 0 lets it be

    Raises ZooError for another kind than `KINDS`, more steps than there are, or no key where one is needed.
    """
    _check(kind)
    if not 1 <= steps <= schedule.steps:
        raise ZooError(f"sample_ddim steps: got {steps}, wanted 1 to {schedule.steps}")
    if eta and key is None:
        raise ZooError(f"sample_ddim: eta {eta} draws new noise, wanted a key")
    chosen = np.linspace(schedule.steps - 1, 0, steps).round().astype(np.int32) if steps > 1 else [schedule.steps - 1]
    # Before the cleanest step lies the signal itself.
    a, s = (
        jnp.append(jnp.asarray(each)[jnp.asarray(chosen)], end)
        for each, end in ((schedule.signal, 1), (schedule.noise, 0))
    )
    keys = jax.random.split(jax.random.key(0) if key is None else key, steps)

    def back(noisy: Any, at: Any) -> Any:
        step, a, s, key = at
        each = jnp.full(len(noisy), step)
        clean, old = parts(schedule, kind, predict(noisy, each), noisy, each)
        if limit:
            clean = jnp.clip(clean, -limit, limit)
            old = (noisy - a[0] * clean) / s[0]
        kept_square = jnp.square(a[0] / a[1])
        new = eta * s[1] / s[0] * jnp.sqrt(jnp.maximum(1 - kept_square, 0))
        result = a[1] * clean + jnp.sqrt(jnp.maximum(jnp.square(s[1]) - jnp.square(new), 0)) * old
        if eta:
            result += new * jax.random.normal(key, noisy.shape)
        return result, None

    pairs = [jnp.stack([each[:-1], each[1:]], axis=1) for each in (a, s)]
    drawn, _ = jax.lax.scan(back, jnp.asarray(noise, jnp.float32), (jnp.asarray(chosen, jnp.int32), *pairs, keys))
    return drawn


def _of_betas(betas: np.ndarray) -> Schedule:
    kept = np.cumprod(1 - betas.astype(np.float64))
    return Schedule(np.sqrt(kept).astype(np.float32), np.sqrt(1 - kept).astype(np.float32))


def _at(schedule: Schedule, step: AnyArray, like: AnyArray) -> tuple[Array, Array]:
    """a and s of each example's step, to multiply [B, …] with."""
    shape = (-1,) + (1,) * (like.ndim - 1)
    signal, noise = (jnp.asarray(each)[jnp.asarray(step)].reshape(shape) for each in (schedule.signal, schedule.noise))
    return signal, noise


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ZooError(f"diffusion kind: got {kind!r}, wanted one of {', '.join(KINDS)}")
