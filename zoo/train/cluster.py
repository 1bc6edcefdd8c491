"""All processes of a run: they meet, know one another by host, wait for one another by name, and end together.

Every process of a run that fails ends the others with its own reason and exit code, within seconds; one that dies
without a word, or is silent for `devices.lost_seconds`, ends them with exit code 4 and its name. JAX's service and the
transport of the CPU's collectives notice a lost process too and may abort another before (SIGABRT, 128 + 6 in a shell).
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any

from zoo.errors import ZooError
from zoo.train.config import Config
from zoo.train.launcher import Place, find_place
from zoo.train.link import Link
from zoo.train.logs import RankLog
from zoo.train.rollcall import call_roll
from zoo.train.stop import HUNG, Lost, Stopped
from zoo.train.watchdog import LIMITS, Watchdog

HEARTBEAT_SHARE = 3
"""JAX's own heartbeats give a process up only this many times later than ours, which tell its name."""
GRACE_SECONDS = 3.0
"""An error may be the echo of another process's end: how long to wait for the word of it."""
LONGEST_SECONDS = 7 * 86400
"""A barrier's time where nothing limits it."""


def wait_for_all(name: str, seconds: float = LONGEST_SECONDS) -> list[int]:
    """Returns once every process has come to the barrier of this name, or the numbers of those that have not in time.

    It goes through JAX's coordination service, not through the devices: it may take hours, and needs no program.
    """
    from jax._src.distributed import global_state

    client = global_state.client
    if client is None:
        return []
    key = f"zoo/{name}"
    client.key_value_set(f"{key}/{global_state.process_id}", "here", allow_overwrite=True)
    try:
        client.wait_at_barrier(key, round(1000 * seconds))
    except Exception:  # of JAX's service: a barrier's time is over, or it is gone itself
        here = {int(each.rpartition("/")[2]) for each, _ in client.key_value_dir_get(key)}
        late = [process for process in range(global_state.num_processes) if process not in here]
        if not late:
            raise
        return late
    return []


class Cluster:
    """The processes of one run, seen from this one. To be entered around the whole run.

    process, processes  which this is, of how many
    hosts               name of each process's host
    watchdog            what this run is expected to be doing
    log                 this process's log
    """

    def __init__(self, config: Config) -> None:
        """Meets the others; before any other use of JAX. Raises Lost when they do not all come."""
        self.process, self.processes = 0, 1
        self.hosts: tuple[str, ...] = (socket.gethostname(),)
        self._link: Link | None = None
        self._health: dict[int, Mapping[str, Any]] = {}
        self._ending = threading.Lock()
        self._hang_seconds = config.train.hang_seconds
        place = find_place(config.devices)
        if place is not None:
            self.process, self.processes = place.process, place.processes
        self.log = RankLog(config.folder, self.process)
        if place is not None:
            self._meet(place, config)
        self.watchdog = Watchdog(config.train.hang_seconds, self._hang)

    def _meet(self, place: Place, config: Config) -> None:
        import jax

        options = config.devices
        roll = call_roll(place, str(config.folder), options.start_seconds)
        self.hosts = roll.hosts
        self._link = Link(roll, place.process, options.lost_seconds, self.end)
        # The CPU's collectives need a transport; other platforms bring their own.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            place.address,
            place.processes,
            place.process,
            None if place.devices is None else list(place.devices),
            initialization_timeout=options.start_seconds,
            heartbeat_timeout_seconds=HEARTBEAT_SHARE * options.lost_seconds,
        )

    def __enter__(self) -> Cluster:
        self.log.__enter__()
        self.watchdog.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, Stopped):
            self.watchdog.rest()
            if error is None:
                self.barrier("end of the run", LONGEST_SECONDS)
            if self._link is not None:
                self._link.done()
        elif self._link is not None:
            self._fail(error)
        if error is not None:  # the command line will say it, after this
            known = isinstance(error, (ZooError, Stopped))
            for line in str(error).splitlines() if known else "".join(traceback.format_exception(error)).splitlines():
                self.log.line(line)
        self.watchdog.close()
        self.log.__exit__()

    def barrier(self, name: str, seconds: float | None = None) -> None:
        """Returns once every process has come to the barrier of this name. Raises Lost naming those that are late after
        `seconds` (by default what a compilation may take by `train.hang_seconds`)."""
        if self._link is None:
            return
        seconds = seconds or LIMITS["compilation"] * self._hang_seconds or LONGEST_SECONDS
        late = wait_for_all(name, seconds)
        if late:
            came = f"{self.processes - len(late)} of {self.processes} processes came to {name} within {seconds:g} s"
            raise Lost(f"{came}; late: {', '.join(self._link.name(each) for each in late)}")

    def tell_health(self, health: Mapping[str, Any]) -> None:
        """What this process says of itself; process 0 collects it, nobody waits."""
        self._health[self.process] = health
        if self._link is not None:
            self._link.tell_health(health)

    @property
    def health(self) -> Mapping[int, Mapping[str, Any]]:
        """What each process last said of itself, on process 0; its own elsewhere."""
        # A copy: the link's thread goes on writing.
        return dict(self._health if self._link is None else self._link.health)

    def end(self, reason: str, code: int) -> None:
        """Ends this process and, with the same reason and code, the others. Returns only when they are ending already.

        Not by an exception: another thread may sit in a collective that never returns.
        """
        if not self._ending.acquire(blocking=False):
            return
        print(f"zoo: {reason}", file=sys.stderr, flush=True)
        if code == HUNG:
            self.log.stacks()
        if self._link is not None:
            self._link.told(reason, code)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)

    def _hang(self, reason: str) -> None:
        self.end(f"process {self.process} ({self.hosts[self.process]}) {reason}; stacks are in {self.log.file}", HUNG)

    def _fail(self, error: BaseException) -> None:
        """Ends the whole run because of this process's error; JAX's own way out would wait for the others."""
        who = f"process {self.process} ({self.hosts[self.process]})"
        if isinstance(error, Lost):
            self.end(str(error), error.exit_code)
        elif isinstance(error, ZooError):
            self.end(f"{who}: {error}", error.exit_code)
        elif isinstance(error, KeyboardInterrupt):
            self.end(f"{who}: interrupted", 130)
        else:
            # The end of another process makes collectives here fail: its name comes over the link.
            threading.Event().wait(GRACE_SECONDS)
            print("".join(traceback.format_exception(error)), file=sys.stderr)
            said = next(iter(str(error).strip().splitlines()), "")[:200]
            self.end(f"{who}: {type(error).__name__}: {said}", 1)
        threading.Event().wait()  # the thread that is ending the process will
