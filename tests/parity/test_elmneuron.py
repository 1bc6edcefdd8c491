"""ELM neurons against their authors' code: github.com/AaronSpieler/elmneuron, whose root is on the path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch runs the authors' code")
PEERS = {
    version: pytest.importorskip(
        f"src.{module}", reason="no package: PYTHONPATH=elmneuron, a copy of the authors' code; it imports seaborn"
    )
    for version, module in ((1, "expressive_leaky_memory_neuron"), (2, "expressive_leaky_memory_neuron_v2"))
}

from zoo.state_space.elm import ELM  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

BATCH, LENGTH = 3, 25
OPTIONS = {
    "plain": ({"num_branch": 6, "num_synapse_per_branch": 3}, {"branches": 6, "synapses": 3}, 18),
    "windows": (
        {"num_branch": 4, "num_synapse_per_branch": 8, "input_to_synapse_routing": "neuronio_routing"},
        {"branches": 4, "synapses": 8, "routing": "windows"},
        21,
    ),
}


def copied(peer: Any, value: Callable[[Any], Any]) -> dict[str, Any]:
    """`value` of the peer's parameters, their data or their gradients, where ours have them."""
    weights = {name: value(parameter).numpy() for name, parameter in peer.named_parameters() if parameter.requires_grad}
    return {
        "weight": weights["_proto_w_s"],
        "inner_kernel": weights["mlp.network.0.weight"].T,
        "inner_bias": weights["mlp.network.0.bias"],
        "change_kernel": weights["mlp.network.2.weight"].T,
        "change_bias": weights["mlp.network.2.bias"],
        "time_logit": weights["_proto_tau_m"],
        "out": {"kernel": weights["w_y.weight"].T, "bias": weights["w_y.bias"]},
    }


@pytest.mark.parametrize("version", PEERS)
@pytest.mark.parametrize("options", OPTIONS)
def test_elmneuron(version: int, options: str):
    theirs, ours, inputs = OPTIONS[options]
    torch.manual_seed(0)
    peer = PEERS[version].ELM(
        inputs, 2, num_memory=10, mlp_activation="silu", memory_tau_max=150.0, learn_memory_tau=True, **theirs
    )
    rng = np.random.default_rng(0)
    with torch.no_grad():
        peer._proto_w_s += 0.5 * torch.tensor(rng.standard_normal(peer._proto_w_s.shape), dtype=torch.float32)
        # The ends of the range are at infinity there.
        peer._proto_tau_m.copy_(torch.tensor(rng.standard_normal(10), dtype=torch.float32))
    x = rng.standard_normal((BATCH, LENGTH, inputs)).astype(np.float32)
    cotangent = rng.standard_normal((BATCH, LENGTH, 2)).astype(np.float32)
    tokens = torch.tensor(x, requires_grad=True)
    wanted = peer(tokens)
    wanted.backward(torch.tensor(cotangent))

    neuron = ELM(
        inputs,
        memory=10,
        version=version,
        activation="silu",
        memory_times=(1.0, 150.0),
        learn_times=True,
        outputs=2,
        **ours,
    )
    variables = jax.tree.map(jnp.asarray, copied(peer, lambda parameter: parameter.detach()))
    got, pull = jax.vjp(lambda variables, x: neuron.apply({"params": variables}, x), variables, jnp.asarray(x))
    d_variables, d_x = pull(jnp.asarray(cotangent))
    close(got, wanted.detach().numpy())
    close(d_x, tokens.grad.numpy())
    jax.tree.map(close, d_variables, copied(peer, lambda parameter: parameter.grad))


def close(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
