"""What each tokenizer keeps of a signal, at what rate: equal steps, one person trains, the other tests.

    python benchmarks/tokenizers.py                                   # all, on faces_eeg and hcp_rest_rois
    python benchmarks/tokenizers.py --tokenizers neurorvq_tiny labram_vqnsp_tiny --steps 100

Every tokenizer sees the same windows of the same channels, as many steps, one learning rate. Beside each stand the
fixed ways to spend the same bits: mu-law and quantile levels of a signal sampled more slowly, and principal components
of windows, each rounded to quantile levels; of their settings (levels and rate, components and levels) the best on the
training data.

Reconstructions are made with the scale that a tokenizer needs beside its codes; what that costs, 16 bits a number, is
part of the rate. All figures are of people whom nothing was fitted to.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

# Before this file's own folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import zoo
from zoo.batches import find_source
from zoo.data.prepare import prepare
from zoo.data.recipes import RECIPES, Recipe
from zoo.data.store import Dataset
from zoo.errors import ZooError
from zoo.evaluate.codes import BANDS, BOLD_BANDS, reconstruction, usage
from zoo.objectives.train_tokenizer import TrainTokenizer
from zoo.terminal import parse
from zoo.types import Sensors

CHANNELS = 16
SECONDS = 4.0
BATCH = 8
TESTED = 64
"""Windows that figures are of, evenly over those of the test."""
LEARNING_RATE = 1e-3
NUMBER_BITS = 16
"""Of each number of a scale."""


@dataclass(frozen=True)
class Source:
    """Windows to learn from and to be measured on: a sample, how it is prepared, how long a window is, its bands."""

    sample: str
    recipe: Recipe
    samples: int
    folder: str = ""
    bands: Mapping[str, tuple[float, float]] = field(default_factory=lambda: BANDS)


def _eeg(rate_hz: float, samples: int) -> Source:
    recipe = replace(
        RECIPES["labram"],
        notch_hz=(60.0,),
        rate_hz=rate_hz,
        sensor_names="nearest",
        scale="robust",
        clip=10.0,
        segment_seconds=20.0,
    )
    return Source("faces_eeg", recipe, samples)


EEG_200, EEG_256 = _eeg(200.0, 800), _eeg(256.0, 1024)
REGIONS = Source(
    "hcp_rest_rois",
    Recipe(name="regions", kinds=("roi",), scale="zscore", sensor_names="none", segment_seconds=3600.0),
    300,
    folder="hcp",
    bands=BOLD_BANDS,
)


@dataclass(frozen=True)
class Contender:
    """A tokenizer of the table."""

    source: Source
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


CONTENDERS: dict[str, Contender] = {
    "labram_vqnsp_tiny": Contender(EEG_200, "labram_vqnsp_tiny"),
    "labram_vqnsp_tiny, gradient": Contender(EEG_200, "labram_vqnsp_tiny", {"learning": "gradient"}),
    "neurorvq_tiny": Contender(EEG_200, "neurorvq_tiny"),
    "neurorvq_tiny, one level": Contender(EEG_200, "neurorvq_tiny", {"levels": 1}),
    "tfm_tiny": Contender(EEG_200, "tfm_tiny"),
    "braintokenizer_tiny": Contender(EEG_256, "braintokenizer_tiny"),
    "ephys_tokenizer_tiny": Contender(EEG_200, "ephys_tokenizer_tiny", {"rate_hz": 200.0}),
    "ephys_tokenizer_tiny on regions": Contender(REGIONS, "ephys_tokenizer_tiny", {"rate_hz": 1 / 0.72}),
}


@dataclass(frozen=True)
class Options:
    """Trains every tokenizer for as many steps and prints what it keeps.

    Attributes:
        tokenizers: which; all unless given
        steps: of training
        seed: of parameters and of the order of windows
        prepared: where prepared recordings are, or are put
        json: write the figures here, after every row
    """

    tokenizers: tuple[str, ...] = ()
    steps: int = 300
    seed: int = 0
    prepared: Path = Path("prepared")
    json: Path | None = None


@dataclass(frozen=True)
class Windows:
    """Windows [B, C, T] to train on and to test on, their sensors and the rate."""

    train: np.ndarray
    test: np.ndarray
    train_sensors: Sensors
    test_sensors: Sensors
    rate_hz: float


@dataclass(frozen=True)
class Row:
    """A tokenizer after training. Bits are a channel's; `kept` a `Reconstruction`; speeds channel-seconds a second."""

    tokenizer: str
    parameters: int
    bits_per_second: float
    kept: dict[str, Any]
    same_bits: dict[str, float]
    perplexity: float
    codes: int
    live: float
    stable: float
    tokenized_per_second: float
    step_seconds: float
    loss: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 2 for bad input."""
    try:
        options = parse(
            Options, list(sys.argv[1:] if arguments is None else arguments), prog="benchmarks/tokenizers.py"
        )
        for name in options.tokenizers:
            if name not in CONTENDERS:
                raise ZooError(f"--tokenizers: {name!r} is not among {', '.join(CONTENDERS)}")
        rows: list[Row] = []
        for name in options.tokenizers or CONTENDERS:
            rows.append(measured(name, options))
            print(
                f"{name}: R² {rows[-1].kept['r2']['value']:.3f} at {rows[-1].bits_per_second:.1f} bit/s",
                file=sys.stderr,
                flush=True,
            )
            if options.json:
                options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    except ZooError as error:
        print(error, file=sys.stderr)
        return 2
    show(rows)
    return 0


def windows(source: Source, prepared: Path) -> Windows:
    """The first person's windows train, the second's test; of region series those of the first five people train."""
    folder = prepared / f"tokenizers_{source.sample}_{source.recipe.rate_hz or 'own'}"
    prepare(find_source(source.sample) / source.folder, folder, source.recipe)
    dataset = Dataset.open(folder)
    parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    of: dict[str, list[int]] = {"train": [], "test": []}
    people = list(dict.fromkeys(recording.subject for recording in dataset.recordings))
    trained_on = people[: max(1, len(people) // 2)]
    tables, table_of = dataset.sensor_tables()
    channels = np.linspace(0, dataset.n_channels - 1, CHANNELS).astype(int)
    for record, recording in enumerate(dataset.recording):
        part = "train" if dataset.recordings[recording].subject in trained_on else "test"
        signal = dataset[record][channels]
        for start in range(0, signal.shape[1] - source.samples + 1, source.samples):
            parts[part].append(signal[:, start : start + source.samples])
            of[part].append(int(table_of[recording]))
    sensors = {
        part: Sensors(**{name: values[np.array(rows)][:, channels] for name, values in tables.items()})
        for part, rows in of.items()
    }
    train, test = (np.stack(parts[part]) for part in ("train", "test"))
    return Windows(train, test, sensors["train"], sensors["test"], dataset.rate_hz)


def measured(name: str, options: Options) -> Row:
    """The tokenizer after `options.steps` steps of AdamW (warm-up over a tenth, then a cosine to a tenth)."""
    contender = CONTENDERS[name]
    data = windows(contender.source, options.prepared)
    task = TrainTokenizer(tokenizer=contender.name, options=dict(contender.options))
    tokenizer = task.module()
    variables, step_seconds, loss = trained(task, data, options)
    chosen = np.linspace(0, len(data.test) - 1, min(TESTED, len(data.test) // BATCH * BATCH)).astype(int)
    signal, sensors = data.test[chosen], take(data.test_sensors, chosen)
    codes, rebuilt, again, speed = reconstructed(tokenizer, variables, signal, sensors)
    seconds, valid = signal.shape[-1] / data.rate_hz, np.asarray(sensors.valid)
    numbers = sum(leaf[0].size for leaf in jax.tree.leaves(tokenizer.scale(signal[:1], take(sensors, slice(0, 1)))))
    tokens = codes.shape[1]
    bits = tokens * sum(np.log2(size) for size in tokenizer.code_sizes) + NUMBER_BITS * numbers
    rate = float(bits / seconds / signal.shape[1])
    used = usage(codes, tokenizer.code_sizes)
    there = codes >= 0
    kept = reconstruction(signal, rebuilt, data.rate_hz, valid, bands=contender.source.bands)
    return Row(
        tokenizer=name,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        bits_per_second=rate,
        kept=kept.to_json(),
        same_bits=same_bits(data, signal, valid, rate),
        perplexity=float(used.perplexity.mean()),
        codes=tokenizer.code_sizes[0],
        live=float(used.live.mean()),
        stable=float((codes == again)[there].mean()),
        tokenized_per_second=speed * seconds * signal.shape[1],
        step_seconds=step_seconds,
        loss=loss,
    )


def trained(task: TrainTokenizer, data: Windows, options: Options) -> tuple[Any, float, float]:
    """(variables, seconds of a step, loss of the last tenth of the steps)."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, LEARNING_RATE, options.steps // 10, options.steps, LEARNING_RATE / 10
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-4))
    batches = drawn(data, options)
    batch = next(batches)
    variables = jax.jit(lambda key: nn.unbox(task.init(key, batch)))(jax.random.key(options.seed))
    others = {name: part for name, part in variables.items() if name != "params"}

    @jax.jit
    def step(carry: Any, batch: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, others, state = carry

        def loss(params: Any) -> Any:
            value, _, new = task.loss({"params": params, **others}, batch, key, True)
            return value, {**others, **new}

        (value, others), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), others, state), value

    carry = (variables["params"], others, optimizer.init(variables["params"]))
    times, values = [], []
    for number in range(options.steps):
        before = time.perf_counter()
        carry, value = step(carry, next(batches), jax.random.key(number))
        values.append(float(value))
        times.append(time.perf_counter() - before)
    if not np.isfinite(values).all():
        raise ZooError(f"{task.tokenizer}: the loss is not finite from step {int(np.argmin(np.isfinite(values)))} on")
    last = statistics.mean(values[-max(1, options.steps // 10) :])
    return {"params": carry[0], **carry[1]}, statistics.median(times[1:] or times), last


def drawn(data: Windows, options: Options) -> Iterator[Any]:
    """Batches of training windows drawn at random, without end."""
    rng = np.random.default_rng(options.seed)
    while True:
        rows = rng.integers(len(data.train), size=BATCH)
        yield {"signal": data.train[rows], "sensors": take(data.train_sensors, rows)}


def reconstructed(
    tokenizer: Any, variables: Any, signal: np.ndarray, sensors: Sensors
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """(codes, reconstruction, codes of the reconstruction, windows tokenized a second) of whole batches."""

    @jax.jit
    def both(signal: Any, sensors: Any) -> Any:
        out = tokenizer.apply(variables, signal, sensors)
        return out.codes, out.reconstruction

    encode = jax.jit(lambda signal, sensors: tokenizer.apply(variables, signal, sensors, method="encode"))
    parts: list[tuple[np.ndarray, ...]] = []
    times = []
    for first in range(0, len(signal), BATCH):
        rows = slice(first, first + BATCH)
        codes, rebuilt = both(signal[rows], take(sensors, rows))
        again = encode(rebuilt, take(sensors, rows))
        before = time.perf_counter()
        jax.block_until_ready(encode(signal[rows], take(sensors, rows)))
        times.append(time.perf_counter() - before)
        parts.append(tuple(map(np.asarray, (codes, rebuilt, again))))
    codes, rebuilt, again = (np.concatenate(each) for each in zip(*parts, strict=True))
    return codes, rebuilt, again, BATCH / statistics.median(times)


def same_bits(data: Windows, signal: np.ndarray, valid: np.ndarray, bits_per_second: float) -> dict[str, float]:
    """R² of the fixed baselines at no more bits a second and channel, by name."""
    seconds = data.train.shape[-1] / data.rate_hz
    budget = int(bits_per_second * seconds)
    some = data.train[:: max(1, len(data.train) // 128)]
    some_valid = np.asarray(data.train_sensors.valid)[:: max(1, len(data.train) // 128)]
    found = {}
    for name, coder in (("mu-law", levels("mu_law")), ("quantile", levels("quantile")), ("PCA", components)):
        tried = [coder(some[some_valid], budget, bits) for bits in (2, 3, 4, 5, 6, 8)]
        fitted = [each for each in tried if each is not None]
        if not fitted:
            found[name] = float("nan")
            continue
        scores = [r_squared(some[some_valid], each(some[some_valid])) for each in fitted]
        best = fitted[int(np.argmax(scores))]
        found[name] = r_squared(signal[valid], best(signal[valid]))
    return found


def r_squared(series: np.ndarray, rebuilt: np.ndarray) -> float:
    """The share of the series' [M, T] variance about their means that is explained."""
    centred = series - series.mean(-1, keepdims=True)
    return float(1 - np.square(series - rebuilt).sum() / np.square(centred).sum())


def levels(name: str) -> Any:
    """A coder of series [M, T] by 2^bits levels of the series sampled as often as the budget allows."""

    def coder(train: np.ndarray, budget: int, bits: int) -> Any:
        from scipy.signal import resample

        kept = min(budget // bits, train.shape[-1])
        if kept < 2:
            return None
        tokenizer = zoo.create(name, vocabulary=2**bits)
        found = tokenizer.fit(resample(train, kept, axis=-1)[:, None])["levels"]
        edges, centres = (np.asarray(found[part]) for part in ("edges", "centres"))

        def rebuilt(series: np.ndarray) -> np.ndarray:
            rounded = centres[np.digitize(resample(series, kept, axis=-1), edges)]
            return resample(rounded, series.shape[-1], axis=-1)

        return rebuilt

    return coder


def components(train: np.ndarray, budget: int, bits: int) -> Any:
    """A coder of series [M, T] by their first principal components, each rounded to 2^bits quantile levels."""
    from sklearn.decomposition import PCA

    kept = min(budget // bits, min(train.shape))
    if kept < 1:
        return None
    found = PCA(kept, svd_solver="randomized", random_state=0).fit(train)
    scores = found.transform(train)
    edges = np.quantile(scores, np.linspace(0, 1, 2**bits + 1)[1:-1], axis=0)
    middle = np.quantile(scores, (np.arange(2**bits) + 0.5) / 2**bits, axis=0)

    def rebuilt(series: np.ndarray) -> np.ndarray:
        projected = found.transform(series)
        level = (projected[:, None] >= edges).sum(1)
        return found.inverse_transform(np.take_along_axis(middle, level, axis=0))

    return rebuilt


def show(rows: Sequence[Row]) -> None:
    """A table for each set of bands, a row a tokenizer."""
    for bands in dict.fromkeys(tuple(row.kept["bands"]) for row in rows):
        table = Table(title="tokenizers, tested on people they were not trained on")
        columns = ("tokenizer", "bit/s", "R²", "µ-law", "quantile", "PCA", "perplexity", "live", "stable", "s/s")
        measures = [(band, measure) for measure in ("spectrum", "phase") for band in bands]
        for heading in (*columns, *(f"{band} {measure}" for band, measure in measures)):
            table.add_column(heading, justify="left" if heading == "tokenizer" else "right")
        for row in rows:
            if tuple(row.kept["bands"]) != bands:
                continue
            table.add_row(
                row.tokenizer,
                f"{row.bits_per_second:.1f}",
                f"{row.kept['r2']['value']:.3f}",
                *(f"{row.same_bits[name]:.3f}" for name in ("mu-law", "quantile", "PCA")),
                f"{row.perplexity:.0f} of {row.codes}",
                f"{row.live:.0%}",
                f"{row.stable:.0%}",
                f"{row.tokenized_per_second:,.0f}",
                *(f"{row.kept['bands'][band][measure]['value']:.2f}" for band, measure in measures),
            )
        Console(width=200).print(table)


def take(sensors: Sensors, rows: slice | np.ndarray) -> Sensors:
    return jax.tree.map(lambda leaf: leaf[rows], sensors)


if __name__ == "__main__":
    sys.exit(main())
