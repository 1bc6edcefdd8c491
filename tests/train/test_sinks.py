"""Where figures go."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from zoo.train.metrics import JsonLines, Screen, TensorBoard, WeightsAndBiases

FIGURES = {
    "loss": 0.5,
    "gradient_norm": 1.25,
    "learning_rate": 1e-3,
    "step_seconds": 90.0,
    "examples_per_second": 2.0,
    "signal_samples_per_second": 4e5,
    "loader_wait_share": 0.25,
}


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_json_lines_are_there_as_soon_as_they_are_written(tmp_path):
    sink = JsonLines(tmp_path / "m.jsonl", 0)
    sink.write(1, FIGURES)
    assert lines(tmp_path / "m.jsonl") == [{"step": 1, **FIGURES}]
    sink.close()


def test_json_lines_after_the_step_resumed_from_are_dropped_and_so_is_a_line_cut_short(tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_text("".join(f'{{"step": {step}, "loss": 0.{step}}}\n' for step in (1, 2, 3, 4)) + '{"step": 5, "lo')
    sink = JsonLines(file, 2)
    sink.write(3, {"loss": 0.7})
    sink.close()
    assert lines(file) == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 3, "loss": 0.7}]
    assert [each.name for each in tmp_path.iterdir()] == ["m.jsonl"]


def test_the_screen_is_plain_lines_without_a_terminal(capsys):
    screen = Screen(0, 10, 4)
    more = {6: {"validation_loss": 0.75, "mfu": 0.4}, 8: {"slowest_host": 3.0, "slowest_host_ratio": 4.0}}
    for step in range(1, 11):
        screen.write(step, {**FIGURES, **more.get(step, {})})
    screen.close()
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said] == ["4/10", "6/10", "8/10", "10/10"]
    assert said[0] == (
        "step 4/10  loss 0.5000  |g| 1.25  lr 1.00e-03  2 ex/s  4e+05 samples/s  waits 25%  0:09:00 left"
    ).replace("0:09:00", "9:00")
    assert "validation 0.7500" in said[1]
    assert "MFU 40.0%" in said[1]
    assert "process 3 takes 4.0× the others" in said[2]


def test_the_screen_is_a_bar_with_the_time_left_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    screen = Screen(3, 10, 1)
    for step in range(4, 11):
        screen.write(step, FIGURES)
    screen.close()
    said = capsys.readouterr().out
    assert "10/10" in said
    assert "loss 0.5000" in said


def test_tensorboard_and_wandb_get_every_figure(monkeypatch, tmp_path):
    """With stand-ins for the packages, which the tests do not install."""
    told = []
    writer = SimpleNamespace(add_scalar=lambda *each: told.append(each), close=lambda: told.append("closed"))
    made = lambda folder, purge_step: told.append((folder, purge_step)) or writer  # noqa: E731
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=made))
    sink = TensorBoard(tmp_path / "tb", 4)
    sink.write(5, {"loss": 0.5, "mfu": 0.4})
    sink.close()
    assert told == [(str(tmp_path / "tb"), 5), ("loss", 0.5, 5), ("mfu", 0.4, 5), "closed"]

    told.clear()
    run = SimpleNamespace(log=lambda figures, step: told.append((figures, step)), finish=lambda: told.append("closed"))
    begun = lambda **options: told.append(options) or run  # noqa: E731
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=begun))
    sink = WeightsAndBiases(SimpleNamespace(name="n", folder=tmp_path), {"seed": 1})
    sink.write(5, {"loss": 0.5})
    sink.close()
    assert told[0] == {
        "project": "brain-zoo", "name": "n", "id": "n", "dir": str(tmp_path), "config": {"seed": 1}, "resume": "allow",
    }  # fmt: skip
    assert told[1:] == [({"loss": 0.5}, 5), "closed"]


@pytest.mark.parametrize(("seconds", "said"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7325, "2:02:05")])
def test_durations(seconds, said, capsys):
    Screen(0, 2, 1).write(1, {**FIGURES, "step_seconds": seconds})
    assert f"  {said} left\n" in capsys.readouterr().out
