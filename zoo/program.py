"""Exported models, to be served: a program is read and run with no code of the model, only JAX.

    program = zoo.load_program("served")                  # a folder that `zoo export-program` wrote
    out = program(signal=signal, sensors=sensors)         # name → array
    out["pooled"]

The folder holds `program.jax`, what `jax.export` makes of the model (StableHLO for each platform); `program.json`, a
card that says what goes in, in which units, and what comes out; and, where parameters are not in the program,
`weights.safetensors`. JAX alone can run it too:

    jax.export.deserialize(bytearray(Path("served/program.jax").read_bytes())).call({"signal": …, "sensors.name": …})
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from zoo.data.store import file_sha256
from zoo.errors import ZooError
from zoo.weights.files import read

FORMAT = 1
PROGRAM, CARD, WEIGHTS = "program.jax", "program.json", "weights.safetensors"
ONLY = "output"
"""What the result of a program that returns one array is called."""


@dataclass(frozen=True)
class Program:
    """A model's program; call it with its inputs, by name or in the order of the card.

    card  what `program.json` says: inputs and outputs with shapes, dtypes and units, the recording that is wanted
    """

    card: Mapping[str, Any]
    run: Callable[[dict[str, jax.Array]], dict[str, jax.Array]]

    def __call__(self, *given: Any, **named: Any) -> dict[str, jax.Array]:
        """Arrays by name. An input of several arrays (sensors) may be any object or mapping that has them.

        Raises ZooError for an input that is missing, that it does not take, or of another shape or dtype.
        """
        wanted = {each["name"]: each for each in self.card["inputs"]}
        roots = list(dict.fromkeys(name.partition(".")[0] for name in wanted))
        inputs = dict(zip(roots, given, strict=False)) | named
        if len(given) > len(roots) or set(inputs) != set(roots) or len(inputs) < len(given) + len(named):
            got = ", ".join([*(type(each).__name__ for each in given), *(f"{name}=" for name in named)]) or "nothing"
            raise ZooError(f"{self.card['name']}: takes {', '.join(roots)}; got {got}")
        arrays = {name: self._array(name, inputs, each) for name, each in wanted.items()}
        try:
            return self.run(arrays)
        except (ValueError, TypeError) as error:  # sizes that agree with each input alone, and not with one another
            shapes = ", ".join(f"{name} {list(arrays[name].shape)} for [{wanted[name]['shape']}]" for name in wanted)
            limits = "".join(f", {each}" for each in self.card["constraints"])
            raise ZooError(f"{self.card['name']}: sizes that do not agree: {shapes}{limits}") from error

    def _array(self, name: str, inputs: Mapping[str, Any], wanted: Mapping[str, Any]) -> jax.Array:
        root, *parts = name.split(".")
        value = inputs[root]
        for part in parts:
            value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
        if value is None:
            raise ZooError(f"{self.card['name']}: input {root} has no {'.'.join(parts)}, wanted {told(wanted)}")
        try:
            array = jnp.asarray(value)
        except (TypeError, ValueError) as error:
            raise ZooError(f"{self.card['name']}: {name}: {error}") from error
        sizes = wanted["shape"].split(", ") if wanted["shape"] else []
        fits = len(sizes) == array.ndim and all(
            int(size) == found for size, found in zip(sizes, array.shape, strict=True) if size.isdigit()
        )
        if not fits or array.dtype.name != wanted["dtype"]:
            raise ZooError(f"{self.card['name']}: {name}: got {_shown(array)}, wanted {told(wanted)}")
        return array


def load_program(folder: str | Path) -> Program:
    """The program in a folder. Raises ZooError for one that is damaged, cut short, of another kind, made for other
    platforms than this process computes on, or by a JAX that this one does not read."""
    folder = Path(folder)
    card = _read_card(folder / CARD)
    weights: dict[str, jax.Array] = {}
    try:
        content = _checked(folder / PROGRAM, card["program"]["sha256"])
        if card["weights"]:
            _checked(folder / WEIGHTS, card["weights"]["sha256"])
            weights = {name: jnp.asarray(leaf) for name, leaf in read(folder / WEIGHTS).items()}
        version, platforms = card["calling_convention_version"], card["platforms"]
    except (KeyError, TypeError) as error:
        raise ZooError(f"{folder / CARD}: not the card of a program: {error!r}") from error
    least, most = (
        export.minimum_supported_calling_convention_version,
        export.maximum_supported_calling_convention_version,
    )
    if not least <= version <= most:
        raise ZooError(
            f"{folder}: made by jax {card['versions']['jax']} with calling convention {version}; jax {jax.__version__} "
            f"reads {least} to {most}"
        )
    here = platform()
    if here not in platforms:
        raise ZooError(f"{folder}: made for {', '.join(platforms)}; this process computes on {here}")
    try:
        exported = export.deserialize(bytearray(content))
    except ImportError as error:
        raise ZooError(f"{folder}: {first_line(error)}: pip install 'brain-zoo[serving]'") from error
    except Exception as error:  # whatever the reader of a format makes of what is not in it
        raise ZooError(f"{folder / PROGRAM}: no program that this JAX can read: {first_line(error)}") from error
    run = jax.jit(exported.call)
    return Program(card, (lambda arrays: run(weights, arrays)) if weights else run)


def platform() -> str:
    """What programs for this process's devices are lowered for: cpu, cuda, rocm or tpu."""
    backend = jax.default_backend()
    if backend != "gpu":
        return backend
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"


def named(tree: Any) -> dict[str, Any]:
    """Every array of a tree by its path, `sensors.position`; `output` where the tree is one array."""
    return {
        jax.tree_util.keystr(path, simple=True, separator=".") or ONLY: leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def card_sha256(card: Mapping[str, Any]) -> str:
    """sha256 of what a card says, but for this."""
    told = {name: value for name, value in card.items() if name != "sha256"}
    return sha256(json.dumps(told, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def told(each: Mapping[str, Any]) -> str:
    """Shape and dtype of an input or output of a card, for people."""
    return f"{each['dtype']} [{each['shape']}]"


def first_line(error: Exception) -> str:
    """What an error says first."""
    return (str(error).strip() or repr(error)).partition("\n")[0]


def _read_card(file: Path) -> dict[str, Any]:
    try:
        card = json.loads(file.read_text())
        said, found = card["sha256"], card["format"]
    except FileNotFoundError as error:
        raise ZooError(f"{file.parent}: no {CARD} in it: not an exported program") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ZooError(f"{file}: not the card of a program: {error}") from error
    if found != FORMAT:
        raise ZooError(f"{file}: format {found}, wanted {FORMAT}")
    if said != card_sha256(card):
        raise ZooError(f"{file}: it says other than what was exported: its sha256 is not {said}")
    return card


def _checked(file: Path, wanted: str) -> bytes:
    if not file.is_file():
        raise ZooError(f"{file.parent}: no {file.name} in it: not a whole program")
    if (found := file_sha256(file)) != wanted:
        raise ZooError(f"{file}: its sha256 is {found}, wanted {wanted}: damaged, cut short, or another's")
    return file.read_bytes() if file.name == PROGRAM else b""


def _shown(array: jax.Array | np.ndarray) -> str:
    return f"{array.dtype.name} [{', '.join(map(str, array.shape))}]"
