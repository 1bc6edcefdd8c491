"""Mamba against mambapy and transformers, whole mixers with copied weights: outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch runs the peers")

from zoo.state_space.mamba import Mamba  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

DIM, BATCH, LENGTH = 16, 2, 20


def copied(peer: Any, value: Callable[[Any], Any]) -> dict[str, Any]:
    """`value` of the peer's parameters, their data or their gradients, where ours have them."""
    weights = {name: value(parameter).numpy() for name, parameter in peer.named_parameters()}
    inner, gate = np.split(weights["in_proj.weight"], 2)
    return {
        "input": {"kernel": inner.T},
        "gate": {"kernel": gate.T},
        "convolution": {"kernel": weights["conv1d.weight"][:, 0].T, "bias": weights["conv1d.bias"]},
        "selection": {"kernel": weights["x_proj.weight"].T},
        "step_map": {"kernel": weights["dt_proj.weight"].T},
        "step_bias": weights["dt_proj.bias"],
        "A_log": weights["A_log"],
        "D": weights["D"],
        "out": {"kernel": weights["out_proj.weight"].T},
    }


def agrees(peer: Any) -> None:
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter += 0.1 * torch.tensor(rng.standard_normal(parameter.shape), dtype=torch.float32)
    x, cotangent = (rng.standard_normal((BATCH, LENGTH, DIM)).astype(np.float32) for _ in range(2))
    tokens = torch.tensor(x, requires_grad=True)
    wanted = peer(tokens)
    wanted.backward(torch.tensor(cotangent))

    mixer = Mamba(DIM)
    variables = jax.tree.map(jnp.asarray, copied(peer, lambda parameter: parameter.detach()))
    got, pull = jax.vjp(lambda variables, x: mixer.apply({"params": variables}, x), variables, jnp.asarray(x))
    d_variables, d_x = pull(jnp.asarray(cotangent))
    close(got, wanted.detach().numpy())
    close(d_x, tokens.grad.numpy())
    jax.tree.map(close, d_variables, copied(peer, lambda parameter: parameter.grad))


def close(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("parallel", [True, False])
def test_mambapy(parallel: bool):
    mambapy = pytest.importorskip("mambapy.mamba", reason="mambapy is a peer")
    agrees(mambapy.MambaBlock(mambapy.MambaConfig(d_model=DIM, n_layers=1, pscan=parallel)))


def test_transformers():
    module = pytest.importorskip("transformers.models.mamba.modeling_mamba", reason="transformers is a peer")
    from transformers import MambaConfig

    config = MambaConfig(hidden_size=DIM, state_size=16, num_hidden_layers=1, use_mambapy=False)
    agrees(module.MambaMixer(config, 0).eval())
