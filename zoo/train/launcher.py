"""Who else is in the run: Slurm, MPI, Kubernetes and Cloud TPU as JAX detects them, or an address and two numbers."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

from zoo.errors import ZooError
from zoo.train.config import Devices

COUNTED_BY = (
    ("Slurm", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MPI", "PMI_SIZE", "PMI_RANK"),
)
"""Launchers that tell every process how many there are and which it is, and in which variables."""
LEGACY_OPEN_MPI = "OMPI_MCA_orte_hnp_uri"
"""Open MPI before 5 also tells where its first host is."""


@dataclass(frozen=True)
class Place:
    """This process's place among the others.

    address   "host:port" of process 0
    processes how many there are
    process   which of them this is
    devices   numbers of the local devices that are its own, where several processes share a host; None for all
    """

    address: str
    processes: int
    process: int
    devices: tuple[int, ...] | None = None


def find_place(devices: Devices) -> Place | None:
    """Where this process stands as `devices` and the launcher's environment say; None for a run of one process.

    Raises ZooError when the launcher started several processes of which each would train alone, when `auto` finds no
    cluster, and for an address or numbers that cannot be.
    """
    counted = _counted()
    if not devices.coordinator:
        if counted and counted[1] > 1:
            raise ZooError(
                f"{counted[0]} started {counted[1]} processes but devices.coordinator is empty, so each would train "
                f"the same run alone; wanted auto or HOST:PORT"
            )
        return None
    if devices.coordinator == "auto":
        return _checked(_detect(devices.start_seconds))
    processes, process = devices.processes, devices.process
    if counted:
        processes, process = processes or counted[1], counted[2] if process < 0 else process
    if not processes or process < 0:
        raise ZooError(
            f"devices.coordinator {devices.coordinator}: no launcher tells how many processes there are and which this "
            f"is; wanted --devices.processes N --devices.process I"
        )
    return _checked(Place(devices.coordinator, processes, process))


def _counted() -> tuple[str, int, int] | None:
    """(launcher, processes, this process) from the environment."""
    for name, size, rank in COUNTED_BY:
        if size in os.environ and rank in os.environ:
            return name, int(os.environ[size]), int(os.environ[rank])
    return None


def _detect(seconds: int) -> Place:
    from jax._src.clusters import ClusterEnv

    counted = _counted()
    # JAX asks mpi4py only when told to; every MPI but the older Open MPI needs it.
    by_mpi = counted is not None and counted[0] != "Slurm" and LEGACY_OPEN_MPI not in os.environ
    method = "mpi4py" if by_mpi and importlib.util.find_spec("mpi4py") else None
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, method, seconds)
    except Exception as error:  # each cluster's detection fails in its own way
        raise ZooError(f"devices.coordinator auto: {type(error).__name__}: {error}") from error
    address, processes, process, local = found
    if address is None or processes is None or process is None:
        told = "" if counted is None else f" {counted[0]} started {counted[1]} processes;"
        raise ZooError(
            f"devices.coordinator auto: JAX finds no Slurm, Open MPI, mpi4py, Kubernetes or Cloud TPU job here;{told} "
            f"wanted --devices.coordinator HOST:PORT of the first process"
        )
    return Place(address, processes, process, None if local is None else tuple(local))


def _checked(place: Place) -> Place:
    host, _, port = place.address.rpartition(":")
    if not host or not port.isdigit():
        raise ZooError(f"devices.coordinator {place.address!r}: wanted HOST:PORT")
    if not 0 <= place.process < place.processes:
        raise ZooError(f"devices.process {place.process}: there are {place.processes}, counted from 0")
    return place
