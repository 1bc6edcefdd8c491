"""Mamba-2 against transformers, the whole mixer with copied weights: outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch runs the peer")
modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2", reason="transformers has Mamba-2")

from zoo.state_space.mamba2 import Mamba2  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

DIM, HEADS, STATES, BATCH, LENGTH = 16, 4, 8, 2, 20


def copied(peer: Any, groups: int, value: Callable[[Any], Any]) -> dict[str, Any]:
    """`value` of the peer's parameters, their data or their gradients, where ours have them."""
    weights = {name: value(parameter).numpy() for name, parameter in peer.named_parameters()}
    inner, selected = 2 * DIM, groups * STATES
    gate, x, B, C, step = np.split(weights["in_proj.weight"], np.cumsum([inner, inner, selected, selected]), axis=0)
    kernels = np.split(weights["conv1d.weight"][:, 0], np.cumsum([inner, selected]))
    biases = np.split(weights["conv1d.bias"], np.cumsum([inner, selected]))
    projections = {"input": x, "gate": gate, "B": B, "C": C, "step_map": step, "out": weights["out_proj.weight"]}
    return {
        **{name: {"kernel": kernel.T} for name, kernel in projections.items()},
        **{f"convolutions_{n}": {"kernel": kernels[n].T, "bias": biases[n]} for n in range(3)},
        "A_log": weights["A_log"],
        "D": weights["D"],
        "step_bias": weights["dt_bias"],
        "norm_scale": weights["norm.weight"],
    }


@pytest.mark.parametrize("groups", [1, 2])
def test_agrees_with_transformers(groups: int):
    config = modeling.Mamba2Config(
        hidden_size=DIM, num_heads=HEADS, head_dim=2 * DIM // HEADS, state_size=STATES, n_groups=groups, chunk_size=8
    )
    peer = modeling.Mamba2Mixer(config, layer_idx=0)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter += 0.1 * torch.tensor(rng.standard_normal(parameter.shape), dtype=torch.float32)
    x, cotangent = (rng.standard_normal((BATCH, LENGTH, DIM)).astype(np.float32) for _ in range(2))
    tokens = torch.tensor(x, requires_grad=True)
    wanted = peer(tokens)
    wanted.backward(torch.tensor(cotangent))

    mixer = Mamba2(DIM, heads=HEADS, states=STATES, groups=groups)
    variables = jax.tree.map(jnp.asarray, copied(peer, groups, lambda parameter: parameter.detach()))
    got, pull = jax.vjp(lambda variables, x: mixer.apply({"params": variables}, x), variables, jnp.asarray(x))
    d_variables, d_x = pull(jnp.asarray(cotangent))
    close(got, wanted.detach().numpy())
    close(d_x, tokens.grad.numpy())
    jax.tree.map(close, d_variables, copied(peer, groups, lambda parameter: parameter.grad))


def close(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
