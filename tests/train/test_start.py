"""Beginning from another run's parameters: every one used once, every one filled once, disagreements told together."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.train.config import Start
from zoo.train.start import begin_from
from zoo.train.state import State


def state(ema: bool = False) -> State:
    params = {"encoder": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}, "head": jnp.full((3, 4), 7.0)}
    return State(jnp.zeros((), jnp.int32), params, {}, {}, params if ema else None)


def source() -> dict:
    return {"encoder": {"kernel": jnp.ones((2, 3)), "bias": jnp.full(3, 2.0)}, "decoder": jnp.ones(5)}


def test_takes_what_agrees_and_leaves_what_is_declared_new() -> None:
    begun = begin_from(state(), source(), {}, Start(run="other", new=("^head$",), unused=("^decoder$",)))
    np.testing.assert_array_equal(begun.params["encoder"]["kernel"], np.ones((2, 3)))
    np.testing.assert_array_equal(begun.params["encoder"]["bias"], np.full(3, 2.0))
    np.testing.assert_array_equal(begun.params["head"], np.full((3, 4), 7.0))
    assert begun.ema is None


def test_the_average_begins_there_too_in_buffers_of_its_own() -> None:
    begun = begin_from(state(ema=True), source(), {}, Start(run="other", new=("head",), unused=("decoder",)))
    np.testing.assert_array_equal(begun.ema["encoder"]["kernel"], np.ones((2, 3)))
    ours, theirs = begun.params["encoder"]["kernel"], begun.ema["encoder"]["kernel"]
    assert ours.unsafe_buffer_pointer() != theirs.unsafe_buffer_pointer()


def test_all_disagreements_in_one_error_with_both_shapes() -> None:
    other = source()
    other["encoder"]["kernel"] = jnp.ones((2, 5))
    with pytest.raises(ZooError) as told:
        begin_from(state(), other, {}, Start(run="runs/other"))
    message = str(told.value)
    assert "encoder/kernel: runs/other has (2, 5), this run (2, 3)" in message
    assert "decoder: runs/other has (5,), this run nothing" in message
    assert "head: runs/other has nothing, this run (3, 4)" in message


def test_a_pattern_that_allows_nothing_is_an_error() -> None:
    with pytest.raises(ZooError, match="pattern 'haed' allows nothing"):
        begin_from(state(), source(), {}, Start(run="other", new=("head", "haed"), unused=("decoder",)))


def test_a_pattern_never_allows_another_shape() -> None:
    other = source()
    other["head"] = jnp.ones((3, 5))
    with pytest.raises(ZooError, match=r"head: other has \(3, 5\), this run \(3, 4\)"):
        begin_from(state(), other, {}, Start(run="other", new=("head",), unused=("decoder",)))


def test_codebooks_begin_where_the_other_run_left_them() -> None:
    ours = dataclasses.replace(state(), collections={"codebooks": {"embedding": jnp.zeros((4, 2))}})
    options = Start(run="other", new=("head",), unused=("decoder",))
    begun = begin_from(ours, source(), {"codebooks": {"embedding": jnp.ones((4, 2))}}, options)
    np.testing.assert_array_equal(begun.collections["codebooks"]["embedding"], np.ones((4, 2)))
    with pytest.raises(ZooError, match=r"codebooks/embedding: other has nothing, this run \(4, 2\)"):
        begin_from(ours, source(), {}, options)
