"""The memory of a plan against that of a run, as `benchmarks/plan_memory.py` compares them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the most memory that was held")
def test_a_run_takes_the_memory_of_its_plan(tmp_path: Path) -> None:
    options = ["--channels", "32", "--data.batch-size", "128", "--json", str(tmp_path / "figures.json")]
    command = [sys.executable, str(ROOT / "benchmarks/plan_memory.py"), *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["planned"] > 200e6
    assert abs(figures["planned"] / figures["measured"] - 1) < 0.10
