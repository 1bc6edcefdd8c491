"""Attention to chosen blocks with time split over devices: values and every gradient are those of the whole."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against import QUICK, normal
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels.moba import moba
from kernels.native_sparse_attention import native_sparse_attention
from kernels.split_blocks import split_moba, split_native_sparse_attention

BATCH, TIME, HEADS, GROUPS, KEY, VALUE = 2, 128, 4, 2, 8, 12
TOKENS = P(None, "sequence")
NATIVE = {"block_size": 8, "stride": 4, "compression_block": 12, "selected_blocks": 4, "window": 6}
MOBA = {"block_size": 8, "top_k": 3}


def on_eight(op):
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Auto,))

    def split(arrays, *ids):
        local = jax.shard_map(
            lambda arrays, *ids: op(**arrays, axis="sequence", segment_ids=ids[0] if ids else None),
            mesh=mesh,
            in_specs=TOKENS,
            out_specs=TOKENS,
            check_vma=False,
        )
        return local(arrays, *ids)

    return split


def native_arrays():
    """Keys and values of its own for each branch."""
    shapes = {"q": (HEADS, KEY), "k": (GROUPS, KEY), "v": (GROUPS, VALUE)}
    arrays = {
        name: tuple(normal(3 * n + branch, BATCH, TIME, *shape) for branch in range(3))
        for n, (name, shape) in enumerate(shapes.items())
    }
    return {**arrays, "gates": jax.nn.sigmoid(normal(20, BATCH, TIME, HEADS, 3))}


def moba_arrays():
    return {
        "q": normal(0, BATCH, TIME, HEADS, KEY),
        "k": normal(1, BATCH, TIME, GROUPS, KEY),
        "v": normal(2, BATCH, TIME, GROUPS, VALUE),
    }


def segments():
    """Borders on and off those of eight devices and of blocks, a segment over several devices."""
    ids = np.zeros((BATCH, TIME), np.int32)
    for row, borders in enumerate([(16, 29, 100), (5, 112, 127)]):
        for border in borders:
            ids[row, border:] += 1
    return jnp.asarray(ids)


def pulled(op):
    def run(arrays, *ids):
        out, vjp = jax.vjp(lambda arrays: op(arrays, *ids), arrays)
        return out, vjp(normal(30, *out.shape).astype(out.dtype))[0]

    return jax.jit(run, compiler_options=QUICK)


def compare(whole, split, arrays, ids):
    def of_whole(arrays, *ids):
        return whole(**arrays, segment_ids=ids[0] if ids else None)

    expected = pulled(of_whole)(arrays, *ids)
    compiled = pulled(on_eight(split)).lower(arrays, *ids).compile()
    for theirs, ours in zip(jax.tree.leaves(expected), jax.tree.leaves(compiled(arrays, *ids)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * float(jnp.abs(theirs).max()))
    return compiled.as_text()


def weighted(weights, blocks):
    """Tokens of a block weighted by their place, so that its edges matter."""
    return jnp.einsum("bnlgf,l->bngf", blocks, weights)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_native_sparse_attention(packed):
    options = NATIVE | {"compress": partial(weighted, jnp.linspace(0.2, 1.0, 12))}
    whole, split = (partial(op, **options) for op in (native_sparse_attention, split_native_sparse_attention))
    text = compare(whole, split, native_arrays(), (segments(),) if packed else ())
    # What is gathered is 32 summaries of the tokens, one for each stride, or integers.
    gathered = [line for line in text.splitlines() if re.search(r" all-gather(-start)?\(", line)]
    assert gathered
    for line in gathered:
        assert re.search(r"= s32\[|= f32\[2,32,", line), line


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_moba(packed):
    compare(partial(moba, **MOBA), partial(split_moba, **MOBA), moba_arrays(), (segments(),) if packed else ())


def test_each_device_has_whole_blocks():
    op = partial(split_moba, block_size=32)
    with pytest.raises(ValueError, match="moba: got 16 tokens on each device of 'sequence', wanted a multiple of 32"):
        jax.eval_shape(on_eight(op), moba_arrays())
    long = NATIVE | {"compression_block": 40}
    with pytest.raises(ValueError, match=r"compress_blocks: got 16 tokens on each device, .* at least 36"):
        jax.eval_shape(on_eight(partial(split_native_sparse_attention, **long)), native_arrays())
