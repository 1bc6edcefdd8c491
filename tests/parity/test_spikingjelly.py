"""Our neurons against SpikingJelly's, spikes and surrogate gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="SpikingJelly runs on PyTorch")
pytest.importorskip("spikingjelly", reason="the peer: pip install spikingjelly")

from spikingjelly.activation_based import neuron, surrogate  # noqa: E402

from zoo.attention.spiking import Neuron  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("name", "theirs"), [("sigmoid", surrogate.Sigmoid(alpha=4.0)), ("atan", surrogate.ATan(alpha=2.0))]
)
def test_neurons_are_spikingjellys(name: str, theirs: object):
    rng = np.random.default_rng(0)
    currents, cotangent = (2 * rng.standard_normal((6, 50)).astype(np.float32) for _ in range(2))
    peer = neuron.LIFNode(tau=2.0, v_threshold=0.5, surrogate_function=theirs, detach_reset=True, step_mode="m")
    given = torch.tensor(currents, requires_grad=True)
    spikes = peer(given)
    spikes.backward(torch.tensor(cotangent))

    got, vjp = jax.vjp(Neuron(threshold=0.5, surrogate=name), jnp.asarray(currents))
    np.testing.assert_array_equal(got, spikes.detach().numpy())
    np.testing.assert_allclose(vjp(jnp.asarray(cotangent))[0], given.grad.numpy(), rtol=1e-5, atol=1e-6)
