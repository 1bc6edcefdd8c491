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

from zoo.errors import ZooError
from zoo.train.config import Config, Data, load_config

if TYPE_CHECKING:
    import flax.linen as nn

    from zoo.data.loader import Loader
    from zoo.data.paired import PairedDataset, PairedLoader
    from zoo.data.remote import ShardCache
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
    from zoo.train.mesh import BatchPlacer, divided, make_mesh
    from zoo.train.plan import report
    from zoo.train.start import begin_from
    from zoo.train.state import Program
    from zoo.train.stop import Lost

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
    from zoo.train.mesh import BatchPlacer, divided, make_mesh
    from zoo.train.state import Program

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


def open_data(config: Config) -> Dataset | PairedDataset:
    """What `data` names: one prepared dataset (`open_dataset`), or one for each modality of `data.paired`."""
    from zoo.data.paired import PairedDataset

    data, task = config.data, config.task
    if not data.paired:
        return open_dataset(config)
    for name, given in (
        ("data.source", data.source),
        ("data.mix", data.mix),
        ("data.mask_patch", data.mask_patch),
        ("probe.classes", config.probe.classes),
    ):
        if given:
            raise ZooError(f"{name} is given beside data.paired, which takes prepared datasets as they are")
    if not hasattr(task, "check_modality"):
        raise ZooError(f"data.paired: {type(task).__name__} takes batches of one signal, not of modalities")
    paired = PairedDataset.open(data.paired, int(data.cache_gigabytes * 1e9), _shard_cache(data))
    for name, dataset in paired.datasets.items():
        for montage in dataset.montages:
            task.check_modality(name, dataset.rate_hz, montage.kinds, montage.canonical)
    return paired


def open_dataset(config: Config) -> Dataset:
    """The prepared dataset, fetched and prepared first when it is not there; or the mixture that `data.mix` names.

    With several processes one prepares.
    """
    data = config.data
    if data.mix:
        from zoo.data.mixture import Mixture

        if data.source:
            raise ZooError("data.source is given beside data.mix, which takes prepared datasets as they are")
        dataset: Dataset = Mixture.open_all(data.mix, int(data.cache_gigabytes * 1e9), _shard_cache(data))
    else:
        dataset = _open_prepared(data)
    for montage in dataset.montages:
        if hasattr(config.task, "check_recording"):
            config.task.check_recording(dataset.rate_hz, montage.kinds, montage.canonical)
        elif hasattr(config.task, "check_sensors"):
            config.task.check_sensors(montage.canonical)
    if hasattr(config.task, "check_positions"):
        from zoo.types import Sensors

        config.task.check_positions(Sensors(**dataset.sensor_tables()[0]))
    if config.probe.classes and dataset.classes and not hasattr(config.task, "predict"):
        raise ZooError(f"{dataset.path}: holds windows of events; a probe cuts its own, from continuous records")
    if hasattr(config.task, "check_labels"):
        config.task.check_labels(tuple(config.probe.classes) or dataset.classes, len(dataset.people))
    return dataset


def _open_prepared(data: Data) -> Dataset:
    import jax

    from zoo.data.prepare import prepare
    from zoo.data.remote import locate
    from zoo.data.store import Dataset

    place = locate(data.prepared)
    if data.source and not isinstance(place, Path):
        raise ZooError(
            f"data.source is given, and {place} is not on this machine: prepare here and copy the folder there"
        )
    if jax.process_index() == 0 and data.source:
        prepare(
            find_source(data.source),
            Path(data.prepared),
            data.recipe,
            jobs=data.jobs,
            split=data.split,
            fractions=data.fractions,
        )
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices("data prepared")
    return Dataset.open(place, int(data.cache_gigabytes * 1e9), _shard_cache(data))


def _shard_cache(data: Data) -> ShardCache | None:
    from zoo.data.fetch import cache_folder
    from zoo.data.remote import ShardCache

    return ShardCache(cache_folder() / "shards", int(data.shard_gigabytes * 1e9)) if data.shard_gigabytes else None


def find_source(source: str) -> Path:
    """The folder of a sample or `mne:` dataset, fetched when it is not cached; else the path itself."""
    from zoo.data.fetch import fetch
    from zoo.data.samples import SAMPLES

    return fetch(source) if source in SAMPLES or source.startswith("mne:") else Path(source)


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
    from zoo.train.mesh import check_devices, choose_devices

    # Orbax and Grain log, with tracebacks, what they also raise; what is raised is told in one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    choose_devices(config.devices)
    cluster = Cluster(config)
    check_devices(config.devices)
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    return cluster


def make_batches(
    config: Config, dataset: Dataset | PairedDataset, part: str, rows: Sequence[int]
) -> Loader | PairedLoader:
    """The run's batches of one part of the split, as it is trained on them."""
    from zoo.data.paired import PairedDataset, PairedLoader

    data = config.data
    if not isinstance(dataset, PairedDataset):
        return make_loader(config, dataset, part, rows, data.channels)
    return PairedLoader(
        dataset,
        part,
        by=data.pair_by,
        stimuli=data.stimuli,
        batch_size=data.batch_size,
        seed=config.seed,
        rows=rows,
        threads=data.threads,
        prefetch=data.prefetch,
    )


def make_loader(config: Config, dataset: Dataset, part: str, rows: Sequence[int], channels: int) -> Loader:
    """The run's batches of one part of the split of one dataset, with `channels` drawn for each example (0: all)."""
    from zoo.data.loader import Loader
    from zoo.data.mixture import MixedLoader, Mixture

    data = config.data
    if part not in dataset.splits:
        raise ZooError(f"{dataset.path}: its split has no part {part!r}, only {', '.join(dataset.splits)}")
    kind = MixedLoader if isinstance(dataset, Mixture) else Loader
    return kind(
        dataset,
        dataset.splits[part],
        window=round(data.window_seconds * dataset.rate_hz),
        batch_size=data.batch_size,
        seed=config.seed,
        mask_patch=data.mask_patch,
        mask_ratio=data.mask_ratio,
        channels=channels,
        classes=config.probe.classes if hasattr(config.task, "predict") else None,
        rows=rows,
        threads=data.threads,
        prefetch=data.prefetch,
    )


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
