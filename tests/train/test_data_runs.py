"""Runs on datasets at addresses and on mixtures, through the real command."""

from __future__ import annotations

import json
import re
import shutil
import signal

import numpy as np
import pytest
from small import CONFIG, STEPS, assert_same_curve, finish, go_on_elsewhere, metrics, start, wait_for_step, write_config

pytestmark = pytest.mark.slow  # whole runs, each with a compilation or two

MIX = CONFIG.replace(
    'data=Data(prepared=Path("prepared"),',
    'data=Data(mix={"faces": Mixed("prepared", 0.75), "again": Mixed("other", 0.25)},',
).replace("from zoo.objectives", "from zoo.data.mixture import Mixed\nfrom zoo.objectives", 1)


@pytest.mark.parametrize("shard_gigabytes", ["0", "1"])
def test_a_run_on_a_dataset_at_an_address_is_the_run_on_its_folder(folder, cache, straight, shard_gigabytes):
    address = f"file://{(folder / 'prepared').resolve()}"
    (folder / "prepared").unlink()
    options = ("--data.prepared", address, "--data.shard-gigabytes", shard_gigabytes)
    out, err = finish(start(folder, cache, *options))
    assert err == ""
    assert f"{address}: " in out
    assert_same_curve(metrics(folder), metrics(straight))
    copies = list((cache / "shards").glob("*.arrayrecord"))
    assert bool(copies) == (shard_gigabytes == "1")


def test_an_address_that_is_not_there_ends_the_run_in_one_line(folder, cache):
    _, err = finish(start(folder, cache, "--data.prepared", f"file://{folder}/absent"), 2)
    assert err == f"zoo: file://{folder}/absent/dataset.json: no such file or folder\n"


def test_a_run_on_a_mixture_goes_on_where_it_stopped(tmp_path, prepared, cache):
    write_config(tmp_path, prepared, MIX)
    shutil.copytree(prepared, tmp_path / "other")
    out, err = finish(start(tmp_path, cache))
    assert err == ""
    assert "faces 0.75 of the examples" in out
    whole = metrics(tmp_path)
    assert [line["step"] for line in whole] == list(range(1, STEPS + 1))
    assert np.isfinite([line["loss"] for line in whole]).all()
    config = json.loads((tmp_path / "runs/small/config.json").read_text())
    assert config["data.mix.again.weight"] == 0.25
    shutil.move(tmp_path / "runs", tmp_path / "first")
    process = start(tmp_path, cache)
    wait_for_step(tmp_path, 9, process)
    process.kill()
    finish(process, -signal.SIGKILL)
    out, _ = finish(start(tmp_path, cache))
    assert "resuming from step" in out
    assert metrics(tmp_path) == whole


PAIRED = """\
from zoo.data.paired import Paired
from zoo.objectives.contrast_modalities import ContrastModalities, Modality
from zoo.objectives.speech import SpeechDecoding
from zoo.train.config import Config, Data, Devices, Optimizer, Train


def config():
    return Config(
        name="small",
        task=TASK,
        data=Data(
            paired={"ONE": Paired("prepared", channels=5), "OTHER": Paired("prepared", 1.0, 0.5, channels=6)},
            pair_by="time",
            batch_size=8,
        ),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=2),
        train=Train(steps=12, checkpoint_every=4, validate_every=6, validate_batches=1),
        devices=Devices(platform="cpu"),
    )
"""
CONTRAST = {
    "TASK": "ContrastModalities({name: Modality('labram_tiny', {'depth': 1}) for name in ('front', 'back')})",
    "ONE": "front",
    "OTHER": "back",
}
SPEECH = {
    "TASK": "SpeechDecoding('simple_conv_tiny', {'rate': 200.0, 'outputs': 6})",
    "ONE": "signal",
    "OTHER": "target",
}


@pytest.mark.parametrize("words", [CONTRAST, SPEECH], ids=["modalities", "signal and target"])
def test_a_run_on_paired_data_goes_on_where_it_stopped(tmp_path, prepared, cache, words):
    text = PAIRED
    for word, meant in words.items():
        text = re.sub(rf"\b{word}\b", meant, text)
    write_config(tmp_path, prepared, text)
    out, err = finish(start(tmp_path, cache))
    assert err == ""
    assert re.search(rf"\d+ of \d+ stretches of time are in all of {words['ONE']}, {words['OTHER']}", out)
    whole = metrics(tmp_path)
    assert [line["step"] for line in whole] == list(range(1, 13))
    assert np.isfinite([line["loss"] for line in whole]).all()
    assert "validation_loss" in whole[-1]
    go_on_elsewhere(tmp_path, tmp_path / "again", 8)
    write_config(tmp_path / "again", prepared, text)
    out, _ = finish(start(tmp_path / "again", cache))
    assert "resuming from step 8" in out
    assert metrics(tmp_path / "again") == whole
