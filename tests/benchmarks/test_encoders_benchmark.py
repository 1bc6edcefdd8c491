"""The benchmark of encoders: bad input, the table of peers, one side alone, a short run where the peer is installed."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

import zoo
from benchmarks import encoders
from benchmarks.encoder_peers import PEERS
from zoo.weights.keys import Key

MODEL = "eegnet_base"


def test_bad_options_are_named(monkeypatch, capsys):
    assert encoders.main(["--models", "eegnet_bas"]) == 2
    assert "--models: 'eegnet_bas' is not among" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert encoders.main([]) == 2
    assert "pip install torch braindecode" in capsys.readouterr().err


@pytest.mark.parametrize("name", PEERS)
def test_every_line_of_the_table_names_an_encoder_and_its_key_maps(name):
    peer = PEERS[name]
    assert name in zoo.list_models()
    assert set(peer.options) <= set(type(zoo.create(name)).__dataclass_fields__)
    targets = {rule.target.split("/")[1] for rule in peer.rules() if isinstance(rule, Key)}
    assert targets == {"encoder", "head"}


@pytest.mark.slow
def test_our_side_refuses_weights_that_are_not_the_peer_s(tmp_path, capfd):
    np.savez(tmp_path / "weights.npz", other=np.zeros(3, np.float32))
    side = encoders.Side("ours", MODEL, encoders.Options(batch=2), tmp_path)
    try:
        with pytest.raises(encoders.ZooError, match="ours stopped before it answered 'logits'"):
            side.ask("logits")
    finally:
        side.close()
    assert "extra tensor other [3]: nothing here takes it" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("braindecode"), reason="the peer: pip install torch braindecode")
def test_a_short_run_checks_times_and_writes(tmp_path, capsys, monkeypatch):
    figures = tmp_path / "figures.json"
    command = ["--models", MODEL, "--batch", "2", "--steps", "2", "--json", str(figures)]
    assert encoders.main(command) == 0
    (row,) = json.loads(figures.read_text())
    assert row["error"] < 1e-5
    assert row["train_ratio"] > 0
    assert 0 < row["infer_s"][0] < 60
    assert "theirs / ours, median of 1 encoders: training" in capsys.readouterr().out
    monkeypatch.setattr(encoders, "TOLERANCE", 0.0)  # what no result can pass
    assert encoders.main(command) == 0
    out = capsys.readouterr().out
    assert "—" in out
    assert "median of" not in out
