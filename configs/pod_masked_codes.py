"""Pretrains an encoder of 1 B parameters on half an hour of EEG at a time, by hiding half of its codes.

    zoo train configs/pod_masked_codes.py --task.tokenizer runs/tokenizer --devices.coordinator auto
    zoo plan configs/pod_masked_codes.py --target v5p:8x8x8
    zoo plan configs/pod_masked_codes.py --target h200:64

Wants hours of EEG of many people, prepared into `prepared/long_eeg` in LaBraM's way, 32 channels at 200 Hz, and a run
that trained LaBraM's tokenizer; a plan needs neither, only the tokenizer's name. Stretches of 5 s are tokenised each by
itself, a token a channel and second: 57,600 tokens an example. Three layers of retention, both ways, stand between
layers of attention; the mesh's `sequence` divides an example over 8 chips, where states of the first travel and keys of
the second go round. With the same 64 examples a step, fewer chips take several micro-batches.

Planned for v5p-512 (512 chips, 8 × 8 × 8), data 8 × fsdp 8 × sequence 8, 64 examples a step:

    memory a chip      7.58 GB of 102 GB: parameters 521 MB, optimiser 1.04 GB, temporaries 5.73 GB
    operations a step  4.37e16 of the model, 5.54e16 done
    compute             236 ms
    memory              265 ms  733 GB a chip
    fsdp               28.7 ms  parameters gathered (5.11 GB), gradients and activations added (3.52 GB)
    sequence          0.633 ms  keys and states go round (189 MB)
    a step at best      265 ms  bound by memory; MFU ≤ 70.1 %

And for 64 × H200, fsdp 8 × sequence 8, 8 micro-batches of 8 examples a step:

    memory a chip      9.1 GB of 141 GB: parameters 521 MB, optimiser 1.04 GB, batch 369 MB, temporaries 7.13 GB
    operations a step  4.37e16 of the model, 5.54e16 done
    compute             875 ms
    memory             8.04 s   38.6 TB a chip, as XLA fuses for GPUs
    network             892 ms  fsdp: parameters gathered (28.9 GB), gradients added (14.1 GB); both axes: 1.61 GB
    sequence           69.0 ms  keys and states go round and are added (31.0 GB), inside a node
    a step at best     8.04 s   bound by memory; MFU ≤ 8.6 %
"""

from dataclasses import replace
from pathlib import Path

from zoo.data.recipes import RECIPES
from zoo.objectives.masked_codes import MaskedCodes
from zoo.train.config import Config, Data, Mesh, Optimizer, Train


def config() -> Config:
    """The pretraining."""
    return Config(
        name="pod_masked_codes",
        task=MaskedCodes(
            tokenizer="labram_vqnsp_base",
            model="codes_1b",
            stretch=1000,
            symmetric=False,
            dtype="bfloat16",
            remat="full",
        ),
        data=Data(
            prepared=Path("prepared/long_eeg"),
            recipe=replace(RECIPES["labram"], sensor_names="nearest", scale="robust", clip=10.0),
            split="by_subject",
            window_seconds=1800.0,
            batch_size=64,
            channels=32,
            cache_gigabytes=64.0,
            threads=8,
            prefetch=2,
        ),
        optimizer=Optimizer(learning_rate=3e-4, warmup_steps=2_000),
        train=Train(steps=100_000, micro_batch=1, validate_every=1_000, validate_batches=2, checkpoint_every=500),
        mesh=Mesh(fsdp=8, sequence=8),
    )
