"""Names → constructors and cards: the one list of everything the zoo can build."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn

from zoo.errors import ZooError
from zoo.types import Variables

MODULES = (
    "zoo.encoders.adhdeepnet",
    "zoo.encoders.artifactgen",
    "zoo.encoders.biot",
    "zoo.encoders.cbramod",
    "zoo.encoders.barista",
    "zoo.encoders.brainomni",
    "zoo.encoders.codes",
    "zoo.encoders.du_in",
    "zoo.encoders.deep4",
    "zoo.encoders.eeg_conformer",
    "zoo.encoders.eegnet",
    "zoo.encoders.eegpt",
    "zoo.encoders.eeg_vae",
    "zoo.encoders.geometric",
    "zoo.encoders.glim",
    "zoo.encoders.iclabel",
    "zoo.encoders.histn",
    "zoo.encoders.eegdm",
    "zoo.encoders.labram",
    "zoo.encoders.meg_gpt",
    "zoo.encoders.meg_image",
    "zoo.encoders.neurobridge",
    "zoo.encoders.mtam",
    "zoo.encoders.neurobolt",
    "zoo.encoders.neurocog_text",
    "zoo.encoders.rbtransformer",
    "zoo.encoders.regions",
    "zoo.encoders.reve",
    "zoo.encoders.sequence",
    "zoo.encoders.simple_conv",
    "zoo.encoders.tfm",
    "zoo.encoders.mvcnet",
    "zoo.encoders.shallow",
    "zoo.tokenizers.brainomni",
    "zoo.tokenizers.dewave",
    "zoo.tokenizers.du_in",
    "zoo.tokenizers.fixed",
    "zoo.tokenizers.labram_vqnsp",
    "zoo.tokenizers.neurorvq",
    "zoo.tokenizers.tfm",
    "zoo.tokenizers.meg_gpt",
)
"""Model files. Each registers its variants when it is imported."""


@dataclass(frozen=True)
class Card:
    """What `zoo info` tells of a model. `parameters` is the published count of the module alone."""

    title: str
    paper: str
    code: str
    licence: str
    inputs: str
    parameters: int
    evidence: str


@dataclass(frozen=True)
class Entry:
    """One registered variant: its constructor, the options that make it, and its card."""

    constructor: Callable[..., nn.Module]
    options: Mapping[str, Any]
    card: Card


_ENTRIES: dict[str, Entry] = {}


def register(name: str, constructor: Callable[..., nn.Module], options: Mapping[str, Any], card: Card) -> None:
    """Adds the variant `name` (`arch_size`). Called by model files at import."""
    if name in _ENTRIES:
        raise ValueError(f"model {name!r} is registered twice")
    _ENTRIES[name] = Entry(constructor, dict(options), card)


def entry(name: str) -> Entry:
    """The entry called `name`. Raises ZooError with the nearest name when there is none."""
    _import_models()
    if name not in _ENTRIES:
        near = difflib.get_close_matches(name, _ENTRIES, n=1, cutoff=0.0)
        raise ZooError(f"no model is called {name!r}; the nearest name is {near[0]!r} (see `zoo list`)")
    return _ENTRIES[name]


def create(name: str, **options: Any) -> nn.Module:
    """The Flax module of variant `name`, its published options replaced by `options`.

    Raises ZooError for an unknown name or option, naming the nearest right one.
    """
    found = entry(name)
    known = set(getattr(found.constructor, "__dataclass_fields__", ())) - {"parent", "name"}
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.0)
            raise ZooError(f"{name} has no option {option!r}; the nearest is {near[0]!r}")
    # A module of its own, also where another module's method asks for it.
    alone = {"parent": None} if known else {}
    return found.constructor(**{**found.options, **options, **alone})


def load(name: str | Path, *, source: str | Path = "") -> tuple[nn.Module, Variables]:
    """A module and its trained variables: of published weights, a run, an exported folder or the Hugging Face hub.

    See `zoo.weights.load.load`.
    """
    from zoo.weights.load import load as load_weights

    return load_weights(name, source=source)


def list_models(pattern: str = "") -> list[str]:
    """Registered names that contain `pattern`, sorted."""
    _import_models()
    return sorted(name for name in _ENTRIES if pattern in name)


def parameter_count(encoder: nn.Module) -> int:
    """Parameters of an encoder for input of its own kind, without making them."""
    import jax

    example = encoder.example()
    variables = jax.eval_shape(encoder.init, jax.random.key(0), *example)
    return sum(leaf.size for leaf in jax.tree.leaves(variables.get("params", {})))


def _import_models() -> None:
    for module in MODULES:
        importlib.import_module(module)
