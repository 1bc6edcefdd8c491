"""What `benchmarks/kernels.py` prints and writes."""

from __future__ import annotations

import dataclasses
import datetime
import math
import platform
import sys
from dataclasses import dataclass, field
from typing import Any

import jax

from benchmarks import aot


@dataclass
class Row:
    """One contender on one shape; times in seconds, memory in bytes, `problem` where there is no speed and why."""

    shape: str
    time: int
    variant: str
    dtype: str
    mode: str
    contender: str
    note: str = ""
    problem: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    failed: bool = False
    quartiles: list[float] = field(default_factory=list)
    ratio: float | None = None
    flops_per_second: float | None = None
    bytes_per_second: float | None = None
    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    temporary_ratio: float | None = None
    kernels: list[aot.Kernel] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """What one command measured; `ahead`: compiled for a TPU, nothing timed."""

    op: str
    device: str
    ahead: bool
    rows: list[Row]
    overtakings: list[str]


def show(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report.op} {report.device}")
    speed = ("ms", "quartiles", "× first", "GFLOP/s", "GB/s", "temp MB", "temp / in+out")
    ahead = ("compile s", "temp MB", "kernel", "bundles", "spills", "fills")
    for heading in ("shape", "variant", "dtype", "mode", "contender", *(ahead if report.ahead else speed)):
        table.add_column(heading, justify="left" if heading in ("shape", "contender", "kernel") else "right")
    for row in report.rows:
        head = (row.shape, row.variant, row.dtype, row.mode, row.contender)
        for cells in ahead_cells(row) if report.ahead else [speed_cells(row)]:
            table.add_row(*head, *cells)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for row in report.rows:
        for remark in filter(None, (row.problem, row.note)):
            console.print(f"{row.shape} {row.mode} {row.contender}: {remark}", soft_wrap=True, highlight=False)
    for line in report.overtakings:
        console.print(line, soft_wrap=True, highlight=False)


def speed_cells(row: Row) -> list[str]:
    memory = ["" if row.temporary_bytes is None else f"{row.temporary_bytes / 1e6:.4g}"]
    memory += ["" if row.temporary_ratio is None else f"{row.temporary_ratio:.2f}"]
    if not row.quartiles:
        return ["–"] * 5 + memory
    low, median, high = (1e3 * seconds for seconds in row.quartiles)
    rates = (f"{(rate or 0) / 1e9:.4g}" for rate in (row.flops_per_second, row.bytes_per_second))
    return [f"{median:.4g}", f"{low:.4g}–{high:.4g}", f"{row.ratio:.2f}", *rates, *memory]


def ahead_cells(row: Row) -> list[list[str]]:
    """A line for each kernel, or one without."""
    if row.compile_seconds is None or row.temporary_bytes is None:
        return [["–"] * 6]
    whole = [f"{row.compile_seconds:.1f}", f"{row.temporary_bytes / 1e6:.4g}"]
    lines = [[each.name, str(each.bundles), str(each.spills), str(each.fills)] for each in row.kernels]
    return [[*whole, *line] for line in lines or [["–"] * 4]]


def as_json(report: Report) -> dict[str, Any]:
    """What is written as JSON; numbers that are not finite become null."""
    rows = [dataclasses.asdict(row) for row in report.rows]
    for row in rows:
        row["errors"] = {name: error if math.isfinite(error) else None for name, error in row["errors"].items()}
    return {
        "date": datetime.date.today().isoformat(),
        "op": report.op,
        "device": report.device,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "rows": rows,
        "overtakings": report.overtakings,
    }
