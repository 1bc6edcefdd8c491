"""A tokenizer trained by the real command: stopped, resumed, on eight devices, loaded, and used by `zoo tokenize`."""

from __future__ import annotations

import signal

import jax
import numpy as np
import pytest
from small import assert_same_curve, finish, metrics, start, wait_for_step, write_config

import zoo
from zoo.data.codes import CodeDataset, sensors_of
from zoo.data.store import Dataset
from zoo.train.checkpoint import Checkpoints

STEPS = 8
CONFIG = f"""\
from pathlib import Path

from zoo.objectives.train_tokenizer import TrainTokenizer
from zoo.train.config import Config, Data, Devices, Optimizer, Train

SMALL = {{"depth": 1, "decoder_depth": 1, "codes": 32, "code_dim": 8}}


def config():
    return Config(
        name="small",
        task=TrainTokenizer(options=SMALL),
        data=Data(prepared=Path("prepared"), batch_size=8, channels=8),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=2),
        train=Train(steps={STEPS}, checkpoint_every=2, validate_every=4, validate_batches=1),
        devices=Devices(platform="cpu"),
    )
"""


@pytest.fixture
def folder(prepared, tmp_path):
    write_config(tmp_path, prepared, CONFIG)
    return tmp_path


@pytest.fixture(scope="module")
def straight(prepared, cache, tmp_path_factory):
    """The working folder of a run from its first step to its last, and what it said."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_config(folder, prepared, CONFIG)
    return folder, finish(start(folder, cache))[0]


def state(folder):
    return Checkpoints(folder / "runs/small/checkpoints").load(STEPS)


def test_a_run_tells_of_its_codes(straight):
    folder, said = straight
    assert "perplexity" in said
    assert "live" in said
    for line in metrics(folder):
        assert 1 <= line["perplexity"] <= 32
        assert 1 / 32 <= line["live_share"] <= 1
    assert {each.name for each in (folder / "runs/small/plots").iterdir()} == {"training.png", "reconstruction.png"}


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit_with_its_codebook(folder, cache, straight):
    process = start(folder, cache)
    wait_for_step(folder, 5, process)
    process.kill()
    finish(process, -signal.SIGKILL)
    out, _ = finish(start(folder, cache))
    assert "resuming from step" in out
    assert metrics(folder) == metrics(straight[0])
    found, wanted = state(folder), state(straight[0])
    assert "codebooks" in wanted["collections"]
    for name in ("params", "collections"):
        jax.tree.map(np.testing.assert_array_equal, found[name], wanted[name])


@pytest.mark.slow
def test_eight_devices_give_the_curve_of_one(folder, cache, straight):
    finish(start(folder, cache, "--devices.cpu-devices", "8", "--mesh.data", "4", "--mesh.fsdp", "2"))
    assert_same_curve(metrics(folder), metrics(straight[0]))
    np.testing.assert_allclose(
        *(each["collections"]["codebooks"]["quantizer"]["embedding"] for each in map(state, (folder, straight[0]))),
        atol=1e-4,
    )


@pytest.mark.slow
def test_the_run_tokenizes_a_dataset(straight, prepared, cache):
    folder, _ = straight
    out, _ = finish(start(folder, cache, command=("tokenize", "prepared", "--tokenizer", "runs/small", "codes")))
    assert "windows of 1 s" in out
    codes, dataset = CodeDataset.open(folder / "codes"), Dataset.open(prepared)
    assert (codes.run, codes.step, codes.code_sizes, codes.hop) == ("runs/small", STEPS, (32,), 200.0)
    tokenizer, variables = zoo.load(folder / "runs/small")
    recording, first = int(codes.recording[3]), int(codes.start[3])
    window = dataset.read(recording, first, first + 200)[None]
    wanted = tokenizer.apply(variables, window, sensors_of(dataset, recording, 1), method="encode")
    np.testing.assert_array_equal(codes[3], wanted[0])


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--task.tokenizer", "labram_vqnsp_tinny"], "the nearest name is 'labram_vqnsp_tiny'"),
        (["--task.weights", "phaze", "0"], "task.weights: labram_vqnsp_tiny has no loss 'phaze'; the nearest is"),
        (["--task.tokenizer", "mu_law", "--task.options.codes", "3"], "mu_law has no option"),
        (["--data.window-seconds", "1.5"], "got a window of 300 samples, wanted 1 to 16 patches of 200"),
        (["--train.ema", "0.9"], "train.ema: TrainTokenizer has statistics that follow the last parameters"),
    ],
)
def test_runs_that_cannot_be(options, cause, folder, cache, monkeypatch, capfd):
    from zoo.cli import main

    monkeypatch.chdir(folder)
    monkeypatch.setenv("BRAIN_ZOO_CACHE", str(cache))
    assert main(["train", "small.py", *options]) == 2
    assert cause in capfd.readouterr().err
    assert not (folder / "runs").exists()
