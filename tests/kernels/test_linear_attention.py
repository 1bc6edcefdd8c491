"""Linear attention: the XLA form against the definition, and what must not matter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against import GATES, QUICK, assert_equal, assert_within_rule, cast, pull, segments, uniform
from against import attention_arguments as make
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import dispatch, packing
from kernels.linear_attention import linear_attention, linear_attention_step


def run(arrays, **options):
    """Values alone, compiled as a whole, as numpy."""
    op = jax.jit(lambda arrays: linear_attention(**arrays, **options), compiler_options=QUICK)
    return jax.tree.map(np.asarray, op(arrays))


def unpack(arrays, ids, row, segment):
    """The arguments of one segment alone, with no state from before unless it is the first."""
    inside = np.flatnonzero(np.asarray(ids[row]) == segment)
    part = {
        name: x if x.ndim == 1 else x[row : row + 1] if name == "initial_state" else x[row : row + 1, inside]
        for name, x in arrays.items()
    }
    if segment != ids[row, 0]:
        part["initial_state"] = jnp.zeros_like(part["initial_state"])
    return part, inside


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_xla_is_the_definition(gate, causal, packed):
    options = {"causal": causal, "segment_ids": segments() if packed else None}
    with jax.enable_x64(True):
        arrays = cast(make(gate), jnp.float64)
        expected = pull(partial(linear_attention, implementation="reference", **options), arrays)
        got = pull(partial(linear_attention, implementation="xla", chunk_size=8, **options), arrays)
    assert_equal(expected, got, 1e-13)


@pytest.mark.slow
def test_each_compilation_is_the_definition():
    """Of a size for which XLA's CPU backend fused a reduction wrongly, in about every second compilation."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.float32(rng.standard_normal((2, 24, 2, width))) for width in (32, 32, 16))
    log_decay = -jnp.float32(rng.uniform(0, 1, q.shape))
    expected = linear_attention(q, k, v, log_decay=log_decay, implementation="reference")[0]
    for _ in range(2):
        got = jax.jit(lambda *arrays: linear_attention(*arrays[:3], log_decay=arrays[3]))(q, k, v, log_decay)[0]
        np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("heads", [(4, 4, 2), (1, 4, 2), (1, 1, 1)])
def test_grouped_heads(heads):
    with jax.enable_x64(True):
        arrays = cast(make("channel", heads=heads), jnp.float64)
        expected = pull(partial(linear_attention, implementation="reference"), arrays)
        got = pull(partial(linear_attention, implementation="xla", chunk_size=16), arrays)
        repeated = {n: jnp.repeat(x, max(heads) // x.shape[2], 2) for n, x in arrays.items() if n in ("q", "k", "v")}
        alone = run(arrays | repeated)[0]
    assert_equal(expected, got, 1e-13)
    np.testing.assert_allclose(got["out"], alone, atol=1e-12)


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
    options = {"segment_ids": segments(), "causal": gate != "channel"}
    arrays = cast(make(gate), dtype)
    plain = pull(partial(linear_attention, implementation="reference", **options), arrays)
    got = pull(partial(linear_attention, implementation="xla", chunk_size=16, **options), arrays)
    with jax.enable_x64(True):
        wide = {name: x.astype(jnp.float64) for name, x in arrays.items()}
        exact = pull(partial(linear_attention, implementation="reference", **options), wide)
    assert_within_rule(exact, plain, got, floor=1e-7)


@pytest.mark.parametrize(
    ("gate", "lowest"),
    [("token", -20.0), ("token", -jnp.inf), ("channel", -20.0), ("channel", -1e4), ("channel", -jnp.inf)],
)
def test_strong_gates(gate, lowest):
    """Strong gates among weak ones: finite and as exact as ever, values and gradients."""
    arrays = make(gate, strength=0.01)
    strong = uniform(5, *arrays["log_decay"].shape) < 0.3
    arrays["log_decay"] = jnp.where(strong, lowest, arrays["log_decay"])
    got = pull(partial(linear_attention, implementation="xla", chunk_size=32), arrays)
    with jax.enable_x64(True):
        wide = {name: x.astype(jnp.float64) for name, x in arrays.items()}
        exact = pull(partial(linear_attention, implementation="reference"), wide)
    # The gradient of the definition at -inf is 0 · inf; what is wanted there is the limit, 0.
    exact["d_log_decay"] = np.where(np.isinf(arrays["log_decay"]), 0, exact["d_log_decay"])
    assert all(np.isfinite(x).all() for x in got.values())
    assert_equal(exact, got, 1e-5)


def test_weak_gates_after_strong_ones_keep_their_digits():
    """Running sums that are subtracted would lose five digits here."""
    arrays = make("token", time=64, strength=0.0)
    arrays["log_decay"] = jnp.where(jnp.arange(64)[None, :, None] < 32, -300.0, -1e-3) * jnp.ones((2, 64, 4))
    got = run(arrays, implementation="xla")[0]
    with jax.enable_x64(True):
        exact = run({name: x.astype(jnp.float64) for name, x in arrays.items()}, implementation="reference")[0]
    assert np.max(np.abs(got - exact)) < 1e-6 * np.max(np.abs(exact))


@pytest.mark.slow
def test_chunk_size_does_not_matter():
    arrays = make("channel", time=70)
    small, large = (pull(partial(linear_attention, chunk_size=size, implementation="xla"), arrays) for size in (8, 128))
    assert_equal(small, large, 2e-6)


@pytest.mark.slow
def test_blocks_do_not_matter(monkeypatch):
    """More time than is worked on at once, with a rest: the same as in one block."""
    arrays = make("channel", time=70)
    op = partial(linear_attention, chunk_size=8, implementation="xla")
    whole = pull(op, arrays)
    monkeypatch.setattr(dispatch, "block_rows", lambda: 2 * 4 * 16)
    assert_equal(whole, pull(lambda **arrays: op(**arrays), arrays), 2e-6)


@pytest.mark.parametrize("gate", [pytest.param("head", marks=pytest.mark.slow), "channel"])
def test_split_in_two_hands_the_state_over(gate):
    """Also gradients, which reach the first half through the state."""
    arrays = make(gate)

    def halves(**arrays):
        state = arrays.pop("initial_state")
        outs = []
        for time in (slice(0, 20), slice(20, None)):
            part = {name: x if x.ndim == 1 else x[:, time] for name, x in arrays.items()}
            out, state = linear_attention(**part, initial_state=state, chunk_size=16)
            outs.append(out)
        return jnp.concatenate(outs, 1), state

    assert_equal(pull(partial(linear_attention, chunk_size=16), arrays), pull(halves, arrays), 2e-6)


@pytest.mark.parametrize(
    ("gate", "causal"), [pytest.param("none", False, marks=pytest.mark.slow), ("token", True), ("channel", False)]
)
def test_packed_equals_separate(gate, causal):
    arrays, ids = make(gate), segments()
    out, final = run(arrays, segment_ids=ids, causal=causal, chunk_size=16)
    for row in range(2):
        for segment in np.unique(ids[row]):
            part, inside = unpack(arrays, ids, row, segment)
            alone, state = run(part, causal=causal, implementation="reference")
            np.testing.assert_allclose(out[row, inside], alone[0], atol=2e-5)
        np.testing.assert_allclose(final[row], state[0], atol=2e-5)


@pytest.mark.parametrize("gate", GATES)
def test_step_by_step_equals_parallel(gate):
    arrays = make(gate, time=9)
    expected, expected_state = run(arrays, scale=0.3)
    state = arrays.pop("initial_state")
    step = jax.jit(partial(linear_attention_step, scale=0.3), compiler_options=QUICK)
    for time in range(9):
        token = {name: x if x.ndim == 1 else x[:, time] for name, x in arrays.items()}
        out, state = step(**token, state=state)
        np.testing.assert_allclose(out, expected[:, time], atol=1e-5)
    np.testing.assert_allclose(state, expected_state, atol=1e-5)


@pytest.mark.parametrize("gate", [pytest.param("head", marks=pytest.mark.slow), "channel"])
def test_bidirectional_is_both_causal_passes_less_the_own_token(gate):
    arrays = make(gate, heads=(4, 4, 4))
    both = run(arrays, causal=False, chunk_size=8)[0]
    forward = run(arrays, chunk_size=8)[0]
    state = jnp.zeros_like(arrays.pop("initial_state"))
    flipped = {name: x if x.ndim == 1 else jnp.flip(x, 1) for name, x in arrays.items()}
    backward = run(flipped | {"initial_state": state}, chunk_size=8)[0]
    own = 8**-0.5 * jnp.sum(arrays["q"] * arrays["k"], -1, keepdims=True) * arrays["v"]
    np.testing.assert_allclose(both, forward + jnp.flip(backward, 1) - own, atol=5e-5)


@pytest.mark.slow
def test_same_result_twice():
    op = jax.jit(jax.grad(lambda a: jnp.sum(jnp.square(linear_attention(**a, chunk_size=16)[0]))))
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
    group=st.sampled_from([(1, 1, 1), (1, 1, 3), (2, 1, 2), (3, 3, 1)]),
    chunk=st.sampled_from([8, 16, 64]),
    gate=st.sampled_from(GATES),
)
def test_any_shape(time, key, value, group, chunk, gate):
    arrays = make(gate, time=time, batch=1, heads=group, key=key, value=value)
    got, state = run(arrays, chunk_size=chunk, implementation="xla")
    expected, expected_state = run(arrays, implementation="reference")
    assert got.shape == (1, time, max(group), value)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    np.testing.assert_allclose(state, expected_state, atol=1e-4)


def test_dtypes_of_results():
    arrays = cast(make("token"), jnp.bfloat16)
    out, state = jax.eval_shape(lambda a: linear_attention(**a), arrays)
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    gradients = jax.eval_shape(jax.grad(lambda a: jnp.sum(linear_attention(**a)[0].astype(jnp.float32))), arrays)
    assert {n: g.dtype for n, g in gradients.items()} == {n: x.dtype for n, x in arrays.items()}


@pytest.mark.slow
def test_vmap():
    arrays = {name: jnp.stack([x, 2 * x]) for name, x in make("channel").items()}
    op = partial(linear_attention, chunk_size=16)
    mapped = pull(lambda **a: jax.vmap(lambda b: op(**b))(a), arrays)
    looped = pull(lambda **a: jax.lax.map(lambda b: op(**b), a), arrays)
    assert_equal(looped, mapped, 2e-6)


@pytest.mark.slow
def test_memory_is_linear_in_time():
    """Values and gradients of long recordings: at most six times inputs and outputs."""
    sizes = {}
    for time in (8192, 16384):
        like = jax.eval_shape(lambda time=time: make("channel", time, 1, (4, 4, 4), 64, 64))
        program = jax.jit(jax.grad(lambda a: jnp.sum(linear_attention(**a, implementation="xla")[0]))).lower(like)
        memory = program.compile(QUICK).memory_analysis()
        sizes[time] = memory.temp_size_in_bytes
        assert sizes[time] <= 6 * (memory.argument_size_in_bytes + memory.output_size_in_bytes)
    assert sizes[16384] <= 2.1 * sizes[8192]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.ones((2, 44, 2, 8))}, r"k: got shape \(2, 44, 2, 8\), wanted \[B, T, Hk, K\] with B=2, T=45, K=8"),
        ({"v": jnp.ones((2, 45, 12))}, r"v: got shape \(2, 45, 12\), wanted \[B, T, Hv, V\] with B=2, T=45"),
        ({"v": jnp.ones((2, 45, 3, 12))}, r"q: got 2 heads, wanted a divisor of the largest count 3"),
        ({"log_decay": jnp.ones((2, 45))}, r"log_decay: got shape \(2, 45\), wanted \[H\], \[B, T, H\] or"),
        (
            {"initial_state": jnp.ones((2, 4, 12, 8))},
            r"initial_state: got shape \(2, 4, 12, 8\), wanted \[B, H, K, V\]",
        ),
        ({"segment_ids": jnp.ones((2, 45))}, r"segment_ids: got dtype float32, wanted an integer one"),
        ({"q": jnp.ones((2, 45, 2, 8), jnp.int32)}, r"q: got dtype int32, wanted a floating one"),
        ({"chunk_size": 48}, r"chunk_size: got 48, wanted a power of two"),
        ({"implementation": "triton"}, r"implementation: got 'triton', wanted None or one of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(**(make("token") | change))


def test_pallas_does_not_fall_back():
    with pytest.raises(NotImplementedError, match="implementation 'pallas' needs a TPU, this process computes on cpu"):
        linear_attention(**make("token"), implementation="pallas")


def test_reset_is_exactly_zero_and_finite():
    assert jnp.exp(jnp.float32(packing.RESET)) == 0
    assert jnp.isfinite(1e6 * jnp.float32(packing.RESET))
