"""Compiles for a TPU on a machine without one, and reads what the compiler says of its kernels.

Needs libtpu (`pip install 'brain-zoo[aot]'`). The figures are static: bundles are instructions of the kernel's code,
each counted once however often a loop runs it, not cycles.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from zoo.errors import ZooError

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "7x": "tpu7x:2x2x1",
}
BUNDLES = "-schedule-analysis_final_bundles.txt"
UTILIZATION = "-final_hlo-static-per-bundle-utilization.txt"


@dataclass(frozen=True)
class Kernel:
    """A Pallas kernel: instruction bundles, and those of them that spill a vector register or fill one again."""

    name: str
    bundles: int
    spills: int
    fills: int


@dataclass(frozen=True)
class Compiled:
    seconds: float
    temporary_bytes: int
    kernels: list[Kernel]


def prepare(dump: Path) -> None:
    """Makes this process compile for TPUs and write the compiler's dump; call before anything uses a device.

    Raises ZooError where libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ZooError("compiling for a TPU needs libtpu; pip install 'brain-zoo[aot]'")
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # libtpu warns where these are missing; the chip compiled for is the topology's all the same.
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
    }


def compile_ahead(function: Callable[..., Any], arguments: Any, target: str, dump: Path) -> Compiled:
    """Compiles for one chip. `arguments`: trees of `jax.ShapeDtypeStruct`; `dump`: the folder `prepare` was given."""
    from jax.experimental import topologies

    try:
        chip = topologies.get_topology_desc(TOPOLOGIES[target], platform="tpu").devices[0]
    except Exception as error:  # libtpu has its own exceptions for chips it does not know
        raise ZooError(f"--target {target}: this libtpu does not compile for it: {error}") from None
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(chip)), arguments
    )
    for old in dump.iterdir():
        old.unlink()
    lowered = jax.jit(function).lower(*placed)
    start = time.perf_counter()
    compiled: Any = lowered.compile()
    seconds = time.perf_counter() - start
    return Compiled(seconds, compiled.memory_analysis().temp_size_in_bytes, read_dump(dump))


def read_dump(dump: Path) -> list[Kernel]:
    """The Pallas kernels among the functions the compiler wrote about, in its order."""
    kernels = []
    for path in sorted(dump.glob(f"*{BUNDLES}")):
        # 1795160460728177005-my_kernel.2-70-schedule-analysis_final_bundles.txt
        stamp, name = re.fullmatch(r"(\d+)-(.+)-\d+", path.name.removesuffix(BUNDLES)).groups()  # type: ignore[union-attr]
        text = path.read_text()
        if not re.search(rf'%{re.escape(name)} = .*custom_call_target="tpu_custom_call"', text):
            continue
        total = re.search(r"total scheduled bundles:\s*(\d+)", text)
        (utilization,) = dump.glob(f"{stamp}-{glob.escape(name)}-*{UTILIZATION}")
        spills, fills = (_used(utilization, unit) for unit in ("VSTORE:SPILL", "VLOAD:FILL"))
        kernels.append(Kernel(name, int(total[1]), spills, fills))  # type: ignore[index]
    return kernels


def _used(path: Path, unit: str) -> int:
    """Bundles that use a unit: a header, unit names, their capacities, a header, then one line of counts a bundle."""
    _, names, _, _, *bundles = path.read_text().splitlines()
    column = names.split(", ").index(unit)
    return sum(int(line.split()[column]) > 0 for line in bundles if line.strip())
