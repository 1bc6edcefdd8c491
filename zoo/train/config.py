"""What a run is: frozen dataclasses, built in a Python file and overridden from the command line.

A configuration file defines `config() -> Config`. Every field is a command-line option of the same dotted name:
`zoo train configs/quickstart.py --train.steps 100 --mesh.fsdp 8`.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zoo.data.mixture import Mixed
from zoo.data.paired import Key, Paired
from zoo.data.recipes import RECIPES, Recipe
from zoo.errors import ZooError
from zoo.terminal import parse


@dataclass(frozen=True)
class Data:
    """Where batches come from.

    Attributes:
        source: a sample's name (`zoo fetch`), an `mne:` dataset, or a file or folder of recordings
        prepared: folder of the prepared dataset, made from `source` with `recipe` when it is not there; or its address
            on an object store (`gs://…`, `s3://…`)
        mix: name → dataset and its share of the examples; instead of `prepared`
        paired: modality → dataset whose windows answer the same stimulus, or the same time; instead of `prepared`.
            `signal` and `target` are for tasks of one signal and what was heard or seen
        pair_by: what paired windows share: a stimulus (an event's label), a stimulus of one subject, or the time
        stimuli: regular expression of the event labels that are stimuli, the whole label
        recipe: preprocessing (see `zoo.data.recipes`)
        jobs: recordings prepared at a time
        split: how records are divided: blocks of time, whole subjects or whole runs
        fractions: name of each part → its share; "train" is trained on, "validation" gives the validation loss
        window_seconds: length of an example
        batch_size: examples a step, over all devices and hosts
        mask_patch: samples a patch of the mask; 0 draws none
        mask_ratio: share of the patches of valid channels that is masked
        channels: valid channels drawn at random for each training example; 0 takes all
        cache_gigabytes: memory for the records read last, on each host
        shard_gigabytes: disk for copies of shards that lie on object stores, on each host; 0 keeps none and reads each
            record by its byte range
        threads: batches read at a time
        prefetch: batches held ready
        readers: rows of a batch read at a time; many make up for the distance to an object store
    """

    source: str = ""
    prepared: str | Path = Path("prepared")
    mix: Mapping[str, Mixed] = field(default_factory=dict)
    paired: Mapping[str, Paired] = field(default_factory=dict)
    pair_by: Key = "stimulus"
    stimuli: str = r"(?i)(?!bad).*"
    recipe: Recipe = RECIPES["raw"]
    jobs: int = 2
    split: Literal["by_time", "by_subject", "by_run"] = "by_time"
    fractions: Mapping[str, float] = field(default_factory=lambda: {"train": 0.9, "validation": 0.1})
    window_seconds: float = 1.0
    batch_size: int = 64
    mask_patch: int = 0
    mask_ratio: float = 0.5
    channels: int = 0
    cache_gigabytes: float = 1.0
    shard_gigabytes: float = 0.0
    threads: int = 1
    prefetch: int = 4
    readers: int = 1


@dataclass(frozen=True)
class Start:
    """What a run begins from when it has no checkpoint of its own: random parameters, or another run's.

    Attributes:
        run: folder of the other run; empty for random parameters
        new: patterns (regular expressions) of parameters that the other run lacks and that begin random; codebooks and
            other statistics go by the same names
        unused: patterns of the other run's parameters that this one has no place for
    """

    run: str = ""
    new: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Optimizer:
    """The update rule.

    Attributes:
        name: adamw, muon (matrices by Muon, the rest by AdamW) or lion
        schedule: cosine (to `final_fraction`) or trapezoid (flat, then linear over the last `decay_fraction`)
        learning_rate: at its highest
        warmup_steps: linear from zero
        final_fraction: of the learning rate, at the last step
        clip_norm: of the global gradient; 0 leaves it
        no_decay: patterns (regular expressions) of parameters without weight decay, besides vectors and biases
        layer_decay: the rate of layer l of L is multiplied by layer_decay^(L+1−l); parameters whose name begins with
            `embed` count as layer 0, others outside the repeated layers as layer L+1
        freeze: patterns of parameters that stay as they are
    """

    name: Literal["adamw", "muon", "lion"] = "adamw"
    schedule: Literal["cosine", "trapezoid"] = "cosine"
    learning_rate: float = 5e-4
    warmup_steps: int = 100
    final_fraction: float = 0.02
    decay_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip_norm: float = 3.0
    no_decay: tuple[str, ...] = ("embed_",)
    layer_decay: float = 1.0
    freeze: tuple[str, ...] = ()


@dataclass(frozen=True)
class Train:
    """The loop.

    Attributes:
        steps: updates in all
        accumulate: micro-batches a step; a step's gradient is the mean over all of them by weight
        micro_batch: most examples that a device takes at a time: `accumulate` follows from it and from how many devices
            there are, so that a run goes on with the same batches on fewer or more hosts; 0 leaves `accumulate`
        ema: decay of an average of the parameters, used for validation and evaluation; 0 keeps none
        validate_every: steps between validation losses; 0 never
        validate_batches: batches of a validation loss, the same each time
        checkpoint_every: steps between checkpoints (the last step has one always)
        keep_last: newest checkpoints kept
        keep_best: checkpoints of lowest validation loss kept besides
        log_every: steps between plain lines where there is no terminal
        profile: write a trace of ten steps to the run's folder
        resume: go on from the newest checkpoint of the run's folder when it has one
        on_damage: what to do when that checkpoint is damaged: stop, or set it aside as `STEP.damaged`, say so, and go
            on from the previous one
        hang_seconds: the longest that a step may take before the run is held to hang: it then writes every thread's
            stack and ends with exit code 5; 0 never. A compilation may take four times as long
        wandb: also log to Weights & Biases
        tensorboard: also log to TensorBoard
    """

    steps: int = 1000
    accumulate: int = 1
    micro_batch: int = 0
    ema: float = 0.0
    validate_every: int = 0
    validate_batches: int = 4
    checkpoint_every: int = 200
    keep_last: int = 2
    keep_best: int = 1
    log_every: int = 20
    profile: bool = False
    resume: bool = True
    on_damage: Literal["stop", "previous"] = "stop"
    hang_seconds: float = 1800.0
    wandb: bool = False
    tensorboard: bool = False


@dataclass(frozen=True)
class Mesh:
    """Sizes of the device mesh; one may be −1 and takes what is left. `slice` is the axis that crosses the network.

    Attributes:
        max_replicated: largest share of parameter bytes that may be whole on every device when fsdp or tensor is in use
    """

    slice: int = 1
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    max_replicated: float = 0.2


@dataclass(frozen=True)
class Rules:
    """Logical axis → mesh axes. Names are those modules give their parameters and activations.

    `alone` is the axis of a large parameter none of whose other axes can be split.
    """

    batch: tuple[str, ...] = ("slice", "data", "fsdp")
    tokens: tuple[str, ...] = ("sequence",)
    embed: tuple[str, ...] = ("fsdp",)
    heads: tuple[str, ...] = ("tensor",)
    head_width: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ("tensor",)
    alone: tuple[str, ...] = ("fsdp", "tensor")
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Devices:
    """Which devices, and who else is in the run.

    Attributes:
        platform: auto, or the one that must be there: a run that names an accelerator and finds none stops
        cpu_devices: how many devices the CPU pretends to be
        coordinator: "host:port" of process 0, or "auto" to let JAX detect the cluster; "" for a run of one process
        processes: how many processes there are (with a coordinator address); 0: as the launcher says (Slurm, MPI)
        process: which of them this is; -1: as the launcher says
        start_seconds: time in which all processes must have come
        lost_seconds: a process that gives no sign of life for so long counts as lost, and the others end
    """

    platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    cpu_devices: int = 1
    coordinator: str = ""
    processes: int = 0
    process: int = -1
    start_seconds: int = 300
    lost_seconds: int = 60


@dataclass(frozen=True)
class Probe:
    """The evaluation after training: a linear probe on frozen features around events.

    Attributes:
        classes: class name → event labels that belong to it; empty probes nothing
        tmin: seconds from the event to the first sample of the window
        tmax: seconds from the event to its end
        folds: blocks of time a person's trials are divided into
    """

    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tmin: float = 0.0
    tmax: float = 1.0
    folds: int = 5


@dataclass(frozen=True)
class Config:
    """A run. `task` is any `zoo.types.Task` that is a frozen dataclass."""

    task: Any
    name: str = "run"
    runs: Path = Path("runs")
    seed: int = 0
    data: Data = Data()
    start: Start = Start()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    mesh: Mesh = Mesh()
    rules: Rules = Rules()
    devices: Devices = Devices()
    probe: Probe = Probe()

    @property
    def folder(self) -> Path:
        """Where the run keeps everything it writes."""
        return self.runs / self.name


def load_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that `file` builds, with command-line overrides such as ("--train.steps", "100") applied.

    Raises ZooError: no such file, no `config()` in it, an option that does not exist (with the nearest that does), or
    a value of the wrong type.
    """
    if not file.is_file():
        raise ZooError(f"{file}: no such configuration file")
    # A module of its own, known to Python by its path: tyro reads the help of a task that is defined in it.
    module = types.ModuleType(str(file.resolve()))
    module.__file__ = str(file)
    sys.modules[module.__name__] = module
    try:
        exec(compile(file.read_text(), str(file), "exec"), module.__dict__)
    except SyntaxError as error:
        raise ZooError(f"{file}: line {error.lineno}: {error.msg}") from error
    build = getattr(module, "config", None)
    if build is None:
        raise ZooError(f"{file}: defines no function config() -> Config")
    config = build()
    if not isinstance(config, Config):
        raise ZooError(f"{file}: config() gives {type(config).__name__}, wanted a Config")
    return parse(type(config), overrides, prog="zoo train", default=config)
