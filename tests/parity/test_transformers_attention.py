"""Gated attention and multi-head latent attention against Hugging Face's Qwen3-Next and DeepSeek-V3."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch runs the peers")
qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next", reason="the peer of gated attention")
deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3", reason="the peer of latents")

from zoo.attention.alternating_sparse import LocalLatent  # noqa: E402
from zoo.attention.gated import Gated  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

DIM, HEADS, WIDTH, TIME = 32, 4, 8, 21


def randomised(module: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def kernel(linear: Any, *shape: int) -> np.ndarray:
    """[in, *shape] of a linear map."""
    return linear.weight.detach().numpy().T.reshape(-1, *shape)


def angles(width: int, base: float = 10_000.0) -> tuple[Any, Any]:
    """Cosines and sines [1, T, width] as the peers take them."""
    rate = base ** (-np.arange(width // 2) * 2 / width)
    angle = np.tile(np.arange(TIME)[:, None] * rate, 2)[None]
    return torch.tensor(np.cos(angle), dtype=torch.float32), torch.tensor(np.sin(angle), dtype=torch.float32)


def compare(mixer: Any, params: Any, peer: Any, rope: int) -> None:
    """Outputs and gradients of the input."""
    x, cotangent = np.random.default_rng(1).standard_normal((2, 2, TIME, DIM), np.float32)
    tokens = torch.tensor(x, requires_grad=True)
    hidden = torch.full((TIME, TIME), -torch.inf).triu(1)[None, None]
    theirs, _ = peer(hidden_states=tokens, position_embeddings=angles(rope), attention_mask=hidden)
    theirs.backward(torch.tensor(cotangent))
    ours, pull = jax.vjp(lambda x: mixer.apply({"params": jax.tree.map(jnp.asarray, params)}, x), jnp.asarray(x))
    for got, wanted in ((ours, theirs.detach().numpy()), (pull(cotangent)[0], tokens.grad.numpy())):
        assert np.abs(got - wanted).max() < 2e-5 * np.abs(wanted).max()


def test_gated_attention_is_that_of_qwen3_next():
    config = qwen.Qwen3NextConfig(
        hidden_size=DIM, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=WIDTH, attn_implementation="eager"
    )
    peer = randomised(qwen.Qwen3NextAttention(config, layer_idx=0))
    both = kernel(peer.q_proj, HEADS, 2 * WIDTH)  # of each head the query, then the gate
    params = {
        "query": {"kernel": both[..., :WIDTH]},
        "gate": {"kernel": both[..., WIDTH:]},
        "key": {"kernel": kernel(peer.k_proj, 2, WIDTH)},
        "value": {"kernel": kernel(peer.v_proj, 2, WIDTH)},
        "out": {"kernel": kernel(peer.o_proj, DIM).reshape(HEADS, WIDTH, DIM)},
        "query_norm": {"scale": 1 + peer.q_norm.weight.detach().numpy()},
        "key_norm": {"scale": 1 + peer.k_norm.weight.detach().numpy()},
    }
    compare(Gated(DIM, heads=HEADS, kv_heads=2, qk_norm=True), params, peer, WIDTH)


def test_a_local_layer_that_sees_all_is_that_of_deepseek_v3():
    rope, latent, query_latent = 4, 12, 20
    config = deepseek.DeepseekV3Config(
        hidden_size=DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=query_latent,
        kv_lora_rank=latent,
        qk_nope_head_dim=WIDTH,
        qk_rope_head_dim=rope,
        v_head_dim=WIDTH,
        rope_interleave=False,
        attn_implementation="eager",
    )
    peer = randomised(deepseek.DeepseekV3Attention(config, layer_idx=0))
    query = kernel(peer.q_b_proj, HEADS, WIDTH + rope)
    down = kernel(peer.kv_a_proj_with_mqa, latent + rope)
    up = kernel(peer.kv_b_proj, HEADS, 2 * WIDTH)
    params = {
        "query_down": {"kernel": kernel(peer.q_a_proj, query_latent)},
        "query_norm": {"scale": peer.q_a_layernorm.weight.detach().numpy()},
        "query": {"kernel": query[..., :WIDTH]},
        "query_rope": {"kernel": query[..., WIDTH:]},
        "down": {"kernel": down[:, :latent]},
        "key_rope": {"kernel": down[:, latent:]},
        "norm": {"scale": peer.kv_a_layernorm.weight.detach().numpy()},
        "up_key": up[..., :WIDTH],
        "up_value": up[..., WIDTH:],
        "out": {"kernel": kernel(peer.o_proj, DIM).reshape(HEADS, WIDTH, DIM)},
    }
    mixer = LocalLatent(DIM, heads=HEADS, window=TIME, latent=latent, query_latent=query_latent, rope_width=rope)
    compare(mixer, params, peer, rope)
