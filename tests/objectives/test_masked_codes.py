"""Masked-code prediction against plain numpy, with its tokenizer frozen, and on codes that can be guessed."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from electrodes import electrodes
from jax.sharding import AxisType
from patch_tokenizer import PatchTokenizer

from zoo.encoders.codes import COLLECTION
from zoo.errors import ZooError
from zoo.objectives.masked_codes import MaskedCodes, random_mask
from zoo.objectives.over_codes import code_counts, code_guesses
from zoo.registry import create
from zoo.train.config import Config, Mesh, Optimizer, Train
from zoo.train.mesh import AXES, BatchPlacer
from zoo.train.state import Program

QUICK = {"xla_backend_optimization_level": 0}
NAMES = ("F3", "FZ", "F4")
BATCH, CODES, LEVELS, PATCH, FRAMES = 16, 16, 2, 40, 5
TOKENIZER = PatchTokenizer(patch=PATCH, codes=CODES, levels=LEVELS, rate=None, kmeans=0)
OF_CODES: dict[str, Any] = {"dim": 32, "mixers": ("softmax",), "mlp": "none"}
OF_SIGNAL: dict[str, Any] = {"patch": PATCH, "conv_features": 4, "dim": 20, "depth": 1, "heads": 2}


def make_batch(seed: int = 0, size: int = 4) -> dict[str, Any]:
    """White noise; the last channel of the first example is missing."""
    rng = np.random.default_rng(seed)
    signal = rng.standard_normal((size, len(NAMES), PATCH * FRAMES)).astype(np.float32)
    sensors = electrodes(NAMES, size)
    sensors.valid[0, 2] = False
    signal[0, 2] = np.nan
    return {"signal": signal, "sensors": sensors}


def quick(function: Any) -> Any:
    return jax.jit(function, compiler_options=QUICK)


@pytest.fixture(scope="module")
def frozen() -> Any:
    batch = make_batch()
    return nn.unbox(quick(TOKENIZER.init)(jax.random.key(5), np.nan_to_num(batch["signal"]), batch["sensors"]))


@pytest.fixture(scope="module", params=["codes", "signal"])
def made(request: Any, frozen: Any) -> tuple[MaskedCodes, Any, Any]:
    """The task, its variables and its loss, compiled."""
    plain = (
        MaskedCodes(options=OF_CODES)
        if request.param == "codes"
        else MaskedCodes(model="labram_tiny", options=OF_SIGNAL)
    )
    task = plain.using(TOKENIZER, frozen)
    variables = nn.unbox(quick(task.init)(jax.random.key(0), make_batch()))
    return task, variables, quick(partial(task.loss, train=False))


def test_at_first_every_code_is_as_likely(made):
    _, variables, loss = made
    value, metrics, new = loss(variables, make_batch(), jax.random.key(1))
    assert value == pytest.approx(2 * math.log(CODES), rel=0.05)
    assert metrics["cross_entropy"] == pytest.approx(math.log(CODES), rel=0.05)
    assert metrics["of_uniform"] == pytest.approx(float(metrics["cross_entropy"]) / math.log(CODES), rel=1e-5)
    assert metrics["weight"] == round(0.5 * 10) + 3 * round(0.5 * 15)
    assert new == {}


def test_the_loss_is_a_plain_mean_over_hidden_codes(made):
    task, variables, loss = made
    batch = make_batch()
    batch["mask"] = np.random.default_rng(3).random((4, 3, FRAMES)) < 0.4
    batch["mask"][1] = False
    value, metrics, _ = loss(variables, batch, jax.random.key(1))
    signal, sensors = np.nan_to_num(batch["signal"]), batch["sensors"]
    codes = np.asarray(TOKENIZER.apply(variables[COLLECTION]["encoder"], signal, sensors, method="encode"))
    there = codes[..., 0] >= 0
    predict = quick(lambda own, given, mask: task.module().apply(own, *given, mask=mask))
    means, rights = [], []
    for side in (batch["mask"].reshape(4, -1) & there, ~batch["mask"].reshape(4, -1) & there):
        given = (codes if task.reads_codes else batch["signal"], sensors)
        options = side if task.reads_codes else side.reshape(4, 3, FRAMES)
        logits = np.asarray(predict(variables, given, options))
        nats, right = [], []
        for example, token in zip(*np.nonzero(side), strict=True):
            for book in range(LEVELS):
                own = logits[example, token, book].astype(float)
                nats.append(np.log(np.exp(own).sum()) - own[codes[example, token, book]])
                right.append(own.argmax() == codes[example, token, book])
        means.append(np.mean(nats))
        rights.append(np.mean(right))
    np.testing.assert_allclose(value, sum(means), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(rights), atol=1e-6)
    assert metrics["weight"] == (batch["mask"].reshape(4, -1) & there).sum()


def test_a_drawn_mask_is_exact_and_only_where_tokens_are():
    there = np.random.default_rng(0).random((50, 21)) < 0.8
    mask = np.asarray(random_mask(jax.random.key(0), there, 0.3))
    assert not (mask & ~there).any()
    np.testing.assert_array_equal(mask.sum(1), np.round(0.3 * there.sum(1)))
    share = mask.sum(0) / there.sum(0)
    assert share.min() > 0.05
    assert share.max() < 0.65
    assert (np.asarray(random_mask(jax.random.key(1), there, 0.3)) != mask).any()


def test_logits_made_some_at_a_time_are_all_the_same():
    rng = np.random.default_rng(0)
    sizes = (3, 5)
    tokens, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 7, 4), (4, 8)))
    bias, wanted = rng.normal(size=8).astype(np.float32), rng.integers(-1, 3, (2, 7, 2)).astype(np.int32)
    cotangent = rng.normal(size=(2, 7, 2)).astype(np.float32)

    def guessed(tokens: Any, kernel: Any, bias: Any, most: int) -> Any:
        nats, right = code_guesses(sizes, tokens, jnp.asarray(wanted), kernel, bias, most)
        return (nats * cotangent).sum(), (nats, right)

    gradient = jax.grad(guessed, (0, 1, 2), has_aux=True)
    given = [jnp.asarray(each) for each in (tokens, kernel, bias)]
    found = [quick(partial(gradient, most=most))(*given) for most in (1000, 3 * 8, 1)]
    logits = tokens @ kernel + bias
    for book, own in enumerate((logits[..., :3], logits[..., 3:])):
        code = wanted[..., book]
        plain = np.log(np.exp(own).sum(-1)) - np.take_along_axis(own, np.maximum(code, 0)[..., None], -1)[..., 0]
        for _, (nats, right) in found:
            np.testing.assert_allclose(nats[..., book], plain, rtol=1e-5)
            np.testing.assert_array_equal(right[..., book], own.argmax(-1) == code)
    for other, _ in found[1:]:
        for a, b in zip(found[0][0], other, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)


def test_a_plan_takes_the_name_of_a_tokenizer_and_a_run_does_not():
    named = MaskedCodes(tokenizer="labram_vqnsp_tiny", options=OF_CODES, stretch=400)
    with pytest.raises(ZooError, match="labram_vqnsp_tiny is not trained, wanted the folder"):
        _ = named.frozen
    planned = named.planned()
    assert planned.frozen[0].code_sizes == (256,)
    assert planned.grid(3, 2000) == (3, 10)
    batch = make_batch()
    batch["signal"] = np.zeros((4, 3, 2000), np.float32)
    variables = jax.eval_shape(planned.init, jax.random.key(0), batch)
    loss = jax.eval_shape(partial(planned.loss, train=True), nn.unbox(variables), batch, jax.random.key(0))
    assert loss[1]["weight"].shape == ()
    five = planned.frozen[0].flops(3, 400) * 4 * 5
    assert planned.flops(batch) == five + 2 * planned.model_flops(batch)
    other = MaskedCodes(tokenizer="no_such_thing")
    assert other.planned() is other


def test_without_the_complement_it_is_half(made):
    task, variables, loss = made
    one = dataclasses.replace(task, symmetric=False).using(*task.frozen)
    batch = make_batch()
    value, metrics, _ = quick(partial(one.loss, train=False))(variables, batch, jax.random.key(1))
    assert value == metrics["cross_entropy"]
    assert value < 0.6 * loss(variables, batch, jax.random.key(1))[0]


def test_the_encoder_of_a_run_takes_signals(made):
    """As `zoo.run` passes its variables: every collection's entry "encoder"."""
    task, variables, _ = made
    inner = {name: value["encoder"] for name, value in variables.items() if "encoder" in value}
    batch = make_batch()
    encoded = quick(task.encoder().apply)(inner, batch["signal"], batch["sensors"])
    assert encoded.tokens.shape == (4, 15, 32 if task.reads_codes else 20)
    assert np.isfinite(encoded.pooled).all()
    once = dataclasses.replace(task, symmetric=False).using(*task.frozen).flops(batch)
    assert task.flops(batch) - once == once - 4 * TOKENIZER.flops(3, PATCH * FRAMES) > 0


def train(frozen: Any, devices: int) -> tuple[Any, Any, list[Any]]:
    """The program's first and last state, and metrics, of three steps in the real loop's program."""
    task = MaskedCodes(options=OF_CODES).using(TOKENIZER, frozen)
    config = Config(
        task=task,
        optimizer=Optimizer(warmup_steps=1, learning_rate=0.01),
        train=Train(steps=5, accumulate=2),
        mesh=Mesh(max_replicated=1.0),
    )
    grid = np.array(jax.devices()[:devices]).reshape(1, devices, 1, 1, 1)
    mesh = jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    place = BatchPlacer(mesh, config.rules, BATCH, accumulate=2)
    batch = make_batch(size=BATCH)
    batch["sensors"].valid[:, :2] = True
    batch["mask"] = np.broadcast_to((np.arange(15) % 2 == 0).reshape(3, FRAMES), (BATCH, 3, FRAMES)).copy()
    program = Program(config, task, mesh, place.abstract(batch))
    state = program.initial()
    first, figures = jax.device_get(state), []
    with jax.set_mesh(program.mesh), program.context():
        for _ in range(3):
            state, metrics = program.train_step(state, place(batch))
            figures.append({name: float(value) for name, value in metrics.items()})
    return first, jax.device_get(state), figures


@pytest.mark.slow
def test_training_leaves_the_tokenizer_as_it_was_on_any_mesh(frozen):
    first, one, figures = train(frozen, 1)
    assert figures[-1]["loss"] < figures[0]["loss"]
    assert set(first.params) == {"encoder", "head"}
    jax.tree.map(np.testing.assert_array_equal, one.collections, {COLLECTION: {"encoder": dict(frozen)}})
    moved = jax.tree.map(lambda old, new: bool((old != new).any()), first.params, one.params)
    # Rows of the electrode table that no channel takes, and codes that do not occur, are in tables that move.
    assert all(jax.tree.leaves(moved))
    _, eight, others = train(frozen, 8)
    for ours, theirs in zip(figures, others, strict=True):
        for name in ours:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-5), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), one.params, eight.params)


@pytest.mark.slow
def test_codes_that_follow_from_their_neighbours_are_learned(frozen):
    """All channels carry one signal: what is hidden in one stands open in another, three times of four."""
    task = MaskedCodes(options={**OF_CODES, "mixers": ("softmax",) * 2, "place": "index"}).using(TOKENIZER, frozen)
    rng = np.random.default_rng(0)
    sensors = electrodes(NAMES, 32)
    wave = rng.standard_normal((200, 32, 1, PATCH * FRAMES)).astype(np.float32)
    batch = {"signal": np.repeat(wave[0], 3, axis=1), "sensors": sensors}
    variables = nn.unbox(quick(task.init)(jax.random.key(0), batch))
    rule = optax.adam(5e-3)

    @jax.jit
    def step(params: Any, moments: Any, signal: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            value, metrics, _ = task.loss({**variables, "params": params}, {**batch, "signal": signal}, key, True)
            return value, metrics

        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = rule.update(gradient, moments)
        return optax.apply_updates(params, updates), moments, metrics

    params, moments = variables["params"], rule.init(variables["params"])
    accuracy = []
    for number in range(200):
        signal = np.repeat(wave[number], 3, axis=1)
        params, moments, metrics = step(params, moments, signal, jax.random.key(number))
        accuracy.append(float(metrics["accuracy"]))
    codes = TOKENIZER.apply(frozen, batch["signal"], sensors, method="encode")
    common = (np.asarray(code_counts(codes, TOKENIZER.code_sizes)).max(1) / codes[..., 0].size).mean()
    assert np.mean(accuracy[-20:]) > common + 0.3


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (MaskedCodes(), "task.tokenizer: got nothing, wanted the folder of a run"),
        (MaskedCodes(ratio=1.0), "task.ratio: got 1.0"),
        (MaskedCodes(model="next_codes_tiny"), "next_codes_tiny is causal"),
        (MaskedCodes(model="labram_tiny"), "wanted the same grid; codes_tiny reads any tokenizer's codes"),
        (MaskedCodes(model="sequence_tiny"), "sequence_tiny is no encoder of codes or signals"),
    ],
)
def test_what_does_not_fit_is_refused(task, says, frozen):
    if "nothing" not in says:
        task = task.using(TOKENIZER, frozen)
    with pytest.raises(ZooError, match=says):
        jax.eval_shape(task.init, jax.random.key(0), make_batch())


def test_a_mask_of_other_patches_is_refused(frozen):
    task = MaskedCodes(options=OF_CODES).using(TOKENIZER, frozen)
    batch = {**make_batch(), "mask": np.zeros((4, 3, 7), bool)}
    with pytest.raises(ZooError, match=r"got a mask of \(3, 7\) patches, wanted the tokenizer's \(3, 5\) tokens"):
        jax.eval_shape(lambda: task.loss(task.kept(), batch, jax.random.key(0), False))


def test_recordings_are_checked_by_tokenizer_and_encoder(frozen):
    task = MaskedCodes().using(dataclasses.replace(TOKENIZER, rate=100.0), frozen)
    task.check_recording(100.0, ("eeg",), ("F3",))
    for given, says in (
        ((50.0, ("eeg",), ("F3",)), "got a signal at 50 Hz, wanted 100 Hz"),
        ((100.0, ("mag",), ("F3",)), "kind 'mag'"),
        ((100.0, ("eeg",), ("",)), "no electrode is called ''"),
    ):
        with pytest.raises(ZooError, match=says):
            task.check_recording(*given)


def test_positions_are_checked_where_they_are_read(frozen):
    sensors = electrodes(NAMES)
    nowhere = sensors.replace(position=np.full_like(sensors.position, np.nan))
    MaskedCodes().using(TOKENIZER, frozen).check_positions(nowhere)
    with pytest.raises(ZooError, match="got 6 channels of no known position"):
        MaskedCodes(options={"place": "position"}).using(TOKENIZER, frozen).check_positions(nowhere)


def test_rows_that_are_no_channels_are_numbered(frozen):
    class Latents(PatchTokenizer):
        CHANNEL_ROWS = False

    task = MaskedCodes().using(Latents(), frozen)
    assert task.reader().place == "index"
    with pytest.raises(ZooError, match="place 'name': the rows of Latents are not channels"):
        MaskedCodes(options={"place": "name"}).using(Latents(), frozen).reader()
    assert create("codes_tiny").place == "name"
