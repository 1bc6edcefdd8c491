"""The encoder of codes: what it sees, in any order of channels, a frame at a time, and together with a tokenizer."""

from __future__ import annotations

import dataclasses
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from electrodes import electrodes
from jax.sharding import NamedSharding, PartitionSpec

from zoo.encoders.codes import (
    COLLECTION,
    HIDDEN,
    NONE,
    CodeEncoder,
    TokenizedEncoder,
    compared,
)
from zoo.errors import ZooError
from zoo.layers.mixer import create_mixer
from zoo.registry import create
from zoo.tokenizers.stretches import grid_of, tokenised

QUICK = {"xla_backend_optimization_level": 0}
NAMES = ("F3", "FZ", "F4")
SIZES = (5, 7)
FRAMES = 4
SMALL: dict[str, Any] = {"code_sizes": SIZES, "dim": 16, "mixers": ("softmax",), "mlp": "none"}
BOTH = CodeEncoder(**SMALL)
FORWARD = CodeEncoder(**SMALL, causal=True, time="none")
WOVEN = dataclasses.replace(FORWARD, interleaved=True)


def codes(batch: int = 2, rows: int = len(NAMES), seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, size, (batch, rows * FRAMES)) for size in SIZES], -1).astype(np.int32)


def initial(model: CodeEncoder, *given: Any, **options: Any) -> Any:
    return nn.unbox(jax.jit(partial(model.init, **options), compiler_options=QUICK)(jax.random.key(0), *given))


@cache
def compiled(model: Any, rows: int | None) -> Any:
    return jax.jit(lambda own, *given, **mask: model.apply(own, *given, rows=rows, **mask), compiler_options=QUICK)


def run(model: Any, variables: Any, *given: Any, rows: int | None = None, **mask: Any) -> Any:
    return compiled(model, rows)(variables, *given, **mask)


@pytest.fixture(scope="module")
def both() -> Any:
    return initial(BOTH, codes(), electrodes(NAMES))


@pytest.fixture(scope="module")
def forward() -> Any:
    return initial(FORWARD, codes(), electrodes(NAMES))


def test_the_parameters_are_tables_and_layers():
    dim, hidden, layers = 128, 512, 2
    tables = (256 + 2 + 129) * dim
    layer = 4 * dim**2 + 2 * dim * hidden + hidden + dim + 2 * dim
    variables = jax.eval_shape(create("codes_tiny").init, jax.random.key(0), *create("codes_tiny").example())
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == tables + layers * layer + dim == 444_672


@pytest.mark.parametrize("model", [BOTH, dataclasses.replace(BOTH, code_width=6)], ids=["added", "side_by_side"])
def test_every_code_of_every_token_is_read(model):
    variables, given, sensors = initial(model, codes(), electrodes(NAMES)), codes(), electrodes(NAMES)
    first = run(model, variables, given, sensors)
    assert first.tokens.shape == (2, 12, 16)
    for book, size in enumerate(SIZES):
        other = given.copy()
        other[0, 5, book] = (other[0, 5, book] + 1) % size
        moved = np.abs(run(model, variables, other, sensors).tokens - first.tokens).max((1, 2))
        assert moved[0] > 1e-3
        assert moved[1] == 0


def test_hidden_codes_do_not_matter_and_the_mask_is_those(both):
    given, sensors = codes(), electrodes(NAMES)
    mask = np.random.default_rng(1).random((2, 12)) < 0.5
    found = run(BOTH, both, given, sensors, mask=mask)
    other = np.where(mask[..., None], codes(seed=2), given)
    np.testing.assert_array_equal(run(BOTH, both, other, sensors, mask=mask).tokens, found.tokens)
    hidden = np.where(mask[..., None], HIDDEN, given)
    np.testing.assert_array_equal(run(BOTH, both, hidden, sensors).tokens, found.tokens)
    assert np.abs(run(BOTH, both, given, sensors).tokens - found.tokens).max() > 1e-3


def test_rows_that_are_not_there_are_not_seen(both):
    sensors = electrodes(NAMES)
    given = np.array(codes())
    given[:, 8:] = NONE
    two = sensors.replace(valid=np.broadcast_to([True, True, False], (2, 3)))
    found = run(BOTH, both, given, two, mask=np.ones((2, 12), bool) & (np.arange(12) > 3))
    alone = run(BOTH, both, given[:, :8], electrodes(NAMES[:2]), mask=np.ones((2, 8), bool) & (np.arange(8) > 3))
    np.testing.assert_allclose(found.tokens[:, :8], alone.tokens, atol=1e-5)
    np.testing.assert_allclose(found.pooled, alone.pooled, atol=1e-5)
    np.testing.assert_array_equal(found.valid, np.broadcast_to(np.arange(12) < 8, (2, 12)))
    some = given.copy()
    some[0, 0, 1] = NONE
    assert run(BOTH, both, some, two).valid[0, 0]


@pytest.mark.parametrize("place", ["name", "position"])
def test_channels_may_come_in_any_order(place):
    model = dataclasses.replace(BOTH, place=place)
    given, sensors, order = codes(), electrodes(NAMES), np.array([2, 0, 1])
    variables = initial(model, given, sensors)
    first = run(model, variables, given, sensors)
    moved = jax.tree.map(lambda leaf: leaf[:, order], sensors)
    tokens = given.reshape(2, 3, FRAMES, 2)[:, order].reshape(given.shape)
    again = run(model, variables, tokens, moved)
    np.testing.assert_allclose(
        again.tokens.reshape(2, 3, -1), first.tokens.reshape(2, 3, -1)[:, order], atol=1e-5 * np.abs(first.tokens).max()
    )
    np.testing.assert_allclose(again.pooled, first.pooled, atol=1e-5)
    assert np.abs(run(model, variables, tokens, sensors).pooled - first.pooled).max() > 1e-3


def test_an_unknown_place_is_nan_and_refused(both):
    sensors = electrodes(("F3", "", "F4"))
    assert np.isnan(run(BOTH, both, codes(), sensors).tokens).any()
    with pytest.raises(ZooError, match="no electrode is called ''; a recipe's sensor_names"):
        BOTH.check_sensors(("F3", ""))
    dataclasses.replace(BOTH, place="position").check_sensors(("F3", ""))
    with pytest.raises(ZooError, match="got 3 channels, wanted at most rows 2"):
        dataclasses.replace(BOTH, place="index", rows=2).check_sensors(NAMES)


def test_an_unknown_position_is_refused_where_it_is_read():
    sensors, model = electrodes(NAMES), dataclasses.replace(BOTH, place="position")
    sensors = sensors.replace(position=sensors.position.copy())
    sensors.position[1, 2] = np.nan
    with pytest.raises(ZooError, match="got 1 channels of no known position"):
        model.check_positions(sensors)
    BOTH.check_positions(sensors)
    sensors.valid[1, 2] = False
    model.check_positions(sensors)


def test_rows_need_not_be_channels():
    model = dataclasses.replace(BOTH, place="index", rows=2, time="learned", frames=FRAMES)
    given, sensors = codes(rows=2), electrodes(NAMES)
    variables = initial(model, given, sensors, rows=2)
    first = run(model, variables, given, sensors, rows=2)
    assert first.tokens.shape == (2, 8, 16)
    swapped = np.concatenate([given[:, FRAMES:], given[:, :FRAMES]], 1)
    assert np.abs(run(model, variables, swapped, sensors, rows=2).pooled - first.pooled).max() > 1e-3


def test_causal_rows_are_alone_and_do_not_see_ahead(forward):
    given, sensors = codes(), electrodes(NAMES)
    first = np.asarray(run(FORWARD, forward, given, sensors).tokens).reshape(2, 3, FRAMES, -1)
    other = given.copy()
    other[:, FRAMES + 2] = (other[:, FRAMES + 2] + 1) % 5
    moved = np.abs(np.asarray(run(FORWARD, forward, other, sensors).tokens).reshape(first.shape) - first).max((0, 3))
    assert (moved[1] > 1e-3).tolist() == [False, False, True, True]
    assert moved[1, :2].max() == moved[[0, 2]].max() == 0


def test_interleaved_rows_see_each_others_past(forward):
    given, sensors = codes(), electrodes(NAMES)
    first = np.asarray(run(WOVEN, forward, given, sensors).tokens).reshape(2, 3, FRAMES, -1)
    other = given.copy()
    other[:, FRAMES + 2] = (other[:, FRAMES + 2] + 1) % 5
    moved = np.abs(np.asarray(run(WOVEN, forward, other, sensors).tokens).reshape(first.shape) - first).max((0, 3))
    # The second row's third frame: itself, the row below at that time, all rows after it.
    assert (moved > 1e-4).tolist() == [[False] * 3 + [True], [False] * 2 + [True] * 2, [False] * 2 + [True] * 2]
    assert moved[:, :2].max() == moved[0, 2] == 0
    with pytest.raises(ZooError, match="wanted a causal one"):
        dataclasses.replace(WOVEN, causal=False).init(jax.random.key(0), given, sensors)


def test_stretches_are_tokenised_by_themselves():
    tokenizer = create("mu_law")
    signal, sensors = np.random.default_rng(0).normal(size=(2, 3, 12)).astype(np.float32), electrodes(NAMES)
    signal[1] *= 3
    variables = tokenizer.init(jax.random.key(0), signal, sensors)

    @partial(jax.jit, compiler_options=QUICK)
    def cut(signal: Any, sensors: Any) -> Any:
        return [tokenised(tokenizer, variables, signal, sensors, stretch) for stretch in (0, 3)]

    # Levels are fixed, so that stretches must give what the whole gives, in the same order.
    whole, stretches = cut(signal, sensors)
    np.testing.assert_array_equal(stretches, whole)
    assert grid_of(tokenizer, 3, 12, 4) == tokenizer.grid(3, 12)
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), nn.logical_axis_rules([("batch", "data"), ("tokens", "sequence")]):
        np.testing.assert_array_equal(cut(signal, sensors)[1], whole)
    with pytest.raises(ZooError, match="a window of 12 samples, wanted a multiple of 5"):
        tokenised(tokenizer, variables, signal, sensors, 5)


def test_attention_is_counted_by_what_it_compares():
    def count(name: str, length: int, **options: Any) -> float:
        return compared(create_mixer(name, 64, **options), length)

    assert [count(name, 1000) for name in ("softmax", "kda", "retention")] == [1000, 0, 0]
    assert count("sliding_window", 1000, window=128) == 128
    sparse = {"stride": 16, "selected_blocks": 4, "block_size": 32, "window": 100}
    assert count("native_sparse", 32_000, **sparse) == 2000 + 128 + 100
    assert count("native_sparse", 50, **sparse) == 50


@pytest.mark.parametrize(
    "model",
    [FORWARD, dataclasses.replace(FORWARD, mixers=("linear",), time="sinusoidal"), WOVEN],
    ids=["softmax", "linear", "interleaved"],
)
def test_frame_by_frame_equals_all_at_once(model):
    given, sensors = codes(), electrodes(NAMES)
    variables = initial(model, given, sensors)
    whole = np.asarray(run(model, variables, given, sensors).tokens).reshape(2, 3, FRAMES, -1)

    @partial(jax.jit, compiler_options=QUICK)
    def stepped(variables: Any, frames: Any) -> Any:
        start = frames[:, :, :2].reshape(2, -1, 2)
        tokens, state = model.apply(variables, start, sensors, None, FRAMES, method="prefill")
        found = [tokens[:, :, 0], tokens[:, :, 1]]
        for frame in range(2, FRAMES):
            token, state = model.apply(variables, frames[:, :, frame], sensors, state, method="step")
            found.append(token)
        return jnp.stack(found, 2)

    found = stepped(variables, given.reshape(2, 3, FRAMES, 2))
    np.testing.assert_allclose(found, whole, atol=1e-5 * np.abs(whole).max())


@pytest.mark.slow
def test_eight_devices_give_what_one_does(both):
    given, sensors = codes(8), electrodes(NAMES, 8)

    def loss(params: Any, given: Any, sensors: Any) -> Any:
        out = BOTH.apply({"params": params}, given, sensors)
        return jnp.square(out.tokens).mean() + out.pooled.sum()

    gradient = jax.jit(jax.grad(loss), compiler_options=QUICK)
    one = gradient(both["params"], given, sensors)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        split = jax.device_put((given, sensors), NamedSharding(mesh, PartitionSpec("data")))
        eight = gradient(jax.device_put(both["params"], NamedSharding(mesh, PartitionSpec())), *split)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max())), eight, one)


@pytest.mark.slow
def test_with_a_tokenizer_it_reads_signals():
    tokenizer = create("quantile", vocabulary=5)
    signal = np.random.default_rng(0).normal(size=(2, 3, FRAMES)).astype(np.float32)
    sensors, levels = electrodes(NAMES), tokenizer.fit(signal)
    encoder = dataclasses.replace(BOTH, code_sizes=(5,))
    given = tokenizer.apply(levels, signal, sensors, method="encode")
    variables = initial(encoder, given, sensors)
    joined = TokenizedEncoder(tokenizer, encoder)
    found = jax.jit(joined.apply, compiler_options=QUICK)({**variables, COLLECTION: levels}, signal, sensors)
    np.testing.assert_allclose(found.pooled, run(encoder, variables, given, sensors).pooled, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "given", "says"),
    [
        ({"place": "somewhere"}, {}, "place: got 'somewhere', wanted one of"),
        ({"time": "clock"}, {}, "time: got 'clock', wanted one of"),
        ({"code_sizes": ()}, {}, r"code_sizes: got \(\)"),
        ({"code_sizes": (5,)}, {}, "got codes of 2 codebooks, wanted 1"),
        ({}, {"rows": 5}, "got 12 tokens, wanted a multiple of the 5 rows"),
        ({}, {"rows": 2}, "got 2 rows that are not channels, wanted 'index'"),
        ({"place": "index", "rows": 2}, {}, "got 3 rows, wanted at most 2"),
        ({"time": "learned", "frames": 3}, {}, "got 4 frames, wanted at most 3"),
    ],
)
def test_what_it_cannot_take_is_refused(options, given, says):
    model = dataclasses.replace(BOTH, **options)
    with pytest.raises(ZooError, match=says):
        jax.eval_shape(partial(model.init, **given), jax.random.key(0), codes(), electrodes(NAMES))
