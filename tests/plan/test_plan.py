"""Plans of small runs on devices of this machine, and what cannot be planned."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import zoo.cli
from zoo.data.recipes import RECIPES
from zoo.errors import ZooError
from zoo.objectives.masked_patch import MaskedPatch
from zoo.plan.chips import CHIPS
from zoo.plan.plan import Memory, Plan, _buffers, example, plan, table
from zoo.plan.search import candidates, ranked, search
from zoo.plan.target import Target, target
from zoo.train.config import Config, Data, Mesh, Optimizer, Train

SMALL = Config(
    name="small",
    task=MaskedPatch(model="labram_tiny", options={"depth": 2, "per_patch_norm": True}, pooled_rank=64),
    data=Data(recipe=RECIPES["labram"], batch_size=8, channels=4, mask_patch=200),
    optimizer=Optimizer(name="adamw"),
    train=Train(steps=1000),
)


@pytest.fixture(scope="module")
def one() -> tuple[Plan, Any]:
    return plan(SMALL, target("cpu:1"))


def test_a_plan_counts_what_a_step_holds(one: tuple[Plan, Any]) -> None:
    made, compiled = one
    state = compiled.input_shardings[0]
    assert jax.tree.leaves(state)
    parameters = made.memory.parameters
    # AdamW keeps two moments as large as the parameters, and counters.
    assert made.memory.optimizer == pytest.approx(2 * parameters, rel=1e-3)
    assert made.memory.batch >= 8 * 4 * 200 * 4
    assert made.memory.peak >= 3 * parameters + made.memory.batch + made.memory.temporaries
    assert made.wires == ()
    assert made.fits
    # Most of the temporaries of a step without recomputation are what the backward pass waits for.
    assert 0.5 < made.memory.activations / made.memory.temporaries < 1.2
    # The task counts what its own formulas say, the plan what the program does.
    assert made.program_operations == pytest.approx(made.model_operations, rel=0.02)


@pytest.mark.slow
def test_more_devices_hold_less_and_speak(one: tuple[Plan, Any]) -> None:
    split = dataclasses.replace(SMALL, mesh=Mesh(data=2, fsdp=4))
    eight = plan(split, target("cpu:8"))[0]
    assert eight.mesh == {"data": 2, "fsdp": 4}
    assert eight.memory.parameters < 0.5 * one[0].memory.parameters
    assert eight.memory.activations == pytest.approx(one[0].memory.activations / 8)
    assert eight.program_operations == pytest.approx(one[0].program_operations, rel=0.02)
    axes = {axis for wire in eight.wires for axis in wire.axes}
    assert axes == {"data", "fsdp"}
    # Every gradient is summed over both axes: half of the parameters' bytes at the very least.
    assert sum(wire.sent for wire in eight.wires) > 0.5 * one[0].memory.parameters


@pytest.mark.slow
def test_times_are_those_of_the_chip(one: tuple[Plan, Any]) -> None:
    """The same program, as if the CPU were a v5e."""
    chip = CHIPS["v5e"]
    made = plan(SMALL, dataclasses.replace(target("cpu:1"), chip=chip))[0]
    assert made.compute_seconds == pytest.approx(made.program_operations / chip.flops)
    assert made.memory_seconds == pytest.approx(made.traffic / chip.bandwidth)
    assert made.bound_seconds == max(made.compute_seconds, made.memory_seconds)
    assert made.mfu == pytest.approx(made.model_operations / chip.flops / made.bound_seconds)
    assert f"bound by {made.bound_by}" in table(made)
    tiny = dataclasses.replace(chip, memory=1e6)
    small = plan(SMALL, dataclasses.replace(target("cpu:1"), chip=tiny))[0]
    assert not small.fits
    assert "DOES NOT FIT" in table(small)


@pytest.mark.slow
def test_the_example_is_what_the_loader_gives(faces_eeg: Path, tmp_path: Path) -> None:
    from zoo.data.loader import Loader
    from zoo.data.prepare import prepare
    from zoo.data.store import Dataset

    recipe = dataclasses.replace(RECIPES["labram"], sensor_names="nearest", segment_seconds=2.0)
    files = sorted(faces_eeg.rglob("*.edf"))[:1]
    prepare(files[0], tmp_path / "prepared", recipe)
    dataset = Dataset.open(tmp_path / "prepared")
    loader = Loader(dataset, range(4), window=200, batch_size=1, seed=0, mask_patch=200, mask_ratio=0.5)
    batch = next(loader.at(0))
    data = dataclasses.replace(SMALL.data, prepared=tmp_path / "prepared", channels=0)
    made = example(dataclasses.replace(SMALL, data=data))
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, np.asarray(leaf).dtype), tree)  # noqa: E731
    assert shapes(made) == shapes(batch)


@pytest.mark.slow
def test_a_search_tries_meshes_and_ranks_what_fits() -> None:
    chips = dataclasses.replace(target("cpu:8"), chip=CHIPS["v5e"])
    named = [options for options, _ in candidates(SMALL, chips)]
    assert len(named) == len(set(named))
    tried = list(search(SMALL, chips, most=3))
    assert len(tried) == 3
    best = ranked(tried)
    times = [each.plan.bound_seconds for each in best if each.plan]
    assert times == sorted(times)


def test_the_command_prints_writes_and_says_what_is_wrong(tmp_path: Path, capsys: Any) -> None:
    quickstart = str(Path(__file__).parents[2] / "configs/quickstart.py")
    out = tmp_path / "plan.json"
    small = ("--task.options.depth", "1", "--optimizer.name", "adamw", "--json", str(out))
    assert zoo.cli.main(["plan", quickstart, "--target", "cpu:1", *small]) == 0
    assert "memory a device" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["fits"]
    assert written["memory"]["parameters"] > 0
    for arguments, says in (
        ((), "usage: zoo plan CONFIG"),
        ((quickstart,), "wanted --target"),
        ((quickstart, "--target", "v5p"), "wanted CHIP:SHAPE"),
        ((quickstart, "--target", "v9:2x2"), "no chip is called 'v9'"),
        ((quickstart, "--target", "cpu:512"), "CPU devices"),
        ((quickstart, "--target", "cpu:8", "--mesh.fsdp", "3"), "fsdp 3 needs a multiple of 3 devices"),
        ((quickstart, "--target", "cpu:1", "--data.channels", "0", "--data.prepared", "no"), "give --channels"),
    ):
        assert zoo.cli.main(["plan", *arguments]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1


def test_slices_want_an_axis_of_their_own() -> None:
    two = Target("cpu:8", None, 2, tuple(jax.devices()[:8]))
    with pytest.raises(ZooError, match=r"2 slices want --mesh\.slice 2, got 1"):
        two.mesh(Mesh())
    assert dict(two.mesh(Mesh(slice=2)).shape)["slice"] == 2


def test_the_compilers_complaint_is_read() -> None:
    text = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.05G of
15.75G hbm.
  1. Size: 8.00G
     Operator: op_name="jit(step)/dot_general" source_file="a/b/model.py" source_line=31
     Shape: f32[4]
     ==========================

  2. Size: 3.10G
     Shape: f32[2]
"""
    assert _buffers(text) == ["8.00G  jit(step)/dot_general  model.py:31", "3.10G  unnamed"]
    assert Memory(1, 2, 0, 0, 0, 0, 0, 3, None).limit is None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "devices"), [("v4:2x2x1", 4), ("v5e:2x2", 4), ("v5p:2x2x1", 4), ("7x:2x2x1", 8)])
def test_devices_are_chips_but_for_7x_whose_halves_the_table_has(name: str, devices: int) -> None:
    pytest.importorskip("libtpu", reason="the compiler that says how many devices a chip is")
    program = "import sys; from zoo.plan.target import *; prepare(); print(len(target(sys.argv[1]).devices))"
    said = subprocess.run([sys.executable, "-c", program, name], capture_output=True, text=True, check=True).stdout
    assert int(said) == devices
    sheet = {"v4": 32, "v5e": 16, "v5p": 95, "7x": 192}
    which = name.partition(":")[0]
    assert CHIPS[which].memory * devices == 4 * sheet[which] * 2**30
