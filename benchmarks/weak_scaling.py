"""What more chips cost in talk: plans of one run at more and more chips, as many examples a chip.

    python benchmarks/weak_scaling.py [--config configs/quickstart.py] [--target v5p] [--json weak_scaling.json]
        [--batch-per-chip 8] [options of the configuration, such as --mesh.fsdp 8]

Each row is `zoo plan` of the real step, compiled for those chips (none is there): bytes that a chip sends in a step
along each axis of the mesh, and the step's time at best, from which

    efficiency = T(fewest chips) / T(n)

once with T = max(compute, memory, wires), all of them at the same time, and once with T = max(compute, memory) + wires,
one after the other; a real run lies between. Where chips only share a batch, each sends 2 (n − 1) / n times the
gradients it holds (an all-reduce in a ring, Thakur et al., 2005), n the chips along `data`: that formula stands beside
what was counted. So bytes of all chips together grow as their number and bytes of one hardly, which is what linear
scaling asks for; other axes have a fixed size here, and theirs should not change at all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SHAPES = {
    "v5p": {8: "2x2x2", 64: "4x4x4", 256: "4x8x8", 512: "8x8x8"},
    "v5e": {8: "2x4", 64: "8x8", 256: "16x16"},
    "v6e": {8: "2x4", 64: "8x8", 256: "16x16"},
    "h200": {8: "8", 64: "64", 256: "256", 512: "512"},
}
"""Chips → the name of their arrangement."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.py"))
    parser.add_argument("--target", choices=sorted(SHAPES), default="v5p")
    parser.add_argument("--chips", type=int, nargs="+", help="numbers of chips; all that the target has unless given")
    parser.add_argument("--batch-per-chip", type=float, default=8, help="examples, over all chips together")
    parser.add_argument("--channels", type=int, default=0, help="of an example, where no prepared dataset tells")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments, options = parser.parse_known_args()
    shapes = SHAPES[arguments.target]
    plans = []
    for chips in arguments.chips or shapes:
        batch = round(arguments.batch_per_chip * chips)
        own = ["--data.batch-size", str(batch), "--channels", str(arguments.channels), *options]
        plans.append(plan(arguments.config, f"{arguments.target}:{shapes[chips]}", own))
    rows = [row(each, plans[0]) for each in plans]
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def plan(config: Path, target: str, options: list[str]) -> dict[str, Any]:
    """The JSON of `zoo plan`, in a process of its own: compilers keep what they used."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        zoo = [sys.executable, "-c", "import sys; from zoo.cli import main; sys.exit(main())"]
        command = [*zoo, "plan", str(config), "--target", target, "--json", str(file), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{target}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        return json.loads(file.read_text())


def row(each: dict[str, Any], smallest: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    sent: dict[str, float] = {}
    for wire in each["wires"]:
        axes = "+".join(wire["axes"])
        sent[axes] = sent.get(axes, 0.0) + wire["sent"]
    copies = each["mesh"].get("data", 1)
    return {
        "chips": each["devices"],
        "mesh": each["mesh"],
        "sent": sent,
        "formula": 2 * (copies - 1) / copies * each["memory"]["parameters"],
        "seconds": each["bound_seconds"],
        "bound_by": each["bound_by"],
        "mfu": each["mfu"],
        "overlapped": smallest["bound_seconds"] / each["bound_seconds"],
        "in_turn": _in_turn(smallest) / _in_turn(each),
    }


def _in_turn(each: dict[str, Any]) -> float:
    return max(each["compute_seconds"], each["memory_seconds"]) + each["wire_seconds"]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="weak scaling, from plans")
    axes = sorted({axis for each in rows for axis in each["sent"]})
    columns = ["chips", "mesh", *(f"{axis}, MB" for axis in axes), "2(n−1)/n · grads, MB", "step, ms", "bound by"]
    for column in [*columns, "MFU ≤", "efficiency, overlapped", "in turn"]:
        table.add_column(column, justify="right")
    for each in rows:
        table.add_row(
            str(each["chips"]),
            " × ".join(f"{axis} {size}" for axis, size in each["mesh"].items()),
            *(f"{each['sent'].get(axis, 0) / 1e6:.4g}" for axis in axes),
            f"{each['formula'] / 1e6:.4g}",
            f"{each['seconds'] * 1e3:.3g}",
            each["bound_by"],
            f"{each['mfu']:.1%}",
            f"{each['overlapped']:.3f}",
            f"{each['in_turn']:.3f}",
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
