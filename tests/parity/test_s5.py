"""S5 against s5-pytorch with copied weights: the system's outputs and gradients, also with irregular times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch runs the peer")
peer = pytest.importorskip("s5", reason="s5-pytorch is the peer")

from zoo.state_space.s5 import S5  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

DIM, STATES, BLOCKS, BATCH, LENGTH = 12, 8, 2, 2, 20


def copied(system: Any, value: Callable[[Any], Any], causal: bool) -> dict[str, Any]:
    """`value` of the peer's parameters, their data or their gradients, where ours have them."""
    weights = {name: value(parameter).numpy() for name, parameter in system.named_parameters()}
    C = np.stack(np.split(weights["C"], 1 if causal else 2, axis=1))
    return {
        "real": weights["Lambda"].real,
        "imaginary": weights["Lambda"].imag,
        "log_step": weights["log_step"].reshape(-1),
        "B": weights["B"],
        "C": np.stack([C.real, C.imag], axis=-1),
        "D": weights["D"],
    }


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize("irregular", [False, True])
def test_s5_pytorch(causal: bool, discretization: str, irregular: bool):
    torch.manual_seed(0)
    theirs = peer.S5(DIM, STATES, block_count=BLOCKS, bidir=not causal, bcInit="dense")
    system = theirs.seq
    system.discretize = getattr(peer.s5_model, f"discretize_{discretization}")
    rng = np.random.default_rng(0)
    x, cotangent = (rng.standard_normal((BATCH, LENGTH, DIM)).astype(np.float32) for _ in range(2))
    times = jnp.asarray(rng.uniform(0.5, 2, (BATCH, LENGTH)), jnp.float32) if irregular else None
    tokens = torch.tensor(x, requires_grad=True)
    wanted = theirs(tokens, step_scale=torch.tensor(np.asarray(times)) if irregular else 1.0)
    wanted.backward(torch.tensor(cotangent))

    options = {"states": STATES, "blocks": BLOCKS, "conjugate": False, "discretization": discretization}
    mixer = S5(DIM, causal=causal, **options)
    variables = jax.tree.map(jnp.asarray, copied(system, lambda parameter: parameter.detach(), causal))
    variables |= {"gate": {"kernel": jnp.zeros((DIM, DIM)), "bias": jnp.zeros(DIM)}}  # behind what is compared

    def ours(variables: Any, x: jax.Array) -> jax.Array:
        return mixer.apply({"params": variables}, x, times=times, method="filtered")

    got, pull = jax.vjp(ours, variables, jnp.asarray(x))
    d_variables, d_x = pull(jnp.asarray(cotangent))
    close(got, wanted.detach().numpy())
    close(d_x, tokens.grad.numpy())
    del d_variables["gate"]
    jax.tree.map(close, d_variables, copied(system, lambda parameter: parameter.grad, causal))


def close(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
