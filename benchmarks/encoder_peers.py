"""Which of our encoders is compared with which of PyTorch's: `benchmarks/encoders.py` times them.

An encoder with a peer is a line in `PEERS`. Both sides are classifiers of `CLASSES` classes with the same weights,
which the peer draws and our key maps carry over.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zoo.encoders.biot import BIPOLAR
from zoo.weights.keys import Ignore, Key, Rule, below

CLASSES = 4
ELECTRODES = ("FP1", "FP2", "F7", "F3", "FZ", "F4", "F8", "T7", "C3", "CZ", "C4", "T8", "P7", "P3", "PZ", "P4")


@dataclass(frozen=True)
class Peer:
    """An encoder, its peer among `braindecode.models`, and the windows both are given.

    options          of ours; `channels` and `samples` are added where it has such fields
    theirs           name of the peer
    their_options    of the peer, besides its windows' sizes
    keys, head_keys  "module:NAME" of the key maps of the encoder and of its classifier
    channels         of the windows, canonical names
    samples, rate_hz of the windows
    placed           whether the peer is told which its channels are, and where
    ignored          its tensors that hold nothing learned
    mean_width       where its own classifier reads what ours does not: a linear map of the mean of its tokens, which
                     have so many features, stands in for that and for what it calls `proj_out`
    """

    theirs: str
    keys: str
    head_keys: str
    options: Mapping[str, Any] = field(default_factory=dict)
    their_options: Mapping[str, Any] = field(default_factory=dict)
    channels: tuple[str, ...] = ELECTRODES
    samples: int = 1000
    rate_hz: float = 250.0
    placed: bool = False
    ignored: tuple[str, ...] = ()
    mean_width: int = 0

    def rules(self) -> tuple[Rule, ...]:
        """The peer's tensors as variables of `zoo.objectives.supervised.Classifier`."""
        ignored = [Ignore(name, "not learned") for name in self.ignored]
        return (*below(_named(self.keys), "encoder"), *below(_named(self.head_keys), "head"), *ignored)

    def build(self) -> Any:
        """The peer."""
        # Where the module lies that imports braindecode without torchaudio.
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "parity"))
        models = importlib.import_module("braindecode_models").braindecode_models()
        sizes: dict[str, Any] = {
            "n_chans": len(self.channels),
            "n_times": self.samples,
            "sfreq": self.rate_hz,
            "n_outputs": CLASSES,
        }
        if self.placed:
            sizes["chs_info"] = [
                {"ch_name": name, "loc": place} for name, place in zip(self.channels, self.positions, strict=True)
            ]
        net = getattr(models, self.theirs)(**sizes, **self.their_options)
        if self.mean_width:
            nn = importlib.import_module("torch.nn")
            net.proj_out = nn.Identity()
            mean = nn.Flatten(1, 2), nn.AdaptiveAvgPool2d((1, self.mean_width)), nn.Flatten(1)
            net.final_layer = nn.Sequential(*mean, nn.Linear(self.mean_width, CLASSES))
        return net

    @property
    def positions(self) -> np.ndarray:
        """[C, 3] metres, on a ring about the head, which every way to flatten a head leaves a ring."""
        angle = np.linspace(0, 2 * np.pi, len(self.channels), endpoint=False)
        return 0.09 * np.stack([np.sin(angle), np.cos(angle), 0 * angle], axis=-1)


def _named(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


MEAN_HEAD_KEYS: tuple[Rule, ...] = (
    Key("final_layer.3.weight", "params/linear/kernel", "o i -> i o"),
    Key("final_layer.3.bias", "params/linear/bias"),
)
"""Of the stand-in."""


def _plain(theirs: str, module: str) -> Peer:
    return Peer(theirs, f"zoo.encoders.{module}:KEYS", f"zoo.encoders.{module}:HEAD_KEYS")


PEERS: Mapping[str, Peer] = {
    "eegnet_base": _plain("EEGNet", "eegnet"),
    "shallow_base": _plain("ShallowFBCSPNet", "shallow"),
    "deep4_base": _plain("Deep4Net", "deep4"),
    "eeg_conformer_base": _plain("EEGConformer", "eeg_conformer"),
    "labram_base": Peer(
        "Labram",
        "zoo.encoders.labram:BRAINDECODE_KEYS",
        "zoo.encoders.labram:BRAINDECODE_HEAD_KEYS",
        options={"max_patches": 6},
        their_options={"use_mean_pooling": True},
        rate_hz=200.0,
    ),
    "biot_base": Peer(
        "BIOT",
        "zoo.encoders.biot:BRAINDECODE_KEYS",
        "zoo.encoders.biot:BRAINDECODE_HEAD_KEYS",
        channels=BIPOLAR,
        rate_hz=200.0,
    ),
    "cbramod_base": Peer(
        "CBraMod",
        "zoo.encoders.cbramod:KEYS",
        "benchmarks.encoder_peers:MEAN_HEAD_KEYS",
        samples=800,
        rate_hz=200.0,
        mean_width=200,
    ),
    "eegpt_large": Peer(
        "EEGPT",
        "zoo.encoders.eegpt:KEYS",
        "zoo.encoders.eegpt:BRAINDECODE_HEAD_KEYS",
        their_options={"patch_stride": 64, "chan_proj_type": "none"},
        samples=1024,
        rate_hz=256.0,
        placed=True,
        ignored=("chans_id",),
    ),
    "simple_conv_base": Peer(
        "BrainModule",
        "zoo.encoders.simple_conv:BRAINDECODE_KEYS",
        "zoo.encoders.simple_conv:BRAINDECODE_HEAD_KEYS",
        options={"mixed": 320, "outputs": 0},
        their_options={"use_merger": True},
        samples=360,
        rate_hz=120.0,
        placed=True,
    ),
}
"""Registered name → its peer. LaBraM: a time table of one row more than patches, as braindecode makes it."""
