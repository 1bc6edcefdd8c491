"""Batches for training: seeded shuffle, random crop, masking, this host's rows, prefetch.

A batch is a pure function of (seed, step). Example i of one endless shuffled stream is row i mod B of batch
i div B, and all its randomness comes from (seed, i); so where a run starts, how many threads read and how
many hosts share a batch change nothing, and a run resumes exactly, also on other machines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from zoo.data.channels import Channels, take
from zoo.data.windows import class_labels
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.data.store import Dataset
    from zoo.types import Batch


class Batches(Protocol):
    """What the training loop knows of where its batches come from."""

    batch_size: int

    @property
    def samples_per_batch(self) -> int:
        """Samples of signal in a batch, over all channels and hosts."""

    def at(self, step: int) -> Iterator[Batch]:
        """The batches of steps `step`, `step` + 1, …, without end; numpy arrays of this host's rows."""


class Loader:
    """Endless batches of random windows from `records` of a dataset.

    dataset     what to read from
    records     [·] record indices, such as a split; those shorter than `window` cannot give an example
    window      samples an example
    batch_size  examples a step, over all hosts
    seed        of the shuffle, the crops and the masks; 0 … 2³² − 1
    mask_patch  samples a patch of the mask; 0 gives no mask
    mask_ratio  share of the patches of valid channels that is masked
    channels    valid channels drawn at random for each example; 0 takes all channels as they are
    classes     class name → event labels that belong to it, for records of events: others are left out. Empty: the
                label of a record is its event's
    rows        this host's rows of each batch; None for all
    threads     batches that are read at a time; 0 reads in the caller's thread
    prefetch    batches held ready
    readers     rows of a batch that are read at a time

    One epoch takes as many windows from a record as fit in it side by side, each at a random place.
    ZooError when no record is long enough, when `mask_patch` does not divide `window`, and, while
    iterating, when a shard is damaged.
    """

    def __init__(
        self,
        dataset: Dataset,
        records: Sequence[int] | npt.NDArray[np.int64],
        *,
        window: int,
        batch_size: int,
        seed: int,
        mask_patch: int = 0,
        mask_ratio: float = 0.0,
        channels: int = 0,
        classes: Mapping[str, tuple[str, ...]] | None = None,
        rows: Sequence[int] | None = None,
        threads: int = 1,
        prefetch: int = 4,
        readers: int = 1,
    ) -> None:
        records = np.asarray(records, np.int64)
        self._label = dataset.label
        if classes:
            self._label = class_labels(dataset, classes)
            records = records[self._label[records] >= 0]
        windows = dataset.length[records] // window
        if not windows.sum():
            longest = dataset.length[records].max(initial=0)
            raise ZooError(
                f"{dataset.path}: none of the {len(records)} records has the {window} samples of a "
                f"window; the longest has {longest}: prepare with longer segment_seconds"
            )
        if mask_patch and (window % mask_patch or not 0 < mask_ratio < 1):
            raise ZooError(
                f"mask_patch {mask_patch} and mask_ratio {mask_ratio}: wanted a divisor of the window of "
                f"{window} samples and a ratio between 0 and 1"
            )
        self.dataset = dataset
        self.window, self.batch_size, self.seed = window, batch_size, seed
        self.too_short = int((windows == 0).sum())
        self.n_examples = int(windows.sum())
        self._rows = range(batch_size) if rows is None else rows
        self._threads, self._prefetch = threads, prefetch
        self._map = together(readers)
        self._patches = window // mask_patch if mask_patch else 0
        self._mask_ratio = mask_ratio
        self._channels = Channels(dataset, channels)
        self.channels = self._channels.count
        """Channels of a batch."""
        self._stream = self._examples(records, windows)

    @property
    def epoch_steps(self) -> float:
        """Steps that make one epoch."""
        return self.n_examples / self.batch_size

    @property
    def samples_per_batch(self) -> int:
        """Samples of signal in a batch, over all channels and hosts."""
        return self.batch_size * self.channels * self.window

    def __str__(self) -> str:
        seconds = self.window / self.dataset.rate_hz
        text = f"{self.n_examples} windows of {seconds:g} s an epoch, {self.epoch_steps:.1f} steps"
        return text + (f"; {self.too_short} records are shorter than that" if self.too_short else "")

    def at(self, step: int) -> Iterator[Batch]:
        """The batches of steps `step`, `step` + 1, …, without end.

        signal   float32 [b, C, T], zeros in the channels that pad a smaller montage; C is `self.channels`
        sensors  `zoo.types.Sensors` of numpy arrays [b, C, …]; `valid` is False for padding and bad channels
        mask     bool [b, C, A], True where masked: round(mask_ratio · valid channels · A) patches of each
                 example, all on valid channels; absent without `mask_patch`
        record   int32 [b], index into the dataset's records
        start    int32 [b], first sample in the recording
        label    int32 [b], index into `classes`, or the dataset's own; −1 for a record without
        subject  int32 [b], index into the dataset's people
        """
        return ahead(self._batch, step, self.batch_size, self._threads, self._prefetch)

    def _examples(self, records: npt.NDArray[np.int64], windows: npt.NDArray[np.int64]) -> Any:
        """The endless stream of examples that all hosts agree on, by index."""
        order = Order(records, windows, self.seed)
        return order.places.random_map(lambda place, rng: self._cut(order.record(place), rng))

    def _cut(self, record: int, rng: np.random.Generator) -> dict[str, Any]:
        """A random window of a record, [channels, T], which channels of the padded montage these are, and its mask.

        Channels beyond the montage's, or beyond its valid ones where channels are drawn, are −1 and zero.
        """
        dataset = self.dataset
        signal = dataset[record]
        first = int(rng.integers(dataset.length[record] - self.window + 1))
        recording = dataset.recording[record]
        channel = self._channels.draw(recording, len(signal), rng)
        window = take(signal, channel, first, self.window)
        example = {"signal": window, "channel": channel, "record": record, "start": dataset.start[record] + first}
        if self._patches:
            good = self._channels.good(recording, channel)
            places = rng.permutation(len(good) * self._patches)[: round(self._mask_ratio * len(good) * self._patches)]
            example["mask"] = np.zeros((self.channels, self._patches), bool)
            example["mask"][good[places // self._patches], places % self._patches] = True
        return example

    def _batch(self, step: int) -> Batch:
        examples = list(self._map(lambda row: self._stream[step * self.batch_size + row], self._rows))
        stacked = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
        channel, record = stacked.pop("channel"), stacked["record"].astype(np.int32)
        recording = self.dataset.recording[record]
        return {
            **stacked,
            "sensors": self._channels.sensors(recording, channel),
            "record": record,
            "start": stacked["start"].astype(np.int32),
            "label": self._label[record].astype(np.int32),
            "subject": self.dataset.person[recording].astype(np.int32),
        }


def together(readers: int) -> Callable[..., Iterator[Any]]:
    """`map`, `readers` at a time."""
    return map if readers < 2 else ThreadPoolExecutor(readers).map


class Order:
    """Windows of records in an order that is shuffled anew every epoch, without a table of windows.

    records  [·] int64 record indices
    windows  [·] int64, how often each is taken an epoch
    seed     of the shuffle
    places   what is shuffled: an endless `grain.MapDataset` of places among an epoch's windows
    """

    def __init__(self, records: npt.NDArray[np.int64], windows: npt.NDArray[np.int64], seed: int) -> None:
        import grain

        self._records, self._ends = records, np.cumsum(windows)
        self.size = int(self._ends[-1])
        """Windows of an epoch."""
        self.places = grain.MapDataset.range(self.size).seed(seed).shuffle().repeat()

    def record(self, place: int) -> int:
        """The record that the window at a place is of."""
        return int(self._records[np.searchsorted(self._ends, place, side="right")])


def ahead(batch: Callable[[int], Batch], step: int, batch_size: int, threads: int, prefetch: int) -> Iterator[Batch]:
    """`batch` of steps `step`, `step` + 1, …, without end: `threads` at a time, `prefetch` held ready.

    threads  0 reads in the caller's thread
    """
    import grain

    batches = grain.MapDataset.range(step, sys.maxsize // batch_size).map(batch)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads) if threads else 0)
    return iter(batches.to_iter_dataset(options))
