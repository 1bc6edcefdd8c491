"""The largest arrays of a step that does not fit: bytes, operation, and the source line that made each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from zoo.plan.hlo import Hlo, name_of

SHOWN = 12
TAKERS = 4
"""How far what the compiler put in itself is followed, through tuples and copies, to a line of source."""


@dataclass(frozen=True)
class Buffers:
    """The arrays that a compiled program makes on a device."""

    hlo: Hlo
    most: int = SHOWN

    def largest(self) -> list[str]:
        """A line each, the largest first; arrays of one size from one line count once. What is given to the step, its
        state and its batch, is not among them."""
        found: dict[str, int] = {}
        for run in self.hlo.runs(fused=False):
            size = self.hlo.made(run.line)
            if size:
                found[f"{_size(size)}  {self._told(run.line, run.loop)}"] = size
        return sorted(found, key=lambda line: -found[line])[: self.most]

    def _told(self, line: str, loop: str) -> str:
        """The operation and source of what makes an array, or of what takes it, where the compiler put it in itself."""
        for taker in range(TAKERS):
            operation, source = re.search(r'op_name="([^"]*)"', line), self._source(line)
            if source:
                return f"{'for ' if taker else ''}{operation[1] if operation else 'unnamed'}  {source}"
            name = re.escape(name_of(line))
            users = (each for each in self.hlo.computations[loop] if re.search(rf"[(, ]%{name}[,)]", each))
            line = next(users, line)
        return "unnamed"

    def _source(self, line: str) -> str:
        """`file:line`, however this compiler writes it."""
        plain = re.search(r'source_file="?([^" ]*)"? source_line=(\d+)', line)
        if plain:
            return f"{plain[1].rsplit('/', 1)[-1]}:{plain[2]}"
        frame = re.search(r"stack_frame_id=(\d+)", line)
        return self._frames.get(frame[1], "") if frame else ""

    @cached_property
    def _frames(self) -> Mapping[str, str]:
        """Stack frame → `file:line`, from the tables at the head of the text."""
        head = self.hlo.text.split("\n%", 1)[0]
        files = dict(re.findall(r'^(\d+) "(.*)"$', head.partition("FileNames")[2].partition("FunctionNames")[0], re.M))
        places = {
            number: f"{files.get(file, '').rsplit('/', 1)[-1]}:{line}"
            for number, file, line in re.findall(r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", head, re.M)
        }
        frames = re.findall(r"^(\d+) \{file_location_id=(\d+)", head, re.M)
        return {number: places.get(place, "") for number, place in frames}


def _size(count: int) -> str:
    return f"{count / 2**30:.2f}G" if count >= 2**30 else f"{count / 2**20:.2f}M"
