"""Ending a run from outside without losing a step."""

from __future__ import annotations

import signal
from typing import Any

from zoo.errors import ZooError

LOST, HUNG = 4, 5
"""Exit codes of a run that another process's end, or a hang, has ended; the same command goes on from there."""


class Lost(ZooError):
    """Another process of the run did not come, or has gone. One line that names it, and exit code 4."""

    exit_code = LOST


class Stopped(Exception):
    """The run was asked to end (SIGTERM, SIGINT) and has saved its last step."""


class StopSignal:
    """Remembers SIGTERM and SIGINT so that a step is finished and saved before the process ends.

    With several processes JAX's own service agrees on the step at which all of them stop.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        import jax

        if jax.process_count() == 1:
            for each in (signal.SIGTERM, signal.SIGINT):
                self._before[each] = signal.signal(each, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _remember(self, *_: object) -> None:
        self._asked = True

    def at(self, step: int) -> bool:
        """Whether to stop after `step`; the same answer on every process."""
        import jax

        if jax.process_count() == 1:
            return self._asked
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        return reached_preemption_sync_point(step)
