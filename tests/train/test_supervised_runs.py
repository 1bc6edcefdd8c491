"""A classifier through the real command: trained on windows around events, stopped, scored on those it has not seen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small import finish, metrics, start, write_config

import zoo
from zoo.data.loader import Loader
from zoo.data.prepare import prepare
from zoo.data.recipes import RECIPES, Window
from zoo.data.store import Dataset

LABELS = ("face-upright", "face-inverted", "house-upright", "house-inverted")
CONFIG = """\
from pathlib import Path

from zoo.objectives.supervised import Supervised
from zoo.train.config import Config, Data, Devices, Optimizer, Probe, Train


def config():
    return Config(
        name="small",
        task=Supervised(
            "eegnet_tiny", {"channels": ("F3", "CZ", "P3", "P4"), "samples": 160}, channels="interpolate", smoothing=0.1
        ),
        data=Data(prepared=Path("prepared"), batch_size=16, window_seconds=0.8),
        optimizer=Optimizer(learning_rate=1e-2, warmup_steps=2),
        train=Train(steps=12, checkpoint_every=6, validate_every=6, validate_batches=1),
        devices=Devices(platform="cpu"),
        probe=Probe({"face": ("face-upright", "face-inverted"), "house": ("house-upright", "house-inverted")}),
    )
"""


@pytest.fixture(scope="module")
def events(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second around each face, house and checkerboard of the recordings."""
    out = tmp_path_factory.mktemp("prepared") / "events"
    window = Window((*LABELS, "checker-left", "checker-right"), -0.1, 0.9)
    recipe = replace(RECIPES["raw"], kinds=("eeg",), rate_hz=200.0, scale="robust", clip=10.0, window=window)
    prepare(recordings, out, recipe, fractions={"train": 0.6, "validation": 0.4})
    return out


@pytest.mark.slow
def test_a_classifier_is_trained_scored_and_loaded(events: Path, cache: Path, tmp_path: Path) -> None:
    write_config(tmp_path, events, CONFIG)
    said, _ = finish(start(tmp_path, cache))
    assert "validation: eegnet_tiny: balanced accuracy" in said
    scored = json.loads((tmp_path / "runs/small/evaluation.json").read_text())
    assert set(scored) == {"validation: shrinkage LDA", "validation: eegnet_tiny"}
    dataset = Dataset.open(events)
    held_out = dataset.splits["validation"]
    assert {each["trials"] for each in scored.values()} == {int((dataset.label[held_out] < 4).sum())}
    assert {"accuracy", "balanced_accuracy"} <= metrics(tmp_path)[-1].keys()

    encoder, variables = zoo.load(tmp_path / "runs/small")
    batch = next(Loader(dataset, held_out, window=160, batch_size=4, seed=0).at(0))
    encoded = encoder.apply(variables, batch["signal"], batch["sensors"])
    assert encoded.pooled.shape == (4, encoder.features)
    assert np.isfinite(encoded.pooled).all()

    wrong = start(tmp_path, cache, "--name", "wrong", "--task.classes", "5")
    _, complaint = finish(wrong, code=2)
    assert "task.classes: got 5, windows have 2, face, house" in complaint
