"""Trains encoders of EEG, MEG and fMRI into one space: every answer is looked for among 65,536.

    zoo train configs/pod_contrast.py --devices.coordinator auto
    zoo plan configs/pod_contrast.py --target v5p:8x8x8
    zoo plan configs/pod_contrast.py --target h200:64

Wants three prepared datasets of people who met the same stimuli, whose events have the stimulus as their label:
`prepared/eeg` (LaBraM's recipe, 200 Hz, 32 channels or more), `prepared/meg` (120 Hz, 256 or more) and `prepared/fmri`
(400 regions of one atlas, z-scored, a volume every 0.72 s; the answer is read from 3 s on). A row of the batch is one
stimulus, and in each modality one trial of it, whoever's. Encoders of 46 M (LaBraM), SimpleConv's and 85 M parameters
embed a quarter of the batch at a time and again in the backward pass; of the three 65,536 × 65,536 tables of
similarities each chip makes its own rows, 128 MiB at a time. All parameters are whole on every chip.

Planned for v5p-512 (512 chips, 8 × 8 × 8), data 512:

    memory a chip      4.41 GB of 102 GB: parameters 561 MB, optimiser 1.12 GB, batch 62 MB, temporaries 2.43 GB
    operations a step  1.75e16 of the model, 3.36e16 done: every part is embedded again, and every layer of it
    compute             143 ms
    memory              153 ms  423 GB a chip
    data               12.2 ms  gradients and the vectors' gradients added (3.65 GB)
    a step at best      153 ms  bound by memory; MFU ≤ 48.6 %

And for 64 × H200, data 64:

    memory a chip      13.9 GB of 141 GB: parameters 561 MB, optimiser 1.12 GB, batch 496 MB, temporaries 11.8 GB
    operations a step  1.75e16 of the model, 3.36e16 done
    compute             530 ms
    memory             7.63 s   36.6 TB a chip, as XLA fuses for GPUs
    network            66.1 ms  gradients added (2.11 GB), vectors gathered and their gradients added (1.19 GB)
    a step at best     7.63 s   bound by memory; MFU ≤ 3.6 %
"""

from zoo.data.paired import Paired
from zoo.objectives.contrast_modalities import ContrastModalities, Modality
from zoo.train.config import Config, Data, Optimizer, Train


def config() -> Config:
    """The contrast of modalities."""
    return Config(
        name="pod_contrast",
        task=ContrastModalities(
            modalities={
                "eeg": Modality("labram_large"),
                "meg": Modality("simple_conv_base", {"virtual": 256, "mixed": 256}),
                "fmri": Modality("regions_large"),
            },
            features=512,
            parts=4,
            dtype="bfloat16",
            remat="full",
        ),
        data=Data(
            paired={
                "eeg": Paired("prepared/eeg", window_seconds=3.0, channels=32, rate_hz=200.0),
                "meg": Paired("prepared/meg", window_seconds=3.0, channels=256, rate_hz=120.0),
                "fmri": Paired("prepared/fmri", window_seconds=7.2, offset_seconds=3.0, channels=400, rate_hz=1 / 0.72),
            },
            batch_size=65_536,
            threads=8,
            prefetch=2,
        ),
        optimizer=Optimizer(learning_rate=5e-4, warmup_steps=2_000, weight_decay=0.2),
        train=Train(steps=50_000, validate_every=1_000, validate_batches=1, checkpoint_every=500),
    )
