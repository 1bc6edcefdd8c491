"""Ends a run that makes no progress, and tells where every thread of it stands."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

LIMITS = {"compilation": 4.0, "restoring": 2.0, "step": 1.0, "validation": 1.0, "checkpoint": 2.0}
"""What of `train.hang_seconds` each part of a run may take."""


class Watchdog:
    """Calls `trip(reason)` on its own thread when a part of the run takes longer than it may. With 0 seconds it never
    does.

    Time in which the whole process stands still, a laptop's sleep or SIGSTOP, does not count.
    """

    def __init__(self, seconds: float, trip: Callable[[str], None]) -> None:
        self._seconds, self._trip = seconds, trip
        self._tick = min(1.0, seconds / 10)
        self._part: tuple[str, int] | None = None
        self._idle = 0.0
        self._closed = threading.Event()

    def start(self) -> None:
        """Begins to watch."""
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def expect(self, part: str, step: int = 0) -> None:
        """From now on this part of the run is to be over in its time. `part` is a name of LIMITS."""
        self._part, self._idle = (part, step), 0.0

    def rest(self) -> None:
        """Nothing is expected until the next part."""
        self._part = None

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self._tick):
            now = time.monotonic()
            self._idle += min(now - last, 2 * self._tick)
            last = now
            part = self._part
            if part is not None and self._idle > LIMITS[part[0]] * self._seconds:
                limit = LIMITS[part[0]] * self._seconds
                self._trip(f"hangs: {part[0]} at step {part[1]} has taken more than {limit:g} s (train.hang_seconds)")
                return
