"""Random faults in a run of several processes: what comes out is what comes out without them."""

from __future__ import annotations

import pytest
from chaos import run


@pytest.mark.slow
@pytest.mark.parametrize(("faults", "seed"), [(4, 1), (20, 0)])
def test_faults_change_nothing(faults, seed, cache, tmp_path):
    rows = []
    try:
        figures = run(tmp_path / "chaos", cache, faults, seed, rows.append)
    except PermissionError as error:
        pytest.skip(str(error))
    assert [row.fault for row in rows] == list(range(1, faults + 1))
    assert figures["furthest from one device"] < 1e-5
