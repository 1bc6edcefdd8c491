"""The first meeting of a run's processes: who came, from which host, and who is late.

JAX ends a process without a name when another does not come. So before JAX starts, process 0 listens at the
coordinator's address, every other one says its number and host there, and all learn the same list or the same reason
why not. The connections stay open: `zoo.train.link` keeps watch over them.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from dataclasses import dataclass
from typing import Any

from zoo.train.launcher import Place
from zoo.train.stop import Lost

RETRY_SECONDS = 0.2
HELLO_SECONDS = 5.0
"""How long a connection may take to say who it is; what is not of the run never does."""


@dataclass(frozen=True)
class Roll:
    """hosts: name of each process's host. links: process → open connection; process 0 has all, the others only to 0."""

    hosts: tuple[str, ...]
    links: dict[int, socket.socket]


def call_roll(place: Place, run: str, seconds: float) -> Roll:
    """Meets the other processes of `run`. Raises Lost, naming the late ones, when they have not all come in time."""
    host = socket.gethostname()
    hello = {"run": run, "process": place.process, "processes": place.processes, "host": host}
    return _lead(place, hello, seconds) if place.process == 0 else _join(place, hello, seconds)


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """One message: a line of JSON."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def _lead(place: Place, hello: dict[str, Any], seconds: float) -> Roll:
    deadline = time.monotonic() + seconds
    hosts: dict[int, str] = {0: hello["host"]}
    links: dict[int, socket.socket] = {}
    with _listen(place.address, deadline) as listener:
        while len(hosts) < place.processes:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                raise _refuse([*links.values()], _late(hosts, place.processes, seconds)) from None
            said = _receive(connection, HELLO_SECONDS)
            if said is None or said.get("run") != hello["run"]:
                _answer(connection, {"other": f"process 0 at {place.address} trains {hello['run']}"})
                connection.close()
                continue
            process, processes = said["process"], said["processes"]
            came = [*links.values(), connection]
            if processes != place.processes:
                who = f"process {process} on {said['host']}"
                raise _refuse(came, f"{who} counts {processes} processes, process 0 counts {place.processes}")
            if process in hosts:
                raise _refuse(came, f"two processes say they are {process}: on {hosts[process]} and on {said['host']}")
            hosts[process], links[process] = said["host"], connection
    names = tuple(hosts[process] for process in range(place.processes))
    for connection in links.values():
        _answer(connection, {"hosts": names})
    return Roll(names, links)


def _join(place: Place, hello: dict[str, Any], seconds: float) -> Roll:
    host, _, port = place.address.rpartition(":")
    deadline = time.monotonic() + seconds
    found = "did not answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=left)
        except OSError as error:
            found = f"did not answer ({error})"
            time.sleep(RETRY_SECONDS)
            continue
        _answer(connection, hello)
        # Process 0 may have come last: from now on its clock counts.
        said = _receive(connection, seconds + HELLO_SECONDS) or {}
        if "hosts" in said:
            return Roll(tuple(said["hosts"]), {0: connection})
        connection.close()
        if "late" in said:
            raise Lost(said["late"])
        if "other" in said:
            found = f"is another run's: {said['other']}"
        time.sleep(RETRY_SECONDS)
    who = f"process {place.process} on {hello['host']}"
    raise Lost(f"{who}: the coordinator {place.address} {found} within {seconds:g} s (devices.start_seconds)")


def _listen(address: str, deadline: float) -> socket.socket:
    """Waits for the port, which the process of an earlier start may still be giving up."""
    port = int(address.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    while True:
        try:
            return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)
        except OSError as error:
            if time.monotonic() > deadline:
                raise Lost(f"process 0 cannot listen at {address}: {error.strerror}") from error
            time.sleep(RETRY_SECONDS)


def _receive(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
    """The one line said within the time; None when it is not of this conversation."""
    connection.settimeout(seconds)
    line = b""
    try:
        while not line.endswith(b"\n"):
            more = connection.recv(1)
            if not more:
                return None
            line += more
        said = json.loads(line)
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None


def _answer(connection: socket.socket, message: dict[str, Any]) -> None:
    # Who has gone again is noticed by the link.
    with contextlib.suppress(OSError):
        send(connection, message)


def _late(hosts: dict[int, str], processes: int, seconds: float) -> str:
    late = [str(process) for process in range(processes) if process not in hosts]
    came = ", ".join(f"{process} on {hosts[process]}" for process in sorted(hosts))
    return (
        f"{len(hosts)} of {processes} processes came within {seconds:g} s (devices.start_seconds); "
        f"late: process {', '.join(late)}; here: {came}"
    )


def _refuse(came: list[socket.socket], reason: str) -> Lost:
    for connection in came:
        _answer(connection, {"late": reason})
        connection.close()
    return Lost(reason)
