"""Pretrains a small LaBraM on two people's EEG and probes it: `zoo train configs/quickstart.py`."""

from dataclasses import replace
from pathlib import Path

from zoo.data.recipes import RECIPES
from zoo.objectives.masked_patch import MaskedPatch
from zoo.train.config import Config, Data, Optimizer, Probe, Train


def config() -> Config:
    """The run."""
    return Config(
        name="quickstart",
        task=MaskedPatch(model="labram_tiny", options={"depth": 2, "layer_scale": 1.0, "table_std": 0.6}),
        data=Data(
            source="faces_eeg",
            prepared=Path("prepared/faces_eeg"),
            recipe=replace(RECIPES["labram"], notch_hz=(60.0,), sensor_names="nearest", scale="robust", clip=10.0),
            window_seconds=1.0,
            batch_size=32,
            mask_patch=200,
            mask_ratio=0.5,
            channels=32,
        ),
        optimizer=Optimizer(name="muon", learning_rate=1e-2, warmup_steps=80, final_fraction=0.05),
        train=Train(steps=800, validate_every=100, validate_batches=8, checkpoint_every=200),
        probe=Probe(
            classes={
                "checker": ("checker-left", "checker-right"),
                "face": ("face-upright", "face-inverted"),
                "house": ("house-upright", "house-inverted"),
            },
            tmin=-0.2,
            tmax=0.8,
        ),
    )
