"""`configs/quickstart.py` for any encoder that hides patches of a second: `--task.model NAME` says which."""

from dataclasses import replace
from pathlib import Path

from zoo.objectives.masked_patch import MaskedPatch
from zoo.train.config import Config, load_config


def config() -> Config:
    """The quickstart with an encoder as it is registered."""
    quickstart = load_config(Path(__file__).resolve().parents[1] / "configs" / "quickstart.py")
    return replace(quickstart, name="probe_pretraining", task=MaskedPatch())
