"""The benchmark of mixers: its tasks have the answers they claim, and memories differ as they should."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from benchmarks import mixers
from benchmarks.mixer_tasks import tasks
from zoo.layers.mixer import MIXERS, mixer_class


def drawn(name: str, other: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    task = tasks()[name]
    draw = task.draw if other is None else task.others[other]
    inputs, targets, weights = (np.asarray(x) for x in draw(jax.random.key(3), 16))
    assert inputs.shape[:2] == targets.shape == weights.shape == (16, task.length)
    return inputs, targets, weights


def test_recall_asks_for_the_last_value_of_every_key():
    inputs, targets, weights = drawn("recall")
    for row, target, weight in zip(inputs, targets, weights, strict=True):
        asked = np.flatnonzero(weight)
        said = row[: np.flatnonzero(row[: asked[0]])[-1] + 1]
        values = dict(zip(said[0::2].tolist(), said[1::2].tolist(), strict=True))
        assert len(values) < len(said) / 2  # some keys come again, with another value
        assert sorted(row[asked]) == sorted(values)
        assert [values[key] for key in row[asked].tolist()] == target[asked].tolist()
        assert not row[len(said) :][weight[len(said) :] == 0].any()


@pytest.mark.parametrize(("other", "ignored"), [(None, 0.8), ("sparse", 0.98), ("dense", 0.1)])
def test_flip_flop_reads_what_was_last_written(other, ignored):
    inputs, targets, weights = drawn("flip_flop", other)
    for row, target, weight in zip(inputs, targets, weights, strict=True):
        kinds, bits = row[0::2], row[1::2]
        assert (kinds[0], kinds[-1]) == (2, 3)
        memory = None
        for n, (kind, bit) in enumerate(zip(kinds, bits, strict=True)):
            memory = bit if kind == 2 else memory
            assert weight[2 * n] == (kind == 3)
            assert weight[2 * n + 1] == 0
            if kind == 3:
                assert target[2 * n] == bit == memory
    share = (inputs[:, 2:-2:2] == 4).mean()
    np.testing.assert_allclose(share, ignored, atol=0.05)


def test_copy_wants_the_words_in_order():
    inputs, targets, weights = drawn("copy")
    for row, target, weight in zip(inputs, targets, weights, strict=True):
        due = weight == 1
        assert (row[due] == 1).all()
        assert due[-int(due.sum()) :].all()
        assert target[due].tolist() == row[row > 1].tolist()


def test_adding_wants_the_sum_of_the_marked():
    inputs, targets, weights = drawn("adding")
    np.testing.assert_allclose((inputs[..., 0] * inputs[..., 1]).sum(1), targets[:, -1], atol=1e-6)
    assert (inputs[..., 1].sum(1) == 2).all()
    assert (weights.sum(1) == weights[:, -1]).all()


@pytest.mark.slow
def test_every_causal_mixer_takes_part_at_equal_size():
    causal = {name for name in MIXERS if True in mixer_class(name).ways}
    assert {name for pattern, _ in mixers.CONTENDERS.values() for name in pattern} == causal
    sizes = {}
    for name in mixers.CONTENDERS:
        model = mixers.model(name, tasks()["recall"])
        variables = jax.eval_shape(model.init, jax.random.key(0), *model.example())
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert max(sizes.values()) < 1.01 * min(sizes.values()), sizes


@pytest.mark.slow
def test_a_short_run_learns_writes_and_shows(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    command = ["--mixers", "softmax", "--tasks", "flip_flop", "--share", "0.5", "--json", str(figures)]
    assert mixers.main(command) == 0
    (row,) = json.loads(figures.read_text())
    assert row["accuracy"] > 0.8  # half the bits are right by chance
    assert row["wrong"].keys() == row["answers"].keys() == {"same", "sparse", "dense"}
    assert 0 < row["wrong"]["sparse"] < row["answers"]["sparse"]
    table = capsys.readouterr().out
    assert f"{row['wrong']['sparse']} of {row['answers']['sparse']:,}" in " ".join(table.split())
    assert "1.00" in table


@pytest.mark.slow
def test_the_delta_rule_recalls_what_adding_up_confuses():
    recall = tasks()["recall"]
    accuracy = {name: mixers.trained(name, recall, seed=0).accuracy for name in ("deltanet", "linear")}
    assert accuracy["deltanet"] > 0.97
    assert accuracy["linear"] < 0.9


def test_a_mixer_that_does_not_take_part_is_named(capsys):
    assert mixers.main(["--mixers", "lstm"]) == 2
    assert "--mixers: 'lstm' is not among softmax, gated" in capsys.readouterr().err
