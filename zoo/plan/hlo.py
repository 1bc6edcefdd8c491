"""A compiled program's text (HLO): which instructions run, and how often."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8, "c64": 8}
_SAME = ("bitcast", "copy", "convert")
"""What changes no more than the form of an operand inside a fusion."""
_READ_IN_PART = ("dynamic-slice", "gather")
_UPDATED = {"dynamic-update-slice": 1, "scatter": 2}
"""What updates its first operand in place: which operand holds what is put into it."""
_NO_TRAFFIC = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")


@dataclass(frozen=True)
class Run:
    """An instruction that runs: its line, how often a step, and the loop it is in ("" for none)."""

    line: str
    times: int
    loop: str


@dataclass(frozen=True)
class Hlo:
    """The text of a compiled, partitioned program: what one device does."""

    text: str

    @cached_property
    def computations(self) -> Mapping[str, Sequence[str]]:
        """Name → lines; the entry is called ""."""
        found: dict[str, list[str]] = {}
        lines: list[str] = []
        for line in self.text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head:
                lines = found["" if head[1] else head[2]] = []
            elif line.startswith(" "):
                lines.append(line)
        return found

    def runs(self, fused: bool) -> Iterator[Run]:
        """Instructions in order of their computations; with `fused` also those inside fusions and reductions."""
        yield from self._of("", 1, "", fused, frozenset())

    def traffic(self) -> float:
        """Bytes that instructions read and write in the device's main memory: each fusion its operands and results.

        Of an operand that is only sliced or gathered from what is taken counts, and where an array is updated in place
        what is put into it: a loop that keeps something of every turn writes it once. What runs beside other work, a
        copy say, counts where it starts.
        """
        sizes = {name: {name_of(line): _bytes(_shape(line)) for line in lines} for name, lines in self._run_alone()}
        total = 0.0
        for run in self.runs(fused=False):
            operation = _operation(run.line)
            if operation is None or operation in _NO_TRAFFIC or operation.endswith("-done"):
                continue
            known = sizes.get(run.loop, {})
            operands, result = [known.get(each, 0) for each in _operands(run.line)], _bytes(_shape(run.line))
            inner = re.search(r"fusion\(.*calls=%?([\w.\-]+)", run.line)
            if operation.endswith("-start"):  # its result holds its operand too
                operands = []
            elif operation in _READ_IN_PART:
                operands[:1] = [result]
            elif operation in _UPDATED:
                operands[:1], result = [0], operands[_UPDATED[operation]]
            elif inner:
                operands, result = self._fused(inner[1], operands, result)
            total += run.times * (result + sum(operands))
        return total

    def made(self, line: str) -> int:
        """Bytes of main memory that an instruction's result takes; 0 for one that makes none of its own."""
        operation = _operation(line)
        return 0 if operation is None or operation in _NO_TRAFFIC else _bytes(_shape(line))

    def _fused(self, name: str, operands: list[int], result: int) -> tuple[list[int], int]:
        """Bytes that a fusion reads of each of its operands, and writes."""
        lines = list(self.computations.get(name, ()))
        shapes = {name_of(line): _bytes(_shape(line)) for line in lines}
        same = {name_of(line): _operands(line)[0] for line in lines if _operation(line) in _SAME}

        def source(value: str) -> str:
            while value in same:
                value = same[value]
            return value

        read = list(operands)
        places = {name_of(line): int(match[1]) for line in lines if (match := re.search(r" parameter\((\d+)\)", line))}
        uses: dict[str, list[tuple[str, int]]] = {each: [] for each in places}
        for line in lines:
            if _operation(line) in _SAME:
                continue
            for order, operand in enumerate(_operands(line)):
                if source(operand) in uses:
                    uses[source(operand)].append((line, order))
        written = result
        for each, found in uses.items():
            sliced = [_operation(line) for line, order in found if order == 0]
            if found and len(sliced) == len(found) and set(sliced) <= {*_READ_IN_PART, *_UPDATED}:
                whole = operands[places[each]]
                slices = [name_of(line) for line, _ in found if _operation(line) in _READ_IN_PART]
                updates = [_operands(line)[_UPDATED[op]] for line, _ in found if (op := _operation(line)) in _UPDATED]
                read[places[each]] = min(whole, sum(shapes[name] for name in slices))
                if updates:
                    written += sum(shapes.get(name, 0) for name in updates) - whole
        return read, max(written, 0)

    def _run_alone(self) -> Iterator[tuple[str, Sequence[str]]]:
        """The entry and the bodies of loops."""
        for name in dict.fromkeys(run.loop for run in self.runs(fused=False)):
            yield name, self.computations[name]

    def _of(self, name: str, times: int, loop: str, fused: bool, above: frozenset[str]) -> Iterator[Run]:
        for line in self.computations.get(name, ()):
            yield Run(line, times, loop)
            again = re.search(r"\bwhile\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            if again:
                yield from self._of(again[2], times * self._trips(line, again[1]), again[2], fused, above | {name})
                continue
            inner = re.findall(r"(?:calls|to_apply|async_computation)=%?([\w.\-]+)", line) if fused else []
            for each in inner + _branches(line):
                if each not in above:
                    yield from self._of(each, times, loop, fused, above | {name})

    def _trips(self, line: str, condition: str) -> int:
        """How often a loop runs: said outright, or the bound that its counter is compared with."""
        known = re.search(r"known_trip_count[^\d]*(\d+)", line)
        if known:
            return int(known[1])
        lines = list(self.computations.get(condition, ()))
        for name in re.findall(r"calls=%?([\w.\-]+)", "\n".join(lines)):
            lines += self.computations.get(name, ())
        bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(lines))
        return max(map(int, bounds), default=1)


def _operation(line: str) -> str | None:
    match = re.search(r"[\]})] ([\w\-]+)\(", line)
    return match[1] if match else None


def _operands(line: str) -> list[str]:
    """Names of an instruction's operands in order."""
    operation = _operation(line)
    return re.findall(r"%([\w.\-]+)", line.split(f" {operation}(", 1)[1].split("), ")[0]) if operation else []


def name_of(line: str) -> str:
    """What an instruction's result is called."""
    return re.match(r"\s*(?:ROOT )?%?([\w.\-]+) =", line)[1]  # type: ignore[index]


def _shape(line: str) -> str:
    """The text of an instruction's result shape."""
    match = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) [\w\-]+\(", line)
    return match[1] if match else ""


def _bytes(shape: str) -> int:
    """Bytes of a shape, or tuple of them, in main memory; S(n) marks nearer ones."""
    return sum(
        size_of(dtype, dims)
        for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", shape)
        if "S(" not in layout
    )


def size_of(dtype: str, dims: str) -> int:
    """Bytes of an array by HLO's names: `bf16`, `32,128`."""
    return _BYTES.get(dtype, 4) * math.prod(int(size) for size in dims.split(",") if size)


def _branches(line: str) -> list[str]:
    match = re.search(r"branch_computations=\{([^}]*)\}", line)
    return re.findall(r"[\w.\-]+", match[1]) if match else []
