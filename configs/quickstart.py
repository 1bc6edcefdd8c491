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
        task=MaskedPatch(model="labram_tiny", options={"depth": 2, "per_patch_norm": True}),
        data=Data(
            source="faces_eeg",
            prepared=Path("prepared/faces_eeg"),
            recipe=replace(RECIPES["labram"], notch_hz=(60.0,), sensor_names="nearest", scale="robust", clip=10.0),
            window_seconds=1.0,
            batch_size=32,
            mask_patch=200,
            mask_ratio=0.5,
        ),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=50),
        train=Train(steps=400, validate_every=100, checkpoint_every=100),
        probe=Probe(
            classes={
                "checker": ("checker-left", "checker-right"),
                "face": ("face-upright", "face-inverted"),
                "house": ("house-upright", "house-inverted"),
            },
            tmin=-0.1,
            tmax=0.9,
        ),
    )
