"""The mixture of experts against Hugging Face's Mixtral: outputs, gradients and balance loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch runs the peer")
mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="the peer")

from zoo.layers.mlp import create_mlp  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

DIM, HIDDEN, EXPERTS, TOP_K = 16, 24, 4, 2


def test_mixtral():
    config = mixtral.MixtralConfig(
        hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    peer = mixtral.MixtralSparseMoeBlock(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in peer.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    rng = np.random.default_rng(0)
    x, cotangent = rng.standard_normal((2, 3, 7, DIM)).astype(np.float32)
    theirs_x = torch.tensor(x, requires_grad=True)
    theirs = peer(theirs_x)
    theirs.backward(torch.tensor(cotangent))

    both = peer.experts.gate_up_proj.detach().numpy()
    parameters = {
        "router": peer.gate.weight.detach().numpy().T,
        "gate": both[:, :HIDDEN].transpose(0, 2, 1),
        "in": both[:, HIDDEN:].transpose(0, 2, 1),
        "out": peer.experts.down_proj.detach().numpy().transpose(0, 2, 1),
    }
    module = create_mlp("moe", DIM, hidden=HIDDEN, experts=EXPERTS, top_k=TOP_K, balance=1.0)

    @jax.jit
    def ours(parameters, x):
        def run(parameters, x):
            return module.apply({"params": parameters}, x, mutable=["losses"])

        y, vjp, losses = jax.vjp(run, parameters, x, has_aux=True)
        return y, vjp(jnp.asarray(cotangent)), losses["losses"]

    y, (d_parameters, d_x), losses = ours(parameters, x)
    np.testing.assert_allclose(y, theirs.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(d_x, theirs_x.grad.numpy(), atol=1e-5)
    np.testing.assert_allclose(d_parameters["router"], peer.gate.weight.grad.numpy().T, atol=1e-4)
    np.testing.assert_allclose(d_parameters["out"], peer.experts.down_proj.grad.numpy().transpose(0, 2, 1), atol=1e-4)
    logits = peer.gate(torch.tensor(x))[0]
    # They add up the shares of a token's choices, so that top_k, not 1, is what even routing gives.
    balance = mixtral.load_balancing_loss_func((logits,), EXPERTS, TOP_K) / TOP_K
    np.testing.assert_allclose(losses["balance"], [balance.item()], rtol=1e-5)
