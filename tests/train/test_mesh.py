"""Sizes of the mesh, and parameters that do not fit it."""

from __future__ import annotations

import flax.linen as nn
import jax
import pytest
from toy import device_mesh, toy_program

from zoo.errors import ZooError
from zoo.train.config import Devices, Mesh, Rules
from zoo.train.mesh import check_devices, check_replication, choose_devices, mesh_shape, parameter_shardings


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


def test_an_accelerator_that_is_not_there():
    with pytest.raises(ZooError, match=r"devices\.platform is tpu but JAX found only"):
        check_devices(Devices(platform="tpu"))
    with pytest.raises(ZooError, match=r"cpu_devices 3: JAX has already started with others"):
        choose_devices(Devices(cpu_devices=3))
