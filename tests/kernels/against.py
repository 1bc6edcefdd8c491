"""How the forms of an operation are held against its definition: values and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np

# Tests compile hundreds of small programs and run each once; the compiler's last optimisations only cost time here.
QUICK = {"xla_backend_optimization_level": 0}
GATES = ("none", "head", "token", "channel")


def normal(seed, *shape):
    """Drawn by numpy: JAX would compile a program for each shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def uniform(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).random(shape, np.float32))


def attention_arguments(gate, time=45, batch=2, heads=(2, 2, 4), key=8, value=12, strength=2.0):
    """Arguments with an initial state; `heads` are those of q, k and v."""
    most = max(heads)
    arrays = {
        "q": normal(0, batch, time, heads[0], key),
        "k": normal(1, batch, time, heads[1], key),
        "v": normal(2, batch, time, heads[2], value),
        "initial_state": normal(3, batch, most, key, value),
    }
    shape = {"head": (most,), "token": (batch, time, most), "channel": (batch, time, most, key)}
    if gate != "none":
        arrays["log_decay"] = strength * jax.nn.log_sigmoid(normal(4, *shape[gate]))
    return arrays


def segments():
    """[2, 45] ids: segments that end on and off the borders of chunks, one of a single token."""
    times = np.arange(45)
    return jnp.asarray([np.searchsorted(starts, times, side="right") for starts in ([7, 20], [7, 16, 44])])


def pull(op, arrays, compiler_options=QUICK):
    """Results and gradients of `op(**arrays)` for fixed random cotangents on both results, in float64 numpy."""

    def run(arrays):
        results, vjp = jax.vjp(lambda arrays: op(**arrays), arrays)
        cotangents = tuple(normal(100 + n, *x.shape).astype(x.dtype) for n, x in enumerate(results))
        return dict(zip(("out", "final_state"), results, strict=True)), vjp(cotangents)[0]

    results, gradients = jax.jit(run, compiler_options=compiler_options)(arrays)
    figures = results | {f"d_{name}": x for name, x in gradients.items()}
    return {name: np.asarray(x, np.float64) for name, x in figures.items()}


def cast(arrays, dtype):
    """The arrays in another dtype; log decays stay at least float32, as the operations take them."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return {name: x.astype(wide if name in ("log_decay", "initial_state") else dtype) for name, x in arrays.items()}


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


def assert_equal(expected, got, tolerance):
    """Largest difference at most `tolerance` of the largest value."""
    assert expected.keys() == got.keys()
    for name, wanted in expected.items():
        worst = np.max(np.abs(got[name] - wanted)) / max(np.max(np.abs(wanted)), 1e-30)
        assert worst <= tolerance, f"{name}: {worst:.2e} of the largest value, wanted at most {tolerance:.0e}"


def assert_within_rule(exact, plain, got, floor):
    """The error of `got` is at most 2× (values) or 3× (gradients) that of `plain`, plus a share of the size."""
    assert exact.keys() == plain.keys() == got.keys()
    for name, wanted in exact.items():
        allowed = (3 if name.startswith("d_") else 2) * rms(plain[name] - wanted) + floor * rms(wanted)
        error = rms(got[name] - wanted)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e} (size {rms(wanted):.2e})"
