"""The linear scan: every form against the definition in float64, values and all gradients."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels import dispatch
from kernels.linear_scan import linear_scan, linear_scan_step
from kernels.linear_scan import tpu as pallas

STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
RESULTS = ("y", "final_state", "d_x", "d_log_decay", "d_initial_state")


@dataclass(frozen=True)
class Problem:
    """Arguments and cotangents as NumPy arrays in double precision, or rounded to what a dtype holds."""

    x: np.ndarray
    log_decay: np.ndarray
    initial_state: np.ndarray
    d_y: np.ndarray
    d_final: np.ndarray
    segment_ids: np.ndarray | None
    reverse: bool


def problem(batch=2, time=20, features=(3, 2), *, kind="real", layout="plain", reverse=False, strength=1.0, seed=0):
    """`kind`: real, complex, or x or decay alone complex. `layout`: plain, packed, or decays constant in time."""
    rng = np.random.default_rng(seed)

    def normal(shape, is_complex):
        return rng.normal(size=shape) + (1j * rng.normal(size=shape) if is_complex else 0)

    shape, state = (batch, time, *features), (batch, *features)
    log_decay = -strength * np.abs(rng.normal(size=features if layout == "constant" else shape))
    if kind in ("complex", "complex decay"):
        log_decay = log_decay + 1j * rng.normal(size=log_decay.shape)
    either = kind != "real"
    return Problem(
        normal(shape, kind in ("complex", "complex x")),
        log_decay,
        normal(state, either),
        normal(shape, either),
        normal(state, either),
        np.sort(rng.integers(0, 4, (batch, time)), 1) if layout == "packed" else None,
        reverse,
    )


def rounded(array, dtype):
    """What is left of an array in single precision, or in `dtype` where it is real; still stored as double."""
    if np.iscomplexobj(array):
        return array.astype(np.complex64).astype(np.complex128)
    return np.asarray(jnp.asarray(array, jnp.float32).astype(dtype).astype(jnp.float32), np.float64)


def in_dtype(given, dtype):
    return Problem(
        rounded(given.x, dtype),
        rounded(given.log_decay, jnp.float32),
        rounded(given.initial_state, jnp.float32),
        rounded(given.d_y, dtype),
        rounded(given.d_final, jnp.float32),
        given.segment_ids,
        given.reverse,
    )


def evaluate(given, implementation, dtype=jnp.float64):
    """The results and all gradients, named, as NumPy arrays in double precision."""

    def array(x, real):
        if np.iscomplexobj(x):
            return jnp.asarray(x, jnp.complex128 if dtype == jnp.float64 else jnp.complex64)
        return jnp.asarray(x, real)

    state_dtype = jnp.promote_types(dtype, jnp.float32)

    @jax.jit
    def results(x, log_decay, initial_state, d_y, d_final):
        def scan(x, log_decay, initial_state):
            return linear_scan(
                x,
                log_decay,
                initial_state=initial_state,
                reverse=given.reverse,
                segment_ids=given.segment_ids,
                implementation=implementation,
            )

        outputs, pull = jax.vjp(scan, x, log_decay, initial_state)
        return *outputs, *pull((d_y, d_final))

    with jax.enable_x64(dtype == jnp.float64):
        out = results(
            array(given.x, dtype),
            array(given.log_decay, state_dtype),
            array(given.initial_state, state_dtype),
            array(given.d_y, dtype),
            array(given.d_final, state_dtype),
        )
        widened = (np.asarray(x if x.dtype != jnp.bfloat16 else x.astype(jnp.float32)) for x in out)
        return dict(zip(RESULTS, widened, strict=True))


def error(got, truth):
    assert got.shape == truth.shape
    return np.sqrt(np.mean(np.abs(got - truth) ** 2)) / np.sqrt(np.mean(np.abs(truth) ** 2))


def assert_no_worse(got, than, truth):
    """At most twice the error in values and three times in gradients, and a floor of one rounding of float32."""
    for name in RESULTS:
        allowed = (3 if name.startswith("d_") else 2) * error(than[name], truth[name]) + 1e-7
        assert error(got[name], truth[name]) <= allowed, name


@pytest.mark.parametrize(
    ("layout", "reverse"), [("plain", False), ("packed", False), ("packed", True), ("constant", True)]
)
@pytest.mark.parametrize("kind", ["real", "complex", "complex x", "complex decay"])
def test_xla_is_the_definition_in_float64(kind, layout, reverse):
    given = problem(time=22, kind=kind, layout=layout, reverse=reverse)
    got, wanted = evaluate(given, "xla"), evaluate(given, "reference")
    for name in RESULTS:
        assert error(got[name], wanted[name]) < 1e-13, name


@pytest.mark.parametrize(("time", "layout", "reverse"), [(63, "packed", True), (61, "constant", False)])
def test_chunks_side_by_side_change_nothing(monkeypatch, time, layout, reverse):
    given = problem(time=time, layout=layout, reverse=reverse)
    whole = evaluate(given, "xla")
    monkeypatch.setattr(dispatch, "state_elements", lambda: 1000)
    chunked = evaluate(given, "xla")
    for name in RESULTS:
        assert error(chunked[name], whole[name]) < 1e-13, name


@pytest.mark.parametrize(
    ("dtype", "kind", "strength", "time"),
    [
        (jnp.float32, "real", 0.01, 1000),
        (jnp.float32, "real", 3.0, 63),
        (jnp.bfloat16, "real", 0.1, 1000),
        (jnp.float32, "complex", 0.1, 63),
    ],
)
def test_xla_is_as_exact_as_the_definition_in_the_same_dtype(dtype, kind, strength, time):
    given = in_dtype(problem(time=time, kind=kind, layout="packed", strength=strength), dtype)
    truth = evaluate(given, "reference")
    assert_no_worse(evaluate(given, "xla", dtype), evaluate(given, "reference", dtype), truth)


@pytest.mark.parametrize(
    ("dtype", "kind", "layout", "reverse"),
    [
        (jnp.float32, "real", "packed", False),
        pytest.param(jnp.float32, "real", "constant", True, marks=pytest.mark.slow),
        (jnp.bfloat16, "real", "plain", False),
        (jnp.float32, "complex", "packed", True),
    ],
)
def test_pallas_is_as_exact_as_xla(monkeypatch, dtype, kind, layout, reverse):
    monkeypatch.setattr(pallas, "BLOCK", 32 if kind == "complex" else 16)
    monkeypatch.setattr(pallas, "FEATURES", 256)
    given = in_dtype(problem(1, 20, (40,), kind=kind, layout=layout, reverse=reverse), dtype)
    truth, xla = evaluate(given, "reference"), evaluate(given, "xla", dtype)
    with dispatch.interpreted(STRICT):
        got = evaluate(given, "pallas", dtype)
    assert_no_worse(got, xla, truth)


def test_pallas_serves_more_features_than_a_tile_and_a_ragged_last_one(monkeypatch):
    monkeypatch.setattr(pallas, "FEATURES", 128)
    given = in_dtype(problem(2, 16, (150,)), jnp.float32)
    with dispatch.interpreted(STRICT):
        got = evaluate(given, "pallas", jnp.float32)
    assert_no_worse(got, evaluate(given, "xla", jnp.float32), evaluate(given, "reference"))


@pytest.mark.parametrize(
    ("implementation", "kind"),
    [("reference", "real"), ("reference", "complex"), ("xla", "real"), ("xla", "complex"), ("pallas", "real")],
)
def test_strong_gates_give_neither_nan_nor_overflow(implementation, kind):
    given = problem(1, 17, (32,), kind=kind)
    gates = np.array([-20.0, -1e4, -np.inf, -1e-3])[np.random.default_rng(1).integers(0, 4, given.log_decay.shape)]
    log_decay = gates + 1j * given.log_decay.imag if kind == "complex" else gates
    given = replace(given, log_decay=log_decay)
    with dispatch.interpreted(STRICT):
        got = evaluate(given, implementation, jnp.float32)
    for name, wanted in evaluate(given, "reference").items():
        np.testing.assert_allclose(got[name], wanted, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("reverse", [False, True])
def test_split_in_two_with_the_state_handed_over(reverse):
    given = in_dtype(problem(time=40, reverse=reverse), jnp.float32)
    arrays = [jnp.asarray(a, jnp.float32) for a in (given.x, given.log_decay, given.initial_state)]

    def whole(x, log_decay, state):
        return linear_scan(x, log_decay, initial_state=state, reverse=reverse, implementation="xla")

    def halves(x, log_decay, state):
        parts = [slice(0, 13), slice(13, None)]
        outputs = {}
        for part in reversed(parts) if reverse else parts:
            outputs[part.start], state = whole(x[:, part], log_decay[:, part], state)
        return jnp.concatenate([outputs[0], outputs[13]], 1), state

    cotangents = tuple(jnp.asarray(a, jnp.float32) for a in (given.d_y, given.d_final))

    @partial(jax.jit, static_argnums=0)
    def results(form, *arrays):
        outputs, pull = jax.vjp(form, *arrays)
        return *outputs, *pull(cotangents)

    for got, wanted in zip(results(halves, *arrays), results(whole, *arrays), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_is_separate(reverse):
    given = problem(1, 30, reverse=reverse)
    x, log_decay = jnp.asarray(given.x, jnp.float32), jnp.asarray(given.log_decay, jnp.float32)
    ids = jnp.asarray([[7] * 11 + [2] * 19])
    y, final_state = linear_scan(x, log_decay, segment_ids=ids, reverse=reverse)
    apart = [linear_scan(x[:, part], log_decay[:, part], reverse=reverse) for part in (slice(0, 11), slice(11, 30))]
    np.testing.assert_allclose(y, jnp.concatenate([apart[0][0], apart[1][0]], 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(final_state, apart[0 if reverse else 1][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["real", "complex decay"])
def test_step_by_step_is_parallel(kind):
    given = in_dtype(problem(time=9, kind=kind), jnp.float32)
    x, log_decay = jnp.asarray(given.x, jnp.float32), jnp.asarray(given.log_decay)
    y, final_state = linear_scan(x, log_decay)
    state = jnp.zeros_like(final_state)
    for t in range(9):
        token, state = linear_scan_step(x[:, t], log_decay[:, t], state)
        np.testing.assert_allclose(token, y[:, t], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state, final_state, rtol=1e-5, atol=1e-6)
    assert state.dtype == final_state.dtype


def test_reverse_is_flip():
    given = problem(time=30)
    x, log_decay = jnp.asarray(given.x, jnp.float32), jnp.asarray(given.log_decay, jnp.float32)
    y, final_state = linear_scan(x, log_decay, reverse=True)
    flipped, flipped_state = linear_scan(jnp.flip(x, 1), jnp.flip(log_decay, 1))
    np.testing.assert_allclose(y, jnp.flip(flipped, 1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(final_state, flipped_state, rtol=1e-6, atol=1e-6)


def test_same_result_twice_bit_for_bit():
    given = problem(time=200, layout="packed")
    first, second = (evaluate(given, "xla", jnp.float32) for _ in range(2))
    for name in RESULTS:
        np.testing.assert_array_equal(first[name], second[name])


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.lists(st.integers(1, 4), max_size=3),
    st.sampled_from(["plain", "packed", "constant"]),
    st.booleans(),
)
def test_any_shape(batch, time, features, layout, reverse):
    given = problem(batch, time, tuple(features), layout=layout, reverse=reverse)
    got, wanted = evaluate(given, "xla", jnp.float32), evaluate(given, "reference")
    for name in RESULTS:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_dtypes_of_results():
    x, log_decay = jnp.ones((1, 4, 2), jnp.bfloat16), jnp.full((2,), -1.0, jnp.bfloat16)
    y, state = linear_scan(x, log_decay)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    y, state = linear_scan(x, log_decay + 1j * jnp.ones(2))
    assert (y.dtype, state.dtype) == (jnp.complex64, jnp.complex64)


def test_memory_is_linear_in_time():
    def temporary(time):
        shape = jax.ShapeDtypeStruct((2, time, 64), jnp.float32)
        gradient = jax.jit(jax.grad(lambda x, g: jnp.sum(linear_scan(x, g, implementation="xla")[0] ** 2), (0, 1)))
        return gradient.lower(shape, shape).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 2.2 * temporary(4096)
    assert temporary(8192) < 4 * (2 * 8192 * 64 * 4)  # four times x


def arguments(**changes):
    return {"x": jnp.ones((2, 5, 3)), "log_decay": -jnp.ones((2, 5, 3)), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.ones(3)}, r"linear_scan: x: got shape \(3,\), wanted \[B, T, \*F\]"),
        ({"x": jnp.ones((2, 5, 3), int)}, "linear_scan: x: got dtype int32"),
        ({"log_decay": jnp.ones((5, 4))}, r"linear_scan: log_decay: got shape \(5, 4\)"),
        ({"log_decay": jnp.ones((1, 2, 5, 3))}, r"linear_scan: log_decay: got shape \(1, 2, 5, 3\)"),
        ({"initial_state": jnp.ones((3, 2))}, r"linear_scan: initial_state: got shape \(3, 2\), wanted \(2, 3\)"),
        ({"segment_ids": jnp.ones((2, 4), int)}, r"linear_scan: segment_ids: got shape \(2, 4\)"),
        ({"segment_ids": jnp.ones((2, 5))}, "linear_scan: segment_ids: got dtype float32"),
        ({"implementation": "cuda"}, "linear_scan: implementation: got 'cuda'"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(changes, message):
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        linear_scan(**arguments(**changes))


def test_pallas_on_a_cpu_is_refused():
    given = arguments(x=jnp.ones((1, 4, 64)), log_decay=-jnp.ones(64))
    with pytest.raises(NotImplementedError, match="needs a TPU"):
        linear_scan(**given, implementation="pallas")
    with pytest.raises(NotImplementedError, match="3 features"):
        linear_scan(**arguments(), implementation="pallas")
    with pytest.raises(NotImplementedError, match="float16"):
        linear_scan(jnp.ones((1, 4, 64), jnp.float16), -jnp.ones(64), implementation="pallas")
