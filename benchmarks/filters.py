"""The discriminative Kalman filter beside ridge regression: how loud the speech was, from intracranial recordings.

    python benchmarks/filters.py                 calibrated on one trial of a minute, tested on the others
    python benchmarks/filters.py --calibrate 9   calibrated on all trials but one

On the sample `speech_ieeg` at 10 Hz. Decoded is the sound's mean auditory spectrogram behind a low-pass of one pole,
from the ten channels now and before, nothing that comes later. Each trial begins one fold; trials are recordings of
their own, so nothing leaks between them. For each reach of lags the rows share their features: scikit-learn's ridge,
its penalty chosen by cross-validation within the calibration (consecutive blocks, a second left out on both sides of
a block); the filter on that ridge, which also knows from the calibration how loudness moves; Nadaraya-Watson, and the
filter on it. Intervals are Student's, 95 %, over folds; differences are paired with the ridge of the same lags and with
the best ridge.

Measured on one minute (two minutes on two busy cores): with .3 s of lags the correlation is .717 ± .011 for ridge and
.884 ± .011 filtered; with 1 s .854 ± .007 and .889 ± .007; the best ridge, with 3 s, has .879 ± .009, and filtering it
does not help (.865 ± .011). With `--skip 6` the filter on 1 s gains .017 ± .015 on the best ridge. With `--calibrate 9`
.728 becomes .913 and .875 becomes .917, but ridge with 3 s has enough to learn from: .924 ± .017, filtered .921.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import signal, stats

# Before this file's own folder, in which `kernels` would be this folder's file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from zoo.data.fetch import fetch
from zoo.data.matrices import load
from zoo.errors import ZooError
from zoo.state_space import discriminative_kalman as dk
from zoo.terminal import parse

TRIALS, RATE_HZ, SAMPLES_A_BIN = 10, 10, 10
BINS = 520
"""The shortest trial; others are cut, so that every fold runs the same compiled program."""
BLOCKS = 4
"""Consecutive blocks of each calibration trial that the penalty and the errors are cross-validated over."""
PENALTIES = 10.0 ** np.arange(0, 6)

Scores = dict[str, list[tuple[float, float]]]
"""Row → (correlation, R²) of each fold."""


@dataclass(frozen=True)
class Options:
    calibrate: int = 1
    """Trials to learn from; the others are decoded."""
    skip: int = 0
    """Leaves out the first trials. Order and lags below were chosen on the first six: 6 tests on data not looked at."""
    low_pass_seconds: float = 1.0
    """Time constant of what is decoded; 0 decodes the sound of each bin itself."""
    lags_seconds: tuple[float, ...] = (0.3, 1.0, 3.0)
    order: int = 4
    """Bins of loudness that make the filter's state: this one and those before."""
    validity: str = "replace"
    """See `zoo.state_space.discriminative_kalman.filter_posteriors`."""


def binned(x: np.ndarray) -> np.ndarray:
    """[samples, C] at 100 Hz → means of bins [BINS, C]."""
    return x[: BINS * SAMPLES_A_BIN].reshape(BINS, SAMPLES_A_BIN, -1).mean(1)


def with_past(x: np.ndarray, count: int) -> np.ndarray:
    """[T, C] → [T, (count + 1) · C]: each bin and those before it, the first repeated where there are none."""
    padded = np.concatenate([np.repeat(x[:1], count, axis=0), x])
    return np.concatenate([padded[count - k : count - k + len(x)] for k in range(count + 1)], axis=1)


def read(options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Channels [R, T, 10] and what to decode of the sound [R, T]."""
    file = fetch("speech_ieeg") / "demo_data.mat"
    numbers = range(options.skip, TRIALS)
    channels = np.stack([binned(np.asarray(load(file, f"out.resp[{n}]")).T) for n in numbers])
    loudness = np.stack([binned(np.asarray(load(file, f"out.aud[{n}]")).T).mean(1) for n in numbers])
    if options.low_pass_seconds:
        keep = np.exp(-1 / (RATE_HZ * options.low_pass_seconds))
        start = keep * loudness[:, :1]
        loudness = signal.lfilter([1 - keep], [1, -keep], loudness, axis=1, zi=start)[0]
    return channels, loudness


def best_penalty(x: np.ndarray, z: np.ndarray) -> float:
    """The penalty of the least squared error over blocks of the calibration [R, T, ...]."""
    from sklearn.linear_model import Ridge

    errors = np.zeros(len(PENALTIES))
    bins = np.arange(BINS)
    for start in range(0, BINS, BINS // BLOCKS):
        inside = (bins >= start) & (bins < start + BINS // BLOCKS)
        outside = (bins < start - RATE_HZ) | (bins >= start + BINS // BLOCKS + RATE_HZ)
        for n, penalty in enumerate(PENALTIES):
            model = Ridge(penalty).fit(np.concatenate(x[:, outside]), np.concatenate(z[:, outside]))
            errors[n] += np.sum((model.predict(np.concatenate(x[:, inside])) - np.concatenate(z[:, inside])) ** 2)
    return float(PENALTIES[errors.argmin()])


@partial(jax.jit, static_argnames=("kernel", "validity"))
def decoded(
    x: jax.Array, z: jax.Array, new: jax.Array, penalty: jax.Array, *, kernel: bool, validity: str
) -> tuple[jax.Array, jax.Array]:
    """Calibration [R, T, F], [R, T, Z], other trials [R', T, F] → loudness [R', T] of the regression, and filtered."""
    regress: Callable[..., Any] = partial(dk.fit_ridge, alpha=penalty)
    if kernel:
        regress = partial(dk.fit_nadaraya_watson, gap=RATE_HZ)
    ids = jnp.repeat(jnp.arange(len(x)), BINS)
    flat = x.reshape(-1, x.shape[-1]), z.reshape(-1, z.shape[-1])
    model = dk.fit(*flat, regress=regress, segment_ids=ids, folds=max(BLOCKS, len(x)))
    filtered = jax.vmap(lambda trial: dk.filter(model, trial, validity=validity).mean)(new)
    return jax.vmap(model.regression)(new)[..., 0], filtered[..., 0]


def score(predicted: np.ndarray, z: np.ndarray) -> tuple[float, float]:
    """Correlation and R², means over trials [R, T]."""
    correlations = [np.corrcoef(p, t)[0, 1] for p, t in zip(predicted, z, strict=True)]
    r2 = 1 - ((predicted - z) ** 2).sum(1) / ((z - z.mean(1, keepdims=True)) ** 2).sum(1)
    return float(np.mean(correlations)), float(np.mean(r2))


def measure(options: Options) -> Scores:
    from sklearn.linear_model import Ridge

    channels, loudness = read(options)
    states = np.stack([with_past(trial[:, None], options.order - 1) for trial in loudness])
    scores: Scores = {}
    for seconds in options.lags_seconds:
        features = np.stack([with_past(trial, round(seconds * RATE_HZ)) for trial in channels])
        for first in range(len(channels)):
            chosen = (first + np.arange(options.calibrate)) % len(channels)
            others = np.setdiff1d(np.arange(len(channels)), chosen)
            x = (features - features[chosen].mean((0, 1))) / features[chosen].std((0, 1))
            penalty = best_penalty(x[chosen], loudness[chosen])
            ridge = Ridge(penalty).fit(np.concatenate(x[chosen]), np.concatenate(loudness[chosen]))
            predictions = {"ridge": np.stack([ridge.predict(trial) for trial in x[others]])}
            kinds = {"ridge": False}
            # The kernel's memory grows with the square of calibration, and in many dimensions nothing is near.
            if options.calibrate == 1 and seconds == options.lags_seconds[0]:
                kinds["Nadaraya-Watson"] = True
            for name, kernel in kinds.items():
                # Loudness changes little between bins, so that some directions of its state nearly vanish.
                with jax.enable_x64(True):
                    alone, filtered = decoded(
                        x[chosen], states[chosen], x[others], penalty, kernel=kernel, validity=options.validity
                    )
                predictions.setdefault(name, np.asarray(alone))
                predictions[f"filter on {name}"] = np.asarray(filtered)
            for name, predicted in predictions.items():
                scores.setdefault(f"{seconds:g} s, {name}", []).append(score(predicted, loudness[others]))
    return scores


def interval(values: np.ndarray) -> str:
    """Mean and Student's interval over folds."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():+.3f} ± {half:.3f}"


def report(scores: Scores) -> Table:
    best = max((name for name in scores if name.endswith(", ridge")), key=lambda name: np.mean(scores[name], axis=0)[0])
    table = Table(title=f"{len(scores[best])} folds; the best ridge is that of {best.split(',')[0]}")
    for column in ("lags, decoder", "correlation", "R²", "correlation − same lags' ridge", "− best ridge"):
        table.add_column(column, justify="left" if column.startswith("lags") else "right")
    for name, folds in scores.items():
        values = np.array(folds)
        paired = [np.array(scores[f"{name.split(',')[0]}, ridge"]), np.array(scores[best])]
        gains = [interval(values[:, 0] - other[:, 0]) for other in paired]
        table.add_row(name, interval(values[:, 0]), interval(values[:, 1]), *gains)
    return table


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse(Options, sys.argv[1:] if arguments is None else arguments, prog="filters")
        trials = TRIALS - options.skip
        if not 1 <= options.calibrate < trials:
            raise ZooError(f"--calibrate {options.calibrate}: wanted 1 to {trials - 1} of the {trials} trials")
        Console(width=140).print(report(measure(options)))
    except ZooError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
