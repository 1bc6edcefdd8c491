"""Arrays in .mat (any version) and .npz files, wherever structs and cells hide them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.series import Series, Sidecar
from zoo.errors import ZooError


def load(path: Path, variable: str) -> np.ndarray | str:
    """The array at `variable`, with MATLAB's own order of dimensions; text as str.

    `variable` is a path through structs with, at its end, the element of a struct array, a cell array or a
    leading third dimension: "tc", "out.resp[3]". Raises ZooError when the file has no such array.
    """
    names, index = _parse(variable)
    with _open(path) as root:
        found = _find(path, root, names)
        if index is None and len(found) == 1:
            return _value(found[0])
        if index is not None and index < len(found) > 1:
            return _value(found[index])
        whole = _value(found[0])
        if (
            index is None
            or len(found) > 1
            or isinstance(whole, str)
            or not (whole.ndim == 3 and index < len(whole))
        ):
            raise ZooError(
                f"{path.name}: no {variable!r}: {'.'.join(names)} has {max(len(found), 1)} elements"
            )
        return whole[index]


def variables(path: Path, variable: str) -> list[str]:
    """`variable` itself where it is one series, else the name of each element ("out.resp[0]", …)."""
    names, index = _parse(variable)
    with _open(path) as root:
        found = _find(path, root, names)
        if index is not None:
            return [variable]
        count = len(found)
        if count == 1:
            value = _value(found[0])
            if isinstance(value, str) or value.ndim != 3:
                return [variable]
            count = len(value)
    return [f"{variable}[{i}]" for i in range(count)]


def read_matrix(path: Path, variable: str, sidecar: Sidecar) -> Series:
    """The series [channels, time] at `variable`; its rate is the sidecar's to give."""
    signal = load(path, variable)
    if isinstance(signal, str) or signal.ndim != 2 or not np.issubdtype(signal.dtype, np.number):
        raise ZooError(f"{path.name}: {variable!r} is not a matrix of numbers, wanted [channels, time]")
    kind = sidecar.channel_type or "roi"
    names = tuple(f"{kind}{i:03d}" for i in range(len(signal)))
    return Series(signal, names, (kind,) * len(signal), None)


def _parse(variable: str) -> tuple[list[str], int | None]:
    match = re.fullmatch(r"(.+?)(?:\[(\d+)\])?", variable)
    if match is None:
        raise ZooError(
            "the name of a variable is empty: wanted Variable in the sidecar, as in 'tc' or 'out.resp'"
        )
    return match[1].split("."), None if match[2] is None else int(match[2])


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Mapping[str, Any]]:
    """The file's variables by name. MATLAB 7.3 files are HDF5 with their dimensions reversed."""
    import h5py
    import scipy.io

    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            yield file
    elif h5py.is_hdf5(path):
        with h5py.File(path) as file:
            yield file
    else:
        yield scipy.io.loadmat(path, simplify_cells=True)


def _find(path: Path, root: Mapping[str, Any], names: list[str]) -> list[Any]:
    """What lies at the end of the path of names: one thing, or one for each element of arrays on the way."""
    nodes: list[Any] = [root]
    for name in names:
        for node in nodes:
            if not hasattr(node, "keys") or name not in node:
                has = (
                    ", ".join(key for key in node if key[0] not in "_#")
                    if hasattr(node, "keys")
                    else "no fields"
                )
                raise ZooError(
                    f"{path.name}: no variable {'.'.join(names)!r}: looked for {name!r}, found {has}"
                )
        nodes = [element for node in nodes for element in _elements(node[name])]
    return nodes


def _elements(value: Any) -> list[Any]:
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
