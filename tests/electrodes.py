"""Sensors for tests of models: EEG electrodes by name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zoo.sensors import KINDS, NAME_INDEX
from zoo.types import Sensors


def electrodes(names: Sequence[str], batch: int = 2) -> Sensors:
    """The same electrodes for every example, on a ring of 9 cm around the head; "" gives one of no known name."""
    angle = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    ring = 0.09 * np.stack([np.sin(angle), np.cos(angle), 0 * angle], axis=-1)
    index = [NAME_INDEX.get(name, -1) for name in names]
    shape = (batch, len(names))
    return Sensors(
        position=np.broadcast_to(ring, (*shape, 3)).astype(np.float32),
        orientation=np.full((*shape, 3), np.nan, np.float32),
        kind=np.full(shape, KINDS.index("eeg"), np.int32),
        name=np.broadcast_to(index, shape).astype(np.int32),
        valid=np.ones(shape, bool),
    )
