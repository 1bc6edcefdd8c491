"""Block selection: every form against scores counted block by block in double precision."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against import QUICK, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from naive_attention import chosen, ended, listed, numbered, segments, softmax

from kernels import dispatch
from kernels.select_blocks import select_blocks
from kernels.select_blocks import tpu as pallas
from kernels.select_blocks import xla as pieces

STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
FORMS = ("reference", "xla", "pallas")
SIZES = {"block_size": 8, "stride": 4, "compression_block": 8, "selected_blocks": 4, "initial": 1, "local": 2}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that a few tokens are several pieces, chunks and strips."""
    monkeypatch.setattr(pieces, "WIDTH", 4)
    monkeypatch.setattr(pieces, "STRETCHES", 2)
    monkeypatch.setattr(pallas, "CHUNK", 32)
    monkeypatch.setattr(pallas, "STRIP", 8)


def arguments(time=150, batch=2, heads=4, groups=2, width=6, dtype=jnp.float32, **sizes):
    sizes = SIZES | sizes
    compressed = max((time - sizes["compression_block"]) // sizes["stride"] + 1, 0)
    return normal(0, batch, time, heads, width).astype(dtype), normal(1, batch, compressed, groups, width).astype(dtype)


@cache
def compiled(**options):
    return jax.jit(partial(select_blocks, **SIZES | options), compiler_options=QUICK)


def run(q, k, implementation, segment_ids=None, **options):
    with dispatch.interpreted(STRICT):
        return np.asarray(compiled(implementation=implementation, **options)(q, k, segment_ids=segment_ids))


def wide(x):
    return np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32)), np.float64)


def brute_force(q, k, segment_ids=None, scale=None, **sizes):
    sizes = SIZES | sizes
    q, k = wide(q), wide(k)
    batch, time, heads, width = q.shape
    run, groups = numbered(segment_ids, batch, time), k.shape[2]
    visible = ended(run, sizes["compression_block"], sizes["stride"])[:, None]
    q = q.reshape(batch, time, groups, heads // groups, width)
    scores = (width**-0.5 if scale is None else scale) * np.einsum("btghk,bngk->hbgtn", q, k)
    return listed(chosen(softmax(scores, visible).sum(0), run, **sizes), sizes["selected_blocks"])


@pytest.mark.parametrize(
    ("implementation", "dtype", "packed", "groups"),
    [
        ("reference", jnp.float32, True, 2),
        ("xla", jnp.float32, False, 1),
        ("xla", jnp.float32, True, 2),
        ("xla", jnp.bfloat16, True, 4),
        ("pallas", jnp.float32, True, 2),
        ("pallas", jnp.bfloat16, False, 1),
    ],
)
def test_every_form_is_brute_force(implementation, dtype, packed, groups):
    q, k = arguments(groups=groups, dtype=dtype)
    ids = segments(16, 61, 62, 90, time=150, batch=2) if packed else None
    got = run(q, k, implementation, segment_ids=ids)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, brute_force(q, k, segment_ids=ids))


def test_xla_is_the_definition_in_float64():
    ids = segments(16, 61, 62, 90, time=150, batch=2)
    with jax.enable_x64(True):
        q, k = (x.astype(jnp.float64) for x in arguments())
        for scale in (None, 3.0):
            wanted = brute_force(q, k, segment_ids=ids, scale=scale)
            for form in ("reference", "xla"):
                np.testing.assert_array_equal(run(q, k, form, segment_ids=ids, scale=scale), wanted)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"stride": 8}, marks=pytest.mark.slow),  # every compressed block is a block
        pytest.param({"compression_block": 4}, marks=pytest.mark.slow),
        {"compression_block": 12},  # as long as the kernel takes them
        pytest.param(
            {"stride": 2, "compression_block": 2, "initial": 0, "local": 0, "selected_blocks": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param({"block_size": 4, "initial": 2, "local": 3, "selected_blocks": 5}, marks=pytest.mark.slow),
        {"stride": 1, "block_size": 3, "compression_block": 2, "selected_blocks": 20},  # more than there are
    ],
)
def test_sizes(sizes):
    q, k = arguments(50, batch=1, **sizes)
    wanted = brute_force(q, k, **sizes)
    for form in FORMS:
        np.testing.assert_array_equal(run(q, k, form, **sizes), wanted, err_msg=form)


def test_longer_compressed_blocks():
    sizes = {"block_size": 4, "stride": 2, "compression_block": 14}
    q, k = arguments(**sizes)
    np.testing.assert_array_equal(run(q, k, "xla", **sizes), brute_force(q, k, **sizes))
    with pytest.raises(NotImplementedError, match="at most block_size"):
        run(q, k, "pallas", **sizes)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    time=st.integers(1, 70),
    groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    ratio=st.integers(1, 3),
    stride=st.integers(1, 4),
    covered=st.integers(1, 3),
    border=st.integers(0, 70),
)
def test_any_shape(time, groups, ratio, stride, covered, border):
    sizes = {"block_size": ratio * stride, "stride": stride, "compression_block": covered * stride}
    q, k = arguments(time, 1, *groups, width=3, **sizes)
    ids = segments(border, time=time, batch=1)
    wanted = brute_force(q, k, segment_ids=ids, **sizes)
    np.testing.assert_array_equal(run(q, k, "xla", segment_ids=ids, **sizes), wanted)


@pytest.mark.parametrize("implementation", FORMS)
def test_weights_of_the_worked_example(implementation):
    """Compressed blocks of 32 every 16 tokens, blocks of 64: block j gets 1, 2, 2, 2, 1 of keys 4j - 1 to 4j + 3."""
    sizes = {"block_size": 64, "stride": 16, "compression_block": 32, "selected_blocks": 2, "initial": 0, "local": 0}
    k = np.zeros((5, 19, 1, 2), np.float32)
    k[np.arange(5), np.arange(7, 12)] = 100  # one of them for each row of the batch
    ids = run(jnp.ones((5, 320, 1, 2)), jnp.asarray(k), implementation, **sizes)
    np.testing.assert_array_equal(ids[:, -1, 0], [[1, 2], [0, 2], [0, 2], [0, 2], [2, 3]])


@pytest.mark.parametrize("implementation", FORMS)
def test_equal_scores_go_to_the_lowest_block(implementation):
    """Every compressed key has the same weight: a block's score is the number of strides that have ended in it."""
    q, k = (jnp.zeros_like(x) for x in arguments(time=100, batch=1))
    got = run(q, k, implementation, selected_blocks=6)
    for t in range(80, 100):  # block 0 is forced and has no compressed block before it
        np.testing.assert_array_equal(got[:, t, 0], [[0, 1, 2, 3, t // 8 - 1, t // 8]])


@pytest.mark.parametrize("implementation", FORMS)
def test_lists_are_causal_ascending_and_hold_what_is_forced(implementation):
    q, k = arguments(batch=1)
    got = run(q, k, implementation)
    there = got >= 0
    block = np.arange(150) // 8
    assert (got <= block[:, None, None]).all()
    assert (there.sum(-1) == np.minimum(block + 1, 4)[:, None]).all()
    assert (np.diff(got, axis=-1) > 0)[there[..., 1:]].all()
    for forced in (np.zeros_like(block), block, np.maximum(block - 1, 0)):
        assert (got == forced[:, None, None]).any(-1).all()
    # What comes later changes no bit of what came before.
    later = (
        np.where(np.arange(150) < 93, 0, 1)[:, None, None],
        np.where(np.arange(36) * 4 + 8 <= 93, 0, 1)[:, None, None],
    )
    np.testing.assert_array_equal(run(q + 9 * later[0], k - 9 * later[1], implementation)[:, :93], got[:, :93])
    np.testing.assert_array_equal(run(q, k, implementation), got)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("time", [7, 9])
def test_hardly_any_tokens(implementation, time):
    got = run(*arguments(time), implementation)
    np.testing.assert_array_equal(got[..., 0], 0)
    np.testing.assert_array_equal(
        got[..., 1], np.where(np.arange(time) < 8, -1, 1)[None, :, None].repeat(2, 2).repeat(2, 0)
    )
    np.testing.assert_array_equal(got[..., 2:], -1)


def test_no_tokens():
    assert select_blocks(*arguments(0), **SIZES).shape == (2, 0, 2, 4)


@pytest.mark.parametrize("implementation", FORMS)
def test_packed_is_separate_where_segments_begin_with_a_block(implementation):
    q, k = arguments(time=96, batch=1)
    got = run(q, k, implementation, segment_ids=segments(48, time=96, batch=1))
    for begin, end in ((0, 48), (48, 96)):
        alone = run(q[:, begin:end], k[:, begin // 4 : (end - 8) // 4 + 1], implementation)
        np.testing.assert_array_equal(got[:, begin:end], np.where(alone < 0, -1, alone + begin // 8))


def test_gradients_are_zero():
    q, k = arguments(40)
    weights = normal(2, 2, 40, 2, 4)
    loss = jax.grad(lambda q, k: jnp.sum(weights * select_blocks(q, k, **SIZES)), (0, 1))
    for x in jax.jit(loss, compiler_options=QUICK)(q, k):
        np.testing.assert_array_equal(x, 0)


def test_memory_never_holds_all_scores(monkeypatch):
    monkeypatch.undo()  # pieces of the size that is used
    q, k = jax.ShapeDtypeStruct((1, 16384, 4, 64), jnp.float32), jax.ShapeDtypeStruct((1, 1023, 1, 64), jnp.float32)
    compiled = jax.jit(partial(select_blocks, implementation="xla")).lower(q, k).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * 16384 * 1023 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((2, 150, 6))}, r"q: got shape \(2, 150, 6\), wanted \[B, T, H, K\]"),
        ({"k_compressed": jnp.zeros((2, 35, 2, 6))}, "k_compressed: got N=35, wanted 36 for T=150"),
        ({"k_compressed": jnp.zeros((2, 36, 3, 6))}, "k_compressed: got 3 heads, wanted a divisor of the 4 of q"),
        ({"q": jnp.zeros((2, 150, 4, 6), int)}, "q: got dtype int32, wanted a floating one"),
        ({"stride": 0}, "stride: got 0, wanted at least 1"),
        ({"stride": 3}, "block_size: got 8, wanted a positive multiple of stride 3"),
        ({"compression_block": 6}, "compression_block: got 6, wanted a positive multiple of stride 4"),
        ({"selected_blocks": 2}, r"selected_blocks: got 2, wanted at least 1 and at least initial \+ local"),
        ({"segment_ids": jnp.zeros((2, 149), int)}, r"segment_ids: got shape \(2, 149\)"),
        ({"implementation": "cuda"}, "implementation: got 'cuda'"),
    ],
)
def test_errors_name_the_argument(change, message):
    q, k = arguments()
    with pytest.raises(ValueError, match=f"^select_blocks: {message}"):
        select_blocks(**{"q": q, "k_compressed": k} | SIZES | change)


def test_pallas_says_what_it_does_not_take():
    q, k = (x.astype(jnp.float16) for x in arguments())
    with pytest.raises(NotImplementedError, match="computes in float32 or bfloat16, these arguments need float16"):
        run(q, k, "pallas")
    q, k = (jax.ShapeDtypeStruct((1, time, 1, 64), jnp.float32) for time in (2**20, 2**18 - 1))
    with pytest.raises(NotImplementedError, match="in 12582912 bytes"), dispatch.interpreted():
        jax.eval_shape(partial(select_blocks, implementation="pallas", **SIZES), q, k)
