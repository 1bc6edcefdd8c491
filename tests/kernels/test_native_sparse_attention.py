"""Native sparse attention against its branches written out pair by pair, and one token after the other."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against import QUICK, assert_equal, assert_within_rule, normal, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_attention import attention, chosen, ended, numbered, segments

from kernels import dispatch
from kernels.native_sparse_attention import (
    compress_blocks,
    compressed_attention,
    native_sparse_attention,
    native_sparse_attention_step,
    native_sparse_cache,
    select_blocks,
)

SELECTION = {"block_size": 8, "stride": 4, "selected_blocks": 3, "initial": 1, "local": 1}
SIZES = SELECTION | {"window": 6}
CACHE = {"block_size": 8, "stride": 4, "window": 6}
TIME = 45


def arguments(time=TIME, batch=2, heads=4, groups=2, separate=False, compression=False):
    """Keys of width 8, values of 12; `separate` ones for each branch; parameters of the compression."""

    def branches(seed, own, width):
        arrays = tuple(normal(seed + n, batch, time, own, width) for n in range(3))
        return arrays if separate else arrays[0]

    arrays = {
        "q": branches(10, heads, 8),
        "k": branches(1, groups, 8),
        "v": branches(4, groups, 12),
        "gates": uniform(7, batch, time, heads, 3),
    }
    if compression:
        arrays |= {"compress_k": normal(8, 8, 8, 8) / 4, "compress_v": normal(9, 8, 12, 12) / 4}
    return arrays


def projected(parameters, blocks):
    return jnp.einsum("bnlgf,lfh->bngh", blocks, parameters, precision="highest")


def compression(arrays):
    """The arguments of an operation, with functions for parameters."""
    rest = {name: x for name, x in arrays.items() if not name.startswith("compress_")}
    if len(rest) == len(arrays):
        return rest
    return rest | {"compress": tuple(partial(projected, arrays[name]) for name in ("compress_k", "compress_v"))}


def naive(lists, q, k, v, gates, compress=None, segment_ids=None):
    """Every pair of query and key on its own; `lists` holds what was chosen, or is empty and gets it."""
    (q0, q1, q2), (k0, k1, k2), (v0, v1, v2) = (x if isinstance(x, tuple) else (x, x, x) for x in (q, k, v))
    batch, time, heads, _ = q0.shape
    shared = heads // k0.shape[2]
    run, t = numbered(segment_ids, batch, time), np.arange(time)
    means = (partial(jnp.mean, axis=2),) * 2 if compress is None else compress
    visible = ended(run, 8, 4)
    if visible.shape[-1]:
        blocks = ([x[:, 4 * i : 4 * i + 8] for i in range(visible.shape[-1])] for x in (k0, v0))
        summaries = [mean(jnp.stack(parts, axis=1)) for mean, parts in zip(means, blocks, strict=True)]
        first, weights = attention(q0, *summaries, visible[:, None])
    else:
        first, weights = jnp.zeros((batch, time, heads, 12), q0.dtype), np.zeros((batch, heads, time, 0))
    if not lists:
        by_group = np.asarray(weights).reshape(batch, heads // shared, shared, time, visible.shape[-1]).sum(2)
        lists.append(chosen(by_group, run, compression_block=8, **SELECTION))
    causal = (run[:, :, None] == run[:, None]) & (t <= t[:, None])
    tokens = np.repeat(lists[0], 8, axis=-1)[..., :time].repeat(shared, axis=1)
    second, _ = attention(q1, k1, v1, tokens & causal[:, None])
    third, _ = attention(q2, k2, v2, (causal & (t > t[:, None] - 6))[:, None])
    return gates[..., :1] * first + gates[..., 1:2] * second + gates[..., 2:] * third


@cache
def compiled(op=native_sparse_attention, **options):
    return jax.jit(partial(op, **SIZES | options), compiler_options=QUICK)


def pull(op, arrays, **options):
    """The output and all gradients in float64 numpy."""

    def run(arrays):
        out, vjp = jax.vjp(lambda arrays: op(**compression(arrays), **options), arrays)
        return out, vjp(normal(100, *out.shape).astype(out.dtype))[0]

    out, gradients = jax.jit(run, compiler_options=QUICK)(arrays)
    figures = {f"d_{jax.tree_util.keystr(path)}": x for path, x in jax.tree.leaves_with_path(gradients)}
    return {name: np.asarray(x, np.float64) for name, x in ({"out": out} | figures).items()}


def in_float64(op, arrays, **options):
    with jax.enable_x64(True):
        return pull(op, jax.tree.map(lambda x: x.astype(jnp.float64), arrays), **options)


def exactly(arrays, **options):
    """What is chosen, and the naive form with it, in float64."""
    lists = []
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), arrays)
        naive(lists, **compression(wide), **options)
        return lists, pull(partial(naive, lists), wide, **options)


@pytest.mark.parametrize(
    ("implementation", "separate", "compressed", "borders"),
    [
        ("xla", True, True, (13, 16, 30)),
        pytest.param("xla", False, False, (), marks=pytest.mark.slow),
        pytest.param("reference", False, True, (13, 30), marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_in_float64(implementation, separate, compressed, borders):
    arrays = arguments(separate=separate, compression=compressed)
    ids = segments(*borders, time=TIME, batch=2) if borders else None
    _, exact = exactly(arrays, segment_ids=ids)
    got = in_float64(partial(native_sparse_attention, implementation=implementation, **SIZES), arrays, segment_ids=ids)
    assert_equal(exact, got, 1e-11)


@pytest.mark.parametrize(("groups", "packed"), [(2, True), pytest.param(4, False, marks=pytest.mark.slow)])
def test_values_and_gradients_in_float32(groups, packed):
    arrays = arguments(batch=1, groups=groups, compression=True)
    ids = segments(16, time=TIME, batch=1) if packed else None
    lists, exact = exactly(arrays, segment_ids=ids)
    plain = pull(partial(naive, lists), arrays, segment_ids=ids)
    blocks = pull(partial(native_sparse_attention, **SIZES), arrays, segment_ids=ids)
    assert_within_rule(exact, plain, blocks, floor=1e-6)
    with dispatch.interpreted():
        kernels = pull(partial(native_sparse_attention, implementation="pallas", **SIZES), arrays, segment_ids=ids)
    assert_within_rule(exact, blocks, kernels, floor=1e-6)


@pytest.mark.slow
def test_half_precision_stays_near():
    """With the lists it chooses itself: rounded means may weigh blocks another way."""
    arrays = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arguments())
    k_compressed = compress_blocks(arrays["k"], block_size=8, stride=4)
    ids = np.asarray(select_blocks(arrays["q"], k_compressed, compression_block=8, **SELECTION))
    lists = [np.swapaxes((ids[..., None] == np.arange(6)).any(-2), 1, 2)]
    wanted = naive(lists, **jax.tree.map(lambda x: x.astype(jnp.float32), arrays))
    got = compiled()(**arrays)
    assert got.dtype == jnp.bfloat16
    assert np.abs(got - wanted).max() < 0.02 * np.abs(wanted).max()


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(1, 50), st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)]), st.integers(0, 50))
def test_any_length(time, heads, border):
    arrays = arguments(time, 1, *heads)
    ids = segments(border, time=time, batch=1)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), arrays)
        exact = naive([], **wide, segment_ids=ids)
    got = compiled()(**arrays, segment_ids=ids)
    np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-5)


def test_hardly_any_tokens():
    arrays = arguments(5, 1)
    exact, got = naive([], **arrays), compiled()(**arrays)
    np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-5)


def test_all_blocks_selected_is_dense_causal_attention():
    arrays = arguments()
    arrays["gates"] = jnp.broadcast_to(jnp.asarray([0.0, 1.0, 0.0]), arrays["gates"].shape)
    t = np.arange(TIME)
    with jax.enable_x64(True):
        dense, _ = attention(*(arrays[name].astype(jnp.float64) for name in "qkv"), t <= t[:, None])
    got = compiled(selected_blocks=6)(**arrays)
    np.testing.assert_allclose(got, dense, rtol=1e-5, atol=1e-5)


def test_packed_is_separate_where_segments_begin_with_a_block():
    arrays = arguments(48)
    packed = compiled()(**arrays, segment_ids=segments(24, time=48, batch=2))
    for cut in (slice(0, 24), slice(24, 48)):
        alone = compiled()(**{name: x[:, cut] for name, x in arrays.items()})
        np.testing.assert_allclose(packed[:, cut], alone, rtol=1e-4, atol=1e-5)


def test_the_future_changes_no_bit():
    arrays = arguments()
    attend = compiled()
    later = (np.arange(TIME) >= 29)[:, None, None]
    other = {name: x + 3 * later for name, x in arrays.items()}
    before, after = attend(**arrays), attend(**other)
    np.testing.assert_array_equal(after[:, :29], before[:, :29])
    np.testing.assert_array_equal(attend(**arrays), before)
    assert (np.abs(after - before)[:, 29:] > 0).all()


def test_before_the_first_block_has_ended_nothing_is_compressed():
    arrays = arguments()
    k, v = (compress_blocks(arrays[name], block_size=8, stride=4) for name in "kv")

    def loss(q, k, v):
        return jnp.sum(compressed_attention(q, k, v, block_size=8, stride=4)[:, :7])

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), compiler_options=QUICK)(arrays["q"], k, v)
    assert value == 0
    for x in gradients:
        np.testing.assert_array_equal(x, 0)
    few = {name: x[:, :7] for name, x in arrays.items()}
    gated = few | {"gates": few["gates"] * jnp.asarray([5.0, 1.0, 1.0])}
    np.testing.assert_array_equal(*(compiled()(**x) for x in (few, gated)))


def test_compressed_blocks_are_means_or_what_is_asked_for():
    x = normal(0, 2, 23, 3, 5)
    blocks = np.stack([x[:, 4 * i : 4 * i + 12] for i in range(3)], axis=1)
    got = compress_blocks(x, block_size=12, stride=4)
    np.testing.assert_allclose(got, blocks.mean(2), rtol=1e-5, atol=1e-6)
    got = compress_blocks(x, block_size=12, stride=4, compress=lambda blocks: jnp.max(blocks, axis=2)[..., :2])
    np.testing.assert_array_equal(got, blocks.max(2)[..., :2])
    for compress in (None, lambda blocks: blocks.reshape(*blocks.shape[:2], 3, -1)[..., :5]):
        assert compress_blocks(x[:, :11], block_size=12, stride=4, compress=compress).shape == (2, 0, 3, 5)


def tokens(arrays, t):
    """Of each row its own time."""
    return jax.tree.map(lambda x: x[jnp.arange(x.shape[0]), t], arrays)


@pytest.mark.parametrize(
    ("separate", "compressed", "come"),
    [pytest.param(False, False, (0, 0), marks=pytest.mark.slow), (True, True, (13, 6))],
)
def test_one_token_after_the_other(separate, compressed, come):
    arrays = arguments(separate=separate, compression=compressed)
    options = compression(arrays)
    compress = options.pop("compress", None)
    whole = compiled(compress=compress)(**options)
    known = jax.tree.map(lambda x: x[:, : max(come)], (options["k"], options["v"]))
    length = jnp.asarray(come) if max(come) else None
    cache = native_sparse_cache(*known, capacity=TIME, compress=compress, length=length, **CACHE)
    step = compiled(native_sparse_attention_step, compress=compress)
    for n in range(TIME - max(come)):
        now = cache.length
        np.testing.assert_array_equal(now, np.asarray(come) + n)
        out, cache = step(**tokens(options, now), cache=cache)
        np.testing.assert_allclose(out, tokens(whole, now), rtol=1e-4, atol=1e-5)


def test_a_full_cache_takes_no_token():
    arrays = arguments(16)
    cache = native_sparse_cache(arrays["k"], arrays["v"], capacity=16, length=jnp.asarray([16, 9]), **CACHE)
    token = tokens(arrays, jnp.asarray([3, 9]))
    with pytest.raises(ValueError, match="cache: got 16 tokens of at most 16, wanted room for one more"):
        native_sparse_attention_step(**token, cache=cache, **SIZES)
    out, after = compiled(native_sparse_attention_step)(**token, cache=cache)
    assert np.isnan(out[0]).all()
    np.testing.assert_allclose(out[1], compiled()(**arrays)[1, 9], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(after.length, [16, 10])
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new[0], old[0]), after, cache)


@pytest.mark.slow
def test_memory_is_a_small_part_of_all_scores():
    arrays = {name: jax.ShapeDtypeStruct((1, 16384, 4, 64), jnp.float32) for name in "qkv"}
    arrays["gates"] = jax.ShapeDtypeStruct((1, 16384, 4, 3), jnp.float32)

    def loss(arrays):
        return jnp.sum(native_sparse_attention(**arrays) ** 2)

    compiled = jax.jit(jax.grad(loss)).lower(arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * 4 * 16384**2 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((2, 45, 3, 8))}, "k: got 2 heads, wanted a divisor of the 3 of q"),
        ({"q": (jnp.zeros((2, 45, 4, 8)),) * 2}, "q: got 2 arrays, wanted one or three: compressed, selected, window"),
        ({"k": (jnp.zeros((2, 45, 2, 8)),) * 2}, "k: got 2 arrays, wanted one or three: compressed, selected, window"),
        ({"v": (jnp.zeros((2, 45, 2, 12)),) * 2 + (jnp.zeros((2, 45, 2, 4)),)}, r"v: got shape \(2, 45, 2, 4\)"),
        ({"gates": jnp.zeros((2, 45, 4, 2))}, r"gates: got shape \(2, 45, 4, 2\), wanted \[B, T, H, 3\]"),
        ({"gates": jnp.zeros((2, 45, 4, 3), int)}, "gates: got dtype int32, wanted a floating one"),
        ({"compress": (None, None, None)}, "compress: got 3 functions, wanted one or two"),
        ({"segment_ids": jnp.zeros((2, 44), int)}, r"segment_ids: got shape \(2, 44\)"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=f"^native_sparse_attention: {message}"):
        native_sparse_attention(**arguments() | SIZES | change)


def test_errors_of_the_parts_and_of_the_cache():
    arrays = arguments()
    with pytest.raises(ValueError, match=r"compress: got shape \(2, 10, 8, 2, 8\), wanted \[2, 10, 2\] and a width"):
        native_sparse_attention(**arrays, **SIZES, compress=lambda blocks: blocks)
    with pytest.raises(ValueError, match=r"^compress_blocks: block_size: got 6, wanted a positive multiple"):
        native_sparse_attention(**arrays, **SIZES, compression_block=6)
    k, v = compress_blocks(arrays["k"], block_size=8, stride=4), jnp.zeros((2, 9, 2, 12))
    with pytest.raises(ValueError, match=r"^compressed_attention: v_compressed: got shape \(2, 9, 2, 12\)"):
        compressed_attention(arrays["q"], k, v, block_size=8, stride=4)
    with pytest.raises(ValueError, match=r"^native_sparse_cache: capacity: got 40, wanted room for the 45 tokens"):
        native_sparse_cache(arrays["k"], arrays["v"], capacity=40, **CACHE)
    cache = native_sparse_cache(arrays["k"], arrays["v"], capacity=64, **CACHE)
    token = tokens(arrays, jnp.zeros(2, int))
    for change, message in (
        ({"window": 7}, "window: got 6 places, wanted 7"),
        ({"compression_block": 4}, "recent: got 8 places, wanted 4"),
        ({"stride": 2, "compression_block": 8}, "compressed: got 15 places, wanted 29"),
        ({"block_size": 24}, "got a capacity of 64, wanted a multiple of block_size 24"),
    ):
        with pytest.raises(ValueError, match=f"^native_sparse_attention_step: cache: {message}"):
            native_sparse_attention_step(**token, cache=cache, **SIZES | change)
    with pytest.raises(ValueError, match=r"^native_sparse_attention_step: selected_blocks: got 0, wanted"):
        native_sparse_attention_step(**token, cache=cache, **SIZES | {"selected_blocks": 0})
    with pytest.raises(ValueError, match=r"^native_sparse_cache: window: got 0, wanted at least 1"):
        native_sparse_cache(arrays["k"], arrays["v"], capacity=64, **CACHE | {"window": 0})
