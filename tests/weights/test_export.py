"""Folders of weights: to the bit what was exported, or refused."""

from __future__ import annotations

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import drawn

import zoo
from zoo.data.recipes import RECIPES
from zoo.encoders.encoder import LinearHead
from zoo.errors import ZooError
from zoo.weights.files import read, write
from zoo.weights.folder import described
from zoo.weights.keys import WeightsMismatch
from zoo.weights.load import load_weights

SMALL = {"depth": 1, "dim": 100, "heads": 4, "conv_features": 4}
ENCODER = zoo.create("labram_tiny", depth=1, dtype=jnp.bfloat16)
TOKENIZER = zoo.create("ephys_tokenizer_tiny", units=8, wave=4)


@pytest.fixture(scope="module")
def variables():
    return drawn(ENCODER)


@pytest.fixture
def folder(variables, tmp_path):
    head = drawn(LinearHead(2), np.zeros((1, 100), np.float32))
    about = {"licence": "CC-BY-4.0", "about": "nothing"}
    options = {"classes": 2, "head": head, "recipe": RECIPES["labram"], "window_seconds": 4.0, "about": about}
    return zoo.export(ENCODER, variables, tmp_path / "small", **options)


def same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(lambda *pair: np.testing.assert_array_equal(*map(np.asarray, pair), strict=True), found, wanted)


def test_what_is_exported_is_loaded_to_the_bit_with_all_that_is_known_of_it(folder, variables):
    found = load_weights(folder)
    assert found.module == ENCODER
    assert found.name == "small"
    same(found.variables, variables)
    same(found.head, drawn(LinearHead(2), np.zeros((1, 100), np.float32)))
    assert (found.classes, found.recipe, found.window_seconds) == (2, RECIPES["labram"], 4.0)
    assert found.about == {"licence": "CC-BY-4.0", "about": "nothing"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["arch"], config["options"]) == ("labram_tiny", {"depth": 1, "dtype": "bfloat16"})
    assert config["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def test_a_name_will_do_for_a_module_and_other_collections_go_along(tmp_path):
    variables = drawn(TOKENIZER)
    zoo.export("ephys_tokenizer_tiny", variables, tmp_path / "a/b", options={"units": 8, "wave": 4})
    module, found = zoo.load(tmp_path / "a/b")
    assert module == TOKENIZER
    same(found, variables)
    assert np.asarray(found["schedule"]["step"]).dtype == np.int32
    with pytest.raises(ZooError, match="no classifier came with these weights"):
        zoo.load_head(tmp_path / "a/b")


def test_the_token_of_a_mask_goes_along_where_it_is_named(variables, tmp_path):
    pretrained = {"params": {**variables["params"], "embed_mask": np.ones(100, np.float32)}}
    with pytest.raises(WeightsMismatch, match=r"extra tensor params/embed_mask \[100\]"):
        zoo.export(ENCODER, pretrained, tmp_path / "out")
    with pytest.raises(ZooError, match="no variable params/mask of the extra ones"):
        zoo.export(ENCODER, pretrained, tmp_path / "out", extra=["params/mask"])
    zoo.export(ENCODER, pretrained, tmp_path / "out", extra=["params/embed_mask"])
    found = load_weights(tmp_path / "out")
    same(found.variables, pretrained)
    assert found.extra == ("params/embed_mask",)


def test_loaded_weights_compute_what_they_did(folder, variables):
    module, found = zoo.load(folder)
    _, sensors = module.example()
    signal = np.random.default_rng(1).normal(size=(1, 1, 200)).astype(np.float32)
    encode = jax.jit(lambda given: module.apply(given, signal, sensors).pooled)
    np.testing.assert_array_equal(encode(found), encode(jax.tree.map(jnp.asarray, variables)))


def test_variables_that_do_not_fit_are_refused_and_leave_nothing(variables, tmp_path):
    with pytest.raises(WeightsMismatch) as caught:
        zoo.export(zoo.create("labram_tiny", depth=2), variables, tmp_path / "out")
    assert len(caught.value.problems) > 10
    with pytest.raises(WeightsMismatch, match="schedule/step"):
        zoo.export(TOKENIZER, {"params": drawn(TOKENIZER)["params"]}, tmp_path / "out")
    with pytest.raises(ZooError, match="got 3 classes and 0 collections of a head"):
        zoo.export(ENCODER, variables, tmp_path / "out", classes=3)
    with pytest.raises(ZooError, match="about has 'license'"):
        zoo.export(ENCODER, variables, tmp_path / "out", about={"license": "MIT"})
    with pytest.raises(ZooError, match="LinearHead is no registered model"):
        zoo.export(LinearHead(2), variables, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(folder, variables):
    before = {each.name: each.read_bytes() for each in folder.iterdir()}
    with pytest.raises(ZooError, match="exists and is not empty"):
        zoo.export(ENCODER, variables, folder)
    assert {each.name: each.read_bytes() for each in folder.iterdir()} == before


def test_a_full_disk_leaves_nothing(variables, tmp_path, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ZooError, match="the disk is full"):
        zoo.export(ENCODER, variables, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def changed(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def test_a_configuration_that_is_not_the_tensors_own(folder):
    with pytest.raises(WeightsMismatch, match=r"query/kernel \[1, 100, 4, 25\]: wanted"):
        zoo.load(changed(folder, options={"depth": 2}))
    with pytest.raises(WeightsMismatch, match="head/params/linear/bias"):
        zoo.load(changed(folder, options={"depth": 1}, classes=0))
    with pytest.raises(ZooError, match="no option 'dept'"):
        zoo.load(changed(folder, options={"dept": 1}))
    with pytest.raises(ZooError, match=r"no model is called 'os\.system'"):
        zoo.load(changed(folder, arch="os.system"))
    with pytest.raises(ZooError, match="format 2, wanted 1"):
        zoo.load(changed(folder, format=2))
    with pytest.raises(ZooError, match="not that of an exported model"):
        zoo.load(changed(folder, format=1, arch="labram_tiny", options={}, input={}))
    (folder / "config.json").write_text("[")
    with pytest.raises(ZooError, match="not that of an exported model"):
        zoo.load(folder)


def test_tensors_that_were_changed_later(folder):
    tensors = read(folder / "model.safetensors")
    name = sorted(tensors)[0]
    write(folder / "model.safetensors", {**tensors, name: tensors[name] + 1})
    with pytest.raises(ZooError, match="it is not the file it should be"):
        zoo.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ZooError, match=r"model\.safetensors: no such file"):
        zoo.load(folder)


def test_the_nearest_registered_name_is_told():
    assert described(zoo.create("labram_base")) == ("labram_base", {})
    assert described(zoo.create("labram_huge", depth=4)) == ("labram_huge", {"depth": 4})
    with pytest.raises(ZooError, match="LaBraM dtype: <object object at"):
        described(zoo.create("labram_base", dtype=object()))
