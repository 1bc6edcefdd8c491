"""The list of models: what is registered fits its card, and a run gives its encoder back."""

from __future__ import annotations

import subprocess
import sys

import jax
import pytest

import zoo
from zoo.encoders.iclabel import CLASSES, ICLabel
from zoo.errors import ZooError
from zoo.registry import entry, register
from zoo.types import Encoded, Tokenized


@pytest.mark.parametrize("name", zoo.list_models())
def test_every_variant_takes_its_example_and_has_the_parameters_of_its_card(name):
    card = entry(name).card
    model = zoo.create(name)
    given = model.example()
    keys = {"params": jax.random.key(0), "codes": jax.random.key(1)}
    variables = jax.eval_shape(model.init, keys, *given)
    out = jax.eval_shape(model.apply, variables, *given)
    if isinstance(out, Encoded):
        batch, tokens, _ = out.tokens.shape
        assert out.pooled.shape == (batch, model.features)
        assert out.valid.shape == (batch, tokens)
        assert batch == given[0].shape[0]
    elif isinstance(out, Tokenized):
        rows, frames = model.grid(*given[0].shape[1:])
        assert out.codes.shape == (len(given[0]), rows * frames, len(model.code_sizes))
        assert out.reconstruction.shape == given[0].shape
    elif isinstance(model, ICLabel):
        assert out.shape == (len(given[0]), len(CLASSES))
    else:
        assert out.shape == (*given[0].shape, model.vocabulary)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables.get("params", {}))) == card.parameters
    assert all((card.title, card.paper, card.code, card.licence, card.inputs, card.evidence))


def test_listing_by_pattern():
    assert zoo.list_models("labram_b") == ["labram_base"]
    assert zoo.list_models() == sorted(zoo.list_models())


@pytest.mark.parametrize(("name", "near"), [("labram_hug", "labram_huge"), ("LaBraM-base", "labram_base"), ("x", "")])
def test_an_unknown_model_gets_the_nearest(name, near):
    with pytest.raises(ZooError, match=rf"no model is called '{name}'; the nearest name is '{near}"):
        zoo.create(name)


def test_an_unknown_option_gets_the_nearest():
    with pytest.raises(ZooError, match=r"labram_tiny has no option 'dept'; the nearest is 'depth'"):
        zoo.create("labram_tiny", dept=3)


def test_options_replace_those_of_the_variant():
    assert zoo.create("labram_tiny", depth=1).depth == 1
    assert zoo.create("labram_tiny").depth != 1


def test_a_name_is_registered_once():
    found = entry("labram_tiny")
    with pytest.raises(ValueError, match="'labram_tiny' is registered twice"):
        register("labram_tiny", found.constructor, found.options, found.card)


def test_importing_zoo_does_not_import_jax():
    code = "import sys, zoo; print('jax' in sys.modules, len(zoo.list_models()) > 0, 'jax' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "False True True\n"
