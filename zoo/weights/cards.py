"""Published weights, as data: what they are of, where they lie, and what they want for input.

    module, variables = zoo.load("ephys_tokenizer.pretrained")

A name is `arch_size.tag`: the model's registered name, and which of its weights. How a file's tensors become ours is
in the key map at the end of the model's own file.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo.errors import ZooError


@dataclass(frozen=True)
class InSample:
    """A file of a sample (`zoo.data.samples`), which comes from a package index."""

    sample: str
    path: str

    @property
    def file(self) -> str:
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Hub:
    """A file of a repository of the Hugging Face hub, at one revision."""

    repository: str
    path: str
    revision: str

    @property
    def file(self) -> str:
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Download:
    """A file at an address that does not change, and what it is called here."""

    url: str
    file: str


@dataclass(frozen=True)
class Pretrained:
    """One file of published weights.

    name            arch_size.tag
    about           what they were trained on
    arch, options   the registered model, and its options that differ
    classes         of the classifier that the file has beside the encoder; 0 where it has none
    source, sha256  where the file is, and what it must be
    keys            which of the model's key maps, see `zoo.weights.convert.key_map`
    unwrap          dictionary within the file that holds the tensors, see `zoo.weights.files.read`
    recipe          name in `zoo.data.recipes` of what a recording must have gone through; "" where there is none
    window_seconds  length of window that it was trained on; None where any will do
    """

    name: str
    about: str
    arch: str
    source: InSample | Hub | Download
    sha256: str
    licence: str
    paper: str
    options: Mapping[str, Any] = field(default_factory=dict)
    classes: int = 0
    keys: str = ""
    unwrap: str = ""
    recipe: str = ""
    window_seconds: float | None = None


_ALL = (
    Pretrained(
        name="iclabel_base.pretrained",
        about="over 200,000 components of EEG, some 6,000 of them labelled by people",
        arch="iclabel_base",
        source=InSample("iclabel", "iclabel/network/assets/ICLabelNet.onnx"),
        sha256="b7dc72bc3fa5960b2843fc6d5ba60add842b0a240c6371598be09b595182c04b",
        licence="BSD-3-Clause",
        paper="Pion-Tonachini, Kreutz-Delgado, Makeig. ICLabel. NeuroImage 198, 2019, arXiv 1901.07915",
    ),
    Pretrained(
        name="tfm_encoder.tuev",
        about="EEG events of TUEV (6 classes), from codes of a tokenizer that was never published",
        arch="tfm_encoder",
        source=Download(
            "https://github.com/Jathurshan0330/TFM-Tokenizer/raw/5ec7dfc0b8ae5a51b3a72340bb4eefe958ae635f/"
            "pretrained_weigths/single_dataset_settings/TUEV_tfm_tokenizer_2x2x8/tfm_encoder_best_model.pth",
            "tfm_tuev_enc.pth",
        ),
        sha256="4e25cdb5a11a130c2490ba09bdc4734a6d4ce790a31aa8a3186b53704bb88a79",
        licence="MIT",
        paper="Pradeepkumar, Piao, Chen, Sun. Tokenizing Single-Channel EEG with Time-Frequency Motif Learning. "
        "arXiv 2502.16060",
        classes=6,
        recipe="tfm",
        window_seconds=5.0,
    ),
    Pretrained(
        name="ephys_tokenizer.pretrained",
        about="resting MEG of Cam-CAN, 52 regions, standardised by session and channel",
        arch="ephys_tokenizer",
        source=Download(
            "https://github.com/OHBA-analysis/MEG-GPT/raw/87c0662283141409ce81129d29d6a20ebabae145/"
            "models/tokenizer/model_state.pt",
            "meggpt_tok.pt",
        ),
        sha256="1d766a574942122ed28d2d08dcd2e33dc53b2b8a30628c100d786516152cf2a7",
        licence="MIT",
        paper="MEG-GPT, arXiv 2510.18080",
        recipe="meg_gpt",
        window_seconds=0.8,
    ),
)
PRETRAINED: dict[str, Pretrained] = {card.name: card for card in _ALL}


def pretrained(name: str) -> Pretrained:
    """The card of that name. Raises ZooError with the nearest right one."""
    if name in PRETRAINED:
        return PRETRAINED[name]
    near = difflib.get_close_matches(name, PRETRAINED, n=1, cutoff=0.0)
    raise ZooError(f"no weights are called {name!r}; the nearest are {near[0]!r} (see `zoo list`)")
