"""The bricks of SEANet, each against its definition written out in numpy."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.layers.seanet import (
    Convolution,
    ResidualLSTM,
    SEANetDecoder,
    SEANetEncoder,
    TransposedConvolution,
    check_seanet,
    seanet_flops,
)

QUICK = {"xla_backend_optimization_level": 0}
RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def applied(module: Any, params: Any, x: np.ndarray) -> np.ndarray:
    made = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x))["params"]
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, params)
    return jax.jit(module.apply).lower({"params": params}, x).compile(QUICK)({"params": params}, x)


@pytest.mark.parametrize(("width", "stride", "left"), [(5, 1, 2), (6, 3, 2)])
def test_a_convolution_reads_a_reflected_window_with_the_odd_sample_on_the_left(width, stride, left):
    x, direction, length, bias = array(2, 9, 3), array(width, 3, 4), array(4), array(4)
    out = applied(Convolution(3, 4, width, stride), {"direction": direction, "length": length, "bias": bias}, x)
    padded = np.pad(x, ((0, 0), (left, width), (0, 0)), mode="reflect")
    norm = np.sqrt(np.square(direction).sum((0, 1)))
    for step in range(9 // stride):
        window = padded[:, step * stride : step * stride + width]
        wanted = np.einsum("rwi,wio->ro", window, direction) / norm * length + bias
        np.testing.assert_allclose(out[:, step], wanted, rtol=1e-5, atol=1e-5)
    assert out.shape == (2, 9 // stride, 4)


@pytest.mark.parametrize(("stride", "left"), [(2, 1), (3, 2)])
def test_a_transposed_convolution_spreads_every_step(stride, left):
    x, direction, length, bias = array(2, 5, 3), array(2 * stride, 3, 4), array(3), array(4)
    out = applied(TransposedConvolution(3, 4, stride), {"direction": direction, "length": length, "bias": bias}, x)
    norm = np.sqrt(np.square(direction).sum((0, 2)))
    kernel = direction * (length / norm)[:, None]
    wanted = np.zeros((2, 6 * stride, 4))
    for step in range(5):
        wanted[:, step * stride : (step + 2) * stride] += np.einsum("ri,wio->rwo", x[:, step], kernel)
    np.testing.assert_allclose(out, wanted[:, left : left + 5 * stride] + bias, rtol=1e-5, atol=1e-5)


def test_the_lstm_is_its_recurrence_with_the_input_added():
    x, size, layers = array(3, 5, 4), 4, 2
    params = {"input": array(layers, 4, 16), "recurrent": array(layers, 4, 16)}
    params |= {"input_bias": array(layers, 16), "recurrent_bias": array(layers, 16)}
    out = applied(ResidualLSTM(size, layers), params, x)

    def sigmoid(z: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-z))

    given = x.astype(np.float64)
    for layer in range(layers):
        hidden, cell, each = np.zeros((3, size)), np.zeros((3, size)), []
        for step in range(5):
            gates = given[:, step] @ params["input"][layer] + params["input_bias"][layer]
            gates += hidden @ params["recurrent"][layer] + params["recurrent_bias"][layer]
            enter, forget, new, leave = np.split(gates, 4, axis=1)
            cell = sigmoid(forget) * cell + sigmoid(enter) * np.tanh(new)
            hidden = sigmoid(leave) * np.tanh(cell)
            each.append(hidden)
        given = np.stack(each, 1)
    np.testing.assert_allclose(out, x + given, rtol=1e-5, atol=1e-5)


def test_kernels_begin_as_long_as_they_are_drawn():
    params = nn.unbox(TransposedConvolution(3, 4, 2).init(jax.random.key(0), jnp.zeros((1, 5, 3))))["params"]
    np.testing.assert_allclose(params["length"], np.sqrt(np.square(params["direction"]).sum((0, 2))), rtol=1e-6)
    # PyTorch: uniform in ± (outputs · width)^-½.
    assert 0.8 * 16**-0.5 < np.abs(params["direction"]).max() <= 16**-0.5


@pytest.mark.parametrize("kind", [SEANetEncoder, SEANetDecoder])
def test_the_operations_of_the_published_size_are_its_kernels_times_their_steps(kind):
    given = jax.ShapeDtypeStruct((1, 512) if kind is SEANetEncoder else (1, 8, 256), np.float32)
    made = nn.unbox(jax.eval_shape(kind(256).init, jax.random.key(0), given))["params"]
    # Steps that a kernel is applied to; a transposed one meets each of its inputs once.
    at = {"unit0": 512, "unit1": 256, "unit2": 64, "down0": 256, "down1": 64, "down2": 8, "first": 512}
    if kind is SEANetDecoder:
        at = {"unit0": 64, "unit1": 256, "unit2": 512, "up0": 8, "up1": 64, "up2": 256, "first": 8}
    ends = {"lstm": 8, "last": 8 if kind is SEANetEncoder else 512}
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(made):
        if path[-1].key in ("direction", "input", "recurrent"):
            total += 2 * leaf.size * {**at, **ends}[path[0].key]
    assert seanet_flops(256, 32, (2, 4, 8), 5, 512) == total


@pytest.mark.parametrize("samples", [100, 128])
def test_windows_it_cannot_take_are_refused(samples):
    with pytest.raises(ZooError, match=f"got {samples} samples, wanted a multiple of 64, at least 192"):
        check_seanet((2, 4, 8), 5, samples)
