"""MEG-GPT: what each step sees, that no guess hangs on what comes later, and the sessions' embeddings."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

import zoo
from zoo.encoders.meg_gpt import visible
from zoo.errors import ZooError

QUICK = {"xla_backend_optimization_level": 0}
"""Compilation takes longer than these small programs run."""
SMALL: dict[str, Any] = {
    "channels": 2, "layers": ((24, 1), (4, 4), (3, 4)), "steps": 6, "dim": 16, "hidden": 8, "band": 5, "subjects": 3,
}  # fmt: skip


def test_a_step_sees_patches_that_end_at_it_or_before():
    """Of the released layers, in steps of the window: row r of the last A is step T - A + r, patch i ends at 4i + 3."""
    sees = visible(25, 4, 80, None)
    ends, step = 4 * np.arange(25) + 3, 20 + np.arange(80)[:, None]
    np.testing.assert_array_equal(sees, ends <= step)
    band = visible(100, 1, 100, 8)
    apart = np.arange(100)[:, None] - np.arange(100)
    np.testing.assert_array_equal(band, (apart >= 0) & (apart <= 8))


@pytest.fixture(scope="module")
def small() -> Any:
    encoder = zoo.create("meg_gpt_tiny", **SMALL)
    codes = np.random.default_rng(0).integers(0, 256, (2, 2, 24))
    who = np.array([0, 2])
    init = jax.jit(lambda key: encoder.init(key, codes, subject=who, method="read"), compiler_options=QUICK)
    variables = init(jax.random.key(0))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def read(codes: Any, who: Any) -> Any:
        return encoder.apply(variables, codes, subject=who, method="read")

    return read, codes, who


def test_no_token_hangs_on_what_comes_later_or_on_another_channel(small):
    read, codes, who = small
    before = np.asarray(read(codes, who))
    assert before.shape == (2, 2, 6, 16)
    for step in (18, 20, 23):
        other = codes.copy()
        other[:, 0, step] = (other[:, 0, step] + 7) % 256
        changed = np.abs(np.asarray(read(other, who)) - before).max((0, 3)) > 1e-6
        first = step - 18
        assert not changed[0, :first].any()
        assert changed[0, first]
        assert not changed[1].any()


def test_a_session_has_an_embedding_of_its_own(small):
    read, codes, _ = small
    same, other, *unknown = (np.asarray(read(codes[:1].repeat(2, 0), np.array([0, n]))) for n in (0, 1, 3, -1))
    np.testing.assert_array_equal(same[0], same[1])
    assert np.abs(other[0] - other[1]).max() > 1e-3
    assert all(np.isnan(each[1]).all() for each in unknown)


def test_what_does_not_fit_is_refused():
    signal = np.zeros((2, 2, 24), np.float32)
    sensors = zoo.create("meg_gpt_tiny", channels=2).example()[1]
    sensors = jax.tree.map(lambda leaf: np.repeat(leaf, 2, axis=0), sensors)
    who = {"subject": np.array([0, 1])}
    for options, more, says in (
        ({}, {}, "got no subject, wanted whose session"),
        ({"subjects": 0}, who, "got a subject, wanted none"),
        ({}, {**who, "mask": np.zeros((2, 12), bool)}, "hides no tokens"),
        ({"steps": 30}, who, "layers that read what the one before gives"),
        ({"codes": 50}, who, "codes: got 50 for a tokenizer of"),
        ({"layers": ((20, 1),)}, who, "wants windows of 20 samples, got 24"),
    ):
        with pytest.raises(ZooError, match=says):
            zoo.create("meg_gpt_tiny", **{**SMALL, **options}).init(jax.random.key(0), signal, sensors, **more)
