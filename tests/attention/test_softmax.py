"""Softmax attention against its definition, rotary positions of every number of axes, and prompts before streaming."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import causal, close, drawn, merged, mixed, normal, prefilled, projected, run, streamed, weights

from zoo.attention.softmax import Softmax
from zoo.errors import ZooError
from zoo.layers.rotary import grid_positions, rotate


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
def test_turned_products_depend_on_differences_of_position(axes):
    q, k = normal(0, 1, 1, 1, 16), normal(1, 1, 1, 1, 16)
    at = np.random.default_rng(2).integers(0, 50, (2, axes))

    def product(first, second):
        turned = (rotate(x, jnp.asarray(p)[None, None], 100.0) for x, p in ((q, first), (k, second)))
        return float(jnp.vdot(*turned))

    here = product(*at)
    assert product(*(at + 7)) == pytest.approx(here, abs=1e-4)
    assert product(at[0], at[0]) == pytest.approx(float(np.vdot(q, k)), abs=1e-4)
    for axis in range(axes):
        moved = at.copy()
        moved[0, axis] += 3
        assert abs(product(*moved) - here) > 1e-3, f"axis {axis} makes no difference"


def test_angles_are_those_of_the_paper():
    """RoFormer, eq. 15: pair i of K / 2 turns by position · base^(−2i/K)."""
    x, positions = normal(0, 1, 5, 1, 8), np.arange(5)
    got = rotate(x, jnp.asarray(positions)[None], 50.0)
    angle = positions[:, None] * 50.0 ** (-np.arange(4) / 4)
    wanted = (x[0, :, 0, :4] + 1j * x[0, :, 0, 4:]) * np.exp(1j * angle)
    close(got[0, :, 0], np.concatenate([wanted.real, wanted.imag], axis=-1))


def test_rotary_errors():
    for positions, width in ((jnp.zeros((1, 3, 5), int), 32), (jnp.zeros((1, 3, 3), int), 4)):
        with pytest.raises(ZooError, match="rotary positions: got"):
            rotate(jnp.zeros((1, 3, 1, width)), positions)


@pytest.mark.parametrize("both_ways", [False, True])
def test_equals_dot_product_attention(both_ways):
    mixer = Softmax(24, heads=6, kv_heads=2, rotary=False, bias=True, causal=not both_ways)
    x = normal(0, 2, 13, 24)
    variables = drawn(mixer, x)
    q, k, v = (projected(variables, name, x) for name in ("query", "key", "value"))
    own = jax.nn.dot_product_attention(*(jnp.asarray(y, jnp.float32) for y in (q, k, v)), is_causal=not both_ways)
    close(run(mixer, variables, x), merged(variables, np.float64(own)))
    visible = np.ones((13, 13), bool) if both_ways else causal(13)
    close(run(mixer, variables, x), merged(variables, mixed(weights(q, k, visible), v)))


def test_normalised_queries_and_keys_on_a_grid():
    mixer = Softmax(16, heads=2, qk_norm=True, grid=(2, 3), base=30.0, causal=False)
    x = normal(0, 1, 6, 16)
    variables = drawn(mixer, x)
    q, k, v = (projected(variables, name, x) for name in ("query", "key", "value"))

    def turned(y, name):
        y = y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-6) * np.float64(variables["params"][name]["scale"])
        return rotate(jnp.asarray(y, jnp.float32), grid_positions(2, 3), 30.0)

    p = weights(turned(q, "query_norm"), turned(k, "key_norm"), np.ones((6, 6), bool))
    close(run(mixer, variables, x), merged(variables, mixed(p, v)))


@pytest.mark.parametrize("grid", [(), (3, 4)])
def test_a_prompt_then_steps_equals_parallel(grid):
    mixer = Softmax(16, heads=2, grid=grid)
    x = normal(0, 2, 12, 16)
    variables = drawn(mixer, x)
    whole = run(mixer, variables, x)
    if grid:
        state = mixer.apply(variables, 2, 12, method="initial_state")
        close(streamed(mixer, variables, x, state)[0], whole)
        return
    out, state = prefilled(mixer, variables, x[:, :7], 12, [7, 5])
    close(out[0], whole[0, :7])
    close(out[1, :5], whole[1, :5])
    rest = jnp.stack([x[0, 7:12], x[1, 5:10]])
    later, state = streamed(mixer, variables, rest, state)
    close(later[0], whole[0, 7:])
    close(later[1], whole[1, 5:10])
    np.testing.assert_array_equal(state.length, [12, 10])


def test_a_full_row_gives_nan_and_keeps_what_it_has():
    mixer = Softmax(16, heads=2)
    x = normal(0, 2, 4, 16)
    variables = drawn(mixer, x)
    _, state = prefilled(mixer, variables, x, 4, [4, 2])
    out, after = streamed(mixer, variables, x[:, :1], state)
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()
    np.testing.assert_array_equal(after.length, [4, 3])
    np.testing.assert_array_equal(after.k[0], state.k[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "Softmax: dim 16 does not divide into 3 heads"),
        ({"heads": 4, "kv_heads": 3}, "Softmax: 4 heads do not divide into 3 kv_heads"),
        ({"heads": 2, "grid": (2, 2)}, "Softmax: grid .2, 2. has not the 6 places of the input"),
    ],
)
def test_errors(options, message):
    mixer = Softmax(16, **options)
    with pytest.raises(ZooError, match=message):
        jax.eval_shape(mixer.init, jax.random.key(0), normal(0, 1, 6, 16))


def test_a_prompt_longer_than_the_capacity_is_an_error():
    mixer = Softmax(16, heads=2)
    x = normal(0, 1, 6, 16)
    with pytest.raises(ZooError, match="capacity: got 5, wanted room for the 6 tokens given"):
        prefilled(mixer, drawn(mixer, x), x, 5)
