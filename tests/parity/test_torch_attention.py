"""Softmax attention against PyTorch's, outputs and all gradients."""

from __future__ import annotations

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is the peer")

from zoo.attention.softmax import Softmax  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("causal", [True, False])
def test_outputs_and_gradients_are_those_of_scaled_dot_product_attention(causal):
    rng = np.random.default_rng(0)
    x, cotangent = rng.standard_normal((2, 2, 19, 24), np.float32)
    mixer = Softmax(24, heads=6, kv_heads=2, rotary=False, causal=causal)
    variables = jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.value.shape, np.float32),
        jax.eval_shape(mixer.init, jax.random.key(0), x),
        is_leaf=lambda leaf: hasattr(leaf, "value"),
    )
    kernels = {name: torch.tensor(part["kernel"], requires_grad=True) for name, part in variables["params"].items()}
    tokens = torch.tensor(x, requires_grad=True)
    q, k, v = (torch.einsum("btd,dhk->bhtk", tokens, kernels[name]) for name in ("query", "key", "value"))
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    theirs = torch.einsum("bhtk,hkd->btd", mixed, kernels["out"])
    theirs.backward(torch.tensor(cotangent))

    ours, pull = jax.vjp(mixer.apply, variables, x)
    d_variables, d_x = pull(cotangent)
    figures = [(ours, theirs), (d_x, tokens.grad)]
    figures += [(d_variables["params"][name]["kernel"], kernel.grad) for name, kernel in kernels.items()]
    for got, wanted in figures:
        wanted = wanted.detach().numpy()
        assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()
