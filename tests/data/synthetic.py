"""Small recordings with known content."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mne
import numpy as np

from zoo.data.recipes import Recipe

RATE_HZ = 100.0
NAMES = ("Fp1", "Fp2", "C3", "C4", "O1", "O2")
EVENTS = (
    (2.0, 0.0, "left"),
    (5.0, 0.5, "right"),
    (9.0, 0.0, "left"),
    (12.5, 1.0, "BAD_jump"),
    (19.9, 0.0, "right"),
)

PLAIN = Recipe(name="plain", unit=1e-6, segment_seconds=2.0)
"""Microvolts in float32, nothing else; records of 2 s."""


def make_raw(
    names: Sequence[str] = NAMES,
    seconds: float = 21.0,
    seed: int = 0,
    bads: Sequence[str] = (),
    events: Sequence[tuple[float, float, str]] = EVENTS,
) -> mne.io.RawArray:
    """White noise of 20 µV on `names` and an eye channel."""
    samples = np.random.default_rng(seed).normal(0, 20e-6, (len(names) + 1, round(seconds * RATE_HZ)))
    info = mne.create_info([*names, "EOG1"], RATE_HZ, ["eeg"] * len(names) + ["eog"])
    raw = mne.io.RawArray(samples, info, verbose="error")
    raw.set_annotations(mne.Annotations(*zip(*events, strict=True)) if events else mne.Annotations([], [], []))
    raw.info["bads"] = list(bads)
    return raw


def write_recordings(folder: Path) -> Path:
    """Three people with two runs each; one has fewer channels, one run a bad channel, lengths differ."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, subject in enumerate(("s1", "s2", "s3")):
        for run in ("1", "2"):
            raw = make_raw(
                NAMES[:4] if subject == "s3" else NAMES,
                seconds=21.0 + number,
                seed=10 * number + int(run),
                bads=["C3"] if (subject, run) == ("s2", "2") else [],
            )
            raw.save(folder / f"sub-{subject}_task-noise_run-{run}_eeg.fif", verbose="error")
    return folder
