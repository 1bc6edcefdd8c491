"""Native sparse attention against flash-linear-attention's layer, its kernel replaced by its naive parts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch runs the peer")
pytest.importorskip("triton", reason="the peer imports it, though nothing here runs on it")
layers = pytest.importorskip("fla.layers.nsa", reason="the peer")
naive = pytest.importorskip("fla.ops.nsa.naive", reason="the peer")

from zoo.attention.native_sparse import NativeSparse  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

DIM, HEADS, GROUPS, WIDTH, TIME, BLOCK, COUNT, WINDOW = 32, 4, 2, 8, 48, 4, 5, 6


def mixed(q: Any, k: Any, v: Any, g_cmp: Any, g_slc: Any, g_swa: Any, **_: Any) -> Any:
    """Their naive parts, put together as their `naive_nsa` does, which wants 16 heads a group and CUDA."""
    scale = WIDTH**-0.5
    k_cmp, v_cmp = (x.unflatten(1, (-1, BLOCK)).mean(2) for x in (k, v))
    compressed, _ = naive.naive_nsa_compression(q, k_cmp, v_cmp, BLOCK, scale)
    blocks = naive.naive_nsa_topk(q, k_cmp, COUNT, BLOCK, scale)
    selected = naive.naive_nsa_selection(q, k, v, blocks, BLOCK, scale)
    age = torch.arange(TIME)[:, None] - torch.arange(TIME)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    recent = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, attn_mask=(age >= 0) & (age < WINDOW), enable_gqa=True
    ).transpose(1, 2)
    return sum(g[..., None] * part for g, part in ((g_cmp, compressed), (g_slc, selected), (g_swa, recent)))


def turned(q: Any, k: Any, **_: Any) -> tuple[Any, Any]:
    """What their rotary module, a Triton kernel, does: halves of a head are the parts of pairs."""
    angle = torch.arange(TIME)[:, None] * 10_000.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def turn(x: Any) -> Any:
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    return turn(q), turn(k)


def kernel(linear: Any, *shape: int) -> np.ndarray:
    return linear.weight.detach().numpy().T.reshape(-1, *shape)


def test_outputs_and_gradients_are_those_of_the_layer(monkeypatch):
    monkeypatch.setattr(layers, "parallel_nsa", mixed)
    peer = layers.NativeSparseAttention(DIM, HEADS, GROUPS, WIDTH, block_size=BLOCK, block_counts=COUNT)
    peer.rotary.forward = turned
    generator = torch.Generator().manual_seed(0)
    for parameter in peer.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    params = {
        "query": {"kernel": kernel(peer.q_proj, HEADS, WIDTH)},
        "keys_0": {"kernel": kernel(peer.k_proj, GROUPS, WIDTH)},
        "values_0": {"kernel": kernel(peer.v_proj, GROUPS, WIDTH)},
        "gate": {"kernel": kernel(peer.g_proj, HEADS, 3)},
        "out": {"kernel": kernel(peer.o_proj, DIM).reshape(HEADS, WIDTH, DIM)},
    }
    x, cotangent = np.random.default_rng(1).standard_normal((2, 2, TIME, DIM), np.float32)
    tokens = torch.tensor(x, requires_grad=True)
    theirs = peer(tokens)[0]
    theirs.backward(torch.tensor(cotangent))

    mixer = NativeSparse(
        DIM,
        heads=HEADS,
        kv_heads=GROUPS,
        block_size=BLOCK,
        stride=BLOCK,
        compression_block=BLOCK,
        selected_blocks=COUNT,
        window=WINDOW,
        compress="mean",
        shared_kv=True,
        rotary_compressed=True,
    )
    ours, pull = jax.vjp(lambda x: mixer.apply({"params": params}, x), jnp.asarray(x))
    for got, wanted in ((ours, theirs.detach().numpy()), (pull(cotangent)[0], tokens.grad.numpy())):
        assert np.abs(got - wanted).max() < 2e-5 * np.abs(wanted).max()
