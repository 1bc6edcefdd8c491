"""A run that is killed or asked to stop goes on as if nothing had happened."""

from __future__ import annotations

import signal

import pytest
from small import CHECKPOINT_EVERY, STEPS, finish, metrics, start, wait_for_step


def finished_steps(folder) -> list[int]:
    return sorted(int(each.name) for each in (folder / "runs/small/checkpoints").iterdir() if each.name.isdigit())


def test_a_straight_run_writes_every_step_once_and_the_files_it_promises(straight):
    assert [line["step"] for line in metrics(straight)] == list(range(1, STEPS + 1))
    assert [line["step"] for line in metrics(straight) if "validation_loss" in line] == [10, 20]
    written = {str(each.relative_to(straight / "runs/small")) for each in (straight / "runs/small").rglob("*")}
    assert {"config.py", "config.json", "overrides.json", "plots/training.png", "plots/reconstruction.png"} <= written
    assert not [name for name in written if name.endswith((".tmp", ".part"))]


@pytest.mark.parametrize(
    "step", [2, 9, pytest.param(4, marks=pytest.mark.slow), pytest.param(17, marks=pytest.mark.slow)]
)
def test_a_killed_run_goes_on_bit_for_bit(step, folder, cache, straight):
    process = start(folder, cache)
    wait_for_step(folder, step, process)
    process.kill()
    finish(process, -signal.SIGKILL)
    assert len(metrics(folder)) < STEPS
    out, err = finish(start(folder, cache))
    assert err == ""
    if step > 2 * CHECKPOINT_EVERY:
        assert "resuming from step" in out
    assert metrics(folder) == metrics(straight)
    assert finished_steps(folder) == finished_steps(straight)


def test_a_run_asked_to_stop_loses_no_step(folder, cache, straight):
    process = start(folder, cache)
    wait_for_step(folder, 6, process)
    process.send_signal(signal.SIGTERM)
    out, err = finish(process)
    assert err == ""
    last = len(metrics(folder))
    assert f"stopped after step {last}, which is saved; the same command goes on from there" in out
    assert 6 <= last < STEPS
    assert finished_steps(folder)[-1] == last
    out, _ = finish(start(folder, cache))
    assert f"resuming from step {last}\n" in out
    assert metrics(folder) == metrics(straight)
