"""The table, its JSON and the confusion figure."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.image import imread

from zoo.evaluate.plots import confusion
from zoo.evaluate.probe import ProbeResult, Trials, linear_probe
from zoo.evaluate.report import plain_text, print_table, write_json


def probe(people: int) -> ProbeResult:
    rng = np.random.default_rng(0)
    label = np.arange(60 * people) % 3
    subject = np.array([f"sub-{i + 1}" for i in range(people)]).repeat(60)
    features = np.eye(3)[label] + 0.7 * rng.normal(size=(60 * people, 3))
    return linear_probe(features, Trials(label, ("checker", "face", "house"), subject, np.arange(len(label)) * 99, 50))


@pytest.fixture(scope="module")
def two_people() -> ProbeResult:
    return probe(2)


def test_table_holds_chance_and_every_row_within_and_across(two_people):
    text = plain_text({"shrinkage LDA": two_people, "pretrained probe": two_people})
    within, across = text.split("across people")
    mean = two_people.across.scores["mean"]
    low, high = (f"{end:.3f}".lstrip("0") for end in mean.balanced_accuracy[1:])
    for part in (within, across):
        assert part.count("shrinkage LDA") == part.count("pretrained probe") == part.count("chance") == 1
    assert "sub-1" in within
    assert f"[{low}, {high}]" in across
    assert f"{mean.kappa.value:.3f}".lstrip("0") in across
    chance = next(line for line in within.splitlines() if "chance" in line)
    assert chance.split() == ["chance", ".333", ".333", ".333", ".000", ".333", ".500"]


def test_table_is_plain_where_there_is_no_terminal(two_people, capsys):
    print_table({"probe": two_people})
    printed = capsys.readouterr().out
    assert printed == plain_text({"probe": two_people})
    assert "\x1b" not in printed


def test_table_of_one_person_has_no_across_part():
    assert "across" not in plain_text({"probe": probe(1)})


def test_table_of_many_people_gives_their_range():
    result = probe(5)
    each = [result.within.scores[p].balanced_accuracy.value for p in result.trials.people]
    text = plain_text({"probe": result})
    assert "5 people" in text
    assert f"{min(each):.3f}–{max(each):.3f}".replace("0.", ".") in text


def test_json_is_written_whole(two_people, tmp_path):
    write_json({"probe": two_people}, tmp_path / "evaluation.json")
    read = json.loads((tmp_path / "evaluation.json").read_text())
    value = read["probe"]["across"]["sub-2"]["auroc"]["value"]
    assert value == two_people.across.scores["sub-2"].auroc.value
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


def test_confusion_figure_shows_the_matrix(tmp_path):
    pictures = []
    for name, matrix in (("right", np.diag([9, 9, 9])), ("wrong", np.full((3, 3), 3))):
        confusion(matrix, ("checker", "face", "house"), tmp_path / f"{name}.png", title="probe")
        pictures.append(imread(tmp_path / f"{name}.png"))
    assert pictures[0].shape[0] > 300
    assert pictures[0].std() > 0.05
    assert pictures[0].shape != pictures[1].shape or not np.array_equal(*pictures)
