"""The contract of `zoo.tokenizers.tokenizer`, held by every tokenizer: small ones of each, at the shapes they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import zoo
from zoo.errors import ZooError
from zoo.sensors import KINDS, NAME_INDEX
from zoo.train.config import Mesh, Rules
from zoo.train.mesh import logical_rules, make_mesh, parameter_shardings
from zoo.types import Sensors

NAMES = ("FP1", "FP2", "F3", "F4", "C3", "C4", "O1", "O2")
QUICK = {"xla_backend_optimization_level": 0}
"""Compilation takes longer than these small programs run."""


@dataclass(frozen=True)
class Case:
    """A small tokenizer: its registered name and options, what it is given, and what is published of its size.

    channels, samples  of its windows
    kind               of its channels
    wrong_windows      samples of windows it must refuse, and what the refusal says
    still              parameters that no gradient moves: the bias of keys, which a softmax over them does not see
    rounding           by which sums in another order may differ, as a share of the largest
    """

    name: str
    channels: int
    samples: int
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "eeg"
    wrong_windows: tuple[tuple[int, str], ...] = ()
    still: tuple[str, ...] = ()
    rounding: float = 2e-4


CASES = (
    Case(
        "neurorvq_tiny",
        3,
        80,
        {"codes": 16, "code_dim": 8, "patch": 40, "conv_features": 8, "dim": 40, "heads": 2, "mlp_ratio": 1}
        # A code that is one of these few vectors, by k-means or restart, leaves nothing but rounding to the next level.
        | {"levels": 2, "max_patches": 4, "kmeans": 0, "restart_below": 0.0},
        wrong_windows=((60, "60 samples, wanted 1 to 4 patches of 40"), (200, "200 samples")),
    ),
    Case(
        "labram_vqnsp_tiny",
        3,
        80,
        {"codes": 16, "code_dim": 8, "patch": 40, "conv_features": 8, "dim": 40, "heads": 2, "mlp_ratio": 1},
        wrong_windows=((60, "60 samples, wanted 1 to 16 patches of 40"), (680, "680 samples")),
    ),
    Case("mu_law", 3, 40, {"vocabulary": 16}, wrong_windows=((0, "window of 0 samples"),)),
    Case("quantile", 3, 40, {"vocabulary": 12}, wrong_windows=((0, "window of 0 samples"),)),
    Case(
        "braintokenizer_tiny",
        5,
        64,
        {"window": 32, "filters": 4, "ratios": (4,), "dim": 32, "heads": 2, "latents": 4} | {"codes": 40, "levels": 2},
        kind="grad",
        wrong_windows=((31, "31 samples, wanted a multiple of 32"), (40, "40 samples, wanted a multiple of 32")),
        # Rotations to codes lengthen gradients, and their rounding, up to tenfold.
        rounding=5e-4,
        still=("['to_key']['bias']", "['from_key']['bias']"),
    ),
    Case(
        "du_in_tiny",
        3,
        40,
        {"conv_width": 8, "filters": 4, "heads": 2, "head_width": 8, "codes": 8, "code_dim": 8, "channels": 4},
        kind="seeg",
        wrong_windows=((45, "window of 45 samples, wanted a multiple of 10"), (0, "window of 0 samples")),
        # Batch norm takes the biases before it away again.
        still=(
            *(f"['embed']['conv_{layer}']['bias']" for layer in (1, 2, 3)),
            *(f"['{half}']['blocks']['key_norm']['bias']" for half in ("encoder", "decoder")),
        ),
    ),
    Case(
        "tfm_tiny",
        3,
        60,
        {"dim": 16, "heads": 2, "window": 20, "hop": 10, "bins": 8, "band": 2, "codes": 16, "iterations": 4},
        wrong_windows=((10, "window of 10 samples, wanted 20 or more by steps of 10"), (65, "65 samples")),
    ),
    Case(
        "dewave_word_tiny",
        3,
        8,
        {"channels": 3, "bands": 2, "dim": 16, "heads": 2, "hidden": 16, "codes": 8, "depth": 1},
        wrong_windows=((7, "window of 7 samples, wanted a multiple of 2"),),
    ),
    Case(
        "dewave_raw_tiny",
        3,
        40,
        {"channels": 3, "dim": 16, "heads": 2, "hidden": 16, "codes": 8, "depth": 1, "kernel": 3}
        | {"kernels": (6, 3), "strides": (4, 2)},
        wrong_windows=((36, "window of 36 samples, wanted a multiple of 8"), (0, "window of 0 samples")),
    ),
    Case(
        "ephys_tokenizer_tiny",
        3,
        40,
        {"vocabulary": 16, "units": 16},
        wrong_windows=((9, "window of 9 samples, wanted at least 10"),),
    ),
)


SLOW = (
    "neurorvq_tiny",
    "tfm_tiny",
    "du_in_tiny",
    "ephys_tokenizer_tiny",
    "dewave_word_tiny",
    "dewave_raw_tiny",
    "quantile",
)
"""Cases that the default run leaves to `-m slow`."""
# A case's tests share what was compiled, so they stay on one worker.
GROUPED = [
    pytest.param(
        case, id=case.name, marks=[pytest.mark.xdist_group(case.name), *[pytest.mark.slow] * (case.name in SLOW)]
    )
    for case in CASES
]


@pytest.fixture(params=GROUPED, scope="module")
def case(request: Any) -> Case:
    return request.param


@pytest.fixture(scope="module")
def made(case: Case) -> tuple[Any, Any, Any]:
    """The tokenizer, its variables after one step of training (so that codebooks are set), and a batch of eight."""
    tokenizer = Programs(zoo.create(case.name, **case.options))
    signal, sensors = batch(case, 8)
    keys = {"params": jax.random.key(0), "codes": jax.random.key(1), "noise": jax.random.key(2)}
    init = jax.jit(lambda signal, sensors: tokenizer.init(keys, signal, sensors), compiler_options=QUICK)
    variables = init(signal, sensors)
    return tokenizer, {**variables, **tokenizer.step(variables, signal, sensors)[2]}, (signal, sensors)


def batch(case: Case, size: int, seed: int = 0) -> tuple[np.ndarray, Sensors]:
    """Waves in noise, and sensors at places of their own; the last channel of the last example is missing."""
    rng = np.random.default_rng(seed)
    time = np.arange(case.samples)
    waves = np.sin(2 * np.pi * (time * rng.uniform(0.005, 0.2, (size, case.channels, 1)) + rng.uniform(size=1)))
    signal = (waves + 0.3 * rng.normal(size=waves.shape)).astype(np.float32)
    position = rng.normal(size=(size, case.channels, 3))
    position *= 0.09 / np.linalg.norm(position, axis=-1, keepdims=True)
    orientation = position / 0.09 if case.kind in ("mag", "grad") else np.full_like(position, np.nan)
    valid = np.ones((size, case.channels), bool)
    valid[-1, -1] = case.channels == 1
    name = [NAME_INDEX[each] if case.kind == "eeg" else -1 for each in NAMES[: case.channels]]
    sensors = Sensors(
        position=position.astype(np.float32),
        orientation=orientation.astype(np.float32),
        kind=np.full((size, case.channels), KINDS.index(case.kind), np.int32),
        name=np.broadcast_to(np.array(name, np.int32), (size, case.channels)),
        valid=valid,
    )
    return signal, sensors


class Programs:
    """A tokenizer with its programs, each compiled once for the shapes it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.run = jax.jit(self._run, static_argnames="method", compiler_options=QUICK)
        self.learn = jax.jit(jax.value_and_grad(self._loss, has_aux=True), compiler_options=QUICK)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def call(self, variables: Any, *given: Any, method: str = "__call__") -> Any:
        return self.run(variables, *given, method=method)

    def step(self, variables: Any, signal: Any, sensors: Any) -> tuple[Any, Any, Any]:
        """(loss, gradients of the parameters, new collections) of a training step."""
        collections = {name: value for name, value in variables.items() if name != "params"}
        (value, new), grads = self.learn(variables.get("params", {}), collections, signal, sensors)
        return value, grads, new

    def _run(self, variables: Any, *given: Any, method: str) -> Any:
        return self.tokenizer.apply(variables, *given, method=method)

    def _loss(self, params: Any, collections: Any, signal: Any, sensors: Any) -> Any:
        out, new = self.tokenizer.apply(
            {"params": params, **collections},
            signal,
            sensors,
            train=True,
            mutable=list(collections),
            rngs={name: jax.random.key(7) for name in ("codes", "dropout", "noise")},
        )
        assert set(out.losses) == set(self.tokenizer.loss_weights)
        return sum(weight * out.losses[name] for name, weight in self.tokenizer.loss_weights.items()), new


def test_codes_lie_on_the_grid_within_their_books(case, made):
    tokenizer, variables, (signal, sensors) = made
    out = tokenizer.call(variables, signal, sensors)
    rows, frames = tokenizer.grid(case.channels, case.samples)
    codes = np.asarray(out.codes)
    assert codes.shape == (8, rows * frames, len(tokenizer.code_sizes))
    assert codes.dtype == np.int32
    assert out.valid.shape == out.quantized.shape[:2] == codes.shape[:2]
    tokenizer.check_codes(codes, case.channels)
    np.testing.assert_array_equal((codes >= 0).all(-1), out.valid)
    np.testing.assert_array_equal((codes >= 0).any(-1), out.valid)
    if tokenizer.CHANNEL_ROWS:
        np.testing.assert_array_equal(out.valid, np.repeat(sensors.valid, frames, axis=1))


def test_encode_and_decode_are_the_halves_of_the_call(case, made):
    tokenizer, variables, (signal, sensors) = made
    out = tokenizer.call(variables, signal, sensors)
    np.testing.assert_array_equal(tokenizer.call(variables, signal, sensors, method="encode"), out.codes)
    scale = tokenizer.scale(signal, sensors)
    decoded = tokenizer.call(variables, out.codes, sensors, scale, method="decode")
    np.testing.assert_allclose(decoded, out.reconstruction, rtol=1e-4, atol=1e-4)
    assert decoded.shape == signal.shape
    assert not np.asarray(decoded)[~sensors.valid].any()


def test_codes_do_not_depend_on_the_batch(case, made):
    tokenizer, variables, (signal, sensors) = made
    whole = tokenizer.call(variables, signal, sensors, method="encode")
    for row in (0, 7):
        alone = tokenizer.call(variables, signal[row : row + 1], take(sensors, row), method="encode")
        np.testing.assert_array_equal(alone[0], whole[row])


def test_what_is_missing_is_not_read(case, made):
    tokenizer, variables, (signal, sensors) = made
    spoiled = np.where(sensors.valid[:, :, None], signal, 1e4).astype(np.float32)
    a, b = (tokenizer.call(variables, given, sensors) for given in (signal, spoiled))
    np.testing.assert_array_equal(a.codes, b.codes)
    for name in a.losses:
        np.testing.assert_allclose(a.losses[name], b.losses[name], rtol=1e-5)


def test_channels_are_alone_where_it_says_so(case, made):
    tokenizer, variables, (signal, sensors) = made
    if not tokenizer.SINGLE_CHANNEL:
        pytest.skip(f"{case.name} reads all channels together")
    other = signal.copy()
    other[:, 1:] = np.random.default_rng(5).normal(size=other[:, 1:].shape)
    _, frames = tokenizer.grid(case.channels, case.samples)
    a, b = (tokenizer.call(variables, given, sensors, method="encode")[:, :frames] for given in (signal, other))
    np.testing.assert_array_equal(a, b)


def test_channels_may_come_in_any_order_where_it_says_so(case, made):
    tokenizer, variables, (signal, sensors) = made
    if not tokenizer.ORDER_FREE:
        pytest.skip(f"{case.name} wants its channels in one order")
    order = np.random.default_rng(3).permutation(case.channels)
    moved = jax.tree.map(lambda leaf: leaf[:, order], sensors)
    codes = np.asarray(tokenizer.call(variables, signal, sensors, method="encode"))
    after = np.asarray(tokenizer.call(variables, signal[:, order], moved, method="encode"))
    if tokenizer.CHANNEL_ROWS:
        codes = codes.reshape(8, case.channels, -1)[:, order].reshape(codes.shape)
    np.testing.assert_array_equal(after, codes)


def test_every_parameter_learns(case, made):
    tokenizer, variables, (signal, sensors) = made
    value, grads, _ = tokenizer.step(variables, signal, sensors)
    assert np.isfinite(value)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
    for name, leaf in leaves.items():
        assert np.isfinite(leaf).all(), name
        assert np.abs(leaf).max() > 0 or name.startswith(case.still), name


def test_training_on_eight_devices_is_training_on_one(case, made):
    tokenizer, variables, _ = made
    # Not the batch that codes may have been taken from: what they leave of it is rounding, in another order.
    signal, sensors = batch(case, 8, seed=1)
    one = tokenizer.step(variables, signal, sensors)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        whole = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
        eight = tokenizer.step(whole, *jax.device_put((signal, sensors), split))
    for path, leaf in jax.tree_util.tree_leaves_with_path(one):
        other = dict(jax.tree_util.tree_leaves_with_path(eight))[path]
        # A gradient that is zero but for rounding rounds in another order.
        least = 1e-2 if jax.tree_util.keystr(path[1:]).startswith(case.still) else 1e-3
        scale = max(np.abs(np.asarray(leaf, np.float32)).max(), least)
        np.testing.assert_allclose(
            np.asarray(other, np.float32), leaf, atol=case.rounding * scale, err_msg=jax.tree_util.keystr(path)
        )


def test_the_training_loop_can_lay_it_out(case, made):
    tokenizer, _, given = made
    mesh, rules = make_mesh(Mesh(data=2, fsdp=2, tensor=2)), Rules()
    keys = {"params": jax.random.key(0), "codes": jax.random.key(1)}
    with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules(rules)):
        variables = jax.eval_shape(tokenizer.init, keys, *given)
    shardings = parameter_shardings(variables, rules, mesh)
    parameters = jax.tree.leaves(shardings.get("params", {}))
    assert not parameters or not all(each.is_fully_replicated for each in parameters)


def test_what_it_cannot_take_is_refused(case, made):
    tokenizer = made[0]
    kind = next((each for each in KINDS if each not in tokenizer.TAKES), None)
    if kind:
        with pytest.raises(ZooError, match=f"kind '{kind}'"):
            tokenizer.check_recording(tokenizer.sampling_rate or 200.0, (kind,), ("",))
    if tokenizer.sampling_rate:
        with pytest.raises(ZooError, match=f"got a signal at 77 Hz, wanted {tokenizer.sampling_rate:g} Hz"):
            tokenizer.check_recording(77.0, (case.kind,), NAMES[:1])
    for samples, says in case.wrong_windows:
        with pytest.raises(ZooError, match=says):
            tokenizer.grid(case.channels, samples)
    rows, frames = tokenizer.grid(case.channels, case.samples)
    codes = np.zeros((1, rows * frames, len(tokenizer.code_sizes)), np.int32)
    tokenizer.check_codes(codes)
    codes[0, 0, -1] = tokenizer.code_sizes[-1]
    with pytest.raises(ZooError, match=f"got code {tokenizer.code_sizes[-1]} of codebook"):
        tokenizer.check_codes(codes)
    with pytest.raises(ZooError, match="wanted integers"):
        tokenizer.check_codes(codes[..., 0])


def take(sensors: Sensors, row: int) -> Sensors:
    return jax.tree.map(lambda leaf: leaf[row : row + 1], sensors)
