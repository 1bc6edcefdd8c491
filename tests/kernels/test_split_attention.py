"""Attention with time split over devices: values and every gradient are those of the whole."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against import QUICK, normal
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels.sparse_attention import Causal, Compressed, Full, Sinks, Strided, Window, attend
from kernels.split_attention import split_attend

BATCH, TIME, HEADS, GROUPS, KEY, VALUE = 2, 64, 4, 2, 8, 12
TOKENS = P(None, "sequence")


def mesh(devices=8):
    return jax.make_mesh((devices,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def arrays(dtype=jnp.float32):
    shapes = ((HEADS, KEY), (GROUPS, KEY), (GROUPS, VALUE))
    return tuple(normal(n, BATCH, TIME, *shape).astype(dtype) for n, shape in enumerate(shapes))


def segments():
    """Borders on and off those of eight devices, a segment over several, and keys that are not there."""
    ids = np.zeros((BATCH, TIME), np.int32)
    for row, borders in enumerate([(8, 13, 50), (3, 56, 63)]):
        for border in borders:
            ids[row, border:] += 1
    keys = ids.copy()
    keys[0, 20:26], keys[1, :3] = -1, -1
    return jnp.asarray(ids), jnp.asarray(keys)


def pulled(op, arrays, ids):
    """Results and gradients of q, k and v, with cotangents on both results."""

    def run(*arrays):
        results, vjp = jax.vjp(lambda *arrays: op(*arrays, *ids), *arrays)
        out, log_normalizer = results
        d_log = jnp.where(jnp.isfinite(log_normalizer), normal(11, *log_normalizer.shape), 0)
        return results, vjp((normal(10, *out.shape).astype(out.dtype), d_log))

    return run, jax.jit(run, compiler_options=QUICK).lower(*arrays).compile()


def split(mask, devices=8, **options):
    def local(q, k, v, *ids):
        return split_attend(q, k, v, mask, axis="sequence", segment_ids=ids or None, **options)

    def op(q, k, v, *ids):
        return jax.shard_map(local, mesh=mesh(devices), in_specs=TOKENS, out_specs=TOKENS, check_vma=False)(
            q, k, v, *ids
        )

    return op


def whole(mask):
    return lambda q, k, v, *ids: attend(q, k, v, mask, segment_ids=ids or None)


def compare(mask, packed, devices=8, **options):
    given, ids = arrays(), segments() if packed else ()
    expected = pulled(whole(mask), given, ids)[1](*given)
    program = pulled(split(mask, devices, **options), given, ids)[1]
    for theirs, ours in zip(jax.tree.leaves(expected), jax.tree.leaves(program(*given)), strict=True):
        largest = float(jnp.abs(jnp.where(jnp.isfinite(theirs), theirs, 0)).max())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * largest)
    return program.as_text()


def gathers(text):
    return re.findall(r" (all-gather|all-to-all|reduce-scatter|all-reduce)(?:-start)?\(", text)


@pytest.mark.parametrize(
    ("mask", "packed"),
    [
        (Causal(), True),
        pytest.param(Causal(), False, marks=pytest.mark.slow),
        pytest.param(Full(), False, marks=pytest.mark.slow),
        pytest.param(Full(), True, marks=pytest.mark.slow),
        # Longer than a device's eight tokens: keys of two devices before, whose gradients go home.
        (Causal() & Window(12), True),
        pytest.param(Causal() & Window(20), True, marks=pytest.mark.slow),
        pytest.param(Window(21, symmetric=True), True, marks=pytest.mark.slow),
        pytest.param(Window(21, symmetric=True), False, marks=pytest.mark.slow),
        pytest.param(Compressed(7, 1), True, marks=pytest.mark.slow),
        pytest.param(Causal() & (Window(3) | Strided(5)), False, marks=pytest.mark.slow),
    ],
)
def test_ring_equals_whole(mask, packed):
    text = compare(mask, packed)
    assert "collective-permute" in text
    assert not gathers(text)


@pytest.mark.parametrize(
    ("mask", "packed"),
    [
        (Causal() & Window(6), True),
        pytest.param(Causal() & Window(9), False, marks=pytest.mark.slow),
        pytest.param(Window(9, symmetric=True), True, marks=pytest.mark.slow),
    ],
)
def test_a_short_window_asks_the_neighbours_only(mask, packed):
    text = compare(mask, packed)
    assert not gathers(text)
    # Whole stretches of eight tokens do not travel: what does are the last five of the window, or four of each side.
    moved = {int(n) for n in re.findall(r"\[2,(\d+),2,\d+\]\S* collective-permute", text)}
    assert moved == ({5} if mask == Causal() & Window(6) else {8} if mask == Causal() & Window(9) else {4})


@pytest.mark.slow
def test_a_window_goes_no_further_than_it_looks():
    text = compare(Causal() & Window(20), False)
    # Round 0 and three before it; forward, and backward with gradients, which come home in one step.
    assert len(re.findall(r" collective-permute\(", text)) <= 2 * 2 * 4 + 2 * 4 + 2


@pytest.mark.slow
def test_bfloat16_within_rounding():
    given = arrays(jnp.bfloat16)
    wanted = pulled(whole(Causal()), arrays(), ())[1](*arrays())
    rough = pulled(whole(Causal()), given, ())[1](*given)
    ours = pulled(split(Causal()), given, ())[1](*given)
    for exact, one, other in zip(*(jax.tree.leaves(x) for x in (wanted, rough, ours)), strict=True):
        errors = [float(jnp.sqrt(jnp.mean((x.astype(jnp.float32) - exact) ** 2))) for x in (one, other)]
        assert errors[1] <= 2 * errors[0]


def test_a_mask_that_tells_of_the_beginning_is_refused():
    with pytest.raises(NotImplementedError, match=r"split_attention: mask: got Either.*how far apart"):
        jax.eval_shape(split(Causal() & Window(4) | Sinks(2)), *arrays())


def test_one_device_is_the_operation():
    given = arrays()
    local = partial(split_attend, mask=Causal(), axis=None)
    assert str(jax.make_jaxpr(local)(*given)) == str(jax.make_jaxpr(partial(attend, mask=Causal()))(*given))
