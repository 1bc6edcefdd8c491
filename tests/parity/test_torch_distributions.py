"""The one-hot prior of HMM-GLM against PyTorch's Gumbel-Softmax density, the Gaussian one against its normal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch's distributions are the peer")

from zoo.state_space import hmm_glm as hg  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("prior", hg.PRIORS)
def test_log_prior(prior: str):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        network = hg.initial_model(jax.random.key(0), 4, states=3, lags=1, prior=prior).network
        network = jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.standard_normal(leaf.shape)), network)
        got = float(hg.log_prior(network, temperature=0.5, sigma=0.7))
        others = ~np.eye(4, dtype=bool)
        shared = torch.tensor(np.asarray(network.shared))
        if prior == "one_hot":
            a = torch.tensor(np.asarray(hg._signs(network)))
            density = torch.distributions.RelaxedOneHotCategorical(torch.tensor(0.5).double(), logits=shared)
            each = density.log_prob(a / a.sum(-1, keepdim=True))
        else:
            each = torch.distributions.Normal(shared, 0.7).log_prob(torch.tensor(np.asarray(hg.weights(network))))
    np.testing.assert_allclose(got, each.numpy()[:, others].sum(), rtol=1e-9)
