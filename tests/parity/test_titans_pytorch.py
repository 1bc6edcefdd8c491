"""The neural memory against lucidrains/titans-pytorch, and the shares of a chunk against flash-linear-attention."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.state_space.titans_memory import Memory, neural_memory, pooled, token_paths

pytestmark = pytest.mark.filterwarnings("ignore")

BATCH, TIME, CHUNK, HEADS, WIDTH = 2, 11, 4, 2, 8


@pytest.mark.parametrize(("depth", "residual"), [(1, False), (2, False), (2, True)])
def test_granularity_chunk_is_titans_pytorch(depth, residual):
    """Outputs, and gradients of every parameter: theirs where chunks and batches are of one size, one head's answers
    after another without the gate and projection that follow. Their loss is a mean over features, ours a sum.
    """
    torch = pytest.importorskip("torch", reason="the peer runs on it")
    peer = pytest.importorskip("titans_pytorch", reason="the memory it is compared with")
    torch.manual_seed(0)
    theirs = peer.NeuralMemory(
        HEADS * WIDTH,
        dim_head=WIDTH,
        heads=HEADS,
        chunk_size=CHUNK,
        batch_size=CHUNK,
        mem_model_norm_add_residual=residual,
        default_model_kwargs={"depth": depth, "expansion_factor": 4.0},
    )
    theirs.retrieve_gate, theirs.combine_heads = None, torch.nn.Identity()
    for parameter in theirs.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    rng = np.random.default_rng(0)
    x, cotangent = (rng.standard_normal((BATCH, TIME, HEADS * WIDTH)).astype(np.float32) for _ in range(2))
    wanted = theirs(torch.tensor(x))[0]
    wanted.backward(torch.tensor(cotangent))

    def ours(parameters: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        def linear(name: str, x: jax.Array) -> jax.Array:
            y = x @ parameters[f"{name}.weight"].T
            return y + parameters[f"{name}.bias"] if f"{name}.bias" in parameters else y

        def normed(name: str) -> jax.Array:
            root = jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + jnp.finfo(x.dtype).eps)
            return x / root * parameters[f"{name}.weight"]

        asked, stored = normed("retrieve_norm"), normed("store_norm")
        q, k, v = (
            linear(name, y).reshape(BATCH, TIME, HEADS, WIDTH)
            for name, y in (("to_queries", asked), ("to_keys", stored), ("to_values", stored))
        )
        theta = jax.nn.sigmoid(linear("to_adaptive_step.0", stored)) / WIDTH
        alpha, eta = (
            pooled(linear(f"{name}.0", stored), CHUNK, None, None)[0] for name in ("to_decay_factor", "to_momentum")
        )
        first, *others = (parameters[f"memory_model_parameters.{n}"][None] for n in range(depth + residual))
        # With a norm its scale comes first.
        weights = (*others, first) if residual else (first, *others)
        initial = Memory(weights, tuple(map(jnp.zeros_like, weights)))
        gates = jax.nn.log_sigmoid(-alpha), jax.nn.log_sigmoid(eta)
        out, _ = neural_memory(q, k, v, theta, *gates, initial=initial, chunk=CHUNK, granularity="chunk")
        return out.reshape(x.shape)

    parameters = {
        name: jnp.asarray(each.detach().numpy())
        for name, each in theirs.named_parameters()
        # The network that holds the shapes of the memory, whose weights no output depends on.
        if not name.startswith("memory_model.")
    }
    out, vjp = jax.vjp(ours, parameters, jnp.asarray(x))
    close(out, wanted.detach().numpy())
    gradients, _ = vjp(jnp.asarray(cotangent))
    for name, gradient in gradients.items():
        close(gradient, theirs.get_parameter(name).grad.numpy())


def test_shares_of_a_chunk_are_those_of_flash_linear_attention():
    """b, f and G. The rest of their definition cannot be compared: its gradient of the layer norm is another."""
    torch = pytest.importorskip("torch", reason="the peer runs on it")
    package = importlib.util.find_spec("fla")
    if package is None:
        pytest.skip("could not find fla, the shares it is compared with")
    # The package itself asks for Triton.
    file = Path(package.submodule_search_locations[0]) / "ops" / "titans" / "log_impl.py"
    theirs = importlib.util.module_from_spec(importlib.util.spec_from_file_location("log_impl", file))
    theirs.__spec__.loader.exec_module(theirs)
    rng = np.random.default_rng(1)
    theta, alpha, eta = (rng.uniform(0.05, 0.95, (BATCH, HEADS, TIME)).astype(np.float32) for _ in range(3))
    paths = token_paths(jnp.asarray(theta), jnp.log1p(-alpha), jnp.log(eta), None)
    given = (torch.tensor(each)[..., None] for each in (theta, alpha, eta))
    b, _, f, _, _, steps, last_momentum, last_steps = theirs.combine_params_log(*given, TIME)
    close(paths.weights[..., 0], b)
    close(paths.momentum[..., 0], f)
    close(paths.steps, steps)
    close(paths.last_momentum[..., 0], last_momentum)
    close(paths.last_steps, last_steps)


def close(got: object, wanted: object) -> None:
    """Rounding errors of float32 apart."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()
