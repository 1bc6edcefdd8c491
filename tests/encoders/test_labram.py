"""LaBraM against its official code and its own promises."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from electrodes import electrodes

from zoo.encoders.labram import VARIANTS, LaBraM
from zoo.errors import ZooError
from zoo.registry import create, entry, parameter_count
from zoo.sensors import KINDS, LABRAM_NAMES
from zoo.types import Encoded, Sensors

NAMES = ("FP1", "CZ", "O2", "T3", LABRAM_NAMES[127])
"""First and last row of the table, the middle, an old name."""

SMALL = {"depth": 2, "dim": 100, "heads": 4, "conv_features": 4}
BIASED = {**SMALL, "qkv_bias": True, "qk_norm": False, "layer_scale": 0.0}


def numbers(key: int, shape: tuple[int, ...]) -> np.ndarray:
    """Reproducible numbers in [−1, 1], a quadratic sequence modulo a prime: the same on every machine, for ever."""
    i = np.arange(np.prod(shape, dtype=np.int64))
    return ((i * i * 40503 + i * 30011 * (key + 1) + 7919 * key) % 65521 / 32760 - 1).astype(np.float32).reshape(shape)


def variables(module: nn.Module) -> dict[str, Any]:
    """Parameters of `module`, mask token included, filled with `numbers` in the order of their paths."""
    signal, sensors = module.example()
    shapes = jax.eval_shape(module.init, jax.random.key(0), signal, sensors, mask=jnp.zeros((1, 1, 1), bool))
    leaves, tree = jax.tree.flatten_with_path(nn.meta.unbox(shapes))

    def fill(key: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("scale"):
            return 1 + 0.5 * numbers(key, shape)
        return (0.3 if name == "bias" else 0.2) * numbers(key, shape)

    return jax.tree.unflatten(tree, [fill(key, path[-1].key, leaf.shape) for key, (path, leaf) in enumerate(leaves)])


def example(patches: int = 2) -> tuple[np.ndarray, Sensors, np.ndarray]:
    """Signal [2, 5, 200 · patches], sensors, mask [2, 5, patches]."""
    signal = numbers(1000, (2, len(NAMES), 200 * patches))
    mask = numbers(2000, (2, len(NAMES), patches)) > 0
    return signal, electrodes(NAMES), mask


@partial(jax.jit, static_argnames=("module", "train"))
def encode(
    module: nn.Module,
    values: Any,
    signal: Any,
    sensors: Sensors,
    *,
    mask: Any = None,
    train: bool = False,
    rngs: Any = None,
) -> Encoded:
    return module.apply(values, signal, sensors, mask=mask, train=train, rngs=rngs)


def take_channels(sensors: Sensors, channels: Any) -> Sensors:
    return jax.tree.map(lambda values: values[:, channels], sensors)


def by_channel(tokens: Any, channels: int) -> np.ndarray:
    """Tokens [B, C, A, D]."""
    return np.asarray(tokens).reshape(tokens.shape[0], channels, -1, tokens.shape[-1])


# Options; masked, with the CLS position of the official pretraining class; 16 of its tokens; 16 of its pooled numbers.
OFFICIAL = {
    "base": (
        {},
        False,
        "-1.8632345 -0.0849974 0.1222995 1.3488775 -0.6956137 -0.1186115 1.6577007 -0.1559523 0.966048 0.7121599 "
        "0.757675 0.9961615 1.8312235 0.5760106 1.1078262 1.1746312",
        "-1.493079 0.1633351 1.0295214 -0.4401356 0.1870114 0.0973178 0.879993 0.005158 0.0954635 -0.1070861 "
        "0.7307492 1.1191059 -0.8621008 -1.5950725 -0.1610548 1.1142865",
    ),
    "base, masked": (
        {},
        True,
        "-1.7624349 0.2104616 -0.228924 1.0600839 -0.0091583 -0.3381637 0.1606688 0.5938921 0.5295037 1.392289 "
        "0.902593 0.6716207 1.0391065 0.6937679 0.122496 0.96561",
        "",
    ),
    "small": (
        SMALL,
        False,
        "0.2497171 1.9416864 1.1553622 -0.2011726 1.1135868 0.3420834 -0.7458585 -0.5543059 0.681988 -1.1334998 "
        "-1.5867667 -1.1702492 -0.3030093 -0.850252 -1.1384852 -0.1789302",
        "-0.1956067 0.4749771 -1.265317 -0.573354 -3.5837197 1.2314997 0.1008307 2.3962871 -1.2677161 -0.0708778 "
        "-0.7587509 0.5905464 0.4348151 -0.5829896 0.3158999 -0.7794938",
    ),
    "small, masked": (
        SMALL,
        True,
        "-0.893924 1.3050795 0.8220962 -0.9904634 1.5341114 1.7392489 -0.8391513 0.2617806 0.8999354 -1.2390782 "
        "-1.5559944 -0.0200924 -1.0572172 -0.8705476 0.4753787 -0.6843072",
        "",
    ),
    "small, biased": (
        BIASED,
        False,
        "1.2552802 -1.1363271 0.8333963 -0.8264164 0.029668 1.381472 0.3505884 -0.2710589 0.0166769 -2.0916588 "
        "0.5416793 0.1199512 -0.187832 1.9517107 -0.2376912 0.4700339",
        "1.5438911 1.7456193 1.2836782 1.5629149 -0.0469401 1.7385001 -2.2366313 1.5262711 0.2096767 -0.0627604 "
        "1.0883795 -1.0397924 -1.0290511 -2.0215008 0.5602031 -0.2766199",
    ),
}


@pytest.mark.parametrize("case", OFFICIAL)
def test_numbers_of_the_official_code(case: str) -> None:
    """The official PyTorch classes, in float64, gave these numbers for the parameters and the signal of this file.

    `NeuralTransformer` with mean pooling (its patch tokens, its pooled vector) and, for the masked cases,
    `NeuralTransformerForMaskedEEGModeling` (its patch tokens), our parameters renamed and transposed into their state
    dicts with no key left over on either side but their unused heads. Every 1/15th of the flattened output is kept.
    """
    options, masked, tokens, pooled = OFFICIAL[case]
    module = create("labram_base", **options, cls_position="first_channel" if masked else "row")
    signal, sensors, mask = example()
    encoded = encode(module, variables(module), signal, sensors, mask=mask if masked else None)

    def compare(values: jax.Array, official: str) -> None:
        wanted = np.array(official.split(), float)
        np.testing.assert_allclose(
            np.ravel(values)[np.linspace(0, values.size - 1, len(wanted)).astype(int)], wanted, rtol=0, atol=1e-5
        )

    compare(encoded.tokens, tokens)
    if pooled:
        compare(encoded.pooled, pooled)


COUNTS = {"labram_tiny": 500_192, "labram_base": 5_819_936, "labram_large": 46_258_720, "labram_huge": 369_235_712}


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts(name: str) -> None:
    assert parameter_count(create(name)) == COUNTS[name]
    assert entry(name).card.parameters == COUNTS[name]


@pytest.fixture(scope="module")
def small() -> LaBraM:
    return LaBraM(**SMALL)


@pytest.fixture(scope="module")
def values(small: LaBraM) -> dict[str, Any]:
    return variables(small)


def test_shapes_and_order_of_tokens(small: LaBraM, values: Any) -> None:
    signal, sensors, _ = example(patches=3)
    sensors.valid[1, 2] = False
    encoded = encode(small, values, signal, sensors)
    assert encoded.tokens.shape == (2, 15, 100)
    assert encoded.pooled.shape == (2, 100)
    np.testing.assert_array_equal(encoded.valid, np.repeat(sensors.valid, 3, axis=1))


def test_examples_of_a_batch_are_independent(small: LaBraM, values: Any) -> None:
    signal, sensors, mask = example()
    together = encode(small, values, signal, sensors, mask=mask)
    second = jax.tree.map(lambda x: x[1:], sensors)
    alone = encode(small, values, signal[1:], second, mask=mask[1:])
    np.testing.assert_allclose(alone.tokens[0], together.tokens[1], atol=1e-5)
    np.testing.assert_allclose(alone.pooled[0], together.pooled[1], atol=1e-5)


def test_channels_may_come_in_any_order(small: LaBraM, values: Any) -> None:
    signal, sensors, mask = example()
    order = [3, 0, 4, 2, 1]
    straight = encode(small, values, signal, sensors, mask=mask)
    shuffled = encode(small, values, signal[:, order], take_channels(sensors, order), mask=mask[:, order])
    wanted = by_channel(straight.tokens, 5)[:, order]
    np.testing.assert_allclose(by_channel(shuffled.tokens, 5), wanted, atol=1e-5)
    np.testing.assert_allclose(shuffled.pooled, straight.pooled, atol=1e-5)


def test_the_name_decides_the_embedding(small: LaBraM, values: Any) -> None:
    signal, sensors, _ = example()
    renamed = replace(sensors, name=sensors.name[:, ::-1])
    difference = encode(small, values, signal, renamed).tokens - encode(small, values, signal, sensors).tokens
    assert np.abs(difference).max() > 0.1


@pytest.mark.parametrize("cls_position", ["row", "first_channel"])
@pytest.mark.parametrize("bad", [0, 3])
def test_a_bad_channel_is_as_good_as_absent(values: Any, cls_position: str, bad: int) -> None:
    module = LaBraM(**SMALL, cls_position=cls_position)
    signal, sensors, mask = example()
    rest = [channel for channel in range(5) if channel != bad]
    absent = encode(module, values, signal[:, rest], take_channels(sensors, rest), mask=mask[:, rest])
    signal[:, bad], sensors.valid[:, bad], sensors.name[:, bad] = np.nan, False, -1
    marked = encode(module, values, signal, sensors, mask=mask)
    np.testing.assert_allclose(by_channel(marked.tokens, 5)[:, rest], by_channel(absent.tokens, 4), atol=1e-5)
    np.testing.assert_allclose(marked.pooled, absent.pooled, atol=1e-5)


def test_hidden_samples_stay_hidden_when_patches_are_normalised_alone(values: Any) -> None:
    module = LaBraM(**SMALL, per_patch_norm=True)
    signal, sensors, mask = example()
    before = encode(module, values, signal, sensors, mask=mask)
    hidden = np.repeat(mask, 200, axis=-1)
    after = encode(module, values, np.where(hidden, 7 * signal + 1, signal), sensors, mask=mask)
    np.testing.assert_array_equal(after.tokens, before.tokens)
    np.testing.assert_array_equal(after.pooled, before.pooled)


def test_hidden_samples_leak_only_through_the_group_statistics(small: LaBraM, values: Any) -> None:
    """The published trap: other samples behind the mask change the tokens, unless mean and variance stay the same."""
    signal, sensors, mask = example()
    before = encode(small, values, signal, sensors, mask=mask)
    hidden = np.repeat(mask, 200, axis=-1)
    changed = encode(small, values, np.where(hidden, 7 * signal, signal), sensors, mask=mask)
    assert np.abs(changed.tokens - before.tokens).max() > 0.1
    swapped = signal.reshape(2, 5, 2, 200).copy()
    for row in range(2):
        swapped[row][mask[row]] = swapped[row][mask[row]][::-1]
    assert not np.array_equal(swapped.reshape(signal.shape), signal)
    after = encode(small, values, swapped.reshape(signal.shape), sensors, mask=mask)
    np.testing.assert_allclose(after.tokens, before.tokens, atol=1e-5)


@pytest.mark.parametrize("change", ["no name", "a name beyond the table", "another kind"])
def test_a_channel_the_table_does_not_know_gives_nan(small: LaBraM, values: Any, change: str) -> None:
    signal, sensors, _ = example()
    if change == "another kind":
        sensors.kind[1, 2] = KINDS.index("ecog")
    else:
        sensors.name[1, 2] = -1 if change == "no name" else 128
    encoded = encode(small, values, signal, sensors)
    assert np.isfinite(encoded.tokens[0]).all()
    assert np.isnan(encoded.pooled[1]).all()


def test_check_sensors(small: LaBraM) -> None:
    small.check_sensors(NAMES)
    for name in ("", "XYZ", LABRAM_NAMES[128]):
        with pytest.raises(ZooError, match=f"no electrode '{name}'"):
            small.check_sensors(["CZ", name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 96}, "got dim 96, patch 200, conv_features 4"),
        ({"dim": 150, "conv_features": 6}, "conv_features of 4"),
        ({"patch": 100}, "got dim 100, patch 100"),
        ({"heads": 3}, "3 heads"),
        ({"remat": "some"}, r"\['dots', 'full', 'none'\], got 'some'"),
        ({"cls_position": "last"}, "got 'last'"),
        ({"drop_path": 1.0}, r"\[0, 1\), got 1.0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    module = LaBraM(**{**SMALL, **options})
    with pytest.raises(ZooError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), *LaBraM(**SMALL).example())


@pytest.mark.parametrize(
    ("samples", "channels", "mask", "message"),
    [
        (399, 5, None, "patches of 200 samples, got 399"),
        (0, 5, None, "got 0 samples"),
        (3400, 5, None, "1 to 16 patches of 200 samples, got 3400"),
        (400, 4, None, r"got sensors of \[2, 4\] for a signal of \[2, 5, 400\]"),
        (400, 5, (2, 2, 5), r"mask of shape \(2, 5, 2\), got \(2, 2, 5\)"),
    ],
)
def test_bad_shapes(small: LaBraM, values: Any, samples: int, channels: int, mask: Any, message: str) -> None:
    sensors = electrodes(NAMES[:channels])
    hidden = None if mask is None else np.zeros(mask, bool)
    with pytest.raises(ZooError, match=message):
        small.apply(values, np.zeros((2, 5, samples), np.float32), sensors, mask=hidden)


@pytest.mark.slow
def test_jit_changes_nothing(small: LaBraM, values: Any) -> None:
    signal, sensors, mask = example()
    eager = small.apply(values, signal, sensors, mask=mask)
    np.testing.assert_allclose(encode(small, values, signal, sensors, mask=mask).tokens, eager.tokens, atol=1e-5)


@partial(jax.jit, static_argnames="module")
def gradients(module: LaBraM, values: Any, signal: Any, sensors: Sensors, mask: Any) -> Any:
    """Of a weighted sum over tokens and the squares of pooled, by parameter."""

    def readout(values: Any) -> jax.Array:
        encoded = module.apply(values, signal, sensors, mask=mask)
        weights = numbers(3000, encoded.tokens.shape) * encoded.valid[..., None]
        return jnp.sum(encoded.tokens * weights) + jnp.sum(jnp.square(encoded.pooled - 1))

    return jax.grad(readout)(values)


def test_every_parameter_learns_whatever_a_bad_channel_holds(small: LaBraM, values: Any) -> None:
    signal, sensors, mask = example()
    signal[0, 1], sensors.valid[0, 1] = np.nan, False
    # Softmax does not see one number added to all keys, nor group normalisation one added to a group of one feature.
    unseen = ("key_norm/bias", "conv1/bias", "conv2/bias", "conv3/bias")
    for path, leaf in jax.tree.leaves_with_path(gradients(small, values, signal, sensors, mask)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(leaf).all(), name
        assert np.abs(leaf).max() > 1e-3 or name.endswith(unseen), name


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_neither_values_nor_gradients(small: LaBraM, values: Any, remat: str) -> None:
    again = LaBraM(**SMALL, remat=remat)
    signal, sensors, mask = example()
    np.testing.assert_allclose(
        encode(again, values, signal, sensors, mask=mask).tokens,
        encode(small, values, signal, sensors, mask=mask).tokens,
        atol=1e-6,
    )
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4),
        gradients(again, values, *example()),
        gradients(small, values, *example()),
    )


def test_bfloat16_is_close(values: Any) -> None:
    signal, sensors, mask = example()
    exact = encode(LaBraM(**SMALL), values, signal, sensors, mask=mask)
    half = encode(LaBraM(**SMALL, dtype=jnp.bfloat16), values, signal, sensors, mask=mask)
    assert half.tokens.dtype == half.pooled.dtype == jnp.bfloat16
    for one, other in ((half.tokens, exact.tokens), (half.pooled, exact.pooled)):
        error = np.asarray(one, np.float32) - np.asarray(other)
        assert np.sqrt(np.mean(np.square(error))) < 0.05 * np.std(other)


@pytest.mark.slow
def test_drop_path_drops_or_doubles_whole_branches_of_single_examples(values: Any) -> None:
    """Rates 0 and ½ over two layers: each example is one of four networks, the second layer's branches times 0 or 2."""
    module = LaBraM(**SMALL, drop_path=0.5)
    signal, sensors, _ = example()
    signal, sensors = jax.tree.map(lambda x: np.repeat(x[:1], 32, axis=0), (signal, sensors))
    rngs = {"dropout": jax.random.key(0)}
    drawn = np.asarray(encode(module, values, signal, sensors, train=True, rngs=rngs).tokens)
    again = encode(module, values, signal, sensors, train=True, rngs=rngs).tokens
    np.testing.assert_array_equal(drawn, again)

    def network(attention: int, mlp: int) -> np.ndarray:
        blocks = dict(values["params"]["blocks"])
        for name, factor in (("attention_scale", attention), ("mlp_scale", mlp)):
            blocks[name] = blocks[name] * np.array([[1], [factor]], np.float32)
        one = jax.tree.map(lambda x: x[:1], sensors)
        changed = {"params": {**values["params"], "blocks": blocks}}
        return np.asarray(encode(LaBraM(**SMALL), changed, signal[:1], one).tokens[0])

    four = np.stack([network(attention, mlp) for attention in (0, 2) for mlp in (0, 2)])
    distance = np.abs(drawn[:, None] - four).max((2, 3))
    assert (distance.min(1) < 1e-4).all()
    assert set(distance.argmin(1)) == {0, 1, 2, 3}


@pytest.mark.slow
def test_drop_path_is_off_outside_training_and_needs_its_random_stream(values: Any) -> None:
    module = LaBraM(**SMALL, drop_path=0.5)
    signal, sensors, _ = example()
    np.testing.assert_array_equal(
        encode(module, values, signal, sensors).tokens, encode(LaBraM(**SMALL), values, signal, sensors).tokens
    )
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        module.apply(values, signal, sensors, train=True)


def test_every_parameter_has_logical_axes(small: LaBraM) -> None:
    signal, sensors = small.example()
    boxed = jax.eval_shape(small.init, jax.random.key(0), signal, sensors, mask=jnp.zeros((1, 1, 1), bool))["params"]
    leaves = jax.tree.leaves_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    for path, leaf in leaves:
        assert isinstance(leaf, nn.LogicallyPartitioned), path
        assert len(leaf.names) == leaf.value.ndim, path
        assert (leaf.names[0] == "layers") == (path[0].key == "blocks"), path
    assert {name for _, leaf in leaves for name in leaf.names} == {
        None,
        "layers",
        "embed",
        "heads",
        "head_width",
        "mlp",
    }


@pytest.mark.slow
def test_initial_values(small: LaBraM) -> None:
    """Projections into the residual stream start smaller by √(2l) in layer l, residual scales at `layer_scale`."""
    blocks = nn.meta.unbox(jax.jit(small.init)(jax.random.key(0), *small.example()))["params"]["blocks"]
    for kernel in (blocks["attention"]["out"]["kernel"], blocks["mlp_out"]["kernel"]):
        spread = np.std(kernel, axis=tuple(range(1, kernel.ndim)))
        inner = np.std(blocks["mlp_in"]["kernel"])
        np.testing.assert_allclose(spread, inner / np.sqrt([2, 4]), rtol=0.03)
    np.testing.assert_array_equal(blocks["attention_scale"], np.full((2, 100), 0.1, np.float32))
