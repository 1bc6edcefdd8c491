"""A folder of weights that stands alone, as the Hugging Face hub keeps them: config.json, model.safetensors, README.md.

    zoo.export("eegnet_base", variables, "weights/eegnet_faces", options={"channels": names, "samples": 256})
    module, variables = zoo.load("weights/eegnet_faces")

Tensors are called as variables are, `collection/module/…/leaf`; those of a classifier begin with `head/`. The folder
is read back strictly: to the bit what was written, or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from zoo.data.recipes import Recipe, Window
from zoo.data.store import disk_errors, file_sha256, write_file, write_json
from zoo.encoders.codes import COLLECTION
from zoo.errors import ZooError
from zoo.registry import create, entry, list_models
from zoo.types import Variables
from zoo.weights.files import read, write
from zoo.weights.keys import Key, fill

FORMAT = 1
CONFIG, TENSORS, CARD = "config.json", "model.safetensors", "README.md"
MODEL, HEAD = "model", "head"
DTYPES = ("float32", "bfloat16", "float16")
PACKAGES = ("brain-zoo", "jax", "flax", "numpy", "safetensors")
ABOUT = ("about", "licence", "paper", "source", "source_sha256")


@dataclass(frozen=True)
class Weights:
    """A model with its variables, and what is known of them.

    name            what they are called
    module          the model, and `variables` of it
    classes         of the classifier `module.head(classes)`, whose variables are `head`; 0 where there is none
    recipe          what a recording must have gone through
    window_seconds  length of window that it was trained on
    lacks           collections that the module needs and no file gave: that of an encoder's tokenizer, if any
    extra           variables that the module does not make of its example, such as the token of a mask
    about           of "about", "licence", "paper", "source", "source_sha256" what is known
    """

    name: str
    module: nn.Module
    variables: Variables
    classes: int = 0
    head: Variables = field(default_factory=dict)
    recipe: Recipe | None = None
    window_seconds: float | None = None
    lacks: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)


def export(
    model: str | nn.Module,
    variables: Variables,
    folder: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    name: str = "",
    classes: int = 0,
    head: Variables | None = None,
    recipe: Recipe | None = None,
    window_seconds: float | None = None,
    extra: Collection[str] = (),
    about: Mapping[str, str] | None = None,
) -> Path:
    """Writes variables of a model to a new folder, whole or not at all, and returns it.

    model    a registered name, with its `options`, or a module of a registered kind
    name     what the folder's model is called; by default the folder's name
    classes  of the classifier with variables `head`
    recipe, window_seconds
             what a recording must have gone through, and the window; for `zoo embed`
    extra    names of variables that the module does not make of its example, such as params/embed_mask
    about    of "about", "licence", "paper", "source", "source_sha256" what is to be told

    Raises ZooError where variables and model do not fit, listing everything that does not, for a module whose options
    cannot be written, and for a folder that holds something.
    """
    module = create(model, **(options or {})) if isinstance(model, str) else model
    return write_folder(
        Weights(
            name or Path(folder).name,
            module,
            variables,
            classes,
            head or {},
            recipe,
            window_seconds,
            extra=tuple(extra),
            about=about or {},
        ),
        folder,
    )


def write_folder(weights: Weights, folder: str | Path, files: Mapping[str, str] | None = None) -> Path:
    """`export` of what was loaded, with more text files beside it."""
    folder = Path(folder)
    for known in weights.about:
        if known not in ABOUT:
            raise ZooError(f"export: about has {known!r}, wanted of {', '.join(ABOUT)}")
    if bool(weights.classes) != bool(weights.head):
        raise ZooError(f"export: got {weights.classes} classes and {len(weights.head)} collections of a head")
    arch, options = described(weights.module)
    tensors = _named(weights.variables) | {f"{HEAD}/{name}": leaf for name, leaf in _named(weights.head).items()}
    lacks = _fitted(tensors, weights.module, weights.classes, weights.extra)[2]
    with new_folder(folder) as scratch:
        write(scratch / TENSORS, tensors, {"format": "brain-zoo", "model": arch})
        config = {
            "format": FORMAT,
            "name": weights.name,
            "arch": arch,
            "options": options,
            "classes": weights.classes,
            "lacks": list(lacks),
            "extra": list(weights.extra),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(weights.variables.get("params", {}))),
            "input": input_of(weights),
            "about": dict(weights.about),
            "weights_sha256": file_sha256(scratch / TENSORS),
            "versions": {package: version(package) for package in PACKAGES},
        }
        write_json(scratch / CONFIG, config)
        for name, text in {CARD: _card(config), **(files or {})}.items():
            write_file(scratch / name, text.encode())
    return folder


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write to, which takes its name when all is written, and is gone where it is not.

    Raises ZooError where `folder` holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ZooError(f"{folder}: exists and is not empty; choose another folder")
    with disk_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield scratch
        with disk_errors(folder):
            scratch.chmod(0o755)
            for file in scratch.iterdir():
                file.chmod(0o644)  # safetensors lets only its writer read
            os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_folder(folder: str | Path) -> Weights:
    """What `export` wrote. Raises ZooError for a folder whose files are not whole, not its own, or do not fit."""
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text())
        found = config["format"]
    except FileNotFoundError as error:
        raise ZooError(f"{folder}: no {CONFIG} in it: not an exported model") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ZooError(f"{folder / CONFIG}: not that of an exported model: {error}") from error
    if found != FORMAT:
        raise ZooError(f"{folder / CONFIG}: format {found}, wanted {FORMAT}")
    try:
        module = create(config["arch"], **restored(config["options"]))
        classes, given = config["classes"], config["input"]
        lacks, extra = tuple(config["lacks"]), tuple(config["extra"])
        recipe = given["recipe"] and _recipe(given["recipe"])
        name, window, about = config["name"], given["window_seconds"], dict(config["about"])
        sha256 = config["weights_sha256"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ZooError(f"{folder / CONFIG}: not that of an exported model: {error!r}") from error
    tensors = read(folder / TENSORS, sha256=sha256)
    variables, head, found = _fitted(tensors, module, classes, extra)
    if found != lacks:
        raise ZooError(f"{folder}: its {CONFIG} says that it lacks {lacks}, its tensors {found}")
    return Weights(name, module, variables, classes, head, recipe or None, window, lacks, extra, about)


def initial(module: Any, classes: int = 0) -> dict[str, Any]:
    """Variables as `init` makes them, without boxes: {collection: {"model": the module's, "head": its head's}}."""
    key = jax.random.key(0)
    parts = {MODEL: nn.meta.unbox(module.init(key, *module.example()))}
    if classes:
        parts[HEAD] = nn.meta.unbox(module.head(classes).init(key, jnp.zeros((1, module.features))))
    collections: dict[str, Any] = {}
    for part, variables in parts.items():
        for collection, inner in variables.items():
            collections.setdefault(collection, {})[part] = inner
    return collections


def made(module: Any, classes: int = 0) -> dict[str, Any]:
    """Their shapes."""
    return jax.eval_shape(lambda: initial(module, classes))


def part_of(variables: Variables, part: str) -> dict[str, Any]:
    """The module's variables ("model"), or the classifier's ("head"), of what `made` makes."""
    return {collection: inner[part] for collection, inner in variables.items() if part in inner}


def without_tokenizer(variables: dict[str, Any], given: Collection[str]) -> tuple[str, ...]:
    """Takes an encoder's tokenizer out of what `made` made where no collection given is its; tells what is lacking."""
    if COLLECTION in given or variables.pop(COLLECTION, None) is None:
        return ()
    return (COLLECTION,)


def called(leaf: str) -> str:
    """What our files call a leaf of `made`."""
    collection, part, rest = leaf.split("/", 2)
    return f"{collection}/{rest}" if part == MODEL else f"{HEAD}/{collection}/{rest}"


def described(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """The registered name nearest to a module, and the options that make it that module, as plain values."""
    best: tuple[str, dict[str, Any]] | None = None
    for name in list_models():
        if entry(name).constructor is not type(module):
            continue
        plain, other = _fields(module), _fields(create(name))
        options = {option: value for option, value in plain.items() if value != other[option]}
        if best is None or len(options) < len(best[1]):
            best = name, options
    if best is None:
        raise ZooError(f"{type(module).__name__} is no registered model: no name would make it again")
    return best


def restored(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Options from JSON: lists become the tuples that modules have, the name of a dtype a dtype."""
    options = {name: _tuples(value) for name, value in plain.items()}
    if options.get("dtype") in DTYPES:
        options["dtype"] = getattr(jnp, options["dtype"])
    return options


def on_device(variables: Variables) -> Variables:
    """The same as JAX's arrays."""
    return jax.tree.map(jnp.asarray, variables)


def _tuples(plain: Any) -> Any:
    if isinstance(plain, Mapping):
        return {name: _tuples(value) for name, value in plain.items()}
    return tuple(map(_tuples, plain)) if isinstance(plain, list) else plain


def _fields(module: nn.Module) -> dict[str, Any]:
    return {
        each.name: _plain(f"{type(module).__name__} {each.name}", getattr(module, each.name))
        for each in fields(module)
        if each.name not in ("parent", "name")
    }


def _plain(what: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_plain(what, each) for each in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(what, each) for name, each in value.items()}
    try:
        return jnp.dtype(value).name
    except TypeError as error:
        raise ZooError(f"{what}: {value!r} cannot be written to JSON") from error


def _named(variables: Variables) -> dict[str, np.ndarray]:
    """Every variable by its path, on the host."""
    flat = flax.traverse_util.flatten_dict(dict(nn.meta.unbox(variables)), sep="/")
    return {name: np.asarray(leaf) for name, leaf in flat.items()}


def _fitted(
    tensors: Mapping[str, np.ndarray], module: nn.Module, classes: int, extra: Collection[str]
) -> tuple[Variables, Variables, tuple[str, ...]]:
    """(variables of the module, of its head, what it lacks) from tensors by their own names; strictly."""
    whole = made(module, classes)
    lacks = without_tokenizer(whole, {name.partition("/")[0] for name in tensors})
    leaves = flax.traverse_util.flatten_dict(whole, sep="/")
    for name in extra:
        collection, _, rest = name.partition("/")
        if name not in tensors:
            raise ZooError(f"export: there is no variable {name} of the extra ones")
        leaves[f"{collection}/{MODEL}/{rest}"] = tensors[name]
    rules = [Key(called(leaf), leaf) for leaf in leaves]
    filled = on_device(fill(rules, tensors, flax.traverse_util.unflatten_dict(leaves, sep="/"))[0])
    return part_of(filled, MODEL), part_of(filled, HEAD), lacks


def input_of(weights: Weights) -> dict[str, Any]:
    """What a recording must be for a model, as plain values."""
    module: Any = weights.module
    montage = getattr(module, "montage", None)
    return {
        "rate_hz": getattr(module, "sampling_rate", None),
        "kinds": list(getattr(module, "TAKES", ())),
        "channels": list(montage) if isinstance(montage, tuple) else montage,
        "recipe": weights.recipe.to_json() if weights.recipe else None,
        "window_seconds": weights.window_seconds,
    }


def _recipe(plain: Mapping[str, Any]) -> Recipe:
    values = _tuples(plain)
    return Recipe(**{**values, "window": values["window"] and Window(**values["window"])})


def _card(config: Mapping[str, Any]) -> str:
    """README.md, with the hub's front matter."""
    about, given, card = config["about"], config["input"], entry(config["arch"]).card
    options = "".join(f", {name} {value}" for name, value in config["options"].items())
    rows = {
        "Model": f"{config['arch']}{options}: {card.title}",
        "Parameters": f"{config['parameters']:,}",
        "Classifier": f"{config['classes']} classes" if config["classes"] else "",
        "Lacks": ", ".join(config["lacks"]),
        "Input": card.inputs,
        "Recipe": given["recipe"]["name"] if given["recipe"] else "",
        "Window": f"{given['window_seconds']:g} s" if given["window_seconds"] else "",
        "Trained on": about.get("about", ""),
        "Paper": about.get("paper") or card.paper,
        "Source": about.get("source", ""),
        "Source's sha256": about.get("source_sha256", ""),
        "Licence": about.get("licence", ""),
    }
    front = ["---", "library_name: brain-zoo", "tags: [brain-signals, jax, flax]"]
    if about.get("licence"):
        front.append(f"license: {about['licence'].lower()}")
    table = [f"| {title} | {text} |" for title, text in rows.items() if text]
    use = ["```python", "import zoo", "", 'module, variables = zoo.load("this/folder")', "```"]
    return "\n".join([*front, "---", f"# {config['name']}", "", "| | |", "| --- | --- |", *table, "", *use, ""])
