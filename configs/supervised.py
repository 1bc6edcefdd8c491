"""Trains EEGNet to tell faces, houses and checkerboards from single trials of two people.

    zoo train configs/supervised.py

Fetches `faces_eeg`, cuts 0.9 s around every picture (0.5 to 30 Hz, average reference, 128 Hz, channels scaled
robustly), and learns from the first four fifths of each recording; each step sees another 0.8 s of its windows. Scored
are the middle 0.8 s of those in the last fifth, beside shrinkage LDA that learned from the same windows.

Measured, balanced accuracy on 501 held-out windows [95 %], chance .333:

    shrinkage LDA         .874 [.844, .905]
    EEGNet, 1000 steps    .847 [.815, .877]
    EEGNet, 400 steps     .811 [.779, .842]    with dropout .5 and half the learning rate

So 3,299 parameters trained by gradient come near LDA here and do not pass it. What an encoder gains from alignment of
people, augmentation or pretraining is compared in `benchmarks/probes.py`.
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
            options={"channels": 128, "samples": 102, "dropout": 0.25},
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
        optimizer=Optimizer(learning_rate=1e-2, warmup_steps=30, weight_decay=0.01, b2=0.999),
        train=Train(steps=1000, validate_every=50, validate_batches=4, checkpoint_every=200),
        probe=Probe(classes=CLASSES),
    )
