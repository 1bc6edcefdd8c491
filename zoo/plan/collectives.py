"""What a compiled program sends between devices: kind, bytes and mesh axes of every collective, read from its HLO.

A collective in the body of a loop is sent as often as the loop runs. XLA writes one collective several times where it
starts, overlaps and ends it: those share a channel and count once a loop. Between slices of TPUs hosts carry the data,
so there a collective is a `send` that names its kind; its group is one device of each slice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from zoo.plan.hlo import Hlo, size_of

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """kind; axes of the mesh it runs along; size: bytes of its result on a device; devices: one group of those that
    take part, by their places on the mesh; times: how often a step."""

    kind: str
    axes: tuple[str, ...]
    size: int
    devices: tuple[int, ...]
    times: int

    @property
    def group(self) -> int:
        """How many take part."""
        return len(self.devices)

    @property
    def sent(self) -> float:
        """Bytes a device sends in a step, by the ring algorithms (Thakur et al., 2005)."""
        share = (self.group - 1) / self.group
        factor = {
            "all-reduce": 2 * share,
            "all-gather": share,
            "reduce-scatter": self.group - 1,
            "all-to-all": share,
            "collective-permute": 1.0,
        }[self.kind]
        return factor * self.size * self.times


def collectives(hlo: Hlo, mesh: Mapping[str, int]) -> list[Collective]:
    """Every collective of a partitioned program; `mesh`: its axes and sizes in order."""
    found: dict[tuple[str, str, str], Collective] = {}
    for run in hlo.runs(fused=True):
        match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", run.line)
        across = re.search(r"= \((.*?), u32.* send\(.*megascale_transfer_type=\"(\w+)\"", run.line)
        if across:
            found[run.line.split(" = ")[0], run.loop, "send"] = _across(across, mesh, run.times)
        elif match:
            channel = re.search(r"channel_id=(\d+)", run.line)
            name = channel[1] if channel else run.line.split(" = ")[0]
            found[name, run.loop, match[2]] = _collective(match, run.line, mesh, run.times)
    return [each for each in found.values() if each.group > 1]


def _collective(match: re.Match[str], line: str, mesh: Mapping[str, int], times: int) -> Collective:
    kind, shape = match[2], match[1]
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    if match[3] and shape.startswith("("):  # a start carries its operands too
        shapes = shapes[len(shapes) // 2 :] if kind != "collective-permute" else shapes[1:2]
    size = sum(size_of(dtype, dims) for dtype, dims in shapes)
    group = _pair(line) if kind == "collective-permute" else _group(line, math.prod(mesh.values()))
    places = np.array(np.unravel_index(group, tuple(mesh.values())))
    axes = tuple(axis for axis, row in zip(mesh, places, strict=True) if len(set(row)) > 1)
    return Collective(kind, axes, size, tuple(group), times)


def _across(match: re.Match[str], mesh: Mapping[str, int], times: int) -> Collective:
    kind = match[2].lower().replace("_", "-")
    size = sum(size_of(dtype, dims) for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1]))
    devices = math.prod(mesh.values())
    one_of_each = tuple(range(0, devices, devices // mesh["slice"]))
    return Collective(kind if kind in KINDS else "collective-permute", ("slice",), size, one_of_each, times)


def _pair(line: str) -> list[int]:
    """The first two devices that differ in a permutation."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    for source, target in re.findall(r"\{(\d+),(\d+)", pairs[0] if pairs else ""):
        if source != target:
            return [int(source), int(target)]
    return [0]


def _group(line: str, devices: int) -> list[int]:
    """Devices of the first group of a collective, in any of the forms XLA writes groups in."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return [int(each) for each in listed[1].split(",")]
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if tiled:
        return [int(each) for each in _iota(tiled[2], tiled[3]).reshape(_numbers(tiled[1]))[0]]
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", line
    )
    if named:
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        order = _iota(named[2], named[3]) if named[2] else np.arange(math.prod(sizes.values()))
        grid = order.reshape(tuple(sizes.values()))
        over = re.findall(r"'(\w+)'", named[4])
        index = tuple(slice(None) if axis in over else 0 for axis in sizes)
        return [int(each) for each in grid[index].ravel()]
    return list(range(devices))


def _iota(sizes: str, order: str | None) -> np.ndarray:
    grid = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return (grid.transpose(_numbers(order)) if order else grid).ravel()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(","))
