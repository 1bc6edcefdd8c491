"""Pretrains an encoder of codes by hiding half of them, and asks a linear probe what it learned.

    zoo train configs/tokenizer.py
    zoo train configs/masked_codes.py

Any trained tokenizer will do (`--task.tokenizer runs/NAME`; prepare the recordings at its sampling rate and give
windows it can cut). `benchmarks/code_probes.py` runs this for each of several tokenizers; its table stands in
benchmarks/RESULTS.md.
"""

from dataclasses import replace
from pathlib import Path

from zoo.data.recipes import RECIPES
from zoo.objectives.masked_codes import MaskedCodes
from zoo.train.config import Config, Data, Optimizer, Probe, Train


def config() -> Config:
    """The pretraining."""
    return Config(
        name="masked_codes",
        task=MaskedCodes(tokenizer="runs/tokenizer", model="codes_tiny"),
        data=Data(
            source="faces_eeg",
            prepared=Path("prepared/faces_eeg"),
            recipe=replace(RECIPES["labram"], notch_hz=(60.0,), sensor_names="nearest", scale="robust", clip=10.0),
            window_seconds=1.0,
            batch_size=32,
            channels=32,
        ),
        optimizer=Optimizer(name="muon", learning_rate=1e-2, warmup_steps=80, final_fraction=0.05),
        train=Train(steps=800, validate_every=100, validate_batches=8, checkpoint_every=400),
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
