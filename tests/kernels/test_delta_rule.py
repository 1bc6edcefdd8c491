"""The delta rule: the XLA form against the definition, its relatives, and what must not matter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against import (
    GATES,
    QUICK,
    assert_equal,
    assert_within_rule,
    attention_arguments,
    cast,
    normal,
    pull,
    segments,
    uniform,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import triangular
from kernels.delta_rule import delta_rule, delta_rule_step
from kernels.linear_attention import linear_attention


def make(gate, time=45, batch=2, heads=(2, 2, 4, 4), **sizes):
    """As for linear attention, keys of length one and beta in (0, 2); `heads` are those of q, k, v and beta."""
    arrays = attention_arguments(gate, time, batch, heads[:3], **sizes)
    arrays["k"] /= jnp.linalg.norm(arrays["k"], axis=-1, keepdims=True)
    return arrays | {"beta": 2 * jax.nn.sigmoid(normal(5, batch, time, heads[3]))}


def run(arrays, **options):
    """Values alone, compiled as a whole, as numpy."""
    op = jax.jit(lambda arrays: delta_rule(**arrays, **options), compiler_options=QUICK)
    return jax.tree.map(np.asarray, op(arrays))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_xla_is_the_definition(gate, packed):
    options = {"segment_ids": segments() if packed else None}
    with jax.enable_x64(True):
        arrays = cast(make(gate), jnp.float64)
        expected = pull(partial(delta_rule, implementation="reference", **options), arrays)
        got = pull(partial(delta_rule, implementation="xla", chunk_size=16, **options), arrays)
    assert_equal(expected, got, 1e-12)


@pytest.mark.parametrize(
    "heads", [(4, 4, 2, 1), *(pytest.param(each, marks=pytest.mark.slow) for each in ((1, 4, 2, 4), (1, 1, 1, 1)))]
)
def test_grouped_heads(heads):
    with jax.enable_x64(True):
        arrays = cast(make("token", heads=heads), jnp.float64)
        expected = pull(partial(delta_rule, implementation="reference"), arrays)
        got = pull(partial(delta_rule, implementation="xla", chunk_size=16), arrays)
        names = ("q", "k", "v", "beta")
        repeated = {name: jnp.repeat(arrays[name], max(heads) // arrays[name].shape[2], 2) for name in names}
        alone = run(arrays | repeated)[0]
    assert_equal(expected, got, 1e-12)
    np.testing.assert_allclose(got["out"], alone, atol=1e-11)


@pytest.mark.parametrize(
    ("gate", "dtype"),
    [
        *((gate, jnp.float32) for gate in GATES),
        *(pytest.param(gate, jnp.bfloat16, marks=pytest.mark.slow) for gate in ("none", "head", "token")),
        ("channel", jnp.bfloat16),
    ],
)
def test_error_within_the_rule(gate, dtype):
    """Against float64: at most 2× (3× for gradients) the error of the definition run in the same dtype."""
    arrays, options = cast(make(gate), dtype), {"segment_ids": segments()}
    plain = pull(partial(delta_rule, implementation="reference", **options), arrays)
    got = pull(partial(delta_rule, implementation="xla", chunk_size=16, **options), arrays)
    with jax.enable_x64(True):
        wide = {name: x.astype(jnp.float64) for name, x in arrays.items()}
        exact = pull(partial(delta_rule, implementation="reference", **options), wide)
    assert_within_rule(exact, plain, got, floor=2e-7)


@pytest.mark.parametrize(
    ("gate", "lowest"),
    [
        ("token", -20.0),
        pytest.param("token", -jnp.inf, marks=pytest.mark.slow),
        pytest.param("channel", -20.0, marks=pytest.mark.slow),
        ("channel", -jnp.inf),
    ],
)
def test_strong_gates(gate, lowest):
    """Strong gates among weak ones: finite and as exact as ever, values and gradients."""
    arrays = make(gate, strength=0.01)
    strong = uniform(6, *arrays["log_decay"].shape) < 0.3
    arrays["log_decay"] = jnp.where(strong, lowest, arrays["log_decay"])
    got = pull(partial(delta_rule, implementation="xla", chunk_size=32), arrays)
    with jax.enable_x64(True):
        wide = {name: x.astype(jnp.float64) for name, x in arrays.items()}
        exact = pull(partial(delta_rule, implementation="reference"), wide)
    # The gradient of the definition at -inf is 0 · inf; what is wanted there is the limit, 0.
    exact["d_log_decay"] = np.where(np.isinf(arrays["log_decay"]), 0, exact["d_log_decay"])
    assert all(np.isfinite(x).all() for x in got.values())
    assert_equal(exact, got, 1e-5)


@pytest.mark.slow
def test_repeated_keys_are_overwritten_exactly():
    """beta = 1 and one key all along: the state holds the last value only, at any chunk length.

    The inverse by a power series fails here, its terms are binomial coefficients.
    """
    key = jnp.ones((1, 128, 1, 4)) / 2
    v = normal(0, 1, 128, 1, 3)
    out, state = delta_rule(key, key, v, jnp.ones((1, 128, 1)), scale=1.0, chunk_size=128)
    np.testing.assert_allclose(out, v, atol=1e-5)
    np.testing.assert_allclose(state[0, 0], jnp.outer(key[0, 0, 0], v[0, -1, 0]), atol=1e-5)


@pytest.mark.slow
def test_recalls_what_linear_attention_mixes_up():
    """As many orthonormal keys as the state is wide, each written twice: the delta rule recalls the second values."""
    width = 8
    keys, _ = jnp.linalg.qr(normal(0, width, width))
    k = jnp.concatenate([keys, keys])[None, :, None]
    v = normal(1, 1, 2 * width, 1, 5)
    _, state = delta_rule(k, k, v, jnp.ones((1, 2 * width, 1)))
    np.testing.assert_allclose(keys @ state[0, 0], v[0, width:, 0], atol=1e-5)
    _, added = linear_attention(k, k, v)
    np.testing.assert_allclose(keys @ added[0, 0], v[0, :width, 0] + v[0, width:, 0], atol=1e-5)


@pytest.mark.slow
def test_forms_of_the_gate_agree():
    """No gate is a gate of 0; a gate for each token is the same gate in every channel."""
    arrays = make("token", heads=(4, 4, 4, 4))
    channels = jnp.broadcast_to(arrays["log_decay"][..., None], (2, 45, 4, 8))
    assert_equal({"out": run(arrays)[0]}, {"out": run(arrays | {"log_decay": channels})[0]}, 2e-6)
    none = {name: x for name, x in arrays.items() if name != "log_decay"}
    assert_equal({"out": run(none)[0]}, {"out": run(none | {"log_decay": jnp.zeros((4,))})[0]}, 2e-6)


@pytest.mark.slow
def test_chunk_size_does_not_matter():
    arrays = make("channel", time=70)
    small, large = (pull(partial(delta_rule, chunk_size=size, implementation="xla"), arrays) for size in (8, 128))
    assert_equal(small, large, 5e-6)


@pytest.mark.parametrize("gate", [pytest.param("none", marks=pytest.mark.slow), "channel"])
def test_split_in_two_hands_the_state_over(gate):
    """Also gradients, which reach the first half through the state."""
    arrays = make(gate)

    def halves(**arrays):
        state = arrays.pop("initial_state")
        outs = []
        for time in (slice(0, 20), slice(20, None)):
            part = {name: x[:, time] for name, x in arrays.items()}
            out, state = delta_rule(**part, initial_state=state, chunk_size=16)
            outs.append(out)
        return jnp.concatenate(outs, 1), state

    assert_equal(pull(partial(delta_rule, chunk_size=16), arrays), pull(halves, arrays), 5e-6)


@pytest.mark.slow
def test_packed_equals_separate():
    arrays, ids = make("token"), segments()
    out, final = run(arrays, segment_ids=ids, chunk_size=16)
    for row in range(2):
        for segment in np.unique(ids[row]):
            inside = np.flatnonzero(np.asarray(ids[row]) == segment)
            part = {name: x[row : row + 1, inside] for name, x in arrays.items() if name != "initial_state"}
            if segment == ids[row, 0]:
                part["initial_state"] = arrays["initial_state"][row : row + 1]
            alone, state = run(part, implementation="reference")
            np.testing.assert_allclose(out[row, inside], alone[0], atol=2e-5)
        np.testing.assert_allclose(final[row], state[0], atol=2e-5)


@pytest.mark.parametrize("gate", GATES)
def test_step_by_step_equals_parallel(gate):
    arrays = make(gate, time=9)
    expected, expected_state = run(arrays, scale=0.3)
    state = arrays.pop("initial_state")
    step = jax.jit(partial(delta_rule_step, scale=0.3), compiler_options=QUICK)
    for time in range(9):
        token = {name: x if x.ndim == 1 else x[:, time] for name, x in arrays.items()}
        out, state = step(**token, state=state)
        np.testing.assert_allclose(out, expected[:, time], atol=1e-5)
    np.testing.assert_allclose(state, expected_state, atol=1e-5)


@pytest.mark.slow
def test_same_result_twice():
    op = jax.jit(jax.grad(lambda a: jnp.sum(jnp.square(delta_rule(**a, chunk_size=16)[0]))))
    arrays = make("channel")
    first, second = op(arrays), op(arrays)
    for name, x in first.items():
        np.testing.assert_array_equal(x, second[name])


@pytest.mark.slow
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    time=st.integers(1, 70),
    key=st.integers(1, 20),
    value=st.integers(1, 20),
    group=st.sampled_from([(1, 1, 1, 1), (1, 1, 3, 3), (2, 1, 2, 1)]),
    chunk=st.sampled_from([8, 16, 64]),
    gate=st.sampled_from(GATES),
)
def test_any_shape(time, key, value, group, chunk, gate):
    arrays = make(gate, time=time, batch=1, heads=group, key=key, value=value)
    got, state = run(arrays, chunk_size=chunk, implementation="xla")
    expected, expected_state = run(arrays, implementation="reference")
    assert got.shape == (1, time, max(group), value)
    np.testing.assert_allclose(got, expected, atol=2e-4)
    np.testing.assert_allclose(state, expected_state, atol=2e-4)


@pytest.mark.slow
def test_memory_is_linear_in_time():
    """Values and gradients of long recordings: at most six times inputs and outputs."""
    sizes = {}
    for time in (8192, 16384):
        like = jax.eval_shape(lambda time=time: make("channel", time, 1, (4, 4, 4, 4), key=64, value=64))
        program = jax.jit(jax.grad(lambda a: jnp.sum(delta_rule(**a, implementation="xla")[0]))).lower(like)
        memory = program.compile(QUICK).memory_analysis()
        sizes[time] = memory.temp_size_in_bytes
        assert sizes[time] <= 6 * (memory.argument_size_in_bytes + memory.output_size_in_bytes)
    assert sizes[16384] <= 2.1 * sizes[8192]


def test_triangular_solve():
    """Values and gradients against a dense solve in float64."""
    with jax.enable_x64(True):
        strict = jnp.tril(normal(0, 2, 3, 16, 16).astype(jnp.float64), -1)
        arrays = {"strict": strict, "right": normal(1, 2, 3, 16, 5).astype(jnp.float64)}

        def dense(strict, right):
            out = jnp.linalg.solve(jnp.eye(16) + jnp.tril(strict, -1), right)
            return out, out.sum()

        def ours(strict, right):
            out = triangular.solve(strict, right, jax.lax.Precision.HIGHEST)
            return out, out.sum()

        assert_equal(pull(dense, arrays), pull(ours, arrays), 1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": jnp.ones((2, 45, 4, 1))}, r"beta: got shape \(2, 45, 4, 1\), wanted \[B, T, Hb\] with B=2, T=45"),
        ({"beta": jnp.ones((2, 45, 3))}, r"beta: got 3 heads, wanted a divisor of the largest count 4"),
        ({"q": jnp.ones((2, 45, 2, 9))}, r"k: got shape \(2, 45, 2, 8\), wanted \[B, T, Hk, K\] with B=2, T=45, K=9"),
        (
            {"log_decay": jnp.ones((2, 45, 4, 12))},
            r"log_decay: got shape \(2, 45, 4, 12\), wanted \[H\], \[B, T, H\] or",
        ),
        ({"segment_ids": jnp.ones((2, 44), int)}, r"segment_ids: got shape \(2, 44\), wanted \[B, T\]"),
        ({"beta": jnp.ones((2, 45, 4), int)}, r"beta: got dtype int32, wanted a floating one"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        delta_rule(**(make("token") | change))


def test_pallas_does_not_fall_back():
    with pytest.raises(NotImplementedError, match="implementation 'pallas' needs a TPU, this process computes on cpu"):
        delta_rule(**make("token"), implementation="pallas")
