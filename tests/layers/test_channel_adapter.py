"""Channel adapters: interpolation against MNE's, learned maps, and encoders behind them."""

from __future__ import annotations

from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import mne
import numpy as np
import pytest
from electrodes import electrodes
from jax.sharding import NamedSharding, PartitionSpec

from zoo.data.electrodes import template
from zoo.encoders.adapted import Adapted
from zoo.errors import ZooError
from zoo.layers.channel_adapter import ChannelAdapter, spline_matrix
from zoo.registry import create
from zoo.sensors import KINDS, NAMES
from zoo.types import Sensors

QUICK = {"xla_backend_optimization_level": 0}
TARGETS = ("F3", "CZ", "P4", "T7")
SAMPLES = 50


@cache
def measured() -> np.ndarray:
    """Positions of 32 electrodes of a head that is no sphere, at places between the template's."""
    rng = np.random.default_rng(0)
    position, _ = template(NAMES[:80:3])
    return (position + rng.normal(scale=0.006, size=position.shape)).astype(np.float32)


def sensors_at(position: np.ndarray, batch: int = 2) -> Sensors:
    return electrodes(("",) * len(position), batch).replace(  # type: ignore[attr-defined]
        position=np.broadcast_to(position, (batch, *position.shape)).copy()
    )


def waves(position: np.ndarray) -> np.ndarray:
    """Smooth potentials over the head [C, T]."""
    directions = np.random.default_rng(1).normal(size=(3, SAMPLES))
    return np.sin(20 * position @ directions + np.arange(SAMPLES))


def by_mne(signal: np.ndarray, position: np.ndarray) -> np.ndarray:
    """MNE's interpolation of bad channels, where the outputs are bad."""
    place, centre = template(TARGETS)
    system = np.column_stack([2 * position, np.ones(len(position))]).astype(float)
    own = np.linalg.lstsq(system, np.square(position.astype(float)).sum(1), rcond=None)[0][:3]
    everywhere = np.concatenate([position - own, place - centre])
    names = [f"C{number}" for number in range(len(everywhere))]
    montage = mne.channels.make_dig_montage(dict(zip(names, everywhere, strict=True)), coord_frame="head")
    raw = mne.io.RawArray(
        np.concatenate([signal, np.zeros((len(TARGETS), SAMPLES))]),
        mne.create_info(names, 100.0, "eeg"),
        verbose="error",
    )
    raw.set_montage(montage)
    raw.info["bads"] = names[len(position) :]
    raw.interpolate_bads(origin=(0, 0, 0), method="spline", verbose="error")
    return raw.get_data()[len(position) :]


@pytest.fixture(scope="module")
def interpolated() -> Any:
    adapter = ChannelAdapter("interpolate", TARGETS)
    return jax.jit(lambda signal, sensors: adapter.apply({}, signal, sensors), compiler_options=QUICK)


def test_interpolation_is_that_of_mne(interpolated: Any) -> None:
    position = measured()
    sensors = sensors_at(position)
    sensors.valid[1, 4:9] = False
    signal = np.tile(waves(position), (2, 1, 1)).astype(np.float32)
    signal[1, 4:9] = np.nan
    found, outputs = interpolated(signal, sensors)
    wanted = by_mne(signal[0].astype(float), position)
    # float32 against a system whose condition is about 1e5
    np.testing.assert_allclose(found[0], wanted, atol=2e-3 * np.abs(wanted).max())
    rest = np.delete(np.arange(len(position)), np.arange(4, 9))
    wanted = by_mne(signal[1, rest].astype(float), position[rest])
    np.testing.assert_allclose(found[1], wanted, atol=2e-3 * np.abs(wanted).max())
    assert [NAMES[index] for index in np.asarray(outputs.name)[0]] == list(TARGETS)
    np.testing.assert_allclose(outputs.position[0], template(TARGETS)[0], atol=1e-6)
    assert outputs.valid.all()


def test_order_of_electrodes_and_what_is_no_scalp_electrode_do_not_matter(interpolated: Any) -> None:
    position = measured()
    signal = np.tile(waves(position), (2, 1, 1)).astype(np.float32)
    sensors = sensors_at(position)
    sensors.kind[0, 3], sensors.position[0, 7] = KINDS.index("ecog"), np.nan
    first, _ = interpolated(signal, sensors)
    order = np.random.default_rng(0).permutation(len(position))
    again, _ = interpolated(signal[:, order], jax.tree.map(lambda leaf: leaf[:, order], sensors))
    np.testing.assert_allclose(again, first, atol=2e-3)
    signal[0, [3, 7]] = 1e6
    np.testing.assert_allclose(interpolated(signal, sensors)[0], first, atol=1e-6)


@pytest.mark.slow
def test_devices_solve_for_their_own_examples() -> None:
    adapted = Adapted(create("eegnet_tiny", channels=TARGETS), ChannelAdapter("interpolate", TARGETS))
    position = measured()
    sensors = sensors_at(position, batch=8)
    signal = np.random.default_rng(0).normal(size=(8, len(position), 64)).astype(np.float32)
    variables = nn.unbox(jax.jit(adapted.init, compiler_options=QUICK)(jax.random.key(0), signal, sensors))
    pooled = jax.jit(lambda *given: adapted.apply(*given).pooled, compiler_options=QUICK)
    one = pooled(variables, signal, sensors)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), nn.logical_axis_rules((("batch", "data"),)):
        split = jax.device_put((signal, sensors), NamedSharding(mesh, PartitionSpec("data")))
        eight = pooled(jax.device_put(variables, NamedSharding(mesh, PartitionSpec())), *split)
    np.testing.assert_allclose(eight, one, atol=5e-3 * np.abs(one).max())


def test_weights_sum_to_one_and_an_electrode_at_the_place_is_the_output() -> None:
    position, _ = template(NAMES[:80])
    matrix = jax.jit(lambda *given: spline_matrix(*given, TARGETS), compiler_options=QUICK)
    weights = np.asarray(matrix(jnp.float32(position)[None], jnp.ones((1, 80), bool)))[0]
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-3)
    assert [NAMES[column] for column in weights.argmax(1)] == list(TARGETS)
    nobody = matrix(jnp.full((1, 80, 3), jnp.nan), jnp.zeros((1, 80), bool))
    np.testing.assert_array_equal(nobody, 0)


def test_a_learned_map_keeps_its_norm() -> None:
    adapter = ChannelAdapter("learned", 3, ("F3", "FZ", "F4", "CZ"), max_norm=0.5)
    signal, sensors = np.random.default_rng(0).normal(size=(2, 4, 9)).astype(np.float32), electrodes(TARGETS)
    variables = nn.unbox(adapter.init(jax.random.key(0), signal, sensors))
    kernel, bias = np.asarray(variables["params"]["mix"]["kernel"])[0], np.asarray(variables["params"]["mix"]["bias"])
    kernel = kernel * np.minimum(1, 0.5 / np.linalg.norm(kernel, axis=0))
    found, outputs = adapter.apply(variables, signal, sensors)
    np.testing.assert_allclose(found, np.einsum("bct,ce->bet", signal, kernel) + bias[:, None], atol=1e-5)
    assert outputs.valid.shape == (2, 3)
    with pytest.raises(ZooError, match="got 3 channels, wanted 4"):
        adapter.apply(variables, signal[:, :3], electrodes(TARGETS[:3]))


@pytest.mark.slow
def test_an_encoder_for_one_montage_takes_another_behind_an_adapter() -> None:
    encoder = create("eegnet_tiny", channels=TARGETS)
    adapted = Adapted(encoder, ChannelAdapter("interpolate", TARGETS))
    position = measured()
    signal = np.tile(waves(position)[:, :1], (2, 1, encoder.samples)).astype(np.float32)
    signal += np.random.default_rng(0).normal(size=(2, 1, encoder.samples)).astype(np.float32)
    sensors = sensors_at(position)
    variables = nn.unbox(jax.jit(adapted.init, compiler_options=QUICK)(jax.random.key(0), signal, sensors))
    encoded = jax.jit(adapted.apply, compiler_options=QUICK)(variables, signal, sensors)
    led, outputs = ChannelAdapter("interpolate", TARGETS).apply({}, signal, sensors)
    inner = {name: value["encoder"] for name, value in variables.items()}
    alone = jax.jit(encoder.apply, compiler_options=QUICK)(inner, led, outputs)
    # Two compilations of one float32 solution differ as much as either from the true one.
    np.testing.assert_allclose(encoded.pooled, alone.pooled, atol=2e-3 * np.abs(alone.pooled).max())
    adapted.check_recording(128.0, ("eeg",) * 3, ("", "A7", ""))
    adapted.check_positions(sensors)
    with pytest.raises(ZooError, match="no EEG channel with a known position"):
        adapted.check_positions(jax.tree.map(lambda leaf: leaf, sensors).replace(position=sensors.position * np.nan))
    shapes = jax.eval_shape(adapted.init, jax.random.key(0), *adapted.example())
    assert jax.tree.map(jnp.shape, nn.unbox(shapes)) == jax.tree.map(jnp.shape, variables)


def test_what_an_adapter_cannot_lead_to_is_refused() -> None:
    signal, sensors = np.zeros((2, 4, 9), np.float32), electrodes(TARGETS)
    with pytest.raises(ZooError, match="got 'spherical', wanted one of identity, learned, interpolate"):
        ChannelAdapter("spherical").apply({}, signal, sensors)
    with pytest.raises(ZooError, match="wanted names of electrodes"):
        ChannelAdapter("interpolate", 4).apply({}, signal, sensors)
    with pytest.raises(ZooError, match="electrode 'FP1-F7' has no place"):
        ChannelAdapter("interpolate", ("FP1-F7",)).apply({}, signal, sensors)
    mistaken = Adapted(create("eegnet_tiny", channels=("F3", "FZ")), ChannelAdapter("interpolate", ("F3",)))
    with pytest.raises(ZooError, match="behind a channel adapter: wanted channels F3, FZ"):
        mistaken.check_recording(128.0, ("eeg",), ("",))
