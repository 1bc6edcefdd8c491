"""Which three seconds of speech were heard, from ten intracranial channels: SimpleConv beside ridge regression.

    python benchmarks/speech_retrieval.py

On the sample `speech_ieeg`: ten trials of about a minute. Trials are left out in turn, so that every stretch of sound
is held out once; the bank of a fold is all stretches of its held-out trials, which do not overlap and of which none is
trained on. Brain windows begin 150 ms after the sound's. SimpleConv (`simple_conv_tiny`) predicts the 128 bands of the
sound's auditory spectrogram at each sample and is trained on `SpeechDecoding`, to choose the stretch that was heard
among the others of a batch; ridge regression predicts the same bands from the channels now and up to half a second
later, its penalty chosen on one of the training trials. Both rank the bank by `candidate_scores`. The file gives
channels names of the 10-20 system and no places; here they stand where electrodes of these names stand, only so that
attention can tell them apart.

p is that of a permutation test of all held-out windows within their folds (`zoo.evaluate.retrieval`), intervals are of
a bootstrap over them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

# Before this file's own folder, in which `kernels` would be this folder's file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flax.linen import meta
from rich.console import Console
from rich.table import Table

from zoo.data.fetch import fetch
from zoo.data.matrices import load
from zoo.data.samples import SAMPLES
from zoo.errors import ZooError
from zoo.evaluate.retrieval import retrieval
from zoo.objectives.contrast import candidate_scores
from zoo.objectives.speech import SpeechDecoding
from zoo.sensors import KINDS, NAME_INDEX
from zoo.terminal import parse
from zoo.types import Sensors

TRIALS, RATE_HZ = 10, 100
PENALTIES = 10.0 ** np.arange(1, 7)

Trial = tuple[np.ndarray, np.ndarray]
"""Channels [C, T], sound [T, F]."""


@dataclass(frozen=True)
class Options:
    folds: int = 5
    """Consecutive trials are held out together."""
    trials: int = TRIALS
    """Only the first so many."""
    seconds: tuple[float, ...] = (3.0, 1.0, 0.5)
    """Lengths of a stretch of sound."""
    delay_seconds: float = 0.15
    """From the sound to the brain's window."""
    steps: int = 150
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    dropout: float = 0.3
    seed: int = 0


def read(options: Options) -> list[Trial]:
    """Channels [C, T] and the sound's spectrogram, its fourth root [T, F], of each trial."""
    file = fetch("speech_ieeg") / "demo_data.mat"
    trials = []
    for n in range(options.trials):
        channels = np.asarray(load(file, f"out.resp[{n}]"), np.float32)
        sound = np.asarray(load(file, f"out.aud[{n}]"), np.float32).T
        trials.append((channels, np.maximum(sound, 0) ** 0.25))
    return trials


def standardised(trials: list[Trial], known: list[int]) -> list[Trial]:
    """Channels by median and quartiles and clipped at ±20, bands by mean and deviation, those of the `known` trials."""
    channels = np.concatenate([trials[n][0] for n in known], axis=1)
    low, middle, high = np.percentile(channels, (25, 50, 75), axis=1)[..., None]
    sound = np.concatenate([trials[n][1] for n in known])
    mean, deviation = sound.mean(0), sound.std(0) + 1e-6
    return [
        (np.clip((signal - middle) / (high - low), -20, 20).astype(np.float32), (heard - mean) / deviation)
        for signal, heard in trials
    ]


def windows(trials: list[Trial], options: Options, seconds: float, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Windows [N, C, T] that do not overlap, from sample `first` of each trial on, and their sounds [N, T, F]."""
    size, delay = round(seconds * RATE_HZ), round(options.delay_seconds * RATE_HZ)
    starts = [(t, at) for t in trials for at in range(first, len(t[1]) - size - delay + 1, size)]
    brain = np.stack([t[0][:, at + delay : at + delay + size] for t, at in starts])
    return brain, np.stack([t[1][at : at + size] for t, at in starts])


@cache
def sensors(count: int) -> Sensors:
    """The file's channel names where electrodes of these names stand."""
    import mne

    names = SAMPLES["speech_ieeg"].sidecars["demo_data.mat"]["ChannelNames"]
    places = mne.channels.make_standard_montage("colin27_1005").get_positions()["ch_pos"]
    shape = (count, len(names))
    return Sensors(
        position=np.broadcast_to([places[name] for name in names], (*shape, 3)).astype(np.float32),
        orientation=np.full((*shape, 3), np.nan, np.float32),
        kind=np.full(shape, KINDS.index("seeg"), np.int32),
        name=np.broadcast_to([NAME_INDEX[name.upper()] for name in names], shape).astype(np.int32),
        valid=np.ones(shape, bool),
    )


class Decoder:
    """SimpleConv and its training, compiled once for all folds."""

    def __init__(self, options: Options, seconds: float) -> None:
        self.options, self.seconds = options, seconds
        self.task = SpeechDecoding(options={"rate": float(RATE_HZ), "dropout": options.dropout})
        rate = optax.cosine_onecycle_schedule(options.steps, options.learning_rate, 0.1)
        self.optimizer = optax.adamw(rate, weight_decay=options.weight_decay)
        self.step = jax.jit(self._step)
        encoder: Any = self.task.encoder()
        self.predict = jax.jit(lambda variables, *given: encoder.apply(variables, *given).tokens)

    def fitted(self, trials: list[Trial]) -> Any:
        """The encoder's variables after training on these trials."""
        options, rng = self.options, np.random.default_rng(self.options.seed)
        variables: Any = None
        opt: Any = None
        for key in jax.random.split(jax.random.key(options.seed), options.steps):
            # From another sample on each time; windows of one batch do not overlap.
            brain, sound = windows(trials, options, self.seconds, int(rng.integers(round(self.seconds * RATE_HZ))))
            if len(brain) < options.batch:
                raise ZooError(f"--batch {options.batch}: the training trials have {len(brain)} windows")
            chosen = rng.permutation(len(brain))[: options.batch]
            batch = {"signal": brain[chosen], "sensors": sensors(options.batch), "target": sound[chosen]}
            if variables is None:
                variables = meta.unbox(self.task.init(key, batch))
                opt = self.optimizer.init(variables["params"])
            variables, opt, _ = self.step(variables, opt, batch, key)
        return {name: value["encoder"] for name, value in variables.items()}

    def _step(self, variables: Any, opt: Any, batch: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            value, metrics, new = self.task.loss({**variables, "params": params}, batch, key, True)
            return value, (metrics, new)

        (value, (_, new)), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, opt = self.optimizer.update(grads, opt, variables["params"])
        return {**new, "params": optax.apply_updates(variables["params"], updates)}, opt, value


def lagged(channels: np.ndarray) -> np.ndarray:
    """[C, T] → [T, C · 26]: each channel now and every 20 ms up to half a second later, the last sample repeated."""
    later = range(0, RATE_HZ // 2 + 1, 2)
    padded = np.concatenate([channels, np.repeat(channels[:, -1:], later[-1], axis=1)], axis=1)
    return np.concatenate([padded[:, lag : lag + channels.shape[1]] for lag in later]).T


def ridge(trials: list[Trial], held_out: list[Trial], options: Options, seconds: float) -> np.ndarray:
    """Sounds [N, T, F] predicted for the windows of the held-out trials."""
    from sklearn.linear_model import Ridge

    features, sounds = [lagged(t[0]) for t in trials], [t[1] for t in trials]

    def fitted(penalty: float, last: int) -> Ridge:
        return Ridge(penalty).fit(np.concatenate(features[:last]), np.concatenate(sounds[:last]))

    errors = [np.square(fitted(each, -1).predict(features[-1]) - sounds[-1]).mean() for each in PENALTIES]
    model = fitted(PENALTIES[int(np.argmin(errors))], len(trials))
    predicted = [(channels, model.predict(lagged(channels))) for channels, _ in held_out]
    return windows(predicted, options, seconds)[1]


def measure(options: Options, seconds: float) -> dict[str, list[np.ndarray]]:
    """Decoder → scores [N, N] of each fold, for stretches of so many seconds."""
    raw, decoder = read(options), Decoder(options, seconds)
    scores: dict[str, list[np.ndarray]] = {"SimpleConv": [], "ridge": []}
    for fold in np.array_split(np.arange(options.trials), options.folds):
        known = [n for n in range(options.trials) if n not in fold]
        trials = standardised(raw, known)
        training, held_out = [trials[n] for n in known], [trials[n] for n in fold]
        brain, bank = windows(held_out, options, seconds)
        predicted = decoder.predict(decoder.fitted(training), brain, sensors(len(brain)))
        scores["SimpleConv"].append(np.asarray(candidate_scores(predicted, bank)))
        linear = ridge(training, held_out, options, seconds)
        scores["ridge"].append(np.asarray(candidate_scores(linear, bank)))
    return scores


def row(name: str, seconds: float, folds: list[np.ndarray]) -> list[str]:
    found = retrieval(folds)
    banks = [scores.shape[1] for scores in folds]
    shares = [f"{each.value:.3f} [{each.low:.3f}, {each.high:.3f}]" for each in found.top.values()]
    chance = ", ".join(f"{each:.3f}" for each in found.chance.values())
    bank, rank = f"{min(banks)} to {max(banks)}", f"{found.median_rank:g}"
    return [name, f"{seconds:g} s", bank, *shares, chance, rank, f"{found.p:.0e}"]


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse(Options, sys.argv[1:] if arguments is None else arguments, prog="speech_retrieval")
        if not 2 <= options.folds <= options.trials <= TRIALS:
            raise ZooError(f"--folds {options.folds} of --trials {options.trials}: wanted 2 to {TRIALS}, folds no more")
        table = Table()
        for column in ("decoder", "stretch", "bank", "top-1 [95 %]", "top-10 [95 %]", "chance", "median rank", "p"):
            table.add_column(column)
        for seconds in options.seconds:
            for name, folds in measure(options, seconds).items():
                table.add_row(*row(name, seconds, folds))
        Console(width=140).print(table)
    except ZooError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
