"""A run that takes seconds: a one-layer LaBraM on four minutes of real EEG, through the real command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 20
CHECKPOINT_EVERY = 4
TIMES = (
    "step_seconds", "examples_per_second", "signal_samples_per_second", "loader_wait_share",
    "slowest_host", "slowest_host_ratio",
)  # fmt: skip
"""Figures that no two runs share."""

CONFIG = f"""\
from pathlib import Path

from zoo.objectives.masked_patch import MaskedPatch
from zoo.train.config import Config, Data, Devices, Optimizer, Train


def config():
    return Config(
        name="small",
        task=MaskedPatch(model="labram_tiny", options={{"depth": 2, "per_patch_norm": True, "drop_path": 0.1}}),
        data=Data(prepared=Path("prepared"), batch_size=16, channels=12, mask_patch=200, mask_ratio=0.5),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=2),
        train=Train(steps={STEPS}, checkpoint_every={CHECKPOINT_EVERY}, validate_every=10, validate_batches=1, ema=0.5),
        devices=Devices(platform="cpu"),
    )
"""


def write_config(folder: Path, prepared: Path, text: str = CONFIG) -> None:
    """`small.py` in `folder`, with the dataset beside it."""
    (folder / "small.py").write_text(text)
    (folder / "prepared").symlink_to(prepared)


def start(folder: Path, cache: Path, *options: str, command: Sequence[str] = ("train", "small.py")) -> Any:
    """A `zoo` process in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; from zoo.cli import main; sys.exit(main())", *command, *options],
        cwd=folder,
        env={**os.environ, "BRAIN_ZOO_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: Any, code: int = 0) -> tuple[str, str]:
    """What a process said, once it has ended as it should."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def wait_for_step(folder: Path, step: int, process: Any) -> None:
    """Returns as soon as `metrics.jsonl` holds `step`."""
    metrics = folder / "runs/small/metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        assert process.poll() is None, f"ended before step {step}: {process.communicate()}"
        time.sleep(0.002)


def metrics(folder: Path, runs: str | Path = "runs") -> list[dict[str, float]]:
    """What the run in a working folder wrote, without the times."""
    lines = (folder / runs / "small/metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def go_on_elsewhere(run: Path, folder: Path, step: int) -> None:
    """Puts a finished run into another working folder as it was when `step` had just been saved."""
    shutil.copytree(run / "runs/small", folder / "runs/small")
    for saved in (folder / "runs/small/checkpoints").iterdir():
        if int(saved.name) > step:
            shutil.rmtree(saved)


def assert_same_curve(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    """Every figure of every step to 1e-5."""
    assert [line.keys() for line in found] == [line.keys() for line in wanted]
    for name in wanted[-1]:
        np.testing.assert_allclose(
            *([line.get(name, 0.0) for line in run] for run in (found, wanted)), 1e-5, 1e-5, err_msg=name
        )
