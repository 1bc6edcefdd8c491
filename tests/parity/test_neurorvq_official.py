"""NeuroRVQ's tokenizer against its authors' code.

BRAIN_ZOO_PEERS names a folder with a copy of github.com/KonstantinosBarmpas/NeuroRVQ (CC BY-NC 4.0: run, not copied).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from electrodes import electrodes
from peer_modules import peer_or_skip

torch = pytest.importorskip("torch", reason="PyTorch runs the authors' code")
peer = peer_or_skip("NeuroRVQ/NeuroRVQ", "NeuroRVQ")

from zoo.tokenizers.neurorvq import ELECTRODES, NeuroRVQ  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ("CZ", "FP1", "O2", "T3")
CODES, WIDTH, PATCHES, LEVELS = 40, 128, 3, 8
BRANCHES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def model() -> Any:
    """The published size with few codes, every parameter and every code drawn anew."""
    torch.manual_seed(0)
    shared = {
        "patch_size": 200,
        "n_patches": 256,
        "n_global_electrodes": 127,
        "embed_dim": 200,
        "num_heads": 10,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "drop_rate": 0.0,
        "attn_drop_rate": 0.0,
        "drop_path_rate": 0.0,
        "init_values": 0.0,
        "init_scale": 0.001,
        "num_classes": 0,
    }
    encoder = {**shared, "in_chans": 1, "depth": 12, "out_chans_encoder": 8}
    made = peer.NeuroRVQTokenizer(encoder, {**shared, "in_chans": WIDTH, "depth": 3}, CODES, WIDTH, 200)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "quantize_" not in name:
                parameter += (0.2 if "conv" in name else 0.05) * torch.randn_like(parameter)
        for branch in BRANCHES:
            for level in getattr(made, f"quantize_{branch}").layers:
                level.embedding.weight.copy_(torch.nn.functional.normalize(torch.randn(CODES, WIDTH), dim=-1))
                level.embedding.initted.fill_(1)
    return made.eval()


def books(model: Any) -> np.ndarray:
    """[branches, levels, codes, width]"""
    levels = [getattr(model, f"quantize_{branch}").layers for branch in BRANCHES]
    return np.stack([[level.embedding.weight.detach().numpy().copy() for level in each] for each in levels])


def copied(model: Any) -> dict[str, Any]:
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}

    def linear(name: str) -> dict[str, Any]:
        bias = state[f"{name}.bias"]
        return {"kernel": state[f"{name}.weight"].reshape(len(bias), -1).T, "bias": bias}

    def norm(name: str) -> dict[str, Any]:
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def conv(name: str) -> dict[str, Any]:
        return {"kernel": state[f"{name}.weight"][:, :, 0].transpose(2, 1, 0), "bias": state[f"{name}.bias"]}

    def layer(name: str) -> dict[str, Any]:
        query, key, value = state[f"{name}.attn.qkv.weight"].reshape(3, 10, 20, 200).transpose(0, 3, 1, 2)
        return {
            "attention_norm": norm(f"{name}.norm1"),
            "attention": {
                "query": {"kernel": query, "bias": state[f"{name}.attn.q_bias"].reshape(10, 20)},
                "key": {"kernel": key},
                "value": {"kernel": value, "bias": state[f"{name}.attn.v_bias"].reshape(10, 20)},
                "query_norm": norm(f"{name}.attn.q_norm"),
                "key_norm": norm(f"{name}.attn.k_norm"),
                "out": {
                    "kernel": state[f"{name}.attn.proj.weight"].T.reshape(10, 20, 200),
                    "bias": state[f"{name}.attn.proj.bias"],
                },
            },
            "mlp_norm": norm(f"{name}.norm2"),
            "mlp_in": linear(f"{name}.mlp.fc1"),
            "mlp_out": linear(f"{name}.mlp.fc2"),
        }

    def stacked(parts: list[Any]) -> Any:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)

    def transformer(name: str, depth: int) -> dict[str, Any]:
        return {
            "embed_electrode": state[f"{name}.pos_embed"],
            "embed_time": state[f"{name}.time_embed"],
            "embed_cls": state[f"{name}.cls_token"][0, 0],
            "blocks": stacked([layer(f"{name}.blocks.{number}") for number in range(depth)]),
        }

    def code_head(branch: int) -> dict[str, Any]:
        name = f"encode_task_layer_{branch}"
        return {
            "norm": norm(f"encoder.fc_norm_{branch}"),
            "hidden": linear(f"{name}.0"),
            "out": linear(f"{name}.2"),
        }

    embed = "encoder.patch_embed"
    heads = {"amplitude": "amplitude", "sine": "angle_sin", "cosine": "angle_cos"}
    return {
        "encoder": transformer("encoder", 12),
        "decoder": transformer("decoder", 3),
        "code_head": stacked([code_head(branch) for branch in BRANCHES]),
        "embed_code": stacked([linear(f"decoder.patch_embed_{branch}.proj") for branch in BRANCHES]),
        "decoder_norm": stacked([norm(f"decoder.fc_norm_{branch}") for branch in BRANCHES]),
        **{
            f"embed_patch_{branch - 1}": {
                **{f"conv{number}": conv(f"{embed}.conv{number}_{branch}") for number in (1, 2)},
                **{f"norm{number}": norm(f"{embed}.norm{number}_{branch}") for number in (1, 2)},
            }
            for branch in BRANCHES
        },
        **{
            f"{ours}_head": {f"layers_{n}": linear(f"decode_task_layer_{theirs}.{n}") for n in (0, 2)}
            for ours, theirs in heads.items()
        },
    }


def assert_near(ours: Any, theirs: Any, tolerance: float) -> None:
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else np.asarray(theirs)
    assert np.abs(np.asarray(ours) - theirs).max() < tolerance * np.abs(theirs).max()


def test_codes_losses_and_gradients_are_theirs(model):
    x = np.random.default_rng(0).normal(size=(2, len(NAMES), 200 * PATCHES)).astype(np.float32)
    sensors = electrodes(NAMES)
    ours = NeuroRVQ(codes=CODES, kmeans=0)
    made = jax.eval_shape(ours.init, {"params": jax.random.key(0)}, x, sensors)
    shapes: Any = nn.meta.unbox(made)
    params = jax.tree.map(jnp.asarray, copied(model))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes["params"])

    def collection(path: Any, leaf: Any) -> Any:
        return jnp.asarray(books(model)) if path[-1].key == "embedding" else jnp.ones(leaf.shape, leaf.dtype)

    variables = {
        "params": params,
        "codebooks": jax.tree_util.tree_map_with_path(collection, shapes["codebooks"]),
    }

    given = torch.tensor(x, requires_grad=True)
    time = torch.arange(256 - PATCHES, 256).repeat(len(NAMES))[None].repeat(2, 1)
    place = torch.tensor([ELECTRODES.index(name) for name in NAMES]).repeat_interleave(PATCHES)[None].repeat(2, 1)
    patches = given.reshape(2, len(NAMES), PATCHES, 200)
    transform = torch.fft.fft(patches, dim=-1)
    amplitude, mean, deviation = model.std_norm(torch.log1p(transform.abs()))
    angle = torch.angle(transform)
    quantized, codes, code_loss, _ = model.encode(patches, time, place)
    drawn, sine, cosine = model.decode(quantized, time, place)
    rebuilt = torch.expm1(drawn * deviation[:, 0] + mean[:, 0])
    rebuilt = torch.real(peer.inverse_fft_cos_sin(rebuilt, sine, cosine))
    waves = model.std_norm(rebuilt.reshape(2, len(NAMES), PATCHES, 200))[0]
    losses = {
        "amplitude": model.calculate_rec_loss(drawn, amplitude),
        "phase": model.calculate_phase_loss(sine, angle.sin(), cosine, angle.cos()),
        "waveform": torch.nn.functional.mse_loss(waves, model.std_norm(patches)[0]),
    }
    total = sum(losses.values()) + code_loss
    (gradient,) = torch.autograd.grad(total, given)

    @jax.jit
    def both(x: Any) -> Any:
        def loss(x: Any) -> Any:
            out: Any = ours.apply(variables, x, sensors)
            return sum(out.losses.values()), out

        return jax.value_and_grad(loss, has_aux=True)(x)

    (value, out), ours_gradient = both(jnp.asarray(x))
    stacked = torch.stack([each.reshape(LEVELS, 2, -1) for each in codes]).permute(2, 3, 0, 1)
    np.testing.assert_array_equal(out.codes, stacked.reshape(2, -1, 4 * LEVELS))
    their_vectors = [each.permute(0, 2, 3, 1).reshape(2, -1, WIDTH) for each in quantized]
    assert_near(out.quantized, torch.cat(their_vectors, -1), 1e-5)
    assert_near(out.losses["commitment"] + out.losses["pull"], code_loss, 1e-5)
    for name, theirs in losses.items():
        assert_near(out.losses[name], theirs, 1e-5)
    assert_near(value, total, 1e-5)
    assert_near(out.reconstruction, rebuilt.reshape(x.shape), 1e-5)
    # Through eight residual steps of four branches.
    assert_near(ours_gradient, gradient, 2e-4)

    model.train()
    model.encode(patches, time, place)
    _, new = jax.jit(
        lambda key: ours.apply(variables, x, sensors, train=True, mutable=["codebooks"], rngs={"codes": key})
    )(jax.random.key(0))
    found = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(new) if path[-1].key == "embedding"]
    assert_near(found[0], books(model), 1e-5)
