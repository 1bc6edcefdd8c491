"""Sizes of the mesh, and parameters that do not fit it."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from toy import device_mesh, toy_program

from zoo.errors import ZooError
from zoo.train.config import Config, Data, Devices, Mesh, Rules, Train
from zoo.train.mesh import (
    check_devices,
    check_replication,
    choose_devices,
    divided,
    make_mesh,
    mesh_shape,
    parameter_shardings,
)


@pytest.mark.parametrize(
    ("mesh", "devices", "sizes"),
    [
        (Mesh(), 1, (1, 1, 1, 1, 1)),
        (Mesh(), 8, (1, 8, 1, 1, 1)),
        (Mesh(fsdp=4), 8, (1, 2, 4, 1, 1)),
        (Mesh(data=1, fsdp=-1, tensor=2), 8, (1, 1, 4, 2, 1)),
        (Mesh(slice=2, data=1, fsdp=2, tensor=1, sequence=2), 8, (2, 1, 2, 1, 2)),
    ],
)
def test_sizes_fill_the_devices(mesh, devices, sizes):
    assert tuple(mesh_shape(mesh, devices).values()) == sizes


@pytest.mark.parametrize(
    ("mesh", "devices", "cause"),
    [
        (Mesh(fsdp=3), 8, r"mesh data -1 × fsdp 3 needs a multiple of 3 devices; there are 8"),
        (Mesh(data=2, fsdp=2), 8, r"mesh data 2 × fsdp 2 needs 4 devices; there are 8"),
        (Mesh(data=16), 8, r"mesh data 16 needs 16 devices; there are 8"),
        (Mesh(fsdp=-1), 8, r"one of them −1 at most; got data -1 × fsdp -1"),
        (Mesh(fsdp=0), 8, r"mesh sizes must be 1 or more"),
    ],
)
def test_sizes_that_do_not(mesh, devices, cause):
    with pytest.raises(ZooError, match=cause):
        mesh_shape(mesh, devices)


def test_all_parameters_that_do_not_fit_are_named_together():
    boxed = {
        name: nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, "float32"), axes)
        for name, shape, axes in (
            ("odd", (5, 4), ("embed", "mlp")),
            ("even", (4, 4), ("embed", "mlp")),
            ("other", (4, 4), ("embed", "mpl")),
        )
    }
    with pytest.raises(ZooError) as raised:
        parameter_shardings(boxed, Rules(), device_mesh(fsdp=2))
    assert "odd (5, 4): embed 5 does not divide over fsdp 2" in str(raised.value)
    assert "other: no rule for logical axis 'mpl'" in str(raised.value)
    assert "even" not in str(raised.value)


def test_parameters_that_stay_whole_on_a_sharded_mesh_are_too_many():
    program = toy_program(fsdp=2)
    whole = jax.tree.map(lambda _: jax.sharding.NamedSharding(program.mesh, jax.P()), program.shardings.params)
    params = nn.unbox(program.boxed)
    check_replication(params, program.shardings.params, program.mesh, limit=0.3)
    cause = r"100% of parameter bytes would be whole on every device.* is 30%; the largest is blocks/kernel"
    with pytest.raises(ZooError, match=cause):
        check_replication(params, whole, program.mesh, limit=0.3)
    check_replication(params, whole, device_mesh(data=8), limit=0.3)


@pytest.mark.parametrize(
    ("sizes", "most", "count"),
    [
        ({"data": 8}, 8, 1),
        ({"data": 4}, 4, 3),
        ({"data": 2}, 5, 6),
        ({"data": 2, "fsdp": 2}, 4, 3),
        ({"tensor": 2}, 48, 1),
    ],
)
def test_micro_batches_follow_from_the_devices(sizes, most, count):
    config = Config(task=None, data=Data(batch_size=48), train=Train(micro_batch=most))
    found = divided(config, device_mesh(**sizes))
    assert (found.train.accumulate, found.train.micro_batch) == (count, 0)
    assert found.data.batch_size == 48
    assert divided(Config(task=None, train=Train(accumulate=3)), device_mesh(**sizes)).train.accumulate == 3


def test_a_batch_that_does_not_divide_names_the_numbers_that_would(monkeypatch):
    config = Config(task=None, data=Data(batch_size=48), train=Train(micro_batch=4), mesh=Mesh(fsdp=2))
    with pytest.raises(ZooError, match=r"48 does not divide into the 5 .*; it would on 2, 4, 6, 8 devices"):
        divided(config, device_mesh(data=5))
    with pytest.raises(ZooError, match=r"train.accumulate 2 and train.micro_batch 4: wanted one of them"):
        divided(Config(task=None, train=Train(accumulate=2, micro_batch=4)), device_mesh(data=8))
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    config = dataclasses.replace(config, data=Data(batch_size=20))
    with pytest.raises(ZooError, match=r"20 does not divide into the 8 .*; it would on 1, 2, 5 hosts of 2 devices"):
        divided(config, device_mesh(data=8))


def test_an_accelerator_that_is_not_there():
    with pytest.raises(ZooError, match=r"devices\.platform is tpu but JAX found only"):
        check_devices(Devices(platform="tpu"))
    with pytest.raises(ZooError, match=r"cpu_devices 3: JAX has already started with others"):
        choose_devices(Devices(cpu_devices=3))


@dataclasses.dataclass(frozen=True)
class Chip:
    id: int
    coords: tuple[int, int, int]
    process_index: int
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"


def test_an_axis_may_lie_along_two_of_the_machine() -> None:
    places = [(x, y, z) for x in range(4) for y in range(4) for z in range(4)]
    made = make_mesh(Mesh(fsdp=8), [Chip(number, place, number // 4) for number, place in enumerate(places)])
    assert made.shape == {"slice": 1, "data": 8, "fsdp": 8, "tensor": 1, "sequence": 1}
    assert len({chip.id for chip in made.devices.ravel()}) == 64
    group = np.array([chip.coords for chip in made.devices[0, 0, :, 0, 0]])
    # Eight that are one another's neighbours: a plane of 2 × 4.
    assert sorted(np.ptp(group, axis=0).tolist()) == [0, 1, 3]
