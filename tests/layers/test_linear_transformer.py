"""The linear-attention transformer beside its definition, one pair of tokens after the other."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.layers.linear_transformer import LinearTransformer


@pytest.fixture(scope="module")
def made():
    model = LinearTransformer(depth=2, heads=2)
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    return model, nn.unbox(jax.jit(model.init)(jax.random.key(0), x)), x


def test_attention_is_a_mean_of_values_that_queries_choose_features_of(made):
    model, variables, x = made
    layers = variables["params"]["layers"]

    def normal(x, p):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def softmax(x, axis):
        e = np.exp(x - x.max(axis, keepdims=True))
        return e / e.sum(axis, keepdims=True)

    for layer in range(2):
        p = jax.tree.map(lambda leaf, layer=layer: np.asarray(leaf[layer], np.float64), layers)
        normed = normal(x, p["attention_norm"])
        query, key, value = (np.einsum("bnd,dhk->bnhk", normed, p[n]["kernel"]) for n in ("query", "key", "value"))
        weight = np.einsum("bnhk,bmhk->bhnm", softmax(query, -1) / np.sqrt(4), softmax(key, 1))
        seen = np.einsum("bhnm,bmhk->bnhk", weight, value)
        x = x + np.einsum("bnhk,hkd->bnd", seen, p["out"]["kernel"]) + p["out"]["bias"]
        hidden = normal(x, p["mlp_norm"]) @ p["mlp_in"]["kernel"] + p["mlp_in"]["bias"]
        hidden = np.asarray(jax.nn.gelu(hidden, approximate=False))
        x = x + hidden @ p["mlp_out"]["kernel"] + p["mlp_out"]["bias"]
    np.testing.assert_allclose(jax.jit(model.apply)(variables, made[2]), x, atol=1e-5)


def test_permuted_tokens_give_permuted_outputs(made):
    model, variables, x = made
    order = np.random.default_rng(1).permutation(5)
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply(variables, x[:, order]), apply(variables, x)[:, order], atol=1e-6)


def test_tokens_that_are_not_there_are_as_if_never_given(made):
    model, variables, x = made
    valid = np.array([[True, False, True, True, False], [True] * 5])
    spoiled = np.where(valid[..., None], x, 1e3).astype(np.float32)
    seen = jax.jit(model.apply)(variables, spoiled, valid)
    fewer = jax.jit(model.apply)(variables, x[:1, valid[0]])
    np.testing.assert_allclose(seen[0, valid[0]], fewer[0], atol=1e-6)
    np.testing.assert_allclose(seen[1], jax.jit(model.apply)(variables, x)[1], atol=1e-6)


@pytest.mark.slow
def test_only_training_drops(made):
    model, variables, x = made
    given = model.apply(variables, jax.numpy.asarray(x), train=True, rngs={"dropout": jax.random.key(1)})
    assert np.abs(given - jax.jit(model.apply)(variables, x)).max() > 1e-3


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ZooError, match="8 features do not divide into 3 heads"):
        jax.eval_shape(LinearTransformer(1, heads=3).init, jax.random.key(0), np.zeros((1, 2, 8), np.float32))
