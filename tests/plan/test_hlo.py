"""What is read from compiled programs, against programs whose collectives are known."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from zoo.plan.collectives import Collective, collectives
from zoo.plan.hlo import Hlo

SIZES = {"data": 2, "fsdp": 4}


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def compiled(function: Any, mesh: jax.sharding.Mesh, out: PartitionSpec, *given: tuple[tuple[int, ...], Any]) -> Hlo:
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in given]
    return Hlo(jax.jit(function, out_shardings=NamedSharding(mesh, out)).lower(*shapes).compile().as_text())


def test_a_gather_along_one_axis(mesh: jax.sharding.Mesh) -> None:
    hlo = compiled(lambda x: x * 2, mesh, PartitionSpec(), ((16, 8), PartitionSpec("fsdp")))
    assert collectives(hlo, SIZES) == [Collective("all-gather", ("fsdp",), 16 * 8 * 4, (0, 1, 2, 3), 1)]
    assert collectives(hlo, SIZES)[0].sent == 16 * 8 * 4 * 3 / 4


def test_a_sum_over_all(mesh: jax.sharding.Mesh) -> None:
    hlo = compiled(lambda x: x.sum(0), mesh, PartitionSpec(), ((16, 8), PartitionSpec(("data", "fsdp"))))
    (found,) = collectives(hlo, SIZES)
    assert (found.kind, found.axes, found.size, found.group) == ("all-reduce", ("data", "fsdp"), 8 * 4, 8)
    assert found.sent == 2 * 7 / 8 * 32


def test_a_loop_sends_as_often_as_it_runs(mesh: jax.sharding.Mesh) -> None:
    def looped(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    rows, columns = PartitionSpec(None, "fsdp"), PartitionSpec(None, "fsdp", None)
    hlo = compiled(looped, mesh, rows, ((16, 8), rows), ((5, 8, 8), columns))
    found = collectives(hlo, SIZES)
    assert found
    assert {each.times for each in found} == {5}
    assert {each.axes for each in found} == {("fsdp",)}


def test_a_program_of_one_device_sends_nothing() -> None:
    hlo = Hlo(jax.jit(jnp.matmul).lower(jnp.ones((4, 4)), jnp.ones((4, 4))).compile().as_text())
    assert collectives(hlo, {"data": 1}) == []


def test_traffic_is_operands_and_results(mesh: jax.sharding.Mesh) -> None:
    hlo = compiled(lambda a, b: jnp.tanh(a) + b, mesh, PartitionSpec(), *[((64, 32), PartitionSpec())] * 2)
    assert hlo.traffic() == 3 * 64 * 32 * 4


def test_a_loop_that_keeps_every_turn_writes_it_once() -> None:
    turns, size = 50, 64 * 64 * 4

    def kept(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w),) * 2, x, weights)

    hlo = Hlo(jax.jit(kept).lower(jnp.ones((64, 64)), jnp.ones((turns, 64, 64))).compile().as_text())
    # A turn reads its weights and what it got, and writes its result twice; compilers copy a little besides.
    assert 4 * turns * size <= hlo.traffic() < 12 * turns * size


def test_what_is_gathered_from_is_not_read_whole() -> None:
    rows, taken, width = 4096, 8, 256

    def gathered(table: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.tanh(table[index]) @ jnp.ones((width, width))

    table, index = jnp.ones((rows, width)), jnp.arange(taken)
    hlo = Hlo(jax.jit(gathered).lower(table, index).compile().as_text())
    least = 4 * (2 * taken * width + width * width)
    assert least <= hlo.traffic() < 4 * least < table.nbytes


def test_a_copy_beside_other_work_counts_once() -> None:
    text = """ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024]{0} parameter(0)
  %begun = (f32[1024]{0:S(1)}, f32[1024]{0}, u32[]) copy-start(%x)
  ROOT %done = f32[1024]{0:S(1)} copy-done(%begun)
}
"""
    assert Hlo(text).traffic() == pytest.approx(4096, abs=4)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("fsdp",)),
        ("[2,4]<=[8]", ("fsdp",)),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("mesh['a'=2,'b'=4] {'a'}", ("data",)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ("fsdp",)),
        ("[1,8]<=[8]", ("data", "fsdp")),
    ],
)
def test_groups_in_every_form(groups: str, axes: tuple[str, ...]) -> None:
    line = f"  %r = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%sum"
    (found,) = collectives(Hlo(f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{line}\n}}"), SIZES)
    assert found.axes == axes
