"""Quantizers against vector-quantize-pytorch: codes, values, losses, gradients, and codebooks after an update."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="vector-quantize-pytorch runs on PyTorch")
pytest.importorskip("vector_quantize_pytorch", reason="the peer: pip install vector-quantize-pytorch")

from vector_quantize_pytorch import FSQ, LFQ, ResidualVQ, VectorQuantize  # noqa: E402

from zoo.layers.quantizers import (  # noqa: E402
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    Quantizer,
    ResidualQuantizer,
    VectorQuantizer,
    unit,
)

pytestmark = pytest.mark.filterwarnings("ignore")

CODES, DIM, LEVELS = 20, 8, 3
X = np.random.default_rng(0).normal(size=(2, 40, DIM)).astype(np.float32)
PULL = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)
VALID = np.random.default_rng(2).uniform(size=X.shape[:2]) < 0.8
BOOKS = np.random.default_rng(3).normal(size=(LEVELS, CODES, DIM)).astype(np.float32)
USAGE = np.random.default_rng(4).uniform(1, 5, (LEVELS, CODES)).astype(np.float32)


def theirs(peer: Any, masked: bool) -> tuple[Any, ...]:
    """Value, codes, loss and gradient to x of a training step."""
    x = torch.tensor(X, requires_grad=True)
    value, codes, loss = peer.train()(x, mask=torch.tensor(VALID) if masked else None)
    (value * torch.tensor(PULL)).sum().backward()
    return value.detach().numpy(), codes.numpy(), loss.detach().numpy(), x.grad.numpy()


def ours(quantizer: Quantizer, variables: Any, masked: bool) -> tuple[Any, Any]:
    """(value, codes, losses and gradient to x) of a training step, and the new codebooks."""

    def step(x: Any) -> Any:
        valid = jnp.asarray(VALID) if masked else None
        rngs = {"codes": jax.random.key(0)}
        out, new = quantizer.apply(variables, x, valid=valid, train=True, mutable=["codebooks"], rngs=rngs)
        return (out.quantized * PULL).sum(), (out, new)

    gradient, (out, new) = jax.jit(jax.grad(step, has_aux=True))(jnp.asarray(X))
    return (out.quantized, np.asarray(out.codes), out.losses, gradient), new["codebooks"]


def state(level: int | slice) -> dict[str, Any]:
    ready = np.ones(USAGE[level].shape[:-1], bool)
    sums = BOOKS[level] * USAGE[level][..., None]
    return jax.tree.map(jnp.asarray, {"embedding": BOOKS[level], "usage": USAGE[level], "sums": sums, "ready": ready})


def given(codebook: Any, level: int) -> None:
    codebook.embed.data.copy_(torch.tensor(BOOKS[level])[None])
    codebook.cluster_size.data.copy_(torch.tensor(USAGE[level])[None])
    codebook.embed_avg.data.copy_(torch.tensor(BOOKS[level] * USAGE[level][:, None])[None])


def close(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * max(np.abs(wanted).max(), 1e-3))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_moving_averages(estimator: str, masked: bool):
    peer = VectorQuantize(DIM, CODES, decay=0.9, commitment_weight=0.25, rotation_trick=estimator == "rotation")
    given(peer._codebook, 0)
    value, codes, loss, gradient = theirs(peer, masked)
    vq = VectorQuantizer(CODES, DIM, decay=0.9, kmeans=0, estimator=estimator)
    out, new = ours(vq, {"codebooks": state(0)}, masked)
    np.testing.assert_array_equal(out[1][..., 0], codes)
    close(out[0], value)
    close(out[2]["commitment"], loss)
    close(out[3], gradient)
    close(new["embedding"], peer.codebook.numpy())
    close(new["usage"], peer._codebook.cluster_size[0].numpy())
    close(new["sums"], peer._codebook.embed_avg[0].numpy())


def test_dead_codes():
    peer = VectorQuantize(DIM, CODES, decay=0.9, threshold_ema_dead_code=2, rotation_trick=False)
    given(peer._codebook, 0)
    theirs(peer, False)
    vq = VectorQuantizer(CODES, DIM, decay=0.9, kmeans=0, restart_below=2.0)
    _, new = ours(vq, {"codebooks": state(0)}, False)
    close(new["usage"], peer._codebook.cluster_size[0].numpy())
    moved = (X.reshape(-1, 1, DIM) == peer.codebook.numpy()).all(-1).any(0)  # to a vector of the batch
    assert 0 < moved.sum() < CODES
    close(new["embedding"][~moved], peer.codebook.numpy()[~moved])
    assert (np.abs(X.reshape(-1, 1, DIM) - np.asarray(new["embedding"])[moved]).max(-1) < 1e-6).any(0).all()


def test_cosine_but_for_the_update():
    """Theirs averages sums and counts, ours means of length one, as LaBraM's: so only what is before it is compared."""
    peer = VectorQuantize(DIM, CODES, use_cosine_sim=True, commitment_weight=0.25, rotation_trick=False)
    book = unit(jnp.asarray(BOOKS[0]))
    peer._codebook.embed.data.copy_(torch.tensor(np.asarray(book))[None])
    value, codes, loss, gradient = theirs(peer, False)
    vq = VectorQuantizer(CODES, DIM, metric="cosine", kmeans=0)
    out, _ = ours(vq, {"codebooks": {**state(0), "embedding": book}}, False)
    np.testing.assert_array_equal(out[1][..., 0], codes)
    for mine, other in zip((out[0], out[2]["commitment"], out[3]), (value, loss, gradient), strict=True):
        close(mine, other)


def test_codes_learned_by_gradient():
    peer = VectorQuantize(
        DIM, CODES, learnable_codebook=True, ema_update=False, commitment_weight=1.0, rotation_trick=False
    )
    given(peer._codebook, 0)
    x = torch.tensor(X, requires_grad=True)
    value, codes, loss = peer.train()(x)
    loss.sum().backward()  # draws codes and inputs to each other, where ours has a term for each
    vq = VectorQuantizer(CODES, DIM, learning="gradient", commitment=1.0, kmeans=0)
    books = state(0)

    def step(params: Any, x: Any) -> Any:
        variables, rngs = {"params": params, "codebooks": books}, {"codes": jax.random.key(0)}
        out, _ = vq.apply(variables, x, train=True, mutable=["codebooks"], rngs=rngs)
        return sum(out.losses.values()), out

    params = {"embedding": jnp.zeros((CODES, DIM))}
    gradients, out = jax.jit(jax.grad(step, (0, 1), has_aux=True))(params, jnp.asarray(X))
    np.testing.assert_array_equal(out.codes[..., 0], codes.numpy())
    close(out.quantized, value.detach().numpy())
    close(out.losses["commitment"], loss.item())
    close(gradients[0]["embedding"], peer._codebook.embed.grad[0].numpy())
    close(gradients[1], x.grad.numpy())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_residual_levels(estimator: str, masked: bool):
    peer = ResidualVQ(
        dim=DIM, num_quantizers=LEVELS, codebook_size=CODES, decay=0.9, rotation_trick=estimator == "rotation"
    )
    for level, layer in enumerate(peer.layers):
        given(layer._codebook, level)
    value, codes, loss, gradient = theirs(peer, masked)
    book = VectorQuantizer(CODES, DIM, decay=0.9, commitment=1.0, kmeans=0, estimator=estimator)
    quantizer = ResidualQuantizer(book, LEVELS, gradient="each")
    out, new = ours(quantizer, {"codebooks": {"book": state(slice(None))}}, masked)
    np.testing.assert_array_equal(out[1], codes)
    close(out[0], value)
    close(out[2]["commitment"], loss.mean())
    close(out[3], gradient)
    close(new["book"]["embedding"], np.stack([layer.codebook.numpy() for layer in peer.layers]))


def test_finite_scalars():
    """Theirs bounds a thousandth outside the outermost levels, ours and the paper's code a thousandth inside."""
    levels = (8, 5, 5, 4, 3)
    x = X[..., :5] * 2
    quantizer = FiniteScalarQuantizer(levels, epsilon=-1e-3)
    # tan for artanh, as published, is another shift of even levels, by 4e-4: no number may be as near to a boundary.
    bounded = np.tanh(x + np.arctanh([0.5 / 3.5035, 0, 0, 0.5 / 1.5015, 0])) * (np.array(levels) - 1) * 1.001 / 2
    bounded -= np.array([0.5, 0, 0, 0.5, 0])
    clear = (np.abs(bounded % 1 - 0.5) > 2e-3).all(-1)
    assert clear.mean() > 0.9
    x = torch.tensor(x, requires_grad=True)
    value, codes = FSQ(list(levels)).train()(x)
    out = quantizer.apply({}, jnp.asarray(x.detach().numpy()))
    np.testing.assert_array_equal(np.asarray(out.codes)[clear, 0], codes.numpy()[clear])
    close(np.asarray(out.quantized)[clear], value.detach().numpy()[clear])
    value.sum().backward()
    gradient = jax.grad(lambda x: quantizer.apply({}, x).quantized.sum())(jnp.asarray(x.detach().numpy()))
    odd = np.array([1, 2, 4])
    close(np.asarray(gradient)[..., odd], x.grad.numpy()[..., odd])


def test_lookup_free():
    """At a temperature at which no code is less likely than the 1e-5 to which theirs clips probabilities.

    Without a mask: with one, theirs takes the mean code of each vector alone.
    """
    peer = LFQ(
        dim=DIM, codebook_size=2**DIM, entropy_loss_weight=0.1, commitment_loss_weight=0.25, diversity_gamma=0.7
    ).train()
    x = torch.tensor(0.1 * X, requires_grad=True)
    value, codes, loss = peer(x, inv_temperature=1.0)
    loss.backward()
    lfq = LookupFreeQuantizer(DIM, diversity=0.7, temperature=1.0)

    def losses(x: Any) -> Any:
        out = lfq.apply({}, x)
        return sum(out.losses.values()), out

    (got, out), gradient = jax.jit(jax.value_and_grad(losses, has_aux=True))(jnp.asarray(0.1 * X))
    # The paper's first bit is the lowest, theirs the highest.
    bits = codes.numpy()[..., None] >> np.arange(DIM)[::-1] & 1
    np.testing.assert_array_equal(out.codes[..., 0], (bits << np.arange(DIM)).sum(-1))
    close(out.quantized, value.detach().numpy())
    close(got, loss.item())
    close(gradient, x.grad.numpy())
