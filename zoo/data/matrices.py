"""Arrays in .mat (any version) and .npz files, wherever structs and cells hide them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.series import Series, Sidecar, sidecar_path
from zoo.errors import ZooError


def load(path: Path, variable: str) -> np.ndarray | str:
    """The array at `variable`, with MATLAB's own order of dimensions; text as str.

    `variable` is a path through structs with, at its end, the element of a struct array, a cell array or a
    leading third dimension: "tc", "out.resp[3]". Raises ZooError when the file has no such array.
    """
    names, index = _parse(path, variable)
    with _open(path) as root:
        found = _find(path, root, names)
        if index is None and len(found) == 1:
            return _value(found[0])
        elements = _elements_of(found)
        if index is None or index >= len(elements):
            raise ZooError(f"{path.name}: no {variable!r}: {'.'.join(names)} has {len(elements)} elements")
        return _value(elements[index])


def variables(path: Path, variable: str) -> list[str]:
    """`variable` itself where it is one series, else the name of each element ("out.resp[0]", …)."""
    names, index = _parse(path, variable)
    if index is not None:
        return [variable]
    with _open(path) as root:
        count = len(_elements_of(_find(path, root, names)))
    return [f"{variable}[{i}]" for i in range(count)] or [variable]


def read_matrix(path: Path, variable: str, sidecar: Sidecar) -> Series:
    """The series [channels, time] at `variable`; its rate is the sidecar's to give."""
    signal = load(path, variable)
    if isinstance(signal, str) or signal.ndim != 2 or not np.issubdtype(signal.dtype, np.number):
        raise ZooError(f"{path.name}: {variable!r} is not a matrix of numbers, wanted [channels, time]")
    kind = sidecar.channel_type or "roi"
    names = tuple(f"{kind}{i:03d}" for i in range(len(signal)))
    return Series(signal, names, (kind,) * len(signal), None)


def _parse(path: Path, variable: str) -> tuple[list[str], int | None]:
    match = re.fullmatch(r"(.+?)(?:\[(\d+)\])?", variable)
    if match is None:
        with _open(path) as root:
            has = ", ".join(_names(root))
        raise ZooError(f"{path.name}: wanted Variable in {sidecar_path(path).name}, one of {has}")
    return match[1].split("."), None if match[2] is None else int(match[2])


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Mapping[str, Any]]:
    """The file's variables by name. MATLAB 7.3 files are HDF5 with their dimensions reversed."""
    import h5py
    import scipy.io

    file: Any
    try:
        if path.suffix == ".npz":
            file = np.load(path, allow_pickle=False)
        elif h5py.is_hdf5(path):
            file = h5py.File(path)
        else:
            file = contextlib.nullcontext(scipy.io.loadmat(path, simplify_cells=True))
    except Exception as error:  # the three readers raise as many kinds of error
        raise ZooError(f"{path.name}: cannot be read as a matrix: {error}") from error
    with file as root:
        yield root


def _find(path: Path, root: Mapping[str, Any], names: list[str]) -> list[Any]:
    """What lies at the end of the path of names: one thing, or one for each element of arrays on the way."""
    nodes: list[Any] = [root]
    for name in names:
        for node in nodes:
            if name not in _names(node):
                has = ", ".join(_names(node)) or "no fields"
                raise ZooError(f"{path.name}: no variable {'.'.join(names)!r}: looked for {name!r}, found {has}")
        nodes = [element for node in nodes for element in _opened(node[name])]
    return nodes


def _names(node: Any) -> list[str]:
    return [key for key in node if key[0] not in "_#"] if hasattr(node, "keys") else []


def _elements_of(found: list[Any]) -> list[Any]:
    """What was found, if not one thing; else its parts along a leading third dimension, none without."""
    if len(found) != 1:
        return found
    whole = _value(found[0])
    return [] if isinstance(whole, str) or whole.ndim != 3 else list(whole)


def _opened(value: Any) -> list[Any]:
    """The elements of a struct or cell array; anything else as the only one."""
    import h5py

    if isinstance(value, h5py.Dataset) and h5py.check_ref_dtype(value.dtype) is not None:
        return [value.file[reference] for reference in value[()].T.ravel()]
    if isinstance(value, list):
        return value
    if isinstance(value, np.ndarray) and value.dtype == object:
        return list(value.ravel(order="F"))
    return [value]


def _value(leaf: Any) -> np.ndarray | str:
    import h5py

    if not isinstance(leaf, h5py.Dataset):
        return leaf if isinstance(leaf, str) else np.asarray(leaf)
    if leaf.attrs.get("MATLAB_class") == b"char":
        return "".join(map(chr, leaf[()].ravel()))
    return leaf[()].T
