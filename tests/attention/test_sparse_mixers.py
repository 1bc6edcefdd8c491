"""Mixers that choose blocks: with all blocks chosen, or one branch alone, they are what they are made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import causal, close, drawn, merged, mixed, normal, prefilled, projected, run, streamed, weights
from scipy.special import erf

from zoo.attention.alternating_sparse import GlobalLatent, LocalLatent
from zoo.attention.moba import MoBA
from zoo.attention.native_sparse import BlockCompression, NativeSparse, compress
from zoo.attention.sliding_window import SlidingWindow
from zoo.attention.softmax import Softmax
from zoo.errors import ZooError

TIME = 16
BLOCKS = {"heads": 4, "kv_heads": 2, "block_size": 4, "stride": 2, "compression_block": 4, "selected_blocks": 4}


def tokens(seed, *shape):
    """Their first feature is 1, so that a gate can be opened and shut."""
    return normal(seed, *shape).at[..., 0].set(1.0)


def with_gates(variables, *on):
    """The gates of branches 1 where `on`, otherwise 0."""
    kernel = np.zeros_like(variables["params"]["gate"]["kernel"])
    kernel[0] = np.where(on, 100.0, -100.0)
    return {"params": {**variables["params"], "gate": {"kernel": jnp.asarray(kernel)}}}


def branch(variables, n):
    """Parameters of softmax attention: those of native sparse attention's n-th branch."""
    params = variables["params"]
    return {
        "params": {"query": params["query"], "key": params[f"keys_{n}"]}
        | {
            "value": params[f"values_{n}"],
            "out": params["out"],
        }
    }


@pytest.mark.slow
def test_branches_of_native_sparse_attention_are_dense_and_window_attention():
    mixer = NativeSparse(32, **BLOCKS, window=5)
    x = tokens(0, 2, TIME, 32)
    variables = drawn(mixer, x)
    heads = {"heads": 4, "kv_heads": 2}
    dense = run(Softmax(32, **heads), branch(variables, 1), x)
    close(run(mixer, with_gates(variables, 0, 1, 0), x), dense)
    window = run(SlidingWindow(32, **heads, window=5), branch(variables, 2), x)
    close(run(mixer, with_gates(variables, 0, 0, 1), x), window)


@pytest.mark.parametrize("turned", [False, True])
def test_the_compressed_branch_is_attention_to_blocks_that_have_ended(turned):
    mixer = NativeSparse(32, **BLOCKS, compress="mean", rotary=turned)
    x = tokens(0, 2, TIME, 32)
    variables = drawn(mixer, x)
    q, k, v = (projected(variables, name, x) for name in ("query", "keys_0", "values_0"))
    k, v = (np.stack([y[:, 2 * n : 2 * n + 4].mean(1) for n in range(7)], axis=1) for y in (k, v))
    ended = 2 * np.arange(7) + 4 <= np.arange(TIME)[:, None] + 1
    close(run(mixer, with_gates(variables, 1, 0, 0), x), merged(variables, mixed(weights(q, k, ended), v)))


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


@pytest.mark.parametrize(
    ("kind", "definition"),
    [
        ("mlp", lambda x, p, a, b: gelu(np.einsum("bnlgf,lfm->bngm", x + p[:, None], a)) @ b),
        ("linear", lambda x, a: np.einsum("bnlgf,glfm->bngm", x, a)),
        ("pool", lambda x, a: np.einsum("bnlgf,gl->bngf", x, np.exp(a) / np.exp(a).sum(-1, keepdims=True))),
        ("mean", lambda x: x.mean(2)),
    ],
)
def test_compressions_are_what_they_say(kind, definition):
    module = BlockCompression(kind, 4, 2, 6)
    blocks = normal(0, 2, 3, 4, 2, 6)
    variables = drawn(module)
    held = module.apply(variables)
    assert len(held) == len(module.bind(variables).axes)
    close(compress(kind, held, blocks), definition(np.float64(blocks), *(np.float64(x) for x in held)))


@pytest.mark.slow
def test_tokens_that_are_not_there_leave_the_blocks():
    x = tokens(0, 1, TIME, 32)
    there = np.ones((1, TIME), bool)
    there[0, [2, 3, 7, 11, 12]] = False
    for mixer in (
        NativeSparse(32, **{**BLOCKS, "selected_blocks": 3}, window=3, rotary=False),
        GlobalLatent(32, **{**BLOCKS, "selected_blocks": 3}, rope_width=0),
        MoBA(32, heads=4, block_size=4, top_k=2, rotary=False),
    ):
        variables = drawn(mixer, x)
        close(run(mixer, variables, x, mask=jnp.asarray(there))[there], run(mixer, variables, x[:, there[0]])[0])


def test_mixture_of_all_blocks_is_softmax_attention():
    x = normal(0, 2, TIME, 32)
    options = {"heads": 4, "kv_heads": 2, "qk_norm": True}
    all_blocks, few = (MoBA(32, **options, block_size=4, top_k=top_k) for top_k in (4, 2))
    variables = drawn(all_blocks, x)
    dense = run(Softmax(32, **options), variables, x)
    close(run(all_blocks, variables, x), dense)
    assert np.abs(run(few, variables, x) - dense)[:, 8:].max() > 1e-2


@pytest.mark.parametrize(
    "mixer",
    [
        MoBA(32, heads=4, kv_heads=2, block_size=4, top_k=2),
        NativeSparse(32, **BLOCKS, window=5, compress="linear"),
        LocalLatent(32, heads=4, window=5),
        GlobalLatent(32, **BLOCKS),
    ],
    ids=lambda mixer: type(mixer).__name__,
)
def test_a_prompt_then_steps_equals_parallel(mixer):
    x = normal(0, 2, TIME, 32)
    variables = drawn(mixer, x)
    whole = run(mixer, variables, x)
    out, state = prefilled(mixer, variables, x[:, :9], TIME, [9, 6])
    later, _ = streamed(mixer, variables, jnp.stack([x[0, 9:], x[1, 6:13]]), state)
    close(np.concatenate([out[0, :9], later[0]]), whole[0])
    close(np.concatenate([out[1, :6], later[1]]), whole[1, :13])


def latent(variables, x, grouped):
    """q [B, T, H, K], and each head's keys and values from its latent, of layers without norms and rotary parts."""
    params = jax.tree.map(np.float64, variables["params"])
    q = np.einsum("btc,chk->bthk", np.float64(x) @ params["query_down"]["kernel"], params["query"]["kernel"])
    c = np.tensordot(np.float64(x), params["down"]["kernel"], 1)
    equation = "btgc,gck->btgk" if grouped else "btc,chk->bthk"
    return q, *(np.einsum(equation, c, params[name]) for name in ("up_key", "up_value"))


PLAIN = {"rope_width": 0, "latent_norm": False}


def test_a_local_layer_that_sees_all_is_attention_to_projected_keys():
    mixer = LocalLatent(32, heads=4, window=TIME, **PLAIN)
    x = normal(0, 2, TIME, 32)
    variables = drawn(mixer, x)
    q, k, v = latent(variables, x, grouped=False)
    close(run(mixer, variables, x), merged(variables, mixed(weights(q, k, causal(TIME)), v)))


def test_a_local_layer_compares_rotary_parts_beside_the_others():
    """§2.1.3 of DeepSeek-V2: one turned key for all heads, scores scaled by (K + R)^-½."""
    mixer = LocalLatent(32, heads=4, window=TIME, rope_width=2, base=20.0)
    x = normal(0, 1, TIME, 32)
    variables = drawn(mixer, x)
    params = jax.tree.map(np.float64, variables["params"])

    def normalised(y, name):
        return y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-6) * params[name]["scale"]

    def turned(y):
        """Of one rotary pair, by its position."""
        pair = (y[..., 0] + 1j * y[..., 1]) * np.exp(1j * np.arange(TIME))[:, None]
        return np.stack([pair.real, pair.imag], axis=-1)

    c_q = normalised(np.float64(x) @ params["query_down"]["kernel"], "query_norm")
    c = normalised(np.float64(x) @ params["down"]["kernel"], "norm")
    q_rope = turned(np.einsum("btc,chk->bthk", c_q, params["query_rope"]["kernel"]))
    k_rope = turned((np.float64(x) @ params["key_rope"]["kernel"])[:, :, None])
    q = np.concatenate([np.einsum("btc,chk->bthk", c_q, params["query"]["kernel"]), q_rope], -1)
    k = np.concatenate([np.einsum("btc,chk->bthk", c, params["up_key"]), np.repeat(k_rope, 4, axis=2)], -1)
    v = np.einsum("btc,chk->bthk", c, params["up_value"])
    close(run(mixer, variables, x), merged(variables, mixed(weights(q, k, causal(TIME)), v)))


def test_branches_of_a_global_layer_are_dense_and_compressed_attention():
    mixer = GlobalLatent(32, **BLOCKS, compress="mean", **PLAIN)
    x = tokens(0, 2, TIME, 32)
    variables = drawn(mixer, x)
    q, k, v = latent(variables, x, grouped=True)
    close(run(mixer, with_gates(variables, 0, 1), x), merged(variables, mixed(weights(q, k, causal(TIME)), v)))
    k, v = (np.stack([y[:, 2 * n : 2 * n + 4].mean(1) for n in range(7)], axis=1) for y in (k, v))
    ended = 2 * np.arange(7) + 4 <= np.arange(TIME)[:, None] + 1
    close(run(mixer, with_gates(variables, 1, 0), x), merged(variables, mixed(weights(q, k, ended), v)))


def test_a_pair_of_layers_caches_half_of_what_native_sparse_attention_does():
    """At the sizes of the paper, for tokens beyond the windows: bytes that grow with the length."""

    def growth(mixer):
        def size(capacity):
            state = jax.eval_shape(lambda v: mixer.apply(v, 1, capacity, method="initial_state"), variables)
            return sum(leaf.size for leaf in jax.tree.leaves(state))

        x = jax.ShapeDtypeStruct((1, 64, 1024), jnp.float32)
        variables = jax.eval_shape(mixer.init, jax.random.key(0), x)
        return (size(64_000) - size(32_000)) / 32_000

    options = {"heads": 64, "kv_heads": 4}
    pair = growth(LocalLatent(1024, heads=64)) + growth(GlobalLatent(1024, **options, rope_width=0))
    # Native sparse attention also keeps keys and values of 4 · 16 for each of 64 / 16 compressed ones a block.
    assert pair <= growth(NativeSparse(1024, **options))


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (NativeSparse(32, stride=0), "native_sparse: stride: got 0, wanted at least 1"),
        (NativeSparse(32, block_size=24), "native_sparse: block_size: got 24, wanted a multiple of stride 16"),
        (NativeSparse(32, selected_blocks=2), "native_sparse: selected_blocks: got 2, wanted at least 1 and initial"),
        (NativeSparse(32, window=0), "native_sparse: window: got 0, wanted at least 1"),
        (NativeSparse(32, compress="max"), "compress: got 'max', wanted mlp, linear, pool or mean"),
        (NativeSparse(32, heads=4, kv_heads=3), "native_sparse: 4 heads do not divide into 3 kv_heads"),
        (GlobalLatent(32, compression_block=8), "asa_global: compression_block: got 8, wanted a multiple of stride 16"),
        (LocalLatent(32, window=0), "asa_local: window: got 0, wanted at least 1"),
        (LocalLatent(32, rope_width=3), "LocalLatent: rope_width: got 3, wanted an even number"),
        (LocalLatent(32, latent=0), "LocalLatent: got latent 0 and query_latent 32, wanted at least 1"),
        (MoBA(32, top_k=0), "moba: got block_size 256 and top_k 0, wanted at least 1"),
    ],
)
def test_errors(mixer, message):
    with pytest.raises(ZooError, match=message):
        jax.eval_shape(mixer.init, jax.random.key(0), normal(0, 1, TIME, 32))
