"""Neurons that drive each other in ways that change with a hidden state: a hidden Markov model of Poisson GLMs.

Source: Li et al., "One-hot Generalized Linear Model for Switching Brain State Discovery", ICLR 2024, and the authors'
code. In state s neuron n fires x_{t,n} ~ Poisson(softplus(drive)) with

    drive = b^s_n + sum_{m≠n} w^s_{nm} sum_{k=1..K} φ_{nm,k} x_{t−k,m} + sum_k h^s_{n,k} x_{t−k,n},

φ a softmax over lags, the same in all states. Priors on the weights of a state:

    one_hot   w = (A_exc − A_inh) · softplus(θ), A_{nm} in the simplex over {inhibits, none, excites}, with the density
              of a Gumbel-Softmax of temperature τ whose logits all states share
    gaussian  w ~ N(w0, σ²), all states sharing w0

Fitted by EM to the maximum of log p(x) + log prior. Where this differs from the authors' code: they draw A anew from a
Gumbel-Softmax for each gradient, here A itself is what is fitted, so that each step of EM raises one and the same
objective; and A is kept `FLOOR` away from the simplex's edges, where that density has no bound.
Everything is a pure function; shapes: R recordings, T time bins, N neurons, S states, K lags.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import gammaln, logsumexp
from jaxtyping import Float, Int

from zoo.errors import ZooError
from zoo.types import Array

PRIORS = ("one_hot", "gaussian")
FLOOR = 1e-3
"""Least share of a connection's sign."""
LEAST_LOG = -30.0
"""Log probability that stands for an impossible transition."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Network:
    """The GLMs of all states and the prior that they share."""

    bias: Array
    """b [S, N]"""
    own: Array
    """h [S, N, K], a neuron's own history, the bin before first"""
    lags: Array
    """[N, N, K], softmax over K gives φ"""
    connections: dict[str, Array]
    """one_hot: strength θ and sign, logits of A over (inhibits, none, excites); gaussian: weight. [S, N, N(, 3)]"""
    shared: Array
    """one_hot: logits of the prior [N, N, 3]; gaussian: w0 [N, N]"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HMMGLM:
    """A model: initial states are uniform, as in the authors' code."""

    network: Network
    log_transition: Array
    """log P [S, S], from state i to state j"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fitted:
    """What `fit` gives."""

    model: HMMGLM
    objective: Array
    """[iterations + 1], log p(x) + log prior, before each iteration and after the last"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Posterior:
    """States of one recording given what was seen."""

    log_likelihood: Array
    """[], log p(x)"""
    states: Array
    """[T, S], p(s_t | ...)"""
    transitions: Array
    """[T − 1, S, S], p(s_t, s_{t+1} | ...)"""


def initial_model(key: Array, neurons: int, *, states: int, lags: int, prior: str = "one_hot") -> HMMGLM:
    """Uniform φ and A, strength 1, transitions that stay with .98 (authors' code); own histories and signs slightly
    random, as states that are equal stay so.

    Raises ZooError for another prior.
    """
    if prior not in PRIORS:
        raise ZooError(f"hmm_glm: prior is one of {', '.join(PRIORS)}, got {prior!r}")
    own_key, sign_key = jax.random.split(key)
    pairs = states, neurons, neurons
    if prior == "one_hot":
        one = jnp.log(jnp.expm1(1.0))
        connections = {"strength": jnp.full(pairs, one), "sign": 0.1 * jax.random.normal(sign_key, (*pairs, 3))}
        shared = jnp.zeros((neurons, neurons, 3))
    else:
        connections = {"weight": 0.1 * jax.random.normal(sign_key, pairs)}
        shared = jnp.zeros((neurons, neurons))
    own = 0.1 * jax.random.normal(own_key, (states, neurons, lags))
    network = Network(jnp.zeros((states, neurons)), own, jnp.zeros((neurons, neurons, lags)), connections, shared)
    stay = jnp.eye(states) * 0.98 + (1 - jnp.eye(states)) * 0.02 / max(states - 1, 1)
    return HMMGLM(network, jnp.log(stay if states > 1 else jnp.ones((1, 1))))


def weights(network: Network) -> Float[Array, "S N N"]:
    """w, of neuron n (rows) from neuron m; the diagonal, which nothing uses, is 0."""
    parts = network.connections
    if "weight" in parts:
        w = parts["weight"]
    else:
        signs = _signs(network)
        w = (signs[..., 2] - signs[..., 0]) * jax.nn.softplus(parts["strength"])
    return w * (1 - jnp.eye(w.shape[-1]))


def rates(network: Network, spikes: Float[Array, "T N"]) -> Float[Array, "S T N"]:
    """Expected spikes of each bin in each state, given those of the bins before it."""
    count = network.own.shape[-1]
    padded = jnp.pad(spikes, ((count, 0), (0, 0)))
    past = jnp.stack([padded[count - k : len(padded) - k] for k in range(1, count + 1)], axis=-1)
    kernels = weights(network)[..., None] * jax.nn.softmax(network.lags, axis=-1)
    drive = jnp.einsum("tmk,snmk->stn", past, kernels) + jnp.einsum("tnk,snk->stn", past, network.own)
    return jax.nn.softplus(drive + network.bias[:, None]) + 1e-8


def log_emissions(network: Network, spikes: Float[Array, "T N"]) -> Float[Array, "T S"]:
    """log p(x_t | s_t, what came before)."""
    rate = rates(network, spikes)
    return (spikes * jnp.log(rate) - rate - gammaln(spikes + 1)).sum(-1).T


def log_prior(network: Network, temperature: float = 0.5, sigma: float = 1.0) -> Float[Array, ""]:
    """Log density of all connections: of Gumbel-Softmax (Jang et al., 1611.01144, appendix B), or normal."""
    others = 1 - jnp.eye(network.bias.shape[-1])
    if "weight" in network.connections:
        density = jax.scipy.stats.norm.logpdf(weights(network), network.shared, sigma)
    else:
        log_a, log_pi = jnp.log(_signs(network)), jax.nn.log_softmax(network.shared)
        kinds = log_a.shape[-1]
        density = gammaln(float(kinds)) + (kinds - 1) * jnp.log(temperature)
        density -= kinds * logsumexp(log_pi - temperature * log_a, axis=-1)
        density += (log_pi - (temperature + 1) * log_a).sum(-1)
    return (density * others).sum()


def smooth(model: HMMGLM, spikes: Float[Array, "T N"]) -> Posterior:
    """States given the whole recording: forward-backward as scans of products of S × S matrices in log space."""
    return forward_backward(log_emissions(model.network, spikes), model.log_transition)


def filter(model: HMMGLM, spikes: Float[Array, "T N"]) -> Float[Array, "T S"]:
    """p(s_t | x_1 .. x_t)."""
    products, _ = _prefix_products(_step_matrices(log_emissions(model.network, spikes), model.log_transition))
    return jax.nn.softmax(products[:, 0], axis=-1)


def forward_backward(log_emission: Float[Array, "T S"], log_transition: Float[Array, "S S"]) -> Posterior:
    """The same from log p(x_t | s_t) and log P; time in parallel."""
    matrices = _step_matrices(log_emission, log_transition)
    # Products from the end are products of the transposed from the start of reversed time: one scan does both.
    both = jnp.stack([matrices, jnp.swapaxes(matrices, -1, -2)[::-1]], axis=1)
    products, scales = _prefix_products(both)
    forward = products[:, 0, 0]
    backward = jnp.concatenate([logsumexp(products[:-1, 1], axis=-2)[::-1], jnp.zeros_like(forward[:1])])
    joint = forward[:-1, :, None] + matrices[1:] + backward[1:, None, :]
    transitions = jax.nn.softmax(joint.reshape(len(joint), -1), axis=-1).reshape(joint.shape)
    log_likelihood = logsumexp(forward[-1]) + scales[-1, 0]
    return Posterior(log_likelihood, jax.nn.softmax(forward + backward, axis=-1), transitions)


def viterbi(model: HMMGLM, spikes: Float[Array, "T N"]) -> Int[Array, " T"]:
    """The most probable sequence of states."""
    log_emission = log_emissions(model.network, spikes)

    def ahead(best: Array, emission: Array) -> tuple[Array, Array]:
        paths = best[:, None] + model.log_transition
        return paths.max(0) + emission, paths.argmax(0)

    best, origins = jax.lax.scan(ahead, log_emission[0], log_emission[1:])

    def back(state: Array, origin: Array) -> tuple[Array, Array]:
        return origin[state], state

    first, rest = jax.lax.scan(back, best.argmax(), origins, reverse=True)
    return jnp.concatenate([first[None], rest])


def fit(
    model: HMMGLM,
    spikes: Float[Array, "R T N"],
    *,
    iterations: int = 50,
    steps: int = 50,
    rate: float = 0.02,
    temperature: float = 0.5,
    sigma: float = 1.0,
) -> Fitted:
    """EM from `model` (see `initial_model`) on recordings that share it. No iteration lowers the objective.

    steps, rate         of Adam in each M step of the GLMs, which keeps the best it has met; transitions are exact
    temperature, sigma  of the priors
    Recordings with models of their own: `jax.vmap` over models and spikes [1, T, N].
    """

    def iterate(models: tuple[HMMGLM, HMMGLM], _: None) -> tuple[tuple[HMMGLM, HMMGLM], Array]:
        model = models[0]
        posterior = jax.vmap(partial(smooth, model))(spikes)
        objective = posterior.log_likelihood.sum() + log_prior(model.network, temperature, sigma)

        def expected(network: Network) -> Array:
            emission = jax.vmap(partial(log_emissions, network))(spikes)
            return (posterior.states * emission).sum() + log_prior(network, temperature, sigma)

        counts = jnp.log(posterior.transitions.sum((0, 1)))
        log_transition = jnp.maximum(jax.nn.log_softmax(jnp.maximum(counts, LEAST_LOG), axis=-1), LEAST_LOG)
        return (HMMGLM(_ascended(expected, model.network, steps, rate), log_transition), model), objective

    # One iteration more gives the objective of the last model; what it makes of that model is left aside.
    (_, last), objectives = jax.lax.scan(iterate, (model, model), length=iterations + 1)
    return Fitted(last, objectives)


def reordered(model: HMMGLM, order: Int[Array, " S"]) -> HMMGLM:
    """The same model with its states renumbered: new state i is old state order[i]."""
    network = model.network
    network = replace(
        network,
        bias=network.bias[order],
        own=network.own[order],
        connections={name: part[order] for name, part in network.connections.items()},
    )
    return HMMGLM(network, model.log_transition[order][:, order])


def _signs(network: Network) -> Float[Array, "S N N 3"]:
    """A, relaxed one-hot over (inhibits, none, excites)."""
    return FLOOR + (1 - 3 * FLOOR) * jax.nn.softmax(network.connections["sign"], axis=-1)


def _ascended(objective: Any, network: Network, steps: int, rate: float) -> Network:
    """The best of `steps` steps of Adam and of the beginning."""
    adam = optax.adam(rate)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        now, state, best, most = carry
        value, gradient = jax.value_and_grad(lambda network: -objective(network))(now)
        best, most = jax.tree.map(lambda old, new: jnp.where(-value > most, new, old), (best, most), (now, -value))
        updates, state = adam.update(gradient, state)
        return (optax.apply_updates(now, updates), state, best, most), None

    start = network, adam.init(network), network, objective(network)
    (last, _, best, most), _ = jax.lax.scan(step, start, length=steps)
    better = objective(last) > most
    return jax.tree.map(lambda old, new: jnp.where(better, new, old), best, last)


def _step_matrices(log_emission: Float[Array, "T S"], log_transition: Float[Array, "S S"]) -> Float[Array, "T S S"]:
    """log p(s_t, x_t | s_{t−1}); for t = 0, before which there is no state, the same from each."""
    first = jnp.full_like(log_transition, -jnp.log(len(log_transition)))
    steps = jnp.broadcast_to(log_transition, (len(log_emission), *log_transition.shape)).at[0].set(first)
    return steps + log_emission[:, None, :]


def _prefix_products(matrices: Float[Array, "*n S S"]) -> tuple[Float[Array, "*n S S"], Float[Array, "*n"]]:
    """Products of the first 1, 2, .. T matrices in log space, each up to a number, and that number."""
    return jax.lax.associative_scan(_product, _scaled(matrices))


def _scaled(matrices: Float[Array, "*n S S"]) -> tuple[Float[Array, "*n S S"], Float[Array, "*n"]]:
    """Matrices in log space whose largest entry is 0, and what it was: products of many then keep their precision."""
    largest = matrices.max((-2, -1))
    return matrices - largest[..., None, None], largest


def _product(early: tuple[Array, Array], late: tuple[Array, Array]) -> tuple[Array, Array]:
    matrix, scale = _scaled(logsumexp(early[0][..., :, :, None] + late[0][..., None, :, :], axis=-2))
    return matrix, early[1] + late[1] + scale
