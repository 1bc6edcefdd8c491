"""Which channels of a padded montage an example takes, and their sensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from zoo.data.recording import PADDING

if TYPE_CHECKING:
    from zoo.data.store import Dataset
    from zoo.types import Sensors


class Channels:
    """Chooses channels of a dataset's recordings, the same number for each.

    dataset  whose montages; smaller ones are padded to the widest
    count    valid channels drawn at random for each example; 0 takes all as they are

    A channel that pads is −1: its signal is zero and its sensor not valid.
    """

    def __init__(self, dataset: Dataset, count: int) -> None:
        self.count = min(count, dataset.n_channels) or dataset.n_channels
        """Channels of an example."""
        self._all = self.count == dataset.n_channels
        self._sensors, self._table_of = dataset.sensor_tables()
        self._valid = [np.flatnonzero(valid) for valid in self._sensors["valid"]]
        # One place more, so that channel −1, padding, is looked up as not valid.
        self._is_valid = np.pad(self._sensors["valid"], ((0, 0), (0, 1)))

    def draw(self, recording: int, present: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """[count] int64 indices into the `present` channels that a recording has, in order, −1 behind them."""
        channel = np.full(self.count, -1)
        if self._all:
            channel[:present] = np.arange(present)
        else:
            drawn = np.sort(rng.permutation(self._valid[self._table_of[recording]])[: self.count])
            channel[: len(drawn)] = drawn
        return channel

    def good(self, recording: int, channel: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Places of `channel` [count] that hold a valid channel."""
        return np.flatnonzero(self._is_valid[self._table_of[recording], channel])

    def sensors(self, recording: npt.NDArray[np.int64], channel: npt.NDArray[np.int64]) -> Sensors:
        """`zoo.types.Sensors` of numpy arrays [b, count, …] for recordings [b] and their channels [b, count]."""
        from zoo.types import Sensors

        table = self._table_of[recording][:, None]
        fields = {field: values[table, channel] for field, values in self._sensors.items()}
        for field, fill in PADDING.items():
            fields[field][channel < 0] = fill
        return Sensors(**fields)


def take(
    signal: npt.NDArray[np.float32], channel: npt.NDArray[np.int64], first: int, size: int
) -> npt.NDArray[np.float32]:
    """Samples `first` … `first` + `size` of the channels [count] of a signal [C, T], zero where `channel` is −1."""
    window = signal[channel, first : first + size]
    window[channel < 0] = 0
    return window
