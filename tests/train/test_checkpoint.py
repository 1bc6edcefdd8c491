"""Checkpoints: which are kept, which count, and what is said of damaged ones."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from toy import run, toy_program

from zoo.errors import ZooError
from zoo.train.checkpoint import FILES, Checkpoints, Damaged, set_damaged_aside


@pytest.fixture(scope="module")
def program():
    return toy_program(train={"ema": 0.9})


@pytest.fixture(scope="module")
def state(program):
    return run(program, 2)[0]


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """Steps 1 and 2; not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder, keep_last=2)
    for step in (1, 2):
        checkpoints.save(step, state, None)
    checkpoints.close()
    return folder


def assert_equal(found, wanted) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(wanted))


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_what_is_restored_is_what_was_saved_on_any_mesh(sizes, saved, state):
    abstract = toy_program(train={"ema": 0.9}, **sizes).abstract()
    found = Checkpoints(saved).restore(2, abstract)
    assert_equal(found, state)
    assert all(jax.tree.leaves(jax.tree.map(lambda leaf, like: leaf.sharding == like.sharding, found, abstract)))


def test_loading_without_a_program_leaves_out_the_moments(saved, state):
    found = Checkpoints(saved).load(2)
    assert_equal(found["params"], state.params)
    assert_equal(found["ema"], state.ema)
    assert not [leaf for leaf in jax.tree.leaves(found["optimizer"]) if isinstance(leaf, jax.Array)]


def test_the_newest_and_the_best_are_kept(state, tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", keep_last=2, keep_best=1)
    for step, loss in enumerate((5.0, 1.0, 3.0, None, 4.0, 6.0, None), start=1):
        checkpoints.save(step, state, loss)
    checkpoints.close()
    kept = Checkpoints(tmp_path / "run")
    assert (kept.steps, kept.latest) == ([2, 6, 7], 7)


def test_an_unfinished_checkpoint_does_not_count_and_only_a_writer_removes_it(saved, state, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    unfinished = folder / "3.orbax-checkpoint-tmp"
    shutil.copytree(folder / "2", unfinished, ignore=shutil.ignore_patterns("commit_success.txt"))
    assert Checkpoints(folder).steps == [1, 2]
    assert unfinished.exists()
    writer = Checkpoints(folder, keep_last=2)
    assert writer.steps == [1, 2]
    writer.save(4, state, None)
    writer.close()
    assert not unfinished.exists()
    assert Checkpoints(folder).steps == [2, 4]


def test_every_missing_or_shortened_file_is_named(saved, program, tmp_path):
    files = [each.relative_to(saved) for each in (saved / "2").rglob("*") if each.is_file()]
    assert len(files) > 8
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        if file.name == FILES:
            (folder / file).unlink()
            Checkpoints(folder).restore(2, program.abstract())
            continue
        for damage, cause in ((shorten, r"has \d+ bytes, wanted \d+"), (Path.unlink, "is missing")):
            damage(folder / file)
            with pytest.raises(ZooError) as raised:
                Checkpoints(folder).restore(2, program.abstract())
            wanted = f"{folder / file}: this file of the checkpoint {cause}; remove its folder to go on from step 1"
            assert re.fullmatch(wanted, str(raised.value))


def test_damaged_ones_are_set_aside_up_to_the_first_sound_one(saved, program, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    assert set_damaged_aside(folder) == []
    largest = max((folder / "2").rglob("*"), key=lambda each: each.stat().st_size if each.is_file() else 0)
    shorten(largest)
    (said,) = set_damaged_aside(folder)
    assert re.fullmatch(
        rf"{largest}: this file of the checkpoint has \d+ bytes, wanted \d+; "
        rf"this checkpoint is set aside as {folder / '2.damaged'}",
        said,
    )
    left = Checkpoints(folder, keep_last=2)
    assert (left.steps, left.latest) == ([1], 1)
    left.restore(1, program.abstract())
    shutil.copytree(folder / "2.damaged", folder / "2")
    assert "set aside as" in set_damaged_aside(folder)[0]
    assert {each.name for each in folder.iterdir()} == {"1", "2.damaged", "2.damaged1"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_without_its_list_a_damaged_checkpoint_is_known_by_reading_it(saved, program, state, tmp_path):
    files = [each.relative_to(saved) for each in (saved / "2").rglob("*") if each.is_file() and each.name != FILES]
    noticed = []
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        (folder / "2" / FILES).unlink()
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) // 2])
        try:
            assert_equal(Checkpoints(folder).restore(2, program.abstract()), state)
        except Damaged:
            noticed.append(file)
    # What is not noticed was not needed: the state is whole.
    assert len(noticed) >= len(files) // 2


def shorten(file):
    file.write_bytes(file.read_bytes()[:-1])


# TensorStore answers some of the reads after Orbax has given up on all of them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_flipped_bytes_are_noticed(saved, program, state, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    arrays = max((tmp_path / "run/2").rglob("*"), key=lambda each: each.stat().st_size if each.is_file() else 0)
    content = bytearray(arrays.read_bytes())
    content[len(content) // 2] ^= 0xFF
    arrays.write_bytes(content)
    with pytest.raises(ZooError, match=r"run/2: cannot read this checkpoint"):
        Checkpoints(tmp_path / "run").restore(2, program.abstract())


def test_another_models_checkpoint_is_named_as_such(saved):
    other = toy_program(train={"ema": 0.9}, optimizer={"name": "lion"})
    with pytest.raises(ZooError, match=r"2: written by another model or optimiser; optimizer/.*run nothing"):
        Checkpoints(saved).restore(2, other.abstract())


def test_a_step_is_saved_once(saved, state, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    before = (tmp_path / "run/2/_CHECKPOINT_METADATA").read_bytes()
    checkpoints = Checkpoints(tmp_path / "run", keep_last=2)
    checkpoints.save(2, state, None)
    checkpoints.close()
    assert (tmp_path / "run/2/_CHECKPOINT_METADATA").read_bytes() == before
