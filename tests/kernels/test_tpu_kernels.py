"""TPU kernels of linear attention and the delta rule, interpreted on the CPU: races detected, memory poisoned."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against import assert_within_rule, cast, normal, pull, uniform
from jax.experimental.pallas import tpu as pltpu

from kernels import dispatch, tpu_chunks
from kernels.delta_rule import delta_rule
from kernels.linear_attention import linear_attention

STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
GATES = ("none", "head", "token", "channel")
HEADS = ((2, 2, 2), (1, 1, 2), (2, 2, 1), (2, 1, 2))
DTYPES = (jnp.float32, jnp.bfloat16)


@pytest.fixture(autouse=True)
def two_chunks_a_block(monkeypatch):
    """So that few tokens are several chunks in several blocks."""
    monkeypatch.setattr(tpu_chunks, "BLOCK", 32 * 256)


def make(op, gate, heads, batch=1, time=37, key=16, value=24):
    """Arguments with an initial state; `heads` are those of q, k and v."""
    most = max(heads)
    arrays = {
        "q": normal(0, batch, time, heads[0], key),
        "k": normal(1, batch, time, heads[1], key),
        "v": normal(2, batch, time, heads[2], value),
        "initial_state": normal(3, batch, most, key, value),
    }
    if op is delta_rule:
        arrays["k"] /= jnp.linalg.norm(arrays["k"], axis=-1, keepdims=True)
        arrays["beta"] = jax.nn.sigmoid(normal(4, batch, time, heads[1]))
    shape = {"head": (most,), "token": (batch, time, heads[0]), "channel": (batch, time, most, key)}
    if gate != "none":
        arrays["log_decay"] = jax.nn.log_sigmoid(normal(5, *shape[gate]))
    return arrays


def segments(packed, batch=1, time=37):
    if not packed:
        return None
    starts = jnp.isin(jnp.arange(time), jnp.array([5, 16, 21]))
    return jnp.broadcast_to(jnp.cumsum(starts), (batch, time))


def as_kernels(op, arrays, chunk_size=16, **options):
    with dispatch.interpreted(STRICT):
        return pull(partial(op, implementation="pallas", chunk_size=chunk_size, **options), arrays)


def check(op, arrays, chunk_size=16, **options):
    got = as_kernels(op, arrays, chunk_size, **options)
    plain = pull(partial(op, implementation="xla", chunk_size=chunk_size, **options), arrays)
    with jax.enable_x64(True):
        wide = {name: x.astype(jnp.float64) for name, x in arrays.items()}
        exact = pull(partial(op, implementation="reference", **options), wide)
    assert_within_rule(exact, plain, got, floor=1e-6)
    return got


@pytest.mark.parametrize(
    ("gate", "dtype", "packed", "causal", "heads"),
    [
        ("none", jnp.bfloat16, True, False, (1, 1, 2)),
        ("head", jnp.float32, True, False, (2, 1, 2)),
        ("token", jnp.bfloat16, False, True, (2, 2, 1)),
        ("channel", jnp.float32, False, False, (1, 1, 2)),
        ("channel", jnp.bfloat16, True, True, (2, 2, 2)),
    ],
)
def test_linear_attention(gate, dtype, packed, causal, heads):
    arrays = cast(make(linear_attention, gate, heads), dtype)
    check(linear_attention, arrays, causal=causal, segment_ids=segments(packed))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gate", "dtype", "packed", "causal", "heads"),
    list(itertools.product(GATES, DTYPES, (False, True), (True, False), HEADS)),
)
def test_linear_attention_everywhere(gate, dtype, packed, causal, heads):
    arrays = cast(make(linear_attention, gate, heads, batch=2), dtype)
    check(linear_attention, arrays, causal=causal, segment_ids=segments(packed, batch=2))


@pytest.mark.parametrize(
    ("gate", "dtype", "packed", "heads"),
    [
        ("none", jnp.bfloat16, False, (2, 2, 1)),
        ("head", jnp.float32, True, (2, 1, 2)),
        ("channel", jnp.float32, True, (2, 2, 2)),
        ("channel", jnp.bfloat16, False, (1, 1, 2)),
    ],
)
def test_delta_rule(gate, dtype, packed, heads):
    check(delta_rule, cast(make(delta_rule, gate, heads), dtype), segment_ids=segments(packed))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gate", "dtype", "packed", "heads"), list(itertools.product(GATES, DTYPES, (False, True), HEADS))
)
def test_delta_rule_everywhere(gate, dtype, packed, heads):
    check(delta_rule, cast(make(delta_rule, gate, heads, batch=2), dtype), segment_ids=segments(packed, batch=2))


@pytest.mark.slow
@pytest.mark.parametrize(("op", "gate"), [(linear_attention, "channel"), (delta_rule, "token")])
def test_strong_gates_and_the_same_twice(op, gate):
    """Gates of -20 and -1e4 among weak ones: nothing overflows; and every bit is the same in a second run."""
    arrays = make(op, gate, (2, 2, 2))
    draw = uniform(6, *arrays["log_decay"].shape)
    arrays["log_decay"] = jnp.where(draw < 0.1, -1e4, jnp.where(draw < 0.3, -20.0, 0.01 * arrays["log_decay"]))
    first, second = check(op, arrays), as_kernels(op, arrays)
    for name, x in first.items():
        assert np.isfinite(x).all(), name
        np.testing.assert_array_equal(x, second[name], err_msg=name)


@pytest.mark.slow
def test_repeated_keys():
    """One key over and over: the inverse of the system stays small where the powers of its matrix do not."""
    arrays = make(delta_rule, "none", (1, 1, 1))
    arrays["k"] = jnp.broadcast_to(arrays["k"][:, :1], arrays["k"].shape)
    arrays["beta"] = jnp.ones_like(arrays["beta"])
    check(delta_rule, arrays, chunk_size=32)


@pytest.mark.parametrize("op", [linear_attention, delta_rule])
def test_no_tokens(op):
    arrays = make(op, "token", (2, 2, 2), time=0)
    with dispatch.interpreted(STRICT):
        out, final = op(**arrays, implementation="pallas")
    assert out.shape == (1, 0, 2, 24)
    np.testing.assert_array_equal(final, arrays["initial_state"])


@pytest.mark.parametrize("op", [linear_attention, delta_rule])
@pytest.mark.parametrize(
    ("size", "dtype", "reason"),
    [
        ({"key": 4}, jnp.float32, "takes widths from 8 to 256, got K=4"),
        ({"value": 257}, jnp.float32, "takes widths from 8 to 256, got V=257"),
        ({}, jnp.float16, "computes in float32 and bfloat16, got float16"),
    ],
)
def test_refusals(op, size, dtype, reason):
    arrays = cast(make(op, "none", (1, 1, 1), **size), dtype)
    with pytest.raises(NotImplementedError, match=reason):
        op(**arrays, implementation="pallas")
