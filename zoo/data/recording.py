"""What a prepared dataset knows of a recording: its events, its channels, and how they are written as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Event:
    """Something that happened: onset and duration in samples of the prepared signal."""

    onset: int
    duration: int
    label: str


@dataclass(frozen=True)
class Montage:
    """The channels of a recording.

    names        as in the file
    canonical    entries of `zoo.sensors.NAMES`, "" where a channel has none
    kinds        entries of `zoo.sensors.KINDS`
    position     [C, 3] float32, metres, head coordinates; NaN when unknown
    orientation  [C, 3] float32, unit vector of the sensor's axis; NaN where the kind has none
    """

    names: tuple[str, ...]
    canonical: tuple[str, ...]
    kinds: tuple[str, ...]
    position: npt.NDArray[np.float32]
    orientation: npt.NDArray[np.float32]

    def to_json(self) -> dict[str, Any]:
        """Plain values; unknown positions are null, since JSON has no NaN."""
        return {
            "names": list(self.names),
            "canonical": list(self.canonical),
            "kinds": list(self.kinds),
            "position": _vectors_to_json(self.position),
            "orientation": _vectors_to_json(self.orientation),
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Montage:
        return cls(
            names=tuple(plain["names"]),
            canonical=tuple(plain["canonical"]),
            kinds=tuple(plain["kinds"]),
            position=_vectors_from_json(plain["position"]),
            orientation=_vectors_from_json(plain["orientation"]),
        )


@dataclass(frozen=True)
class StoredRecording:
    """One recording; `montage` is an index into `Dataset.montages`, `n_samples` the whole length."""

    id: str
    subject: str
    session: str
    run: str
    task: str
    montage: int
    n_samples: int
    bads: tuple[str, ...]
    events: tuple[Event, ...]

    def to_json(self) -> dict[str, Any]:
        plain = {field: getattr(self, field) for field in ("id", "subject", "session", "run", "task")}
        events = [[event.onset, event.duration, event.label] for event in self.events]
        return plain | {
            "montage": self.montage,
            "n_samples": self.n_samples,
            "bads": list(self.bads),
            "events": events,
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> StoredRecording:
        events = tuple(Event(*event) for event in plain["events"])
        return cls(**{**plain, "bads": tuple(plain["bads"]), "events": events})


def _vectors_to_json(vectors: npt.NDArray[np.float32]) -> list[list[float] | None]:
    return [None if np.isnan(vector).any() else [float(x) for x in vector] for vector in vectors]


def _vectors_from_json(plain: Sequence[list[float] | None]) -> npt.NDArray[np.float32]:
    unknown = [np.nan] * 3
    return np.array([unknown if vector is None else vector for vector in plain], np.float32).reshape(-1, 3)


PADDING: Mapping[str, Any] = {"position": np.nan, "orientation": np.nan, "kind": 0, "name": -1, "valid": False}
"""Fields of `zoo.types.Sensors` for a channel that is not there."""
