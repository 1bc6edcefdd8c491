"""Masked-patch regression against plain numpy, and on a signal that can be learned."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from electrodes import electrodes
from quick import compiled

from zoo.encoders.cbramod import TUEG
from zoo.errors import ZooError
from zoo.objectives.masked_patch import AMPLITUDE_FLOOR, CBRAMOD, MaskedPatch, huber, standardised

NAMES = ("F3", "FZ", "F4", "P3", "PZ", "P4")
PATCHES = 3
TASK = MaskedPatch(options={"depth": 1, "per_patch_norm": True}, pooled_rank=16)


def random_mask(rng: np.random.Generator, batch: int, ratio: float) -> np.ndarray:
    """[batch, C, A] with the same share of ones in every example."""
    tokens = len(NAMES) * PATCHES
    ranks = rng.permuted(np.tile(np.arange(tokens), (batch, 1)), axis=1)
    return (ranks < round(ratio * tokens)).reshape(batch, len(NAMES), PATCHES)


def make_batch(seed: int = 0, batch: int = 4, ratio: float = 0.5) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "signal": rng.standard_normal((batch, len(NAMES), PATCHES * 200)).astype(np.float32),
        "sensors": electrodes(NAMES, batch),
        "mask": random_mask(rng, batch, ratio),
    }


def initial(task: MaskedPatch, batch: dict[str, Any]) -> Any:
    return nn.meta.unbox(jax.jit(task.init)(jax.random.key(0), batch))


@jax.jit
def evaluate(variables: Any, batch: dict[str, Any]) -> Any:
    return TASK.loss(variables, batch, jax.random.key(0), train=False)


@pytest.fixture(scope="module")
def variables() -> Any:
    return initial(TASK, make_batch())


def test_loss_is_plain_means_over_patches(variables: Any) -> None:
    batch = make_batch()
    batch["mask"] = random_mask(np.random.default_rng(5), 4, 0.5)
    batch["mask"][0, :3] = False  # examples that hide unequal numbers of patches
    batch["sensors"] = batch["sensors"].replace(valid=np.array(batch["sensors"].valid))
    batch["sensors"].valid[1, 2] = False
    batch["signal"][1, 2] = np.nan
    value, metrics, collections = evaluate(variables, batch)
    predicted = jax.jit(TASK.module().apply)(variables, batch["signal"], batch["sensors"], batch["mask"])

    token: dict[str, list[float]] = {"waveform": [], "spectrum": [], "square": [], "energy": []}
    pooled = {"pooled_waveform": 0.0, "pooled_spectrum": 0.0}
    for example in range(4):
        good = np.flatnonzero(batch["sensors"].valid[example])
        signal = batch["signal"][example, good].astype(float)
        standard = dict(zip(good, (signal - signal.mean()) / signal.std(), strict=True))
        of_patch: dict[str, list[float]] = {name: [] for name in pooled}
        hidden = 0
        for channel, patch in np.ndindex(len(NAMES), PATCHES):
            if channel not in standard:
                continue
            samples = standard[channel][200 * patch : 200 * (patch + 1)]
            amplitude = np.abs(np.fft.rfft(samples - samples.mean())) / np.sqrt(200)
            target = {"waveform": samples, "spectrum": np.log(amplitude + AMPLITUDE_FLOOR)}

            def error(
                name: str, place: int = channel * PATCHES + patch, row: int = example, target: Any = target
            ) -> float:
                size = np.abs(np.asarray(predicted[name])[row, place] - target[name.removeprefix("pooled_")])
                return float(np.mean(np.where(size < 1, size**2 / 2, size - 0.5)))

            for name in pooled:
                of_patch[name].append(error(name))
            if batch["mask"][example, channel, patch]:
                hidden += 1
                for name in ("waveform", "spectrum"):
                    token[name].append(error(name))
                shown = np.asarray(predicted["waveform"])[example, channel * PATCHES + patch]
                token["square"].append(np.mean((shown - samples) ** 2))
                token["energy"].append(np.mean(samples**2))
        for name, errors in of_patch.items():
            pooled[name] += hidden * np.mean(errors)

    count = len(token["waveform"])
    expected = {name: np.mean(token[name]) for name in ("waveform", "spectrum")}
    expected |= {name: total / count for name, total in pooled.items()}
    for name, each in expected.items():
        np.testing.assert_allclose(metrics[name], each, rtol=1e-5)
    weights = {"waveform": 0.5, "spectrum": 0.2, "pooled_waveform": 1.0, "pooled_spectrum": 0.2}
    np.testing.assert_allclose(value, sum(weights[name] * expected[name] for name in weights), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["waveform_r2"], 1 - np.mean(token["square"]) / np.mean(token["energy"]), atol=1e-5
    )
    assert metrics["weight"] == count
    assert collections == {}


def test_weights_of_the_terms(variables: Any) -> None:
    batch = make_batch()
    _, metrics, _ = evaluate(variables, batch)
    weights = {"waveform": 2.0, "spectrum": 0.5, "pooled_waveform": 0.25, "pooled_spectrum": 3.0}
    task = dataclasses.replace(TASK, **{f"{name}_weight": weight for name, weight in weights.items()})
    value, _, _ = jax.jit(lambda v, b: task.loss(v, b, jax.random.key(0), train=False))(variables, batch)
    np.testing.assert_allclose(value, sum(weight * metrics[name] for name, weight in weights.items()), rtol=1e-5)


@pytest.mark.slow
def test_an_example_counts_the_same_at_any_amplitude(variables: Any) -> None:
    """What the encoder sees is fixed here; only targets could change."""
    batch = make_batch()
    louder = {**batch, "signal": 50 * batch["signal"] + 3}
    np.testing.assert_allclose(
        standardised(louder["signal"], louder["sensors"].valid)[0],
        standardised(batch["signal"], batch["sensors"].valid)[0],
        atol=1e-4,
    )


@pytest.mark.slow
def test_parts_of_a_batch_add_up_by_their_weights(variables: Any) -> None:
    """What gradient accumulation stands on: the loss is a mean over `weight` units, also of unequal parts."""
    batch = make_batch()
    batch["mask"][0, :4] = False
    halves = [jax.tree.map(lambda x, rows=rows: x[rows], batch) for rows in (slice(0, 2), slice(2, 4))]
    whole, metrics, _ = evaluate(variables, batch)
    values, parts, _ = zip(*(evaluate(variables, half) for half in halves), strict=True)
    weights = np.array([part["weight"] for part in parts])
    assert weights[0] < weights[1]
    assert weights.sum() == metrics["weight"]
    np.testing.assert_allclose(np.average(values, weights=weights), whole, rtol=1e-5)


@pytest.mark.slow
def test_targets_outside_the_mask_do_not_count(variables: Any) -> None:
    """No gradient reaches the predictions of visible patches."""
    batch = make_batch()
    module = TASK.module()

    def loss(shift: Any) -> Any:
        def shifted(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
            out = next_method(*args, **kwargs)
            return out + shift if context.module.name == "waveform" else out

        with nn.intercept_methods(shifted):
            return TASK.loss(variables, batch, jax.random.key(0), train=False)[0]

    gradient = jax.grad(loss)(jnp.zeros((4, len(NAMES) * PATCHES, module.patch)))
    touched = np.abs(gradient).max(-1) > 0
    np.testing.assert_array_equal(touched, batch["mask"].reshape(4, -1))


def test_r2_of_a_perfect_prediction_is_one(variables: Any) -> None:
    batch = make_batch()
    pattern = batch["signal"][0, 0, :200]
    pattern = (pattern - pattern.mean()) / pattern.std()
    batch["signal"] = np.tile(pattern, (4, len(NAMES), PATCHES))
    head = {"kernel": jnp.zeros_like(variables["params"]["waveform"]["kernel"]), "bias": pattern}
    _, perfect, _ = evaluate({"params": {**variables["params"], "waveform": head}}, batch)
    assert perfect["waveform"] < 1e-10
    np.testing.assert_allclose(perfect["waveform_r2"], 1, atol=1e-6)
    _, zero, _ = evaluate({"params": {**variables["params"], "waveform": {**head, "bias": 0 * pattern}}}, batch)
    np.testing.assert_allclose(zero["waveform_r2"], 0, atol=1e-6)


@pytest.mark.slow
def test_reconstruct_leaves_visible_patches_untouched(variables: Any) -> None:
    batch = make_batch()
    rebuilt = np.asarray(TASK.reconstruct(variables, batch))
    hidden = np.repeat(batch["mask"], 200, axis=-1)
    np.testing.assert_array_equal(rebuilt[~hidden], batch["signal"][~hidden])
    predicted = TASK.module().apply(variables, batch["signal"], batch["sensors"], batch["mask"])["waveform"]
    signal = batch["signal"].astype(float)
    mean, deviation = signal.mean((1, 2), keepdims=True), signal.std((1, 2), keepdims=True)
    wanted = np.reshape(predicted, rebuilt.shape) * deviation + mean
    np.testing.assert_allclose(rebuilt[hidden], wanted[hidden], atol=1e-5)


def test_without_the_pooled_term_its_head_is_left_out() -> None:
    batch = make_batch()
    task = MaskedPatch(options=TASK.options, pooled_waveform_weight=0.0, pooled_spectrum_weight=0.0)
    shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
    assert set(shapes["params"]) == {"encoder", "waveform", "spectrum"}
    _, metrics, _ = jax.eval_shape(lambda v, b: task.loss(v, b, jax.random.key(0), train=False), shapes, batch)
    assert set(metrics) == {"waveform", "spectrum", "waveform_r2", "weight"}


def test_cbramod_is_pretrained_on_samples_hidden_by_a_coin() -> None:
    whole = jax.eval_shape(MaskedPatch(**CBRAMOD).init, jax.random.key(0), cbramod_batch(19, 2))
    assert {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in whole["params"].items()} == {
        "encoder": 4_883_600,
        "waveform": 40_200,
    }  # the published 4,923,800 in all
    task = MaskedPatch(**{**CBRAMOD, "model": "cbramod_tiny", "options": {"depth": 1, "channels": 4}})
    batch = cbramod_batch(4, 8)
    batch["sensors"].valid[1, 2] = False
    variables = nn.unbox(compiled(task.init)(jax.random.key(0), batch))
    key = jax.random.key(3)
    value, metrics, _ = compiled(lambda v, b: task.loss(v, b, key, train=False))(variables, batch)
    hidden = np.asarray(task._hidden(batch, jax.random.fold_in(key, 1)))
    assert hidden.mean() == pytest.approx(0.5, abs=0.2)  # of 64: ± .06
    predicted = compiled(task.module().apply)(variables, batch["signal"], batch["sensors"], hidden)["waveform"]
    counted = hidden & batch["sensors"].valid[:, :, None]
    patches = batch["signal"].reshape(*counted.shape, 200)
    wanted = np.square(np.asarray(predicted).reshape(patches.shape) - patches)[counted].mean()
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert metrics["weight"] == counted.sum()


def cbramod_batch(channels: int, batch: int) -> dict[str, Any]:
    signal = np.random.default_rng(0).normal(size=(batch, channels, 400)).astype(np.float32)
    return {"signal": signal, "sensors": electrodes(TUEG[:channels], batch)}


def test_encoder_variables_serve_the_encoder_alone(variables: Any) -> None:
    batch = make_batch()
    encoded = TASK.encoder().apply({"params": variables["params"]["encoder"]}, batch["signal"], batch["sensors"])
    assert encoded.tokens.shape == (4, len(NAMES) * PATCHES, 100)


def test_huber() -> None:
    np.testing.assert_allclose(huber(jnp.array([-3.0, -1.0, 0.0, 0.5, 2.0])), [2.5, 0.5, 0.0, 0.125, 1.5])


def test_flops_agree_with_the_compiler() -> None:
    """One layer of the base width, so that the compiler, which counts a scan's body once, counts everything."""
    task = MaskedPatch(model="labram_base", options={"depth": 1})
    rng = np.random.default_rng(0)
    names = ("FP1", "FP2", "F7", "F3", "FZ", "F4", "F8", "T3", "C3", "CZ", "C4", "T4", "P3", "PZ", "P4", "O1", "O2")
    batch = {
        "signal": rng.standard_normal((2, len(names), 800)).astype(np.float32),
        "sensors": electrodes(names),
        "mask": np.zeros((2, len(names), 4), bool),
    }
    variables = jax.eval_shape(task.init, jax.random.key(0), batch)
    forward = jax.jit(lambda v, b: task.module().apply(v, b["signal"], b["sensors"], b["mask"]))
    counted = forward.lower(variables, batch).compile().cost_analysis()["flops"]
    assert 0.9 < task.flops(batch) / counted <= 1


def test_flops_grow_with_batch_and_depth() -> None:
    one, two = make_batch(batch=1), make_batch(batch=2)
    assert TASK.flops(two) == 2 * TASK.flops(one)
    deeper = [MaskedPatch(options={"depth": depth}).flops(one) for depth in (1, 2, 3)]
    assert deeper[2] - deeper[1] == deeper[1] - deeper[0] > 0


@pytest.mark.parametrize("call", ["init", "loss", "reconstruct"])
def test_a_batch_without_mask(variables: Any, call: str) -> None:
    batch = make_batch()
    del batch["mask"]
    calls = {
        "init": lambda: TASK.init(jax.random.key(0), batch),
        "loss": lambda: TASK.loss(variables, batch, jax.random.key(0), train=True),
        "reconstruct": lambda: TASK.reconstruct(variables, batch),
    }
    with pytest.raises(ZooError, match="mask_patch"):
        calls[call]()


def test_a_mask_of_other_patches_than_the_encoder_s(variables: Any) -> None:
    batch = make_batch()
    batch["mask"] = np.repeat(batch["mask"], 2, axis=-1)
    with pytest.raises(ZooError, match=r"mask of shape \(4, 6, 3\), got \(4, 6, 6\)"):
        TASK.loss(variables, batch, jax.random.key(0), train=True)


def test_check_sensors_asks_the_encoder() -> None:
    TASK.check_sensors(NAMES)
    with pytest.raises(ZooError, match="no electrode 'MEG0111'"):
        TASK.check_sensors((*NAMES, "MEG0111"))


@pytest.mark.slow
def test_it_learns_a_wave_that_all_channels_share() -> None:
    """A 3 Hz rhythm of random phase, one amplitude an electrode: what is hidden in one patch is seen in others.

    Its mean over examples is zero, so predicting the mean has an R² of zero.
    """
    rng = np.random.default_rng(1)
    seconds = np.arange(PATCHES * 200) / 200

    def draw(batch: int) -> dict[str, Any]:
        wave = np.sin(2 * np.pi * (3 * seconds + rng.uniform(size=(batch, 1))))
        signal = wave[:, None] * np.array([1.4, 0.7, 1.0, 1.1, 2.1, 1.7])[:, None]
        return {
            "signal": signal.astype(np.float32),
            "sensors": electrodes(NAMES, batch),
            "mask": random_mask(rng, batch, 0.5),
        }

    unseen = draw(64)
    variables = initial(TASK, unseen)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(variables: Any, state: Any, batch: Any) -> Any:
        gradient = jax.grad(lambda v: TASK.loss(v, batch, jax.random.key(0), train=True)[0])(variables)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(variables, updates), state

    before, _, _ = evaluate(variables, unseen)
    state = optimizer.init(variables)
    for _ in range(100):
        variables, state = step(variables, state, draw(16))
    after, metrics, _ = evaluate(variables, unseen)
    assert after < 0.2 * before
    assert metrics["waveform_r2"] > 0.8


def test_a_model_that_is_no_encoder_of_signals_is_refused():
    with pytest.raises(ZooError, match=r"task.model: sequence_tiny is not an encoder of signals"):
        MaskedPatch(model="sequence_tiny").encoder()
    with pytest.raises(ZooError, match=r"task.patch: got 100, labram_tiny has patches of 200 samples"):
        MaskedPatch(patch=100).encoder()
