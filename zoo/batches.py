"""What a configuration's `data` names: opened datasets, and their batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.errors import ZooError
from zoo.train.config import Config, Data

if TYPE_CHECKING:
    from zoo.data.loader import Loader
    from zoo.data.paired import PairedDataset, PairedLoader
    from zoo.data.remote import ShardCache
    from zoo.data.store import Dataset


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
    paired = PairedDataset.open(data.paired, int(data.cache_gigabytes * 1e9), _shard_cache(data))
    if "signal" in paired.datasets:
        _check_signals(config, paired.datasets["signal"])
        return paired
    if not hasattr(task, "check_modality"):
        raise ZooError(f"data.paired: {type(task).__name__} takes batches of one signal, not of modalities")
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
    _check_signals(config, dataset)
    if config.probe.classes and dataset.classes and not hasattr(config.task, "predict"):
        raise ZooError(f"{dataset.path}: holds windows of events; a probe cuts its own, from continuous records")
    if hasattr(config.task, "check_labels"):
        config.task.check_labels(tuple(config.probe.classes) or dataset.classes, len(dataset.people))
    return dataset


def _check_signals(config: Config, dataset: Dataset) -> None:
    """Raises ZooError when the task cannot take the signals of a dataset."""
    for montage in dataset.montages:
        if hasattr(config.task, "check_recording"):
            config.task.check_recording(dataset.rate_hz, montage.kinds, montage.canonical)
        elif hasattr(config.task, "check_sensors"):
            config.task.check_sensors(montage.canonical)
    if hasattr(config.task, "check_positions"):
        from zoo.types import Sensors

        config.task.check_positions(Sensors(**dataset.sensor_tables()[0]))


def _open_prepared(data: Data) -> Dataset:
    import jax

    from zoo.data.prepare import prepare
    from zoo.data.remote import locate
    from zoo.data.store import Dataset
    from zoo.train.cluster import wait_for_all

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
    wait_for_all("data prepared")
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
        readers=data.readers,
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
        readers=data.readers,
    )
