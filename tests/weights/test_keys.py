"""Key maps are strict: what is missing, extra, moved or broken is listed, all of it, and nothing is returned."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published import drawn, written

import zoo
from zoo.errors import ZooError
from zoo.tokenizers import meg_gpt
from zoo.weights.files import read, write
from zoo.weights.keys import Fresh, Ignore, Key, WeightsMismatch, below, fill

RULES = (
    Key("embed.weight", "params/embed/kernel", "o i 1 t -> t i o"),
    Key("blocks.{l}.qkv", "params/blocks/query[{l}]", "(h k) d -> d h k", part=(0, 3)),
    Key("blocks.{l}.qkv", "params/blocks/key[{l}]", "(h k) d -> d h k", part=(1, 3)),
    Key("blocks.{l}.qkv", "params/blocks/value[{l}]", "(h k) d -> d h k", part=(2, 3)),
    Key("blocks.{l}.copy.{l}", "params/blocks/bias[{l}]"),
    Key("count", "batch_stats/count"),
    Ignore("again", "the same, listed twice", same_as="embed.weight"),
    Ignore("blocks.{l}.counter", "a counter"),
    Fresh("schedule/step", "no file tells it"),
)


def leaves() -> dict[str, Any]:
    return {
        "params": {
            "embed": {"kernel": np.zeros((4, 2, 3), np.float32)},
            "blocks": {
                **{name: np.zeros((2, 5, 2, 3), np.float32) for name in ("query", "key", "value")},
                "bias": np.zeros((2, 7), np.float32),
            },
        },
        "batch_stats": {"count": np.zeros((), np.int32)},
        "schedule": {"step": np.int32(11)},
    }


def tensors() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0).normal
    found = {"embed.weight": draw(size=(3, 2, 1, 4)), "count": np.array(9)}
    for layer in "01":
        found |= {f"blocks.{layer}.qkv": draw(size=(18, 5)), f"blocks.{layer}.copy.{layer}": draw(size=7)}
        found |= {f"blocks.{layer}.counter": np.array(3)}
    return {**found, "again": found["embed.weight"]}


def problems(rules, given, variables=None) -> tuple[str, ...]:
    with pytest.raises(WeightsMismatch) as caught:
        fill(rules, given, leaves() if variables is None else variables)
    assert all(each in str(caught.value) for each in caught.value.problems)
    return caught.value.problems


def test_every_rule_does_what_it_says():
    given = tensors()
    filled, ledger = fill(RULES, given, leaves())
    moved = given["embed.weight"].astype(np.float32)
    np.testing.assert_array_equal(filled["params"]["embed"]["kernel"], moved[:, :, 0].transpose(2, 1, 0), strict=True)
    for layer in range(2):
        parts = given[f"blocks.{layer}.qkv"].astype(np.float32).reshape(3, 2, 3, 5).transpose(0, 3, 1, 2)
        for name, part in zip(("query", "key", "value"), parts, strict=True):
            np.testing.assert_array_equal(filled["params"]["blocks"][name][layer], part)
        bias = given[f"blocks.{layer}.copy.{layer}"].astype(np.float32)
        np.testing.assert_array_equal(filled["params"]["blocks"]["bias"][layer], bias)
    assert filled["batch_stats"]["count"] == 9
    assert filled["schedule"]["step"] == 11
    assert len(ledger) == 14
    row = next(each for each in ledger if each.target == "params/embed/kernel")
    assert (row.source_shape, row.target_shape, row.done) == ((3, 2, 1, 4), (4, 2, 3), "o i 1 t -> t i o")
    assert row.norm == pytest.approx(np.linalg.norm(given["embed.weight"]))
    done = {each.source or each.target: each.done for each in ledger}
    assert done["schedule/step"] == "as made: no file tells it"
    assert done["again"] == "left out: the same, listed twice"


def test_rules_of_a_module_inside_another():
    moved = below(RULES, "encoder", "model.")
    given = {f"model.{name}": tensor for name, tensor in tensors().items()}
    filled, _ = fill(moved, given, {name: {"encoder": inner} for name, inner in leaves().items()})
    wanted, _ = fill(RULES, tensors(), leaves())
    jax.tree.map(np.testing.assert_array_equal, {name: inner["encoder"] for name, inner in filled.items()}, wanted)


def test_shapes_alone_will_do_where_nothing_stays_as_it_was_made():
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), leaves())
    assert problems(RULES, tensors(), abstract) == (
        "schedule/step: wanted values to leave as they were made, got shapes only",
        "schedule/step []: no tensor fills it",
    )
    del abstract["schedule"]
    filled, _ = fill(RULES[:-1], tensors(), abstract)
    assert filled["batch_stats"]["count"] == 9


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"embed.weight": None, "again": None}, "missing tensor embed.weight"),
        ({"blocks.1.qkv": None}, "params/blocks/query [2, 5, 2, 3]: no tensor fills layers 1"),
        ({"blocks.2.qkv": np.zeros((18, 5))}, "params/blocks/query has 2 layers, got one more, number 2"),
        ({"blocks.00.qkv": np.zeros((18, 5))}, "is filled already, by blocks.0.qkv"),
        ({"blocks.0.copy.1": np.zeros(7)}, "extra tensor blocks.0.copy.1 [7]: nothing here takes it"),
        ({"blocks.x.qkv": np.zeros((18, 5))}, "extra tensor blocks.x.qkv [18, 5]"),
        ({"blocks.0.qkv": np.zeros((17, 5))}, "wanted a first axis of 3 equal parts"),
        ({"blocks.0.qkv": np.zeros((5, 18))}, "wanted a first axis of 3 equal parts"),
        ({"blocks.0.qkv": np.zeros((18, 6))}, "(part 1 of 3), moved as '(h k) d -> d h k': wanted params/blocks/query"),
        ({"blocks.0.copy.0": np.zeros((7, 1))}, "blocks.0.copy.0 [7, 1]: wanted params/blocks/bias[0] [7]"),
        ({"blocks.0.copy.0": np.full(7, np.nan)}, "blocks.0.copy.0: 7 of its numbers are not finite"),
        ({"blocks.0.copy.0": np.full(7, 1e300)}, "numbers of float64 that params/blocks/bias[0] [7] of float32"),
        ({"blocks.0.copy.0": np.full(7, "1")}, "blocks.0.copy.0: wanted numbers, got <U1"),
        ({"count": np.array(9.5)}, "count: numbers of float64 that batch_stats/count [] of int32 cannot hold"),
        ({"again": np.zeros(3)}, "again: wanted a repetition of embed.weight, got other numbers"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit(change, cause):
    changed = {name: tensor for name, tensor in {**tensors(), **change}.items() if tensor is not None}
    assert any(cause in each for each in problems(RULES, changed)), cause


@pytest.mark.parametrize(
    ("rules", "cause"),
    [
        ((*RULES, Key("count", "params/blocks/bias")), "count: params/blocks/bias [2, 7] is filled already"),
        ((*RULES, Key("count", "params/absent")), "count []: there is no leaf params/absent to put it in"),
        ((*RULES, Ignore("count", "twice")), "count []: wanted every part used once, got 1/1, 1/1"),
        (RULES[:3] + RULES[4:], "blocks.0.qkv [18, 5]: wanted every part used once, got 1/3, 2/3"),
        ((*RULES, Fresh("params/absent", "no reason")), "no leaf params/absent to leave as it was made"),
        ((Key("count", "params/embed/kernel[0]"), *RULES), "embed.weight: params/embed/kernel [4, 2, 3] is filled"),
    ],
)
def test_a_map_that_does_not_fit(rules, cause):
    assert any(cause in each for each in problems(rules, tensors())), cause


def test_bfloat16_fits_float32():
    half = {name: t.astype(ml_dtypes.bfloat16) if t.ndim else t for name, t in tensors().items()}
    filled, _ = fill(RULES, half, leaves())
    found = filled["params"]["blocks"]["bias"][0]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, half["blocks.0.copy.0"].astype(np.float32))


# A real map, broken at random


TOKENIZER = zoo.create("ephys_tokenizer", vocabulary=6, units=6, wave=4)


LEFT_OUT = "token_weights_layer._temperature"
VARIABLES = drawn(TOKENIZER)
FILE = {**written(meg_gpt.KEYS, VARIABLES), LEFT_OUT: np.array(0.001)}


def halved(tensor: np.ndarray) -> np.ndarray:
    return tensor[: len(tensor) // 2] if tensor.ndim else np.zeros(2)


def with_nan(tensor: np.ndarray) -> np.ndarray:
    return np.where(np.arange(tensor.size).reshape(tensor.shape) == 0, np.nan, tensor)


BREAKS = {
    "dropped": lambda name, tensor: {},
    "renamed": lambda name, tensor: {name + "_": tensor},
    "doubled": lambda name, tensor: {name: tensor, "ema." + name: tensor},
    "half": lambda name, tensor: {name: halved(tensor)},
    "transposed": lambda name, tensor: {name: np.moveaxis(tensor, 0, -1) if tensor.ndim else tensor},
    "flattened": lambda name, tensor: {name: tensor.reshape(-1, 1)},
    "not finite": lambda name, tensor: {name: with_nan(tensor)},
}


def test_the_file_unbroken_is_what_the_variables_were():
    filled, _ = fill(meg_gpt.KEYS, FILE, VARIABLES)
    jax.tree.map(lambda *pair: np.testing.assert_array_equal(*pair, strict=True), filled, VARIABLES)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(sorted(FILE)), st.sampled_from(sorted(BREAKS)), min_size=1, max_size=6))
def test_every_break_is_caught_and_all_are_listed_together(breaks):
    broken, caught = dict(FILE), []
    for name, how in breaks.items():
        before = broken.pop(name)
        after = BREAKS[how](name, before)
        broken |= after
        # A tensor that is left out may be anything, or missing; what has its old shape, as the transpose of a square
        # or of a vector has, cannot be told from it.
        same = how in ("transposed", "flattened") and after[name].shape == before.shape
        if not same and (name != LEFT_OUT or set(after) - {name}):
            caught += sorted(set(after) - {name}) or [name]
    if not caught:
        fill(meg_gpt.KEYS, broken, VARIABLES)
        return
    said = str(problems(meg_gpt.KEYS, broken, VARIABLES))
    assert all(name in said for name in caught)


def test_what_no_shape_can_tell_the_hash_of_the_file_does(tmp_path):
    """The transpose of a square, and other numbers of the same shape, fit: only the card's sha256 knows better."""
    square = "token_weights_layer.dense_layer.weight"
    changed = {**FILE, square: FILE[square].T}
    assert not np.array_equal(changed[square], FILE[square])
    filled, _ = fill(meg_gpt.KEYS, changed, VARIABLES)
    assert not np.array_equal(filled["params"]["logits"]["kernel"], VARIABLES["params"]["logits"]["kernel"])
    write(tmp_path / "published.safetensors", FILE)
    known = sha256((tmp_path / "published.safetensors").read_bytes()).hexdigest()
    read(tmp_path / "published.safetensors", sha256=known)
    write(tmp_path / "changed.safetensors", changed)
    with pytest.raises(ZooError, match="is not the file it should be"):
        read(tmp_path / "changed.safetensors", sha256=known)
