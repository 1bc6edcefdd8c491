"""Pretrains a native-sparse model of 7 B parameters on whole nights of sleep EEG, by predicting the next codes.

    zoo train configs/pod_sleep_codes.py --task.tokenizer runs/tfm --devices.coordinator auto
    zoo plan configs/pod_sleep_codes.py --target v5p:8x8x8
    zoo plan configs/pod_sleep_codes.py --target h200:64

Wants nights of six electrodes (F3, F4, C3, C4, O1, O2, say) at 200 Hz, 8 h 5 min 20 s or more each, prepared into
`prepared/nights`, and a run that trained TFM's tokenizer; a plan needs neither, only the tokenizer's name. A night of
35 million samples is tokenised in stretches of 32.5 s of 64 half-second tokens a channel: 344,064 tokens, all channels
of a frame one after another. Every token is compared with a sixteenth of those before it in summary, with 16 blocks of
64 that it chooses, and with the last 512. The mesh's `sequence` divides a night over 8 chips: summaries go everywhere,
keys of blocks go round. With the same 64 nights a step, fewer chips take several micro-batches.

Planned for v5p-512 (512 chips, 8 × 8 × 8), data 8 × fsdp 8 × sequence 8, 64 nights a step:

    memory a chip      56.8 GB of 102 GB: parameters 3.64 GB, optimiser 7.27 GB, temporaries 45.5 GB
    of which           13.7 GB are activations kept for the backward pass
    operations a step  1.72e18 of the model, 4.20e18 done
    compute            17.9 s
    memory             61.3 s   169 TB a chip
    fsdp                166 ms  parameters gathered (25.7 GB), gradients and activations added (24 GB)
    sequence            173 ms  keys go round (49.2 GB), summaries go everywhere (1.44 GB)
    a step at best     61.3 s   bound by memory; MFU ≤ 12.0 %

And for 64 × H200, fsdp 8 × sequence 8, 8 micro-batches of 8 nights a step:

    memory a chip      45.4 GB of 141 GB: parameters 3.64 GB, optimiser 7.27 GB, batch 1.12 GB, temporaries 33.4 GB
    operations a step  1.72e18 of the model, 4.21e18 done
    compute            66.5 s
    memory              438 s   2,100 TB a chip, as XLA fuses for GPUs
    network            5.96 s   fsdp: parameters gathered (195 GB), gradients added (97 GB); both axes: 5.38 GB
    sequence           1.67 s   keys go round (710 GB), summaries go everywhere (11.5 GB), inside a node
    a step at best      438 s   bound by memory; MFU ≤ 6.2 %
"""

from dataclasses import replace
from pathlib import Path

from zoo.data.recipes import RECIPES
from zoo.objectives.next_code import NextCode
from zoo.train.config import Config, Data, Mesh, Optimizer, Train


def config() -> Config:
    """The pretraining."""
    return Config(
        name="pod_sleep_codes",
        task=NextCode(tokenizer="tfm_base", model="next_codes_7b", stretch=6500, dtype="bfloat16", remat="full"),
        data=Data(
            prepared=Path("prepared/nights"),
            recipe=replace(RECIPES["labram"], sensor_names="nearest", scale="robust", clip=10.0),
            split="by_subject",
            window_seconds=29_120.0,
            batch_size=64,
            channels=6,
            cache_gigabytes=64.0,
            threads=8,
            prefetch=1,
        ),
        optimizer=Optimizer(learning_rate=3e-4, warmup_steps=1_000, b2=0.95, weight_decay=0.1, clip_norm=1.0),
        train=Train(steps=20_000, micro_batch=1, validate_every=500, validate_batches=1, checkpoint_every=250),
        mesh=Mesh(fsdp=8, sequence=8),
    )
