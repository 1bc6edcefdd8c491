"""The same run on one device, on eight, and on two processes of four: same figures, checkpoints that fit all."""

from __future__ import annotations

import signal
import socket

import pytest
from small import STEPS, assert_same_curve, finish, go_on_elsewhere, metrics, start, wait_for_step, write_config

MESH = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")
KEEP_ALL = ("--train.keep-last", "5")
SAVED = 8
"""Step whose checkpoint the other runs go on from."""


def start_pair(folder, cache, *options):
    """Two processes of four devices each, one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = ("--devices.cpu-devices", "4", "--devices.coordinator", f"127.0.0.1:{port}", "--devices.processes", "2")
    return [start(folder, cache, *MESH, *pair, "--devices.process", str(i), *options) for i in range(2)]


@pytest.fixture(scope="session")
def eight(prepared, cache, tmp_path_factory):
    """A run on data 2 × fsdp 2 × tensor 2, and what it said."""
    folder = tmp_path_factory.mktemp("eight")
    write_config(folder, prepared)
    return folder, finish(start(folder, cache, "--devices.cpu-devices", "8", *MESH, *KEEP_ALL))


@pytest.fixture(scope="session")
def pair(prepared, cache, tmp_path_factory):
    """The same of two processes."""
    folder = tmp_path_factory.mktemp("pair")
    write_config(folder, prepared)
    for process in start_pair(folder, cache, *KEEP_ALL):
        finish(process)
    return folder


def test_eight_devices_give_the_curve_of_one(eight, straight):
    folder, (out, err) = eight
    assert_same_curve(metrics(folder), metrics(straight))
    assert err == ""  # XLA warns there of layouts it can only change by copying whole arrays
    assert "devices: 8 × cpu; mesh: data 2 × fsdp 2 × tensor 2" in out
    assert "80,000 /4" in out


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(), ("--devices.cpu-devices", "4", "--mesh.fsdp", "2", "--mesh.tensor", "2")])
def test_what_eight_devices_wrote_goes_on_with_fewer(mesh, eight, folder, cache, straight):
    go_on_elsewhere(eight[0], folder, SAVED)
    out, _ = finish(start(folder, cache, *mesh))
    assert f"resuming from step {SAVED}\n" in out
    assert "changed since the run began: devices.cpu_devices 8 → " in out
    assert_same_curve(metrics(folder), metrics(straight))


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one_device(pair, straight):
    assert_same_curve(metrics(pair), metrics(straight))


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_wrote(pair, folder, cache, straight):
    go_on_elsewhere(pair, folder, SAVED)
    out, _ = finish(start(folder, cache))
    assert f"resuming from step {SAVED}\n" in out
    assert_same_curve(metrics(folder), metrics(straight))


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(folder, cache, straight):
    first, second = start_pair(folder, cache)
    wait_for_step(folder, 6, first)
    second.send_signal(signal.SIGTERM)
    said = [finish(process)[0] for process in (first, second)]
    last = len(metrics(folder))
    assert 6 <= last < STEPS
    assert all(f"stopped after step {last}, which is saved" in out for out in said)
    for process in start_pair(folder, cache):
        finish(process)
    assert_same_curve(metrics(folder), metrics(straight))


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_wrote(straight, folder, cache):
    go_on_elsewhere(straight, folder, 16)
    for process in start_pair(folder, cache):
        finish(process)
    assert_same_curve(metrics(folder), metrics(straight))
