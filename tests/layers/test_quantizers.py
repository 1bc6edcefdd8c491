"""Quantizers: their updates by hand, their gradients, what is not there, and several devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from zoo.errors import ZooError
from zoo.layers.quantizers import (
    AnnealedQuantizer,
    FiniteScalarQuantizer,
    GroupedQuantizer,
    GumbelQuantizer,
    KeyValueBottleneck,
    LookupFreeQuantizer,
    Quantizer,
    ResidualQuantizer,
    VectorQuantizer,
    annealed_one_hot,
    kmeans,
    unit,
)

EMA = VectorQuantizer(12, 6, kmeans=0, spread=1.0, decay=0.9)
COSINE = VectorQuantizer(12, 6, metric="cosine", kmeans=0, spread=1.0, decay=0.9)
GRADIENT = VectorQuantizer(12, 6, learning="gradient", kmeans=0, spread=1.0)

ALL: Mapping[str, Quantizer] = {
    "ema": EMA.copy(kmeans=3, restart_below=0.5),
    "cosine": COSINE.copy(kmeans=3, estimator="rotation"),
    "gradient": GRADIENT.copy(kmeans=3, restart_below=0.5),
    "residual": ResidualQuantizer(EMA.copy(kmeans=3, estimator="rotation"), 3, dropout=0.5, gradient="each"),
    "unit residual": ResidualQuantizer(COSINE.copy(kmeans=0), 3, unit_residual=True),
    "grouped": GroupedQuantizer(GRADIENT.copy(dim=3, metric="cosine", kmeans=3), 2),
    "finite scalar": FiniteScalarQuantizer((8, 5, 5, 4, 3, 3)),
    "lookup-free": LookupFreeQuantizer(6, temperature=1.0),
    "annealed": AnnealedQuantizer(12, 6),
    "gumbel": GumbelQuantizer(12, 6),
    "bottleneck": KeyValueBottleneck(GroupedQuantizer(EMA.copy(dim=4, kmeans=3), 2), 6, projection=(6, 8)),
}


SHAPE = (8, 10, 6)
QUICK = {"xla_backend_optimization_level": 0}
"""Compilation takes longer than these small programs run."""


@pytest.fixture(params=ALL, scope="module")
def case(request: Any) -> tuple[Quantizer, Any, Any]:
    """A quantizer, its variables before training, and its compiled training step."""
    quantizer = ALL[request.param]
    variables = start(quantizer, rows(*SHAPE))
    return quantizer, variables, compiled(stepper(quantizer), variables, rows(*SHAPE), np.ones(SHAPE[:2], bool))


def rows(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def compiled(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    return jax.jit(function).lower(*arguments).compile(QUICK)


def start(quantizer: Quantizer, x: Any) -> Any:
    keys = {"params": jax.random.key(0), "codes": jax.random.key(1)}
    return compiled(lambda x: nn.meta.unbox(quantizer.init(keys, x)), x)(x)


def stepper(quantizer: Quantizer, seed: int = 2) -> Callable[..., Any]:
    """(variables, x, valid) → what a training step returns, and the variables after it."""

    def step(variables: Any, x: Any, valid: Any = None) -> Any:
        rngs = {"codes": jax.random.key(seed)}
        out, new = quantizer.apply(variables, x, valid=valid, train=True, mutable=["codebooks"], rngs=rngs)
        return out, {**variables, **new}

    return step


def train(quantizer: Quantizer, variables: Any, x: Any) -> tuple[Any, Any]:
    return compiled(stepper(quantizer), variables, x)(variables, x)


def apply(quantizer: Quantizer, variables: Any, *arguments: Any, **options: Any) -> Any:
    return compiled(lambda *given: quantizer.apply(*given, **options), variables, *arguments)(variables, *arguments)


def gradients(quantizer: Quantizer, variables: Any, x: Any, weigh: Callable[[Any], Any]) -> Any:
    """Of `weigh(what a training step returns)`: to the parameters and to x."""

    def value(params: Any, x: Any) -> Any:
        return weigh(stepper(quantizer)({**variables, "params": params}, x)[0])

    params = variables.get("params", {})
    return compiled(jax.grad(value, (0, 1)), params, x)(params, x)


def books(variables: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in variables["codebooks"].items()}


def close(a: Any, b: Any, **tolerance: float) -> None:
    """Trees of the same structure, and equal numbers."""
    (here, one), (there, other) = jax.tree.flatten(a), jax.tree.flatten(b)
    assert one == other
    for p, q in zip(here, there, strict=True):
        np.testing.assert_allclose(p, q, **tolerance)


def test_decoding_its_codes_gives_what_was_quantized(case):
    quantizer, variables, step = case
    x, valid = rows(*SHAPE), np.ones(SHAPE[:2], bool)
    valid[1, 5:] = False
    variables = step(variables, x, valid)[1]
    out = compiled(lambda v, x, valid: quantizer.apply(v, x, valid=valid), variables, x, valid)(variables, x, valid)
    codes = np.asarray(out.codes)
    assert codes.shape == (8, 10, len(quantizer.code_sizes))
    assert codes.dtype == np.int32
    assert ((codes[valid] >= 0) & (codes[valid] < quantizer.code_sizes)).all()
    assert (codes[~valid] == -1).all()
    assert not np.asarray(out.quantized)[~valid].any()
    np.testing.assert_allclose(apply(quantizer, variables, codes, method="decode"), out.quantized, atol=1e-5)


def test_what_is_not_there_is_not_read(case):
    _, variables, step = case
    x, valid = rows(*SHAPE), np.zeros(SHAPE[:2], bool)
    valid[:5, :2] = True  # ten are left, fewer than the codes
    spoiled = np.where(valid[..., None], x, 1e4).astype(np.float32)
    a, b = (step(variables, given, valid) for given in (x, spoiled))
    close(a, b, rtol=1e-6)


def test_eight_devices_update_as_one(case):
    quantizer, variables, step = case
    x, valid = rows(*SHAPE), rows(*SHAPE[:2], seed=1) < 1
    _, one = step(variables, x, valid)
    one = step(one, x + 0.1, valid)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        variables, (x, valid) = jax.device_put(variables, whole), jax.device_put((x, valid), split)
        step = jax.jit(stepper(quantizer), out_shardings=(None, whole)).lower(variables, x, valid).compile(QUICK)
        _, many = step(variables, x, valid)
        many = step(many, jax.device_put(x + 0.1, split), valid)
    close(one, many, rtol=1e-4, atol=1e-5)  # sums in another order


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
    vq = ALL["ema"]
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
    moving = ALL["bottleneck"]
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


@pytest.mark.parametrize(
    ("quantizer", "says"),
    [
        (EMA.copy(metric="l1"), "VectorQuantizer metric: got 'l1', wanted one of"),
        (EMA.copy(learning="adam"), "VectorQuantizer learning: got 'adam'"),
        (EMA.copy(estimator="none"), "VectorQuantizer estimator: got 'none'"),
        (EMA.copy(dim=5), "got vectors of 6 numbers, wanted 5"),
        (ResidualQuantizer(EMA, 2, gradient="all"), "ResidualQuantizer gradient: got 'all'"),
        (FiniteScalarQuantizer((8, 2)), r"levels: got \(8, 2\), wanted at least 3"),
        (FiniteScalarQuantizer((8, 8)), "got vectors of 6 numbers, wanted 2"),
        (LookupFreeQuantizer(1), "bits: got 1, wanted 2 to 24"),
        (LookupFreeQuantizer(5), "got vectors of 6 numbers, wanted 5"),
        (GumbelQuantizer(8, 6, temperatures=(1.0, 0.0)), r"GumbelQuantizer: got temperatures \(1.0, 0.0\)"),
        (AnnealedQuantizer(8, 5), "AnnealedQuantizer: got vectors of 6 numbers, wanted 5"),
    ],
)
def test_what_it_cannot_do_is_refused(quantizer, says):
    with pytest.raises(ZooError, match=says):
        quantizer.init({"params": jax.random.key(0), "codes": jax.random.key(1)}, jnp.zeros((2, 6)))


class AutoEncoder(nn.Module):
    """Two layers to a quantizer and two back."""

    quantizer: Quantizer

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> tuple[Any, Any]:
        found = self.quantizer(nn.Dense(8)(nn.gelu(nn.Dense(64)(x))), train=train)
        return nn.Dense(64)(nn.gelu(nn.Dense(64)(found.quantized))), found


def patches(count: int, seed: int) -> np.ndarray:
    """[count, 64]: a sine of 4 to 12 periods in noise with a 1/f spectrum."""
    rng = np.random.default_rng(seed)
    spectrum = rng.normal(size=(count, 32, 2)) @ [1, 1j] / np.sqrt(np.arange(1, 33))
    noise = np.fft.irfft(np.pad(spectrum, ((0, 0), (1, 0))), 64)
    phase = rng.uniform(4, 12, (count, 1)) * np.arange(64) / 64 + rng.uniform(size=(count, 1))
    return (noise / noise.std() + 1.5 * np.sin(2 * np.pi * phase)).astype(np.float32)


def live_codes(quantizer: VectorQuantizer, steps: int = 400) -> float:
    """The share of codes that new patches use, after an auto-encoder was trained with the quantizer."""
    model, data, test = AutoEncoder(quantizer), jnp.asarray(patches(4096, 0)), jnp.asarray(patches(2048, 1))
    optimizer = optax.adam(2e-3)
    keys = {"params": jax.random.key(0), "codes": jax.random.key(1)}

    def loss(params: Any, others: Any, x: Any, key: Any) -> Any:
        given, rngs = {"params": params, **others}, {"codes": key}
        (y, found), others = model.apply(given, x, train=True, mutable=["codebooks"], rngs=rngs)
        return jnp.square(y - x).mean() + sum(found.losses.values()), others

    def step(carry: Any, key: Any) -> Any:
        params, others, state = carry
        x = data[jax.random.randint(key, (256,), 0, len(data))]
        gradient, others = jax.grad(loss, has_aux=True)(params, others, x, key)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), others, state), None

    @jax.jit
    def trained() -> Any:
        others = nn.meta.unbox(model.init(keys, data[:256]))
        params = others.pop("params")
        keys_ = jax.random.split(jax.random.key(2), steps)
        (params, others, _), _ = jax.lax.scan(step, (params, others, optimizer.init(params)), keys_)
        return model.apply({"params": params, **others}, test)

    reconstruction, found = trained()
    assert np.square(reconstruction - test).mean() < 0.95 * test.var()
    return len(np.unique(found.codes)) / quantizer.codes


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_no_codebook_collapses(learning):
    assert live_codes(VectorQuantizer(128, 8, learning=learning)) > 0.6


@pytest.mark.slow
def test_restarts_save_codes_that_start_badly():
    badly = VectorQuantizer(128, 8, learning="gradient", kmeans=0)
    assert live_codes(badly) < 0.4
    assert live_codes(badly.copy(restart_below=0.5)) > 0.6
