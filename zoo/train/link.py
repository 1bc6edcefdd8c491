"""Watch over the other processes of a run: who has gone, who is silent, who has failed and why.

Collectives wait for ever for a process that is gone; JAX notices it by its heartbeats, late, and then aborts without a
name. Over the connections of the roll call every process hears at once when another ends, and says itself why it does.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from zoo.train.rollcall import Roll, send
from zoo.train.stop import LOST

BEATS = 6
"""Signs of life in the time after which a silent process counts as lost."""
LINGER_SECONDS = 3.0
"""How long a process that has told why the run ends waits for the others to have heard it."""


class Link:
    """The open connections of one process: to all others from process 0, to process 0 from the others.

    `end(reason, code)` is called, on the link's thread, when another process has failed, has gone without a word, or
    has been silent for `lost_seconds`; it ends this process, unless that is ending already.
    """

    def __init__(self, roll: Roll, process: int, lost_seconds: float, end: Callable[[str, int], None]) -> None:
        self._hosts, self._links, self._process = roll.hosts, roll.links, process
        self._lost_seconds, self._end = lost_seconds, end
        self._sending = {each: threading.Lock() for each in roll.links}
        self._gone: set[int] = set()
        self._done: set[int] = set()
        self._knowing: set[int] = set()
        self.health: dict[int, Mapping[str, Any]] = {}
        """What each process last said of itself, on process 0."""
        for connection in roll.links.values():
            connection.settimeout(lost_seconds)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._thread = threading.Thread(target=self._watch, name="link", daemon=True)
        self._thread.start()

    def name(self, process: int) -> str:
        """A process as messages call it."""
        return f"process {process} ({self._hosts[process]})"

    def say(self, message: dict[str, Any]) -> None:
        """Sends to everyone at the other end; who has gone is left to the watch."""
        for other, connection in self._links.items():
            with self._sending[other], contextlib.suppress(OSError):
                send(connection, message)

    def tell_health(self, health: Mapping[str, Any]) -> None:
        """What this process says of itself, for process 0 to collect; nobody waits for it."""
        if self._process:
            self.say({"health": dict(health)})
        else:
            self.health[0] = health

    def done(self) -> None:
        """This process is through: its end means nothing any more."""
        self.say({"done": True})

    def told(self, reason: str, code: int) -> None:
        """Tells the others why the run ends and waits, a little, until they know."""
        self.say({"ended": reason, "code": code})
        deadline = time.monotonic() + LINGER_SECONDS
        while self._links.keys() - self._gone - self._knowing and time.monotonic() < deadline:
            if threading.current_thread() is self._thread:
                self._hear(0.05, {})
            else:
                time.sleep(0.02)

    def _watch(self) -> None:
        self._selector = selectors.DefaultSelector()
        for other, connection in self._links.items():
            self._selector.register(connection, selectors.EVENT_READ, other)
        self._rest = dict.fromkeys(self._links, b"")
        every = self._lost_seconds / BEATS
        silent = dict.fromkeys(self._links, 0.0)
        last = beat = time.monotonic()
        while self._links.keys() - self._gone:
            self._hear(min(every, 1.0), silent)
            now = time.monotonic()
            # Time in which this process itself stood still is nobody's silence.
            passed, last = min(now - last, 2 * min(every, 1.0)), now
            for other in silent.keys() - self._gone - self._done:
                silent[other] += passed
                if silent[other] > self._lost_seconds:
                    reason = f"{self.name(other)} has been silent for {self._lost_seconds:g} s (devices.lost_seconds)"
                    self._end(f"{reason}; the run cannot go on without it", LOST)
            if now - beat >= every:
                beat = now
                self.say({"beat": True})

    def _hear(self, seconds: float, silent: dict[int, float]) -> None:
        """Takes what has come within the time."""
        for key, _ in self._selector.select(seconds):
            other, connection = key.data, self._links[key.data]
            try:
                more = connection.recv(65536)
            except OSError:
                more = b""
            silent[other] = 0.0
            *lines, self._rest[other] = (self._rest[other] + more).split(b"\n")
            for line in lines:
                self._take(other, json.loads(line))
            if not more:
                self._selector.unregister(connection)
                self._gone.add(other)
                if other not in self._done:
                    self._end(f"{self.name(other)} has ended without a word; the run cannot go on without it", LOST)

    def _take(self, other: int, message: Mapping[str, Any]) -> None:
        if "health" in message:
            self.health[other] = message["health"]
        elif "done" in message:
            self._done.add(other)
        elif "ended" in message:
            self._knowing.add(other)
            self._end(message["ended"], message["code"])
