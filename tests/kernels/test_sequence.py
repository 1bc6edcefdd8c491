"""Time split over devices: the same values and gradients as on one, and only states travel."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against import QUICK, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import sequence
from kernels.delta_rule import delta_rule
from kernels.linear_attention import linear_attention
from kernels.linear_scan import linear_scan

BATCH, TIME, HEADS, KEY, VALUE = 2, 64, 4, 8, 16

MESHES = {
    "eight of time": ((8,), ("sequence",), P(None, "sequence")),
    "two of each": ((2, 2, 2), ("data", "sequence", "tensor"), P("data", "sequence", "tensor")),
    "time whole": ((2, 4), ("data", "tensor"), P("data", None, "tensor")),
}


def mesh_and_spec(name):
    shape, names, spec = MESHES[name]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names)), spec


def gates(form):
    if form == "none":
        return None
    if form == "head":
        return -jnp.arange(HEADS) / 16.0
    shape = (BATCH, TIME, HEADS, KEY) if form == "channel" else (BATCH, TIME, HEADS)
    return jax.nn.log_sigmoid(normal(9, *shape) + 2)


def segments():
    """Starts on and off the boundaries of eight devices, one segment over several of them."""
    ids = np.zeros((BATCH, TIME), np.int32)
    for row, boundaries in enumerate([(8, 13, 50), (3, 56, 63)]):
        for boundary in boundaries:
            ids[row, boundary:] += 1
    return jnp.asarray(ids)


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def compare(whole, split, arrays, state_shape):
    """Values and gradients of every array, with cotangents on both results, agree to 1e-5 of the largest."""
    arrays = {**arrays, "initial_state": normal(7, *state_shape)}

    def pulled(op, arrays):
        results, vjp = jax.vjp(lambda arrays: op(**arrays), arrays)
        return results, vjp(tuple(normal(5 + n, *x.shape) for n, x in enumerate(results)))[0]

    expected = jax.jit(partial(pulled, whole), compiler_options=QUICK)(arrays)
    got = jax.jit(partial(pulled, split), compiler_options=QUICK)(arrays)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * float(jnp.abs(a).max())), expected, got
    )


@pytest.mark.parametrize(
    ("layout", "packed", "reverse"),
    [
        ("eight of time", True, False),
        ("eight of time", True, True),
        ("two of each", False, True),
        ("time whole", True, False),
    ],
)
def test_linear_scan(layout, packed, reverse):
    mesh, spec = mesh_and_spec(layout)
    options = {"reverse": reverse, "segment_ids": segments() if packed else None}
    arrays = {"x": normal(0, BATCH, TIME, 4, 3), "log_decay": jax.nn.log_sigmoid(normal(1, BATCH, TIME, 4, 3))}
    split = partial(sequence.linear_scan, mesh=mesh, spec=spec, **options)
    compare(partial(linear_scan, **options), split, arrays, (BATCH, 4, 3))


def test_linear_scan_with_constant_complex_decay():
    mesh, spec = mesh_and_spec("two of each")
    log_decay = -jax.nn.softplus(normal(1, 4)) + 1j * normal(2, 4)
    arrays = {"x": normal(0, BATCH, TIME, 4) + 1j * normal(3, BATCH, TIME, 4)}
    expected, expected_state = linear_scan(**arrays, log_decay=log_decay)
    got, got_state = jax.jit(partial(sequence.linear_scan, mesh=mesh, spec=spec))(**arrays, log_decay=log_decay)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(got_state, expected_state, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "gate", "causal", "packed"),
    [
        ("eight of time", "none", True, False),
        ("eight of time", "none", False, False),
        ("eight of time", "channel", True, True),
        ("eight of time", "channel", False, True),
        pytest.param("eight of time", "none", False, True, marks=pytest.mark.slow),
        pytest.param("eight of time", "channel", False, False, marks=pytest.mark.slow),
        pytest.param("eight of time", "head", True, True, marks=pytest.mark.slow),
        pytest.param("two of each", "scalar", True, False, marks=pytest.mark.slow),
        ("two of each", "scalar", False, True),
        pytest.param("time whole", "channel", True, True, marks=pytest.mark.slow),
    ],
)
def test_linear_attention(layout, gate, causal, packed):
    mesh, spec = mesh_and_spec(layout)
    options = {"causal": causal, "segment_ids": segments() if packed else None, "chunk_size": 8}
    arrays = {"q": normal(0, BATCH, TIME, HEADS, KEY), "k": normal(1, BATCH, TIME, HEADS, KEY)}
    arrays |= {"v": normal(2, BATCH, TIME, HEADS, VALUE)}
    arrays |= {} if gate == "none" else {"log_decay": gates(gate)}
    split = partial(sequence.linear_attention, mesh=mesh, spec=spec, **options)
    compare(partial(linear_attention, **options), split, arrays, (BATCH, HEADS, KEY, VALUE))


@pytest.mark.parametrize(
    ("layout", "gate", "packed"),
    [
        ("eight of time", "channel", True),
        pytest.param("eight of time", "none", False, marks=pytest.mark.slow),
        ("two of each", "scalar", True),
        pytest.param("two of each", "channel", False, marks=pytest.mark.slow),
        pytest.param("time whole", "head", True, marks=pytest.mark.slow),
    ],
)
def test_delta_rule(layout, gate, packed):
    mesh, spec = mesh_and_spec(layout)
    options = {"segment_ids": segments() if packed else None, "chunk_size": 8}
    arrays = {"q": normal(0, BATCH, TIME, HEADS, KEY), "k": unit(normal(1, BATCH, TIME, HEADS, KEY))}
    arrays |= {"v": normal(2, BATCH, TIME, HEADS, VALUE), "beta": jax.nn.sigmoid(normal(3, BATCH, TIME, HEADS))}
    arrays |= {} if gate == "none" else {"log_decay": gates(gate)}
    split = partial(sequence.delta_rule, mesh=mesh, spec=spec, **options)
    compare(partial(delta_rule, **options), split, arrays, (BATCH, HEADS, KEY, VALUE))


@pytest.mark.slow
def test_grouped_heads_stay_grouped():
    mesh, spec = mesh_and_spec("two of each")
    arrays = {"q": normal(0, BATCH, TIME, 2, KEY), "k": normal(1, BATCH, TIME, 2, KEY)}
    arrays |= {"v": normal(2, BATCH, TIME, HEADS, VALUE), "log_decay": gates("scalar")}
    split = partial(sequence.linear_attention, mesh=mesh, spec=spec)
    compare(linear_attention, split, arrays, (BATCH, HEADS, KEY, VALUE))


@pytest.mark.parametrize("op", ["linear_attention", "delta_rule"])
def test_only_states_travel(op):
    """Nothing with a time axis crosses devices: every collective is a permutation or sum of state-sized arrays."""
    mesh, spec = mesh_and_spec("eight of time")
    time = 8 * 512
    tokens = NamedSharding(mesh, P(None, "sequence"))
    array = partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=tokens)
    arrays = [array((1, time, 2, KEY)), array((1, time, 2, KEY)), array((1, time, 2, VALUE))]
    arrays += [array((1, time, 2))] if op == "delta_rule" else []

    def loss(*arrays):
        out, state = getattr(sequence, op)(*arrays, mesh=mesh, spec=spec)
        return jnp.sum(out**2) + jnp.sum(state)

    text = jax.jit(jax.grad(loss, argnums=tuple(range(len(arrays))))).lower(*arrays).compile().as_text()
    moved = re.findall(r"= (\S+) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)\(", text)
    assert any(kind == "collective-permute" for _, kind in moved)
    for shape, kind in moved:
        assert kind in ("collective-permute", "all-reduce"), (kind, shape)
        sizes = [int(n) for n in re.findall(r"\d+", shape.split("{")[0].split("[")[-1])]
        assert np.prod(sizes) <= 2 * KEY * VALUE, (kind, shape)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (P(None, "sequence"), r"x: got shape \(1, 60, 4\), cannot split 60 over 'sequence'"),
        (P(None, "time"), r"spec: got axis 'time', wanted axes of the mesh"),
        (P("data", "sequence"), r"spec: got axis 'data', wanted axes of the mesh"),
        (P(None, ("sequence", "sequence")), r"spec: got \('sequence', 'sequence'\) for time, wanted None or one"),
    ],
)
def test_bad_layouts_are_named(spec, message):
    mesh, _ = mesh_and_spec("eight of time")
    x = jnp.ones((1, 60, 4))
    with pytest.raises(ValueError, match=f"sequence.linear_scan: {message}"):
        sequence.linear_scan(x, x, mesh=mesh, spec=spec)
