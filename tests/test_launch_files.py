"""configs/launch: what the files start is what the command line takes, and what clusters are told is what they know."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import zoo.run
from zoo.cli import main
from zoo.errors import ZooError
from zoo.train.config import Config, Devices, load_config
from zoo.train.launcher import find_place
from zoo.train.stop import HUNG, LOST, Stopped

LAUNCH = Path(__file__).parent.parent / "configs/launch"
CONFIG = str(LAUNCH.parent / "quickstart.py")
SLURM, MPI, TPU = LAUNCH / "slurm.sbatch", LAUNCH / "mpirun.sh", LAUNCH / "tpu_queued_resource.sh"
SCRIPTS = (SLURM, MPI, TPU)
STOPPED = 75
STUB = """#!{python}
import json, os, signal, sys, time
from pathlib import Path
here = Path({here!r})
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
answers = here / {name!r}
first, *rest = answers.read_text().split() if answers.exists() else ["0"]
if rest:
    answers.write_text(" ".join(rest))
if first == "wait":
    asked = signal.SIGUSR2 if {name!r} == "mpirun" else signal.SIGTERM
    signal.signal(asked, lambda *_: sys.exit({stopped}))
    (here / "waiting").touch()
    time.sleep(60)
if first.isalpha():
    print(first)
sys.exit(int(first) if first.isdigit() else 0)
"""


class Commands:
    """Stand-ins for commands of a cluster: they note how they are called, and answer as they are told."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name in names:
            file = folder / "bin" / name
            file.write_text(STUB.format(python=sys.executable, here=str(folder), name=name, stopped=STOPPED))
            file.chmod(0o755)

    def answer(self, name: str, *answers: object) -> None:
        """Exit codes, or words that it prints, one a call, the last for ever; `wait`: sleeps until it is asked
        to end: by SIGTERM, mpirun by SIGUSR2, which is what it hands on."""
        (self.folder / name).write_text(" ".join(map(str, answers)))

    def start(self, *command: object, **variables: object) -> Any:
        told = {name: str(value) for name, value in variables.items()}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", *map(str, command)],
            env={**os.environ, "PATH": path, "CONFIG": CONFIG, **told},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            start_new_session=True,
        )

    def run(self, *command: object, **variables: object) -> tuple[int, str]:
        """(exit code, what it said)."""
        process = self.start(*command, **variables)
        out = process.communicate(timeout=60)[0]
        return process.returncode, out

    def wait(self) -> None:
        """Until a command waits."""
        while not (self.folder / "waiting").exists():
            time.sleep(0.01)
        (self.folder / "waiting").unlink()

    @property
    def calls(self) -> list[list[str]]:
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def forget(self) -> None:
        (self.folder / "calls.jsonl").unlink(missing_ok=True)


def zoo_arguments(call: list[str]) -> list[str]:
    """What is behind `zoo` in a call of a launcher."""
    return call[call.index("zoo") + 1 :]


@pytest.fixture
def parsed(monkeypatch):
    """The configuration that a `zoo train` command line makes, by the real command and parser; and its code when it is
    asked to end."""

    def parse(arguments: list[str]) -> Config:
        found = []

        def stop(file, overrides):
            found.append(load_config(file, overrides))
            raise Stopped("stopped after step 1")

        monkeypatch.setattr(zoo.run, "train", stop)
        assert main(arguments) == STOPPED
        return found[0]

    return parse


def directives(text: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))


# Shell


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_well_formed(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, check=False).stderr == b""
    assert script.read_text().startswith("#!/bin/bash\n")
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", script], capture_output=True, check=False).stdout == b""


def test_sbatch_reads_every_directive():
    text = SLURM.read_text()
    # sbatch reads none behind the first command.
    head = re.split(r"^[^#\s]", text, maxsplit=1, flags=re.MULTILINE)[0]
    assert head.count("#SBATCH") == text.count("#SBATCH ") == len(directives(text))
    known = {
        "job-name": r"[\w-]+",
        "nodes": r"\d+",
        "ntasks-per-node": r"\d+",
        "gpus-per-node": r"\d+",
        "cpus-per-task": r"\d+",
        "mem": r"\d+",
        "exclusive": "",
        "time": r"\d+:\d\d:\d\d",
        "signal": r"(B:)?TERM@\d+",
        "requeue": "",
        "open-mode": "append|truncate",
        "output": r"%x-%j\.log",
    }
    for name, value in directives(text).items():
        assert re.fullmatch(known[name], value), name
    assert directives(text)["ntasks-per-node"] == directives(text)["gpus-per-node"]  # as JAX shares them out
    assert not directives(text)["signal"].startswith("B:")  # to the processes, not to the script


def test_slurm_starts_a_run(tmp_path, parsed):
    commands = Commands(tmp_path, "srun", "scontrol")
    told = {"SLURM_JOB_ID": 7, "SLURM_JOB_NAME": "zoo", "NAME": "wide", "RUNS": "/shared/runs"}
    assert commands.run(SLURM, **told, OPTIONS="--train.steps 9 --mesh.fsdp 8")[0] == 0
    (call,) = commands.calls
    assert call[:3] == ["srun", "--gpu-bind=none", "--wait=120"]
    config = parsed(zoo_arguments(call))
    assert config.folder == Path("/shared/runs/wide")
    assert (config.devices.platform, config.devices.coordinator) == ("gpu", "auto")
    assert (config.train.steps, config.mesh.fsdp) == (9, 8)


@pytest.mark.parametrize("code", [0, 1, 2, LOST, HUNG, STOPPED, 137])
def test_slurm_queues_again_what_can_go_on(code, tmp_path):
    commands = Commands(tmp_path, "srun", "scontrol")
    commands.answer("srun", code)
    told = {"SLURM_JOB_ID": 7, "SLURM_JOB_NAME": "zoo"}
    again = code in (LOST, HUNG, STOPPED, 137)
    assert commands.run(SLURM, **told)[0] == (0 if again else code)
    assert (commands.calls[1:] == [["scontrol", "requeue", "7"]]) == again
    commands.forget()
    assert commands.run(SLURM, **told, SLURM_RESTART_COUNT=50)[0] == code
    assert len(commands.calls) == 1


def test_mpirun_starts_a_run_on_every_host_and_again(tmp_path, parsed):
    commands = Commands(tmp_path, "mpirun")
    (tmp_path / "hosts.txt").write_text("# ours\nalpha slots=8\n\nbeta  # slow\n gamma\n")
    commands.answer("mpirun", LOST, HUNG, 137, 0)
    code, said = commands.run(MPI, PAUSE=0, PORT=8000, PLATFORM="cpu", OPTIONS="--train.steps 9")
    assert code == 0
    assert [line.split(":")[0] for line in said.splitlines()] == ["exit code 4", "exit code 5", "exit code 137"]
    assert len(commands.calls) == 4
    call = commands.calls[0]
    assert commands.calls == [call] * 4
    assert call[: call.index("zoo")] == [
        *("mpirun", "--hostfile", "hosts.txt", "--map-by", "ppr:1:node", "--bind-to", "none", "-np", "3"),
        *("-x", "PATH", "bash", "-c", call[13], "host"),
    ]
    config = parsed(zoo_arguments(call))
    assert (config.devices.platform, config.devices.coordinator) == ("cpu", "alpha:8000")
    assert config.train.steps == 9


def test_mpirun_begins_again_only_what_can_go_on(tmp_path):
    commands = Commands(tmp_path, "mpirun")
    code, said = commands.run(MPI)
    assert (code, commands.calls) == (2, [])
    assert said == "hosts.txt: no such file of hosts\n"
    (tmp_path / "hosts.txt").write_text("alpha\n")
    for code in (1, 2, STOPPED):
        commands.forget()
        commands.answer("mpirun", code)
        assert commands.run(MPI)[0] == code
        assert len(commands.calls) == 1
    commands.forget()
    commands.answer("mpirun", LOST)
    assert commands.run(MPI, RESTARTS=2, PAUSE=0)[0] == LOST
    assert len(commands.calls) == 3


def test_mpirun_hands_sigterm_on_and_waits(tmp_path):
    commands = Commands(tmp_path, "mpirun", "zoo")
    (tmp_path / "hosts.txt").write_text("alpha\n")
    commands.answer("mpirun", "wait")
    process = commands.start(MPI)
    commands.wait()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == STOPPED
    (call,) = commands.calls

    # What mpirun starts on a host gets its SIGUSR2, and so do all of its children.
    on_host = call[call.index("bash") + 1 :]
    commands.answer("zoo", "wait")
    process = commands.start(*on_host)
    commands.wait()
    os.killpg(process.pid, signal.SIGUSR2)
    process.communicate(timeout=60)
    assert process.returncode == STOPPED
    for code in (0, LOST):
        commands.answer("zoo", code)
        assert commands.run(*on_host)[0] == code


def test_tpu_slices_are_asked_for_and_given_back(tmp_path):
    commands = Commands(tmp_path, "gcloud")
    told: dict[str, Any] = {"PROJECT": "p", "ZONE": "z", "QUEUED": "night", "POLL": 0}
    commands.answer("gcloud", "ACCEPTED", "PROVISIONING", "ACTIVE")
    assert commands.run(TPU, "create", **told)[0] == 0
    create, *asked = commands.calls
    tpus = ["gcloud", "compute", "tpus", "queued-resources"]
    assert create[:6] == [*tpus, "create", "night"]
    options = dict(zip(create[6::2], create[7::2], strict=True))
    assert options == {
        "--project": "p",
        "--zone": "z",
        "--node-id": "night-0",
        "--accelerator-type": "v5p-512",
        "--runtime-version": "v2-alpha-tpuv5",
    }
    assert len(asked) == 2
    assert asked[0][:6] == [*tpus, "describe", "night"]

    commands.forget()
    commands.answer("gcloud", "FAILED")
    assert commands.run(TPU, "create", **told, SLICES=2, SPOT=1)[0] == 1
    assert commands.calls[0][-1] == "--spot"
    assert "--node-count 2 --node-prefix night" in " ".join(commands.calls[0])
    assert commands.run(TPU, "delete", **told)[0] == 0
    assert commands.calls[-1][:6] == [*tpus, "delete", "night"]
    code, said = commands.run(TPU, **told)
    assert code == 2
    assert all(f".sh {each} " in said for each in ("create", "install", "train", "log", "stop", "delete"))
    assert commands.run(TPU, "create", ZONE="z")[0] == 1


def test_tpu_hosts_start_a_run_and_begin_again_by_themselves(tmp_path, parsed):
    commands = Commands(tmp_path, "gcloud", "zoo")
    told: dict[str, Any] = {"PROJECT": "p", "ZONE": "z", "SLICES": 2, "RESTARTS": 3}
    assert commands.run(TPU, "train", **told, OPTIONS="--train.steps 9")[0] == 0
    (call,) = commands.calls
    assert call[:6] == ["gcloud", "compute", "tpus", "queued-resources", "ssh", "zoo"]
    assert {"--node=all", "--worker=all"} < set(call)
    remote = call[-1].removeprefix("--command=")
    assert remote.startswith("nohup ")
    assert remote.endswith(" &")

    for answers, code in (((LOST, HUNG, 0), 0), ((2,), 2), ((STOPPED,), STOPPED), ((LOST,) * 4, LOST)):
        commands.forget()
        commands.answer("zoo", *answers)
        assert commands.run("-c", remote.removesuffix("&"))[0] == code
        assert len(commands.calls) == len(answers)
    config = parsed(commands.calls[0][1:])
    assert (config.devices.platform, config.devices.coordinator, config.mesh.slice) == ("tpu", "auto", 2)
    assert (config.devices.start_seconds, config.train.steps) == (900, 9)
    assert config.folder == Path("/mnt/shared/runs/zoo")


# Kubernetes


def items(name: str) -> dict[str, Any]:
    """Kind → object of a file."""
    whole = yaml.safe_load((LAUNCH / name).read_text())
    assert (whole["apiVersion"], whole["kind"]) == ("v1", "List")
    found = {each["kind"]: each for each in whole["items"]}
    assert len(found) == len(whole["items"])
    return found


def command_line(container: dict[str, Any], variables: dict[str, str]) -> list[str]:
    """What a container runs, its variables filled in as Kubernetes does, and a configuration that is quick to load."""
    line = [*container["command"], *container["args"]]
    filled = [re.sub(r"\$\((\w+)\)", lambda name: {**variables, "CONFIG": CONFIG}[name[1]], each) for each in line]
    assert filled[0] == "zoo"
    return filled[1:]


def check_pods(job: dict[str, Any], config_map: dict[str, Any]) -> dict[str, Any]:
    """What holds for the pods of both files; their container."""
    spec, data = job["spec"], config_map["data"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # what a failure policy needs
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert all(isinstance(value, str) for value in data.values())
    assert (LAUNCH.parent.parent / data["CONFIG"]).is_file()
    (container,) = pod["containers"]
    assert container["envFrom"] == [{"configMapRef": {"name": config_map["metadata"]["name"]}}]
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert mounts.keys() == {each["name"] for each in pod["volumes"]}
    assert data["RUNS"].startswith(mounts["shared"] + "/")
    for rule in spec["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == container["name"]
            assert rule["onExitCodes"]["operator"] == "In"
    return container


def codes(job: dict[str, Any], action: str) -> set[int]:
    rules = job["spec"]["podFailurePolicy"]["rules"]
    return {
        code for rule in rules if rule["action"] == action for code in rule.get("onExitCodes", {}).get("values", ())
    }


def test_kubernetes_starts_a_pod_a_host(parsed):
    found = items("kubernetes_gpu.yaml")
    job, service, data = found["Job"], found["Service"], found["ConfigMap"]["data"]
    assert (job["apiVersion"], service["apiVersion"]) == ("batch/v1", "v1")
    container = check_pods(job, found["ConfigMap"])
    assert int(data["HOSTS"]) == job["spec"]["completions"]
    assert codes(job, "FailJob") == {2}
    assert codes(job, "Ignore") == {LOST, HUNG, STOPPED}
    assert job["spec"]["podReplacementPolicy"] == "Failed"

    pod = job["spec"]["template"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    devices = parsed(command_line(container, {**data, "JOB_COMPLETION_INDEX": "3"})).devices
    # Pods of an indexed Job are called JOB-INDEX, and known within the service.
    host, port = devices.coordinator.split(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert int(port) == service["spec"]["ports"][0]["port"] == container["ports"][0]["containerPort"]
    assert devices.platform == "gpu"
    place = find_place(devices)
    assert place is not None
    assert (place.processes, place.process, place.devices) == (job["spec"]["completions"], 3, None)


def test_gke_starts_a_job_a_slice(parsed):
    found = items("kubernetes_tpu.yaml")
    whole, data = found["JobSet"], found["ConfigMap"]["data"]
    assert whole["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    annotations = whole["metadata"]["annotations"]
    assert annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] == "cloud.google.com/gke-nodepool"
    (slices,) = whole["spec"]["replicatedJobs"]
    assert slices["replicas"] == int(data["SLICES"])
    job = slices["template"]
    container = check_pods(job, found["ConfigMap"])
    # Any failure begins the whole set anew; bad input ends it.
    assert job["spec"]["backoffLimit"] == 0
    assert codes(job, "FailJob") == {2}
    (rule,) = whole["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])

    selector = job["spec"]["template"]["spec"]["nodeSelector"]
    chips = math.prod(map(int, selector["cloud.google.com/gke-tpu-topology"].split("x")))
    assert chips == job["spec"]["completions"] * container["resources"]["limits"]["google.com/tpu"]
    config = parsed(command_line(container, data))
    assert (config.devices.platform, config.devices.coordinator) == ("tpu", "auto")
    assert config.mesh.slice == slices["replicas"]


# What JAX makes of the environment


CLUSTERS = ("SLURM_", "OMPI_", "PMI_", "MEGASCALE_", "TPU_", "KUBERNETES_", "JOB_COMPLETION_INDEX")


@pytest.fixture
def environment(monkeypatch):
    """Sets variables, where no other of a cluster is left."""

    def told(**variables: object) -> None:
        for name in [name for name in os.environ if name.startswith(CLUSTERS)]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return told


def test_slurm_tells_every_process_its_place(environment):
    asked = directives(SLURM.read_text())
    tasks = int(asked["nodes"]) * int(asked["ntasks-per-node"])
    told = {"SLURM_JOB_ID": 4242, "SLURM_STEP_NODELIST": "node[003-010]", "SLURM_STEP_NUM_NODES": asked["nodes"]}
    told |= {"SLURM_NTASKS": tasks, "SLURM_STEP_NUM_TASKS": tasks, "SLURM_PROCID": 13, "SLURM_LOCALID": 5}
    environment(**told)
    place = find_place(Devices(coordinator="auto"))
    assert place is not None
    assert place.address.split(":")[0] == "node003"
    assert (place.processes, place.process, place.devices) == (64, 13, (5,))
    with pytest.raises(ZooError, match=r"Slurm started 64 processes but devices\.coordinator is empty"):
        find_place(Devices())


@pytest.mark.parametrize("names", [("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK")])
def test_mpi_tells_every_process_its_place(names, environment):
    environment(**dict(zip(names, (3, 2), strict=True)))
    place = find_place(Devices(coordinator="alpha:8476"))
    assert place is not None
    assert (place.address, place.processes, place.process, place.devices) == ("alpha:8476", 3, 2, None)


def test_gke_tells_every_process_its_place(environment, monkeypatch):
    import jax._src.clusters.cloud_tpu_cluster as cloud_tpu
    import jax._src.clusters.cluster as clusters

    for module in (cloud_tpu, clusters):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    # No network in tests: neither names nor the metadata server, which knows nothing of GKE's pods.
    monkeypatch.setattr(cloud_tpu.socket, "gethostbyname", lambda name: "10.0.0.1")
    monkeypatch.setattr(cloud_tpu, "get_metadata", lambda key: ("", 404))
    spec = items("kubernetes_tpu.yaml")["JobSet"]["spec"]["replicatedJobs"][0]
    hosts = [f"zoo-slice-1-{host}.zoo" for host in range(spec["template"]["spec"]["completions"])]
    slices = {"MEGASCALE_COORDINATOR_ADDRESS": "zoo-slice-0-0.zoo:8080", "MEGASCALE_NUM_SLICES": spec["replicas"]}
    environment(TPU_WORKER_HOSTNAMES=",".join(hosts), TPU_WORKER_ID=3, MEGASCALE_SLICE_ID=1, **slices)
    place = find_place(Devices(coordinator="auto"))
    assert place is not None
    assert place.address == "zoo-slice-0-0.zoo:8482"
    assert (place.processes, place.process, place.devices) == (32, 19, None)
