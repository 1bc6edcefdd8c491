"""The benchmark of probes: bad input, what it does to windows, going on where it stopped, and a short run."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

import zoo
from benchmarks import probes
from benchmarks.probe_contenders import CONTENDERS, Contender
from zoo.errors import ZooError
from zoo.evaluate.supervised import SupervisedEstimator
from zoo.train.config import load_config


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rows", "eegnett"], "--rows: 'eegnett' is neither a registered encoder nor among shrinkage LDA"),
        (["--share", "0"], "--share: got 0.0, wanted more than 0 and at most 1"),
        (["--set", "epochs"], "--set: wanted a JSON object such as"),
    ],
)
def test_bad_options_are_named(arguments, says, capsys):
    assert probes.main(arguments) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_row_names_an_encoder_its_options_and_settings(name):
    what = CONTENDERS[name]
    if what.pretraining:
        config, *overrides = what.pretraining
        assert load_config(probes.ROOT / config, overrides).task.model == what.model
    if what.model:
        assert set(what.options) <= set(type(zoo.create(what.model)).__dataclass_fields__)
        SupervisedEstimator(what.model, ("CZ",), 64.0, **what.settings)


@dataclass(frozen=True)
class Given:
    """What is read of windows."""

    signal: np.ndarray
    subject: np.ndarray
    sensors: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def windows():
    random = np.random.default_rng(0)
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    position = np.broadcast_to(0.09 * np.stack([np.sin(angle), np.cos(angle), 0 * angle], axis=-1), (2, 12, 3))
    valid = np.ones((2, 12), bool)
    valid[1, 3] = False
    return Given(
        signal=random.normal(size=(20, 12, 6)).astype(np.float32) + 3,
        subject=np.repeat(["x", "y"], 10),
        sensors={"position": position, "valid": valid, "name": np.tile(np.arange(12), (2, 1))},
    )


def test_each_person_is_standardised_alone(windows):
    scaled = windows.signal.copy()
    scaled[10:] = 5 * scaled[10:] - 1
    out = probes.by_person(scaled, windows.subject)
    np.testing.assert_allclose(out, probes.by_person(windows.signal, windows.subject), atol=1e-4)
    for rows in (out[:10], out[10:]):
        np.testing.assert_allclose(rows.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(rows.std(0), 1, atol=1e-4)


def test_sites_are_means_of_what_is_near_and_good(windows):
    four = probes.averaged(windows, 4)
    assert four.signal.shape == (20, 4, 6)
    assert sorted(four.sensors["name"][0]) in ([0, 2, 6, 9], [0, 4, 6, 9])  # 3 is broken
    level = probes.averaged(replace(windows, signal=np.ones_like(windows.signal)), 4)
    np.testing.assert_allclose(level.signal, 1, atol=1e-6)
    broken = windows.signal.copy()
    broken[:, 3] = 1e6
    np.testing.assert_array_equal(probes.averaged(replace(windows, signal=broken), 4).signal, four.signal)


def test_rows_that_are_there_are_not_done_again(tmp_path, monkeypatch, capsys):
    done = []

    def apart(name, options, arguments):
        done.append(name)
        score = {"mean": {"balanced_accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}}
        return {"within": score, "across": score, "parameters": 7, "seconds": 60.0}

    monkeypatch.setattr(probes, "apart", apart)
    command = ["--rows", "shrinkage LDA", "eegnet", "--json", str(tmp_path / "figures.json")]
    assert probes.main(command) == probes.main(command) == 0
    assert done == ["shrinkage LDA", "eegnet"]
    assert probes.main([*command, "--set", '{"epochs": 3}']) == 0
    assert done[2:] == ["shrinkage LDA", "eegnet"]
    kept = json.loads((tmp_path / "figures.json").read_text())
    assert kept["eegnet"]["recipe"]["settings"]["epochs"] == 3
    assert "0.500 [0.400, 0.600]" in capsys.readouterr().out


def test_a_row_that_fails_says_why(tmp_path, monkeypatch):
    options = probes.Options(folder=tmp_path)
    monkeypatch.setattr(
        probes.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=2, stderr="warned\nno such thing\n")
    )
    assert probes.apart("eegnet", options, []) == {"failed": "no such thing"}

    def late(*_, **__):
        raise probes.subprocess.TimeoutExpired("python", 1.0)

    monkeypatch.setattr(probes.subprocess, "run", late)
    assert probes.apart("eegnet", options, [])["failed"] == "not finished after 3600 s"


def test_pretraining_is_probed_on_whole_recordings(tmp_path):
    what = Contender("labram_tiny", pretraining=("configs/quickstart.py",))
    with pytest.raises(ZooError, match="its probe is of whole recordings"):
        probes.pretrained("labram", what, probes.Options(share=0.6, folder=tmp_path))


@pytest.mark.slow
def test_an_encoder_is_trained_and_scored_on_the_recordings(tmp_path, faces_eeg):
    short = ["--share", "0.1", "--folds", "2", "--set", '{"epochs": 1, "ensemble": 1}', "--folder", str(tmp_path)]
    figures = tmp_path / "figures.json"
    assert probes.main(["--rows", "eegnet wide ensemble, by person", *short, "--json", str(figures)]) == 0
    (row,) = json.loads(figures.read_text()).values()
    assert row["parameters"] < 10_000
    for where in ("within", "across"):
        assert 0.2 < row[where]["mean"]["balanced_accuracy"]["value"] <= 1
    assert row["difference"]["across"]["low"] <= row["difference"]["across"]["high"]
