"""Griffin's recurrent block against recurrentgemma (JAX, real and complex) and transformers, with copied weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.state_space.rg_lru import RGLRU

pytestmark = pytest.mark.filterwarnings("ignore")

DIM, FEATURES, HEADS, BATCH, LENGTH, BORDER = 16, 24, 2, 2, 20, 7


def drawn(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def close(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("real", [True, False])
def test_recurrentgemma(real: bool):
    """Packed rows, outputs and all gradients."""
    try:
        from recurrentgemma.jax import modules
    except (ImportError, SyntaxError) as error:
        pytest.skip(f"recurrentgemma is the peer, with typeguard 2 and sentencepiece: {error}")
    peer = modules.RecurrentBlock(DIM, HEADS, FEATURES, lru_only_real=real)
    x, cotangent = drawn(0, BATCH, LENGTH, DIM), drawn(1, BATCH, LENGTH, DIM)
    time = jnp.arange(LENGTH)
    position = jnp.broadcast_to(jnp.where(time < BORDER, time, time - BORDER), (BATCH, LENGTH))
    ids = jnp.broadcast_to((time >= BORDER).astype(jnp.int32), (BATCH, LENGTH))
    weights = peer.init(jax.random.key(0), x, position)["params"]
    leaves, tree = jax.tree.flatten(weights)
    weights = jax.tree.unflatten(tree, [leaf + 0.1 * drawn(n, *leaf.shape) for n, leaf in enumerate(leaves)])

    def theirs(weights: Any, x: jax.Array) -> jax.Array:
        return peer.apply({"params": weights}, x, position)[0]

    mixer = RGLRU(DIM, heads=HEADS, features=FEATURES, real=real)

    def ours(weights: Any, x: jax.Array) -> jax.Array:
        return mixer.apply({"params": from_recurrentgemma(weights)}, x, segment_ids=ids)

    got, pull = jax.vjp(ours, weights, x)
    wanted, peer_pull = jax.vjp(theirs, weights, x)
    close(got, wanted)
    jax.tree.map(close, pull(cotangent), peer_pull(cotangent))


def from_recurrentgemma(weights: Any) -> dict[str, Any]:
    unit, convolution = weights["rg_lru"], weights["conv_1d"]
    angle = {"angle": unit["a_imag_param"]} if "a_imag_param" in unit else {}
    return {
        "gate": weights["linear_y"],
        "input": weights["linear_x"],
        "convolution": {"kernel": convolution["w"], "bias": convolution["b"]},
        "decay_gate": {"kernel": unit["a_gate"]["w"], "bias": unit["a_gate"]["b"]},
        "input_gate": {"kernel": unit["input_gate"]["w"], "bias": unit["input_gate"]["b"]},
        "decay": unit["a_param"],
        "out": weights["linear_out"],
        **angle,
    }


def test_transformers():
    torch = pytest.importorskip("torch", reason="PyTorch runs the peer")
    module = pytest.importorskip(
        "transformers.models.recurrent_gemma.modeling_recurrent_gemma", reason="transformers is a peer"
    )
    from transformers import RecurrentGemmaConfig

    config = RecurrentGemmaConfig(
        hidden_size=DIM, lru_width=FEATURES, num_attention_heads=HEADS, num_hidden_layers=1, conv1d_width=4
    )
    peer = module.RecurrentGemmaRecurrentBlock(config, 0)
    with torch.no_grad():
        for n, parameter in enumerate(peer.parameters()):
            parameter.copy_(0.5 * torch.tensor(np.asarray(drawn(n, *parameter.shape))))
    weights = {name: jnp.asarray(parameter.detach().numpy()) for name, parameter in peer.named_parameters()}

    def linear(name: str) -> dict[str, jax.Array]:
        return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}

    def blocks(name: str) -> dict[str, jax.Array]:
        return {"kernel": weights[f"rg_lru.{name}_weight"], "bias": weights[f"rg_lru.{name}_bias"]}

    variables = {
        "gate": linear("linear_y"),
        "input": linear("linear_x"),
        "convolution": {"kernel": weights["conv_1d.weight"][:, 0].T, "bias": weights["conv_1d.bias"]},
        "decay_gate": blocks("recurrent_gate"),
        "input_gate": blocks("input_gate"),
        "decay": weights["rg_lru.recurrent_param"],
        "out": linear("linear_out"),
    }
    x = drawn(50, BATCH, LENGTH, DIM)
    positions = torch.arange(LENGTH)[None].expand(BATCH, -1)
    with torch.no_grad():
        wanted, _ = peer(torch.tensor(np.asarray(x)), positions, None, use_cache=False)
    close(RGLRU(DIM, heads=HEADS, features=FEATURES).apply({"params": variables}, x), wanted.numpy())
