"""Which mesh, recomputation and micro-batches: combinations compiled in turn, and those that fit ranked by speed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError
from zoo.plan.plan import DoesNotFit, Plan, plan
from zoo.plan.target import Target

if TYPE_CHECKING:
    from zoo.train.config import Config

REMAT = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class Tried:
    """One combination: how it was asked for, and its plan or why there is none."""

    options: tuple[str, ...]
    plan: Plan | None
    why_not: str = ""


def search(config: Config, target: Target, channels: int = 0, most: int = 12) -> Iterator[Tried]:
    """Tries combinations, as they come: the simplest meshes first, `most` compilations at most.

    A combination that mesh, model and batch refuse costs no compilation and is not told of.
    """
    compiled = 0
    for options, candidate in candidates(config, target):
        if compiled == most:
            return
        try:
            found: Plan | None = plan(candidate, target, channels)[0]
            why = "" if found is not None and found.fits else "more than the chip's memory"
        except DoesNotFit as error:
            found, why = None, str(error)
        except ZooError:
            continue
        compiled += 1
        yield Tried(options, found, why)


def ranked(tried: list[Tried]) -> list[Tried]:
    """Those that fit, the fastest first; of equals the one with the most memory to spare."""
    fitting = [each for each in tried if each.plan is not None and each.plan.fits]
    return sorted(fitting, key=lambda each: (each.plan.bound_seconds or 0.0, each.plan.memory.peak))  # type: ignore[union-attr]


def candidates(config: Config, target: Target) -> Iterator[tuple[tuple[str, ...], Config]]:
    """Options and the configuration they make: meshes by how many axes they split, each with every remat and
    accumulation of 1, 2 and 4."""
    each_slice = len(target.devices) // target.slices
    sizes = [2**power for power in range(each_slice.bit_length()) if each_slice % 2**power == 0]
    meshes = [
        (fsdp, tensor, sequence)
        for fsdp, tensor, sequence in itertools.product(
            sizes, [n for n in sizes if n <= 16], [n for n in sizes if n <= 16]
        )
        if each_slice % (fsdp * tensor * sequence) == 0
    ]
    meshes.sort(key=lambda mesh: (sum(size > 1 for size in mesh), -mesh[0], mesh[1:]))
    remats = REMAT if hasattr(config.task, "remat") else ("",)
    for (fsdp, tensor, sequence), remat, accumulate in itertools.product(meshes, remats, (1, 2, 4)):
        mesh = dataclasses.replace(
            config.mesh, slice=target.slices, data=-1, fsdp=fsdp, tensor=tensor, sequence=sequence
        )
        task: Any = dataclasses.replace(config.task, remat=remat) if remat else config.task
        train = dataclasses.replace(config.train, accumulate=accumulate, micro_batch=0)
        options = (
            f"--mesh.fsdp {fsdp}",
            f"--mesh.tensor {tensor}",
            f"--mesh.sequence {sequence}",
            f"--train.accumulate {accumulate}",
            *([f"--task.remat {remat}"] if remat else []),
        )
        yield options, dataclasses.replace(config, mesh=mesh, task=task, train=train)
