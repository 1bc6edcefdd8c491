"""Reversed attention is what its paper writes, and leaves are pruned by what they receive."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, expit, softmax

from zoo.attention.reversed import VARIANTS, DependencyTransformer, Reversed, most_received
from zoo.errors import ZooError

QUICK = {"xla_backend_optimization_level": 0}
DIM, HEADS, LENGTH = 8, 2, 11


def drawn(module: nn.Module, x: jax.Array) -> Any:
    """Variables that are neither zeros nor ones."""
    variables = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 + 0.4 * rng.standard_normal(leaf.shape), jnp.float32), variables)


def close(got: Any, wanted: np.ndarray, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


def tokens(length: int = LENGTH) -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).standard_normal((1, length, DIM)), jnp.float32)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / np.sqrt(2))) / 2


def naive(
    x: np.ndarray, own: Any, visible: np.ndarray, message: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output [N, D], messages [N] and the dependency mask sum_h A^R [N parents, N children], in float64."""
    own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), own)
    x = np.asarray(x, np.float64)
    q, k, v = (np.einsum("nd,dhk->hnk", x, own[name]["kernel"]) for name in ("query", "key", "value"))
    scores = np.where(visible, np.einsum("hik,hjk->hij", q, k) / np.sqrt(q.shape[-1]), -np.inf)
    forward = softmax(scores, axis=-1)
    chosen = softmax(x @ own["selector"]["kernel"] / 0.1, axis=-1)
    hidden = gelu(x @ own["controller_in"]["kernel"])
    message = message * expit(hidden @ own["controller_out"]["kernel"])[:, 0]
    reversed_ = np.swapaxes(forward, 1, 2) * (chosen * message[:, None]).T[:, None]
    received = np.einsum("hji,hik->jhk", reversed_, v)
    out = np.einsum("jhk,hkd->jd", received, own["out"]["kernel"]) + own["out"]["bias"]
    return out, message, reversed_.sum(0)


def test_reversed_attention_is_its_definition():
    mixer, x = Reversed(DIM, heads=HEADS), tokens()
    variables = drawn(mixer, x)
    ids, there = (np.arange(LENGTH) >= 4)[None], np.arange(LENGTH)[None] % 5 != 2
    before = np.random.default_rng(3).uniform(0.2, 1, (1, LENGTH))
    visible = (ids[0][:, None] == ids[0]) & there[0]

    @partial(jax.jit, compiler_options=QUICK)
    def sent(variables: Any, x: jax.Array) -> Any:
        given = {"segment_ids": jnp.asarray(ids, jnp.int32), "mask": jnp.asarray(there)}
        return mixer.apply(variables, x, jnp.asarray(before, jnp.float32), method="send", **given)

    out, message, received = sent(variables, x)
    # Tokens that are not there send nothing.
    wanted, messages, mask = naive(np.asarray(x[0]), variables["params"], visible, before[0] * there[0])
    close(out[0][there[0]], wanted[there[0]])
    close(message[0][there[0]], messages[there[0]])
    close(received[0][there[0]], mask.sum(1)[there[0]])


def test_all_that_is_sent_is_received():
    mixer, x = Reversed(DIM, heads=HEADS), tokens()
    variables = drawn(mixer, x)
    send = jax.jit(partial(mixer.apply, method="send"), compiler_options=QUICK)
    _, message, received = send(variables, x)
    # Rows of F and the selector sum to 1, so each child sends its message's worth.
    close(received.sum(), np.asarray(message).sum())


def test_large_scores_lose_nothing_in_the_second_pass():
    mixer, x = Reversed(DIM, heads=HEADS), 6 * tokens()
    variables = drawn(mixer, x)
    wanted, _, _ = naive(np.asarray(x[0]), variables["params"], np.ones((LENGTH, LENGTH), bool), np.ones(LENGTH))
    # Scores reach hundreds: float32 keeps 5 digits of an exponent's argument.
    close(jax.jit(mixer.apply, compiler_options=QUICK)(variables, x)[0], wanted, 5e-4)


def layer_norm(x: np.ndarray, own: Any) -> np.ndarray:
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return normal * np.asarray(own["scale"], np.float64) + np.asarray(own["bias"], np.float64)


def test_transformer_prunes_leaves_and_multiplies_messages():
    length, model = 12, DependencyTransformer(DIM, depth=3, heads=HEADS, prune_layers=(1, 3), prune_ratio=0.25)
    x = tokens(length)
    variables = drawn(model, x)
    out, message, places = jax.jit(model.apply, compiler_options=QUICK)(variables, x)
    assert out.shape == (1, 6, DIM)

    own, y = variables["params"], np.asarray(x[0], np.float64)
    kept, messages = np.arange(length), np.ones(length)
    for layer, keep in enumerate((9, None, 6)):
        block = own[f"layer_{layer}"]
        everyone = np.ones((len(y), len(y)), bool)
        mixed, messages, mask = naive(layer_norm(y, block["mixer_norm"]), block["mixing"], everyone, messages)
        y = y + np.asarray(block["mixer_scale"]) * mixed
        if keep:
            left = np.sort(np.argsort(-mask.sum(1))[:keep])
            y, messages, kept = y[left], messages[left], kept[left]
        hidden = layer_norm(y, block["mlp_norm"]) @ block["feeding"]["in"]["kernel"] + block["feeding"]["in"]["bias"]
        fed = gelu(hidden) @ block["feeding"]["out"]["kernel"] + block["feeding"]["out"]["bias"]
        y = y + np.asarray(block["mlp_scale"]) * fed
    np.testing.assert_array_equal(places[0], kept)
    close(message[0], messages, 1e-4)
    close(out[0], layer_norm(y, own["LayerNorm_0"]) * messages[:, None], 1e-4)


def test_tokens_that_are_not_there_are_pruned_first():
    received = jnp.asarray([[0.9, 0.1, 0.5, 0.8]])
    np.testing.assert_array_equal(most_received(received, 2, None), [[0, 3]])
    np.testing.assert_array_equal(most_received(received, 2, jnp.asarray([[False, True, True, True]])), [[2, 3]])


@pytest.mark.parametrize(("variant", "dim"), [("tiny", 192), ("small", 384), ("lite_tiny", 192)])
def test_sizes_are_those_of_the_wiring(variant: str, dim: int):
    x = jax.ShapeDtypeStruct((1, 196, dim), jnp.float32)
    model = DependencyTransformer(**VARIANTS[variant])
    (out, _, places), variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    # A layer: q, k, v and out 4 D² + D, selector 12 D, controller D²/2 + D/2, MLP 8 D² + 5 D, two norms and two
    # scales 6 D; then a norm.
    layer = 4 * dim**2 + dim + 12 * dim + dim**2 // 2 + dim // 2 + 8 * dim**2 + 5 * dim + 6 * dim
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 12 * layer + 2 * dim
    # Lite leaves 1 − 4 · 0.16 of the tokens.
    assert out.shape[1] == places.shape[1] == (70 if variant == "lite_tiny" else 196)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DependencyTransformer(DIM, heads=2, prune_layers=(0,)), r"wanted layers\s+from 1 to 12"),
        (lambda: DependencyTransformer(DIM, heads=2, prune_layers=(1, 2), prune_ratio=0.5), "that leave tokens"),
        (lambda: Reversed(9, heads=3), "the message controller halves dim, got 9"),
    ],
)
def test_bad_options_are_named(make: Any, message: str):
    module = make()
    with pytest.raises(ZooError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4, module.dim)))
