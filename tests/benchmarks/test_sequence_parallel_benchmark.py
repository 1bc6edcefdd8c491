"""What a device holds where time is split."""

from __future__ import annotations

import json

import pytest

from benchmarks import sequence_parallel


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["softmax", "softmax both ways", "gla", "native_sparse", "titans"])
def test_an_eighth_of_the_tokens_take_a_sixth_of_the_memory_at_most(encoder, tmp_path):
    file = tmp_path / "memory.json"
    assert sequence_parallel.report(sequence_parallel.Options(encoders=(encoder,), layers=1, json=file)) == 0
    row = json.loads(file.read_text())["rows"][0]
    assert row["encoder"] == encoder
    assert row["ratio"] == row["one"] / row["several"] >= 6


def test_an_encoder_that_is_not_there_is_named(capsys):
    assert sequence_parallel.main(["--encoders", "softmacs"]) == 2
    assert "--encoders: got 'softmacs', wanted some of softmax" in capsys.readouterr().err
