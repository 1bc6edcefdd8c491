"""How the processes of a run meet, watch one another and end: the parts of it, without a run around them."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time

import pytest
from tiny import free_port
from toy import Toy

from zoo.errors import ZooError
from zoo.train.cluster import Cluster
from zoo.train.config import Config, Devices, Train
from zoo.train.health import Health, host_health, slowest
from zoo.train.launcher import COUNTED_BY, LEGACY_OPEN_MPI, Place, find_place
from zoo.train.link import Link
from zoo.train.logs import RankLog
from zoo.train.rollcall import call_roll
from zoo.train.stop import LOST, Lost, Stopped
from zoo.train.watchdog import LIMITS, Watchdog

HERE = socket.gethostname()


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for _, *names in COUNTED_BY:
        for name in names:
            monkeypatch.delenv(name, raising=False)
    for name in (LEGACY_OPEN_MPI, "SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)


def together(*calls):
    """What each call gives or raises, all at the same time."""
    found = [None] * len(calls)

    def run(number, call):
        try:
            found[number] = call()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=each) for each in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def roll(address, processes, *present, run="runs/x", seconds=10.0, counts=None):
    """The roll call of some processes, each as it sees it."""
    places = [Place(address, (counts or {}).get(each, processes), each) for each in present]
    return together(*(lambda place=place: call_roll(place, run, seconds) for place in places))


@pytest.fixture
def address():
    return f"127.0.0.1:{free_port()}"


def test_without_a_coordinator_a_process_is_alone():
    assert find_place(Devices()) is None


@pytest.mark.parametrize(("name", "size", "rank"), COUNTED_BY)
def test_a_launcher_tells_how_many_and_which(name, size, rank, monkeypatch):
    monkeypatch.setenv(size, "4")
    monkeypatch.setenv(rank, "2")
    assert find_place(Devices(coordinator="host:12")) == Place("host:12", 4, 2)
    assert find_place(Devices(coordinator="host:12", processes=3, process=1)) == Place("host:12", 3, 1)
    with pytest.raises(ZooError, match=f"^{name} started 4 processes but devices.coordinator is empty, so each would"):
        find_place(Devices())


def test_a_launcher_of_one_process_starts_a_run_of_one(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert find_place(Devices()) is None


def test_slurm_and_older_open_mpi_are_detected(monkeypatch):
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "node[003-006]", "NTASKS": "4", "PROCID": "3", "LOCALID": "1"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert find_place(Devices(coordinator="auto")) == Place("node003:61447", 4, 3, (1,))
    for name in slurm:
        monkeypatch.delenv(f"SLURM_{name}")
    monkeypatch.setenv(LEGACY_OPEN_MPI, "8192.0;tcp://10.0.0.1:34911")
    for name, value in {"SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    assert find_place(Devices(coordinator="auto")) == Place("10.0.0.1:61442", 2, 1, (0,))


@pytest.mark.parametrize(
    ("devices", "cause"),
    [
        (Devices(coordinator="auto"), "JAX finds no Slurm, Open MPI, mpi4py, Kubernetes or Cloud TPU job here; wanted"),
        (Devices(coordinator="host:1"), "no launcher tells how many processes there are and which this is; wanted"),
        (Devices(coordinator="host", processes=2, process=0), "devices.coordinator 'host': wanted HOST:PORT"),
        (Devices(coordinator="host:1", processes=2, process=2), "devices.process 2: there are 2, counted from 0"),
    ],
)
def test_places_that_cannot_be(devices, cause):
    with pytest.raises(ZooError, match=cause):
        find_place(devices)


def test_all_learn_who_is_where_however_late_the_first_comes(address):
    late = [lambda each=each: call_roll(Place(address, 3, each), "runs/x", 10.0) for each in (1, 2)]

    def first():
        time.sleep(0.3)
        return call_roll(Place(address, 3, 0), "runs/x", 10.0)

    found = together(first, *late)
    assert [each.hosts for each in found] == [(HERE,) * 3] * 3
    assert [sorted(each.links) for each in found] == [[1, 2], [0], [0]]
    # The port is free for JAX's own service though the connections stay.
    with socket.create_server(("", int(address.rpartition(":")[2]))):
        pass
    close(*found)


def close(*rolls):
    for each in rolls:
        for connection in each.links.values():
            connection.close()


def test_the_late_are_named_on_every_process(address):
    found = roll(address, 4, 0, 2, seconds=0.6)
    cause = "2 of 4 processes came within 0.6 s (devices.start_seconds); late: process 1, 3; "
    cause += f"here: 0 on {HERE}, 2 on {HERE}"
    assert [(type(each), str(each)) for each in found] == [(Lost, cause)] * 2


def test_an_absent_coordinator_is_named(address):
    (found,) = roll(address, 2, 1, seconds=0.5)
    assert isinstance(found, Lost)
    assert str(found).startswith(f"process 1 on {HERE}: the coordinator {address} did not answer (")
    assert str(found).endswith(" within 0.5 s (devices.start_seconds)")


def test_two_of_one_number_and_different_counts_are_refused(address):
    found = roll(address, 3, 0, 1, 1)
    assert {str(each) for each in found} == {f"two processes say they are 1: on {HERE} and on {HERE}"}
    found = roll(f"127.0.0.1:{free_port()}", 3, 0, 1, counts={1: 4})
    assert {str(each) for each in found} == {f"process 1 on {HERE} counts 4 processes, process 0 counts 3"}


def test_strangers_and_another_runs_processes_are_sent_away(address):
    host, _, port = address.rpartition(":")

    def stranger():
        time.sleep(0.3)
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            return connection.recv(1000)

    found = together(
        lambda: call_roll(Place(address, 2, 0), "runs/x", 10.0),
        stranger,
        lambda: call_roll(Place(address, 2, 1), "runs/other", 0.5),
        lambda: (time.sleep(0.7), call_roll(Place(address, 2, 1), "runs/x", 10.0))[1],
    )
    assert found[0].hosts == found[3].hosts == (HERE,) * 2
    assert "is another run's: process 0 at" in str(found[2])
    close(found[0], found[3])


class Ends:
    """Links of several processes in one, and how each of them is told to end."""

    def __init__(self, address, count, lost_seconds=10.0):
        self.rolls = roll(address, count, *range(count))
        self.told = [[] for _ in range(count)]
        self.over = [threading.Event() for _ in range(count)]
        self.links = [Link(each, number, lost_seconds, self.end(number)) for number, each in enumerate(self.rolls)]

    def end(self, number):
        def end(reason, code):
            if not self.over[number].is_set():
                self.told[number].append((reason, code))
                self.over[number].set()
                self.links[number].told(reason, code)
                self.leave(number)

        return end

    def leave(self, number):
        for connection in self.rolls[number].links.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self):
        for number in range(len(self.links)):
            self.over[number].set()
            self.leave(number)
        for number, link in enumerate(self.links):
            link._thread.join(5)
            for connection in self.rolls[number].links.values():
                connection.close()


@pytest.fixture
def three(address):
    made = Ends(address, 3)
    yield made
    made.close()


def test_one_that_goes_without_a_word_is_named_by_all_others(three):
    three.over[2].set()
    three.leave(2)
    assert all(each.wait(5) for each in three.over)
    reason = f"process 2 ({HERE}) has ended without a word; the run cannot go on without it"
    assert three.told == [[(reason, LOST)], [(reason, LOST)], []]


def test_one_that_fails_tells_the_others_why(three):
    began = time.monotonic()
    three.over[1].set()
    three.links[1].told("the disk is full", 2)
    assert all(each.wait(5) for each in three.over)
    assert three.told == [[("the disk is full", 2)], [], [("the disk is full", 2)]]
    assert time.monotonic() - began < 2


def test_who_is_through_may_go(three):
    for link in three.links:
        link.done()
    time.sleep(0.1)
    three.leave(2)
    three.leave(0)
    assert not any(each.wait(0.1) for each in three.over)


def test_the_silent_are_given_up(address, monkeypatch):
    class Silent(Link):
        def say(self, message):
            if self._process != 1 or "beat" not in message:
                super().say(message)

    monkeypatch.setattr(sys.modules[__name__], "Link", Silent)
    ends = Ends(address, 3, lost_seconds=0.6)
    assert all(each.wait(5) for each in ends.over)
    reason = f"process 1 ({HERE}) has been silent for 0.6 s (devices.lost_seconds); the run cannot go on without it"
    assert [each[0] for each in ends.told] == [(reason, LOST)] * 3
    ends.close()


def test_the_watchdog_tells_the_part_and_the_step_and_only_when_it_must():
    told = []
    dog = Watchdog(0.2, told.append)
    dog.start()
    for step in range(6):
        dog.expect("step", step)
        time.sleep(0.05)
    dog.expect("compilation")
    time.sleep(0.3)
    dog.rest()
    time.sleep(0.3)
    assert told == []
    dog.expect("step", 7)
    time.sleep(0.4)
    assert told == ["hangs: step at step 7 has taken more than 0.2 s (train.hang_seconds)"]
    assert LIMITS["compilation"] == 4
    dog.close()


def test_a_log_holds_what_was_said_from_the_beginning_and_stacks_on_a_signal(tmp_path, capfd):
    log = RankLog(tmp_path / "run", 3)
    with log:
        print("before")
        assert not log.file.exists()
        log.open()
        print("after\nand ", end="")
        print("more")
        print("wrong", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert "test_a_log_holds" in log.file.read_text()
    lines = log.file.read_text().splitlines()
    assert [line[20:] for line in lines if line[:4] == time.strftime("%Y")] == ["before", "after", "and more", "wrong"]
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "wrong\n")
    assert not faulthandler.unregister(signal.SIGUSR1)


def test_health_of_each_host(tmp_path):
    config = Config(task=Toy(), runs=tmp_path, name="run", train=Train(log_every=2, hang_seconds=0))
    config.folder.mkdir()
    cluster = Cluster(config)
    health = Health(config.folder, cluster, 0, 2)
    assert health.of_step(1, {"step_seconds": 2.0, "loader_wait_share": 0.5}, 1.0) == {}
    assert health.of_step(2, {"step_seconds": 4.0, "loader_wait_share": 0.0}, 2.0) == {}
    health.close()
    (line,) = [json.loads(line) for line in (config.folder / "health.jsonl").read_text().splitlines()]
    assert line == {**line, "step": 2, "process": 0, "host": HERE, "step_seconds": 3.0, "host_seconds": 1.5}
    assert line["loader_wait_share"] == 0.25
    found = host_health(tmp_path)
    assert 1e7 < found["resident_bytes"] < 1e12
    assert found["disk_free_bytes"] > 0
    assert slowest({0: {"host_seconds": 1.0}, 1: {"host_seconds": 6.0}, 2: {"host_seconds": 2.0}}) == (1, 3.0)


@pytest.mark.parametrize("error", [ZooError("a reason"), Stopped("a reason"), KeyError("a reason")])
def test_the_log_ends_with_why_the_run_does(error, tmp_path):
    config = Config(task=Toy(), runs=tmp_path, name="run")

    def fails():
        with Cluster(config) as cluster:
            cluster.log.open()
            raise error

    with pytest.raises(type(error)):
        fails()
    assert (tmp_path / "run/logs/rank-0.log").read_text().rstrip().endswith(str(error))


def test_a_cluster_of_one_writes_nothing_and_waits_for_nobody(tmp_path):
    config = Config(task=Toy(), runs=tmp_path, name="run")
    with Cluster(dataclasses.replace(config, devices=Devices())) as cluster:
        cluster.barrier("anything", 0.01)
    assert list(tmp_path.iterdir()) == []
