"""A run of several processes, random faults, and what must come out of it all the same.

    python tests/train/chaos.py --faults 20 --seed 0

Four processes of two devices each on one machine train a tiny task; a supervisor does what a cluster's does: it starts
the same command again, with 4, 2, 3 and again 4 processes, when the run has ended. Every process writes which examples
(record, first sample) it gave to which step. Afterwards a run without faults, in which the numbers of processes change
at the same steps, and one of a single process are compared with what came out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tiny import BATCH, CONFIG, LOST_SECONDS, SmallDisk, fill, free_port, make_dataset, truncate

KINDS = ("kill",) * 5 + ("terminate",) * 3 + ("stop", "pause", "slow", "full disk", "truncate", "coordinator") * 2
"""Of twenty faults: kill -9 of any process, SIGTERM to any, SIGSTOP for longer than `devices.lost_seconds` and for
less, SIGSTOP again and again, no room on the disk, all killed and the newest checkpoint cut short, process 0 killed."""
HOSTS = (4, 2, 3, 4)
"""Processes in each quarter of the faults."""
END_SECONDS = 120
LOST, BAD, ABORTED = 4, 2, -signal.SIGABRT


@dataclass
class Start:
    """One start of a run: its processes, and where it began."""

    number: int
    processes: list[subprocess.Popen[bytes]]
    said: list[Path]
    record: Path
    """Written anew once the state is there."""
    at: float = field(default_factory=time.time)
    resumed: int | None = None
    """The step it went on from; None when it never came so far."""

    @property
    def hosts(self) -> int:
        return len(self.processes)

    def text(self, process: int) -> str:
        return self.said[process].read_text()

    def trains(self) -> bool:
        """Whether its state is there; notes which it is."""
        if not self.record.exists() or self.record.stat().st_mtime < self.at:
            return False
        found = re.search(r"resuming from step (\d+)", self.text(0))
        self.resumed = int(found[1]) if found else 0
        return True

    def end(self) -> list[int]:
        """Exit codes, once all have ended, which they must within the time."""
        deadline = time.monotonic() + END_SECONDS
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"start {self.number} does not end: {self.tails()}") from None
        return [process.returncode for process in self.processes]

    def tails(self) -> str:
        return "\n".join(f"[{process}] {self.text(process)[-1500:]}" for process in range(self.hosts))


@dataclass
class Row:
    """What a fault did."""

    fault: int
    kind: str
    hosts: int
    victim: int | None
    step: int
    codes: list[int] = field(default_factory=list)
    seconds: float = 0.0
    said: str = ""
    resumed: int | None = None


class Chaos:
    """One run with faults in `folder`, its runs on `disk`, a file system that can be filled."""

    def __init__(self, folder: Path, disk: Path, cache: Path, faults: int, seed: int) -> None:
        self.folder, self.disk, self.cache = folder, disk, cache
        self.random = random.Random(seed)
        self.kinds = [kind for _ in range(0, faults, len(KINDS)) for kind in self.random.sample(KINDS, len(KINDS))]
        del self.kinds[faults:]
        self.steps = 16 * faults + 20
        self.starts: list[Start] = []
        self.rows: list[Row] = []
        (folder / "examples").mkdir(parents=True)
        (folder / "chaos.py").write_text(CONFIG)
        make_dataset(folder)

    def start(self, hosts: int, runs: Path, *options: str, last: int = 10**9, pace: float = 0.0) -> Start:
        """The command, in as many processes."""
        number = len(self.starts)
        address = f"127.0.0.1:{free_port()}"
        environment = {**os.environ, "BRAIN_ZOO_CACHE": str(self.cache), "CHAOS_START": str(number)}
        environment |= {"CHAOS_LAST": str(last), "CHAOS_PACE": str(pace), "CHAOS_RUNS": str(runs)}
        processes, said = [], []
        for process in range(hosts):
            said.append(self.folder / f"said-{number}-{process}.txt")
            command = [sys.executable, "-c", "import sys; from zoo.cli import main; sys.exit(main())"]
            command += ["train", "chaos.py", "--train.steps", str(self.steps), "--runs", str(runs), *options]
            if hosts > 1:
                command += ["--devices.coordinator", address, "--devices.processes", str(hosts)]
                command += ["--devices.process", str(process)]
            with said[-1].open("wb") as out:
                processes.append(
                    subprocess.Popen(command, cwd=self.folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
                )
        self.starts.append(Start(number, processes, said, runs / "run/overrides.json"))
        return self.starts[-1]

    def step(self) -> int:
        """The last step in the figures."""
        file = self.disk / "run/metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def wait_for(self, start: Start, step: int) -> int:
        deadline = time.monotonic() + 4 * END_SECONDS
        while self.step() < step:
            assert time.monotonic() < deadline, f"step {step} does not come: {start.tails()}"
            assert all(each.poll() is None for each in start.processes), f"ended early: {start.tails()}"
            time.sleep(0.05)
        return self.step()

    def go(self, show: Callable[[Row], None]) -> None:
        """The whole run: every fault, every restart, to the last step."""
        current = self.start(HOSTS[0], self.disk, pace=0.1)
        for number, kind in enumerate(self.kinds):
            current = self.until_trained(current)
            began = current.resumed or 0
            step = self.wait_for(current, max(began, self.step()) + self.random.randint(2, 8))
            row = Row(number + 1, kind, current.hosts, None, step)
            self.rows.append(row)
            ends = self.inflict(row, current)
            if ends:
                quarter = HOSTS[min(len(HOSTS) - 1, len(HOSTS) * (number + 1) // len(self.kinds))]
                current = self.until_trained(self.start(quarter, self.disk, pace=0.1))
                row.resumed = current.resumed
            show(row)
        codes = current.end()
        assert codes == [0] * current.hosts, current.tails()

    def until_trained(self, current: Start) -> Start:
        """The start, or the one after it when it found the newest checkpoint damaged only in reading it."""
        while not current.trains():
            if any(each.poll() is not None for each in current.processes):
                codes = current.end()
                assert LOST in codes, current.tails()
                assert "is set aside as" in current.tails(), current.tails()
                current = self.start(current.hosts, self.disk, pace=0.1)
            time.sleep(0.1)
        return current

    def inflict(self, row: Row, current: Start) -> bool:
        """Does it; whether it ended the run. What is to be seen of it is checked here."""
        row.victim = victim = 0 if row.kind == "coordinator" else self.random.randrange(current.hosts)
        process = current.processes[victim]
        others = [each for each in range(current.hosts) if each != victim]
        named = f"process {victim} ({socket.gethostname()})"
        began = time.monotonic()
        if row.kind in ("pause", "slow"):
            for _ in range(1 if row.kind == "pause" else 10):
                process.send_signal(signal.SIGSTOP)
                time.sleep(2.0 if row.kind == "pause" else 0.2)
                process.send_signal(signal.SIGCONT)
                time.sleep(0.2)
            self.wait_for(current, row.step + 3)
            row.seconds = time.monotonic() - began
            return False
        if row.kind in ("kill", "coordinator"):
            process.kill()
            row.codes = current.end()
            # JAX's own service, and the transport of the CPU's collectives, abort whom they reach before our word does.
            assert all(row.codes[each] in (LOST, ABORTED) for each in others), current.tails()
            assert any(f"zoo: {named} has ended without a word" in current.text(each) for each in others), (
                current.tails()
            )
        elif row.kind == "terminate":
            process.terminate()
            row.codes = current.end()
            assert row.codes == [0] * current.hosts, current.tails()
            assert "which is saved; the same command goes on from there" in current.text(0)
        elif row.kind == "stop":
            process.send_signal(signal.SIGSTOP)
            deadline = began + END_SECONDS
            while any(current.processes[each].poll() is None for each in others) and time.monotonic() < deadline:
                time.sleep(0.1)
            row.seconds = time.monotonic() - began
            process.send_signal(signal.SIGCONT)
            row.codes = current.end()
            assert all(current.processes[each].returncode in (LOST, ABORTED) for each in others), current.tails()
            assert any(f"zoo: {named} has been silent for {LOST_SECONDS} s" in current.text(each) for each in others)
            assert row.codes[victim] != 0
        elif row.kind == "full disk":
            row.victim = None
            ballast = self.disk / "ballast"
            fill(ballast)
            row.codes = current.end()
            assert BAD in row.codes, current.tails()
            assert all(code in (BAD, ABORTED) for code in row.codes), current.tails()
            assert "the disk is full" in current.tails()
            ballast.unlink()
        elif row.kind == "truncate":
            row.victim = None
            for each in current.processes:
                each.kill()
            current.end()
            row.codes = [-signal.SIGKILL] * current.hosts
            truncate(self.disk / "run/checkpoints")
        row.seconds = row.seconds or time.monotonic() - began
        row.said = next((line for line in current.tails().splitlines() if "zoo: " in line or "stopped" in line), "")
        return True

    def segments(self, starts: list[Start]) -> list[tuple[Start, int, int]]:
        """(start, after which step, to which step) of all that became part of the final parameters, in order."""
        kept: list[tuple[Start, int, int]] = []
        for start in starts:
            if start.resumed is None:
                continue
            kept = [(each, after, min(to, start.resumed)) for each, after, to in kept if after < start.resumed]
            kept.append((start, start.resumed, self.steps))
        return kept

    def examples(self, start: Start) -> dict[int, list[tuple[int, int]]]:
        """step → its (record, first sample) on all processes of a start, in order."""
        found: dict[int, list[tuple[int, int]]] = {}
        for process in start.processes:
            steps = {}
            for line in (self.folder / f"examples/{start.number}-{process.pid}.jsonl").read_text().splitlines():
                if not line.endswith("]]"):  # the line a killed process was writing
                    continue
                step, records, firsts = json.loads(line)
                steps[step] = list(zip(records, firsts, strict=True))
            for step, rows in steps.items():
                found[step] = sorted(found.get(step, []) + rows)
        return found

    def replay(self, starts: list[Start]) -> Path:
        """A run without faults whose numbers of processes change at the steps where they did over these starts."""
        merged: list[list[int]] = []
        for start, after, to in self.segments(starts):
            if merged and merged[-1][0] == start.hosts:
                merged[-1][2] = to
            else:
                merged.append([start.hosts, after, to])
        runs = self.folder / "replay"
        for hosts, _, to in merged:
            done = to == self.steps
            options = () if done else ("--train.checkpoint-every", str(to))
            start = self.start(hosts, runs, *options, last=10**9 if done else to)
            assert start.end() == [0 if done else BAD] * hosts, start.tails()
        return runs / "run"

    def alone(self) -> tuple[Path, Start]:
        """A run without faults of one process on one device."""
        start = self.start(1, self.folder / "alone", "--devices.cpu-devices", "1", "--mesh.fsdp", "1")
        assert start.end() == [0], start.tails()
        return self.folder / "alone/run", start

    def judge(self) -> dict[str, float]:
        """Compares; raises AssertionError where something is lost, repeated or different."""
        chaos = list(self.starts)
        alone, straight = self.alone()
        wanted, found = self.examples(straight), {}
        for start, after, to in self.segments(chaos):
            given = self.examples(start)
            found |= {step: given[step] for step in range(after + 1, to + 1)}
        assert sorted(found) == list(range(1, self.steps + 1))
        assert all(len(rows) == BATCH for rows in wanted.values())
        different = [step for step in found if found[step] != wanted[step]]
        assert not different, f"steps {different} were given other examples"
        lines = [json.loads(line)["step"] for line in (self.disk / "run/metrics.jsonl").read_text().splitlines()]
        assert lines == list(range(1, self.steps + 1))
        ours, same, one = (parameters(run) for run in (self.disk / "run", self.replay(chaos), alone))
        furthest = 0.0
        for name, value in ours.items():
            np.testing.assert_array_equal(value, same[name], err_msg=f"{name}: not bit for bit that of the replay")
            np.testing.assert_allclose(value, one[name], 1e-5, 1e-5, err_msg=name)
            furthest = max(furthest, float(np.abs(value - one[name]).max()))
        return {
            "steps": self.steps,
            "examples": self.steps * BATCH,
            "starts": len(chaos),
            "furthest from one device": furthest,
        }


def parameters(run: Path) -> dict[str, np.ndarray]:
    """Of the last checkpoint of a run."""
    from zoo.train.checkpoint import Checkpoints

    checkpoints = Checkpoints(run / "checkpoints")
    assert checkpoints.latest is not None
    params = checkpoints.load(checkpoints.latest)["params"]
    return {name: np.asarray(value) for name, value in params.items()}


def run(folder: Path, cache: Path, faults: int, seed: int, show: Callable[[Row], None]) -> dict[str, float]:
    """Everything; the figures of the comparison."""
    with SmallDisk(folder / "disk") as disk:
        chaos = Chaos(folder / "work", disk, cache, faults, seed)
        try:
            chaos.go(show)
            return chaos.judge()
        finally:
            for start in chaos.starts:
                for process in start.processes:
                    process.kill()
                    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    began = time.monotonic()

    def show(row: Row) -> None:
        print(
            f"{row.fault:>3}  {row.kind:<12} hosts {row.hosts}  process {'–' if row.victim is None else row.victim}  "
            f"step {row.step:>4}  ended in {row.seconds:5.1f} s  codes {row.codes or 'goes on'}  "
            f"from step {row.resumed if row.codes else row.step}  {row.said}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        figures = run(Path(folder) / "chaos", Path(folder) / "cache", chosen.faults, chosen.seed, show)
    print(", ".join(f"{name} {value:.3g}" for name, value in figures.items()), f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
