"""Selected attention: every form against the dense masked definition in double precision."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against import QUICK, assert_equal, assert_within_rule, cast, normal, pull
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import dispatch
from kernels.selected_attention import attend, routing, selected_attention, stretches, xla

TIME, BLOCK = 75, 16
HEADS = ((4, 2, 2), (4, 2, 4), (4, 1, 1), (2, 2, 2), (3, 1, 3))  # of q, of k and v, lists


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that few tokens are several stretches, steps and tiles of a block."""
    monkeypatch.setattr(stretches, "MIN_QUERIES", 32)
    monkeypatch.setattr(xla, "ROWS", 16)
    monkeypatch.setattr(dispatch, "block_rows", lambda: 64)


def arguments(heads=4, groups=2, time=TIME, batch=2, key=8, value=12):
    return {
        "q": normal(0, batch, time, heads, key),
        "k": normal(1, batch, time, groups, key),
        "v": normal(2, batch, time, groups, value),
    }


def lists(count, time=TIME, batch=2, choices=3, block=BLOCK):
    """[B, T, L, n]: the own block but for every seventh query, unsorted others, some twice, some that do not exist."""
    rng = np.random.default_rng(3)
    blocks = rng.integers(-1, -(-time // block) + 1, (batch, time, count, choices))
    own = np.broadcast_to((np.arange(time) // block)[:, None], (batch, time, count))
    blocks[..., choices // 2] = np.where(np.arange(time)[:, None] % 7 > 0, own, -1)
    return jnp.asarray(blocks, jnp.int32)


def segments(time=TIME, batch=2, starts=((7, 32, 60), (16, 17))):
    return jnp.asarray([np.searchsorted(starts[n % 2], np.arange(time), side="right") for n in range(batch)])


def finite(q, k, v, **options):
    """`attend`, the log-normaliser 0 where a query sees nothing, so that errors can be measured."""
    out, log_normalizer = attend(q, k, v, **options)
    return out, jnp.where(log_normalizer == -jnp.inf, 0, log_normalizer)


def exact(arrays, **options):
    with jax.enable_x64(True):
        wide = {name: x.astype(jnp.float64) for name, x in arrays.items()}
        return pull(partial(finite, implementation="reference", **options), wide)


def check(arrays, **options):
    """The XLA form within twice and three times the error of the definition computed in the arguments' dtype."""
    got = pull(partial(finite, implementation="xla", **options), arrays)
    plain = pull(partial(finite, implementation="reference", **options), arrays)
    assert_within_rule(exact(arrays, **options), plain, got, floor=3e-7)
    return got


def check_roughly(arrays, **options):
    got, wanted = (pull(partial(finite, implementation=form, **options), arrays) for form in ("xla", "reference"))
    assert_equal(wanted, got, 5e-6)


@pytest.mark.parametrize(
    ("heads", "groups", "count", "dtype", "causal", "packed"),
    [
        (4, 1, 4, jnp.float32, True, True),
        (4, 2, 2, jnp.bfloat16, True, False),
        (3, 3, 3, jnp.float32, False, True),
    ],
)
def test_xla_is_the_definition(heads, groups, count, dtype, causal, packed):
    arrays = cast(arguments(heads, groups), dtype)
    check(arrays, blocks=lists(count), block_size=BLOCK, causal=causal, segment_ids=segments() if packed else None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "dtype", "causal", "packed"),
    list(itertools.product(HEADS, (jnp.float32, jnp.bfloat16), (True, False), (True, False))),
)
def test_xla_is_the_definition_everywhere(heads, dtype, causal, packed):
    test_xla_is_the_definition(*heads, dtype, causal, packed)


def test_xla_is_the_definition_in_float64():
    options = {"blocks": lists(2), "block_size": BLOCK, "segment_ids": segments(), "scale": 0.7}
    with jax.enable_x64(True):
        arrays = cast(arguments(), jnp.float64)
        got, wanted = (pull(partial(finite, implementation=form, **options), arrays) for form in ("xla", "reference"))
    assert_equal(wanted, got, 1e-12)


def test_arguments_of_several_dtypes():
    arrays = arguments()
    arrays["k"] = arrays["k"].astype(jnp.bfloat16)

    def attention(implementation):
        attention = partial(selected_attention, blocks=lists(2), block_size=BLOCK, implementation=implementation)
        return jax.jit(attention, compiler_options=QUICK)(**arrays)

    out = attention("xla")
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, attention("reference"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [48, 1000])
def test_blocks_of_any_size(size, monkeypatch):
    """Larger than is worked on at once, larger than the sequence; 1000 has a divisor that fits, 48 has none."""
    monkeypatch.setattr(stretches, "MIN_BLOCK", 20)
    monkeypatch.setattr(stretches, "MAX_BLOCK", 23 if size == 48 else 25)
    assert stretches.block_size(8) == 8
    assert stretches.block_size(size) == {48: 48, 1000: 25}[size]
    check_roughly(arguments(), blocks=lists(2, block=size), block_size=size, segment_ids=segments())


@pytest.mark.slow
@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    time=st.integers(1, 40),
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    each=st.booleans(),
    choices=st.integers(1, 5),
    size=st.integers(1, 20),
    causal=st.booleans(),
)
def test_any_shape(time, groups, shared, each, choices, size, causal):
    heads = groups * shared
    arrays = arguments(heads, groups, time, batch=1, key=3, value=2)
    blocks = lists(heads if each else groups, time, 1, choices, size)
    check_roughly(arrays, blocks=blocks, block_size=size, causal=causal, segment_ids=segments(time, 1))


def test_all_blocks_are_dense_attention():
    arrays = arguments(value=8)
    every = jnp.broadcast_to(jnp.arange(-(-TIME // BLOCK))[::-1], (2, TIME, 2, -(-TIME // BLOCK)))

    def dense(q, k, v):
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
        return out, out.sum(-1)

    def sparse(q, k, v):
        out = selected_attention(q, k, v, every, block_size=BLOCK, implementation="xla")
        return out, out.sum(-1)

    assert_equal(pull(dense, arrays), pull(sparse, arrays), 5e-6)


def test_packed_is_separate():
    """Where segments start at multiples of the block size."""
    time, start = 64, 32
    arrays, blocks = arguments(batch=1, time=time), lists(2, time, 1)
    blocks = jnp.where((np.arange(time) >= start)[:, None, None], jnp.maximum(blocks, start // BLOCK), blocks)
    attention = jax.jit(partial(attend, block_size=BLOCK, implementation="xla"), compiler_options=QUICK)
    packed = attention(**arrays, blocks=blocks, segment_ids=segments(time, 1, ((start,),)))
    for first, where in ((0, slice(0, start)), (start, slice(start, time))):
        own = {name: x[:, where] for name, x in arrays.items()}
        separate = attention(**own, blocks=blocks[:, where] - first // BLOCK)
        for x, y in zip(packed, separate, strict=True):
            np.testing.assert_allclose(x[:, where], y, rtol=2e-6, atol=2e-6)


def test_a_list_is_a_set():
    arrays, blocks = arguments(), lists(2)

    def gradients(arrays, blocks):
        out, vjp = jax.vjp(
            lambda arrays: finite(**arrays, blocks=blocks, block_size=BLOCK, implementation="xla"), arrays
        )
        return {"out": out[0], "log_normalizer": out[1]} | vjp((jnp.ones_like(out[0]), out[1]))[0]

    run = jax.jit(gradients, compiler_options=QUICK)
    none = jnp.full_like(blocks[..., :1], -1)
    wanted = run(arrays, jnp.concatenate([blocks, none, none], axis=-1))
    got = run(arrays, jnp.concatenate([none + 2**30, blocks[..., ::-1], blocks[..., :1]], axis=-1))
    assert_equal(jax.tree.map(np.asarray, wanted), jax.tree.map(np.asarray, got), 2e-6)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint16])
def test_lists_of_any_integers(dtype):
    arrays, blocks = arguments(), lists(2)
    attention = jax.jit(partial(selected_attention, block_size=1, implementation="reference"), compiler_options=QUICK)
    few = jnp.where(blocks < 0, 100, blocks).astype(dtype)
    np.testing.assert_array_equal(attention(**arrays, blocks=few), attention(**arrays, blocks=blocks))


@pytest.mark.parametrize(("implementation", "causal"), [("reference", True), ("xla", True), ("xla", False)])
def test_who_sees_nothing(implementation, causal):
    """Nothing chosen, only what does not exist, only later blocks, only blocks of another segment."""
    arrays = arguments(batch=1)
    blocks = np.asarray(lists(2, batch=1)).copy()
    blocks[:, 5], blocks[:, 6], blocks[:, 70], blocks[:, :2] = -1, 99, 0, 0
    blind = [5, 6, 70]
    if causal:
        blocks[:, 10], blind = 3, [5, 6, 10, 70]
    options = {"blocks": jnp.asarray(blocks), "block_size": BLOCK, "causal": causal, "implementation": implementation}

    def total(arrays):
        out, log_normalizer = attend(**arrays, **options, segment_ids=segments(batch=1))
        return out.sum() + jnp.exp(log_normalizer).sum(), (out, log_normalizer)

    run = jax.jit(jax.grad(total, has_aux=True), compiler_options=QUICK)
    gradients, (out, log_normalizer) = jax.tree.map(np.asarray, run(arrays))
    assert (out[:, blind] == 0).all()
    assert (log_normalizer[:, blind] == -np.inf).all()
    assert np.isfinite(log_normalizer[:, :2]).all()
    for x in gradients.values():
        assert np.isfinite(x).all()
    assert (gradients["q"][:, blind] == 0).all()
    assert gradients["q"][:, 1].any()


def test_nothing_of_what_is_not_chosen():
    """NaN in blocks that no one chose, and in a query, spreads nowhere; and without it every bit is the same."""
    arrays, blocks = arguments(batch=1), np.asarray(lists(2, batch=1)).copy()
    blocks[blocks == 1] = 0

    def gradients(arrays):
        (out, log_normalizer), vjp = jax.vjp(
            lambda arrays: finite(**arrays, blocks=jnp.asarray(blocks), block_size=BLOCK, implementation="xla"), arrays
        )
        return {"out": out, "log_normalizer": log_normalizer} | vjp((jnp.ones_like(out), log_normalizer))[0]

    run = jax.jit(gradients, compiler_options=QUICK)
    clean, again = run(arrays), run(arrays)
    for name, x in clean.items():
        np.testing.assert_array_equal(x, again[name], err_msg=name)
    lost, query = slice(BLOCK, 2 * BLOCK), 40
    for name in ("k", "v"):
        arrays[name] = arrays[name].at[:, lost].set(jnp.nan)
    arrays["q"] = arrays["q"].at[:, query].set(jnp.nan)
    got = jax.tree.map(np.asarray, run(arrays))
    others = np.arange(TIME) != query
    for name in ("out", "log_normalizer", "q"):
        np.testing.assert_array_equal(got[name][:, others], clean[name][:, others], err_msg=name)
    for block in np.setdiff1d(np.arange(5), blocks[:, query]):
        where = slice(block * BLOCK, (block + 1) * BLOCK)
        for name in ("k", "v"):
            np.testing.assert_array_equal(got[name][:, where], clean[name][:, where], err_msg=name)


def test_later_tokens_change_nothing():
    arrays, options = arguments(), {"blocks": lists(2), "block_size": BLOCK, "implementation": "xla"}
    attention = jax.jit(partial(attend, **options), compiler_options=QUICK)
    before = attention(**arrays)
    after = attention(**{name: x.at[:, 40:].add(1.0) for name, x in arrays.items()})
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x[:, :40], y[:, :40])


def test_parts_merge_by_their_log_normalizers():
    """Two lists without a common block, each attended to alone, are attention to both; gradients too."""
    arrays, blocks = arguments(), lists(2)
    options = {"block_size": BLOCK, "implementation": "xla"}

    def merged(q, k, v):
        parts = [finite_out(q, k, v, jnp.where(blocks % 2 == n, blocks, -1)) for n in range(2)]
        log_normalizer = jnp.logaddexp(parts[0][1], parts[1][1])
        out = sum(jnp.exp(part - log_normalizer)[..., None] * out for out, part in parts)
        return out, log_normalizer

    def finite_out(q, k, v, blocks):
        out, log_normalizer = attend(q, k, v, blocks, **options)
        return out, jnp.maximum(log_normalizer, -1e4)

    def at_once(q, k, v):
        return finite_out(q, k, v, blocks)

    got, wanted = pull(merged, arrays), pull(at_once, arrays)
    seen = wanted["final_state"] > -1e4  # the others' floors add up
    got["final_state"], wanted["final_state"] = got["final_state"] * seen, wanted["final_state"] * seen
    assert_equal(wanted, got, 3e-6)


@pytest.mark.parametrize(
    ("queries", "choices", "count", "slots", "packed"),
    [(50, 4, 7, 16, True), (50, 4, 7, 16, False), (3, 2, 99, 8, True)],
)
def test_routes(queries, choices, count, slots, packed, monkeypatch):
    """Every choice has the slot that holds its query in a tile of its block; tiles are in order, live ones first."""
    monkeypatch.setattr(routing, "PACKED", 2**31 if packed else 0)
    blocks = np.random.default_rng(5).integers(-1, count, (queries, choices))
    route = jax.jit(partial(routing.route, count=count, slots=slots, multiple=4), compiler_options=QUICK)
    routes = jax.tree.map(np.asarray, route(jnp.asarray(blocks, jnp.int32)))
    live = int(routes.live)
    assert len(routes.block) % 4 == 0
    assert live < len(routes.block)
    assert (np.diff(routes.block) >= 0).all()
    assert (routes.block[:live] < count).all()
    assert (routes.block[live:] == count).all()
    assert (routes.query[live:] == queries).all()
    held = [
        (block, query) for block, row in zip(routes.block, routes.query, strict=True) for query in row[row < queries]
    ]
    wanted = {(block, query) for query, row in enumerate(blocks) for block in row if block >= 0}
    assert len(held) == len(wanted)
    assert set(held) == wanted
    for query in range(queries):
        for n in range(choices):
            tile, place = divmod(routes.slot[query, n], slots)
            if tile == live:
                assert blocks[query, n] < 0 or blocks[query, n] in blocks[query, :n]
            else:
                assert (routes.block[tile], routes.query[tile, place]) == (blocks[query, n], query)


@pytest.mark.slow
def test_temporary_memory_grows_with_time(monkeypatch):
    """Not with its square, and less than the queries once for each choice, their results and gradients."""
    monkeypatch.undo()

    def temporary(time, choices):
        shapes = {"q": (1, time, 2, 16), "k": (1, time, 1, 16), "v": (1, time, 1, 16)}
        arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        blocks = jax.ShapeDtypeStruct((1, time, 1, choices), jnp.int32)

        def gradients(arrays, blocks):
            return jax.grad(
                lambda arrays: selected_attention(**arrays, blocks=blocks, block_size=64, implementation="xla").sum()
            )(arrays)

        return jax.jit(gradients).lower(arrays, blocks).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(2**14, 16), temporary(2**16, 16)
    queries = 2**16 * 2 * 16 * 4  # bytes of all of them
    assert long < 4.5 * short
    assert long < 40 * queries


@pytest.mark.parametrize(("time", "choices"), [(0, 3), (20, 0)])
def test_nothing_to_do(time, choices):
    arrays = arguments(time=time)
    blocks = jnp.zeros((2, time, 2, choices), jnp.int32)
    out, log_normalizer = attend(**arrays, blocks=blocks, block_size=BLOCK)
    np.testing.assert_array_equal(out, np.zeros((2, time, 4, 12)))
    np.testing.assert_array_equal(log_normalizer, np.full((2, time, 4), -np.inf))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": normal(1, 2, TIME, 3, 8), "v": normal(2, 2, TIME, 3, 8)},
            r"k: got 3 heads, wanted a divisor of those of q, 4",
        ),
        ({"k": normal(1, 2, TIME, 2, 9)}, r"k: got shape \(2, 75, 2, 9\), wanted \[B, T, G, K\]"),
        ({"v": normal(1, 2, TIME, 1, 8)}, r"v: got shape \(2, 75, 1, 8\), wanted \[B, T, G, V\]"),
        ({"v": jnp.zeros((2, TIME, 2, 0))}, r"v: got width 0, wanted at least 1"),
        ({"q": jnp.zeros((2, TIME, 4, 8), int)}, r"q: got dtype int32, wanted a floating one"),
        ({"blocks": lists(3)}, r"blocks: got 3 lists, wanted one for each of 2 groups or 4 heads"),
        ({"blocks": lists(2).astype(jnp.float32)}, r"blocks: got dtype float32, wanted an integer one"),
        ({"block_size": 0}, r"block_size: got 0, wanted at least 1"),
        ({"segment_ids": jnp.zeros((2, TIME))}, r"segment_ids: got dtype float32, wanted an integer one"),
        ({"implementation": "fast"}, r"implementation: got 'fast'"),
    ],
)
def test_errors(change, message):
    given = arguments() | {"blocks": lists(2), "block_size": BLOCK} | change
    for op in (selected_attention, attend):
        with pytest.raises(ValueError, match=rf"^{op.__name__}: {message}"):
            op(**given)
