"""The pod-sized configurations: what an example of each is, small ones planned here, and all for real chips."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from zoo.errors import ZooError
from zoo.plan.plan import example, plan
from zoo.plan.target import target
from zoo.registry import entry
from zoo.train.config import Config, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
QUICK = {"xla_backend_optimization_level": "0"}


def pod(name: str, *options: Sequence[str]) -> Config:
    return load_config(CONFIGS / f"pod_{name}.py", [each for option in options for each in option])


def test_half_an_hour_is_57600_tokens() -> None:
    config = pod("masked_codes")
    task = config.task.planned()
    channels, samples = example(config)["signal"].shape[1:]
    assert (channels, samples) == (32, 30 * 60 * 200)
    assert task.grid(channels, samples) == (32, 1800)
    assert entry(task.model).card.parameters == pytest.approx(1e9, rel=0.01)
    with pytest.raises(ZooError, match="labram_vqnsp_base is not trained"):
        _ = config.task.frozen


def test_a_night_is_344064_tokens_of_35_million_samples() -> None:
    config = pod("sleep_codes")
    task = config.task.planned()
    channels, samples = example(config)["signal"].shape[1:]
    assert channels * samples == pytest.approx(3.5e7, rel=0.01)
    assert samples / 200 > 8 * 3600
    assert task.grid(channels, samples) == (6, 57_344)
    assert entry(task.model).card.parameters == pytest.approx(7e9, rel=0.01)
    # Time divides into whole blocks on every device of the sequence.
    assert 6 * 57_344 % (config.mesh.sequence * 64) == 0


def test_the_contrast_has_three_modalities_of_a_batch_of_65536() -> None:
    config = pod("contrast")
    batch = example(config)
    shapes = {name: batch[name]["signal"].shape[1:] for name in config.task.modalities}
    assert shapes == {"eeg": (32, 600), "meg": (256, 360), "fmri": (400, 10)}
    assert config.data.batch_size == 2**16
    for name, modality in config.task.modalities.items():
        config.task.check_modality(
            name,
            config.data.paired[name].rate_hz,
            config.task.modality_encoder(name).TAKES[:1],
            ("CZ",),
        )
        assert entry(modality.model).card.parameters > 4e6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masked_codes", "sleep_codes", "contrast"])
def test_a_small_one_is_planned_on_this_machine(name: str) -> None:
    if name == "contrast":
        config = pod(name, ("--data.batch-size", "32"), ("--task.dtype", "float32"), ("--mesh.fsdp", "4"))
        tiny = {"eeg": "labram_tiny", "meg": "simple_conv_tiny", "fmri": "regions_tiny"}
        modalities = {
            each: dataclasses.replace(config.task.modalities[each], model=tiny[each], options={}) for each in tiny
        }
        paired = {each: dataclasses.replace(of, channels=4) for each, of in config.data.paired.items()}
        config = dataclasses.replace(
            config,
            task=dataclasses.replace(config.task, modalities=modalities),
            data=dataclasses.replace(config.data, paired=paired),
        )
    else:
        mixers = {"masked_codes": ("retention", "softmax"), "sleep_codes": ("native_sparse",)}[name]
        sparse: dict[str, Any] = {"heads": 2, "kv_heads": 1, "window": 16, "selected_blocks": 3}
        config = pod(name, ("--data.batch-size", "8"), ("--mesh.fsdp", "2"), ("--mesh.sequence", "2"))
        options = {"dim": 32, "mixers": mixers, "mlp_options": {"hidden": 32}}
        if name == "sleep_codes":
            options["mixer_options"] = {"native_sparse": sparse}
        task = dataclasses.replace(
            config.task, tokenizer="labram_vqnsp_tiny", options=options, stretch=400, dtype="float32"
        )
        data = dataclasses.replace(config.data, window_seconds=128.0, channels=2)
        config = dataclasses.replace(config, task=task, data=data)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, max_replicated=1.0))
    made = plan(config, dataclasses.replace(target("cpu:8"), compiler_options=QUICK))[0]
    assert made.devices == 8
    assert made.memory.temporaries > 0
    assert made.memory.activations > 0
    axes = {axis for wire in made.wires for axis in wire.axes}
    assert axes >= ({"fsdp", "data"} if name == "contrast" else {"fsdp", "sequence"})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masked_codes", "sleep_codes", "contrast"])
def test_it_fits_a_v5p_pod(name: str, tmp_path: Path) -> None:
    pytest.importorskip("libtpu", reason="the compiler of TPUs")
    program = "import sys; from zoo.cli import main; sys.exit(main(sys.argv[1:]))"
    out = tmp_path / "plan.json"
    arguments = ["plan", str(CONFIGS / f"pod_{name}.py"), "--target", "v5p:8x8x8", "--json", str(out)]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)
    written = json.loads(out.read_text())
    assert written["fits"]
    assert written["devices"] == 512
