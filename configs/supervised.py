"""Trains EEGNet to tell faces, houses and checkerboards from single trials.

zoo train configs/supervised.py
"""

from dataclasses import replace
from pathlib import Path

from zoo.data.recipes import RECIPES, Window
from zoo.objectives.supervised import Supervised
from zoo.train.config import Config, Data, Optimizer, Probe, Train

CLASSES = {
    "checker": ("checker-left", "checker-right"),
    "face": ("face-upright", "face-inverted"),
    "house": ("house-upright", "house-inverted"),
}


def config() -> Config:
    """The classifier."""
    return Config(
        name="supervised",
        task=Supervised(
            model="eegnet_base",
            options={"channels": 128, "samples": 102, "dropout": 0.5},
            classes=3,
            smoothing=0.1,
        ),
        data=Data(
            source="faces_eeg",
            prepared=Path("prepared/faces_events"),
            recipe=replace(
                RECIPES["raw"],
                name="faces",
                kinds=("eeg",),
                highpass_hz=0.5,
                lowpass_hz=30.0,
                reference="average",
                rate_hz=128.0,
                scale="robust",
                clip=10.0,
                window=Window(sum(CLASSES.values(), ()), -0.15, 0.75),
            ),
            fractions={"train": 0.8, "validation": 0.2},
            window_seconds=0.8,
            batch_size=64,
        ),
        optimizer=Optimizer(learning_rate=5e-3, warmup_steps=30, weight_decay=0.01, b2=0.999),
        train=Train(steps=400, validate_every=50, validate_batches=4, checkpoint_every=200),
        probe=Probe(classes=CLASSES),
    )
