"""How each host of a run fares: `health.jsonl`, a line for each host every `train.log_every` steps."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zoo.train.cluster import Cluster
from zoo.train.metrics import JsonLines


class Health:
    """Gathers what every host says of itself, without a wait: process 0 writes what it last heard from each.

    A host's own part of a step, `host_seconds`, is reading, placing and writing: neither its devices' work nor the
    waiting for other hosts, which are as long on all of them.
    """

    def __init__(self, folder: Path, cluster: Cluster, step: int, every: int) -> None:
        self._folder, self._cluster, self._every = folder, cluster, every
        self._lines = JsonLines(folder / "health.jsonl", step) if cluster.process == 0 else None
        self._steps: list[tuple[float, float, float]] = []

    def of_step(self, step: int, figures: Mapping[str, float], own_seconds: float) -> dict[str, float]:
        """Takes the times of a step. On process 0 of several, every so many steps, `slowest_host` (its number) and
        `slowest_host_ratio` (its own part of a step over the median host's); else nothing."""
        self._steps.append((figures["step_seconds"], own_seconds, figures["loader_wait_share"]))
        if step % self._every:
            return {}
        seconds, own, waits = np.mean(self._steps, axis=0).tolist()
        self._steps = []
        told = {"reported": step, "step_seconds": seconds, "host_seconds": own, "loader_wait_share": waits}
        self._cluster.tell_health({**told, **host_health(self._folder)})
        if self._lines is None:
            return {}
        hosts = self._cluster.health
        for process, health in sorted(hosts.items()):
            self._lines.write(step, {"process": process, "host": self._cluster.hosts[process], **health})
        if len(hosts) < 2:
            return {}
        worst, ratio = slowest(hosts)
        return {"slowest_host": float(worst), "slowest_host_ratio": ratio}

    def close(self) -> None:
        """Closes the file."""
        if self._lines is not None:
            self._lines.close()


def host_health(folder: Path) -> dict[str, float]:
    """Of this process and its host: memory in use, free disk, load, and device memory where the device tells it.

    resident_bytes, disk_free_bytes (of the disk that holds `folder`), load (processes that want a core, per core),
    device_bytes and device_peak_bytes (the fullest local device's).
    """
    import jax

    found = {
        "resident_bytes": float(_resident_bytes()),
        "disk_free_bytes": float(shutil.disk_usage(folder).free),
        "load": os.getloadavg()[0] / (os.cpu_count() or 1),
    }
    memory = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    if memory:
        found["device_bytes"] = float(max(stats["bytes_in_use"] for stats in memory))
        found["device_peak_bytes"] = float(max(stats.get("peak_bytes_in_use", 0) for stats in memory))
    return found


def slowest(hosts: Mapping[int, Mapping[str, Any]]) -> tuple[int, float]:
    """The process whose host takes longest for its own part of a step, and how many times the median that is."""
    seconds = {process: health["host_seconds"] for process, health in hosts.items()}
    worst = max(seconds, key=lambda process: seconds[process])
    return worst, seconds[worst] / max(float(np.median(list(seconds.values()))), 1e-9)


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no /proc: the highest so far is what the system tells
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
