"""BrainTokenizer: sizes of the paper, and what its codes do and do not depend on."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.errors import ZooError
from zoo.tokenizers.brainomni import BrainTokenizer, _kept
from zoo.types import Sensors

QUICK = {"xla_backend_optimization_level": 0}
SMALL: dict[str, Any] = {"window": 32, "filters": 4, "ratios": (4,), "dim": 16, "heads": 2, "latents": 4}
SMALL |= {"codes": 12, "levels": 2, "restart_below": 0.0}
KINDS = (0, 0, 0, 0, 1, 1, 2, 2)
VOLTS = np.array([2e-5, 1e-12, 1e-11])


def recording(batch: int = 2, windows: int = 2) -> tuple[np.ndarray, Sensors]:
    """Waves of four EEG channels, two magnetometers and two gradiometers, in their units."""
    rng = np.random.default_rng(0)
    kind = np.broadcast_to(np.array(KINDS, np.int32), (batch, len(KINDS)))
    time = np.arange(32 * windows) * rng.uniform(0.1, 1.0, (batch, len(KINDS), 1))
    signal = (np.sin(time) + 0.2 * rng.normal(size=time.shape)) * VOLTS[kind][..., None]
    position = 0.09 * rng.normal(size=(*kind.shape, 3))
    orientation = np.where((kind > 0)[..., None], position / 0.09, np.nan)
    sensors = Sensors(*(each.astype(np.float32) for each in (position, orientation)), kind, kind - kind - 1, kind >= 0)
    return signal.astype(np.float32), sensors


@pytest.fixture(scope="module")
def variables() -> Any:
    """Of the small tokenizer, its codes spread over the sphere that its latents lie on."""
    made = jax.jit(lambda: nn.unbox(BrainTokenizer(**SMALL).init(jax.random.key(0), *recording(1)))).lower()
    found = made.compile(QUICK)()
    codes = np.random.default_rng(1).normal(size=(2, 12, 16)).astype(np.float32)
    codes *= np.array([1.0, 0.5])[:, None, None] / np.linalg.norm(codes, axis=-1, keepdims=True)
    book = {**found["codebooks"]["quantizer"]["book"], "embedding": codes, "ready": np.ones(2, bool)}
    return {"params": found["params"], "codebooks": {"quantizer": {"book": book}}}


def applied(variables: Any, *given: Any, method: str = "__call__", **options: Any) -> Any:
    tokenizer = BrainTokenizer(**{**SMALL, **options})
    run = jax.jit(lambda variables, *given: tokenizer.apply(variables, *given, method=method))
    return run.lower(variables, *given).compile(QUICK)(variables, *given)


def test_the_parts_have_the_published_sizes():
    base = zoo.create("braintokenizer_base")
    params = nn.unbox(jax.eval_shape(base.init, jax.random.key(0), *base.example()))["params"]
    size = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()}
    assert size.pop("sensor_embedding") == 560_512
    encoder = ("encoder", "neurons", "to_key", "to_value", "to_latents")
    assert sum(size.pop(name) for name in encoder) == 2_247_104
    assert sum(size.values()) == 2_242_722


@pytest.mark.parametrize(("overlap", "frames"), [(0.0, 16), (0.25, 24)])
def test_four_seconds_are_sixteen_latents_of_so_many_frames_of_four_codes(overlap, frames):
    base = zoo.create("braintokenizer_base", overlap=overlap)
    _, sensors = base.example()
    signal = np.zeros((1, 1, 1024), np.float32)
    assert base.grid(1, 1024) == (16, frames)
    out = jax.eval_shape(lambda: base.init_with_output(jax.random.key(0), signal, sensors))[0]
    assert out.codes.shape == (1, 16 * frames, 4)
    assert out.reconstruction.shape == signal.shape


@pytest.mark.parametrize("channels", [1, 3])
def test_any_number_of_channels_will_do(variables, channels):
    signal, sensors = recording()
    sensors = jax.tree.map(lambda leaf: leaf[:, :channels], sensors)
    out = applied(variables, signal[:, :channels], sensors)
    assert np.isfinite(out.reconstruction).all()
    assert (np.asarray(out.reconstruction).std(-1) > 0).all()


@pytest.mark.slow
def test_what_all_channels_of_a_kind_share_is_not_read(variables):
    signal, sensors = recording()
    drift = np.linspace(-1, 1, signal.shape[-1]) * 1e-4 * (sensors.kind == 0)[..., None]
    a, b = (applied(variables, each, sensors) for each in (signal, (signal + drift).astype(np.float32)))
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_allclose(a.reconstruction, b.reconstruction, atol=1e-9)


@pytest.mark.slow
def test_units_do_not_matter_when_floors_are_in_them(variables):
    signal, sensors = recording()
    a = applied(variables, signal, sensors)
    floors = tuple(1e6 * floor for floor in BrainTokenizer.floors)
    b = applied(variables, signal * np.float32(1e6), sensors, floors=floors)
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_allclose(a.reconstruction * 1e6, b.reconstruction, rtol=1e-3, atol=1e-5 * 1e-5)


@pytest.mark.slow
def test_unknown_places_are_refused_and_otherwise_left_out(variables):
    tokenizer = BrainTokenizer(**SMALL)
    signal, sensors = recording()
    tokenizer.check_positions(sensors)
    position = sensors.position.copy()
    position[1, 2] = np.nan
    lost = sensors.replace(position=position)
    with pytest.raises(ZooError, match=r"channel 2 of example 1 \(1 in all\) is not of eeg, mag, grad, or without"):
        tokenizer.check_positions(lost)
    tokenizer.check_positions(lost.replace(valid=np.isfinite(position).all(-1)))
    missing = sensors.replace(valid=np.isfinite(position).all(-1))
    a, b = (applied(variables, signal, each) for each in (lost, missing))
    np.testing.assert_array_equal(a.codes, b.codes)
    assert np.isfinite(a.reconstruction).all()
    assert not np.asarray(a.reconstruction)[1, 2].any()


def test_training_removes_a_quarter_of_the_channels_but_never_all():
    valid = np.arange(9) < np.array([0, 1, 2, 5, 8, 9])[:, None]

    def kept(removed: float) -> np.ndarray:
        return np.asarray(_kept(jax.random.key(3), jnp.asarray(valid), removed))

    assert kept(0.25).sum(1).tolist() == [0, 1, 1, 4, 6, 7]
    assert kept(0.0).sum(1).tolist() == [0, 1, 2, 5, 8, 9]
    assert not (kept(0.25) & ~valid).any()


def test_removed_channels_are_not_encoded_but_reconstructed(variables):
    _, sensors = recording()
    tokenizer = BrainTokenizer(**SMALL)
    there = jnp.asarray(np.arange(len(KINDS)) != 1)[None].repeat(2, 0)

    @jax.jit
    def both(signal: Any) -> Any:
        def run(self: BrainTokenizer) -> Any:
            embedding = self.sensor_embedding(sensors)
            latents = self._latents(signal, embedding, there)
            return latents, self._drawn(latents, embedding)

        return tokenizer.apply(variables, method=run)

    windows = np.random.default_rng(2).normal(size=(2, len(KINDS), 2, 32)).astype(np.float32)
    other = windows.copy()
    other[:, 1] = 3.0
    (a, drawn), (b, _) = both(windows), both(other)
    np.testing.assert_array_equal(a, b)
    assert (np.asarray(drawn)[:, 1].std(-1) > 0).all()


def test_in_training_the_rotated_value_is_that_of_the_codes(variables):
    signal, sensors = recording()
    tokenizer = BrainTokenizer(**SMALL)
    rngs = {"codes": jax.random.key(0), "noise": jax.random.key(1)}

    def run(variables: Any, signal: Any, sensors: Any) -> Any:
        out, _ = tokenizer.apply(variables, signal, sensors, train=True, mutable=["codebooks"], rngs=rngs)
        return out.quantized, tokenizer.apply(
            variables, out.codes, method=lambda self, codes: self.quantizer.decode(codes)
        )

    rotated, value = jax.jit(run).lower(variables, signal, sensors).compile(QUICK)(variables, signal, sensors)
    np.testing.assert_allclose(rotated, value, atol=1e-6)


@pytest.mark.parametrize(("overlap", "samples", "windows"), [(0.0, 64, 2), (0.25, 70, 3), (0.5, 64, 3)])
def test_windows_come_together_again_as_the_signal(overlap, samples, windows):
    tokenizer = BrainTokenizer(**SMALL, overlap=overlap)
    signal, sensors = recording(windows=3)
    signal = signal[..., :samples]
    cut, size = tokenizer._windowed(signal, sensors)
    assert cut.shape[2:] == (windows, 32)
    scale = {"deviation": jnp.broadcast_to(size, cut.shape[:3]), "mean": jnp.zeros(cut.shape[:3])}
    joined = np.asarray(tokenizer._joined(cut, jnp.asarray(sensors.valid), scale))
    assert not joined[..., samples:].any()
    for kind in range(3):
        group = signal[:, sensors.kind[0] == kind]
        again = joined[:, sensors.kind[0] == kind, :samples]
        np.testing.assert_allclose(again, group - group.mean(1, keepdims=True), atol=1e-5 * VOLTS[kind])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"overlap": 1.0}, "overlap: got 1.0, wanted 0 or more, below 1"),
        ({"removed": -0.1}, "removed: got -0.1, wanted 0 or more, below 1"),
        ({"heads": 3}, "dim: got 16, wanted a multiple of twice its 3 heads"),
        ({"window": 34}, "got 34 samples, wanted a multiple of 4, at least 12"),
    ],
)
def test_options_it_cannot_take_are_refused(options, says):
    with pytest.raises(ZooError, match=says):
        BrainTokenizer(**{**SMALL, **options}).init(jax.random.key(0), *recording(1))


def test_with_overlap_any_length_from_a_window_on_will_do():
    tokenizer = BrainTokenizer(**SMALL, overlap=0.25)
    assert tokenizer.grid(3, 33) == (4, 16)
    with pytest.raises(ZooError, match="got a signal of 31 samples, wanted at least 32"):
        tokenizer.grid(3, 31)
