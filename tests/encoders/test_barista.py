"""BaRISTA: its counts, where electrodes are, what convolutions and attention see, and its pretraining."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.errors import ZooError
from zoo.objectives.barista import MaskedGroups, groups_hidden
from zoo.sensors import KINDS
from zoo.types import Sensors

QUICK = {"xla_backend_optimization_level": 0}
"""Compilation takes longer than these small programs run."""
SMALL: dict[str, Any] = {"segment": 32, "depth": 1, "dim": 8, "heads": 2, "hidden": 8}


def electrodes_at(position: np.ndarray) -> Sensors:
    kind = np.full(position.shape[:2], KINDS.index("seeg"), np.int32)
    nowhere = np.full_like(position, np.nan)
    return Sensors(position, nowhere, kind, np.full_like(kind, -1), np.ones(kind.shape, bool))


def recording() -> tuple[np.ndarray, Sensors]:
    rng = np.random.default_rng(0)
    position = rng.uniform(-0.09, 0.09, (2, 3, 3)).astype(np.float32)
    return rng.standard_normal((2, 3, 64)).astype(np.float32), electrodes_at(position)


def test_counts_are_the_published():
    """The released checkpoints count 839,240 to 869,896, of which 12 times 8 are rates of rotation."""
    for name, wanted in (("barista_base", 869_896), ("barista_parcels", 839_240)):
        encoder = zoo.create(name)
        params = jax.eval_shape(encoder.init, jax.random.key(0), *encoder.example())["params"]
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) + 96 == wanted


@pytest.fixture(scope="module")
def small() -> Any:
    encoder = zoo.create("barista_tiny", **SMALL)
    signal, sensors = recording()
    mask = np.random.default_rng(1).random((2, 3, 2)) < 0.5
    init = jax.jit(lambda key: encoder.init(key, signal, sensors, mask=mask), compiler_options=QUICK)
    variables = init(jax.random.key(0))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(signal: Any, sensors: Any, mask: Any) -> Any:
        return encoder.apply(variables, signal, sensors, mask=mask).tokens.reshape(2, 3, 2, 8)

    return run, mask


def test_tokens_move_with_their_electrodes(small):
    run, mask = small
    signal, sensors = recording()
    order = np.array([2, 0, 1])
    moved = run(signal[:, order], jax.tree.map(lambda leaf: leaf[:, order], sensors), mask[:, order])
    np.testing.assert_allclose(moved, run(signal, sensors, mask)[:, order], atol=1e-5)


def test_a_place_is_known_to_the_millimetre_and_hidden_segments_are_not_read(small):
    run, mask = small
    signal, sensors = recording()
    near = np.floor(sensors.position * 1000) / 1000 + 0.0004
    there, beside = (electrodes_at((near + shift).astype(np.float32)) for shift in (0.0002, 0.001))
    tokens = run(signal, sensors, mask)
    np.testing.assert_array_equal(run(signal, there, mask), tokens)
    assert np.abs(run(signal, beside, mask) - tokens).max() > 1e-3
    spoiled = np.where(np.repeat(mask, 32, axis=2), 5.0, signal).astype(np.float32)
    np.testing.assert_array_equal(run(spoiled, sensors, mask), tokens)
    lost = near.astype(np.float32)
    lost[1, 2] = np.nan
    unknown = run(signal, electrodes_at(lost), mask)
    assert np.isnan(unknown[1]).all()
    assert np.isfinite(unknown[0]).all()
    with pytest.raises(ZooError, match="1 channels of no known position"):
        zoo.create("barista_tiny").check_positions(electrodes_at(lost))


def test_groups_are_hidden_whole_until_half_of_the_channels_are():
    valid = jnp.asarray(np.array([[True] * 8, [True] * 6 + [False] * 2, [True] + [False] * 7]))
    group = np.array([7, 7, 3, 3, 3, 9, 9, 9])
    hidden = np.asarray(
        jax.vmap(lambda key: groups_hidden(key, valid, group, 0.5))(jax.random.split(jax.random.key(0), 50))
    )
    assert not (hidden & ~np.asarray(valid)).any()
    for each in (7, 3, 9):
        inside = hidden[:, 0, group == each]
        assert (inside.all(-1) | ~inside.any(-1)).all()
        assert 0.1 < inside.all(-1).mean() < 0.9
    assert (hidden[:, 0].sum(-1) >= 4).all()
    assert (hidden[:, 0].sum(-1) < 8).all()
    assert hidden[:, 2, 0].all()


def test_options_that_do_not_fit_are_refused():
    signal, sensors = recording()
    for options, more, says in (
        ({"heads": 3}, {}, "a multiple of twice its 3 heads"),
        ({"regions": 4}, {}, "wanted such a row for each channel"),
        ({"regions": 4, "region_of": (0, 1, 4)}, {}, "wanted such a row"),
        ({"regions": 4, "region_of": (0, 1)}, {}, "got 3 channels, wanted 2"),
        ({"weights": 5}, {}, "got 6 tokens, wanted 5"),
        ({"remat": "some"}, {}, "remat must be one of"),
        ({}, {"mask": np.zeros((2, 3, 3), bool)}, "wants a mask of shape"),
    ):
        encoder = zoo.create("barista_tiny", **{**SMALL, **options})
        with pytest.raises(ZooError, match=says):
            jax.eval_shape(encoder.init, jax.random.key(0), signal, sensors, **more)


@pytest.mark.slow
def test_it_pretrains_against_a_slow_average():
    """Regions hide together; the average moves a little towards the encoder; no gradient reaches it."""
    options = {**SMALL, "regions": 2, "region_of": (0, 0, 1)}
    task = MaskedGroups(options=options, steps=10)
    signal, sensors = recording()
    batch = {"signal": signal, "sensors": sensors}
    variables = jax.jit(lambda key: task.init(key, batch), compiler_options=QUICK)(jax.random.key(0))
    moved = jax.tree.map(lambda leaf: leaf + 0.1, variables["params"])

    @functools.partial(jax.jit, compiler_options=QUICK)
    def learn(params: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            value, metrics, new = task.loss({**variables, "params": params}, batch, key, True)
            return value, (metrics, new)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, (metrics, new)), grads = learn(moved, jax.random.key(1))
    assert np.isfinite(value)
    assert metrics["weight"] in (2, 4, 6, 8)  # one or two electrodes of each example, two segments each
    assert np.abs(grads["encoder"]["embed_mask"].unbox()).max() > 0
    before = variables["target"]["params"]["out"]["kernel"].unbox()
    np.testing.assert_allclose(new["target"]["params"]["out"]["kernel"].unbox() - before, 0.004 * 0.1, atol=1e-6)
    assert new["target"]["step"] == 1


@pytest.mark.slow
def test_the_published_sum_weighs_every_token_of_a_montage():
    encoder = zoo.create("barista_tiny", **SMALL, weights=6)
    signal, sensors = recording()
    variables = jax.jit(encoder.init, compiler_options=QUICK)(jax.random.key(0), signal, sensors)
    out = jax.jit(encoder.apply, compiler_options=QUICK)(variables, signal, sensors)
    params = jax.tree.map(np.asarray, {name: variables["params"][name].unbox() for name in ("weight", "shift")})
    wanted = np.einsum("bnd,n->bd", out.tokens, params["weight"][:, 0]) + params["shift"]
    np.testing.assert_allclose(out.pooled, wanted, atol=1e-5)
