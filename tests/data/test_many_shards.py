"""Opening a dataset of a thousand shards reads none of them, and its shuffle covers an epoch once."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zoo.data.loader import Loader, Order
from zoo.data.shards import Shards
from zoo.data.store import Dataset, write_records

SHARDS, RECORDS = 1000, 5
opened: list[str] = []
watched: list[Path] = []


def watch(event: str, about: tuple[Any, ...]) -> None:
    """Notes the files below `watched` that are opened: an audit hook stays for as long as the process."""
    if event == "open" and watched and str(about[0]).startswith(str(watched[0])):
        opened.append(str(about[0]))


sys.addaudithook(watch)


@pytest.fixture
def many(prepared: Path, tmp_path: Path) -> Path:
    """A dataset whose shards are files of zeros that take no room on the disk: 2 channels, 200 samples a record."""
    plain = Dataset.read_json(prepared)
    index = Dataset.read_index(prepared, plain)
    names = [f"shards/{number:04}.arrayrecord" for number in range(SHARDS)]
    montage = {name: value[:2] for name, value in plain["montages"][0].items()}
    recording = plain["recordings"][0]
    plain |= {
        "montages": [montage],
        "recordings": [recording | {"id": f"{number:04}", "montage": 0, "n_samples": 1000} for number in range(SHARDS)],
        "shards": [{"file": name, "size": 1 << 30, "sha256": "", "records": RECORDS} for name in names],
    }
    fields = {
        "recording": np.repeat(np.arange(SHARDS), RECORDS),
        "shard": np.repeat(np.arange(SHARDS), RECORDS),
        "start": np.tile(200 * np.arange(RECORDS), SHARDS),
        "position": np.tile(np.arange(RECORDS), SHARDS),
        "length": np.full(SHARDS * RECORDS, 200),
    }
    index = {name: fields.get(name, np.repeat(value[:1], SHARDS * RECORDS)) for name, value in index.items()}
    (tmp_path / "shards").mkdir()
    for name in names:
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 30)
    write_records(tmp_path, "dataset.json", json.loads(json.dumps(plain)), index)
    return tmp_path


def test_opening_reads_no_shard_and_an_epoch_takes_every_window_once(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def read(shards: Shards, i: int) -> Any:
        asked.append(i)
        return np.full((2, 200), i, np.float32).tobytes()

    monkeypatch.setattr(Shards, "read", read)
    watched[:] = [many]
    dataset = Dataset.open(many)
    loader = Loader(dataset, np.arange(len(dataset)), window=100, batch_size=50, seed=1, threads=0)
    batches = loader.at(0)
    watched.clear()
    assert sorted(opened) == [str(many / "dataset.json"), str(many / "index.npz")]
    assert not asked
    next(loader.at(10**6))  # far on, and nothing but its own records is read
    assert len(asked) == 50
    asked.clear()
    steps = int(loader.epoch_steps)
    assert steps == 2 * SHARDS * RECORDS / 50
    seen = np.concatenate([batch["record"] for batch in islice(batches, steps)])
    np.testing.assert_array_equal(np.bincount(seen, minlength=len(dataset)), np.full(len(dataset), 2))
    assert asked == seen.tolist()
    # Shuffled over all shards: what follows each other is far apart.
    assert np.median(np.abs(np.diff(seen))) > len(dataset) / 5


def test_the_index_of_a_record_takes_few_bytes(many: Path) -> None:
    dataset = Dataset.open(many)
    order = Order(np.arange(len(dataset)), dataset.length, seed=1)
    assert order.size == 200 * len(dataset)

    def held(*things: Any) -> int:
        values = [value for thing in things for value in vars(thing).values()]
        return sum(value.nbytes for value in values if isinstance(value, np.ndarray))

    assert held(dataset, dataset._shards, order) < 100 * len(dataset)  # and none for each window
