"""What a run leaves behind: its encoder, wherever the folder is, with the weights it was evaluated with."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest
from small import STEPS, finish, start

import zoo
import zoo.run
from zoo.batches import open_dataset
from zoo.data.loader import Loader
from zoo.data.store import Dataset
from zoo.data.windows import event_windows
from zoo.errors import ZooError
from zoo.run import embed, stored_config
from zoo.train.checkpoint import Checkpoints
from zoo.train.mesh import BatchPlacer, make_mesh
from zoo.train.state import Program
from zoo.types import Sensors


@pytest.fixture(scope="module")
def moved(straight, prepared, cache, tmp_path_factory):
    """The folder of a finished run in another place, without the file it began with, evaluated again there."""
    folder = tmp_path_factory.mktemp("moved")
    (folder / "prepared").symlink_to(prepared)
    shutil.copytree(straight / "runs/small", folder / "elsewhere", ignore=shutil.ignore_patterns("plots"))
    finish(start(folder, cache, command=("evaluate", "elsewhere")))
    return folder / "elsewhere"


@pytest.fixture(scope="module")
def windows(prepared):
    """Faces and houses: signal [N, C, 200]."""
    classes = {"face": ("face-upright", "face-inverted"), "house": ("house-upright", "house-inverted")}
    return event_windows(Dataset.open(prepared), classes, -0.1, 0.9)


def test_a_moved_run_is_evaluated_where_it_is(moved):
    assert {each.name for each in (moved / "plots").iterdir()} == {"training.png", "reconstruction.png"}
    assert not (moved.parent / "runs").exists()


@pytest.mark.slow
def test_it_gives_the_pooled_features_of_the_run_with_averaged_weights(moved, windows, monkeypatch):
    monkeypatch.chdir(moved.parent)
    module, variables = zoo.load(moved)
    of_recording = {name: value[windows.recording] for name, value in windows.sensors.items()}
    found = module.apply(variables, windows.signal, Sensors(**of_recording)).pooled

    config = stored_config(moved)
    mesh = make_mesh(config.mesh)
    place = BatchPlacer(mesh, config.rules, config.data.batch_size, 1)
    program = Program(config, config.task, mesh, place.abstract(first_batch(config, place)))
    state = Checkpoints(moved / "checkpoints").restore(STEPS, program.abstract())
    wanted = embed(program, program.variables(state), windows, place)
    assert found.shape == (len(windows.label), 100)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    last = embed(program, {"params": state.params}, windows, place)
    assert np.abs(last - wanted).max() > 1e-3, "the average is not the last state"


def first_batch(config, place):
    dataset = open_dataset(config)
    options = {"window": 200, "batch_size": 16, "seed": 0, "mask_patch": 200, "mask_ratio": 0.5, "rows": place.rows}
    return next(Loader(dataset, dataset.splits["train"], **options).at(0))


def test_a_step_can_be_chosen(moved):
    newest, earlier = (zoo.run.load(moved, step)[1] for step in (STEPS, 16))
    moved_on = jax.tree.map(lambda new, old: bool((new != old).any()), newest, earlier)
    assert any(jax.tree.leaves(moved_on))


@pytest.mark.parametrize(
    ("path", "step", "cause"),
    [
        ("elsewhere", 3, r"no finished checkpoint of step 3; there are \[16, 20\]"),
        (".", None, r"not a run's folder"),
    ],
)
def test_what_is_not_there(path, step, cause, moved):
    with pytest.raises(ZooError, match=cause):
        zoo.run.load(moved.parent / path, step)
