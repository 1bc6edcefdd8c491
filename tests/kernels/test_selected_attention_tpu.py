"""TPU kernels of selected attention, interpreted on the CPU: races detected, memory poisoned."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against import QUICK, assert_within_rule, cast, pull
from jax.experimental.pallas import tpu as pltpu
from test_selected_attention import BLOCK, HEADS, arguments, exact, finite, lists, segments

from kernels import dispatch
from kernels.selected_attention import attend, selected_attention, stretches, tpu

TIME = 43
STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that few tokens are several stretches and tiles of a block."""
    monkeypatch.setattr(stretches, "MIN_QUERIES", 16)
    monkeypatch.setattr(tpu, "ROWS", 16)


def check(arrays, **options):
    """Within twice and three times the error of the XLA form."""
    with dispatch.interpreted(STRICT):
        got = pull(partial(finite, implementation="pallas", **options), arrays)
    plain = pull(partial(finite, implementation="xla", **options), arrays)
    assert_within_rule(exact(arrays, **options), plain, got, floor=1e-6)
    return got


def check_kernels(heads, dtype, causal, packed, batch):
    arrays = cast(arguments(*heads[:2], TIME, batch), dtype)
    blocks = lists(heads[2], TIME, batch)
    ids = segments(TIME, batch) if packed else None
    check(arrays, blocks=blocks, block_size=BLOCK, causal=causal, segment_ids=ids)


@pytest.mark.parametrize(
    ("heads", "dtype", "causal", "packed"),
    [
        ((2, 1, 2), jnp.float32, True, True),
        ((2, 1, 1), jnp.bfloat16, True, False),
        pytest.param((2, 2, 2), jnp.float32, False, True, marks=pytest.mark.slow),
    ],
)
def test_kernels(heads, dtype, causal, packed):
    check_kernels(heads, dtype, causal, packed, batch=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "dtype", "causal", "packed"),
    list(itertools.product(HEADS, (jnp.float32, jnp.bfloat16), (True, False), (True, False))),
)
def test_kernels_everywhere(heads, dtype, causal, packed):
    check_kernels(heads, dtype, causal, packed, batch=2)


@pytest.mark.slow
def test_kernels_of_tiles_as_they_are(monkeypatch):
    """With whole tiles, and blocks larger than is worked on at once."""
    monkeypatch.undo()
    monkeypatch.setattr(stretches, "MAX_BLOCK", 64)
    arrays = arguments(4, 2, 600, 1, key=64, value=32)
    check(arrays, blocks=lists(2, 600, 1, block=128), block_size=128, segment_ids=segments(600, 1))


def test_nothing_of_what_is_not_chosen():
    """NaN in blocks that no one chose spreads nowhere, a query that sees nothing gets 0; the same bits twice."""
    arrays, blocks = arguments(2, 1, TIME, 1), np.asarray(lists(1, TIME, 1)).copy()
    blocks[blocks == 1], blocks[:, 20:30] = 0, -1

    def gradients(arrays):
        (out, log_normalizer), vjp = jax.vjp(
            lambda arrays: finite(**arrays, blocks=jnp.asarray(blocks), block_size=BLOCK, implementation="pallas"),
            arrays,
        )
        return {"out": out, "log_normalizer": log_normalizer} | vjp((jnp.ones_like(out), log_normalizer))[0]

    run = jax.jit(gradients, compiler_options=QUICK)
    with dispatch.interpreted(STRICT):
        clean = jax.tree.map(np.asarray, run(arrays))
        for name in ("k", "v"):
            arrays[name] = arrays[name].at[:, BLOCK : 2 * BLOCK].set(jnp.nan)
        got = jax.tree.map(np.asarray, run(arrays))
    for name, x in clean.items():
        np.testing.assert_array_equal(x, got[name], err_msg=name)
        assert np.isfinite(x).all()
    for name in ("out", "q"):
        assert (clean[name][:, 20:30] == 0).all()
        assert clean[name][:, :20].any()
    for name in ("k", "v"):
        assert (clean[name][:, BLOCK : 2 * BLOCK] == 0).all()


def test_kernels_are_what_a_tpu_runs():
    """Of arguments in several dtypes too: forward and backward are lowered as kernels, without a TPU."""
    arrays = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arguments(2, 1, TIME, 1).items()}
    arrays["k"] = jax.ShapeDtypeStruct(arrays["k"].shape, jnp.bfloat16)
    blocks = jax.ShapeDtypeStruct((1, TIME, 1, 3), jnp.int32)

    def gradients(arrays, blocks):
        return jax.grad(lambda arrays: selected_attention(**arrays, blocks=blocks, block_size=BLOCK).sum())(arrays)

    text = jax.jit(gradients).trace(arrays, blocks).lower(lowering_platforms=("tpu",)).as_text()
    assert "selected_attention_forward" in text
    assert "selected_attention_backward" in text


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"key": 4}, {}, "takes widths from 8 to 256, got K=4 and V=12"),
        ({"value": 300}, {}, "takes widths from 8 to 256, got K=8 and V=300"),
        ({}, {"block_size": 12}, "takes blocks of a multiple of 8 tokens, got 12"),
        (
            {"time": 2**18 + 1, "key": 8, "value": 8},
            {"block_size": 8},
            "takes at most 32768 blocks of 8 tokens, got 262145",
        ),
        ({"heads": 64, "groups": 1}, {"block_size": 256}, "64 heads share blocks of 256 tokens, too many for a tile"),
        ({"heads": 65, "groups": 1}, {"block_size": 16}, "65 heads share blocks of 16 tokens, too many for a tile"),
        ({"dtype": jnp.float16}, {}, "computes in float32 or bfloat16, these arguments need float16"),
        ({}, {}, "needs a TPU"),
    ],
)
def test_refusals(change, options, reason):
    sizes = {"heads": 2, "groups": 1, "time": TIME, "batch": 1} | change
    dtype = sizes.pop("dtype", jnp.float32)
    options = {"block_size": BLOCK, "implementation": "pallas"} | options
    with pytest.raises(NotImplementedError, match=f"^attend: implementation 'pallas':? {reason}"):
        attend(**cast(arguments(**sizes), dtype), blocks=jnp.zeros((1, sizes["time"], 1, 3), int), **options)
