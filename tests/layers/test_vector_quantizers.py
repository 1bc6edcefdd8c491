"""Vector quantizers, alone, residual and grouped: updates by hand, gradients, k-means and restarts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantizing import COSINE, EMA, GRADIENT, apply, books, compiled, gradients, rows, start, stepper, train

from zoo.errors import ZooError
from zoo.layers.quantizers import GroupedQuantizer, ResidualQuantizer, VectorQuantizer, kmeans, unit


def test_l2_codes_follow_the_mean_of_what_they_got():
    x = rows(5, 9, 6)
    variables = start(EMA, x)
    first = books(variables)
    np.testing.assert_array_equal(first["usage"], 1)
    np.testing.assert_array_equal(first["sums"], first["embedding"])
    out, variables = train(EMA, variables, x)
    flat, codes = x.reshape(-1, 6), ((x[..., None, :] - first["embedding"]) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(out.codes[..., 0], codes)
    one_hot = np.eye(12)[codes.ravel()]
    usage = 0.9 * first["usage"] + 0.1 * one_hot.sum(0)
    sums = 0.9 * first["sums"] + 0.1 * one_hot.T @ flat
    smoothed = (usage + 1e-5) / (usage.sum() + 12e-5) * usage.sum()
    after = books(variables)
    np.testing.assert_allclose(after["usage"], usage, rtol=1e-6)
    np.testing.assert_allclose(after["embedding"], sums / smoothed[:, None], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        out.losses["commitment"], 0.25 * ((x - first["embedding"][codes]) ** 2).mean(), rtol=1e-6
    )
    out = apply(EMA, variables, x)
    assert books(variables).keys() == {"embedding", "usage", "sums", "ready"}
    np.testing.assert_allclose(out.quantized, after["embedding"][np.asarray(out.codes)[..., 0]], rtol=1e-6)


def test_cosine_codes_turn_to_the_mean_and_unused_ones_stay():
    x = rows(1, 8, 6)
    variables = start(COSINE, x)
    first = books(variables)["embedding"]
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, rtol=1e-6)
    out, variables = train(COSINE, variables, x)
    codes = np.asarray(out.codes).ravel()
    units = x.reshape(-1, 6) / np.linalg.norm(x.reshape(-1, 6), axis=1, keepdims=True)
    np.testing.assert_array_equal(codes, (units @ first.T).argmax(1))
    wanted = first.copy()
    for code in set(codes):
        mean = units[codes == code].mean(0)
        moved = 0.9 * first[code] + 0.1 * mean / np.linalg.norm(mean)
        wanted[code] = moved / np.linalg.norm(moved)
    assert len(set(codes)) < 12
    after = books(variables)["embedding"]
    np.testing.assert_allclose(after, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(out.quantized, first[codes][None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_kmeans_is_lloyds(metric):
    x = unit(jnp.asarray(rows(60, 4))) if metric == "cosine" else jnp.asarray(rows(60, 4))
    weight = (jnp.arange(60) % 5 > 0).astype(jnp.float32)
    (means, _), (found, counts) = jax.jit(
        lambda x, weight: [kmeans(jax.random.key(3), x, weight, 7, metric=metric, iterations=n) for n in (0, 6)]
    )(x, weight)
    means, there = np.asarray(means), np.asarray(x)[np.asarray(weight) > 0]
    assert all((there == mean).all(1).any() for mean in means)
    assert len(np.unique(means, axis=0)) == 7
    for _ in range(6):
        codes = ((there[:, None] - means) ** 2).sum(-1).argmin(1)
        means = np.stack([there[codes == m].mean(0) if (codes == m).any() else means[m] for m in range(7)])
        if metric == "cosine":
            means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(found, means, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(counts, np.bincount(codes, minlength=7))


def test_kmeans_of_few_rows_takes_some_twice():
    there = jnp.arange(20) < 5
    x = jnp.where(there[:, None], rows(20, 4), 1e4)
    means, counts = jax.jit(lambda x, weight: kmeans(jax.random.key(0), x, weight, 8, most=10))(x, there * 1.0)
    assert counts.sum() == 5
    assert np.abs(means).max() < 10


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_the_first_batch_alone_sets_the_codes(learning):
    vq = VectorQuantizer(8, 6, learning=learning, kmeans=4, decay=1.0)  # what k-means set is not averaged away
    x = rows(3, 30, 6)
    variables = start(vq, x)
    assert not books(variables)["embedding"].any()
    if learning == "gradient":
        variables["params"]["embedding"] += 1.0  # where the optimiser may have brought it
    step, codebook = (compiled(f, variables, x) for f in (stepper(vq), lambda v, _: vq.apply(v, method="codebook")))
    out, variables = step(variables, x)
    codes = np.asarray(codebook(variables, x))
    np.testing.assert_allclose(out.quantized, codes[np.asarray(out.codes)[..., 0]], rtol=1e-4, atol=1e-5)
    assert np.square(x - out.quantized).mean() < 0.7 * x.var()
    assert books(variables)["ready"]
    np.testing.assert_allclose(codebook(step(variables, x + 5)[1], x), codes, rtol=1e-6)


def test_a_batch_with_nothing_in_it_sets_nothing():
    vq = EMA.copy(kmeans=3, restart_below=0.5)
    x, none = rows(2, 5, 6), np.zeros((2, 5), bool)
    variables = start(vq, x)
    step = compiled(stepper(vq), variables, x, none)
    for given, ready in ((none, False), (~none, True), (none, True)):
        before = books(variables)["embedding"]
        _, variables = step(variables, x, given)
        assert books(variables)["ready"] == ready
        if not given.any():
            np.testing.assert_allclose(books(variables)["embedding"], before, rtol=1e-4)


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_dead_codes_are_replaced_by_vectors_of_the_batch(learning):
    vq = VectorQuantizer(12, 6, learning=learning, kmeans=0, spread=1.0, decay=0.5, restart_below=0.6)
    x = rows(1, 6, 6)
    variables = start(vq, x)
    before = np.asarray(apply(vq, variables, method="codebook"))
    out, variables = train(vq, variables, x)
    used = np.isin(np.arange(12), out.codes)
    after, state = np.asarray(apply(vq, variables, method="codebook")), books(variables)
    assert 0 < used.sum() < 12  # unused ones have an average of half a vector
    assert all((np.abs(x[0] - code).max(1) < 1e-6).any() for code in after[~used])
    np.testing.assert_allclose(state["usage"][~used], 0.6)
    if learning == "ema":
        np.testing.assert_allclose(state["sums"][~used], 0.6 * after[~used], rtol=1e-6)
    else:
        np.testing.assert_allclose(after[used], before[used], rtol=1e-6)


def test_codes_learned_by_gradient_are_drawn_to_their_vectors():
    x = rows(2, 10, 6)
    variables = start(GRADIENT, x)
    np.testing.assert_array_equal(variables["params"]["embedding"], 0)
    variables["params"]["embedding"] = 0.1 * rows(12, 6, seed=4)
    codebook = books(variables)["embedding"] + variables["params"]["embedding"]
    np.testing.assert_allclose(apply(GRADIENT, variables, method="codebook"), codebook, rtol=1e-6)
    out, _ = train(GRADIENT, variables, x)
    to_params, to_x = gradients(GRADIENT, variables, x, lambda out: out.losses["codebook"])
    codes, flat = np.asarray(out.codes).ravel(), x.reshape(-1, 6)
    wanted = np.zeros_like(codebook)
    np.add.at(wanted, codes, 2 * (codebook[codes] - flat) / flat.size)
    np.testing.assert_allclose(to_params["embedding"], wanted, rtol=1e-5, atol=1e-7)
    assert not np.asarray(to_x).any()
    to_params, to_x = gradients(GRADIENT, variables, x, lambda out: out.losses["commitment"])
    assert not np.asarray(to_params["embedding"]).any()
    np.testing.assert_allclose(
        np.asarray(to_x).reshape(-1, 6), 0.25 * 2 * (flat - codebook[codes]) / flat.size, rtol=1e-5, atol=1e-7
    )
    to_params, to_x = gradients(GRADIENT, variables, x, lambda out: (out.quantized * x).sum())
    assert not np.asarray(to_params["embedding"]).any()
    np.testing.assert_array_equal(to_x, x)


def test_the_rotation_trick_lengthens_a_gradient_tenfold_at_most():
    quantizer = VectorQuantizer(1, 3, estimator="rotation")
    code = jnp.asarray([[0.0, 0.0, 2.0]])

    @jax.jit
    def slope(x):
        return jax.grad(lambda x: quantizer.passed(x, code)[0, 2])(x)

    for length, ratio in ((1.0, 2.0), (0.25, 8.0), (1e-7, 10.0)):
        np.testing.assert_allclose(np.linalg.norm(slope(jnp.asarray([[length, 0.0, 0.0]]))), ratio, rtol=1e-5)


def test_the_rotation_trick_keeps_the_angle_of_a_gradient():
    vq = EMA.copy(estimator="rotation")
    x, pull = rows(2, 5, 6), rows(2, 5, 6, seed=3)
    variables = start(vq, x)
    out, _ = train(vq, variables, x)
    codebook = books(variables)["embedding"]
    q = codebook[np.asarray(out.codes)[..., 0]]
    np.testing.assert_allclose(out.quantized, q, rtol=1e-6, atol=1e-7)
    got = np.asarray(gradients(vq, variables, x, lambda out: (out.quantized * pull).sum())[1])

    def angle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    np.testing.assert_allclose(angle(got, x), angle(pull, q), atol=1e-5)
    ratio = np.linalg.norm(q, axis=-1) / np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), ratio * np.linalg.norm(pull, axis=-1), rtol=1e-5)
    for row in np.ndindex(2, 5):
        a, b = (each[row] / np.linalg.norm(each[row]) for each in (x, q))
        r = (a + b) / np.linalg.norm(a + b)
        turn = ratio[row] * (np.eye(6) - 2 * np.outer(r, r) + 2 * np.outer(b, a))
        np.testing.assert_allclose(turn @ x[row], q[row], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(got[row], turn.T @ pull[row], rtol=1e-4, atol=1e-5)


def test_the_gradient_of_residual_levels_passes_once_or_from_each():
    x, pull = rows(2, 7, 6), rows(2, 7, 6, seed=3)
    for gradient, times in (("once", 1), ("each", 3)):
        quantizer = ResidualQuantizer(EMA, 3, gradient=gradient)
        _, got = gradients(quantizer, start(quantizer, x), x, lambda out: (out.quantized * pull).sum())
        np.testing.assert_allclose(got, times * pull, rtol=1e-6)


def test_residual_levels_quantize_what_is_left():
    quantizer = ResidualQuantizer(VectorQuantizer(16, 6), 4)
    x = rows(4, 40, 6)
    variables = train(quantizer, start(quantizer, x), x)[1]
    out = apply(quantizer, variables, x)
    errors, left = [], x
    for level in range(4):
        book = np.asarray(variables["codebooks"]["book"]["embedding"][level])
        np.testing.assert_array_equal(
            np.asarray(out.codes)[..., level], ((left[..., None, :] - book) ** 2).sum(-1).argmin(-1)
        )
        left = left - book[np.asarray(out.codes)[..., level]]
        some = np.where(np.arange(4) <= level, out.codes, -1)
        rebuilt = apply(quantizer, variables, some, method="decode")
        np.testing.assert_allclose(x - rebuilt, left, atol=1e-5)
        errors.append((left**2).mean())
    assert errors[3] < 0.8 * errors[2] < 0.64 * errors[1] < 0.5 * errors[0]
    np.testing.assert_allclose(out.losses["commitment"], 0.25 * np.mean(errors), rtol=1e-5)


def test_stage_dropout_leaves_out_last_levels_of_some_examples():
    quantizer = ResidualQuantizer(EMA, 4, dropout=1.0)
    x = rows(64, 3, 6)
    variables = start(quantizer, x)
    out, after = train(quantizer, variables, x)
    there = np.asarray(out.codes) >= 0
    kept = there.sum(-1)
    assert (there == (np.arange(4) < kept[..., None])).all()
    assert (kept == kept[:, :1]).all()
    assert set(kept.ravel()) == {1, 2, 3, 4}
    np.testing.assert_allclose(apply(quantizer, variables, out.codes, method="decode"), out.quantized, atol=1e-5)
    got = np.asarray(after["codebooks"]["book"]["usage"]).sum(1) - 0.9 * 12
    np.testing.assert_allclose(got, 0.1 * there.sum((0, 1)), rtol=1e-4)
    assert (np.asarray(apply(quantizer, variables, x).codes) >= 0).all()


def test_groups_are_quantizers_of_their_own():
    quantizer = GroupedQuantizer(EMA.copy(dim=3), 2)
    x = rows(4, 10, 6)
    variables = start(quantizer, x)
    out, after = train(quantizer, variables, x)
    for group in range(2):
        own = {"codebooks": jax.tree.map(lambda leaf, group=group: leaf[group], variables["codebooks"]["book"])}
        part, state = train(EMA.copy(dim=3), own, x[..., 3 * group : 3 * group + 3])
        np.testing.assert_array_equal(out.codes[..., group], part.codes[..., 0])
        np.testing.assert_allclose(out.quantized[..., 3 * group : 3 * group + 3], part.quantized, rtol=1e-6)
        np.testing.assert_allclose(
            after["codebooks"]["book"]["embedding"][group], state["codebooks"]["embedding"], rtol=1e-6
        )
    with pytest.raises(ZooError, match="6 numbers do not divide into 4 groups"):
        GroupedQuantizer(EMA, 4).init(jax.random.key(0), jnp.asarray(x))
