"""Operations counted from a jaxpr, against counts by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from zoo.plan.count import operations

F32 = jnp.float32


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, F32)


def test_a_matmul() -> None:
    assert operations(jnp.matmul, array(3, 5), array(5, 7)) == 2 * 3 * 5 * 7
    assert (
        operations(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), array(2, 3, 5), array(2, 5, 7)) == 2 * 2 * 3 * 5 * 7
    )


def test_a_loop_counts_as_often_as_it_runs() -> None:
    def looped(x: jax.Array, weights: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    assert operations(looped, array(4, 6), array(9, 6, 6)) == 9 * 2 * 4 * 6 * 6


def test_the_backward_pass_is_twice_the_forward_and_recomputation_once_more() -> None:
    def loss(w: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ v))

    shapes = array(6, 6), array(6, 6), array(4, 6)
    one = 2 * 4 * 6 * 6
    assert operations(loss, *shapes) == 2 * one
    # Of the first matmul no gradient of its input is asked for.
    assert operations(jax.grad(loss, (0, 1)), *shapes) == 2 * one + 3 * one
    assert operations(jax.grad(jax.checkpoint(loss), (0, 1)), *shapes) == 2 * one + 3 * one + 2 * one


def test_a_convolution() -> None:
    def convolved(x: jax.Array, kernel: jax.Array, groups: int = 1) -> jax.Array:
        dims = ("NHC", "HIO", "NHC")
        return lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=dims, feature_group_count=groups)

    assert operations(convolved, array(2, 20, 3), array(5, 3, 8)) == 2 * (2 * 16 * 8) * 5 * 3
    depthwise = operations(lambda x, k: convolved(x, k, 3), array(2, 20, 3), array(5, 1, 3))
    assert depthwise == 2 * (2 * 16 * 3) * 5


def test_the_dearest_branch_counts() -> None:
    def either(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

    assert operations(either, array(4, 6), array(6, 6)) == 2 * 2 * 4 * 6 * 6


def test_parts_on_devices_add_up() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    split = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    assert operations(split, array(16, 5), array(5, 7)) == 2 * 16 * 5 * 7
