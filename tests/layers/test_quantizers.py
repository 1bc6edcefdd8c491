"""Quantizers: their contract, what is not there, several devices, refusals, and codebooks that do not collapse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from quantizing import COSINE, EMA, GRADIENT, QUICK, apply, close, compiled, rows, start, stepper

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
)

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


@pytest.fixture(params=ALL, scope="module")
def case(request: Any) -> tuple[Quantizer, Any, Any]:
    """A quantizer, its variables before training, and its compiled training step."""
    quantizer = ALL[request.param]
    variables = start(quantizer, rows(*SHAPE))
    return quantizer, variables, compiled(stepper(quantizer), variables, rows(*SHAPE), np.ones(SHAPE[:2], bool))


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
