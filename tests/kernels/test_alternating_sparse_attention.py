"""Alternating sparse attention on latents: against every pair written out, as its parts, and step by step."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against import QUICK, assert_equal, normal, uniform
from naive_attention import attention, chosen, ended, numbered, segments

from kernels.alternating_sparse_attention import (
    global_latent_attention,
    global_latent_attention_step,
    global_latent_cache,
    local_latent_attention,
    local_latent_attention_step,
    local_latent_cache,
)
from kernels.native_sparse_attention import native_sparse_attention
from kernels.sparse_attention import sparse_attention
from kernels.sparse_attention.mask import Causal, Window

SIZES = {"block_size": 8, "stride": 4, "selected_blocks": 3, "initial": 1, "local": 1}
CACHE = {"block_size": 8, "stride": 4}
TIME, WINDOW, HEADS, GROUPS, RANK = 45, 6, 4, 2, 5
SCALE = (8 + 2) ** -0.5


def arguments(kind, rope=True, time=TIME):
    """Of a local or a global layer: per token, and the projections."""
    arrays = {"q": normal(0, 2, time, HEADS, 8)}
    if kind == "local":
        arrays["latents"] = normal(1, 2, time, RANK)
    else:
        arrays |= {"latents": normal(1, 2, time, GROUPS, RANK), "gates": uniform(2, 2, time, HEADS, 2)}
    if rope:
        arrays |= {"q_rope": normal(3, 2, time, HEADS, 2), "k_rope": normal(4, 2, time, 2)}
    shape = (RANK, HEADS) if kind == "local" else (GROUPS, RANK)
    return arrays, {"up_k": normal(5, *shape, 8), "up_v": normal(6, *shape, 12)}


@cache
def compiled(op, **options):
    return jax.jit(partial(op, **options), compiler_options=QUICK)


def causal(run):
    t = np.arange(run.shape[1])
    return (run[:, :, None] == run[:, None]) & (t <= t[:, None])


def naive_local(q, latents, q_rope, k_rope, up_k, up_v, segment_ids=None):
    k, v = (jnp.einsum("btc,chk->bthk", latents, up) for up in (up_k, up_v))
    t = np.arange(q.shape[1])
    visible = causal(numbered(segment_ids, *q.shape[:2])) & (t > t[:, None] - WINDOW)
    rope = jnp.repeat(k_rope[:, :, None], HEADS, axis=2)
    return attention(jnp.concatenate([q, q_rope], -1), jnp.concatenate([k, rope], -1), v, visible[:, None])[0]


def naive_global(lists, q, latents, gates, q_rope, k_rope, up_k, up_v, segment_ids=None):
    """`lists` holds what was chosen, or is empty and gets it."""
    run, time = numbered(segment_ids, *q.shape[:2]), q.shape[1]
    visible = ended(run, 8, 4)
    means = jnp.stack([latents[:, 4 * i : 4 * i + 8].mean(1) for i in range(visible.shape[-1])], axis=1)
    k, v = (jnp.einsum("bngc,gck->bngk", means, up) for up in (up_k, up_v))
    first, weights = attention(q, k, v, visible[:, None], SCALE)
    if not lists:
        by_group = np.asarray(weights).reshape(2, GROUPS, -1, *weights.shape[2:]).sum(2)
        lists.append(chosen(by_group, run, compression_block=8, **SIZES))
    k, v = (jnp.einsum("btgc,gck->btgk", latents, up) for up in (up_k, up_v))
    rope = jnp.repeat(k_rope[:, :, None], GROUPS, axis=2)
    tokens = np.repeat(lists[0], 8, axis=-1)[..., :time].repeat(HEADS // GROUPS, axis=1) & causal(run)[:, None]
    second, _ = attention(jnp.concatenate([q, q_rope], -1), jnp.concatenate([k, rope], -1), v, tokens)
    return gates[..., :1] * first + gates[..., 1:] * second


def pull(op, arrays):
    def run(arrays):
        out, vjp = jax.vjp(lambda arrays: op(**arrays), arrays)
        gradients = vjp(normal(100, *out.shape).astype(out.dtype))[0]
        return {"out": out} | {f"d_{name}": x for name, x in gradients.items()}

    return {name: np.asarray(x) for name, x in jax.jit(run, compiler_options=QUICK)(arrays).items()}


@pytest.mark.parametrize("kind", ["local", "global"])
def test_values_and_gradients_in_float64(kind):
    ids = segments(13, 16, 30, time=TIME, batch=2)
    arrays, projections = arguments(kind)
    with jax.enable_x64(True):
        arrays = {name: x.astype(jnp.float64) for name, x in (arrays | projections).items()}
        if kind == "local":
            exact = pull(partial(naive_local, segment_ids=ids), arrays)
            got = pull(partial(local_latent_attention, window=WINDOW, segment_ids=ids), arrays)
        else:
            lists = []
            naive_global(lists, **arrays, segment_ids=ids)
            exact = pull(partial(naive_global, lists, segment_ids=ids), arrays)
            got = pull(partial(global_latent_attention, **SIZES, segment_ids=ids), arrays)
    assert_equal(exact, got, 1e-11)


def test_with_identities_a_local_layer_is_window_attention():
    arrays, _ = arguments("local", rope=False)
    latents = normal(7, 2, TIME, 8)
    identity = jnp.broadcast_to(jnp.eye(8)[:, None], (8, HEADS, 8))
    got = compiled(local_latent_attention, window=WINDOW)(arrays["q"], latents, identity, identity)
    keys = latents[:, :, None]
    wanted = compiled(sparse_attention, mask=Causal() & Window(WINDOW))(arrays["q"], keys, keys)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_with_identities_a_global_layer_is_native_sparse_attention_without_window():
    arrays, _ = arguments("global", rope=False)
    latents = normal(7, 2, TIME, GROUPS, 8)
    identity = jnp.broadcast_to(jnp.eye(8), (GROUPS, 8, 8))
    got = compiled(global_latent_attention, **SIZES)(arrays["q"], latents, arrays["gates"], identity, identity)
    gates = jnp.pad(arrays["gates"], ((0, 0), (0, 0), (0, 0), (0, 1)))
    wanted = compiled(native_sparse_attention, **SIZES)(arrays["q"], latents, latents, gates)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def tokens(arrays, t):
    """Of each row its own time, by the names of one token."""
    now = {name: x[jnp.arange(2), t] for name, x in arrays.items()}
    return {"latent" if name == "latents" else name: x for name, x in now.items()}


@pytest.mark.parametrize("kind", ["local", "global"])
@pytest.mark.parametrize(("rope", "come"), [(False, (0, 0)), (True, (13, 5))])
def test_one_token_after_the_other(kind, rope, come):
    arrays, projections = arguments(kind, rope)
    known = {name: arrays[name][:, : max(come)] for name in ("latents", "k_rope") if name in arrays}
    length = jnp.asarray(come)
    if kind == "local":
        whole = compiled(local_latent_attention, window=WINDOW)
        cache, step = local_latent_cache(**known, window=WINDOW, length=length), compiled(local_latent_attention_step)
    else:
        whole = compiled(global_latent_attention, **SIZES)
        cache = global_latent_cache(**known, capacity=TIME, length=length, **CACHE)
        step = compiled(global_latent_attention_step, **SIZES)
    wanted = whole(**arrays, **projections)
    for n in range(TIME - max(come)):
        now = cache.length
        np.testing.assert_array_equal(now, np.asarray(come) + n)
        out, cache = step(**tokens(arrays, now), cache=cache, **projections)
        np.testing.assert_allclose(out, wanted[jnp.arange(2), now], rtol=1e-4, atol=1e-5)


def test_a_compression_of_latents_is_that_of_keys_and_values():
    arrays, projections = arguments("global")
    last = {"compress": lambda blocks: blocks[:, :, -1]}
    whole = compiled(global_latent_attention, **SIZES, **last)(**arrays, **projections)
    nothing = {name: arrays[name][:, :0] for name in ("latents", "k_rope")}
    cache = global_latent_cache(**nothing, capacity=TIME, **CACHE, **last)
    step = compiled(global_latent_attention_step, **SIZES, **last)
    for t in range(12):
        out, cache = step(**tokens(arrays, jnp.full(2, t)), cache=cache, **projections)
    np.testing.assert_allclose(out, whole[:, 11], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cache.compressed[:, :2], arrays["latents"][:, [7, 11]])


def test_a_full_cache_takes_no_token():
    arrays, projections = arguments("global", time=16)
    known = {name: arrays[name] for name in ("latents", "k_rope")}
    cache = global_latent_cache(**known, capacity=16, length=jnp.asarray([16, 9]), **CACHE)
    token = tokens(arrays, jnp.asarray([3, 9])) | projections
    with pytest.raises(ValueError, match=r"^global_latent_attention_step: cache: got 16 tokens of at most 16"):
        global_latent_attention_step(**token, cache=cache, **SIZES)
    out, after = compiled(global_latent_attention_step, **SIZES)(**token, cache=cache)
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()
    np.testing.assert_array_equal(after.length, [16, 10])
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new[0], old[0]), after, cache)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("local", {"latents": jnp.zeros((2, 44, 5))}, r"latents: got shape \(2, 44, 5\), wanted \[B, T, C\]"),
        ("local", {"up_v": jnp.zeros((5, 3, 12))}, r"up_v: got shape \(5, 3, 12\), wanted \[C, H, V\]"),
        ("local", {"k_rope": None}, "k_rope: got None, wanted both rotary parts or none"),
        ("global", {"q_rope": None}, "q_rope: got None, wanted both rotary parts or none"),
        ("global", {"q_rope": jnp.zeros((2, 45, 4, 3))}, r"k_rope: got shape \(2, 45, 2\), wanted \[B, T, R\] with"),
        ("global", {"gates": jnp.zeros((2, 45, 4, 3))}, r"gates: got shape \(2, 45, 4, 3\), wanted \[B, T, H, 2\]"),
        ("global", {"q": jnp.zeros((2, 45, 3, 8))}, r"q_rope: got shape \(2, 45, 4, 2\), wanted \[B, T, H, R\]"),
        ("global", {"latents": jnp.zeros((2, 45, 2, 5), int)}, "latents: got dtype int32, wanted a floating one"),
    ],
)
def test_errors_name_the_argument(kind, change, message):
    arrays, projections = arguments(kind)
    op = {"local": local_latent_attention, "global": global_latent_attention}[kind]
    with pytest.raises(ValueError, match=f"^{kind}_latent_attention: {message}"):
        op(**arrays | projections | change)


def test_errors_of_the_cache():
    arrays, projections = arguments("global", rope=False)
    with pytest.raises(ValueError, match=r"^global_latent_cache: capacity: got 40, wanted room for the 45 tokens"):
        global_latent_cache(arrays["latents"], capacity=40, **CACHE)
    cache = global_latent_cache(arrays["latents"], capacity=64, **CACHE)
    token = tokens(arrays, jnp.zeros(2, int)) | projections
    with pytest.raises(ValueError, match=r"cache: got 64 tokens and 15 compressed ones, wanted the same options"):
        global_latent_attention_step(**token, cache=cache, **SIZES | {"stride": 2})
    with pytest.raises(ValueError, match=r"^global_latent_attention_step: selected_blocks: got 0, wanted"):
        global_latent_attention_step(**token, cache=cache, **SIZES | {"selected_blocks": 0})
    with pytest.raises(ValueError, match=r"^local_latent_cache: window: got 0, wanted at least 1"):
        local_latent_cache(arrays["latents"][:, :, 0], window=0)
