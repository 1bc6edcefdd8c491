"""BrainOmni: its counts, what hides and what stands in, how halves and rotations go, and its classifier."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.encoders.brainomni import Block, _stand_in, turned
from zoo.errors import ZooError
from zoo.types import Sensors

QUICK = {"xla_backend_optimization_level": 0}
"""Compilation takes longer than these small programs run."""
TOKENIZER = {
    "window": 32,
    "ratios": (2, 4),
    "filters": 2,
    "dim": 16,
    "latents": 3,
    "codes": 8,
    "levels": 2,
    "kmeans": 0,
}
SMALL: dict[str, Any] = {"tokenizer_options": TOKENIZER, "depth": 2, "dim": 16, "heads": 4}


@pytest.mark.parametrize(("name", "published"), [("brainomni_tiny", 8_424_704), ("brainomni_base", 32_707_328)])
def test_counts_are_the_published(name, published):
    """Without the tokenizer, with the last block, the token that hides and the map to four times 512 codes."""
    encoder = zoo.create(name)
    signal, sensors = encoder.example()
    mask = jnp.zeros((1, *encoder.grid(*signal.shape[1:])), bool)
    params = jax.eval_shape(lambda: encoder.init(jax.random.key(0), signal, sensors, mask=mask))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) + (encoder.dim + 1) * 4 * 512 == published


def test_windows_overlap_by_a_quarter():
    """1,024 samples: 16 frames without an overlap; with it 24, the tail filled up."""
    assert zoo.create("brainomni_tiny").grid(30, 1024) == (16, 24)
    assert zoo.create("brainomni_tiny", overlap=0.0).grid(30, 1024) == (16, 16)


def recording() -> tuple[np.ndarray, Sensors]:
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((2, 4, 100)).astype(np.float32)
    kind = np.broadcast_to(np.array([0, 0, 1, 2], np.int32), (2, 4))
    position, orientation = rng.normal(size=(2, 2, 4, 3)).astype(np.float32) * 0.1
    return signal, Sensors(position, orientation, kind, np.full_like(kind, -1), np.ones((2, 4), bool))


@pytest.fixture(scope="module")
def small() -> Any:
    encoder = zoo.create("brainomni_mini", **SMALL)
    signal, sensors = recording()
    mask = np.random.default_rng(1).random((2, *encoder.grid(4, 100))) < 0.5

    def init(key: Any) -> Any:
        return encoder.init(key, signal, sensors, mask=mask)

    variables = jax.jit(init, compiler_options=QUICK)(jax.random.key(0))
    return encoder, variables, mask


@pytest.mark.slow
def test_sources_do_not_depend_on_the_order_of_channels(small):
    """Of EEG and MEG alike, their places and kinds moving with them."""
    encoder, variables, _ = small
    signal, sensors = recording()
    run = jax.jit(encoder.apply, compiler_options=QUICK)
    order = np.array([3, 1, 0, 2])
    moved = jax.tree.map(lambda leaf: leaf[:, order], sensors)
    tokens = run(variables, signal, sensors).tokens
    np.testing.assert_allclose(run(variables, signal[:, order], moved).tokens, tokens, atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(tokens, axis=-1), 1, atol=1e-5)


@pytest.mark.slow
def test_in_training_a_fifth_of_hidden_tokens_are_others_of_the_batch():
    class Standing(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return _stand_in(self, x, jnp.full(2, 9.0))

    x = jnp.asarray(np.random.default_rng(0).random((4, 5, 100, 2)), jnp.float32)
    stand = jax.jit(lambda x: Standing().apply({}, x, rngs={"dropout": jax.random.key(0)}), compiler_options=QUICK)
    out = np.asarray(stand(x)).reshape(-1, 2)
    other = out[(out != 9).any(-1)]
    assert 0.17 < len(other) / len(out) < 0.23
    assert {tuple(row) for row in other} <= {tuple(row) for row in np.asarray(x).reshape(-1, 2)}


def test_rotation_depends_on_the_distance_and_is_fastest_in_the_first_head():
    one = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 2, 4)).astype(np.float32)
    query, key = (turned(jnp.broadcast_to(each, (1, 1, 9, 2, 4))) for each in one)
    score = jnp.einsum("bsnhk,bsmhk->bshnm", query, key)[0, 0]
    np.testing.assert_allclose(score[:, 2, 1], score[:, 7, 6], rtol=1e-4)
    rate = 10_000.0 ** (-np.arange(4) / 4)
    first = turned(jnp.broadcast_to(jnp.asarray([1.0, 0.0, 1.0, 0.0]), (1, 1, 2, 2, 4)))[0, 0, 1]
    np.testing.assert_allclose(first[:, 0::2].ravel(), np.cos(rate), atol=1e-6)
    np.testing.assert_allclose(first[:, 1::2].ravel(), np.sin(rate), atol=1e-6)


@pytest.mark.slow
def test_halves_of_features_take_turns():
    """After a block that leaves out its MLP, the first half has changed by space alone, the second by time alone."""
    block = Block(4, 0.0, jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 5, 16)), jnp.float32)
    params = jax.jit(lambda key: block.init(key, x, None)["params"], compiler_options=QUICK)(jax.random.key(0))
    params = {**params, "mlp_out": jax.tree.map(jnp.zeros_like, params["mlp_out"])}

    @functools.partial(jax.jit, compiler_options=QUICK)
    def change(x: Any) -> Any:
        return block.apply({"params": params}, x, None)[0] - x

    other_source = change(x) != change(x.at[0, 2, 4].set(5.0))
    seen = np.asarray(other_source[0]).reshape(3, 5, 2, 8).any(-1)
    assert seen[:, 4, 0].all()  # the same frame, any source
    assert not seen[:, :4, 0].any()
    assert seen[2, :, 1].all()  # the same source, any frame
    assert not seen[:2, :, 1].any()


def test_what_does_not_fit_is_refused():
    signal, sensors = recording()
    for options, says in (({"heads": 3}, "an even number of heads"), ({"remat": "some"}, "remat must be one of")):
        with pytest.raises(ZooError, match=says):
            zoo.create("brainomni_mini", **{**SMALL, **options}).init(jax.random.key(0), signal, sensors)
