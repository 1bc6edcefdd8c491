"""Update rules, schedules, decay and freezing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import LAYERS, WIDTH, Toy, run, toy_batch, toy_program

from zoo.errors import ZooError
from zoo.train.config import Optimizer
from zoo.train.optimizer import build, schedule


def update(gradient, params, **options):
    """The first change that a rule makes, with a learning rate of one."""
    boxed = jax.eval_shape(Toy().init, jax.random.key(0), toy_batch())["params"]
    flat = {"warmup_steps": 0, "learning_rate": 1.0, "final_fraction": 1.0, "clip_norm": 0.0, "weight_decay": 0.0}
    rule = build(Optimizer(**{**flat, **options}), 10, boxed)
    return rule.update(gradient, rule.init(params), params)[0]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(
        lambda leaf: leaf.value,
        Toy().init(jax.random.key(0), None)["params"],
        is_leaf=lambda leaf: hasattr(leaf, "names"),
    )


@pytest.fixture(scope="module")
def gradient(params):
    return jax.tree.map(lambda leaf: jnp.sin(jnp.arange(leaf.size) ** 1.5 + 1).reshape(leaf.shape), params)


# Schedules


def test_cosine():
    rate = schedule(Optimizer(learning_rate=2.0, warmup_steps=10, final_fraction=0.1), 110)
    values = [float(rate(step)) for step in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(values, [0.0, 1.0, 2.0, (2.0 + 0.2) / 2, 0.2], rtol=1e-6)


def test_trapezoid():
    options = Optimizer(
        schedule="trapezoid", learning_rate=2.0, warmup_steps=10, final_fraction=0.1, decay_fraction=0.2
    )
    rate = schedule(options, 100)
    values = [float(rate(step)) for step in (0, 5, 10, 50, 80, 90, 100)]
    np.testing.assert_allclose(values, [0.0, 1.0, 2.0, 2.0, 2.0, 1.1, 0.2], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"warmup_steps": 10}, r"warmup_steps 10 leaves nothing of 10 steps"),
        ({"warmup_steps": 8, "schedule": "trapezoid", "decay_fraction": 0.5}, r"warm-up of 8 and decay of 5 steps"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run(options, cause):
    with pytest.raises(ZooError, match=cause):
        schedule(Optimizer(**options), 10)


# Rules


def test_adamw_is_optax_with_decay_on_matrices_alone(params, gradient):
    changed = update(gradient, params, weight_decay=0.5, no_decay=("head",))
    plain = update(gradient, params)
    decayed = jax.tree.map(lambda with_decay, without: float(jnp.abs(with_decay - without).max()), changed, plain)
    np.testing.assert_allclose(changed["embed_in"], plain["embed_in"] - 0.5 * params["embed_in"], atol=1e-6)
    np.testing.assert_allclose(
        changed["blocks"]["kernel"], plain["blocks"]["kernel"] - 0.5 * params["blocks"]["kernel"], atol=1e-6
    )
    assert decayed["blocks"]["bias"] == decayed["head"] == 0.0


def test_muon_makes_every_stacked_layer_orthogonal_by_itself(params, gradient):
    changed = update(gradient, params, name="muon")["blocks"]["kernel"]
    one = optax.contrib.muon(1.0, beta=0.95, consistent_rms=0.2)
    for layer in range(LAYERS):
        single = {"w": params["blocks"]["kernel"][layer]}
        wanted = one.update({"w": gradient["blocks"]["kernel"][layer]}, one.init(single), single)[0]["w"]
        np.testing.assert_allclose(changed[layer], wanted, rtol=1e-5, atol=1e-6)
        sizes = np.linalg.svd(changed[layer], compute_uv=False) / (0.2 * np.sqrt(WIDTH))
        assert sizes.min() > 0.5, "singular values are brought to about one"
        assert sizes.max() < 1.3
    assert np.linalg.cond(gradient["blocks"]["kernel"][0]) > 5


def test_muon_leaves_the_rest_to_adamw(params, gradient):
    muon, adamw = (update(gradient, params, name=name, weight_decay=0.5) for name in ("muon", "adamw"))
    for name in ("embed_in", "head"):
        np.testing.assert_array_equal(muon[name], adamw[name])
    np.testing.assert_array_equal(muon["blocks"]["bias"], adamw["blocks"]["bias"])


def test_lion_moves_everything_by_the_rate(params, gradient):
    changed = update(gradient, params, name="lion")
    assert all(bool((jnp.abs(leaf) == 1.0).all()) for leaf in jax.tree.leaves(changed))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon", "lion"])
def test_every_rule_learns(name):
    _, figures = run(toy_program(optimizer={"name": name, "learning_rate": 0.02}), 20)
    assert figures[-1]["loss"] < 0.7 * figures[0]["loss"]


def test_clipping_bounds_the_gradient_without_what_is_frozen(params, gradient):
    huge = {**gradient, "embed_in": 1e6 * gradient["embed_in"]}
    changed = update(huge, params, clip_norm=1e-3, eps=1.0, freeze=("embed_",))
    assert float(optax.tree.norm(changed)) == pytest.approx(1e-3, rel=1e-2)


# Layer-wise rates and freezing


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_layer_decay_scales_each_layers_change(name, params, gradient):
    plain, scaled = (update(gradient, params, name=name, layer_decay=rate) for rate in (1.0, 0.5))
    ratio = jax.tree.map(lambda with_decay, without: with_decay / without, scaled, plain)
    np.testing.assert_allclose(ratio["embed_in"], 0.5**4, rtol=1e-5)
    np.testing.assert_allclose(ratio["head"], 1.0, rtol=1e-5)
    for layer, rate in enumerate((0.5**3, 0.5**2, 0.5)):
        np.testing.assert_allclose(ratio["blocks"]["kernel"][layer], rate, rtol=1e-4)
        np.testing.assert_allclose(ratio["blocks"]["bias"][layer], rate, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon", "lion"])
def test_frozen_parameters_stay_as_they_are_to_the_bit(name):
    options = {"name": name, "freeze": ("embed_", "blocks/bias"), "layer_decay": 0.8}
    program = toy_program(optimizer=options, data=2, fsdp=2)
    before = jax.device_get(program.initial().params)
    after = jax.device_get(run(program)[0].params)
    moved = jax.tree.map(lambda old, new: bool((old != new).any()), before, after)
    assert moved == {"embed_in": False, "blocks": {"kernel": True, "bias": False}, "head": True}


def test_a_pattern_that_freezes_nothing_is_an_error():
    with pytest.raises(ZooError, match=r"optimizer\.freeze: no parameter matches 'blok'"):
        toy_program(optimizer={"freeze": ("embed_", "blok")})
