"""Where a run's figures go: `metrics.jsonl` always, TensorBoard and Weights & Biases by choice, and the screen."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from zoo.data.store import disk_errors, write_file
from zoo.errors import ZooError
from zoo.train.config import Config, Train

SLOW = 2.0
"""A host whose own part of a step takes more than this many times the median host's is named on the screen."""


class Sink(Protocol):
    """Takes figures by step."""

    def write(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One line a step. Lines after `step` are dropped at opening: a resumed run writes them again."""

    def __init__(self, file: Path, step: int) -> None:
        kept = []
        if file.exists():
            for line in file.read_text().splitlines():
                # The line a killed process was writing is cut short, and later than any checkpoint.
                with contextlib.suppress(ValueError):
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
        write_file(file, "".join(kept).encode())
        self._file = file
        self._out = file.open("a", buffering=1)

    def write(self, step: int, figures: Mapping[str, float | str]) -> None:
        with disk_errors(self._file):
            self._out.write(json.dumps({"step": step, **figures}) + "\n")

    def close(self) -> None:
        with disk_errors(self._file):
            self._out.close()


def check_packages(options: Train) -> None:
    """Raises ZooError when a package that a chosen sink needs is not installed."""
    for chosen, extra, package in (
        (options.tensorboard, "tensorboard", "tensorboardX"),
        (options.wandb, "wandb", "wandb"),
    ):
        if chosen and importlib.util.find_spec(package) is None:
            raise ZooError(f"train.{extra} needs the package {package}: pip install 'brain-zoo[{extra}]'")


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run, resumed under the run's name."""

    def __init__(self, config: Config, plain: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project="brain-zoo",
            name=config.name,
            id=config.name,
            dir=str(config.folder),
            config=dict(plain),
            resume="allow",
        )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class Screen:
    """A progress bar with the time left on a terminal; elsewhere a plain line every `every` steps."""

    def __init__(self, first: int, steps: int, every: int) -> None:
        self._every, self._steps = every, steps
        self._bar: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[line]}"),
            )
            self._task = self._bar.add_task("", total=steps, completed=first, line="")
            self._bar.start()

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step, line=_line(figures))
        elif step % self._every == 0 or step == self._steps or "validation_loss" in figures:
            left = (self._steps - step) * figures["step_seconds"]
            print(f"step {step}/{self._steps}  {_line(figures)}  {_duration(left)} left", flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def _line(figures: Mapping[str, float]) -> str:
    shown = [f"loss {figures['loss']:.4f}"]
    if "validation_loss" in figures:
        shown.append(f"validation {figures['validation_loss']:.4f}")
    if "perplexity" in figures:
        shown.append(f"perplexity {figures['perplexity']:.4g}")
    if "live_share" in figures:
        shown.append(f"live {figures['live_share']:.0%}")
    shown += [
        f"|g| {figures['gradient_norm']:.3g}",
        f"lr {figures['learning_rate']:.2e}",
        f"{figures['examples_per_second']:.4g} ex/s",
        f"{figures['signal_samples_per_second']:.3g} samples/s",
    ]
    if figures.get("slowest_host_ratio", 0.0) > SLOW:
        shown.append(f"process {figures['slowest_host']:.0f} takes {figures['slowest_host_ratio']:.1f}× the others")
    if "mfu" in figures:
        shown.append(f"MFU {figures['mfu']:.1%}")
    shown.append(f"waits {figures['loader_wait_share']:.0%}")
    return "  ".join(shown)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
