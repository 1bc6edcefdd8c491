"""The main job, whole: data → training → evaluation, in one folder `runs/NAME/`.

config.py, overrides.json, config.json   what was asked
metrics.jsonl                            figures of every step
health.jsonl                             how each host fares, now and then
logs/rank-N.log                          what each process said, with the time
checkpoints/                             states, by step
evaluation.json                          scores of the probe and its baselines
plots/                                   training curves, a reconstruction, the probe's confusion matrix
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.batches import make_batches, make_loader, open_data
from zoo.errors import ZooError
from zoo.train.config import Config, load_config

if TYPE_CHECKING:
    import flax.linen as nn

    from zoo.data.paired import PairedDataset
    from zoo.data.store import Dataset
    from zoo.data.windows import Windows
    from zoo.evaluate.probe import ProbeResult
    from zoo.train.cluster import Cluster
    from zoo.train.mesh import BatchPlacer
    from zoo.train.state import Program, State
    from zoo.types import Variables

RANDOM, PRETRAINED = "random-weights probe", "pretrained probe"


def train(file: Path, overrides: Sequence[str] = ()) -> None:
    """`zoo train`: runs the configuration in `file`, from where its folder left off.

    Raises ZooError for bad input and `zoo.train.stop.Stopped` when asked to end.
    """
    from zoo.train.metrics import check_packages

    config = load_config(file, overrides)
    _check_task(config)
    check_packages(config.train)
    with _start(config) as cluster:
        _train(config, file, overrides, cluster)


def _train(asked: Config, file: Path, overrides: Sequence[str], cluster: Cluster) -> None:
    from zoo.train.checkpoint import Checkpoints, Damaged, set_aside, set_damaged_aside
    from zoo.train.loop import fit
    from zoo.train.mesh import BatchPlacer, check_devices, divided, make_mesh
    from zoo.train.plan import report
    from zoo.train.start import begin_from
    from zoo.train.state import Program
    from zoo.train.stop import Lost

    check_devices(asked.devices)
    main = cluster.process == 0
    mesh = make_mesh(asked.mesh)
    config = divided(asked, mesh)
    place = BatchPlacer(mesh, config.rules, config.data.batch_size, config.train.accumulate)
    dataset = open_data(config)
    loader = make_batches(config, dataset, "train", place.rows)
    validation = make_batches(config, dataset, "validation", place.rows) if config.train.validate_every else None

    program = Program(config, config.task, mesh, place.abstract(next(loader.at(0))))
    saved, goes_on = config.folder / "checkpoints", config.train.on_damage == "previous"
    if main and goes_on:
        for line in set_damaged_aside(saved):
            print(line)
    cluster.barrier("checkpoints looked at")
    checkpoints = Checkpoints(saved, config.train.keep_last, config.train.keep_best)
    latest = checkpoints.latest
    if latest is not None and not config.train.resume:
        raise ZooError(f"{config.folder} already holds a run at step {latest}; take another --name, or remove it")
    cluster.watchdog.expect("compilation")
    compiled = program.compile()
    cluster.watchdog.rest()
    cluster.log.open()
    cluster.barrier("compiled")
    if main:
        print(f"{dataset.path}: {loader}")
        print(report(program, compiled[0]))
    if latest is None:
        state = program.initial()
        if config.start.run:
            state = begin_from(state, *trained_parameters(Path(config.start.run))[1:], config.start)
    else:
        cluster.watchdog.expect("restoring", latest)
        try:
            state = checkpoints.restore(latest, program.abstract())
        except Damaged as error:
            if not goes_on:
                raise
            # The others may be in the middle of it: only a new start can take the previous one.
            raise Lost(f"{error}; it is set aside as {set_aside(saved, latest)}, start again") from error
        cluster.watchdog.rest()
        if main:
            print(f"resuming from step {latest}")

    if main:
        _record(asked, file, overrides)
    sinks = _sinks(config, latest or 0) if main else []
    try:
        state = fit(config, program, compiled, state, loader, validation, place, checkpoints, sinks, cluster)
    finally:
        for sink in sinks:
            sink.close()
    checkpoints.close()
    finish(config, program, state, dataset, place)


def evaluate(folder: Path) -> None:
    """`zoo evaluate RUN`: evaluates the newest checkpoint of a finished or unfinished run again."""
    config = stored_config(folder)
    with _start(config):
        _evaluate(config)


def _evaluate(config: Config) -> None:
    from zoo.train.checkpoint import Checkpoints
    from zoo.train.mesh import BatchPlacer, check_devices, divided, make_mesh
    from zoo.train.state import Program

    check_devices(config.devices)
    mesh = make_mesh(config.mesh)
    config = divided(config, mesh)
    place = BatchPlacer(mesh, config.rules, config.data.batch_size, config.train.accumulate)
    dataset = open_data(config)
    program = Program(
        config,
        config.task,
        mesh,
        place.abstract(next(make_batches(config, dataset, "train", place.rows).at(0))),
    )
    checkpoints = Checkpoints(config.folder / "checkpoints")
    if checkpoints.latest is None:
        raise ZooError(f"{config.folder}: the run has no finished checkpoint to evaluate")
    state = checkpoints.restore(checkpoints.latest, program.abstract())
    finish(config, program, state, dataset, place)


def load(folder: str | Path, step: int | None = None) -> tuple[nn.Module, Variables]:
    """The encoder of a run, or its tokenizer, and its trained variables, averaged ones when the run kept them.

    folder is a run's (`runs/NAME`); step defaults to the newest checkpoint. Use: `module, variables = load(...)`,
    `module.apply(variables, signal, sensors)`. Raises ZooError when there is no such run or step.
    """
    config, params, collections = trained_parameters(Path(folder), step)
    if not hasattr(config.task, "encoder"):
        return config.task.module(), {"params": params, **collections}
    inner = {name: value["encoder"] for name, value in collections.items() if "encoder" in value}
    return config.task.encoder(), {"params": params["encoder"], **inner}


def trained_parameters(folder: Path, step: int | None = None) -> tuple[Config, Any, Any]:
    """A run's configuration, and the parameters (averaged when kept) and collections of a step of it."""
    from zoo.train.checkpoint import Checkpoints

    config = stored_config(folder)
    checkpoints = Checkpoints(folder / "checkpoints")
    step = checkpoints.latest if step is None else step
    if step is None or step not in checkpoints.steps:
        raise ZooError(f"{folder}: no finished checkpoint of step {step}; there are {checkpoints.steps}")
    state = checkpoints.load(step)
    params = state["params"] if state.get("ema") is None else state["ema"]
    return config, params, state.get("collections") or {}


def stored_config(folder: Path) -> Config:
    """The configuration that the run in `folder` was started with, wherever the folder is now."""
    if not (folder / "config.py").is_file():
        raise ZooError(f"{folder}: not a run's folder, it has no config.py")
    config = load_config(folder / "config.py", json.loads((folder / "overrides.json").read_text()))
    return dataclasses.replace(config, runs=folder.parent, name=folder.name)


def finish(
    config: Config, program: Program, state: State, dataset: Dataset | PairedDataset, place: BatchPlacer
) -> None:
    """Plots and the probe's table, into the run's folder."""
    import jax

    from zoo.data.paired import PairedDataset

    main = jax.process_index() == 0
    plots = config.folder / "plots"
    if main:
        plots.mkdir(exist_ok=True)
        _plot_training(config, plots)
    if isinstance(dataset, PairedDataset):
        return
    _plot_reconstruction(config, program, state, dataset, place, plots)
    if hasattr(config.task, "predict"):
        from zoo.evaluate.held_out import held_out
        from zoo.evaluate.report import held_out_line, write_scores

        found = held_out(program, program.variables(state), dataset, place)
        if main:
            write_scores(found, config.folder / "evaluation.json")
            for name, each in found.items():
                print(held_out_line(name, each))
        return
    if not config.probe.classes:
        return
    results = probe(config, program, state, dataset, place)
    if main:
        from zoo.evaluate.metrics import Interval
        from zoo.evaluate.plots import confusion
        from zoo.evaluate.probe import compare
        from zoo.evaluate.report import print_table, write_json

        write_json(results, config.folder / "evaluation.json")
        trained = results[PRETRAINED]
        matrix = sum(scores.confusion for name, scores in trained.within.scores.items() if name != "mean")
        confusion(np.asarray(matrix), trained.trials.classes, plots / "confusion.png", title="pretrained probe, within")
        print_table(results)
        for where, gain in compare(trained, results[RANDOM]).items():
            assert isinstance(gain, Interval)
            print(
                f"{where}: pretrained − random weights = {gain.value:+.3f} balanced accuracy "
                f"[95 %: {gain.low:+.3f}, {gain.high:+.3f}]"
            )


def probe(
    config: Config, program: Program, state: State, dataset: Dataset, place: BatchPlacer
) -> Mapping[str, ProbeResult]:
    """Shrinkage LDA on the windows, and a linear probe on pooled features with random and with trained weights."""
    from zoo.data.windows import event_windows
    from zoo.evaluate.baseline import lda_baseline
    from zoo.evaluate.probe import Trials, linear_probe

    options = config.probe
    windows = event_windows(dataset, options.classes, options.tmin, options.tmax)
    for reason, count in windows.left_out.items():
        print(f"{count} events left out: {reason}")
    trials = Trials.of(windows)
    untrained = program.initial()
    features = {
        name: embed(program, program.variables(weights), windows, place)
        for name, weights in ((RANDOM, untrained), (PRETRAINED, state))
    }
    return {
        "shrinkage LDA": lda_baseline(windows.signal, windows.rate_hz, trials, folds=options.folds),
        **{name: linear_probe(values, trials, folds=options.folds) for name, values in features.items()},
    }


def embed(program: Program, variables: Variables, windows: Windows, place: BatchPlacer) -> np.ndarray:
    """Pooled features [N, D] float32 of every window, computed on the run's mesh."""
    from zoo.evaluate.held_out import over_windows

    encoder: Any = program.task.encoder()  # type: ignore[attr-defined]

    def pooled(variables: Variables, batch: Mapping[str, Any]) -> Any:
        inner = {name: value["encoder"] for name, value in variables.items() if "encoder" in value}
        whose = {"subject": batch["subject"]} if getattr(encoder, "subjects", 0) else {}
        return encoder.apply(inner, batch["signal"], batch["sensors"], **whose).pooled

    return over_windows(program, pooled, variables, windows, place)


def _check_task(config: Config) -> None:
    """Refuses what only a task with an encoder can be asked for."""
    if hasattr(config.task, "encoder"):
        return
    task = type(config.task).__name__
    if config.probe.classes:
        raise ZooError(f"probe.classes: {task} trains no encoder that a probe could read")
    if config.train.ema:
        raise ZooError(f"train.ema: {task} has statistics that follow the last parameters, not their average; wanted 0")


def _start(config: Config) -> Cluster:
    """Devices, the other processes, and the cache of compiled programs (`BRAIN_ZOO_CACHE`)."""
    import jax

    from zoo.data.fetch import cache_folder
    from zoo.train.cluster import Cluster
    from zoo.train.mesh import choose_devices

    # Orbax and Grain log, with tracebacks, what they also raise; what is raised is told in one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    choose_devices(config.devices)
    cluster = Cluster(config)
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    return cluster


def _sinks(config: Config, step: int) -> list[Any]:
    from zoo.train.metrics import JsonLines, Screen, TensorBoard, WeightsAndBiases

    sinks: list[Any] = []
    if config.train.tensorboard:
        sinks.append(TensorBoard(config.folder / "tensorboard", step))
    if config.train.wandb:
        sinks.append(WeightsAndBiases(config, _plain(config)))
    sinks.append(JsonLines(config.folder / "metrics.jsonl", step))
    return [*sinks, Screen(step, config.train.steps, config.train.log_every)]


def _record(config: Config, file: Path, overrides: Sequence[str]) -> None:
    """Writes what was asked; says what has changed since the run began."""
    from zoo.data.store import disk_errors, write_file

    with disk_errors(config.folder):
        config.folder.mkdir(parents=True, exist_ok=True)
    resolved = config.folder / "config.json"
    plain = json.loads(json.dumps(_plain(config)))
    if resolved.exists():
        before = json.loads(resolved.read_text())
        for name in sorted(before.keys() | plain.keys()):
            if before.get(name) != plain.get(name):
                print(f"changed since the run began: {name} {before.get(name)} → {plain.get(name)}")
    write_file(config.folder / "config.py", file.read_bytes())
    for name, value in (("overrides.json", list(overrides)), ("config.json", plain)):
        write_file(config.folder / name, json.dumps(value, indent=1).encode())


def _plain(value: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration as {dotted name: plain value}."""
    plain: dict[str, Any] = {}
    for each in dataclasses.fields(value):
        inner, name = getattr(value, each.name), prefix + each.name
        if dataclasses.is_dataclass(inner):
            plain |= _plain(inner, f"{name}.")
        elif isinstance(inner, Mapping) and any(map(dataclasses.is_dataclass, inner.values())):
            for key, part in inner.items():
                plain |= _plain(part, f"{name}.{key}.")
        else:
            plain[name] = (
                str(inner) if isinstance(inner, Path) else dict(inner) if isinstance(inner, Mapping) else inner
            )
    return plain


def _plot_training(config: Config, plots: Path) -> None:
    from zoo.train.plots import curves

    curves(config.folder / "metrics.jsonl", plots / "training.png")


def _plot_reconstruction(
    config: Config, program: Program, state: State, dataset: Dataset, place: BatchPlacer, plots: Path
) -> None:
    """One held-out example rebuilt, its masked patches where there is a mask, for tasks that reconstruct."""
    import jax

    from zoo.train.mesh import replicated
    from zoo.train.plots import reconstruction

    rebuild = getattr(program.task, "reconstruct", None)
    if rebuild is None:
        return
    part = "validation" if "validation" in dataset.splits and len(dataset.splits["validation"]) else "train"
    host = next(make_loader(config, dataset, part, place.rows, channels=0).at(0))
    with jax.set_mesh(program.mesh), program.context():
        compute = jax.jit(
            lambda variables, batch: (rebuild(variables, batch)[0], batch["signal"][0], _first_mask(batch)),
            out_shardings=replicated(program.mesh),
        )
        rebuilt, signal, mask = jax.device_get(compute(program.variables(state), place(host)))
    if jax.process_index() == 0:
        recording = dataset.recordings[dataset.recording[host["record"][0]]]
        names = dataset.montages[recording.montage].names
        valid = np.flatnonzero(host["sensors"].valid[0])
        reconstruction(
            signal[valid],
            rebuilt[valid],
            None if mask is None else mask[valid],
            dataset.rate_hz,
            [names[channel] for channel in valid],
            plots / "reconstruction.png",
            unit="scaled units",
        )


def _first_mask(batch: Mapping[str, Any]) -> Any:
    return batch["mask"][0] if "mask" in batch else None
