"""TPU kernels of sparse attention, interpreted on the CPU: races detected, memory poisoned."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against import QUICK, assert_within_rule, cast, normal
from jax.experimental.pallas import tpu as pltpu
from test_sparse_attention import MASKS, TIME, arguments, definition, figures, random_map, regions

from kernels import dispatch
from kernels.sparse_attention import Blocks, Causal, Compressed, Window, attend, tpu, xla

STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
DTYPES = (jnp.float32, jnp.bfloat16)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that a few tokens are several blocks."""
    monkeypatch.setattr(tpu, "BLOCKS", ((16, 16),))
    monkeypatch.setattr(xla, "BLOCK_Q", 16)
    monkeypatch.setattr(xla, "BLOCK_K", 16)


def as_kernels(arrays, mask, segment_ids=None):
    with dispatch.interpreted(STRICT):
        return figures(partial(attend, mask=mask, segment_ids=segment_ids, implementation="pallas"), arrays)


def check(arrays, mask, segment_ids=None):
    got = as_kernels(arrays, mask, segment_ids)
    plain = figures(partial(attend, mask=mask, segment_ids=segment_ids, implementation="xla"), arrays)
    with jax.enable_x64(True):
        exact = definition(cast(arrays, jnp.float64), mask, segment_ids)
    assert_within_rule(exact, plain, got, floor=1e-6)
    return got


@pytest.mark.parametrize(
    ("kind", "dtype", "groups", "packed"),
    [
        ("night", jnp.float32, 1, False),
        pytest.param("longformer", jnp.bfloat16, 4, True, marks=pytest.mark.slow),
        ("map of key heads", jnp.float32, 2, True),
    ],
)
def test_masks(kind, dtype, groups, packed):
    check(arguments(groups=groups, dtype=dtype), MASKS[kind], regions() if packed else None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype", "groups", "packed"),
    [
        (kind, dtype, groups, packed)
        for kind, dtype, groups, packed in itertools.product(MASKS, DTYPES, (1, 2, 4), (False, True))
        if kind != "map of key heads" or groups == 2
    ],
)
def test_masks_everywhere(kind, dtype, groups, packed):
    check(arguments(groups=groups, dtype=dtype), MASKS[kind], regions() if packed else None)


@pytest.mark.slow
def test_queries_that_see_nothing():
    """Of compressed keys, fewer than there are queries, the first few see none: zeros, and no gradient."""
    got = check(arguments(70, 16, groups=1), Compressed(8, 4))
    for name in ("out", "d_q"):
        assert (got[name][:, :7] == 0).all()
        assert (got[name][:, 7:] != 0).all()
    assert (got["log_normalizer"][:, :7] == -1000).all()


@pytest.mark.slow
@pytest.mark.parametrize(("time_q", "time_k"), [(21, 45), (50, 19), (16, 16), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_numbers_of_queries_than_of_keys(time_q, time_k, dtype):
    ids = (regions(time_q), regions(time_k))
    check(arguments(time_q, time_k, dtype=dtype), Window(11, symmetric=True), ids)


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value"), [(1, 3), (128, 64), (200, 136)])
def test_widths(key, value):
    check(arguments(key=key, value=value), MASKS["night"])


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 128, 256])
def test_tiles_of_many_parts(monkeypatch, size):
    """Tiles as they are in use: several parts, whole ones among them, heads of a group in one part or in several."""
    monkeypatch.setattr(tpu, "BLOCKS", ((size, 256),))
    check(arguments(600, 600, groups=1), Causal() & Window(300))


@pytest.mark.slow
def test_arguments_of_different_dtypes():
    arrays = arguments() | {"k": arguments(dtype=jnp.bfloat16)["k"]}
    got = check(arrays, MASKS["night"])
    assert set(got) == {"out", "log_normalizer", "d_q", "d_k", "d_v"}


@pytest.mark.slow
def test_the_same_twice_and_nothing_of_what_is_skipped():
    """NaN in keys that no query sees reaches nothing, here by a map known only when the program runs; same bits twice.

    Scores of ten thousands overflow nowhere.
    """
    seen = random_map(5, 2, 3, 3) | np.eye(3, dtype=bool)
    seen[..., 1] = False
    hidden = (np.arange(TIME) // 16 == 1)[:, None, None]

    def run(arrays, map):
        results, vjp = jax.vjp(
            lambda arrays: attend(**arrays, mask=Causal() & Blocks(map, 16), implementation="pallas"), arrays
        )
        return results, vjp(results)

    def filled(filling, scale=1.0):
        arrays = arguments()
        arrays = {name: jnp.where(hidden, filling, x) if name in "kv" else x for name, x in arrays.items()}
        return jax.tree.leaves(run(arrays | {"q": scale * arrays["q"]}, seen))

    run = jax.jit(run, compiler_options=QUICK)
    with dispatch.interpreted(STRICT):
        first, again, planted, large = filled(0.0), filled(0.0), filled(jnp.nan), filled(0.0, scale=1e4)
    for one, *others in zip(first, again, planted, strict=True):
        for other in others:
            np.testing.assert_array_equal(one, other)
    for x in first[:1] + first[2:] + large[:1] + large[2:]:
        assert np.isfinite(x).all()


def test_where_it_is_compiled_for_a_tpu_the_kernels_run():
    arrays = {name: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for name, x in arguments().items()}

    def loss(arrays):
        out, log_normalizer = attend(**arrays, mask=MASKS["causal"], segment_ids=regions())
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(log_normalizer)

    text = jax.export.export(jax.jit(jax.grad(loss)), platforms=["tpu"])(arrays).mlir_module()
    for kernel in ("forward", "d_queries", "d_keys"):
        assert text.count(f"sparse_attention_{kernel}") > 0
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 3


@pytest.mark.parametrize(
    ("mask", "heads", "packed_rows", "sizes"),
    [
        (Causal(), (4, 4), 0, (512, 512)),
        (Causal() & Window(512), (4, 1), 0, (256, 256)),
        (Causal() & Window(512), (4, 1), 1000, (512, 512)),
        (Causal() & Window(64), (16, 1), 0, (64, 128)),
        (Causal(), (64, 1), 0, (64, 128)),
        (Blocks(np.ones((1, 1, 4, 32), bool), (1920, 240)), (4, 4), 0, (384, 240)),
    ],
)
def test_sizes_of_tiles(monkeypatch, mask, heads, packed_rows, sizes):
    """Large ones save steps and places in the lists, one for each packed row; small ones waste less beside a window."""
    monkeypatch.undo()
    q, k = (jax.ShapeDtypeStruct((packed_rows or 1, 7680, n, 128), jnp.bfloat16) for n in heads)
    form = tpu.form(1.0, mask, q, k, k, segments=packed_rows > 0)
    assert (form.block_q, form.block_k) == sizes


def test_refusals(monkeypatch):
    def refused(mask=MASKS["causal"], **arrays):
        with pytest.raises(NotImplementedError) as error:
            attend(**arguments() | arrays, mask=mask, implementation="pallas")
        return str(error.value)

    assert "computes in float32 and bfloat16, got float16" in refused(**arguments(dtype=jnp.float16))
    assert "takes widths up to 512, got V=513" in refused(v=normal(0, 2, TIME, 2, 513))
    assert "needs a TPU" in refused()
    monkeypatch.setattr(tpu, "MAX_TILES", 5)
    assert "takes lists of 5 tiles in all, this mask has 6 of 16 × 16" in refused()
    monkeypatch.setattr(tpu, "BLOCK_BYTES", 100)
    assert "16 queries of the 2 heads of a group are too much at once" in refused()
