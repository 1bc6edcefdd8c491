"""Contrast between modalities: against plain losses, on several devices, in parts, and learned from a shared cause."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from quick import compiled

from zoo.errors import ZooError
from zoo.objectives.contrast import clip_loss, info_nce, retrieval, searched, siglip_loss, similarities
from zoo.objectives.contrast_modalities import ContrastModalities, Modality
from zoo.sensors import KINDS
from zoo.train.config import Config, Mesh, Optimizer, Train
from zoo.train.mesh import AXES, BatchPlacer
from zoo.train.state import Program
from zoo.types import Sensors

ROWS, WIDTH = 12, 5
SMALL: dict[str, Any] = {"dim": 16, "patch": 4, "rows": 4, "mixers": ("softmax",), "mlp": "none"}
TASK = ContrastModalities(
    {name: Modality("regions_tiny", SMALL) for name in ("eeg", "fmri", "meg")}, features=8, temperature=0.2
)
SHAPES = {"eeg": (3, 8), "meg": (4, 8), "fmri": (2, 4)}


def sensors(channels: int, batch: int) -> Sensors:
    nowhere = np.full((batch, channels, 3), np.nan, np.float32)
    kind = np.full((batch, channels), KINDS.index("roi"), np.int32)
    return Sensors(nowhere, nowhere, kind, kind * 0 - 1, np.ones((batch, channels), bool))


MIXING = {name: np.random.default_rng(n).normal(size=(6, *SHAPES[name])) for n, name in enumerate(SHAPES)}


def make_batch(seed: int = 0, size: int = 16, noise: float = 0.3) -> dict[str, Any]:
    """Every modality a map of its own of the same six numbers a row, and noise."""
    rng = np.random.default_rng(100 + seed)
    cause = rng.normal(size=(size, 6))
    batch: dict[str, Any] = {"stimulus": np.arange(size, dtype=np.int32)}
    for name, mixing in MIXING.items():
        signal = np.einsum("bk,kct->bct", cause, mixing) + noise * rng.normal(size=(size, *SHAPES[name]))
        batch[name] = {"signal": signal.astype(np.float32) / 2.5, "sensors": sensors(SHAPES[name][0], size)}
    return batch


def program(task: ContrastModalities, batch: Any, devices: int, steps: int = 100, **mesh: int) -> tuple[Program, Any]:
    config = Config(
        task=task,
        optimizer=Optimizer(learning_rate=1e-2, warmup_steps=5, weight_decay=0.0),
        train=Train(steps=steps),
        mesh=Mesh(max_replicated=1.0, **mesh),
    )
    sizes = [mesh.get(axis, 1) for axis in AXES]
    sizes[AXES.index("data")] = devices // int(np.prod(sizes))
    laid = np.array(jax.devices()[:devices]).reshape(sizes)
    place = BatchPlacer(
        jax.sharding.Mesh(laid, AXES, axis_types=(AxisType.Auto,) * len(AXES)), config.rules, len(batch["stimulus"]), 1
    )
    return Program(config, task, place.sharding.mesh, place.abstract(batch)), place


@pytest.mark.parametrize("offset", [None, -2.0])
def test_a_search_is_the_plain_loss(offset: float | None) -> None:
    rng = np.random.default_rng(0)
    ours, theirs = (rng.normal(size=(ROWS, WIDTH)).astype(np.float32) for _ in range(2))
    valid, alone, scale = np.arange(ROWS) % 5 != 1, np.arange(ROWS), jnp.float32(1.7)
    whole = {"valid": valid, "segment": alone}
    logits = scale * np.asarray(similarities(ours, theirs, cosine=False))

    def ours_alone(ours: Any, theirs: Any, scale: Any, block: int) -> Any:
        nats, rank = searched(
            ours, theirs, scale, None if offset is None else jnp.float32(offset), **whole, block=block
        )
        return nats[valid].mean(), rank

    for block in (ROWS * ROWS, 3 * ROWS, 1):
        value, rank = compiled(lambda *given, block=block: ours_alone(*given, block))(ours, theirs, scale)
        want = info_nce(logits, valid) if offset is None else siglip_loss(logits + offset, valid)
        np.testing.assert_allclose(value, want, rtol=1e-5)
        assert np.mean(np.asarray(rank)[valid] < 1) == retrieval(logits, valid)
    # Made again for the gradient, a block at a time, it is the same gradient.
    plain = clip_loss if offset is None else siglip_loss

    def plainly(ours: Any, theirs: Any, scale: Any) -> Any:
        return plain(scale * ours @ theirs.T + (offset or 0.0), valid)

    def by_blocks(ours: Any, theirs: Any, scale: Any) -> Any:
        one = ours_alone(ours, theirs, scale, 2 * ROWS)[0]
        return 0.5 * (one + ours_alone(theirs, ours, scale, ROWS)[0]) if offset is None else one

    want, got = (compiled(jax.grad(each, (0, 1, 2)))(ours, theirs, scale) for each in (plainly, by_blocks))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)


def test_rows_of_one_stimulus_are_no_wrong_answers() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = (rng.normal(size=(ROWS, WIDTH)).astype(np.float32) for _ in range(2))
    segment = np.arange(ROWS) // 3
    nats, rank = searched(ours, theirs, jnp.float32(1), valid=np.ones(ROWS, bool), segment=segment)
    logits = ours @ theirs.T
    np.testing.assert_allclose(np.mean(nats), info_nce(logits, segment=segment), rtol=1e-5)
    others = segment[:, None] != segment
    np.testing.assert_array_equal(rank, np.sum((logits > np.diagonal(logits)[:, None]) & others, axis=1))
    # With all of one stimulus there is nothing to be mistaken for.
    nats, rank = searched(ours, theirs, jnp.float32(1), valid=np.ones(ROWS, bool), segment=np.zeros(ROWS, int))
    np.testing.assert_allclose(nats, 0, atol=1e-6)
    assert not np.any(rank)


def test_each_device_searches_for_its_own_rows() -> None:
    rng = np.random.default_rng(2)
    given = [rng.normal(size=(16, WIDTH)).astype(np.float32) for _ in range(2)]
    segment = np.arange(16) // 2

    def loss(ours: Any, theirs: Any) -> Any:
        nats, rank = searched(ours, theirs, jnp.float32(2), valid=np.ones(16, bool), segment=segment, block=16)
        return jnp.mean(nats), rank

    search = jax.value_and_grad(loss, (0, 1), has_aux=True)
    alone = compiled(search)(*given)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), nn.logical_axis_rules([("batch", ("data", "fsdp"))]):
        split = compiled(search)(*given)
    assert split[0][1].sharding.spec == PartitionSpec(("data", "fsdp"))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_eight_devices_and_parts_are_one_device_and_a_whole() -> None:
    batch = make_batch()
    batch["meg"]["sensors"].valid[3] = False
    batch["stimulus"][5] = batch["stimulus"][4]
    found = []
    for task, devices, mesh in (
        (TASK, 1, {}),
        (dataclasses.replace(TASK, parts=2), 8, {"fsdp": 4}),
    ):
        made, place = program(task, batch, devices, **mesh)

        def gradient(params: Any, batch: Any, task: ContrastModalities = task) -> Any:
            def loss(params: Any) -> Any:
                value, metrics, _ = task.loss({"params": params}, batch, jax.random.key(0), True)
                return value, {**metrics, "loss": value}

            return jax.grad(loss, has_aux=True)(params)

        with jax.set_mesh(made.mesh), made.context():
            found.append(jax.device_get(compiled(gradient)(made.initial().params, place(batch))))
    (one, figures), (eight, others) = found
    assert figures.keys() == others.keys()
    for name, figure in figures.items():
        assert float(figure) == pytest.approx(float(others[name]), rel=1e-4, abs=1e-5), name
    assert figures["weight"] == 16
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5 * max(1.0, np.abs(a).max()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_what_shares_a_cause_finds_each_other(kind: Any) -> None:
    task = dataclasses.replace(TASK, kind=kind, parts=2)
    made, place = program(task, make_batch(size=32), 1, steps=150)
    state = made.initial()
    with jax.set_mesh(made.mesh), made.context():
        for step in range(150):
            state, _ = made.train_step(state, place(make_batch(step, 32)))
        metrics = made.validate(state, place(make_batch(1000, 32)))
    found = {name: float(value) for name, value in metrics.items() if name.endswith("retrieval")}
    assert len(found) == 6
    # Chance is 1 in 32. SigLIP's offset begins at −10, for batches of thousands, and learns the slower here.
    assert min(found.values()) > (0.5 if kind == "clip" else 5 / 32), found


def test_operations_are_counted_and_wrong_tasks_refused() -> None:
    batch = make_batch()
    # Matrices of attention and of the embedding, and scores of all tokens with all.
    two = dataclasses.replace(TASK, modalities={name: TASK.modalities[name] for name in ("eeg", "fmri")})
    sizes = [channels * samples // 4 for channels, samples in (SHAPES["eeg"], SHAPES["fmri"])]
    encoders = sum(16 * 2 * n * (4 * 16**2 + 4 * 16 + 2 * n * 16) for n in sizes)
    assert two.flops(batch) == encoders + 2 * 16 * 2 * 16 * 8 + 2 * 2 * 16 * 16 * 8
    del batch["fmri"]
    for task, says in (
        (ContrastModalities({"eeg": Modality("regions_tiny")}), "wanted two or more"),
        (TASK, "without fmri"),
        (
            ContrastModalities({"eeg": Modality("codes_tiny"), "meg": Modality("regions_tiny")}),
            "codes_tiny is not an encoder of signals",
        ),
        (dataclasses.replace(TASK, modalities={**TASK.modalities, "x": Modality()}), "without fmri, x"),
    ):
        with pytest.raises(ZooError, match=says):
            task.init(jax.random.key(0), batch)
    with pytest.raises(ZooError, match="divisor of the batch of 16"):
        dataclasses.replace(TASK, parts=3).init(jax.random.key(0), make_batch())
    with pytest.raises(ZooError, match="got data of 'pet', wanted eeg, fmri, meg"):
        TASK.check_modality("pet", 1.0, ("roi",), ("",))
    with pytest.raises(ZooError, match="takes roi, vertex, voxel"):
        TASK.check_modality("eeg", 1.0, ("eeg",), ("CZ",))
