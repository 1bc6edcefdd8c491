"""Which encoders `benchmarks/probes.py` trains on `faces_eeg`, on which windows, with which settings.

A registered encoder that is not among `CONTENDERS` is tried too: on a second at its own rate, standardised by person,
with `SETTINGS`, and with `channels` and `samples` set where it has such options. Settings were chosen on the first 60 %
of each recording (`--share 0.6`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RATE_HZ = 64.0
"""Of windows for encoders that take any rate: what distinguishes the pictures lies below 20 Hz."""


@dataclass(frozen=True)
class Contender:
    """An encoder trained from labels alone, or the classical decoder.

    model       registered name; "" for shrinkage LDA on the windows themselves
    rate_hz     of the windows; None: the encoder's own, else `RATE_HZ`
    window      seconds from the picture to the first sample and to the end
    sites       0: every electrode. Else so many of them, far from each other, each the mean of its neighbourhood with
                weights that fall with distance as a normal density of 2 cm: people's patterns differ in the fine
    by_person   whether each person's windows are brought to mean 0 and deviation 1 at every channel and time. That
                takes no label, but it takes all of a person's windows, those to be predicted too
    options     of the encoder, besides `channels` and `samples`
    settings    of `zoo.evaluate.supervised.SupervisedEstimator`
    pretraining a configuration and its options: instead of training from labels, `zoo train` pretrains this encoder
                without any, and a linear probe reads it frozen, before and after, on the windows of that configuration
    """

    model: str
    rate_hz: float | None = None
    window: tuple[float, float] = (0.0, 0.8)
    sites: int = 0
    by_person: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    pretraining: tuple[str, ...] = ()


SECOND = (-0.2, 0.8)
SETTINGS = {"epochs": 16, "learning_rate": 2e-3, "channel_dropout": 0.3}
EEGNET = {"filters": 8, "width": 32, "late_width": 8, "pools": (2, 4), "dropout": 0.5}
"""EEGNet for 64 Hz: its widths and pools in seconds are the paper's at 128 Hz."""
WIDE = {**EEGNET, "filters": 32}

CONTENDERS: Mapping[str, Contender] = {
    "shrinkage LDA": Contender("", RATE_HZ),
    "shrinkage LDA, 128 Hz from -0.2 s": Contender("", 128.0, SECOND),
    "shrinkage LDA, by person": Contender("", RATE_HZ, by_person=True),
    "shrinkage LDA, 32 sites by person": Contender("", RATE_HZ, sites=32, by_person=True),
    "eegnet": Contender("eegnet_base", options=EEGNET, settings=SETTINGS),
    "eegnet, by person": Contender("eegnet_base", by_person=True, options=EEGNET, settings=SETTINGS),
    "eegnet wide, by person": Contender("eegnet_base", by_person=True, options=WIDE, settings=SETTINGS),
    "eegnet wide ensemble, by person": Contender(
        "eegnet_base", by_person=True, options=WIDE, settings={**SETTINGS, "ensemble": 8}
    ),
    "labram_tiny, pretrained": Contender("labram_tiny", pretraining=("configs/quickstart.py",)),
    "cbramod_tiny, pretrained": Contender(
        "cbramod_tiny", pretraining=("benchmarks/probe_pretraining.py", "--task.model=cbramod_tiny")
    ),
}
"""What a row is called → what it is."""
