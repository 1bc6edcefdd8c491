"""Du-IN's encoder: its counts, whose matrix it uses, what it hides, and its pretraining beside a frozen tokenizer."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.errors import ZooError
from zoo.objectives.masked_codes import MaskedCodes
from zoo.types import Sensors

QUICK = {"xla_backend_optimization_level": 0}
"""Compilation takes longer than these small programs run."""
SMALL: dict[str, Any] = {"channels": 3, "latents": 4, "depth": 1, "patches": 4}


def sensors(batch: int, channels: int = 3) -> Sensors:
    nowhere, kind = np.full((batch, channels, 3), np.nan, np.float32), np.full((batch, channels), 3, np.int32)
    return Sensors(nowhere, nowhere, kind, np.full_like(kind, -1), np.ones((batch, channels), bool))


def test_counts_are_the_published():
    """Those of the official code, with 10 subjects: of `duin_mae`, and of what `duin_cls` predicts with."""
    encoder = zoo.create("du_in_encoder_base", subjects=10)
    signal = jnp.zeros((1, 16, 4000))

    def count(made: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(made["params"]))

    key, who, mask = jax.random.key(0), jnp.zeros(1, jnp.int32), jnp.zeros((1, 40), bool)
    own = jax.eval_shape(lambda: encoder.init(key, signal, sensors(1, 16), subject=who, mask=mask))
    assert count(own) + 161 * 2048 == 3_892_848
    head = jax.eval_shape(lambda: encoder.head(61).init(key, jnp.zeros((1, encoder.features))))
    unused = 46_592 + 10_304  # its quantiser and its contrastive maps
    assert count(own) - 160 + count(head) + unused == 4_447_053


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any, Any]:
    encoder = zoo.create("du_in_encoder_tiny", **SMALL, subjects=3)
    signal = np.random.default_rng(0).standard_normal((2, 3, 40)).astype(np.float32)
    mask = np.array([[True, False, False, True], [False, True, False, False]])

    def init(key: Any) -> Any:
        return encoder.init(key, signal, sensors(2), subject=jnp.zeros(2, jnp.int32), mask=mask)

    variables = jax.jit(init, compiler_options=QUICK)(jax.random.key(0))

    def run(signal: Any, who: Any, mask: Any) -> Any:
        return encoder.apply(variables, signal, sensors(2), subject=who, mask=mask)

    return jax.jit(run, compiler_options=QUICK), signal, mask


def test_each_subject_has_a_matrix_of_its_own(small):
    run, signal, mask = small
    signal[1] = signal[0]
    none = np.zeros_like(mask)
    same, other, *unknown = (np.asarray(run(signal, np.array([2, who]), none).pooled) for who in (2, 1, 3, -1))
    np.testing.assert_allclose(same[0], same[1], atol=1e-5)
    assert np.abs(other[0] - other[1]).max() > 1e-3
    assert all(np.isnan(each[1]).all() for each in unknown)
    assert all(np.isfinite(each[0]).all() for each in unknown)


def test_hidden_patches_are_not_read(small):
    run, signal, mask = small
    who = np.array([0, 1])
    spoiled = np.where(np.repeat(mask, 10, axis=1)[:, None], 3.0, signal).astype(np.float32)
    np.testing.assert_array_equal(run(signal, who, mask).tokens, run(spoiled, who, mask).tokens)
    assert np.abs(run(signal, who, mask).tokens - run(signal, who, ~mask).tokens).max() > 1e-3


def test_what_does_not_fit_is_refused():
    signal = jnp.zeros((2, 3, 40))
    for options, more, says in (
        ({"subjects": 3}, {}, "got no subject, wanted whose each example is, 0 to 2"),
        ({}, {"subject": jnp.zeros(2, jnp.int32)}, "got a subject, wanted none"),
        ({"stride": 3}, {}, "a stride that divides the patch"),
        ({"patches": 5}, {}, "wants 5 patches of 10 samples, got 40 samples"),
        ({}, {"mask": jnp.zeros((2, 5), bool)}, r"wants a mask of \[2, 4\], got \[2, 5\]"),
    ):
        encoder = zoo.create("du_in_encoder_tiny", **{**SMALL, **options})
        with pytest.raises(ZooError, match=says):
            jax.eval_shape(
                lambda encoder=encoder, more=more: encoder.init(jax.random.key(0), signal, sensors(2), **more)
            )


def test_a_sigmoid_may_follow_the_logits():
    heads = [zoo.create("du_in_encoder_tiny", sigmoid=sigmoid).head(5) for sigmoid in (False, True)]
    pooled = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    variables = heads[0].init(jax.random.key(0), pooled)
    logits, squashed = (head.apply(variables, pooled) for head in heads)
    np.testing.assert_allclose(squashed, jax.nn.sigmoid(logits), rtol=1e-6)


@pytest.mark.slow
def test_it_pretrains_on_codes_of_a_frozen_tokenizer():
    tokenizer = zoo.create("du_in_tiny", channels=3, depth=1, decoder_depth=1, codes=16)
    signal = np.random.default_rng(0).standard_normal((4, 3, 40)).astype(np.float32)
    batch = {"signal": signal, "sensors": sensors(4), "subject": np.array([0, 1, 1, 0])}
    init = jax.jit(lambda key: tokenizer.init(key, signal, batch["sensors"]), compiler_options=QUICK)
    task = MaskedCodes(model="du_in_encoder_tiny", options={**SMALL, "subjects": 2}).using(
        tokenizer, init(jax.random.key(0))
    )
    variables = jax.jit(lambda key: task.init(key, batch), compiler_options=QUICK)(jax.random.key(1))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def learn(params: Any) -> Any:
        return jax.value_and_grad(lambda params: task.loss({**variables, "params": params}, batch, key, False)[0])(
            params
        )

    key = jax.random.key(2)
    value, grads = learn(variables["params"])
    assert 0.5 < value / (2 * np.log(16)) < 1.5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert np.abs(grads["encoder"]["embed_mask"].unbox()).max() > 0
    assert (np.abs(grads["encoder"]["subject_in"]["kernel"].unbox()).max((1, 2)) > 0).all()
    with pytest.raises(ZooError, match="wants whose each example is"):
        jax.eval_shape(task.init, key, {name: batch[name] for name in ("signal", "sensors")})
