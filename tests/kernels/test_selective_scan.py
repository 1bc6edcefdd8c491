"""The selective scan: every form against the definition in float64, values and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels import dispatch
from kernels.selective_scan import selective_scan, selective_scan_step
from kernels.selective_scan import tpu as pallas

STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
SEQUENCES = ("u", "delta", "B", "C", "d_y")
RESULTS = ("y", "final_state", "d_u", "d_delta", "d_A", "d_B", "d_C", "d_D", "d_initial_state")


def problem(batch=2, time=20, features=6, states=3, *, packed=False, step_size=1.0, seed=0):
    """Arguments and cotangents as NumPy arrays in double precision, by name."""
    rng = np.random.default_rng(seed)
    shapes = {
        "u": (batch, time, features),
        "delta": (batch, time, features),
        "A": (features, states),
        "B": (batch, time, states),
        "C": (batch, time, states),
        "D": (features,),
        "initial_state": (batch, features, states),
        "d_y": (batch, time, features),
        "d_final": (batch, features, states),
    }
    given = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    given["delta"] = step_size * np.logaddexp(0, given["delta"])
    given["A"] = -np.exp(given["A"])
    return given, np.sort(rng.integers(0, 4, (batch, time)), 1) if packed else None


def in_dtype(given, dtype):
    """Sequences rounded to `dtype`, the rest to float32."""
    return {name: jnp.asarray(a, dtype if name in SEQUENCES else jnp.float32) for name, a in given.items()}


def evaluate(given, ids, implementation):
    """The results and all gradients, by name, as NumPy arrays of at least single precision."""
    names = ("u", "delta", "A", "B", "C", "D", "initial_state")

    @jax.jit
    def results(given):
        def scan(*arrays):
            *arrays, state = arrays
            return selective_scan(*arrays, initial_state=state, segment_ids=ids, implementation=implementation)

        outputs, pull = jax.vjp(scan, *(given[name] for name in names))
        return *outputs, *pull((given["d_y"], given["d_final"]))

    out = results({name: jnp.asarray(a) for name, a in given.items()})
    widened = (np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32))) for x in out)
    return dict(zip(RESULTS, widened, strict=True))


def in_double(given, ids, implementation):
    with jax.enable_x64(True):
        return evaluate({name: np.asarray(a, np.float64) for name, a in given.items()}, ids, implementation)


def error(got, truth):
    assert got.shape == truth.shape
    return np.sqrt(np.mean((got - truth) ** 2)) / np.sqrt(np.mean(truth**2))


def assert_no_worse(got, than, truth):
    """At most twice the error in values and three times in gradients, and a floor of one rounding of float32."""
    for name in RESULTS:
        allowed = (3 if name.startswith("d_") else 2) * error(than[name], truth[name]) + 1e-7
        assert error(got[name], truth[name]) <= allowed, name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", [1, 16, 23])
def test_xla_is_the_definition_in_float64(time, packed):
    given, ids = problem(time=time, packed=packed)
    got, wanted = in_double(given, ids, "xla"), in_double(given, ids, "reference")
    for name in RESULTS:
        assert error(got[name], wanted[name]) < 1e-13, name


def test_chunks_side_by_side_change_nothing(monkeypatch):
    given, ids = problem(time=23, packed=True)
    whole = in_double(given, ids, "xla")
    monkeypatch.setattr(dispatch, "state_elements", lambda: 1000)
    chunked = in_double(given, ids, "xla")
    for name in RESULTS:
        assert error(chunked[name], whole[name]) < 1e-13, name


@pytest.mark.parametrize(
    ("dtype", "step_size", "time"), [(jnp.float32, 0.01, 1000), (jnp.float32, 3.0, 63), (jnp.bfloat16, 0.1, 1000)]
)
def test_xla_is_as_exact_as_the_definition_in_the_same_dtype(dtype, step_size, time):
    given, ids = problem(time=time, packed=True, step_size=step_size)
    given = in_dtype(given, dtype)
    truth = in_double(given, ids, "reference")
    assert_no_worse(evaluate(given, ids, "xla"), evaluate(given, ids, "reference"), truth)


@pytest.mark.parametrize(
    ("dtype", "batch", "features", "packed", "step"),
    [
        (jnp.float32, 1, 128, True, 8),
        pytest.param(jnp.float32, 2, 256, False, 4, marks=pytest.mark.slow),
        (jnp.bfloat16, 1, 128, False, 4),
    ],
)
def test_pallas_is_as_exact_as_xla(monkeypatch, dtype, batch, features, packed, step):
    monkeypatch.setattr(pallas, "STEP", step)
    monkeypatch.setattr(pallas, "BLOCK", step)
    monkeypatch.setattr(pallas, "STATE", 8 * 128)
    given, ids = problem(batch, step + 3, features, 8, packed=packed)
    given = in_dtype(given, dtype)
    with dispatch.interpreted(STRICT):
        got = evaluate(given, ids, "pallas")
    assert_no_worse(got, evaluate(given, ids, "xla"), in_double(given, ids, "reference"))


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
def test_strong_gates_give_neither_nan_nor_overflow(monkeypatch, implementation):
    monkeypatch.setattr(pallas, "STEP", 4)
    given, _ = problem(1, 8, 128, 8)
    given["delta"] = np.array([20.0, 1e4, 1e-3, 0.0])[np.random.default_rng(1).integers(0, 4, given["delta"].shape)]
    with dispatch.interpreted(STRICT):
        got = evaluate(in_dtype(given, jnp.float32), None, implementation)
    for name, wanted in in_double(given, None, "reference").items():
        np.testing.assert_allclose(got[name], wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max(), err_msg=name)


def test_split_in_two_with_the_state_handed_over():
    given, _ = problem(time=40)
    given = in_dtype(given, jnp.float32)
    cotangents = (given.pop("d_y"), given.pop("d_final"))

    def whole(u, delta, A, B, C, D, initial_state):
        return selective_scan(u, delta, A, B, C, D, initial_state=initial_state, implementation="xla")

    def halves(u, delta, A, B, C, D, initial_state):
        first, state = whole(u[:, :13], delta[:, :13], A, B[:, :13], C[:, :13], D, initial_state)
        second, state = whole(u[:, 13:], delta[:, 13:], A, B[:, 13:], C[:, 13:], D, state)
        return jnp.concatenate([first, second], 1), state

    def results(form):
        outputs, pull = jax.vjp(form, *given.values())
        return *outputs, *pull(cotangents)

    for got, wanted in zip(jax.jit(lambda: results(halves))(), jax.jit(lambda: results(whole))(), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_packed_is_separate():
    given, _ = problem(1, 30)
    given = in_dtype(given, jnp.float32)
    sequences, A = [given[name] for name in ("u", "delta", "B", "C")], given["A"]
    ids = jnp.asarray([[7] * 11 + [2] * 19])

    def scan(u, delta, B, C, **options):
        return selective_scan(u, delta, A, B, C, **options)

    y, final_state = scan(*sequences, segment_ids=ids)
    first, second = (scan(*(x[:, part] for x in sequences)) for part in (slice(0, 11), slice(11, 30)))
    np.testing.assert_allclose(y, jnp.concatenate([first[0], second[0]], 1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(final_state, second[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
def test_step_by_step_is_parallel(skip):
    given, _ = problem(time=7)
    given = in_dtype(given, jnp.bfloat16)
    u, delta, A, B, C, D = (given[name] for name in ("u", "delta", "A", "B", "C", "D"))
    D = D if skip else None
    y, final_state = selective_scan(u, delta, A, B, C, D)
    state = jnp.zeros_like(final_state)
    for t in range(7):
        token, state = selective_scan_step(u[:, t], delta[:, t], A, B[:, t], C[:, t], state, D)
        np.testing.assert_allclose(token.astype(jnp.float32), y[:, t].astype(jnp.float32), rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(state, final_state, rtol=1e-5, atol=1e-5)
    assert (token.dtype, state.dtype) == (y.dtype, final_state.dtype) == (jnp.bfloat16, jnp.float32)


def test_same_result_twice_bit_for_bit():
    given, ids = problem(time=200, packed=True)
    first, second = (evaluate(in_dtype(given, jnp.float32), ids, "xla") for _ in range(2))
    for name in RESULTS:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.slow
@settings(max_examples=3, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.booleans())
def test_any_shape(batch, time, features, states, packed):
    given, ids = problem(batch, time, features, states, packed=packed)
    got, wanted = evaluate(in_dtype(given, jnp.float32), ids, "xla"), in_double(given, ids, "reference")
    for name in RESULTS:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-3, atol=1e-3, err_msg=name)


def test_memory_is_linear_in_time_and_below_one_array_of_all_states():
    features, states = 32, 16

    def temporary(time):
        shapes = [(1, time, features)] * 2 + [(features, states)] + [(1, time, states)] * 2
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        gradient = jax.grad(lambda *a: jnp.sum(selective_scan(*a, implementation="xla")[0] ** 2), tuple(range(5)))
        return jax.jit(gradient).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 2.2 * temporary(4096)
    assert temporary(8192) < 8192 * features * states * 4 / 2


def arguments(**changes):
    given, _ = problem()
    given = in_dtype(given, jnp.float32)
    return {name: given[name] for name in ("u", "delta", "A", "B", "C", "D")} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": jnp.ones((2, 20))}, r"selective_scan: u: got shape \(2, 20\), wanted \[B, T, D\]"),
        ({"delta": jnp.ones((2, 20, 5))}, r"selective_scan: delta: got shape \(2, 20, 5\)"),
        ({"A": jnp.ones((5, 3))}, r"selective_scan: A: got shape \(5, 3\)"),
        ({"B": jnp.ones((2, 20, 4))}, r"selective_scan: B: got shape \(2, 20, 4\)"),
        ({"C": jnp.ones((2, 19, 3))}, r"selective_scan: C: got shape \(2, 19, 3\)"),
        ({"D": jnp.ones((2, 6))}, r"selective_scan: D: got shape \(2, 6\)"),
        ({"initial_state": jnp.ones((2, 3, 6))}, r"selective_scan: initial_state: got shape \(2, 3, 6\)"),
        ({"B": jnp.ones((2, 20, 3), int)}, "selective_scan: B: got dtype int32"),
        ({"segment_ids": jnp.ones((2, 20))}, "selective_scan: segment_ids: got dtype float32"),
        ({"implementation": "cuda"}, "selective_scan: implementation: got 'cuda'"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(changes, message):
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        selective_scan(**arguments(**changes))


def test_pallas_on_a_cpu_is_refused():
    given, _ = problem(1, 4, 128, 8)
    given = in_dtype(given, jnp.float32)
    with pytest.raises(NotImplementedError, match="needs a TPU"):
        selective_scan(*(given[name] for name in ("u", "delta", "A", "B", "C")), implementation="pallas")
    with pytest.raises(NotImplementedError, match="6 features"):
        selective_scan(**arguments(), implementation="pallas")
    with pytest.raises(NotImplementedError, match="float16"):
        selective_scan(
            *(given[name].astype(jnp.float16) for name in ("u", "delta", "A", "B", "C")), implementation="pallas"
        )
