"""Several prepared datasets as one, each with its share of the examples.

Which dataset example i comes from, and the how-manyth of its own it is, follow from i alone (`turn`); each dataset has
its own endless shuffle, and begins another epoch of itself whenever it has been taken whole. So a batch stays a pure
function of (seed, step), as it is in `zoo.data.loader`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from zoo.data.loader import Loader, Order
from zoo.data.remote import ShardCache
from zoo.data.store import Dataset
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.types import Batch


@dataclass(frozen=True)
class Mixed:
    """One dataset of a mixture.

    Attributes:
        prepared: folder or address of the prepared dataset
        weight: its share of the examples, in proportion to the weights of the others
    """

    prepared: str | Path
    weight: float = 1.0


class Mixture(Dataset):
    """Prepared datasets of one sampling rate as one dataset: records, recordings and montages one after another.

    datasets  name → dataset
    weights   name → share of the examples, in proportion; above 0
    source    [records] int64: which dataset a record is of
    shares    the weights as whole numbers without a common divisor

    Recordings and people are called NAME/…, so that those of two datasets never meet, and parts of the split are those
    that all datasets have. ZooError when sampling rates or the classes of events differ, when two names stand for the
    same folder, and for a weight that is no number above 0.
    """

    path: str  # type: ignore[assignment]

    def __init__(self, datasets: Mapping[str, Dataset], weights: Mapping[str, float]) -> None:
        _check_weights(weights)
        _check_datasets(datasets)
        self.datasets = tuple(datasets.values())
        self.names = tuple(datasets)
        self.shares = whole_numbers([weights[name] for name in datasets])
        first = self.datasets[0]
        self.path = " + ".join(str(dataset.path) for dataset in self.datasets)
        self.rate_hz, self.classes = first.rate_hz, first.classes
        montages = np.cumsum([0, *(len(dataset.montages) for dataset in self.datasets)]).tolist()
        self.montages = tuple(montage for dataset in self.datasets for montage in dataset.montages)
        self.recordings = tuple(
            replace(each, id=f"{name}/{each.id}", subject=f"{name}/{each.subject}", montage=each.montage + offset)
            for (name, dataset), offset in zip(datasets.items(), montages, strict=False)
            for each in dataset.recordings
        )
        self.people = tuple(f"{name}/{person}" for name, dataset in datasets.items() for person in dataset.people)
        self.person = _one_after_another([(each.person, len(each.people)) for each in self.datasets])
        self.n_channels = max(dataset.n_channels for dataset in self.datasets)
        self.recording = _one_after_another([(each.recording, len(each.recordings)) for each in self.datasets])
        self.start, self.length, self.label = (
            np.concatenate([getattr(dataset, field) for dataset in self.datasets])
            for field in ("start", "length", "label")
        )
        self.n_shards = sum(dataset.n_shards for dataset in self.datasets)
        self.n_bytes = sum(dataset.n_bytes for dataset in self.datasets)
        self._offset = np.cumsum([0, *map(len, self.datasets)])
        self.source = np.repeat(np.arange(len(self.datasets)), np.diff(self._offset))
        self.splits = {
            part: np.concatenate(
                [dataset.splits[part] + offset for dataset, offset in zip(self.datasets, self._offset, strict=False)]
            )
            for part in first.splits
            if all(part in dataset.splits for dataset in self.datasets)
        }
        self._first = np.searchsorted(self.recording, np.arange(len(self.recordings) + 1))
        self._forget()

    @classmethod
    def open_all(cls, mix: Mapping[str, Mixed], cache_bytes: int = 0, shard_cache: ShardCache | None = None) -> Mixture:
        """Opens the datasets of a mixture; each has its share of `cache_bytes`."""
        weights = {name: each.weight for name, each in mix.items()}
        _check_weights(weights)
        memory = {name: int(cache_bytes * weight / sum(weights.values())) for name, weight in weights.items()}
        datasets = {name: Dataset.open(each.prepared, memory[name], shard_cache) for name, each in mix.items()}
        return cls(datasets, weights)

    def packed(self, i: int) -> bytes:
        """Record i as it is stored; ZooError naming the shard when it cannot be read or its checksum does not match."""
        source = self.source[i]
        return self.datasets[source].packed(i - int(self._offset[source]))

    def __getitem__(self, i: int) -> npt.NDArray[np.float32]:
        """Record i, [C, T] float32, to be read only; ZooError naming the shard when its checksum does not match."""
        source = self.source[i]
        return self.datasets[source][i - int(self._offset[source])]


class MixedLoader(Loader):
    """Endless batches of random windows from a mixture: a `Loader`, whose batches say which dataset rows are of.

    Of any stretch of examples each dataset has its share, within two; and of every sum(shares) examples exactly.
    ZooError when one of the datasets has no window among the records.
    """

    dataset: Mixture

    def at(self, step: int) -> Any:
        """The batches of `Loader.at`, and

        dataset  int32 [b], index into the mixture's datasets
        """
        return super().at(step)

    def __str__(self) -> str:
        total = sum(self.dataset.shares)
        parts = []
        for name, share, count in zip(self.dataset.names, self.dataset.shares, self._counts, strict=True):
            steps = count * total / share / self.batch_size
            parts.append(f"{name} {share / total:.3g} of the examples: {count} windows in {steps:.1f} steps")
        return "; ".join(parts)

    def _examples(self, records: npt.NDArray[np.int64], windows: npt.NDArray[np.int64]) -> Any:
        import grain

        orders = []
        for number, name in enumerate(self.dataset.names):
            own = self.dataset.source[records] == number
            if not windows[own].sum():
                raise ZooError(
                    f"{self.dataset.datasets[number].path}: none of its {own.sum()} records here has the {self.window} "
                    f"samples of a window: take {name} out of the mixture, or prepare it with longer segment_seconds"
                )
            seed = int(np.random.SeedSequence((self.seed, number)).generate_state(1)[0])
            orders.append(Order(records[own], windows[own], seed))
        self._counts = [order.size for order in orders]

        def cut(i: int, rng: np.random.Generator) -> dict[str, Any]:
            number, of_its_own = turn(i, self.dataset.shares)
            order = orders[number]
            return self._cut(order.record(order.places[of_its_own]), rng)

        return grain.MapDataset.range(sys.maxsize).seed(self.seed).random_map(cut)

    def _batch(self, step: int) -> Batch:
        batch = super()._batch(step)
        return {**batch, "dataset": self.dataset.source[batch["record"]].astype(np.int32)}


def turn(i: int, shares: Sequence[int]) -> tuple[int, int]:
    """Whose turn example i is, and how many turns that one had before, where each has its share of all turns.

    Of i turns all but ⌊i · rest / all⌋ go to the first; those that are left are divided among the rest in the same way.
    """
    rest = sum(shares)
    for number, share in enumerate(shares):
        left, left_after = (turns * (rest - share) // rest for turns in (i, i + 1))
        if left == left_after:
            return number, i - left
        i, rest = left, rest - share
    raise AssertionError


def whole_numbers(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as the smallest whole numbers in the same proportion; 0.7 counts as 7/10."""
    fractions = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(each.denominator for each in fractions))
    counts = [int(each * scale) for each in fractions]
    return tuple(count // math.gcd(*counts) for count in counts)


def _check_weights(weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            raise ZooError(f"data.mix.{name}.weight is {weight}, wanted a number above 0")


def _check_datasets(datasets: Mapping[str, Dataset]) -> None:
    first = next(iter(datasets))
    rate_hz, classes = datasets[first].rate_hz, datasets[first].classes
    of_path: dict[str, str] = {}
    for name, dataset in datasets.items():
        if str(dataset.path) in of_path:
            raise ZooError(f"data.mix: {of_path[str(dataset.path)]} and {name} are the same dataset, {dataset.path}")
        of_path[str(dataset.path)] = name
        if dataset.rate_hz != rate_hz:
            raise ZooError(f"data.mix: {first} is sampled at {rate_hz:g} Hz, {name} at {dataset.rate_hz:g}")
        if dataset.classes != classes:
            about = [", ".join(each) or "none" for each in (classes, dataset.classes)]
            raise ZooError(f"data.mix: {first} has windows of the events {about[0]}; {name} of {about[1]}")


def _one_after_another(parts: Sequence[tuple[npt.NDArray[np.int64], int]]) -> npt.NDArray[np.int64]:
    """Indices into tables of the given sizes → indices into the tables one after another."""
    offsets = np.cumsum([0, *(size for _, size in parts)])
    return np.concatenate([index + offset for (index, _), offset in zip(parts, offsets, strict=False)])
