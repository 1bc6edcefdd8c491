"""Files of other frameworks to folders of ours, with a ledger of every tensor.

zoo convert model.pt weights/labram --arch labram_base --head 4
"""

from __future__ import annotations

import ast
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from zoo.data.recipes import recipe as recipe_called
from zoo.data.store import file_sha256
from zoo.encoders.codes import COLLECTION
from zoo.errors import ZooError
from zoo.registry import create, entry
from zoo.types import Variables
from zoo.weights.cards import PRETRAINED
from zoo.weights.files import read
from zoo.weights.folder import (
    HEAD,
    MODEL,
    Weights,
    called,
    initial,
    made,
    on_device,
    part_of,
    without_tokenizer,
    write_folder,
)
from zoo.weights.keys import Key, Row, Rule, below, fill, kept


@dataclass(frozen=True)
class Options:
    """Weights of another framework → a folder of ours: `zoo convert SOURCE OUT --arch NAME [OPTIONS]`.

    SOURCE is a .safetensors, .npz, .pt, .pth, .ckpt, .bin or .onnx file, or the name of published weights (`zoo list`),
    which need no options. OUT gets config.json, model.safetensors, README.md, ledger.json and ledger.txt.

    Attributes:
        arch: registered model
        option: options of the model, as NAME VALUE pairs
        head: classes of the classifier that the file has beside the encoder; 0: none
        keys: which of the model's key maps: "" for the official code's, or such as braindecode
        unwrap: dictionary within the file that holds the tensors, such as state_dict
        recipe: named recipe that a recording must have gone through
        window_seconds: length of window that the model was trained on
        licence: of the weights
    """

    arch: str = ""
    option: Mapping[str, str] = field(default_factory=dict)
    head: int = 0
    keys: str = ""
    unwrap: str = ""
    recipe: str = ""
    window_seconds: float | None = None
    licence: str = ""


def convert(source: str | Path, out: str | Path, chosen: Options) -> tuple[Row, ...]:
    """`zoo convert`: writes the folder `out`, prints the counts, and returns the ledger.

    Raises ZooError: a file that cannot be trusted (`zoo.weights.files`), a model without a key map, tensors that do not
    fit it, listing all of them, and a folder that holds something. Nothing is written then.
    """
    if str(source) in PRETRAINED:
        from zoo.weights.load import from_card

        if chosen != Options():
            raise ZooError(f"{source}: published weights have options of their own, wanted none")
        weights, rows = from_card(PRETRAINED[str(source)])
    else:
        if not chosen.arch:
            raise ZooError("zoo convert: wanted --arch NAME, a registered model (see `zoo list`)")
        recipe = recipe_called(chosen.recipe) if chosen.recipe else None
        module = create(chosen.arch, **{name: literal(value) for name, value in chosen.option.items()})
        tensors = read(source, unwrap=chosen.unwrap)
        found = carried(chosen.arch, module, tensors, chosen.head, chosen.keys)
        rows = found.rows
        about = {"source": Path(source).name, "source_sha256": file_sha256(Path(source)), "licence": chosen.licence}
        weights = Weights(
            Path(out).name,
            module,
            found.variables,
            chosen.head,
            found.head,
            recipe,
            chosen.window_seconds,
            found.lacks,
            about={name: text for name, text in about.items() if text},
        )
    ledger = json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False) + "\n"
    write_folder(weights, out, {"ledger.json": ledger, "ledger.txt": table(rows)})
    print(counts(rows))
    if weights.lacks:
        print(f"the model needs variables of its {COLLECTION} as well, of which the file has none")
    print(f"{out}: written; the ledger of every tensor is {Path(out) / 'ledger.txt'}")
    return rows


@dataclass(frozen=True)
class Carried:
    """Variables of a model and of its classifier, what the file lacks of them, and the ledger."""

    variables: Variables
    head: Variables
    lacks: tuple[str, ...]
    rows: tuple[Row, ...]


def carried(
    arch: str, module: nn.Module, tensors: Mapping[str, np.ndarray], classes: int = 0, keys: str = ""
) -> Carried:
    """Variables of a registered model, and of its classifier, from the tensors of a file.

    Raises WeightsMismatch where they do not fit, and ZooError for a model without that key map.
    """
    rules = key_map(arch, classes, keys)
    whole = made(module, classes)
    lacks = without_tokenizer(whole, {rule.target.partition("/")[0] for rule in rules if isinstance(rule, Key)})
    leaves = flax.traverse_util.flatten_dict(whole, sep="/")
    if fresh := kept(rules, leaves):
        leaves |= jax.jit(lambda: _picked(initial(module, classes), fresh))()
    filled, rows = fill(rules, tensors, flax.traverse_util.unflatten_dict(leaves, sep="/"))
    filled = on_device(filled)
    told = tuple(replace(row, target=row.target and called(row.target)) for row in rows)
    return Carried(part_of(filled, MODEL), part_of(filled, HEAD), lacks, told)


def _picked(variables: Variables, names: Sequence[str]) -> dict[str, Any]:
    flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")
    return {name: flat[name] for name in names}


def key_map(arch: str, classes: int = 0, keys: str = "") -> tuple[Rule, ...]:
    """The rules of a model file, into what `zoo.weights.folder.made` makes.

    keys  which of its maps: "" for KEYS and HEAD_KEYS; with "braindecode" BRAINDECODE_KEYS takes the place of the one,
          BRAINDECODE_HEAD_KEYS of the other, as far as there are such

    Raises ZooError where it has no map, or none of that name, naming those it has.
    """
    module = importlib.import_module(entry(arch).constructor.__module__)
    maps = {name: value for name, value in vars(module).items() if name.endswith("KEYS") and name.isupper()}
    own = {ending: f"{keys.upper()}_{ending}" for ending in ("KEYS", "HEAD_KEYS")}
    if keys and not maps.keys() & set(own.values()):
        raise ZooError(f"{arch}: no key map {own['KEYS']} in {module.__name__}; it has {', '.join(maps) or 'none'}")
    rules: list[Rule] = []
    for ending, part in (("KEYS", MODEL), ("HEAD_KEYS", HEAD))[: 2 if classes else 1]:
        name = own[ending] if own[ending] in maps else ending
        if name not in maps:
            raise ZooError(f"{arch}: no key map {name} in {module.__name__}; it has {', '.join(maps) or 'none'}")
        rules += below(maps[name], part)
    return tuple(rules)


def literal(text: str) -> Any:
    """A Python value where the text is one, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def counts(rows: Sequence[Row]) -> str:
    """How many tensors and leaves, in two lines."""
    tensors = {row.source: math.prod(row.source_shape) for row in rows if row.source}
    left_out = {row.source for row in rows if row.source and not row.target}
    leaves = {row.target.partition("[")[0]: row for row in rows if row.target}
    fresh = sum(not row.source for row in leaves.values())
    numbers = sum(size for name, size in tensors.items() if name not in left_out)
    return (
        f"{len(tensors)} tensors in the file: {len(tensors) - len(left_out)} taken ({numbers:,} numbers), "
        f"{len(left_out)} left out\n"
        f"{len(leaves)} leaves in the model: {len(leaves) - fresh} filled, {fresh} as made"
    )


def table(rows: Sequence[Row]) -> str:
    """The ledger for people: a line a tensor or leaf."""
    lines = [("source", "shape", "target", "shape", "norm", "done")]
    for row in rows:
        shapes = [" × ".join(map(str, shape)) or "1" for shape in (row.source_shape, row.target_shape)]
        lines.append(
            (row.source, shapes[0] * bool(row.source), row.target, shapes[1] * bool(row.target))
            + (f"{row.norm:.6g}", row.done)
        )
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    told = (
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)), line[5]]) for line in lines
    )
    return counts(rows) + "\n\n" + "\n".join(map(str.rstrip, told)) + "\n"
