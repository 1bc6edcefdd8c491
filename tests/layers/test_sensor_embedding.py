"""Sensors as vectors: what they depend on, and what they do not."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from zoo.layers.sensor_embedding import EMBEDDED, SensorEmbedding, described, standard_positions
from zoo.types import Sensors

QUICK = {"xla_backend_optimization_level": 0}


@pytest.fixture
def sensors() -> Sensors:
    """One example: three EEG channels, two magnetometers, two gradiometers."""
    rng = np.random.default_rng(0)
    kind = np.array([[0, 0, 0, 1, 1, 2, 2]], np.int32)
    position = 0.09 * rng.normal(size=(1, 7, 3)).astype(np.float32)
    orientation = np.where((kind > 0)[..., None], position / 0.09, np.nan).astype(np.float32)
    return Sensors(position, orientation, kind, np.full_like(kind, -1), np.ones((1, 7), bool))


def test_the_kinds_are_eeg_and_meg():
    assert EMBEDDED == ("eeg", "mag", "grad")


def test_positions_are_centred_and_scaled_for_eeg_and_for_meg(sensors):
    standard = np.asarray(standard_positions(sensors))
    for group in (slice(0, 3), slice(3, 7)):
        np.testing.assert_allclose(standard[0, group].mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(3 * np.square(standard[0, group]).sum(-1).mean(), 1, rtol=1e-5)
    moved = sensors.replace(position=sensors.position * 0.5 + np.float32(0.03))
    np.testing.assert_allclose(standard_positions(moved), standard, atol=1e-5)


def test_channels_that_are_not_described_do_not_count(sensors):
    valid = np.array([[True, True, False, True, True, True, True]])
    missing = sensors.replace(valid=valid)
    lost = sensors.replace(position=np.where(valid[..., None], sensors.position, np.nan))
    np.testing.assert_array_equal(described(lost), valid)
    np.testing.assert_array_equal(standard_positions(lost), standard_positions(missing))
    assert not np.asarray(standard_positions(lost))[0, 2].any()
    turned = sensors.replace(orientation=np.full_like(sensors.orientation, np.nan))
    np.testing.assert_array_equal(described(turned), sensors.kind == 0)
    other = sensors.replace(kind=np.where(sensors.kind == 1, 3, sensors.kind))
    np.testing.assert_array_equal(described(other), sensors.kind != 1)
    alone = sensors.replace(valid=np.arange(7)[None] == 1)
    np.testing.assert_array_equal(standard_positions(alone), 0)


def test_every_channel_has_a_finite_vector_of_its_own(sensors):
    lost = sensors.replace(position=np.where(np.arange(7)[:, None] == 6, np.nan, sensors.position))
    embedding = SensorEmbedding(16)
    vectors = jax.jit(lambda: embedding.init_with_output(jax.random.key(0), lost)[0]).lower().compile(QUICK)()
    assert np.isfinite(vectors).all()
    distance = np.linalg.norm(vectors[0, :, None] - vectors[0], axis=-1) + np.eye(7)
    assert distance.min() > 1e-3
