"""A run of several processes that costs next to nothing, its dataset, and what a test may do to its disk."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

BATCH, EVERY, LOST_SECONDS = 48, 5, 15

CONFIG = f"""\
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.data.loader import Loader
from zoo.errors import ZooError
from zoo.train.config import Config, Data, Devices, Mesh, Optimizer, Train

START, LAST, PACE = os.environ["CHAOS_START"], int(os.environ["CHAOS_LAST"]), float(os.environ["CHAOS_PACE"])


@dataclass(frozen=True)
class Mean:
    def init(self, key, batch):
        samples = batch["signal"].shape[-1]
        first, second = jax.random.split(key)
        return {{
            "params": {{
                "first": nn.LogicallyPartitioned(0.1 * jax.random.normal(first, (samples, 8)), (None, "embed")),
                "second": nn.LogicallyPartitioned(0.1 * jax.random.normal(second, (8,)), ("embed",)),
            }}
        }}

    def loss(self, variables, batch, key, train):
        found = jnp.tanh(batch["signal"].mean(1) @ variables["params"]["first"]) @ variables["params"]["second"]
        wanted = batch["signal"][..., :8].mean((1, 2))
        weight = jnp.asarray(len(found), jnp.float32)
        return jnp.square(found - wanted).mean(), {{"weight": weight}}, {{}}

    def flops(self, batch):
        return 16.0 * batch["signal"].size


def config():
    return Config(
        name="run",
        task=Mean(),
        data=Data(prepared=Path("prepared"), batch_size={BATCH}),
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=2),
        train=Train(checkpoint_every={EVERY}, micro_batch=3, on_damage="previous", log_every=5, hang_seconds=120),
        mesh=Mesh(fsdp=2, max_replicated=1.0),
        devices=Devices(platform="cpu", cpu_devices=2, start_seconds=120, lost_seconds={LOST_SECONDS}),
    )


plain = Loader.at


def at(self, step):
    with open(f"examples/{{START}}-{{os.getpid()}}.jsonl", "a", buffering=1) as out:
        for number, batch in enumerate(plain(self, step), start=step + 1):
            if number > LAST:
                while not Path(f"{{os.environ['CHAOS_RUNS']}}/run/checkpoints/{{LAST}}").exists():
                    time.sleep(0.05)
                raise ZooError("replayed as far as wanted")
            out.write(json.dumps([number, batch["record"].tolist(), batch["start"].tolist()]) + "\\n")
            time.sleep(PACE)
            yield batch


Loader.at = at
"""


def make_dataset(folder: Path) -> None:
    """Half an hour of noise on four electrodes."""
    import mne

    from zoo.data.prepare import prepare
    from zoo.data.recipes import Recipe

    noise = np.random.default_rng(0).normal(0, 1, (4, 1800 * 32))
    info = mne.create_info([f"E{number}" for number in range(4)], 32, "eeg")
    mne.io.RawArray(noise, info, verbose="error").save(folder / "noise_raw.fif", verbose="error")
    recipe = replace(Recipe("noise"), sensor_names="none")
    prepare(folder / "noise_raw.fif", folder / "prepared", recipe, fractions={"train": 1.0})


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fill(ballast: Path) -> None:
    """Writes until there is no room."""
    with ballast.open("wb", buffering=0) as out:
        size = 1 << 16
        while size:
            try:
                out.write(b"\0" * size)
            except OSError:
                size //= 2


def truncate(checkpoints: Path) -> None:
    """Cuts the largest file of the newest checkpoint in half."""
    steps = [int(each.name) for each in checkpoints.iterdir() if each.name.isdigit()]
    files = [each for each in (checkpoints / str(max(steps))).rglob("*") if each.is_file()] if steps else []
    if files:
        largest = max(files, key=lambda each: each.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)


class SmallDisk:
    """A file system of 64 MB at `folder`, while it is entered. Raises PermissionError where none may be mounted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Path:
        self.folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(self.folder)]
        if subprocess.run(command, capture_output=True).returncode:
            raise PermissionError("lacks the right to mount a small tmpfs")
        return self.folder

    def __exit__(self, *_: Any) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)
