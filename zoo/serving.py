"""A trained model as a program that is served without its code (`zoo.program` runs it).

    zoo.export_program(module, variables, "served", {"signal": signal, "sensors": sensors})

The batch may have any size, and so may other axes that the model can leave open. Before anything is written the program
is read back, and run beside the model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from kernels import dispatch
from zoo.data.store import file_sha256, write_file, write_json
from zoo.errors import ZooError
from zoo.program import CARD, FORMAT, PROGRAM, WEIGHTS, card_sha256, first_line, named, platform
from zoo.registry import entry
from zoo.sensors import KINDS, NAMES
from zoo.types import Variables
from zoo.weights.files import write
from zoo.weights.folder import PACKAGES, Weights, described, input_of, new_folder

PLATFORMS = ("cpu", "cuda", "tpu")
LOWERED = ("cpu", "cuda", "rocm", "tpu")
BATCH = "b"
UNITS = {"sensors.position": "m, head coordinates", "sensors.orientation": "unit vector"}
TOLERANCE = 1e-5
"""Of the largest number of an output: what sums may differ by that XLA takes in another order for another batch."""


def export_program(
    module: nn.Module,
    variables: Variables,
    folder: str | Path,
    inputs: Mapping[str, Any],
    *,
    head: tuple[nn.Module, Variables] | None = None,
    method: str = "__call__",
    shapes: Mapping[str, str] | None = None,
    constraints: Sequence[str] = (),
    batch: str = BATCH,
    platforms: Sequence[str] = PLATFORMS,
    weights: str = "inside",
    known: Weights | None = None,
) -> Path:
    """Writes what `module.apply(variables, **inputs, method=method)` computes to a new folder, whole or not at all.

    inputs       the method's arguments by name, arrays or trees of them (`zoo.types.Sensors`), batch first: what the
                 program is shaped after, and checked with
    head         a classifier of pooled features and its variables; the program's output has `logits` too
    shapes       name of an array (`signal`, `sensors.position`) → its shape where not only the batch is open, as
                 `jax.export.symbolic_shape` writes it: "b, 19, 200*a"
    constraints  of the symbols, "a <= 16"
    batch        size of a call's batch, "b" for any
    platforms    of cpu, cuda, rocm, tpu; this process's among them, or nothing could be checked. A program for several,
                 or of open sizes, is in plain XLA; only one for this platform alone, of given sizes, has its kernels
    weights      inside the program, or "beside" it
    known        what is known of the model, for the card

    Raises ZooError for inputs the method does not take; for a model that cannot be traced with such open shapes; where
    the program, read back, gives other results than the model; and for a folder that holds something.
    """
    name, folder = type(module).__name__, Path(folder)
    here = platform()
    if here not in platforms or not set(platforms) <= set(LOWERED):
        raise ZooError(
            f"export-program: platforms {', '.join(platforms)}: wanted {here}, where the program is checked, and of "
            f"{', '.join(LOWERED)}"
        )
    if weights not in ("inside", "beside"):
        raise ZooError(f"export-program: weights {weights!r}: wanted inside or beside")
    takes = list(inspect.signature(getattr(module, method)).parameters) if hasattr(module, method) else []
    if not set(inputs) <= set(takes):
        raise ZooError(f"{name}.{method}: takes {', '.join(takes) or 'nothing'}; got {', '.join(inputs)}")
    known = known or Weights(name, module, variables)
    with new_folder(folder) as scratch:
        arrays = named(dict(inputs))
        given = {each: jnp.asarray(arrays[each]) for each in sorted(arrays, key=lambda each: takes.index(_root(each)))}
        opened = _opened(given, shapes or {}, constraints, batch)
        held = flax.core.unfreeze(nn.meta.unbox(variables)) | ({"head": head[1]} if head else {})
        leaves = {each.replace(".", "/"): jnp.asarray(leaf) for each, leaf in named(held).items()}
        compute = _computation(module, method, inputs, held, head[0] if head else None)

        # A program without arrays of its own takes none.
        beside = weights == "beside" and bool(leaves)
        before: tuple[Any, ...] = (leaves,) if beside else ()
        program: Any = jax.jit(compute) if beside else jax.jit(partial(compute, leaves))
        try:
            # Kernels are one platform's.
            with dispatch.portable() if len(platforms) > 1 else nullcontext():
                exported = export.export(program, platforms=tuple(platforms))(*jax.tree.map(_abstract, before), opened)
        except Exception as error:  # whatever a model makes of a size that is a symbol
            sizes = ", ".join(f"{each} [{_told(leaf.shape)}]" for each, leaf in opened.items())
            raise ZooError(f"{name}: cannot be exported with {sizes}: {first_line(error)}") from error
        content = _serialised(exported)
        checked = _check(name, content, before, partial(compute, leaves), _examples(given, opened)) | _channels(given)
        card = {
            "format": FORMAT,
            "name": known.name,
            **_told_of(known, method),
            "inputs": [_row(each, leaf) | _unit(each, known) for each, leaf in opened.items()],
            "outputs": [
                _row(each, leaf)
                for each, leaf in jax.tree.unflatten(exported.out_tree, list(exported.out_avals)).items()
            ],
            "constraints": list(constraints),
            "platforms": list(platforms),
            "calling_convention_version": exported.calling_convention_version,
            "checked": {"platform": here, **checked},
            "versions": {package: version(package) for package in PACKAGES},
        }
        _write(scratch, card, content, leaves if beside else {})
    return folder


def _root(name: str) -> str:
    """The argument that an array belongs to."""
    return name.partition(".")[0]


def _opened(
    given: Mapping[str, jax.Array], shapes: Mapping[str, str], constraints: Sequence[str], batch: str
) -> dict[str, jax.ShapeDtypeStruct]:
    """What the program is traced with."""
    unknown = sorted(shapes.keys() - given.keys())
    if unknown:
        raise ZooError(
            f"export-program: a shape of {', '.join(unknown)}, which is no input; those are {', '.join(given)}"
        )
    opened = {}
    try:
        scope = export.SymbolicScope(constraints)
        for each, leaf in given.items():
            shape = shapes.get(each) or ", ".join([batch, *map(str, leaf.shape[1:])])
            sizes = export.symbolic_shape(shape, scope=scope)
            known = [(size, own) for size, own in zip(sizes, leaf.shape, strict=False) if isinstance(size, int)]
            if len(sizes) != leaf.ndim or any(size != own for size, own in known):
                raise ZooError(f"export-program: {each}: shape {shape!r}, the input has {list(leaf.shape)}")
            opened[each] = jax.ShapeDtypeStruct(sizes, leaf.dtype)
    except ValueError as error:
        raise ZooError(f"export-program: shapes {dict(shapes)}, {list(constraints)}: {first_line(error)}") from error
    return opened


def _serialised(exported: export.Exported) -> bytes:
    try:
        return bytes(exported.serialize())
    except ImportError as error:
        raise ZooError(f"export-program: {first_line(error)}: pip install 'brain-zoo[serving]'") from error


def _computation(
    module: nn.Module, method: str, inputs: Mapping[str, Any], held: Mapping[str, Any], head: nn.Module | None
) -> Callable[..., dict[str, Any]]:
    """(variables by path, inputs by path) → outputs by path."""
    of_inputs, of_held = jax.tree.structure(dict(inputs)), jax.tree.structure(held)
    inputs_order, held_order = list(named(dict(inputs))), [each.replace(".", "/") for each in named(held)]

    def compute(leaves: Mapping[str, jax.Array], arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
        given = jax.tree.unflatten(of_inputs, [arrays[each] for each in inputs_order])
        variables = jax.tree.unflatten(of_held, [leaves[each] for each in held_order])
        out: Any = module.apply(variables, **given, method=method)
        return named(out) | ({"logits": head.apply(variables["head"], out.pooled)} if head else {})

    return compute


def _examples(
    given: Mapping[str, jax.Array], opened: Mapping[str, jax.ShapeDtypeStruct]
) -> list[Mapping[str, jax.Array]]:
    """What the program is checked with: the inputs; another batch of them; twice the size of all other open axes."""
    examples = [given]
    for batch in (True, False):
        axes = {
            each: [n for n, size in enumerate(leaf.shape) if not isinstance(size, int) and (n == 0) == batch]
            for each, leaf in opened.items()
        }
        if any(axes.values()):
            examples.append({each: _resized(leaf, axes[each]) for each, leaf in given.items()})
    return examples


def _resized(array: jax.Array, axes: Sequence[int]) -> jax.Array:
    """One row of a batch of several; else twice the size."""
    for axis in axes:
        array = array[:1] if axis == 0 and len(array) > 1 else jnp.concatenate([array, array], axis)
    return array


def _check(
    name: str, content: bytes, before: tuple[Any, ...], model: Any, examples: Sequence[Mapping[str, jax.Array]]
) -> dict[str, Any]:
    """Raises ZooError where the program does not give what the model does; else what was compared, and how far they are
    apart at most."""
    program = jax.jit(export.deserialize(bytearray(content)).call)
    live = jax.jit(model)
    worst, sizes = 0.0, []
    for n, arrays in enumerate(examples):
        try:
            result = program(*before, arrays)
        except ValueError:
            if n == 0:
                raise
            continue  # what the constraints do not allow
        found, wanted = jax.device_get((result, live(arrays)))
        for each in wanted:
            apart = _apart(found[each], wanted[each])
            if not apart <= max(TOLERANCE, 4 * _epsilon(wanted[each].dtype)):
                raise ZooError(f"{name}: the program's {each} is {apart:.1e} (relative) off the model's; not written")
            worst = max(worst, apart)
        sizes.append({each: list(array.shape) for each, array in arrays.items()})
    return {"sizes": sizes, "largest_difference": worst}


def _apart(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference as a share of the largest number wanted; whole numbers must be the same."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return math.inf
    if not jnp.issubdtype(wanted.dtype, jnp.inexact):
        return 0.0 if (found == wanted).all() else math.inf
    wide = np.complex128 if jnp.issubdtype(wanted.dtype, jnp.complexfloating) else np.float64
    found, wanted = found.astype(wide), wanted.astype(wide)
    finite = np.isfinite(wanted)
    if not np.array_equal(found[~finite], wanted[~finite], equal_nan=True):
        return math.inf
    largest = np.abs(wanted[finite]).max(initial=0.0)
    return float(np.abs(found[finite] - wanted[finite]).max(initial=0.0) / (largest or 1.0))


def _epsilon(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.inexact) else 0.0


def _channels(given: Mapping[str, jax.Array]) -> dict[str, list[str]]:
    """Names ("" for one that has none) and kinds of the channels that it is checked with."""
    if not {"sensors.name", "sensors.kind"} <= given.keys():
        return {}
    indices = np.asarray(given["sensors.name"][0])
    return {
        "channels": [NAMES[each] if each >= 0 else "" for each in indices],
        "kinds": [KINDS[each] for each in np.asarray(given["sensors.kind"][0])],
    }


def _told_of(known: Weights, method: str) -> dict[str, Any]:
    """What the card says of the model, and of the recording that it wants."""
    try:
        arch, options = described(known.module)
    except ZooError:  # a module that has no name here is served as well
        return {"model": type(known.module).__name__, "options": None, "method": method, "recording": None, "about": {}}
    recording = {**input_of(known), "about": entry(arch).card.inputs}
    return {"model": arch, "options": options, "method": method, "recording": recording, "about": dict(known.about)}


def _row(name: str, leaf: Any) -> dict[str, str]:
    return {"name": name, "shape": _told(leaf.shape), "dtype": jnp.dtype(leaf.dtype).name}


def _unit(name: str, known: Weights) -> dict[str, str]:
    if name == "signal" and known.recipe:
        fixed = known.recipe.scale == "fixed"
        return {"unit": f"{known.recipe.unit:g} V, T or T/m" if fixed else f"by {known.recipe.scale} of the recording"}
    return {"unit": UNITS[name]} if name in UNITS else {}


def _told(shape: Sequence[Any]) -> str:
    return ", ".join(map(str, shape))


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _write(folder: Path, card: dict[str, Any], content: bytes, leaves: Mapping[str, jax.Array]) -> None:
    write_file(folder / PROGRAM, content)
    if leaves:
        write(folder / WEIGHTS, {each: np.asarray(leaf) for each, leaf in leaves.items()}, {"format": "brain-zoo"})
    files = {"program": folder / PROGRAM, "weights": folder / WEIGHTS if leaves else None}
    card |= {
        each: {"file": file.name, "sha256": file_sha256(file), "bytes": file.stat().st_size} if file else None
        for each, file in files.items()
    }
    write_json(folder / CARD, {**card, "sha256": card_sha256(card)})
