"""What a step does to a state, on one device and on several."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import BATCH, LAYERS, SAMPLES, WIDTH, device_mesh, run, toy_batch, toy_program

from zoo.errors import ZooError
from zoo.train.mesh import BatchPlacer


@pytest.fixture(scope="module")
def alone():
    """Five steps on one device."""
    return run(toy_program())


def assert_same(found, wanted) -> None:
    """Figures and parameters of two runs of five steps, to 1e-5."""
    for one, other in zip(found[1], wanted[1], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6),
        jax.device_get(found[0].params),
        jax.device_get(wanted[0].params),
    )


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2}])
def test_micro_batches_of_unequal_weight_add_up_to_the_whole_batch(sizes, alone):
    weights = [toy_batch()["mask"][first::4].sum() for first in range(4)]
    assert len(set(weights)) > 1
    assert_same(run(toy_program(train={"accumulate": 4}, **sizes)), alone)


def test_a_micro_batch_without_weight_counts_nothing():
    batch = toy_batch()
    batch["mask"][::4] = False  # the rows of the first of four micro-batches
    figures = []
    for count in (1, 4):
        program = toy_program(train={"accumulate": count})
        with jax.set_mesh(program.mesh), program.context():
            place = BatchPlacer(program.mesh, program.config.rules, BATCH, count)
            metrics = program.train_step(program.initial(), place(batch))[1]
            figures.append({name: float(value) for name, value in metrics.items()})
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "sequence": 2}, {"slice": 2, "fsdp": 4}]
)
def test_any_mesh_gives_what_one_device_gives(sizes, alone):
    assert_same(run(toy_program(**sizes)), alone)


def test_parameters_and_moments_are_really_split():
    state = toy_program(fsdp=2, tensor=2, data=2, optimizer={"name": "muon"}, train={"ema": 0.9}).initial()
    wanted = {"embed_in": (SAMPLES, WIDTH // 2), "bias": (LAYERS, WIDTH // 2), "head": (WIDTH // 2, 4)}
    wanted["kernel"] = (LAYERS, WIDTH // 2, WIDTH // 2)
    seen = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = str(getattr(path[-1], "key", ""))
        if name in wanted:
            seen.append(name)
            assert {shard.data.shape for shard in leaf.addressable_shards} == {wanted[name]}
    # Parameters, their average, two moments under AdamW, one under Muon.
    assert {name: seen.count(name) for name in wanted} == {"embed_in": 4, "bias": 4, "head": 4, "kernel": 3}


def test_the_first_state_depends_on_the_seed_and_not_on_the_mesh():
    one, other = (jax.device_get(toy_program(**sizes).initial()) for sizes in ({}, {"fsdp": 2, "tensor": 4}))
    jax.tree.map(lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-6), one, other)


def test_the_average_of_the_parameters():
    program = toy_program(train={"ema": 0.8})
    state, average = program.initial(), None
    place = BatchPlacer(program.mesh, program.config.rules, BATCH, 1)
    average = jax.device_get(state.params)
    with jax.set_mesh(program.mesh), program.context():
        for step in range(3):
            state, _ = program.train_step(state, place(toy_batch(step)))
            average = jax.tree.map(lambda old, new: 0.8 * old + 0.2 * new, average, jax.device_get(state.params))
    jax.tree.map(lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-5), state.ema, average)
    assert program.variables(state)["params"] is state.ema


def test_bfloat16_stays_near_and_keeps_float32_parameters(alone):
    state, figures = run(toy_program(dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert [each["loss"] for each in figures] == pytest.approx([each["loss"] for each in alone[1]], rel=0.03)
    assert [each["loss"] for each in figures] != [each["loss"] for each in alone[1]]


def test_the_state_is_donated():
    program = toy_program()
    state = program.initial()
    with jax.set_mesh(program.mesh), program.context():
        program.train_step(state, BatchPlacer(program.mesh, program.config.rules, BATCH, 1)(toy_batch()))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_a_batch_that_does_not_divide():
    with pytest.raises(ZooError, match=r"batch_size 16 does not divide into 4 device groups × 3 micro-batches"):
        toy_program(data=2, fsdp=2, train={"accumulate": 3})


def test_rows_of_a_host_are_those_its_devices_hold():
    place = BatchPlacer(device_mesh(data=2, fsdp=2, tensor=2), toy_program().config.rules, BATCH, 1)
    assert list(place.rows) == list(range(BATCH)), "one host holds all"
    placed = place(toy_batch())["signal"]
    assert {shard.data.shape[0] for shard in placed.addressable_shards} == {BATCH // 4}
    np.testing.assert_array_equal(placed, toy_batch()["signal"])
