"""Runs that cannot be: one line that names the thing, exit code 2, and nothing written."""

from __future__ import annotations

import importlib.util
import re
import shutil

import pytest
from small import CONFIG, finish, go_on_elsewhere, metrics, start

from zoo.cli import main


@pytest.fixture
def refused(folder, cache, capfd, monkeypatch):
    """Runs a command in the working folder, in this process; returns the one line it says on stderr."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("BRAIN_ZOO_CACHE", str(cache))

    def run(*options: str, command=("train", "small.py")) -> str:
        capfd.readouterr()
        assert main([*command, *options]) == 2
        said = capfd.readouterr().err
        assert re.fullmatch(r"zoo: [^\n]+\n", said), said
        return said

    return run


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--train.stpes", "3"], "unknown option --train.stpes; the nearest is --train.steps"),
        (["--task.optoins.depth", "3"], "unknown option --task.optoins.depth; the nearest is --task.options.depth"),
        (["--train.steps", "many"], "--train.steps"),
        (["--optimizer.name", "adam"], "--optimizer.name"),
        (["--train.steps"], "--train.steps"),
        (["extra"], "extra"),
        (["--mesh.fsdp", "3"], "mesh data -1 × fsdp 3 needs a multiple of 3 devices; there are 8"),
        (["--mesh.data", "4"], "mesh data 4 needs 4 devices; there are 8"),
        (["--data.batch-size", "12"], "data.batch_size 12 does not divide into 8 device groups × 1 micro-batches"),
        (["--train.accumulate", "4"], "does not divide into 8 device groups × 4 micro-batches"),
        (["--mesh.tensor", "8"], "the mesh does not fit the model: encoder/blocks/attention/key/kernel"),
        (["--mesh.fsdp", "2", "--mesh.max-replicated", "0"], "of parameter bytes would be whole on every device"),
        (["--devices.platform", "tpu"], "devices.platform is tpu but JAX found only cpu"),
        (["--task.model", "labram_bose"], "no model is called 'labram_bose'; the nearest name is 'labram_base'"),
        (["--data.prepared", "absent"], "absent: no such folder; wanted a dataset made by zoo prepare"),
        (["--data.source", "absent", "--data.prepared", "new"], "absent: no such file or folder"),
        (["--data.window-seconds", "9"], "none of the 54 records has the 1800 samples of a window"),
        (["--data.window-seconds", "1.5"], "mask_patch 200 and mask_ratio 0.5: wanted a divisor of the window of 300"),
        (["--data.mask-patch", "0"], "masked-patch regression needs masked batches"),
        (["--optimizer.warmup-steps", "20"], "optimizer.warmup_steps 20 leaves nothing of 20 steps"),
        (["--optimizer.freeze", "blok"], "optimizer.freeze: no parameter matches 'blok'"),
        (["--train.tensorboard"], "train.tensorboard needs the package tensorboardX: pip install"),
        (["--train.wandb"], "train.wandb needs the package wandb: pip install 'brain-zoo[wandb]'"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(options, cause, refused, folder, monkeypatch):
    # Whether or not the optional packages are installed here.
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    assert cause in refused(*options)
    assert {each.name for each in folder.iterdir()} == {"small.py", "prepared"}


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "small.py: defines no function config() -> Config"),
        ("def config():\n    return 3\n", "small.py: config() gives int, wanted a Config"),
        ("def config(:\n", "small.py: line 1: invalid syntax"),
    ],
)
def test_configuration_files_that_cannot_be(text, cause, refused, folder):
    (folder / "small.py").write_text(text)
    assert cause in refused()


def test_a_recording_with_electrodes_the_model_lacks(refused, folder, recordings, cache):
    shutil.copytree(folder / "prepared", folder / "copy")
    file = folder / "copy/dataset.json"
    file.write_text(re.sub(r'"canonical": \[\s+"\w+"', '"canonical": ["AFF5H"', file.read_text()))
    assert "LaBraM has no electrode 'AFF5H'" in refused("--data.prepared", "copy")


def test_a_shard_with_flipped_bytes(refused, folder):
    shutil.copytree(folder / "prepared", folder / "copy")
    shard = sorted((folder / "copy/shards").iterdir())[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 3 :: 5000] = b"\xff" * len(content[len(content) // 3 :: 5000])
    shard.write_bytes(content)
    assert re.search(rf"zoo: copy/shards/{shard.name}: record \d+ ", refused("--data.prepared", "copy"))


def test_a_checkpoint_with_a_missing_file(refused, straight, folder, monkeypatch):
    go_on_elsewhere(straight, folder, 20)
    step = folder / "runs/small/checkpoints/20"
    arrays = max((each for each in step.rglob("*") if each.is_file()), key=lambda each: each.stat().st_size)
    arrays.unlink()
    before = metrics(folder)
    cause = (
        f"{arrays.relative_to(folder)}: this file of the checkpoint is missing; remove its folder to go on from step 16"
    )
    assert cause in refused()
    assert cause in refused(command=("evaluate", "runs/small"))
    assert metrics(folder) == before


@pytest.mark.slow
def test_another_models_checkpoint(refused, straight, folder):
    go_on_elsewhere(straight, folder, 20)
    said = refused("--task.options.depth", "3")
    assert "runs/small/checkpoints/20: written by another model or optimiser; " in said
    assert "checkpoint (2, 100, 4, 25), run (3, 100, 4, 25)" in said
    assert '"task.options": {\n  "depth": 2' in (folder / "runs/small/config.json").read_text()


def test_a_run_that_is_there_and_not_to_be_resumed(refused, straight, folder):
    go_on_elsewhere(straight, folder, 20)
    assert "runs/small already holds a run at step 20; take another --name, or remove it" in refused("--no-resume")


@pytest.mark.slow
def test_a_run_without_a_checkpoint(refused, straight, folder):
    go_on_elsewhere(straight, folder, 0)
    assert "runs/small: the run has no finished checkpoint" in refused(command=("evaluate", "runs/small"))


@pytest.mark.slow
def test_a_loss_that_is_not_finite(folder, cache):
    text = CONFIG.replace("learning_rate=2e-3", "learning_rate=1e30, clip_norm=0.0")
    (folder / "small.py").write_text(text)
    _, err = finish(start(folder, cache), 2)
    told = re.fullmatch(r"zoo: the (loss|gradient_norm) of step (\d+) is (nan|inf); its records were \[[\d, ]+\]; "
                        r"last good checkpoint: (none|step \d+)\n", err)  # fmt: skip
    assert told
    assert len(metrics(folder)) == int(told[2]) - 1
