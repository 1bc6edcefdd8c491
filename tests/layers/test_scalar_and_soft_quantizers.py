"""Quantizers without a nearest vector: scalars, signs, soft choices; and values that codes choose."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from quantizing import EMA, apply, close, gradients, rows, start, train

from zoo.layers.quantizers import (
    AnnealedQuantizer,
    FiniteScalarQuantizer,
    GroupedQuantizer,
    GumbelQuantizer,
    KeyValueBottleneck,
    LookupFreeQuantizer,
    annealed_one_hot,
)


def test_finite_scalars_are_rounded_tanhs():
    levels = (8, 5, 3)
    fsq = FiniteScalarQuantizer(levels)
    x = 3 * rows(50, 3)
    out = apply(fsq, {}, x)
    codes = np.asarray(out.codes)[:, 0]
    digits = np.stack([codes % 8, codes // 8 % 5, codes // 40], axis=1)
    # Section 3.1: floor(L / 2) tanh(x), to half a step.
    np.testing.assert_allclose(np.asarray(out.quantized), (digits - np.array([4, 2, 1])) / np.array([4, 2, 1]))
    assert (np.abs(digits - np.array([3.5, 2, 1]) - np.array([3.5, 2, 1]) * np.tanh(x)) < 0.75).all()
    assert out.losses == {}
    assert fsq.code_sizes == (120,)
    every = apply(fsq, {}, np.arange(120)[:, None], method="decode")
    assert len(np.unique(every, axis=0)) == 120
    np.testing.assert_array_equal(np.unique(np.asarray(every)[:, 0]), np.arange(-4, 4) / 4)
    np.testing.assert_array_equal(np.unique(np.asarray(every)[:, 1]), np.arange(-2, 3) / 2)
    assert not np.asarray(apply(fsq, {}, np.zeros((1, 3), np.float32)).quantized).any()
    ends = np.asarray(apply(fsq, {}, np.array([[-99.0] * 3, [99.0] * 3], np.float32)).codes)[:, 0]
    np.testing.assert_array_equal(ends, [0, 119])
    slope = jax.grad(lambda x: fsq.apply({}, x).quantized.sum())(x)
    wanted = (np.array(levels) - 1) * 0.999 / 2 / np.array([4, 2, 1])
    shift = np.tan(np.array([0.5, 0, 0]) / (np.array(levels) - 1) / 0.999 * 2)
    np.testing.assert_allclose(slope, wanted * (1 - np.tanh(x + shift) ** 2), rtol=1e-4, atol=1e-6)


def test_lookup_free_codes_are_signs_and_their_entropies_those_of_a_softmax():
    lfq = LookupFreeQuantizer(5, temperature=0.7, diversity=0.8)
    x = 0.3 * rows(40, 5)
    valid = np.arange(40) < 30
    out = apply(lfq, {}, x, valid=jnp.asarray(valid))
    np.testing.assert_allclose(np.asarray(out.quantized)[:30], np.sign(x[:30]), rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(out.codes)[:30, 0], ((x[:30] > 0) * 2 ** np.arange(5)).sum(1))
    np.testing.assert_array_equal(
        apply(lfq, {}, np.arange(32)[:, None], method="decode"), 2.0 * (np.arange(32)[:, None] >> np.arange(5) & 1) - 1
    )
    every = np.asarray(apply(lfq, {}, np.arange(32)[:, None], method="decode"), np.float64)
    logits = -((x[:30, None] - every) ** 2).sum(-1) / 0.7
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    each, batch = -(p * np.log(p)).sum(1).mean(), -(p.mean(0) * np.log(p.mean(0))).sum()
    np.testing.assert_allclose(out.losses["entropy"], 0.1 * (each - 0.8 * batch), rtol=1e-4)
    np.testing.assert_allclose(out.losses["commitment"], 0.25 * ((x - np.sign(x))[:30] ** 2).mean(), rtol=1e-6)
    pull = rows(40, 5, seed=1)
    np.testing.assert_array_equal(jax.grad(lambda x: (lfq.apply({}, x).quantized * pull).sum())(x), pull)
    sharp = apply(LookupFreeQuantizer(5), {}, 10 * x)
    assert np.isfinite(sharp.losses["entropy"])


def test_annealed_mixtures_harden():
    logits = jnp.asarray(rows(7, 5))
    soft = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    hard = np.eye(5)[np.asarray(logits).argmax(1)]
    np.testing.assert_allclose(annealed_one_hot(logits, 0.3), 0.3 * soft + 0.7 * hard, rtol=1e-5)
    np.testing.assert_array_equal(annealed_one_hot(logits, 0.0), hard)
    pull = rows(7, 5, seed=1)
    got = jax.grad(lambda logits: (annealed_one_hot(logits, 0.3) * pull).sum())(logits)
    np.testing.assert_allclose(got, 0.3 * soft * (pull - (soft * pull).sum(1, keepdims=True)), rtol=1e-4, atol=1e-6)
    quantizer = AnnealedQuantizer(5, 3, temperatures=(1.0, 0.2), steps=2)
    x = rows(4, 3)
    variables = start(quantizer, x)
    likelihood = jax.nn.softmax(x @ variables["params"]["logits"]["kernel"] + variables["params"]["logits"]["bias"])
    one_hot = np.eye(5)[np.asarray(likelihood).argmax(1)]
    for tau in (1.0, 0.6, 0.2, 0.2):
        out, variables = train(quantizer, variables, x)
        weights = tau * likelihood + (1 - tau) * one_hot
        np.testing.assert_allclose(out.quantized, weights @ variables["params"]["embedding"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        apply(quantizer, variables, x).quantized, one_hot @ np.asarray(variables["params"]["embedding"]), rtol=1e-6
    )


def test_gumbel_draws_codes_as_likely_as_the_softmax_says():
    quantizer = GumbelQuantizer(5, 3)
    x = np.broadcast_to(rows(1, 3), (4000, 3))
    variables = start(quantizer, x)
    out, _ = train(quantizer, variables, x)
    kernel, bias = (np.asarray(variables["params"]["logits"][name]) for name in ("kernel", "bias"))
    p = np.asarray(jax.nn.softmax(x[:1] @ kernel + bias))[0]
    # Five standard deviations of a count.
    np.testing.assert_allclose(np.bincount(np.asarray(out.codes)[:, 0], minlength=5) / 4000, p, atol=5 * 0.5 / 63)
    embedding = np.asarray(variables["params"]["embedding"])
    np.testing.assert_allclose(out.quantized, embedding[np.asarray(out.codes)[:, 0]], atol=1e-5)
    np.testing.assert_allclose(out.losses["prior"], 5e-4 * (p * np.log(5 * p)).sum(), rtol=1e-3)
    assert (np.asarray(apply(quantizer, variables, x).codes) == p.argmax()).all()
    soft = quantizer.copy(hard=False)
    few = x[:6]
    hard_gradient, soft_gradient = (
        gradients(q, variables, few, lambda out: (out.quantized * rows(6, 3, seed=5)).sum())[1]
        for q in (quantizer, soft)
    )
    np.testing.assert_allclose(hard_gradient, soft_gradient, rtol=1e-5, atol=1e-7)
    assert np.abs(hard_gradient).max() > 0


def test_only_chosen_values_learn_and_frozen_keys_stay():
    moving = KeyValueBottleneck(GroupedQuantizer(EMA.copy(dim=4, kmeans=3), 2), 6, projection=(6, 8))
    x = rows(2, 3, 6)
    variables = start(moving, x)
    _, variables = train(moving, variables, rows(4, 30, 6, seed=8))
    frozen = moving.copy(moving=False)
    out, after = train(frozen, variables, x)
    close(after, variables, rtol=0)
    assert np.abs(
        np.asarray(train(moving, variables, x)[1]["codebooks"]["keys"]["book"]["embedding"])
        - variables["codebooks"]["keys"]["book"]["embedding"]
    ).any()
    codes, values = np.asarray(out.codes), np.asarray(variables["params"]["values"])
    np.testing.assert_allclose(out.quantized, (values[0][codes[..., 0]] + values[1][codes[..., 1]]) / 2, rtol=1e-5)
    to_params, to_x = gradients(frozen, variables, x, lambda out: jnp.square(out.quantized).sum())
    assert not np.asarray(to_x).any()
    for head in range(2):
        moved = np.abs(np.asarray(to_params["values"])[head]).max(1) > 0
        np.testing.assert_array_equal(np.flatnonzero(moved), np.unique(codes[..., head]))
    keys = np.asarray(x.reshape(-1, 6) @ variables["codebooks"]["heads"]).reshape(-1, 2, 4)
    for head in range(2):
        book = np.asarray(variables["codebooks"]["keys"]["book"]["embedding"][head])
        nearest = ((keys[:, head, None] - book) ** 2).sum(-1).argmin(1)
        np.testing.assert_array_equal(codes[..., head].ravel(), nearest)
