"""Fixed levels: where their edges lie, and how far a sample can be from the level that stands for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import zoo
from zoo.errors import ZooError
from zoo.types import Sensors

NAMES = ("mu_law", "quantile")


def sensors(examples: int, channels: int) -> Sensors:
    blank, none = np.full((examples, channels, 3), np.nan, np.float32), np.zeros((examples, channels), np.int32)
    return Sensors(blank, blank, none, none, np.ones((examples, channels), bool))


def data(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(4, 3, 200)).astype(np.float32)


def round_trip(tokenizer: Any, variables: Any, signal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out = tokenizer.apply(variables, signal, sensors(*signal.shape[:2]))
    return np.asarray(out.codes)[..., 0].reshape(signal.shape), np.asarray(out.reconstruction)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_off_by_at_most_half_its_level(name):
    tokenizer = zoo.create(name)
    variables = tokenizer.fit(data())
    edges = np.asarray(variables["levels"]["edges"])
    codes, rebuilt = round_trip(tokenizer, variables, data())
    inner = (codes > 0) & (codes < tokenizer.vocabulary - 1)
    width = np.diff(edges)[np.clip(codes - 1, 0, len(edges) - 2)]
    # The centre of a mu-law level is the middle in companded space, which lies nearer to zero.
    share = 0.5 if name == "quantile" else 0.51
    assert (np.abs(rebuilt - data())[inner] <= share * width[inner] + 1e-6).all()
    assert inner.mean() > 0.98


@pytest.mark.parametrize("name", NAMES)
def test_what_lies_beyond_the_training_data_decodes_to_its_extremes(name):
    tokenizer = zoo.create(name)
    variables = tokenizer.fit(data())
    codes, rebuilt = round_trip(tokenizer, variables, np.array([[[-100.0, 100.0]]], np.float32))
    np.testing.assert_array_equal(codes.ravel(), [0, tokenizer.vocabulary - 1])
    low, high = (-np.abs(data()).max(), np.abs(data()).max()) if name == "mu_law" else (data().min(), data().max())
    np.testing.assert_allclose(rebuilt.ravel(), [low, high], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_extremes_of_the_training_data_are_outer_tokens(name):
    tokenizer = zoo.create(name)
    codes, _ = round_trip(tokenizer, tokenizer.fit(data()), data())
    largest = np.argmax(np.abs(data()) if name == "mu_law" else data())
    sign = np.sign(data().ravel()[largest])
    assert codes.ravel()[largest] == (tokenizer.vocabulary - 1 if sign > 0 else 0)


@pytest.mark.parametrize("name", NAMES)
def test_codes_of_what_was_decoded_are_the_codes(name):
    tokenizer = zoo.create(name)
    variables = tokenizer.fit(data())
    codes, rebuilt = round_trip(tokenizer, variables, data(1))
    np.testing.assert_array_equal(round_trip(tokenizer, variables, rebuilt)[0], codes)


def test_quantiles_hold_equal_shares():
    tokenizer = zoo.create("quantile", vocabulary=12)
    codes, _ = round_trip(tokenizer, tokenizer.fit(data()), data())
    counts = np.bincount(codes.ravel(), minlength=12)
    np.testing.assert_array_equal(counts[[0, -1]], 1)
    # The outer tokens take one each, and an edge is a sample, which falls above it.
    np.testing.assert_allclose(counts[1:-1], 240, atol=2)


def test_mu_law_levels_are_finer_near_zero():
    tokenizer = zoo.create("mu_law")
    widths = np.diff(np.asarray(tokenizer.fit(data())["levels"]["edges"]))
    middle = np.argmin(widths)
    assert abs(middle - len(widths) // 2) <= 1
    # By the definition: the widest to the narrowest, 1 + mu to 1, over whole levels.
    assert 200 < widths.max() / widths.min() < 256


@pytest.mark.parametrize("name", NAMES)
def test_levels_follow_the_unit_of_the_data(name):
    """Volts instead of microvolts: the same codes."""
    tokenizer = zoo.create(name)
    codes, rebuilt = round_trip(tokenizer, tokenizer.fit(data()), data(1))
    small, rebuilt_small = round_trip(tokenizer, tokenizer.fit(data() * 2.0**-20), data(1) * np.float32(2.0**-20))
    np.testing.assert_array_equal(small, codes)
    np.testing.assert_allclose(rebuilt_small * 2.0**20, rebuilt, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_channels_that_are_not_valid_do_not_count_in_the_fit(name):
    tokenizer = zoo.create(name)
    spoiled, valid = data(), np.ones((4, 3), bool)
    spoiled[:, 2], valid[:, 2] = 1e6, False
    np.testing.assert_array_equal(
        tokenizer.fit(spoiled, valid)["levels"]["edges"], tokenizer.fit(data()[:, :2])["levels"]["edges"]
    )


@pytest.mark.parametrize(
    ("options", "signal", "says"),
    [
        ({"vocabulary": 3}, data(), "vocabulary: got 3, wanted at least 4"),
        ({}, np.full((1, 1, 9), np.nan), "wanted finite ones that vary"),
        ({}, np.ones((1, 1, 9)), "wanted finite ones that vary"),
        ({}, np.ones((0, 1, 9)), "got 0 samples"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_fitted_is_refused(name, options, signal, says):
    tokenizer = zoo.create(name, **options)
    with pytest.raises(ZooError, match=says):
        round_trip(tokenizer, tokenizer.fit(signal), data())
