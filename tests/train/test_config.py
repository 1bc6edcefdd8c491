"""Configurations from files and the command line."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from zoo.errors import ZooError
from zoo.terminal import option_names
from zoo.train.config import load_config

TEXT = """
    from dataclasses import dataclass, field
    from typing import Mapping

    from zoo.data.recipes import RECIPES
    from zoo.train.config import Config, Data, Probe, Train


    @dataclass(frozen=True)
    class Task:
        depth: int = 2
        options: Mapping[str, float] = field(default_factory=lambda: {"rate": 0.5, "ratio_of_all": 1.0})
        switches: Mapping[str, bool] = field(default_factory=lambda: {"per_patch": True})


    def config():
        return Config(
            task=Task(),
            data=Data(source="faces_eeg", recipe=RECIPES["labram"], fractions={"train": 0.9, "validation": 0.1}),
            train=Train(steps=7, tensorboard=True),
            probe=Probe(classes={"face": ("upright", "inverted")}),
        )
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "run.py").write_text(textwrap.dedent(TEXT))
    return tmp_path / "run.py"


def test_without_overrides_it_is_what_the_file_says(file):
    config = load_config(file)
    assert (config.train.steps, config.task.depth, config.data.recipe.rate_hz) == (7, 2, 200.0)
    assert config.folder == Path("runs/run")


@pytest.mark.parametrize(
    ("override", "value", "wanted"),
    [
        (["--train.steps", "9"], lambda config: config.train.steps, 9),
        (["--train.steps=9"], lambda config: config.train.steps, 9),
        (["--train.keep_last", "9"], lambda config: config.train.keep_last, 9),
        (["--task.depth", "3"], lambda config: config.task.depth, 3),
        (["--task.options.rate", "0.7"], lambda config: dict(config.task.options), {"rate": 0.7, "ratio_of_all": 1.0}),
        (["--task.options.ratio_of_all", "2"], lambda config: config.task.options["ratio_of_all"], 2.0),
        (["--task.switches.no-per-patch"], lambda config: dict(config.task.switches), {"per_patch": False}),
        (["--train.no-tensorboard"], lambda config: config.train.tensorboard, False),
        (["--train.profile"], lambda config: config.train.profile, True),
        (["--mesh.fsdp", "-1"], lambda config: config.mesh.fsdp, -1),
        (["--optimizer.freeze", "a", "b"], lambda config: config.optimizer.freeze, ("a", "b")),
        (["--rules.batch", "data"], lambda config: config.rules.batch, ("data",)),
        (["--data.recipe.rate-hz", "250"], lambda config: config.data.recipe.rate_hz, 250.0),
        (["--data.fractions.train", "0.8"], lambda config: config.data.fractions["train"], 0.8),
        (["--probe.classes.face", "upright"], lambda config: config.probe.classes, {"face": ("upright",)}),
        (["--runs", "elsewhere", "--name", "x"], lambda config: config.folder, Path("elsewhere/x")),
    ],
)
def test_an_override_changes_its_field_alone(override, value, wanted, file):
    changed, before = load_config(file, override), load_config(file)
    assert value(changed) == wanted != value(before)
    assert changed.seed == before.seed
    assert changed.data.source == "faces_eeg"


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("--train.step", "--train.steps"),
        ("--trian.steps", "--train.steps"),
        ("--mesh.fdsp", "--mesh.fsdp"),
        ("--task.options.ratio-of-al", "--task.options.ratio-of-all"),
        ("--train.no-tensorbord", "--train.no-tensorboard"),
        ("--batch-size", "--data.batch-size"),
    ],
)
def test_a_wrong_name_gets_the_nearest_right_one(override, near, file):
    with pytest.raises(ZooError, match=rf"zoo train: unknown option {override}; the nearest is {near}$"):
        load_config(file, [override, "1"])


@pytest.mark.parametrize(
    "override",
    [["--train.steps", "1.5"], ["--train.steps"], ["--data.split", "by_luck"], ["7"]],
)
def test_a_wrong_value_is_told_in_one_line_with_its_option(override, file):
    with pytest.raises(ZooError) as raised:
        load_config(file, override)
    assert override[0] in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_option_is_listed_once_by_help(file, capsys):
    with pytest.raises(SystemExit) as end:
        load_config(file, ["--help"])
    assert not end.value.code
    listed = capsys.readouterr().out
    names = list(option_names(load_config(file)))
    assert len(names) == len(set(names)) > 60
    # What need not be there is named in the file: a window, a mixture, modalities.
    assert [name for name in names if f"--{name}" not in listed] == ["data.mix", "data.paired", "data.recipe.window"]
