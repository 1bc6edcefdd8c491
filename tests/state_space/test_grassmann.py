"""Grassmann mixing: its definition in float64, what Plücker coordinates are, parallel tokens, and errors."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.state_space.grassmann import Grassmann, plucker

QUICK = {"xla_backend_optimization_level": 0}
BATCH, TIME, DIM = 2, 14, 6
OPTIONS = {"width": 4, "offsets": (1, 3, 8)}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def drawn(mixer: Grassmann) -> Any:
    """Variables, moved off their initial values."""
    variables = nn.unbox(jax.jit(mixer.init, compiler_options=QUICK)(jax.random.key(0), normal(0, BATCH, TIME, DIM)))
    leaves, tree = jax.tree.flatten(variables)
    return jax.tree.unflatten(tree, [leaf + 0.3 * normal(n, *leaf.shape) for n, leaf in enumerate(leaves)])


@pytest.mark.parametrize("fusion", ["blend", "residual"])
@pytest.mark.parametrize("gaps", [False, True])
def test_the_mixer_is_its_definition(fusion: str, gaps: bool):
    mixer = Grassmann(DIM, fusion=fusion, **OPTIONS)
    variables, x = drawn(mixer), normal(9, BATCH, TIME, DIM)
    there = np.random.default_rng(3).random((BATCH, TIME)) < (0.7 if gaps else 2)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    h = np.asarray(x, np.float64)
    z = h @ p["reduce"]["kernel"] + p["reduce"]["bias"]
    wanted = np.empty_like(h)
    for b in range(BATCH):
        for t in range(TIME):
            lifted = []
            for offset in OPTIONS["offsets"]:
                if t >= offset and there[b, t - offset]:
                    plane = np.outer(z[b, t], z[b, t - offset])
                    plane = (plane - plane.T)[np.triu_indices(4, 1)]
                    plane /= np.linalg.norm(plane)
                    lifted.append(plane @ p["lift"]["kernel"] + p["lift"]["bias"])
            g = np.mean(lifted, axis=0) if lifted else np.zeros(DIM)
            alpha = 1 / (1 + np.exp(-(np.concatenate([h[b, t], g]) @ p["gate"]["kernel"] + p["gate"]["bias"])))
            mixed = alpha * h[b, t] + (1 - alpha) * g if fusion == "blend" else h[b, t] + alpha * g
            normed = (mixed - mixed.mean()) / np.sqrt(mixed.var() + 1e-5)
            wanted[b, t] = normed * p["norm"]["scale"] + p["norm"]["bias"]
    got = np.asarray(jax.jit(mixer.apply, compiler_options=QUICK)(variables, x, mask=jnp.asarray(there)))
    np.testing.assert_allclose(got[there], wanted[there], rtol=1e-4, atol=1e-5)


def test_coordinates_name_the_plane():
    a, b = normal(0, 5, 7), normal(1, 5, 7)
    p = plucker(a, b, 1e-8)
    assert p.shape == (5, 21)
    np.testing.assert_allclose(jnp.linalg.norm(p, axis=-1), 1, rtol=1e-5)
    # Another basis of the same plane, turned the same way and the other way.
    np.testing.assert_allclose(plucker(2 * a - b, 0.5 * a + 3 * b, 1e-8), p, atol=1e-5)
    np.testing.assert_allclose(plucker(b, a, 1e-8), -p, atol=1e-6)
    # |p|² = |a|² |b|² − (a · b)²: with a large ε the norm shows.
    area = jnp.sum(a * a, -1) * jnp.sum(b * b, -1) - jnp.sum(a * b, -1) ** 2
    wanted = jnp.sqrt(area / (area + 100.0))
    np.testing.assert_allclose(jnp.linalg.norm(plucker(a, b, 10.0), axis=-1), wanted, rtol=1e-5)


def test_tokens_that_are_all_alike_have_finite_gradients():
    mixer = Grassmann(DIM, **OPTIONS)
    variables = drawn(mixer)
    x = jnp.broadcast_to(normal(9, DIM), (BATCH, TIME, DIM))
    cotangent = normal(4, BATCH, TIME, DIM)

    def pulled(variables: Any, x: jax.Array) -> Any:
        return jax.vjp(mixer.apply, variables, x)[1](cotangent)

    gradients = jax.jit(pulled, compiler_options=QUICK)(variables, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_dropout_only_in_training():
    mixer = Grassmann(DIM, dropout=0.5, **OPTIONS)
    variables, x = drawn(mixer), normal(9, BATCH, TIME, DIM)
    run = jax.jit(mixer.apply, static_argnames="train", compiler_options=QUICK)
    plain = np.asarray(run(variables, x))
    wanted = jax.jit(Grassmann(DIM, **OPTIONS).apply, compiler_options=QUICK)(variables, x)
    np.testing.assert_array_equal(plain, wanted)
    dropped = np.asarray(run(variables, x, train=True, rngs={"dropout": jax.random.key(0)}))
    kept = dropped != 0
    assert 0.3 < kept.mean() < 0.7
    np.testing.assert_allclose(dropped[kept], 2 * plain[kept], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "sum"}, "grassmann: fusion is blend or residual, got 'sum'"),
        ({"offsets": (0, 1)}, r"grassmann: got offsets \(0, 1\) and width 32, wanted from 1 and from 2 on"),
        ({"width": 1}, "and width 1, wanted from 1 and from 2 on"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ZooError, match=message):
        jax.eval_shape(Grassmann(DIM, **options).init, jax.random.key(0), normal(0, BATCH, TIME, DIM))
