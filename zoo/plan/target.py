"""Chips that are not there: their description for the compiler, as a mesh.

TPUs need libtpu, NVIDIA's chips the CUDA plugin of jax and a description of the chip as XLA writes it; both install
beside a CPU. The compiler is the real one.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from zoo.errors import ZooError
from zoo.plan.chips import NVIDIA, Chip, chip
from zoo.train.config import Mesh
from zoo.train.mesh import make_mesh


@dataclass(frozen=True)
class Target:
    """Its name, its chip (None for the CPU of this machine), how many slices, and its devices slice by slice."""

    name: str
    chip: Chip | None
    slices: int
    devices: tuple[Any, ...]
    compiler_options: Mapping[str, str | bool] = field(default_factory=dict)

    def mesh(self, sizes: Mesh) -> jax.sharding.Mesh:
        """The mesh of a run on it; the axis `slice` crosses from one slice to the next. ZooError where it cannot be."""
        if self.slices > 1 and sizes.slice != self.slices:
            raise ZooError(f"{self.slices} slices want --mesh.slice {self.slices}, got {sizes.slice}")
        return make_mesh(sizes, self.devices)


def prepare() -> None:
    """Lets this process compile for TPUs. Before anything uses JAX's devices."""
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # libtpu warns where these are missing; the chip compiled for is the topology's all the same.
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }


def target(name: str, slices: int = 1) -> Target:
    """`v5e:16x16`, `v5p:8x8x8`, `h100:64`, or `cpu:8`; `slices` of them joined by a network.

    Raises ZooError for a name of another form, a chip that is not known, a shape that the compiler does not have, and
    where the compiler is not installed.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if match is None:
        raise ZooError(f"--target {name}: wanted CHIP:SHAPE, such as v5p:8x8x8, h100:64 or cpu:8")
    which, shape = match[1], match[2]
    if which == "cpu":
        return _cpu(name, int(shape) if shape.isdigit() else 0)
    found = chip(which)
    if which in NVIDIA:
        return _nvidia(name, found, shape, slices)
    if importlib.util.find_spec("libtpu") is None:
        raise ZooError("compiling for a TPU needs libtpu; pip install 'brain-zoo[aot]'")
    from jax.experimental import topologies

    prefix = "tpu7x" if which == "7x" else which
    # The two cores of a v4 chip run as one device, but only where the compiler is told.
    whole = {"chip_config_name": "megacore"} if which == "v4" else {}
    try:
        made = topologies.get_topology_desc(f"{prefix}:{shape}", platform="tpu", num_slices=slices, **whole)
    except Exception as error:  # libtpu has its own exceptions for shapes it does not have
        raise ZooError(f"--target {name}: this libtpu does not compile for it: {error}") from None
    devices = sorted(made.devices, key=lambda device: getattr(device, "slice_index", 0))
    return Target(name, found, slices, tuple(devices))


def _cpu(name: str, count: int) -> Target:
    if count < 1 or count > jax.device_count():
        raise ZooError(f"--target {name}: this machine has {jax.device_count()} CPU devices (--devices.cpu-devices)")
    return Target(name, None, 1, tuple(jax.devices()[:count]))


def _nvidia(name: str, found: Chip, shape: str, slices: int) -> Target:
    if not shape.isdigit() or (int(shape) > found.node and int(shape) % found.node):
        raise ZooError(f"--target {name}: wanted a number of GPUs, whole nodes of {found.node} or part of one")
    if (
        importlib.util.find_spec("jax_plugins.xla_cuda12") is None
        and importlib.util.find_spec("jax_cuda12_pjrt") is None
    ):
        raise ZooError("compiling for NVIDIA's chips needs jax's CUDA plugin; pip install 'jax[cuda12]'")
    from jax.experimental import topologies

    each = min(int(shape), found.node)
    hosts = int(shape) // each
    try:
        made = topologies.get_topology_desc(
            platform="cuda",
            topology_name=name,
            topology=f"{slices} x {hosts} x {each}",
            target_config=description(found),
        )
    except Exception as error:  # the plugin has its own exceptions
        raise ZooError(f"--target {name}: this CUDA plugin does not compile for it: {error}") from None
    # Tuning runs kernels on the chip, which is not there; untuned Triton matmuls fail where no tile divides.
    options: dict[str, str | bool] = {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": False}
    return Target(name, found, slices, tuple(made.devices), options)


_GPU: Mapping[str, tuple[int, int, float, int, int, int, int]] = {
    "a100": (8, 108, 1.41, 40, 166_912, 64, 1024),
    "h100": (9, 132, 1.98, 50, 232_448, 128, 1024),
    "h200": (9, 132, 1.98, 50, 232_448, 128, 1024),
    "b200": (10, 148, 1.965, 126, 232_448, 128, 1024),
}
"""Compute capability, multiprocessors, GHz, MB of second-level cache, bytes of shared memory a block may take, units of
a multiprocessor, threads of a block: from NVIDIA's white papers of each architecture."""


def description(chip: Chip) -> str:
    """The chip as XLA's compiler wants it described (a `GpuTargetConfigProto` in text)."""
    major, cores, clock, cache, shared, units, threads = _GPU[chip.name]
    return f"""gpu_device_info {{
  threads_per_block_limit: {threads}
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared + 1024 * (1 + (major > 8))}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.bandwidth)}
  l2_cache_size: {cache * 2**20}
  clock_rate_ghz: {clock}
  device_memory_size: {int(chip.memory)}
  shared_memory_per_block_optin: {shared}
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.kinds[0]}"
"""
