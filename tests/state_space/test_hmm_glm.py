"""HMM-GLM: inference against enumeration, EM against its promise, and a simulated network found again."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import gammaln

from zoo.errors import ZooError
from zoo.state_space import hmm_glm as hg

KEY = jax.random.key(0)
QUICK = {"xla_backend_optimization_level": 0}


def quick(function: Any, **options: Any) -> Any:
    """Compiled fast; called eagerly, each of a function's operations would be a program to compile."""
    return jax.jit(partial(function, **options), compiler_options=QUICK)


def random_model(seed: int, states: int = 3, neurons: int = 4, lags: int = 2, prior: str = "one_hot") -> hg.HMMGLM:
    """A model with no part at its initial value."""
    rng = np.random.default_rng(seed)
    begin = quick(hg.initial_model, neurons=neurons, states=states, lags=lags, prior=prior)
    model = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), begin(KEY))
    log_transition = np.log(rng.dirichlet(np.ones(states), states))
    return hg.HMMGLM(model.network, jnp.asarray(log_transition))


def test_rates_are_the_papers_sum():
    rng = np.random.default_rng(0)
    spikes = rng.poisson(0.7, (7, 4)).astype(float)
    with jax.enable_x64(True):
        network = random_model(0).network
        got = np.asarray(quick(hg.rates)(network, jnp.asarray(spikes)))
        emissions = np.asarray(quick(hg.log_emissions)(network, jnp.asarray(spikes)))
    sign, strength = (np.asarray(network.connections[name]) for name in ("sign", "strength"))
    a = np.exp(sign) / np.exp(sign).sum(-1, keepdims=True)
    a = hg.FLOOR + (1 - 3 * hg.FLOOR) * a
    phi = np.exp(network.lags) / np.exp(network.lags).sum(-1, keepdims=True)
    for s, t, n in itertools.product(range(3), range(7), range(4)):
        drive = float(network.bias[s, n])
        for k in (1, 2):
            if t - k < 0:
                continue
            drive += float(network.own[s, n, k - 1]) * spikes[t - k, n]
            for m in set(range(4)) - {n}:
                w = (a[s, n, m, 2] - a[s, n, m, 0]) * math.log1p(math.exp(strength[s, n, m]))
                drive += w * phi[n, m, k - 1] * spikes[t - k, m]
        assert got[s, t, n] == pytest.approx(math.log1p(math.exp(drive)), abs=1e-6)
    wanted = (spikes * np.log(got) - got - gammaln(spikes + 1)).sum(-1).T
    np.testing.assert_allclose(emissions, wanted, atol=1e-10)


def test_the_prior_is_the_density_of_gumbel_softmax():
    """(K − 1)! τ^(K−1) (sum π_i / a_i^τ)^−K prod π_i / a_i^(τ+1), K = 3, for each of the two connections."""
    tau = 0.7
    with jax.enable_x64(True):
        network = random_model(1, states=1, neurons=2).network
        got = float(quick(hg.log_prior, temperature=tau)(network))
        log_a = np.log(np.asarray(quick(hg._signs)(network)))
    pi = np.exp(np.asarray(network.shared))
    pi /= pi.sum(-1, keepdims=True)
    wanted = 0.0
    for n, m in ((0, 1), (1, 0)):
        a, p = np.exp(log_a[0, n, m]), pi[n, m]
        density = math.gamma(3) * tau**2 * (p / a**tau).sum() ** -3 * np.prod(p / a ** (tau + 1))
        wanted += math.log(density)
    assert got == pytest.approx(wanted, abs=1e-8)


@pytest.mark.parametrize("states", [1, 3])
def test_inference_equals_enumeration(states: int):
    rng = np.random.default_rng(2)
    spikes = rng.poisson(0.7, (6, 4)).astype(float)
    with jax.enable_x64(True):
        model = random_model(2, states)

        @partial(jax.jit, compiler_options=QUICK)
        def inferred(model: hg.HMMGLM, spikes: jax.Array) -> tuple:
            emissions = hg.log_emissions(model.network, spikes)
            return emissions, hg.smooth(model, spikes), hg.filter(model, spikes), hg.viterbi(model, spikes)

        emissions, smoothed, filtered, best = inferred(model, jnp.asarray(spikes))
        emissions, filtered, best = (np.asarray(part) for part in (emissions, filtered, best))
    transition = np.asarray(model.log_transition)

    def joint(path: tuple[int, ...]) -> float:
        moves = sum(transition[i, j] for i, j in itertools.pairwise(path))
        return -math.log(states) + moves + sum(emissions[t, s] for t, s in enumerate(path))

    for length in range(1, 7):
        paths = np.array(list(itertools.product(range(states), repeat=length)))
        log_joint = np.array([joint(tuple(path)) for path in paths])
        total = np.logaddexp.reduce(log_joint)
        share = np.exp(log_joint - total)
        last = [share[paths[:, -1] == s].sum() for s in range(states)]
        np.testing.assert_allclose(filtered[length - 1], last, atol=1e-10)
    assert float(smoothed.log_likelihood) == pytest.approx(total, abs=1e-10)
    np.testing.assert_array_equal(best, paths[log_joint.argmax()])
    for t in range(6):
        np.testing.assert_allclose(
            smoothed.states[t], [share[paths[:, t] == s].sum() for s in range(states)], atol=1e-10
        )
    for t, i, j in itertools.product(range(5), range(states), range(states)):
        both = share[(paths[:, t] == i) & (paths[:, t + 1] == j)].sum()
        assert float(smoothed.transitions[t, i, j]) == pytest.approx(both, abs=1e-10)


@pytest.mark.slow
def test_a_long_recording_keeps_its_precision():
    rng = np.random.default_rng(3)
    spikes = rng.poisson(0.7, (1000, 4))
    run, model = quick(hg.smooth), random_model(3)
    rough = run(model, jnp.asarray(spikes, jnp.float32))
    with jax.enable_x64(True):
        exact = run(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model), jnp.asarray(spikes, jnp.float64))
    # The log likelihood, about −7,000, is known to thousandths; posteriors do not come from such numbers.
    np.testing.assert_allclose(rough.states, exact.states, atol=1e-4)


@pytest.mark.parametrize("prior", hg.PRIORS)
def test_no_step_of_em_lowers_the_objective(prior: str):
    spikes = np.random.default_rng(4).poisson(0.7, (2, 60, 3)).astype(float)
    with jax.enable_x64(True):
        model = random_model(4, 2, 3, prior=prior)
        fit = quick(hg.fit, iterations=6, steps=5, rate=0.1)
        objective = np.asarray(fit(model, jnp.asarray(spikes)).objective)
    assert (np.diff(objective) > 0).all()
    assert objective[-1] - objective[0] > 5


@pytest.mark.slow
def test_one_state_is_a_glm():
    """With one state and a prior that says nothing, EM ends where Poisson regressions of each neuron end."""
    spikes = np.random.default_rng(5).poisson(0.7, (1, 80, 2)).astype(float)
    with jax.enable_x64(True):
        model = quick(hg.initial_model, neurons=2, states=1, lags=1, prior="gaussian")(KEY)
        model = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model)
        fitted = quick(hg.fit, iterations=4, steps=150, rate=0.05, sigma=1e6)(model, jnp.asarray(spikes)).model
        got = np.asarray(quick(hg.rates)(fitted.network, jnp.asarray(spikes[0])))[0]
        likelihood = float(quick(hg.smooth)(fitted, jnp.asarray(spikes[0])).log_likelihood)
    x = spikes[0]
    before = np.concatenate([np.zeros((1, 2)), x[:-1]])
    total = 0.0
    for n in range(2):
        # Fisher scoring of the regression of neuron n on both neurons one bin before.
        design = np.stack([np.ones(80), before[:, n], before[:, 1 - n]], axis=1)
        beta = np.zeros(3)
        for _ in range(50):
            rate, slope = np.logaddexp(0, design @ beta), 1 / (1 + np.exp(-design @ beta))
            score = design.T @ (slope * (x[:, n] / rate - 1))
            beta = beta + np.linalg.solve((design * (slope**2 / rate)[:, None]).T @ design, score)
        rate = np.logaddexp(0, design @ beta)
        total += (x[:, n] * np.log(rate) - rate - gammaln(x[:, n] + 1)).sum()
        np.testing.assert_allclose(got[:, n], rate, atol=1e-3)
    assert likelihood == pytest.approx(total, abs=1e-4)


def simulated(length: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spikes [T, 5], states [T], signs [2, 5, 5] of a network that rewires itself about every 100 bins."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1, 0, 1], (2, 5, 5), p=[0.3, 0.4, 0.3])
    signs[:, range(5), range(5)] = 0
    states, spikes = np.zeros(length, int), np.zeros((length, 5))
    for t in range(1, length):
        states[t] = states[t - 1] if rng.random() < 0.99 else 1 - states[t - 1]
        drive = 0.3 + 1.2 * signs[states[t]] @ spikes[t - 1]
        spikes[t] = rng.poisson(np.logaddexp(0, drive))
        spikes[t] = np.minimum(spikes[t], 4)
    return spikes, states, signs


@pytest.mark.slow
def test_states_and_signs_of_a_simulated_network_are_recovered():
    spikes, states, signs = simulated(1200, 6)
    data = jnp.asarray(spikes, jnp.float32)[None]
    begin = quick(jax.vmap(partial(hg.initial_model, neurons=5, states=2, lags=1)))
    models = begin(jax.random.split(jax.random.key(1), 2))
    # Two beginnings side by side; the one that explains most is taken.
    fitted = jax.jit(jax.vmap(partial(hg.fit, iterations=25, steps=15, rate=0.05), (0, None)))(models, data)
    best = jax.tree.map(lambda leaf: leaf[fitted.objective[:, -1].argmax()], fitted.model)
    decode = quick(hg.viterbi)
    path = np.asarray(decode(best, data[0]))
    if (path == states).mean() < 0.5:
        best = hg.reordered(best, jnp.array([1, 0]))
        path = np.asarray(decode(best, data[0]))
    assert (path == states).mean() > 0.95
    kinds = np.asarray(best.network.connections["sign"]).argmax(-1) - 1
    others = ~np.eye(5, dtype=bool)
    assert (kinds == signs)[:, others].mean() > 0.85
    w = np.asarray(quick(hg.weights)(best.network))
    strong = (signs != 0) & others
    assert (np.sign(w) == signs)[strong].all()


@pytest.mark.slow
def test_recordings_are_fitted_side_by_side():
    spikes = jnp.asarray(np.random.default_rng(7).poisson(0.7, (2, 1, 40, 3)), jnp.float32)
    begin = quick(jax.vmap(partial(hg.initial_model, neurons=3, states=2, lags=2)))
    models = begin(jax.random.split(jax.random.key(2), 2))
    run = partial(hg.fit, iterations=3, steps=5)
    together = quick(jax.vmap(run))(models, spikes)
    alone = quick(run)(jax.tree.map(lambda leaf: leaf[1], models), spikes[1])
    np.testing.assert_allclose(together.objective[1], alone.objective, rtol=1e-5)


def test_another_prior_is_refused():
    with pytest.raises(ZooError, match="prior is one of one_hot, gaussian, got 'laplace'"):
        hg.initial_model(jax.random.key(0), 3, states=2, lags=1, prior="laplace")
