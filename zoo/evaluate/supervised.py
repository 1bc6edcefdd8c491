"""Any encoder of the zoo as an estimator that `zoo.evaluate.probe.cross_validate` can fit: trained from labels alone.

    estimator = SupervisedEstimator("eegnet_base", names, rate_hz, options={"channels": names, "samples": 64})
    result = cross_validate(as_features(windows.signal, windows.subject), trials, estimator)

Encoders and the classical decoder (`zoo.evaluate.baseline.ShrinkageLDA`) are so compared on the same folds. All folds,
seeds and copies of an estimator share one compiled training step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from zoo.errors import ZooError
from zoo.objectives.supervised import Classifier, class_weights, cross_entropy
from zoo.sensors import KINDS, NAME_INDEX
from zoo.types import Sensors, Variables

WARMUP = 0.1
"""Share of the steps in which the learning rate rises; a cosine to zero follows."""


def as_features(signal: np.ndarray, subject: np.ndarray) -> np.ndarray:
    """Windows [N, C, T] and whose they are [N] as rows [N, C·T + 1]; the last column is the person's number.

    People are numbered in sorted order. The estimator takes these rows and no others.
    """
    people = np.unique(subject, return_inverse=True)[1]
    return np.column_stack([signal.reshape(len(signal), -1), people]).astype(np.float32)


@dataclass
class SupervisedEstimator:
    """An encoder and its classifier, trained on the rows of `as_features`.

    Attributes:
        name: registered encoder
        channels: canonical names of the rows' channels, "" for one that has none
        rate_hz: sampling rate of the rows
        options: replacements for the encoder's options
        positions: [C, 3] metres in head coordinates; None where they are unknown
        valid: [C] bool, False for channels that are never read; None for all
        kind: of the channels
        adapter: options of a `zoo.layers.channel_adapter.ChannelAdapter` that leads these channels to the encoder's
        epochs: passes over the training rows
        batch: rows a step; each step has a full batch, the last of a pass goes on into the next
        learning_rate: at its highest, of AdamW
        weight_decay: of matrices and kernels
        encoder_rate: factor of the encoder's learning rate; 0 freezes it, and then its statistics too
        clip_norm: of the gradient
        smoothing: of labels
        dropout: before the classifier, besides its own
        balanced: whether classes weigh the same, however many rows they have
        time_shift: largest shift of a training row, seconds; what leaves at one end is zero at the other
        channel_dropout: share of the channels of a training row that are silenced; the others grow by 1 / (1 − share),
            so that sums over channels, and statistics of them, are those of whole rows
        noise: deviation of the noise added to a training row, in deviations of the row's channels
        standardise: "channel": mean 0 and deviation 1 of each channel over the training rows; "all": one mean and
            deviation for all of them; "none": as given
        align: whether each person's rows are whitened by the square root of their mean covariance (He and Wu 2020,
            IEEE Trans. Biomed. Eng. 67: 399–410), without labels: by the training rows of a person who has some,
            else by the rows to be predicted
        ensemble: models from different seeds, whose probabilities are averaged
        initial: variables of the encoder to begin from, such as `zoo.load` gives; None begins at random
        seed: of everything that is drawn
    """

    name: str
    channels: tuple[str, ...]
    rate_hz: float
    options: Mapping[str, Any] = field(default_factory=dict)
    positions: np.ndarray | None = None
    valid: np.ndarray | None = None
    kind: str = "eeg"
    adapter: Mapping[str, Any] | None = None
    epochs: int = 30
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    encoder_rate: float = 1.0
    clip_norm: float = 1.0
    smoothing: float = 0.0
    dropout: float = 0.0
    balanced: bool = True
    time_shift: float = 0.0
    channel_dropout: float = 0.0
    noise: float = 0.0
    standardise: str = "channel"
    align: bool = False
    ensemble: int = 1
    initial: Variables | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.standardise not in ("channel", "all", "none"):
            raise ZooError(f"standardise: got {self.standardise!r}, wanted 'channel', 'all' or 'none'")

    def fit(self, features: np.ndarray, label: np.ndarray) -> SupervisedEstimator:
        """Trains from the start. Raises ZooError for rows or channels that the encoder cannot take, and where the loss
        is not finite."""
        signal, people = self._windows(features)
        self.encoder().check_recording(self.rate_hz, (self.kind,) * len(self.channels), self.channels)
        self._fit_scaling(signal, people)
        signal = self._scaled(signal, people)
        classes = int(label.max()) + 1
        weights = class_weights(label, classes) if self.balanced else np.ones(classes, np.float32)
        self.classifier = Classifier(self.encoder(), classes, self.dropout)
        self.members = [self._train(signal, label, people, weights, number) for number in range(self.ensemble)]
        return self

    def predict_proba(self, features: np.ndarray) -> np.ndarray:
        """[n, K] class probabilities, the mean over the ensemble."""
        signal, people = self._windows(features)
        signal = self._scaled(signal, people)
        _, _, predict = _program(self.classifier, *self._static())
        found = np.zeros((len(signal), self.classifier.classes))
        sensors = self._sensors()
        for first in range(0, len(signal), self.batch):
            # The last batch is filled up with its first row, so that every batch has one shape.
            chosen = np.arange(first, first + self.batch)
            chosen[chosen >= len(signal)] = first
            rows = chosen[: len(signal) - first]
            each = [predict(member, signal[chosen], sensors, people[chosen]) for member in self.members]
            found[rows] = np.mean(each, axis=0)[: len(rows)]
        return found

    def encoder(self) -> Any:
        """The encoder, behind its adapter where it has one."""
        from zoo.registry import create

        encoder = create(self.name, **self.options)
        if self.adapter is None:
            return encoder
        from zoo.encoders.adapted import Adapted
        from zoo.layers.channel_adapter import ChannelAdapter

        return Adapted(encoder, ChannelAdapter(**self.adapter))

    def _train(
        self, signal: np.ndarray, label: np.ndarray, people: np.ndarray, weights: np.ndarray, number: int
    ) -> Any:
        start, step, _ = _program(self.classifier, *self._static())
        sensors, rows = self._sensors(), np.arange(self.batch) % len(signal)
        seed = self.seed + 1000 * number
        key = jax.random.key(seed)
        variables = start(key, signal[rows], sensors, people[rows])
        if self.initial is not None:
            variables = _begin_from(variables, self.initial, self.adapter is not None)
        steps = max(1, round(self.epochs * len(signal) / self.batch))
        state = variables, _rule(*self._static()).init(variables["params"])
        value: Any = 0.0
        for count, rows in zip(range(steps), _batches(len(signal), self.batch, seed), strict=False):
            rate = np.float32(self.learning_rate * _shape_of_rate(count, steps))
            state, value = step(
                state, signal[rows], sensors, label[rows], people[rows], weights, rate, jax.random.fold_in(key, count)
            )
        if not np.isfinite(value):
            raise ZooError(f"{self.name}: the loss is not finite after {steps} steps; wanted a smaller learning_rate")
        return state[0]

    def _static(self) -> tuple[Any, ...]:
        """What the compiled step is made for."""
        shift = round(self.time_shift * self.rate_hz)
        augmentation = shift, self.channel_dropout, self.noise
        return self.weight_decay, self.encoder_rate, self.clip_norm, self.smoothing, augmentation

    def _windows(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        samples, left = divmod(features.shape[1] - 1, len(self.channels))
        if left or samples < 1:
            raise ZooError(
                f"{self.name}: got rows of {features.shape[1]} numbers, wanted {len(self.channels)} channels times "
                "samples, and one for the person: see as_features"
            )
        signal = features[:, :-1].reshape(len(features), len(self.channels), samples)
        return signal.astype(np.float32), features[:, -1].round().astype(np.int32)

    def _fit_scaling(self, signal: np.ndarray, people: np.ndarray) -> None:
        self.whitening = {each: _whitening(signal[people == each]) for each in np.unique(people)} if self.align else {}
        axes = {"channel": (0, 2), "all": (0, 1, 2)}.get(self.standardise)
        self.mean, self.deviation = np.zeros((), np.float32), np.ones((), np.float32)
        if axes is not None:
            signal = self._whitened(signal, people)
            self.mean = signal.mean(axes, keepdims=True)
            self.deviation = signal.std(axes, keepdims=True)
            self.deviation[self.deviation == 0] = 1

    def _scaled(self, signal: np.ndarray, people: np.ndarray) -> np.ndarray:
        return ((self._whitened(signal, people) - self.mean) / self.deviation).astype(np.float32)

    def _whitened(self, signal: np.ndarray, people: np.ndarray) -> np.ndarray:
        if not self.align:
            return signal
        whitened = np.empty_like(signal)
        for each in np.unique(people):
            rows = people == each
            matrix = self.whitening.get(each)
            whitened[rows] = (_whitening(signal[rows]) if matrix is None else matrix) @ signal[rows]
        return whitened

    def _sensors(self) -> Sensors:
        shape = (self.batch, len(self.channels))
        unknown = np.full((*shape, 3), np.nan, np.float32)
        index = [NAME_INDEX.get(name, -1) for name in self.channels]
        return Sensors(
            position=unknown if self.positions is None else np.broadcast_to(np.float32(self.positions), (*shape, 3)),
            orientation=unknown,
            kind=np.full(shape, KINDS.index(self.kind), np.int32),
            name=np.broadcast_to(np.array(index, np.int32), shape),
            valid=np.ones(shape, bool) if self.valid is None else np.broadcast_to(self.valid, shape),
        )


def _whitening(signal: np.ndarray) -> np.ndarray:
    """[C, C] float32: R^-½, R the mean over rows [n, C, T] of X·Xᵀ/T. Directions without power stay as small."""
    covariance = np.einsum("nct,ndt->cd", signal, signal, dtype=np.float64) / (len(signal) * signal.shape[-1])
    values, vectors = np.linalg.eigh(covariance)
    floor = 1e-6 * values[-1]
    return ((vectors / np.sqrt(np.maximum(values, floor))) @ vectors.T).astype(np.float32)


def _batches(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of full batches without end, each pass over `count` rows in another order."""
    rng = np.random.default_rng(seed)
    left = np.array([], np.int64)
    while True:
        while len(left) < size:
            left = np.concatenate([left, rng.permutation(count)])
        yield left[:size]
        left = left[size:]


def _shape_of_rate(step: int, steps: int) -> float:
    """The learning rate's share of its highest value."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * float(np.cos(np.pi * (step - warmup) / max(1, steps - warmup)))


def _begin_from(variables: Any, initial: Variables, adapted: bool) -> Any:
    """The classifier's variables with the encoder's replaced by `initial`. Raises ZooError where they do not fit."""
    initial = nn.unbox(initial)
    merged = dict(variables)
    for name, values in initial.items():
        inside = dict(merged.get(name, {}).get("encoder", {}))
        old = inside.get("encoder", {}) if adapted else inside
        if jax.tree.map(jnp.shape, dict(old)) != jax.tree.map(jnp.shape, dict(values)):
            raise ZooError(f"initial: its {name} are not those of the encoder")
        # Copies: the step is given these arrays for good.
        values = jax.tree.map(jnp.array, values)
        merged[name] = {**merged[name], "encoder": {**inside, "encoder": values} if adapted else values}
    return merged


def _rule(weight_decay: float, encoder_rate: float, clip_norm: float, *_: Any) -> optax.GradientTransformation:
    """AdamW for a learning rate of 1, which the step multiplies by the true one."""

    def is_matrix(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    def of_part(updates: Any, state: Any, params: Any = None) -> Any:
        scaled = {
            part: jax.tree.map(lambda leaf: leaf * (encoder_rate if part == "encoder" else 1.0), inner)  # noqa: B023
            for part, inner in updates.items()
        }
        return scaled, state

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(1.0, weight_decay=weight_decay, mask=is_matrix),
        optax.GradientTransformation(lambda _: optax.EmptyState(), of_part),
    )


@functools.lru_cache(maxsize=8)
def _program(
    model: Classifier,
    weight_decay: float,
    encoder_rate: float,
    clip_norm: float,
    smoothing: float,
    augmentation: tuple[int, float, float],
) -> tuple[Any, Any, Any]:
    """Compiled once for all folds: (variables at first, training step, class probabilities)."""
    rule = _rule(weight_decay, encoder_rate, clip_norm)

    def start(key: Any, signal: Any, sensors: Any, subject: Any) -> Any:
        return nn.unbox(model.init(key, signal, sensors, subject=_known(model, subject)))

    def step(
        state: Any, signal: Any, sensors: Any, label: Any, subject: Any, weights: Any, rate: Any, key: Any
    ) -> tuple[Any, Any]:
        variables, moments = state
        draw, dropout = jax.random.split(key)
        signal = _augmented(draw, signal, *augmentation)
        statistics = {name: value for name, value in variables.items() if name != "params"}

        def loss(params: Any) -> Any:
            logits, new = model.apply(
                {"params": params, **statistics},
                signal,
                sensors,
                subject=_known(model, subject),
                train=True,
                rngs={"dropout": dropout},
                mutable=list(statistics),
            )
            return cross_entropy(logits, label, smoothing=smoothing, weights=weights), new

        (value, new), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, moments = rule.update(gradient, moments, variables["params"])
        params = jax.tree.map(lambda old, update: old + rate * update, variables["params"], updates)
        if not encoder_rate:
            new = {name: {**value, "encoder": variables[name]["encoder"]} for name, value in new.items()}
        return ({"params": params, **new}, moments), value

    def predict(variables: Any, signal: Any, sensors: Any, subject: Any) -> Any:
        logits: Any = model.apply(variables, signal, sensors, subject=_known(model, subject))
        return jax.nn.softmax(logits)

    return jax.jit(start), jax.jit(step, donate_argnums=0), jax.jit(predict)


def _known(model: Classifier, subject: Any) -> Any:
    """People of the encoder's subject layer by number; a person beyond its rows is unknown."""
    return jnp.where(subject < max(model.encoder.subjects, 1), subject, -1)


def _augmented(key: Any, signal: Any, shift: int, channel_dropout: float, noise: float) -> Any:
    """Rows [B, C, T] moved in time, with channels silenced and noise added."""
    moving, hiding, adding = jax.random.split(key, 3)
    if noise:
        deviation = signal.std(-1, keepdims=True)
        signal = signal + noise * deviation * jax.random.normal(adding, signal.shape)
    if shift:
        padded = jnp.pad(signal, ((0, 0), (0, 0), (shift, shift)))
        first = jax.random.randint(moving, (len(signal),), 0, 2 * shift + 1)
        cut = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, signal.shape[-1], axis=-1))
        signal = cut(padded, first)
    if channel_dropout:
        hidden = jax.random.uniform(hiding, (*signal.shape[:2], 1)) < channel_dropout
        signal = jnp.where(hidden, 0, signal / (1 - channel_dropout))
    return signal
