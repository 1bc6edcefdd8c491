"""A matrix for each person: whose rows are multiplied by what."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.layers.subject import SubjectLayer

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 5, 3)).astype(np.float32)


def made(layer: SubjectLayer) -> Any:
    return nn.unbox(layer.init(jax.random.key(0), X, np.zeros(4, np.int32)))


def test_every_example_is_multiplied_by_its_person() -> None:
    layer = SubjectLayer(3)
    variables = made(layer)
    matrices = np.asarray(variables["params"]["kernel"])
    subject = np.array([2, 0, -1, 1], np.int32)
    y = layer.apply(variables, X, subject)
    for row, person in enumerate(subject):
        matrix = matrices.mean(0) if person < 0 else matrices[person]
        np.testing.assert_allclose(y[row], X[row] @ matrix, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda v: layer.apply(v, X[:2], subject[:2]).sum())(variables)["params"]["kernel"]
    assert np.abs(gradient).max((1, 2)).tolist() == [
        pytest.approx(np.abs(gradient[0]).max()),
        0,
        pytest.approx(np.abs(gradient[2]).max()),
    ]


def test_identity_leaves_everyone_as_they_are() -> None:
    layer = SubjectLayer(2, start="identity")
    np.testing.assert_allclose(layer.apply(made(layer), X, np.array([0, 1, -1, 0], np.int32)), X, atol=1e-6)


def test_matrices_begin_with_the_published_spread() -> None:
    wide = np.zeros((1, 64), np.float32)
    kernel = SubjectLayer(4).init(jax.random.key(0), wide, np.zeros(1, np.int32))["params"]["kernel"].value
    assert kernel.std() == pytest.approx(1 / 8, rel=0.05)


def test_nobody_unknown_gets_in_where_that_is_an_error() -> None:
    layer = SubjectLayer(2, unknown="error")
    variables = made(layer)
    with pytest.raises(ZooError, match="got person -1, wanted 0 to 1"):
        layer.apply(variables, X, np.array([0, 1, -1, 0], np.int32))
    traced = np.asarray(jax.jit(layer.apply)(variables, X, np.array([0, 1, -1, 0], np.int32)))
    assert np.isnan(traced).any((1, 2)).tolist() == [False, False, True, False]
    with pytest.raises(ZooError, match="got person 2, wanted -1 to 1"):
        SubjectLayer(2).apply(variables, X, np.array([0, 1, 2, 0], np.int32))
    with pytest.raises(ZooError, match="wanted normal or identity"):
        SubjectLayer(2, start="zeros").apply(variables, X, np.zeros(4, np.int32))
