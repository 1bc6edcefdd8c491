"""Where cuDNN serves sparse attention: which masks, what they are called there, and that a GPU program takes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against import normal

from kernels.sparse_attention import Blocks, Causal, Full, Segments, Window, cudnn, sparse_attention

SERVED = (Full(), Causal(), Window(5), Causal() & Window(5), Window(7) & Causal() & Window(5))


def arguments(time=12):
    return normal(0, 2, time, 4, 8), normal(1, 2, time, 2, 8), normal(2, 2, time, 2, 8)


@pytest.mark.parametrize("mask", SERVED, ids=str)
def test_masks_are_translated(mask):
    theirs = cudnn.attention(*arguments(), mask, 0.3, implementation="xla")
    ours = sparse_attention(*arguments(), mask, scale=0.3, implementation="reference")
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-6)


def test_what_is_refused_is_said(monkeypatch):
    q, k, v = arguments()
    assert "not" in cudnn.refusal(q, k, v, Causal())  # float32, or no cuDNN on this machine
    there = cudnn.attention
    monkeypatch.setattr(cudnn, "attention", lambda *arrays: there(*arrays, implementation="xla"))
    assert cudnn.refusal(q, k, v, Causal()) is None
    for mask in (Window(5, symmetric=True), Segments((4, 8)), Causal() | Window(3), Blocks(np.ones((3, 3), bool), 4)):
        assert "no mask such as" in cudnn.refusal(q, k, v, mask)
    assert "12 queries and 10 keys" in cudnn.refusal(q, k[:, :10], v[:, :10], Full())
    assert "cuDNN: " in cudnn.refusal(q[0], k, v, Causal())


@pytest.fixture
def replaced(monkeypatch):
    """cuDNN stands ready, and does something else than attention."""
    monkeypatch.setattr(cudnn, "refusal", lambda *arguments: None)
    monkeypatch.setattr(cudnn, "attention", lambda q, k, v, mask, scale: jnp.cbrt(q) + 0 * (k.sum() + v.sum()))


def test_only_a_program_for_an_nvidia_gpu_takes_it(replaced):
    q, k, v = arguments()

    def gradient(q, k, v):
        return jax.grad(lambda q, k, v: jnp.sum(sparse_attention(q, k, v, Window(5)) ** 2), (0, 1, 2))(q, k, v)

    ours = jax.jit(gradient)(q, k, v)
    with_name = jax.grad(lambda *a: jnp.sum(sparse_attention(*a, Window(5), implementation="xla") ** 2), (0, 1, 2))
    for got, wanted in zip(ours, jax.jit(with_name)(q, k, v), strict=True):
        np.testing.assert_array_equal(got, wanted)
    texts = {
        platform: jax.jit(gradient).trace(q, k, v).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda")
    }
    assert "cbrt" in texts["cuda"]
    assert "exponential" not in texts["cuda"]
    assert "cbrt" not in texts["cpu"]


def test_segments_and_named_forms_do_not_ask_for_it(replaced):
    q, k, v = arguments()
    ids = jnp.zeros(q.shape[:2], jnp.int32)
    for options in ({"segment_ids": ids}, {"implementation": "xla"}):
        program = jax.jit(lambda *a, options=options: sparse_attention(*a, Causal(), **options)).trace(q, k, v)
        assert "cbrt" not in program.lower(lowering_platforms=("cuda",)).as_text()
