"""Spatial attention: what weights sensors get, and where they are laid out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from electrodes import electrodes

from zoo.errors import ZooError
from zoo.layers.spatial_attention import MARGIN, SpatialAttention, check_placed, flattened, placed, spanning, waves

NAMES = ("FP1", "FP2", "C3", "CZ", "C4", "O1", "O2", "PZ")


def recording() -> tuple[Any, Any]:
    """Eight electrodes on the upper half of a head; one of the second example is missing, another's place unknown."""
    rng = np.random.default_rng(0)
    position = rng.normal(size=(2, 8, 3))
    position[..., 2] = np.abs(position[..., 2])
    position *= 0.09 / np.linalg.norm(position, axis=-1, keepdims=True)
    position[1, 3] = np.nan
    sensors = electrodes(NAMES)
    sensors.valid[1, 0] = False
    return jnp.asarray(rng.normal(size=(2, 8, 5)), jnp.float32), sensors.replace(position=position.astype(np.float32))


def weights(train: bool = False, seed: int = 0) -> np.ndarray:
    layer, (signal, sensors) = SpatialAttention(6, 4), recording()
    variables = layer.init(jax.random.key(0), signal, sensors)
    rngs = {"dropout": jax.random.key(seed)}
    out, kept = layer.apply(variables, signal, sensors, train=train, mutable=["intermediates"], rngs=rngs)
    (found,) = kept["intermediates"]["weights"]
    np.testing.assert_allclose(out, np.einsum("boc,bct->bto", found, np.asarray(signal)), atol=1e-6)
    return np.asarray(found)


def test_weights_are_shares_of_the_sensors_that_are_there():
    found = weights()
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    assert (found[1, :, [0, 3]] == 0).all()
    assert (found[0] > 0).all()


def test_training_hides_the_sensors_of_a_disc():
    _, sensors = recording()
    place = np.asarray(spanning(flattened(sensors.position), placed(sensors)))
    hidden = []
    for seed in range(5):
        found = weights(train=True, seed=seed)
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
        hidden.append((found[0] == 0).all(0))
    # What is hidden fits in a disc of that radius.
    for each in filter(np.any, hidden):
        points = place[0][each]
        assert np.linalg.norm(points[:, None] - points, axis=-1).max() <= 0.4
    assert len({tuple(each) for each in hidden}) > 1


def test_no_sensor_at_all_gives_silence():
    signal, sensors = recording()
    layer = SpatialAttention(6, 4)
    variables = layer.init(jax.random.key(0), signal, sensors)
    nothing = sensors.replace(valid=np.zeros_like(sensors.valid))
    grads = jax.grad(lambda variables: layer.apply(variables, signal, nothing).sum())(variables)
    assert not np.asarray(layer.apply(variables, signal, nothing)).any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_the_head_is_flattened_as_mne_lays_it_out():
    mne = pytest.importorskip("mne")
    names = ["Fp1", "Fp2", "F7", "F8", "Cz", "C3", "C4", "T7", "T8", "O1", "Oz"]
    info = mne.create_info(names, 100.0, "eeg").set_montage("easycap-M1")
    layout = mne.find_layout(info).pos[:, :2]
    span = layout.max(0) - layout.min(0)
    position = np.array([[each["loc"][:3] for each in info["chs"]]], np.float32)
    ours = spanning(flattened(position), jnp.ones((1, len(names)), bool))
    np.testing.assert_allclose(ours[0], (layout - layout.min(0)) / span, atol=1e-4)


def test_waves_are_products_of_every_frequency_with_the_place():
    place = np.random.default_rng(0).uniform(size=(1, 2, 3)).astype(np.float32)
    found = np.asarray(waves(jnp.asarray(place), 3))
    phase = [
        2 * np.pi * (np.array([i, j, k]) @ (place[0, 1] + MARGIN)) / (1 + 2 * MARGIN)
        for i in range(3)
        for j in range(3)
        for k in range(3)
    ]
    np.testing.assert_allclose(found[0, 1], [*np.cos(phase), *np.sin(phase)], atol=1e-5)


def test_a_sensor_of_unknown_place_is_refused_on_the_host():
    _, sensors = recording()
    with pytest.raises(ZooError, match=r"SimpleConv: channel 3 of example 1 \(1 in all\) has no known position"):
        check_placed("SimpleConv", sensors)
    check_placed("SimpleConv", sensors.replace(valid=np.isfinite(sensors.position).all(-1)))


@pytest.mark.parametrize(("options", "says"), [({"axes": 1}, "axes: got 1"), ({"radius": 1.0}, "radius: got 1.0")])
def test_bad_options_are_refused(options, says):
    with pytest.raises(ZooError, match=says):
        jax.eval_shape(SpatialAttention(2, 2, **options).init, jax.random.key(0), *recording())
