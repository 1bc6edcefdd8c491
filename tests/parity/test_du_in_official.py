"""Du-IN's VQ-VAE against its authors' code.

BRAIN_ZOO_PEERS names a folder with a copy of github.com/liulab-repository/Du-IN (which imports einops).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peer_modules import peer_or_skip

torch = pytest.importorskip("torch", reason="PyTorch runs the authors' code")
peer = peer_or_skip("Du-IN", "models.duin")
settings = peer_or_skip("Du-IN", "params.duin_params")

import zoo  # noqa: E402
from zoo.types import Sensors  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

CODES, SUBJECTS, BATCH, PATCHES = 60, 3, 3, 4
SHOWN = (14, 16, 9)
"""Channels of each example's subject."""


def array(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy().copy()


def linear(module: Any) -> dict[str, np.ndarray]:
    return {"kernel": array(module.weight).T, "bias": array(module.bias)}


def scaled(module: Any) -> dict[str, np.ndarray]:
    return {"scale": array(module.weight), "bias": array(module.bias)}


def subjects(block: Any) -> dict[str, np.ndarray]:
    layer = block.subj_layer
    kernel = array(layer.W.weight).T.reshape(layer.n_subjects, layer.d_input, layer.d_output)
    return {"kernel": kernel, "bias": array(layer.B.weight).T}


def transformer(stack: Any) -> dict[str, Any]:
    each = []
    for block in stack.xfmr_blocks:
        mha, ffn = block.mha, block.ffn

        def heads(matrix: Any, mha: Any = mha) -> dict[str, np.ndarray]:
            kernel, bias = array(matrix.W.weight).T, array(matrix.W.bias)
            return {"kernel": kernel.reshape(len(kernel), mha.n_heads, -1), "bias": bias.reshape(mha.n_heads, -1)}

        out = linear(mha.proj[0])
        each.append(
            {
                "query": heads(mha.W_q),
                "key": heads(mha.W_k),
                "value": heads(mha.W_v),
                "query_norm": scaled(mha.norm_q),
                "key_norm": scaled(mha.norm_k),
                "out": {**out, "kernel": out["kernel"].reshape(mha.n_heads, -1, out["kernel"].shape[1])},
                "attention_norm": scaled(block.norm_mha),
                "mlp_in": linear(ffn.fc1[0]),
                "mlp_out": linear(ffn.fc2[0]),
                "mlp_norm": scaled(block.norm_ffn),
            }
        )
    return {"blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *each)}


def copied(model: Any) -> dict[str, Any]:
    embed: dict[str, Any] = {}
    for layer, block in enumerate(model.tokenizer.conv_blocks, start=1):
        convolution, norm = block[0][1], block[1][1]
        embed[f"conv_{layer}"] = {
            "kernel": array(convolution.weight).transpose(2, 1, 0),
            "bias": array(convolution.bias),
        }
        embed[f"norm_{layer}"] = scaled(norm)
    head: dict[str, Any] = {}
    *deconvolutions, last = model.rgs_block.rgs_head
    for layer, block in enumerate(deconvolutions, start=1):
        convolution = block[0][1]
        # What PyTorch scatters with a kernel, ours gathers with its mirror image.
        kernel = array(convolution.weight)[..., ::-1].transpose(2, 0, 1)
        head[f"conv_{layer}"] = {"kernel": kernel.copy(), "bias": array(convolution.bias)}
    head["out"] = linear(last[0])
    vq = model.vq_block
    return {
        "subject_in": subjects(model.subj_block),
        "embed": embed,
        "encoder": transformer(model.encoder[1]),
        "code_hidden": linear(vq.pre_proj[0]),
        "code_in": linear(vq.pre_proj[2]),
        "code_norm": scaled(vq.layernorm),
        "code_out": linear(vq.post_proj[0]),
        "decoder": transformer(model.decoder[1]),
        "head": head,
        "subject_out": subjects(model.desubj_block),
    }


def running(model: Any) -> dict[str, Any]:
    norms = [block[1][1] for block in model.tokenizer.conv_blocks]
    found = {
        f"norm_{n}": {"mean": array(norm.running_mean), "var": array(norm.running_var)}
        for n, norm in enumerate(norms, 1)
    }
    return {"embed": found}


@pytest.fixture(scope="module")
def both() -> tuple[Any, ...]:
    torch.manual_seed(0)
    options = settings.duin_vqvae_params().model
    for part in (options, options.subj, options.desubj):
        part.n_subjects = SUBJECTS
    options.vq.codex_size = CODES
    for part in (options.encoder, options.decoder, options.rgs):
        part.emb_len = PATCHES
    model = peer.duin_vqvae(options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    model.vq_block.codex.initted.data.copy_(torch.Tensor([True]))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokenizer = zoo.create("du_in_base", codes=CODES, subjects=SUBJECTS, dropout=0.0)
    signal = np.random.default_rng(1).standard_normal((BATCH, 16, 100 * PATCHES)).astype(np.float32)
    valid = np.arange(16) < np.array(SHOWN)[:, None]
    signal *= valid[..., None]
    blank, zero = np.zeros((BATCH, 16, 3), np.float32), np.zeros((BATCH, 16), np.int32)
    sensors = Sensors(blank, blank, zero + 5, zero - 1, valid)
    codes = array(model.vq_block.codex.embeddings)
    books = {"embedding": codes, "usage": np.ones(CODES, np.float32), "ready": np.array(True)}
    variables = {"params": copied(model), "codebooks": {"quantizer": books}, "batch_stats": running(model)}
    made = nn.unbox(jax.eval_shape(tokenizer.init, jax.random.key(0), signal, sensors))
    assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, made)
    who = np.array([2, 0, 1])
    given = (
        torch.tensor(signal.transpose(0, 2, 1).copy()),
        torch.tensor(np.eye(SUBJECTS, dtype=np.float32)[who]),
        torch.tensor(valid),
    )
    return model, tokenizer, jax.tree.map(jnp.asarray, variables), (signal, sensors), who, given


def near(ours: Any, wanted: np.ndarray, bound: float = 1e-5) -> None:
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=bound * np.abs(wanted).max())


def gradients_of(model: Any) -> Any:
    with torch.no_grad():
        kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
        found = copied(model)
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    return found


def test_codes_signal_losses_and_gradients_are_the_authors(both):
    model, tokenizer, variables, (signal, sensors), who, given = both
    model.eval().zero_grad()
    codes = model.quantize(given[:2])[2].argmax(-1)
    rebuilt, losses = model(given)
    losses.total.backward()
    wanted = gradients_of(model)

    @jax.jit
    def found(params: Any) -> Any:
        def loss(params: Any) -> Any:
            out = tokenizer.apply({**variables, "params": params}, signal, sensors, subject=who)
            return sum(weight * out.losses[name] for name, weight in tokenizer.loss_weights.items()), out

        return jax.value_and_grad(loss, has_aux=True)(params)

    (total, out), grads = found(variables["params"])
    np.testing.assert_array_equal(out.codes[..., 0], array(codes))
    near(out.reconstruction, array(rebuilt).transpose(0, 2, 1) * sensors.valid[..., None])
    near(total, array(losses.total))
    near(out.losses["waveform"], array(losses.rgs))
    near(out.losses["commitment"], array(losses.vq))
    assert jax.tree.structure(grads) == jax.tree.structure(wanted)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wanted), strict=True):
        # Float32 through twelve layers: small gradients are sums of large terms; that of a key norm's bias is zero.
        bound = 5e-5 * max(np.abs(other).max(), 1e-3 * largest)
        np.testing.assert_allclose(leaf, other, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


def test_a_step_of_training_is_the_authors(both):
    model, tokenizer, variables, (signal, sensors), who, given = both
    out, new = jax.jit(
        lambda: tokenizer.apply(
            variables, signal, sensors, subject=who, train=True, mutable=["codebooks", "batch_stats"],
            rngs={"codes": jax.random.key(0)},
        )
    )()  # fmt: skip
    model.train()
    with torch.no_grad():
        losses = model(given)[1]
    near(out.losses["waveform"], array(losses.rgs))
    near(out.losses["commitment"], array(losses.vq))
    near(new["codebooks"]["quantizer"]["embedding"], array(model.vq_block.codex.embeddings))
    steps = BATCH * PATCHES * 10
    for name, theirs in running(model)["embed"].items():
        ours = new["batch_stats"]["embed"][name]
        near(ours["mean"], theirs["mean"])
        # Theirs is unbiased.
        before = variables["batch_stats"]["embed"][name]["var"]
        near(before * 0.9 + (ours["var"] - before * 0.9) * steps / (steps - 1), theirs["var"])
