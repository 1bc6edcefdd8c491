"""Sparse attention: every form against the dense definition in double precision, and what it skips."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against import QUICK, assert_equal, assert_within_rule, cast, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.chunks import compute_dtype
from kernels.sparse_attention import (
    Blocks,
    Causal,
    Compressed,
    Full,
    Global,
    Segments,
    Sinks,
    Strided,
    Window,
    attend,
    reference,
    sparse_attention,
    sparse_attention_step,
    xla,
)

TIME, HEADS = 45, 4


def random_map(seed, *shape):
    return np.random.default_rng(seed).random(shape) < 0.4


MASKS = {
    "full": Full(),
    "causal": Causal(),
    "window": Causal() & Window(7),
    "night": Causal() & (Window(9) | Sinks(3)),
    "longformer": Window(9, symmetric=True) | Global(2),
    "segments": Segments((16, 20, 9)),
    "even segments": Causal() & Segments((20, 20, 5)),
    "strided": Causal() & (Window(5) | Strided(7)),
    "compressed": Compressed(4, 2),
    "map": Blocks(random_map(0, 6, 6), 8),
    "map of heads": Causal() & Blocks(random_map(1, HEADS, 6, 6), 8),
    "map of key heads": Blocks(random_map(2, 2, 2, 6, 6), 8) | Window(2),
    "map of batch rows": Blocks(random_map(3, 2, 1, 3, 6), (16, 8)) | Window(3),
}
SIZED = ("segments", "even segments", "map", "map of heads", "map of key heads", "map of batch rows")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that a few tokens are several rows and steps."""
    monkeypatch.setattr(xla, "BLOCK_Q", 16)
    monkeypatch.setattr(xla, "BLOCK_K", 8)
    monkeypatch.setattr(xla, "TOGETHER", 24)


def arguments(time_q=TIME, time_k=TIME, groups=2, key=8, value=12, dtype=jnp.float32):
    shapes = {"q": (time_q, HEADS, key), "k": (time_k, groups, key), "v": (time_k, groups, value)}
    arrays = {name: normal(n, 2, *shape) for n, (name, shape) in enumerate(shapes.items())}
    return cast(arrays, dtype)


def regions(time=TIME):
    """[2, time] ids of regions, in one row hanging together, in the other scattered."""
    return jnp.asarray(np.stack([np.arange(time) // 17, np.random.default_rng(9).integers(0, 3, time)]))


@cache
def compiled(function, options):
    """Values and gradients for fixed random cotangents on both results, where nothing is seen too."""

    def run(arrays, *others):
        results, vjp = jax.vjp(lambda arrays: function(**arrays, **dict(zip(options, others, strict=True))), arrays)
        return results, vjp(tuple(normal(100 + n, *x.shape).astype(x.dtype) for n, x in enumerate(results)))[0]

    return jax.jit(run, compiler_options=QUICK)


def figures(function, arrays, **options):
    """In float64 numpy; a log-normaliser of -inf as -1000, which no other is."""
    (out, log_normalizer), gradients = compiled(function, tuple(options))(arrays, *options.values())
    assert not np.isnan(log_normalizer).any()
    found = {"out": out, "log_normalizer": jnp.where(log_normalizer == -jnp.inf, -1000, log_normalizer)}
    found |= {f"d_{name}": x for name, x in gradients.items()}
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


def dense(q, k, v, visible):
    return reference.attend(q, k, v, visible, scale=q.shape[-1] ** -0.5, dtype=compute_dtype(q, k, v)[0])


def definition(arrays, mask, segment_ids=None):
    """Of any mask through one program: what is visible is an argument. Maps of key heads are repeated here."""
    visible = mask.dense(arrays["q"].shape[1], arrays["k"].shape[1])
    if visible.ndim > 2 and visible.shape[-3] not in (1, HEADS):
        visible = visible.repeat(HEADS // visible.shape[-3], axis=-3)
    visible = np.broadcast_to(visible, (2, HEADS, *visible.shape[-2:]))
    if segment_ids is not None:
        q_ids, k_ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        visible = visible & np.asarray(q_ids[:, None, :, None] == k_ids[:, None, None])
    return figures(dense, arrays, visible=visible)


def by_xla(arrays, mask, segment_ids=None):
    return figures(partial(attend, mask=mask, segment_ids=segment_ids, implementation="xla"), arrays)


@pytest.mark.parametrize(
    ("kind", "packed"),
    [
        pytest.param(kind, packed, marks=[pytest.mark.slow] * ((n + packed) % 2))
        for n, kind in enumerate(MASKS)
        for packed in (False, True)
    ],
)
def test_xla_is_the_definition_in_float64(kind, packed):
    ids = regions() if packed else None
    with jax.enable_x64(True):
        arrays = arguments(dtype=jnp.float64)
        assert_equal(definition(arrays, MASKS[kind], ids), by_xla(arrays, MASKS[kind], ids), 1e-12)


@pytest.mark.parametrize(
    ("kind", "dtype", "groups"),
    [
        ("night", jnp.float32, 1),
        ("night", jnp.bfloat16, 4),
        pytest.param("longformer", jnp.bfloat16, 1, marks=pytest.mark.slow),
        ("map of heads", jnp.float32, 4),
        pytest.param("map of batch rows", jnp.bfloat16, 2, marks=pytest.mark.slow),
        pytest.param("causal", jnp.float32, 2, marks=pytest.mark.slow),
    ],
)
def test_xla_errs_no_more_than_the_definition(kind, dtype, groups):
    arrays, mask = arguments(groups=groups, dtype=dtype), MASKS[kind]
    plain, got = definition(arrays, mask, regions()), by_xla(arrays, mask, regions())
    with jax.enable_x64(True):
        exact = definition(cast(arrays, jnp.float64), mask, regions())
    assert_within_rule(exact, plain, got, floor=1e-7)


@pytest.mark.parametrize(("time_q", "time_k"), [(21, 45), pytest.param(50, 19, marks=pytest.mark.slow)])
def test_other_numbers_of_queries_than_of_keys(time_q, time_k):
    with jax.enable_x64(True):
        arrays, pair = arguments(time_q, time_k, dtype=jnp.float64), (regions(time_q), regions(time_k))
        for mask, ids in ((Compressed(3, 2) | Sinks(1), None), (Window(11, symmetric=True), pair)):
            assert_equal(definition(arrays, mask, ids), by_xla(arrays, mask, ids), 1e-12)


@pytest.mark.parametrize("examples", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_any_lengths_groups_and_masks(examples):
    @settings(max_examples=examples, deadline=None)
    @given(
        time_q=st.integers(1, 70),
        time_k=st.integers(1, 70),
        groups=st.sampled_from([1, 2, 4]),
        kinds=st.lists(st.sampled_from(sorted(set(MASKS) - set(SIZED))), min_size=1, max_size=3),
        either=st.booleans(),
        packed=st.booleans(),
    )
    def check(time_q, time_k, groups, kinds, either, packed):
        mask = MASKS[kinds[0]]
        for kind in kinds[1:]:
            mask = mask | MASKS[kind] if either else mask & MASKS[kind]
        ids = (regions(time_q), regions(time_k)) if packed else None
        with jax.enable_x64(True):
            arrays = arguments(time_q, time_k, groups, dtype=jnp.float64)
            assert_equal(definition(arrays, mask, ids), by_xla(arrays, mask, ids), 1e-12)

    check()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_query_that_sees_nothing_gives_zeros(implementation):
    """And no gradient, whatever comes back for its log-normaliser; keys nobody sees get none either."""
    seen = np.ones((6, 6), bool)
    seen[1], seen[:, 4], seen[4] = False, False, False
    ids = (jnp.zeros((2, TIME), int).at[1].set(7), jnp.zeros((2, TIME), int))  # the whole second row of the batch

    def run(q, k, v):
        (out, log_normalizer), vjp = jax.vjp(
            partial(attend, mask=Blocks(seen, 8), segment_ids=ids, implementation=implementation), q, k, v
        )
        return out, log_normalizer, vjp((out + 1, jnp.where(log_normalizer == -jnp.inf, jnp.nan, 1.0)))

    blind = np.zeros((2, TIME), bool)
    blind[1], blind[:, 8:16], blind[:, 32:40] = True, True, True
    unseen = blind.copy()
    unseen[0, 8:16] = False
    out, log_normalizer, (d_q, d_k, d_v) = jax.jit(run, compiler_options=QUICK)(**arguments())
    assert (np.asarray(out)[blind] == 0).all()
    np.testing.assert_array_equal(np.asarray(log_normalizer) == -np.inf, np.repeat(blind[..., None], HEADS, axis=2))
    for gradient, nothing in ((d_q, blind), (d_k, unseen), (d_v, unseen)):
        np.testing.assert_array_equal((np.asarray(gradient) == 0).all(axis=(2, 3)), nothing)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("kind", ["known", "traced", "ids"])
def test_what_is_skipped_is_not_read(kind):
    """NaN in the blocks of keys and values that no query sees reaches nothing."""
    seen = random_map(5, 6, 6) | np.eye(6, dtype=bool)
    seen[:, 2] = False
    arrays = arguments()
    hidden = np.zeros((TIME, 1, 1), bool)
    hidden[16:24] = True
    q_ids = np.where(np.arange(TIME) < 16, 0, 2)[None].repeat(2, axis=0)
    ids = (q_ids, np.where(hidden[:, 0, 0], 1, q_ids)) if kind == "ids" else None

    def run(arrays, traced):
        mask = Full() if kind == "ids" else Blocks(traced if kind == "traced" else seen, 8)
        function = partial(attend, mask=Causal() & mask, segment_ids=ids, implementation="xla")
        results, vjp = jax.vjp(lambda arrays: function(**arrays), arrays)
        return results, vjp(results)

    run = jax.jit(run, compiler_options=QUICK)
    clean, planted = (
        run({name: jnp.where(hidden, filling, x) if name in "kv" else x for name, x in arrays.items()}, seen)
        for filling in (0.0, jnp.nan)
    )
    for one, other in zip(jax.tree.leaves(clean), jax.tree.leaves(planted), strict=True):
        assert not np.isnan(one).any()
        np.testing.assert_array_equal(one, other)


def test_a_traced_map_is_a_known_one():
    arrays, allowed = arguments(), random_map(6, 2, HEADS, 6, 6)

    def run(arrays, map):
        return attend(**arrays, mask=Causal() & Blocks(map, 8), implementation="xla")

    known = jax.jit(partial(run, map=allowed), compiler_options=QUICK)(arrays)
    traced = jax.jit(run, compiler_options=QUICK)(arrays, allowed)
    for one, other in zip(known, traced, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    wanted = definition(arrays, Causal() & Blocks(allowed, 8))
    np.testing.assert_allclose(traced[0], wanted["out"], rtol=1e-5, atol=1e-6)


def test_streams_merge_by_their_log_normalisers():
    """Attention over two disjoint sets of keys is that over their union, gradients included."""
    near, far = Causal() & Window(8), Causal() & Compressed(9, 1)  # j + 9 <= t + 1: all before the window

    def merged(q, k, v):
        (a, a_log), (b, b_log) = (attend(q, k, v, mask, implementation="xla") for mask in (near, far))
        log_normalizer = jnp.logaddexp(a_log, b_log)
        a_share, b_share = (jnp.exp(x - log_normalizer)[..., None] for x in (a_log, b_log))
        return a_share * a + b_share * b, log_normalizer

    with jax.enable_x64(True):
        arrays = arguments(dtype=jnp.float64)
        assert_equal(definition(arrays, Causal()), figures(merged, arrays), 1e-12)


def test_the_same_twice_and_by_default():
    """Bit for bit; and `sparse_attention` is the first result of `attend`, by whatever form is best."""
    arrays = arguments()
    run = partial(attend, mask=MASKS["night"], implementation="xla")
    first, again = figures(run, arrays), figures(run, arrays)
    for name, x in first.items():
        np.testing.assert_array_equal(x, again[name])

    def by_default(q, k, v):
        return sparse_attention(q, k, v, MASKS["night"], scale=0.5)

    scaled = jax.jit(by_default, compiler_options=QUICK)(**arrays | {"q": arrays["q"] * 2 * 8**-0.5})
    np.testing.assert_allclose(scaled, first["out"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind", ["causal", "night", "longformer", "even segments", "map of key heads", "map of batch rows"]
)
def test_a_step_is_a_row(kind):
    """Nothing after the position is seen, even by masks that show it."""
    arrays, mask = arguments(), MASKS[kind]
    wanted = definition(arrays, mask & Causal())["out"]
    step = jax.jit(partial(sparse_attention_step, mask=mask), compiler_options=QUICK)
    for position in ([0, 44], [7, 8], [30, 21]):
        q = arrays["q"][np.arange(2), np.array(position)]
        out = step(q, arrays["k"], arrays["v"], position=jnp.asarray(position))
        np.testing.assert_allclose(out, wanted[np.arange(2), position], rtol=1e-5, atol=1e-6)


def test_a_step_reads_what_it_may_see():
    """NaN outside of sinks and window stays there."""
    arrays, mask, position = arguments(), MASKS["night"], jnp.asarray([40, 25])
    q = arrays["q"][np.arange(2), np.asarray(position)]
    read = np.zeros((2, TIME, 1, 1), bool)
    read[:, :3] = True
    read[0, 32:41], read[1, 17:26] = True, True
    step = jax.jit(partial(sparse_attention_step, mask=mask), compiler_options=QUICK)
    clean = step(q, arrays["k"], arrays["v"], position=position)
    planted = (jnp.where(read, arrays[name], jnp.nan) for name in "kv")
    np.testing.assert_array_equal(step(q, *planted, position=position), clean)


def test_memory_grows_with_the_length(monkeypatch):
    """At real block sizes and optimised: forward and backward of a window, and never the scores of all pairs."""
    monkeypatch.undo()

    def temporary(time):
        x = jax.ShapeDtypeStruct((1, time, 2, 16), jnp.float32)

        def loss(q, k, v):
            return jnp.sum(sparse_attention(q, k, v, Causal() & Window(128), implementation="xla") ** 2)

        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(4096), temporary(16384)
    assert long < 4.2 * short
    assert long < 2 * 16384**2 * 4 / 50


ERRORS = [
    ({"k": normal(0, 2, TIME, 3, 8)}, "v: got shape (2, 45, 2, 12), wanted [B, Tk, G, V] with B=2, Tk=45, G=3"),
    ({"k": normal(0, 2, TIME, 3, 8), "v": normal(0, 2, TIME, 3, 8)}, "k: got 3 heads, wanted a divisor of the 4 of q"),
    ({"q": jnp.zeros((2, TIME, HEADS, 8), int)}, "q: got dtype int32, wanted a floating one"),
    ({"q": normal(0, 2, 0, HEADS, 8)}, "got Tq=0, wanted at least 1"),
    ({"mask": np.ones((TIME, TIME), bool)}, "mask: got ndarray, wanted a mask such as Causal()"),
    ({"mask": Segments((4, 5))}, "Segments: lengths: got 9 tokens in all"),
    ({"mask": Blocks(np.ones((5, 6), bool), 8)}, "Blocks: map: got shape (5, 6), wanted [6, 6]"),
    ({"mask": Blocks(np.ones((3, 6, 6), bool), 8)}, "Blocks: map: got shape [3, 6, 6], wanted [1 or 2, 1, 2 or 4"),
    ({"segment_ids": jnp.zeros((2, 44), int)}, "segment_ids: got shape (2, 44), wanted [B, Tq] with B=2, Tq=45"),
    ({"segment_ids": jnp.zeros((2, TIME))}, "segment_ids: got dtype float32, wanted an integer one"),
    ({"segment_ids": (regions(),) * 3}, "segment_ids: got 3 arrays, wanted one or those of queries and of keys"),
    ({"implementation": "triton"}, "implementation: got 'triton'"),
]


@pytest.mark.parametrize(("changed", "message"), ERRORS)
def test_errors_name_the_argument(changed, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        sparse_attention(**arguments() | {"mask": Causal()} | changed)
    assert f"sparse_attention: {message}" in str(error.value)
    assert "\n" not in str(error.value)


def test_errors_of_a_step_name_the_argument():
    arrays = arguments() | {"q": normal(0, 2, HEADS, 8), "mask": Causal()}
    for position, message in (
        (jnp.zeros(3, int), "position: got shape (3,), wanted [B] with B=2"),
        (jnp.zeros(2), "position: got dtype float32, wanted an integer one"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
            sparse_attention_step(**arrays, position=position)
        assert f"sparse_attention_step: {message}" in str(error.value)


def test_pallas_refuses_what_it_cannot_serve():
    with pytest.raises(NotImplementedError, match="implementation 'pallas'"):
        sparse_attention(**arguments(), mask=Causal(), implementation="pallas")
