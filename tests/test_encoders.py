"""The contract of `zoo.encoders.encoder`, held by every encoder: small ones of each, at the shapes they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
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
OTHERS = ("FZ", "CZ", "PZ", "OZ", "T7", "T8", "P7", "P8")
QUICK = {"xla_backend_optimization_level": 0}
"""Compilation takes longer than these small programs run."""


@dataclass(frozen=True)
class Case:
    """A small encoder: its registered name and options, and what it is given.

    channels, samples  of its windows
    kind               of its channels
    patch              samples of the patches that a mask [B, C, A] hides; 0: the encoder hides nothing in this test
    wrong_windows      samples of windows it must refuse, and what the refusal says
    still              parameters that no gradient moves here, each with its reason beside it in CASES
    rounding           by which sums in another order may differ, as a share of the largest
    """

    name: str
    channels: int
    samples: int
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "eeg"
    patch: int = 0
    wrong_windows: tuple[tuple[int, str], ...] = ()
    still: tuple[str, ...] = ()
    rounding: float = 2e-4


CASES = (
    Case(
        "labram_tiny",
        3,
        80,
        {"patch": 40, "conv_features": 4, "dim": 20, "heads": 2, "mlp_ratio": 1, "depth": 2},
        patch=40,
        wrong_windows=((60, "1 to 16 patches of 40 samples, got 60 samples"),),
    ),
    Case(
        "biot_tiny",
        3,
        130,
        {"channels": (*NAMES[:3], *OTHERS[:3]), "window": 40, "hop": 20, "dim": 16, "heads": 2},
        wrong_windows=((30, "1 to 1000 frames of 40 samples every 20, got 30 samples"),),
    ),
    Case(
        "cbramod_tiny",
        3,
        80,
        {"channels": NAMES[:3], "depth": 2, "heads": 4, "conv_features": 10, "patch": 40},
        patch=40,
        wrong_windows=((60, "1 or more patches of 40 samples, got 60 samples"),),
    ),
    Case(
        "eegpt_tiny",
        3,
        48,
        {"dim": 16, "heads": 2, "patch": 16, "stride": 16},
        patch=16,
        wrong_windows=((40, "1 or more patches of 16 samples, got 40 samples"),),
    ),
    Case(
        "neurobolt_tiny",
        3,
        160,
        {
            "channels": (*NAMES[:3], *OTHERS[:3]),
            "samples": 160,
            "labram": {"patch": 40, "conv_features": 4, "dim": 20, "heads": 2, "mlp_ratio": 1, "depth": 1},
            "window": 20,
            "scales": 2,
            "heads": 2,
        },
        wrong_windows=((80, "windows of 160 samples, got 80"),),
    ),
    Case(
        "reve_mini",
        3,
        80,
        {"dim": 16, "patch": 40, "hop": 40},
        patch=40,
        wrong_windows=((30, "patches of 40 samples, got 30 samples"),),
    ),
    Case(
        "rbtransformer_tiny",
        4,
        80,
        {"channels": NAMES[:4], "rate": 200.0, "dim": 16, "depth": 2, "heads": 2, "width": 16, "hidden": 16},
        wrong_windows=((10, "has no frequency in it"),),
    ),
    # Untrained codes are one code for all; fixed levels differ.
    Case("tfm_encoder_tiny", 3, 30, {"channels": NAMES[:3], "tokenizer": "mu_law"}),
    Case("artifactgen_tiny", 4, 80, {"channels": NAMES[:4], "width": 8}),
    Case(
        "artifactgen_unet_tiny",
        4,
        32,
        {"channels": NAMES[:4], "width": 8, "groups": 2, "condition": 8},
        wrong_windows=((30, "a multiple of 4 samples, got 30"),),
    ),
    Case(
        "du_in_encoder_tiny",
        3,
        40,
        {"channels": 3, "latents": 4, "depth": 1, "patches": 4, "subjects": 2},
        kind="seeg",
        # Batch norm takes these biases away, and softmax that of the keys: their gradients are rounding.
        still=(
            *(f"['embed']['conv_{layer}']['bias']" for layer in (1, 2, 3)),
            "['encoder']['blocks']['key_norm']['bias']",
        ),
        rounding=2e-3,
        wrong_windows=((50, "wants 4 patches of 10 samples, got 50 samples"),),
    ),
    Case(
        "eegnet_tiny",
        4,
        32,
        {"channels": NAMES[:4], "samples": 32, "pools": (2, 4)},
        wrong_windows=((40, "got windows of 40 samples, wanted 32"),),
    ),
    Case("shallow_tiny", 4, 32, {"channels": NAMES[:4], "samples": 32}),
    Case("deep4_tiny", 4, 64, {"channels": NAMES[:4]}),
    Case("eeg_conformer_tiny", 4, 40, {"channels": NAMES[:4], "samples": 40}),
    Case(
        "eeg_vae_tiny",
        4,
        32,
        {"channels": NAMES[:4], "samples": 32, "widths": (8, 8), "hidden": 8, "latents": 4},
        wrong_windows=((40, "wants windows of 32 samples, a multiple of 4, got 40"),),
    ),
    Case(
        "simple_conv_tiny",
        4,
        12,
        {"virtual": 6, "frequencies": 2, "mixed": 6, "width": 8, "depth": 2, "outputs": 5, "subjects": 2},
    ),
    Case(
        "meg_image_tiny",
        4,
        12,
        {"virtual": 6, "frequencies": 2, "mixed": 6, "width": 8, "depth": 2, "outputs": 5, "samples": 12},
        kind="mag",
        wrong_windows=((11, "got a window of 11 samples, wanted 12"),),
    ),
    Case(
        "neurobridge_intra_tiny",
        4,
        10,
        {"channels": NAMES[:4], "samples": 10, "dim": 8},
        wrong_windows=((11, "got a window of 11 samples, wanted 10"),),
    ),
    Case(
        "neurobridge_inter_tiny",
        4,
        80,
        {"channels": NAMES[:4], "samples": 80, "dim": 8, "filters": 4},
        # Batch norm takes biases away: their gradients are rounding.
        rounding=2e-3,
        wrong_windows=((90, "got a window of 90 samples, wanted 80"),),
    ),
    Case("mvcnet_tiny", 4, 48, {"channels": NAMES[:4], "samples": 48}),
    Case(
        "mtam_tiny",
        4,
        160,
        {"channels": NAMES[:4], "dim": 8, "parts": 2, "width": 4, "bands": ((4.0, 13.0), (13.0, 40.0))},
        wrong_windows=((161, "2 equal parts, got 161"), (10, "has no frequency in it")),
        # Softmax does not see one number added to all keys.
        still=("['tower']['layers']['attention']['key']['bias']",),
    ),
    Case(
        "brainomni_mini",
        3,
        100,
        {
            # Without k-means and with large weights, so that codes that nothing trained differ.
            "tokenizer_options": {
                "window": 32,
                "ratios": (2, 4),
                "filters": 2,
                "dim": 16,
                "latents": 6,
                "kmeans": 0,
                "spread": 1.0,
            },
            "depth": 2,
            "dim": 16,
        },
        # A bias that all keys have moves no softmax.
        still=("['blocks']['space']['key']['bias']",),
        rounding=1e-3,
        wrong_windows=((20, "a signal of 20 samples"),),
    ),
    Case(
        "histn_tiny",
        4,
        48,
        {"channels": NAMES[:4], "samples": 48, "regions": (((0, 1),), ((0, 1),)), "width": 8},
    ),
    Case(
        "adhdeepnet_tiny",
        4,
        32,
        {"channels": NAMES[:4], "samples": 32, "tower_widths": (8, 16, 8)},
        wrong_windows=((40, "got windows of 40 samples, wanted 32"),),
    ),
    Case(
        "glim_tiny",
        4,
        40,
        {"channels": NAMES[:4], "samples": 40, "dim": 8, "queries": 4, "depth": 2, "heads": 2},
        wrong_windows=((48, "wants windows of 40 samples, got 48"),),
        # Layers over samples begin as nothing, so what is in them and what tells them waits for their gates to open;
        # softmax does not see one number added to all keys.
        still=(
            "['samples']['attention']",
            "['samples']['mlp",
            "['embed_task']",
            "['embed_dataset']",
            "['embed_person']",
            "['prompt_weight']",
            "['queries']['attention']['key']['bias']",
            "['queries']['across']['key']['bias']",
        ),
    ),
    Case(
        "meg_gpt_tiny",
        2,
        24,
        {"channels": 2, "layers": ((24, 1), (4, 4)), "steps": 6, "dim": 16, "hidden": 8},
        kind="roi",
        # Biases that all keys have move no softmax.
        still=tuple(f"['blocks_{n}']['key{part}bias']" for n in (0, 1) for part in ("_patch_", "']['")),
        rounding=1e-3,
        wrong_windows=((30, "wants windows of 24 samples, got 30 samples"),),
    ),
    Case(
        "regions_tiny",
        3,
        12,
        {
            "dim": 16,
            "patch": 4,
            "mixers": ("softmax",),
            "mixer_options": {"softmax": {"heads": 2}},
            "place": "position",
        },
        kind="roi",
        patch=4,
        wrong_windows=((10, "got a window of 10 volumes, wanted a multiple of 4"),),
    ),
    Case(
        "geometric_tiny",
        3,
        32,
        {"samples": 32, "patch": 8, "dim": 16, "heads": 2, "hidden": 16},
        wrong_windows=((40, "wants windows of 32 samples, a multiple of 8, got 40"),),
        # Softmax does not see one number added to all keys.
        still=("['blocks']['attention']['key']['bias']",),
    ),
    Case(
        "eegdm_tiny",
        2,
        80,
        {
            "channels": NAMES[:2],
            "depth": 2,
            "dim": 8,
            "states": 4,
            "condition": 8,
            "fusing": 1,
            "hidden": 8,
            "second": 40,
        },
        # Frozen; and a bias that all keys have moves no softmax.
        still=("['denoiser']", *(f"['{part}']['key']['bias']" for part in ("read", "fuse"))),
        rounding=1e-3,
        wrong_windows=((50, "a multiple of 40 samples, got 50 samples"),),
    ),
    Case(
        "barista_tiny",
        3,
        64,
        {"segment": 32, "depth": 2, "dim": 8, "heads": 2, "hidden": 8},
        kind="seeg",
        patch=32,
        # A bias before a norm over time, and one that all keys have.
        still=(
            *(f"['temporal']['conv_{n}_{part}']['bias']" for n in range(5) for part in ("in", "out")),
            "['blocks']['key']['bias']",
        ),
        rounding=1e-3,
        wrong_windows=((50, "wants a multiple of 32 samples, got 50 samples"),),
    ),
    Case(
        "neurocog_text_tiny",
        4,
        64,
        {"channels": NAMES[:4], "samples": 64, "filters": (2, 2, 4), "width": 8, "hidden": 4, "mixed": 4},
        wrong_windows=((63, "got windows of 63 samples, wanted 64"),),
        # A batch norm takes away what is added to everything.
        still=("['filters']['bias']",),
    ),
)

SLOW: tuple[str, ...] = (
    "regions_tiny",
    "shallow_tiny",
    "deep4_tiny",
    "mvcnet_tiny",
    "meg_image_tiny",
    "neurobridge_intra_tiny",
    "neurobridge_inter_tiny",
    "histn_tiny",
    "adhdeepnet_tiny",
    "artifactgen_tiny",
    "artifactgen_unet_tiny",
    "eeg_vae_tiny",
    "mtam_tiny",
    "glim_tiny",
    "brainomni_mini",
    "meg_gpt_tiny",
    "eegdm_tiny",
    "barista_tiny",
    "neurocog_text_tiny",
    "neurobolt_tiny",
    "reve_mini",
    "geometric_tiny",
    "rbtransformer_tiny",
    "eegpt_tiny",
    "du_in_encoder_tiny",
    "eeg_conformer_tiny",
)
"""Cases that the default run leaves to `-m slow`: what they are made of is in the others."""
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
    """The encoder, its variables, and a batch of eight."""
    encoder = Programs(zoo.create(case.name, **case.options), case)
    given = batch(case, 8)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.jit(
        lambda *given: nn.meta.unbox(encoder.init(keys, *given, **encoder.more(8))), compiler_options=QUICK
    )(*given)
    return encoder, variables, given


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
    return signal, Sensors(
        position=position.astype(np.float32),
        orientation=orientation.astype(np.float32),
        kind=np.full((size, case.channels), KINDS.index(case.kind), np.int32),
        name=np.broadcast_to(name_indices(case, NAMES), (size, case.channels)).copy(),
        valid=valid,
    )


def name_indices(case: Case, names: tuple[str, ...]) -> np.ndarray:
    return np.array([NAME_INDEX[each] if case.kind == "eeg" else -1 for each in names[: case.channels]], np.int32)


class Programs:
    """An encoder with its programs, each compiled once for the shapes it is given."""

    def __init__(self, encoder: Any, case: Case) -> None:
        self.encoder, self.case = encoder, case
        self.run = jax.jit(self._run, compiler_options=QUICK)
        self.learn = jax.jit(jax.value_and_grad(self._loss, has_aux=True), compiler_options=QUICK)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def more(self, size: int) -> dict[str, Any]:
        """What it is called with besides signal and sensors: who, and what to hide."""
        more: dict[str, Any] = {}
        if self.encoder.subjects:
            more["subject"] = jnp.arange(size) % self.encoder.subjects
        if self.case.patch:
            hidden = np.random.default_rng(2).random((size, self.case.channels, self.case.samples // self.case.patch))
            more["mask"] = jnp.asarray(hidden < 0.4)
        return more

    def call(self, variables: Any, signal: Any, sensors: Any) -> Any:
        """Nothing hidden."""
        more = {name: value for name, value in self.more(len(signal)).items() if name == "subject"}
        return self.run(variables, signal, sensors, more)

    def step(self, variables: Any, signal: Any, sensors: Any) -> tuple[Any, Any, Any]:
        """(loss, gradients of the parameters, new collections) of a training step with patches hidden."""
        collections = {name: value for name, value in variables.items() if name != "params"}
        more = self.more(len(signal))
        (value, new), grads = self.learn(variables["params"], collections, signal, sensors, more)
        return value, grads, new

    def _run(self, variables: Any, signal: Any, sensors: Any, more: Any) -> Any:
        return self.encoder.apply(variables, signal, sensors, **more)

    def _loss(self, params: Any, collections: Any, signal: Any, sensors: Any, more: Any) -> Any:
        out, new = self.encoder.apply(
            {"params": params, **collections},
            signal,
            sensors,
            **more,
            train=True,
            mutable=list(collections),
            rngs={"dropout": jax.random.key(7)},
        )

        # A direction for every number, so that no gradient is zero by symmetry, as that of a norm's sum is.
        def along(x: Any) -> Any:
            directions = jnp.sin(1.0 + 0.7 * jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
            return jnp.sum(x * directions) / np.sqrt(x.size)

        return along(out.pooled) + along(jnp.where(out.valid[..., None], out.tokens, 0)), new


def test_features_have_the_shapes_it_says(case, made):
    encoder, variables, (signal, sensors) = made
    out = encoder.call(variables, signal, sensors)
    assert out.pooled.shape == (8, encoder.features)
    assert out.tokens.shape[:2] == out.valid.shape
    assert out.valid.dtype == bool
    assert out.pooled.dtype == out.tokens.dtype == np.float32
    assert np.isfinite(out.pooled).all()
    assert np.isfinite(np.where(out.valid[..., None], out.tokens, 0)).all()
    assert len(np.unique(np.asarray(out.pooled), axis=0)) == 8
    assert encoder.flops(case.channels, case.samples) > 0


def test_its_classifier_gives_a_logit_a_class(case, made):
    encoder, variables, given = made
    pooled = encoder.call(variables, *given).pooled
    head = encoder.head(3)
    weights = head.init(jax.random.key(0), pooled)
    assert head.apply(weights, pooled).shape == (8, 3)


def test_features_do_not_depend_on_the_batch(case, made):
    encoder, variables, (signal, sensors) = made
    if encoder.subjects:
        pytest.skip("an example alone would be another subject's")
    whole = encoder.call(variables, signal, sensors)
    for row in (0, 7):
        one = np.array([row])
        alone = encoder.call(variables, signal[one], jax.tree.map(lambda leaf, one=one: leaf[one], sensors))
        close(alone.pooled[0], whole.pooled[row], case.rounding)


def test_what_is_missing_is_not_read(case, made):
    encoder, variables, (signal, sensors) = made
    spoiled = np.where(sensors.valid[:, :, None], signal, 1e4).astype(np.float32)
    a, b = (encoder.call(variables, given, sensors) for given in (signal, spoiled))
    close(b.pooled, a.pooled, 1e-6)
    close(np.where(a.valid[..., None], b.tokens, 0), np.where(a.valid[..., None], a.tokens, 0), 1e-6)


def test_channels_may_come_in_any_order_or_are_refused(case, made):
    """The same recording with its channels in another order."""
    encoder, variables, (signal, sensors) = made
    order = np.roll(np.arange(case.channels), 1)
    moved = signal[:, order], jax.tree.map(lambda leaf: leaf[:, order], sensors)
    if encoder.ORDER_FREE:
        whole, after = encoder.call(variables, signal, sensors), encoder.call(variables, *moved)
        close(after.pooled, whole.pooled, case.rounding)
    else:
        assert_refused(encoder, variables, case, *moved, [NAMES[each] for each in order], "another order")


def test_a_channel_less_is_one_not_seen_or_refused(case, made):
    """The same recording without its last channel."""
    encoder, variables, (signal, sensors) = made
    fewer = signal[:, :-1], jax.tree.map(lambda leaf: leaf[:, :-1], sensors)
    if encoder.ORDER_FREE:
        unseen = sensors.replace(valid=np.arange(case.channels) < case.channels - sensors.valid * 0 - 1)
        without = encoder.call(variables, *fewer)
        close(without.pooled, encoder.call(variables, signal, unseen).pooled, case.rounding)
    else:
        assert_refused(encoder, variables, case, *fewer, list(NAMES[: case.channels - 1]), "lacks")


def test_another_montage_is_read_or_refused(case, made):
    """The same recording, its electrodes called otherwise."""
    encoder, variables, (signal, sensors) = made
    if case.kind != "eeg":
        pytest.skip(f"channels of kind {case.kind} have no canonical names")
    other = sensors.replace(name=np.broadcast_to(name_indices(case, OTHERS), sensors.name.shape).copy())
    if encoder.ORDER_FREE:
        encoder.check_recording(encoder.sampling_rate or 200.0, (case.kind,) * case.channels, OTHERS[: case.channels])
        assert np.isfinite(encoder.call(variables, signal, other).pooled).all()
    else:
        assert_refused(encoder, variables, case, signal, other, list(OTHERS[: case.channels]), "lacks")


def test_every_parameter_learns(case, made):
    encoder, variables, given = made
    value, grads, _ = encoder.step(variables, *given)
    assert np.isfinite(value)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        assert np.abs(leaf).max() > 0 or name.startswith(case.still), name


def test_training_on_eight_devices_is_training_on_one(case, made):
    encoder, variables, given = made
    one = encoder.step(variables, *given)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rules = logical_rules(Rules())
    with jax.set_mesh(mesh), nn.logical_axis_rules([(name, "data" if name == "batch" else None) for name, _ in rules]):
        whole = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
        eight = encoder.step(whole, *jax.device_put(given, NamedSharding(mesh, PartitionSpec("data"))))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(one[1]))
    for path, leaf in jax.tree_util.tree_leaves_with_path(one):
        other = dict(jax.tree_util.tree_leaves_with_path(eight))[path]
        # A gradient that is zero but for rounding, as that of a bias before a norm, rounds in another order.
        scale = max(np.abs(np.asarray(leaf, np.float32)).max(), 1e-2 * largest)
        np.testing.assert_allclose(
            np.asarray(other, np.float32), leaf, atol=case.rounding * scale, err_msg=jax.tree_util.keystr(path)
        )


def test_the_training_loop_can_lay_it_out(case, made):
    encoder, _, given = made
    mesh, rules = make_mesh(Mesh(data=2, fsdp=2, tensor=2)), Rules()
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules(rules)):
        variables = jax.eval_shape(lambda *given: encoder.init(keys, *given, **encoder.more(8)), *given)
    parameter_shardings(variables, rules, mesh)


def test_what_it_cannot_take_is_refused(case, made):
    encoder, variables, _ = made
    kind = next((each for each in KINDS if each not in encoder.TAKES), None)
    names = ("",) * case.channels if case.kind != "eeg" else NAMES[: case.channels]
    encoder.check_recording(encoder.sampling_rate or 200.0, (case.kind,) * case.channels, names)
    if kind:
        with pytest.raises(ZooError, match=f"kind '{kind}'"):
            encoder.check_recording(encoder.sampling_rate or 200.0, (kind,) * case.channels, names)
    if encoder.sampling_rate:
        with pytest.raises(ZooError, match=f"got a signal at 77 Hz, wanted {encoder.sampling_rate:g} Hz"):
            encoder.check_recording(77.0, (case.kind,), names)
    signal, sensors = batch(case, 1)
    for samples, says in case.wrong_windows:
        with pytest.raises(ZooError, match=says):
            jax.eval_shape(encoder.apply, variables, np.resize(signal, (1, case.channels, samples)), sensors)


def assert_refused(
    encoder: Any, variables: Any, case: Case, signal: Any, sensors: Any, names: list[str], says: str
) -> None:
    """By the host's check, and by a call with the host's sensors; both name the channels it needs."""
    needed = NAMES[: case.channels]
    if case.kind != "eeg":
        names, says, needed = [""] * len(names), f"wanted {case.channels}", ()
        if len(names) == case.channels:
            pytest.skip(f"channels of kind {case.kind} have no canonical names to tell their order by")
    for attempt in (
        lambda: encoder.check_recording(encoder.sampling_rate or 200.0, (case.kind,) * len(names), names),
        lambda: encoder.apply(variables, signal, sensors),
    ):
        with pytest.raises(ZooError, match=says) as refusal:
            attempt()
        assert all(name in str(refusal.value) for name in needed)


def close(ours: Any, theirs: Any, rounding: float) -> None:
    """Within that share of the largest."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    np.testing.assert_allclose(ours, theirs, atol=rounding * max(np.abs(theirs).max(), 1e-6), rtol=0)
