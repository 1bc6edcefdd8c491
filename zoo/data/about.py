"""What `zoo info` tells of a prepared dataset, wherever it is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from zoo.data.store import Dataset

MOST = 12
"""Labels that are listed."""


def looks_like_dataset(name: str) -> bool:
    """Whether a name is a folder or an address, and not that of a model."""
    return "/" in name or Path(name).is_dir()


def about(path: str) -> dict[str, str]:
    """Title → text. Raises ZooError when there is no dataset at `path`."""
    dataset = Dataset.open(path)
    seconds = dataset.length.sum() / dataset.rate_hz
    channels = sorted({len(montage.names) for montage in dataset.montages})
    kinds = Counter(kind for montage in dataset.montages for kind in montage.kinds)
    lengths = sorted({int(length) for length in dataset.length})
    labels = Counter(dataset.classes[label] for label in dataset.label if label >= 0) or Counter(
        event.label for recording in dataset.recordings for event in recording.events
    )
    splits = ", ".join(f"{name} {len(records)}" for name, records in dataset.splits.items())
    counts = [f"{name} {count}" for name, count in labels.most_common(MOST)]
    return {
        "dataset": f"{dataset.path}, by the recipe {dataset.recipe['name']}",
        "recordings": f"{len(dataset.recordings)} of {len(dataset.people)} people, {seconds / 3600:.4g} hours",
        "signal": f"{dataset.rate_hz:g} Hz, {_span(channels)} channels ({', '.join(kinds)})",
        "records": f"{len(dataset)} of {_span(lengths)} samples; {splits}",
        "windows of" if dataset.classes else "events": ", ".join(counts + ["…"] * (len(labels) > MOST)) or "none",
        "shards": f"{dataset.n_shards}, {dataset.n_bytes / 1e9:.3g} GB",
    }


def _span(values: list[int]) -> str:
    return f"{values[0]}" if len(values) == 1 else f"{values[0]} to {values[-1]}"
