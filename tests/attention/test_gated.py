"""Gated attention against its definition at every position, and gates of one against none."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from dense import causal, close, drawn, merged, mixed, normal, projected, run, weights

from zoo.attention.gated import Gated
from zoo.attention.softmax import Softmax
from zoo.errors import ZooError

POSITIONS = ("attention", "value", "key", "query", "output")
X = normal(0, 2, 9, 16)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gates(variables, shared):
    """[B, T, H or 1, K or 1], or [B, T, D] of the output."""
    kernel = np.float64(variables["params"]["gate"]["kernel"])
    if kernel.ndim == 3:
        return np.einsum("btd,dhk->bthk", np.float64(X), kernel)
    return np.float64(X) @ kernel if not shared else (np.float64(X) @ kernel)[:, :, None]


@pytest.mark.parametrize(
    ("position", "options", "function"),
    [
        ("attention", {}, lambda y, g: y * sigmoid(g)),
        ("attention", {"granularity": "head"}, lambda y, g: y * sigmoid(g)),
        ("attention", {"additive": True, "activation": "silu"}, lambda y, g: y + g * sigmoid(g)),
        ("value", {"shared": True}, lambda y, g: y * sigmoid(g)),
        ("key", {"activation": "half_sigmoid"}, lambda y, g: y * (0.5 + 0.5 * sigmoid(g))),
        ("query", {"granularity": "head", "shared": True}, lambda y, g: y * sigmoid(g)),
        ("output", {}, lambda y, g: y * sigmoid(g)),
    ],
)
def test_equals_the_definition(position, options, function):
    mixer = Gated(16, heads=4, kv_heads=2, rotary=False, position=position, **options)
    variables = drawn(mixer, X)
    g = gates(variables, options.get("shared", False))

    def at(name, y):
        return function(y, g) if name == position else y

    q, k, v = (at(name, projected(variables, name, X)) for name in ("query", "key", "value"))
    y = at("attention", mixed(weights(q, k, causal(9)), v))
    close(run(mixer, variables, X), at("output", merged(variables, y)))


@pytest.mark.parametrize("position", POSITIONS)
def test_gates_of_one_leave_softmax_attention(position):
    mixer = Gated(16, heads=2, position=position, bias=True, qk_norm=True)
    variables = drawn(mixer, X)
    gate = jax.tree.map(np.zeros_like, variables["params"]["gate"])
    gate["bias"] = gate["bias"] + 40.0  # of which the sigmoid is 1 in float32
    params = {**variables["params"], "gate": gate}
    plain = {name: part for name, part in params.items() if name != "gate"}
    wanted = run(Softmax(16, heads=2, bias=True, qk_norm=True), {"params": plain}, X)
    close(run(mixer, {"params": params}, X), wanted, 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position": "keys"}, "position: got 'keys', wanted one of attention, value, key, query, output"),
        ({"granularity": "token"}, "granularity: got 'token', wanted one of element, head"),
        ({"activation": "relu"}, "activation: got 'relu', wanted one of sigmoid, silu, half_sigmoid"),
        ({"position": "output", "shared": True}, "position='output' has no heads"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ZooError, match=f"gated: {message}"):
        jax.eval_shape(Gated(16, **options).init, jax.random.key(0), X)
