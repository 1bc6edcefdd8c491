"""Whole runs over codes, through the real commands: tokenize, train on the codes, load, generate."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from small import finish, start, write_config

import zoo
from zoo.data.store import Dataset
from zoo.data.windows import event_windows
from zoo.errors import ZooError
from zoo.generate import GENERATED, REBUILT, SHUFFLED, Options, generate
from zoo.types import Sensors

pytestmark = pytest.mark.slow

CONFIG = """\
from pathlib import Path

from zoo.objectives.{module} import {task}
from zoo.train.config import Config, Data, Devices, Optimizer, Train


def config():
    return Config(
        name="{name}",
        task={task}(tokenizer="codes", options={options}),
        data=Data(prepared=Path("prepared"), batch_size=16, channels=4, window_seconds=0.25),
        optimizer=Optimizer(learning_rate=5e-3, warmup_steps=5),
        train=Train(steps=150, checkpoint_every=150, validate_every=50, validate_batches=1),
        devices=Devices(platform="cpu"),
    )
"""
NEXT = {"module": "next_code", "task": "NextCode", "name": "next"}
MASKED = {"module": "masked_codes", "task": "MaskedCodes", "name": "masked"}


@pytest.fixture(scope="module")
def runs(prepared: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with codes of 24 levels, and a run of each task on them."""
    folder = tmp_path_factory.mktemp("codes")
    write_config(folder, prepared)
    options = ("--options", "vocabulary", "24", "--window-seconds", "0.25")
    finish(start(folder, cache, *options, command=("tokenize", "prepared", "--tokenizer", "quantile", "codes")))
    small = {"dim": 32, "mixers": ("softmax",)}
    for about, more in ((NEXT, {"mixer_options": {}}), (MASKED, {})):
        (folder / f"{about['name']}.py").write_text(CONFIG.format(**about, options={**small, **more}))
        finish(start(folder, cache, command=("train", f"{about['name']}.py")))
    return folder


def losses(runs: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (runs / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def test_the_next_code_is_better_known_than_by_how_often_it_occurs(runs):
    figures = losses(runs, "next")
    assert figures[-1]["loss"] < 0.8 * figures[-1]["entropy"] < figures[0]["loss"]


def test_hidden_codes_are_known_at_least_by_how_often_they_occur(runs):
    figures = losses(runs, "masked")
    assert figures[0]["of_uniform"] == pytest.approx(1, abs=0.05)
    assert figures[-1]["of_uniform"] < figures[0]["of_uniform"] - 0.02


@pytest.mark.parametrize("name", ["next", "masked"])
def test_a_run_gives_an_encoder_of_signals(name, runs, monkeypatch):
    monkeypatch.chdir(runs)
    module, variables = zoo.load(f"runs/{name}")
    dataset = Dataset.open("prepared")
    windows = event_windows(dataset, {"face": ("face-upright", "face-inverted")}, 0.0, 0.25)
    of_recording = {field: value[windows.recording[:4]] for field, value in windows.sensors.items()}
    encoded = jax.jit(module.apply)(variables, windows.signal[:4], Sensors(**of_recording))
    assert encoded.tokens.shape == (4, 16 * 50, 32)
    assert np.isfinite(encoded.pooled).all()


def test_the_command_generates_signals_and_their_figures(runs, cache):
    told, _ = finish(start(runs, cache, "--frames", "120", "--examples", "4", command=("generate", "runs/next", "new")))
    assert {each.name for each in (runs / "new").iterdir()} == {"signals.npz", "spectra.png", "generated.json"}
    with np.load(runs / "new/signals.npz") as made:
        assert made["generated"].shape == (4, 16, 120)
        assert made["codes"].shape == (4, 16 * 120, 1)
        assert made["real"].shape == (4, 16, 50)
        assert not made["generated"][~made["valid"]].any()
        assert made["rate_hz"] == 200
        assert len(made["names"]) == 16
    figures = json.loads((runs / "new/generated.json").read_text())["figures"]
    assert set(figures) == {GENERATED, SHUFFLED, REBUILT}
    assert figures[REBUILT]["from_rebuilt_db"] == 0
    assert figures[GENERATED]["from_rebuilt_db"] < figures[SHUFFLED]["from_rebuilt_db"]
    assert f"{GENERATED} " in told


def test_the_same_seed_generates_the_same(runs, monkeypatch, tmp_path):
    monkeypatch.chdir(runs)
    options = Options(frames=20, examples=1, prompt_frames=10, top_k=3, temperature=0.5)
    made = []
    for name in ("a", "b"):
        generate(Path("runs/next"), tmp_path / name, options)
        made.append(np.load(tmp_path / name / "signals.npz")["codes"])
    np.testing.assert_array_equal(*made)
    for options, says in (
        (Options(prompt_frames=50), "got 50, wanted less than the 50 of a window"),
        (Options(examples=0), "examples: wanted 1 or more"),
    ):
        with pytest.raises(ZooError, match=says):
            generate(Path("runs/next"), tmp_path / "c", options)
    with pytest.raises(ZooError, match="a run of MaskedCodes, wanted one of next-code prediction"):
        generate(Path("runs/masked"), tmp_path / "c")
