"""Whole runs of several processes that do not go as they should: one line, in time, and an exit code that tells."""

from __future__ import annotations

import json
import re
import signal
import socket
import time

import pytest
from chaos import Chaos, parameters
from small import finish, start
from tiny import CONFIG, free_port

HERE = socket.gethostname()


def at_step_7(lines: str) -> str:
    """The configuration with these lines in the loop that gives examples."""
    return CONFIG.replace("            out.write", f"            if number == 7:\n{lines}            out.write")


@pytest.fixture
def two(cache, tmp_path):
    """Starts the tiny run in two processes, with a change of its configuration; 20 steps."""
    chaos = Chaos(tmp_path / "work", tmp_path / "disk", cache, faults=0, seed=0)

    def run(*options, text=CONFIG, hosts=2, pace=0.01):
        (chaos.folder / "chaos.py").write_text(text)
        return chaos.start(hosts, chaos.disk, *options, pace=pace)

    run.chaos = chaos
    yield run
    for each in chaos.starts:
        for process in each.processes:
            process.kill()
            process.wait()


def test_a_process_that_does_not_come_is_named(tmp_path, cache, monkeypatch):
    for name in ("START", "LAST", "PACE"):
        monkeypatch.setenv(f"CHAOS_{name}", "0")
    (tmp_path / "small.py").write_text(CONFIG)
    where = ("--devices.coordinator", f"127.0.0.1:{free_port()}", "--devices.processes", "2", "--devices.process", "0")
    _, err = finish(start(tmp_path, cache, *where, "--devices.start-seconds", "1"), 4)
    came = f"1 of 2 processes came within 1 s (devices.start_seconds); late: process 1; here: 0 on {HERE}"
    assert err == f"zoo: {came}\n"
    assert {each.name for each in tmp_path.iterdir()} == {"small.py"}


@pytest.mark.slow
def test_a_step_that_hangs_leaves_stacks_and_ends_all(two):
    run = two("--train.hang-seconds", "10", text=at_step_7("                time.sleep(1000)\n"))
    assert run.end() == [5, 5]
    for number in range(2):
        said = run.text(number)
        assert re.search(
            rf"zoo: process [01] \({HERE}\) hangs: step at step [67] has taken more than 10 s \(train.hang_seconds\); "
            rf"stacks are in \S+/run/logs/rank-[01].log\n",
            said,
        ), said
        log = (two.chaos.disk / f"run/logs/rank-{number}.log").read_text()
        assert "Thread 0x" in log
        assert "loop.py" in log
        assert " hangs: step at step" in log


@pytest.mark.slow
def test_a_barrier_names_who_is_late(two):
    sleeps = "        if jax.process_index() == 1:\n            time.sleep(1000)\n"
    lines = CONFIG.replace("        for number, batch", sleeps + "        for number, batch")
    run = two("--train.hang-seconds", "2", text=lines)
    assert run.end() == [4, 4]
    late = f"1 of 2 processes came to checkpoints looked at within 8 s; late: process 1 ({HERE})"
    assert f"zoo: {late}\n" in run.text(0)
    assert f"zoo: {late}\n" in run.text(1)


@pytest.mark.slow
def test_logs_and_health_of_each_process_and_only_the_first_speaks(two):
    run = two(pace=0.5)
    two.chaos.until_trained(run)
    two.chaos.wait_for(run, 6)
    run.processes[1].send_signal(signal.SIGUSR1)
    assert run.end() == [0, 0]
    assert [line for line in run.text(1).splitlines() if not line.startswith("[Gloo]")] == []
    folder = two.chaos.disk / "run"
    logs = [(folder / f"logs/rank-{number}.log").read_text() for number in range(2)]
    assert all(line in logs[0] for line in run.text(0).splitlines() if not line.startswith("[Gloo]"))
    assert "hread 0x" in logs[1]
    lines = [json.loads(line) for line in (folder / "health.jsonl").read_text().splitlines()]
    assert {(line["step"], line["process"]) for line in lines} >= {(step, 1) for step in (10, 15, 20)}
    assert all(line["host"] == HERE and line["resident_bytes"] > 1e7 for line in lines)
    named = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in named if "slowest_host_ratio" in line][-1] == 20


@pytest.mark.slow
def test_the_error_of_one_process_ends_the_other_at_once(two):
    fails = "                if jax.process_index():\n                    raise KeyError('of the test')\n"
    run = two(text=at_step_7(fails))
    while run.processes[1].poll() is None:
        time.sleep(0.05)
    ended = time.monotonic()
    assert run.end() == [1, 1]
    assert time.monotonic() - ended < 10
    assert "KeyError: 'of the test'" in run.text(1)
    assert run.text(0).splitlines()[-1] == f"zoo: process 1 ({HERE}): KeyError: 'of the test'"


@pytest.mark.slow
def test_slurm_starts_it(two, cache, monkeypatch):
    """As `srun` would start two tasks on this machine; JAX reads Slurm's variables."""
    for name in ("START", "LAST", "PACE"):
        monkeypatch.setenv(f"CHAOS_{name}", str(10**6 * (name == "LAST")))
    (two.chaos.folder / "chaos.py").write_text(CONFIG)
    tasks = {"JOB_ID": "7", "STEP_NODELIST": "127.0.0.1", "NTASKS": "2", "STEP_NUM_TASKS": "2"}
    for name, value in tasks.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", str(free_port()))
    both = []
    for task in ("0", "1"):
        monkeypatch.setenv("SLURM_PROCID", task)
        monkeypatch.setenv("SLURM_LOCALID", task)
        options = ("--train.steps", "6", "--devices.coordinator", "auto")
        both.append(start(two.chaos.folder, cache, *options, command=("train", "chaos.py")))
    (out, _), _ = [finish(each) for each in both]
    assert "devices: 4 × cpu, 2 processes; mesh: data 2 × fsdp 2" in out
    assert "step 6/6" in out
    alone = start(two.chaos.folder, cache, "--train.steps", "6", command=("train", "chaos.py"))
    assert "zoo: Slurm started 2 processes but devices.coordinator is empty" in finish(alone, 2)[1]


@pytest.mark.slow
def test_fewer_hosts_go_on_with_the_same_batches_and_parameters(two, tmp_path):
    assert two("--train.steps", "20", hosts=3).end() == [0, 0, 0]
    wanted = parameters(two.chaos.disk / "run")
    two.chaos.disk = tmp_path / "again"
    first = two(hosts=3, pace=0.3)
    two.chaos.until_trained(first)
    two.chaos.wait_for(first, 8)
    first.processes[2].terminate()
    assert first.end() == [0, 0, 0]
    refused = two(hosts=5)
    assert refused.end() == [2] * 5
    cause = (
        "48 does not divide into the 10 device groups of 10 devices; it would on 1, 2, 3, 4, 6, 8 hosts of 2 devices"
    )
    assert cause in refused.text(0)
    second = two(hosts=1)
    assert second.end() == [0]
    assert "changed since the run began: devices.processes 3 → 0" in second.text(0)
    found = parameters(two.chaos.disk / "run")
    for name, value in wanted.items():
        assert abs(found[name] - value).max() < 1e-5
