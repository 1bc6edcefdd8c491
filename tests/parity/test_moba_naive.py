"""Mixture of block attention against its authors' code: github.com/MoonshotAI/MoBA, whose `moba` is on the path."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch runs the authors' code")
peer = pytest.importorskip("moba_naive", reason="the package wants CUDA: PYTHONPATH=MoBA/moba of the authors' code")

from zoo.attention.moba import MoBA  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

LENGTHS, BLOCK = (24, 19), 4  # the last block is short


def test_outputs_and_gradients_are_those_of_the_naive_form():
    rng = np.random.default_rng(0)
    time = sum(LENGTHS)
    x, cotangent = rng.standard_normal((2, 1, time, 16), np.float32)
    mixer = MoBA(16, heads=2, block_size=BLOCK, top_k=3, rotary=False)
    kernels = {name: 0.5 * rng.standard_normal((16, 2, 8), np.float32) for name in ("query", "key", "value")}
    params = {name: {"kernel": jnp.asarray(kernel)} for name, kernel in kernels.items()}
    params["out"] = {"kernel": jnp.eye(16).reshape(2, 8, 16)}
    tokens = torch.tensor(x[0], requires_grad=True)
    q, k, v = (torch.einsum("td,dhk->thk", tokens, torch.tensor(kernel)) for kernel in kernels.values())
    borders = torch.tensor(np.cumsum([0, *LENGTHS]))
    theirs = peer.moba_attn_varlen_naive(q, k, v, borders, max(LENGTHS), BLOCK, 3).reshape(time, 16)
    theirs.backward(torch.tensor(cotangent[0]))
    ids = np.repeat(np.arange(2), LENGTHS)[None]  # the second begins with a block
    ours, pull = jax.vjp(lambda x: mixer.apply({"params": params}, x, segment_ids=jnp.asarray(ids)), jnp.asarray(x))
    for got, wanted in ((ours, theirs.detach().numpy()), (pull(cotangent)[0], tokens.grad.numpy())):
        assert np.abs(got[0] - wanted).max() < 1e-5 * np.abs(wanted).max()
