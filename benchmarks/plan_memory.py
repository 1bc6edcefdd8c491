"""Whether the memory that `zoo plan` gives for one CPU device is what a run takes.

    python benchmarks/plan_memory.py [--config configs/quickstart.py] [--channels 32] [--json F] [its options]

Plans a configuration for `cpu:1`, then runs steps of the same program on a batch of zeros and reads the most memory
that the process held while they ran (Linux's VmHWM, set back before them). What the process held before, less the state
and the batch, is taken off; a first step, which also starts threads, comes before. The matmuls' own workspace and what
the allocator keeps, some 5 MB on two cores, are in no plan: the smaller the batch, the more they weigh.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np

# Before this file's own folder, in which `kernels` would be this folder's file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zoo.plan.plan import example, plan, table
from zoo.plan.target import target
from zoo.train.config import Config, load_config
from zoo.train.mesh import BatchPlacer, divided
from zoo.train.state import Program

WANTED = 0.10
"""Largest share by which plan and run may differ."""
STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.py"))
    parser.add_argument("--channels", type=int, default=0, help="of an example, where no prepared dataset tells")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments, options = parser.parse_known_args()
    figures = compare(load_config(arguments.config, options), arguments.channels)
    print(
        f"planned {figures['planned'] / 1e6:,.1f} MB, measured {figures['measured'] / 1e6:,.1f} MB: "
        f"{figures['planned'] / figures['measured'] - 1:+.1%}; wanted within {WANTED:.0%}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def compare(config: Config, channels: int = 0) -> dict[str, int]:
    """Bytes planned for one CPU device, and bytes that steps of the run took."""
    cpu = target("cpu:1")
    found, compiled = plan(config, cpu, channels)
    print(table(found))
    mesh = cpu.mesh(config.mesh)
    config = divided(config, mesh)
    place = BatchPlacer(mesh, config.rules, config.data.batch_size, config.train.accumulate)
    program = Program(config, config.task, mesh, place.abstract(example(config, channels)))
    size = config.data.batch_size
    batch = place(jax.tree.map(lambda leaf: np.repeat(leaf, size, axis=0), example(config, channels)))
    state, metrics = compiled(program.initial(), batch)
    jax.block_until_ready((state, metrics))
    made = sum(leaf.nbytes for leaf in jax.tree.leaves((state, batch)))
    before = _held_now()
    for _ in range(STEPS):
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
    return {"planned": found.memory.peak - found.memory.code, "measured": _most_held() - before + made}


def _held_now() -> int:
    """Bytes the process holds, what the allocator can give back given back; the high-water mark begins here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _most_held() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


if __name__ == "__main__":
    main()
