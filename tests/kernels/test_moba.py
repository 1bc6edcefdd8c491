"""Mixture of block attention against every pair written out, and one token after the other."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against import QUICK, assert_equal, assert_within_rule, normal
from naive_attention import attention, numbered, segments

from kernels import dispatch
from kernels import moba as operation
from kernels.moba import moba, moba_blocks, moba_cache, moba_step

SIZES = {"block_size": 8, "top_k": 3}
TIME = 45


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that the queries are chosen for in several pieces."""
    monkeypatch.setattr(operation, "SCORES", 0)


def arguments(time=TIME, batch=2, heads=4, groups=2):
    shapes = {"q": (heads, 8), "k": (groups, 8), "v": (groups, 12)}
    return {name: normal(n, batch, time, *shape) for n, (name, shape) in enumerate(shapes.items())}


@cache
def compiled(op=moba, **options):
    return jax.jit(partial(op, **SIZES | options), compiler_options=QUICK)


def chosen(q, k, segment_ids=None):
    """[B, H, T, blocks] bool, one query after the other."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    batch, time, heads, _ = q.shape
    run, shared = numbered(segment_ids, batch, time), heads // k.shape[2]
    found = np.zeros((batch, heads, time, -(-time // 8)), bool)
    for b, h, t in np.ndindex(batch, heads, time):
        own = np.flatnonzero((run[b] == run[b, t]) & (np.arange(time) // 8 < t // 8))
        gates = {j: q[b, t, h] @ k[b, own[own // 8 == j], h // shared].mean(0) for j in set(own // 8)}
        found[b, h, t, [t // 8, *sorted(gates, key=lambda j: (-gates[j], j))[:2]]] = True
    return found


def naive(lists, q, k, v, segment_ids=None):
    """Every pair of query and key on its own, with what was chosen."""
    run, t = numbered(segment_ids, *q.shape[:2]), np.arange(q.shape[1])
    causal = (run[:, :, None] == run[:, None]) & (t <= t[:, None])
    return attention(q, k, v, np.repeat(lists, 8, axis=-1)[..., : q.shape[1]] & causal[:, None])[0]


def pull(op, arrays, **options):
    def run(arrays):
        out, vjp = jax.vjp(lambda arrays: op(**arrays, **options), arrays)
        gradients = vjp(normal(100, *out.shape).astype(out.dtype))[0]
        return {"out": out} | {f"d_{name}": x for name, x in gradients.items()}

    return {name: np.asarray(x, np.float64) for name, x in jax.jit(run, compiler_options=QUICK)(arrays).items()}


def in_float64(op, arrays, **options):
    with jax.enable_x64(True):
        return pull(op, {name: x.astype(jnp.float64) for name, x in arrays.items()}, **options)


@pytest.mark.parametrize("borders", [(13, 16, 30), pytest.param((), marks=pytest.mark.slow)])
def test_values_and_gradients_in_float64(borders):
    arrays = arguments()
    ids = segments(*borders, time=TIME, batch=2)
    exact = in_float64(partial(naive, chosen(arrays["q"], arrays["k"], ids)), arrays, segment_ids=ids)
    assert_equal(exact, in_float64(partial(moba, **SIZES), arrays, segment_ids=ids), 1e-11)


@pytest.mark.slow
def test_values_and_gradients_in_float32():
    arrays = arguments(batch=1)
    lists = chosen(arrays["q"], arrays["k"])
    exact, plain = in_float64(partial(naive, lists), arrays), pull(partial(naive, lists), arrays)
    assert_within_rule(exact, plain, pull(partial(moba, **SIZES), arrays), floor=1e-6)
    with dispatch.interpreted():
        assert_within_rule(exact, plain, pull(partial(moba, implementation="pallas", **SIZES), arrays), floor=1e-6)


def test_blocks_are_the_own_one_and_the_best_before_it():
    arrays = arguments()
    ids = np.asarray(compiled(moba_blocks)(arrays["q"], arrays["k"]))
    assert ids.shape == (2, TIME, 4, 3)
    found = (ids[..., None] == np.arange(6)).any(-2)
    np.testing.assert_array_equal(np.swapaxes(found, 1, 2), chosen(arrays["q"], arrays["k"]))
    there, block = ids >= 0, (np.arange(TIME) // 8)[:, None, None]
    assert (ids <= block).all()
    assert (np.diff(ids, axis=-1) > 0)[there[..., 1:]].all()
    np.testing.assert_array_equal(
        there.sum(-1, keepdims=True), np.broadcast_to(np.minimum(block + 1, 3), (2, TIME, 4, 1))
    )
    equal = np.asarray(compiled(moba_blocks)(arrays["q"], jnp.ones_like(arrays["k"])))
    np.testing.assert_array_equal(equal[:, 40:], np.broadcast_to([0, 1, 5], (2, 5, 4, 3)))


def test_all_blocks_chosen_is_dense_causal_attention():
    arrays = arguments()
    t = np.arange(TIME)
    dense, _ = attention(*arrays.values(), t <= t[:, None])
    np.testing.assert_allclose(compiled(top_k=6)(**arrays), dense, rtol=1e-4, atol=1e-5)


def test_packed_is_separate_where_segments_begin_with_a_block():
    arrays = arguments(48)
    packed = compiled()(**arrays, segment_ids=segments(24, time=48, batch=2))
    for cut in (slice(0, 24), slice(24, 48)):
        alone = compiled()(**{name: x[:, cut] for name, x in arrays.items()})
        np.testing.assert_allclose(packed[:, cut], alone, rtol=1e-4, atol=1e-5)


def test_the_future_changes_no_bit():
    arrays = arguments()
    later = (np.arange(TIME) >= 29)[:, None, None]
    before, after = compiled()(**arrays), compiled()(**{name: x + 3 * later for name, x in arrays.items()})
    np.testing.assert_array_equal(after[:, :29], before[:, :29])
    np.testing.assert_array_equal(compiled()(**arrays), before)


def tokens(arrays, t):
    """Of each row its own time."""
    return {name: x[jnp.arange(x.shape[0]), t] for name, x in arrays.items()}


@pytest.mark.parametrize("come", [(0, 0), (13, 6)])
def test_one_token_after_the_other(come):
    arrays = arguments()
    whole = compiled()(**arrays)
    k, v = (arrays[name][:, : max(come)] for name in "kv")
    cache = moba_cache(k, v, capacity=TIME, block_size=8, length=jnp.asarray(come))
    for n in range(TIME - max(come)):
        now = cache.length
        np.testing.assert_array_equal(now, np.asarray(come) + n)
        out, cache = compiled(moba_step)(**tokens(arrays, now), cache=cache)
        np.testing.assert_allclose(out, whole[jnp.arange(2), now], rtol=1e-4, atol=1e-5)


def test_a_full_cache_takes_no_token():
    arrays = arguments(16)
    cache = moba_cache(arrays["k"], arrays["v"], capacity=16, block_size=8, length=jnp.asarray([16, 9]))
    token = tokens(arrays, jnp.asarray([3, 9]))
    with pytest.raises(ValueError, match=r"^moba_step: cache: got 16 tokens of at most 16, wanted room for one more"):
        moba_step(**token, cache=cache, **SIZES)
    out, after = compiled(moba_step)(**token, cache=cache)
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()
    np.testing.assert_array_equal(after.length, [16, 10])
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new[0], old[0]), after, cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((2, 44, 2, 8))}, r"k: got shape \(2, 44, 2, 8\), wanted \[B, T, G, K\]"),
        ({"k": jnp.zeros((2, 45, 3, 8))}, "k: got 3 heads, wanted a divisor of the 4 of q"),
        ({"q": jnp.zeros((2, 45, 4, 8), int)}, "q: got dtype int32, wanted a floating one"),
        ({"block_size": 0}, "block_size: got 0, wanted at least 1"),
        ({"top_k": 0}, "top_k: got 0, wanted at least 1"),
        ({"segment_ids": jnp.zeros((2, 45))}, "segment_ids: got dtype float32, wanted an integer one"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=f"^moba_blocks: {message}"):
        moba(**arguments() | SIZES | change)


def test_errors_of_the_cache():
    arrays = arguments()
    with pytest.raises(ValueError, match=r"^moba_cache: capacity: got 40, wanted room for the 45 tokens"):
        moba_cache(arrays["k"], arrays["v"], capacity=40, block_size=8)
    with pytest.raises(ValueError, match=r"^moba_cache: length: got \[46, 3\], wanted numbers from 0 to 45"):
        moba_cache(arrays["k"], arrays["v"], capacity=48, block_size=8, length=jnp.asarray([46, 3]))
    cache = moba_cache(arrays["k"], arrays["v"], capacity=64, block_size=8)
    with pytest.raises(ValueError, match=r"^moba_step: cache: got 8 blocks of 64 tokens, wanted them of 16"):
        moba_step(**tokens(arrays, jnp.zeros(2, int)), cache=cache, block_size=16)


def test_a_block_that_two_segments_share_counts_with_the_tokens_of_the_later():
    keys = np.array([-100, -100, 1, 1] + [0.8] * 4 + [0.1] * 4 + [0] * 4, np.float32)
    ids = jnp.asarray([[0, 0] + [1] * 14])
    q = jnp.ones((1, 16, 1, 1))
    chosen = moba_blocks(q, jnp.asarray(keys).reshape(1, 16, 1, 1), block_size=4, top_k=2, segment_ids=ids)
    np.testing.assert_array_equal(chosen[0, -1, 0], [0, 3])
