"""The benchmark of quantizers: bad input, one side alone, and a short run where the peer is installed."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from benchmarks import quantizers


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cases", "lfq"], "--cases: 'lfq' is not among ema, gradient"),
        (["--shapes", "12x4"], "--shapes: got '12x4', wanted vectors x width x codes"),
    ],
)
def test_bad_options_are_named(arguments, says, capsys):
    assert quantizers.main(arguments) == 2
    assert says in capsys.readouterr().err


def test_a_missing_peer_is_named(monkeypatch, capsys):
    monkeypatch.setattr(quantizers, "PEER", "no_such_package")
    assert quantizers.main([]) == 2
    assert "pip install torch vector-quantize-pytorch" in capsys.readouterr().err


def test_our_side_answers(tmp_path):
    side = quantizers.Side("ours", "rvq4", "32x4x8", 1, tmp_path)
    try:
        values = np.load(side.first())
        assert values.shape == (32, 4)
        assert 0 < side.step() < 60
        assert 10 < side.memory() < 10_000
        side.process.kill()
        with pytest.raises(quantizers.ZooError, match="ours stopped before it answered 'step'"):
            side.step()
    finally:
        side.close()


@pytest.mark.skipif(
    not importlib.util.find_spec(quantizers.PEER), reason="the peer: pip install vector-quantize-pytorch"
)
def test_a_short_run_checks_times_and_writes(tmp_path, capsys, monkeypatch):
    figures = tmp_path / "figures.json"
    command = ["--cases", "ema", "--shapes", "64x4x8", "--steps", "2", "--json", str(figures)]
    assert quantizers.main(command) == 0
    (row,) = json.loads(figures.read_text())
    assert row["agreeing"] == 1
    assert row["ratio"] > 0
    assert "100.00%" in capsys.readouterr().out
    monkeypatch.setattr(quantizers, "AGREEING", 1.1)  # what no result can pass
    assert quantizers.main(command) == 0
    assert "—" in capsys.readouterr().out
