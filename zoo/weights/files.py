"""Files of tensors, read with suspicion: `read` takes .safetensors, .npz, .pt/.pth/.ckpt/.bin and .onnx; `write`
makes .safetensors.

Nothing in a file is run, no file names another, and no size that it claims is believed before it is checked. A value
is not looked at: `zoo.weights.keys.fill` refuses what is not finite.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import struct
import zipfile
from collections.abc import Mapping
from hashlib import sha256 as sha256_of
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from zoo.data.store import disk_errors, file_sha256
from zoo.errors import ZooError

LARGEST = 1 << 36
"""Bytes that a file's tensors may have together."""
LARGEST_HEADER = 100_000_000
"""Bytes of a safetensors header, the format's own limit."""
MODEL_ENDINGS = (".pt", ".pth", ".ckpt", ".bin")

_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    **{f"{letter}{bits}": f"{letter.lower()}{bits // 8}" for letter in "IU" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"f{bits // 8}" for bits in (16, 32, 64)},
    "BF16": ml_dtypes.bfloat16,
}


def read(path: str | Path, *, unwrap: str = "", sha256: str = "", largest: int = LARGEST) -> dict[str, np.ndarray]:
    """The tensors of a file by name, as numpy arrays (bfloat16 as that of ml_dtypes).

    unwrap   .pt and its like: the dictionary within the file that holds the tensors, "state_dict", or "a.b" for one
             within another
    sha256   what the file's must be; "" for any
    largest  bytes that all tensors may have together

    Raises ZooError for a file that is not what it seems: another hash; a pickle of anything but tensors; names that
    lead out of an archive; sizes that lie or pass `largest`; and where a package that reads it is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ZooError(f"{path}: no such file of weights")
    if sha256 and (found := file_sha256(path)) != sha256:
        raise ZooError(f"{path}: its sha256 is {found}, wanted {sha256}: it is not the file it should be")
    ending = path.suffix.lower()
    if unwrap and ending not in MODEL_ENDINGS:
        raise ZooError(f"{path}: unwrap {unwrap!r}: only {', '.join(MODEL_ENDINGS)} hold dictionaries")
    if ending == ".safetensors":
        return _read_safetensors(path, largest)[0]
    if ending == ".npz":
        return _read_npz(path, largest)
    if ending in MODEL_ENDINGS:
        return _read_torch(path, unwrap, largest)
    if ending == ".onnx":
        return _read_onnx(path, largest)
    raise ZooError(f"{path}: wanted a file that ends in .safetensors, .npz, .onnx or {', '.join(MODEL_ENDINGS)}")


def metadata(path: str | Path) -> dict[str, str]:
    """What was written beside the tensors of a .safetensors file."""
    return _read_safetensors(Path(path), LARGEST)[1]


def write(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as .safetensors, whole or not at all. Raises ZooError where the disk will not have it."""
    from safetensors.numpy import save_file

    path = Path(path)
    # It writes memory as it lies: an array whose axes were moved would be scrambled.
    whole = {name: np.array(tensor, order="C") for name, tensor in tensors.items()}
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(whole, temporary, dict(metadata or {}))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def fingerprint(tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 of names, dtypes, shapes and values, whatever file they are in."""
    digest = sha256_of()
    for name in sorted(tensors):
        tensor = np.asarray(tensors[name])
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def _read_safetensors(path: Path, largest: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length > min(LARGEST_HEADER, size - 8):
            raise ZooError(f"{path}: its header claims {length} bytes of a file of {size}: not safetensors")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_once)
            beside = header.pop("__metadata__", {})
            places = {name: _place(tensor) for name, tensor in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ZooError(f"{path}: its header is not one of safetensors: {error}") from error
        data = size - 8 - length
        if data > largest:
            raise ZooError(f"{path}: {data} bytes of tensors, the limit is {largest}")
        end = 0
        for name, (start, stop, dtype, shape) in sorted(places.items(), key=lambda item: item[1][:2]):
            wanted = dtype.itemsize * math.prod(shape)
            if start != end or stop - start != wanted or stop > data:
                raise ZooError(
                    f"{path}: tensor {name} {list(shape)} claims bytes {start} to {stop} of {data}, "
                    f"wanted {wanted} of them from {end} on"
                )
            end = stop
        if end != data:
            raise ZooError(f"{path}: {data - end} bytes at its end belong to no tensor")
        tensors = {}
        for name, (start, stop, dtype, shape) in places.items():
            file.seek(8 + length + start)
            tensors[name] = np.frombuffer(file.read(stop - start), dtype).reshape(shape)
    return tensors, beside


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a name comes twice."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} comes twice")
    return dict(pairs)


def _place(tensor: Mapping[str, Any]) -> tuple[int, int, np.dtype, tuple[int, ...]]:
    """(first byte, end, dtype, shape) that a header gives; ValueError for what cannot be."""
    if tensor["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {tensor['dtype']!r}, wanted one of {', '.join(_DTYPES)}")
    start, stop = tensor["data_offsets"]
    numbers = (start, stop, *tensor["shape"])
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"sizes {numbers}, wanted whole numbers")
    return start, stop, np.dtype(_DTYPES[tensor["dtype"]]).newbyteorder("<"), tuple(tensor["shape"])


def _check_archive(path: Path, largest: int) -> None:
    """Raises ZooError for an archive with names that lead out of it, twice the same, or too much when unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ZooError(f"{path}: not an archive: {error}") from error
    names = [member.filename for member in members]
    for name in names:
        if name.startswith(("/", "\\")) or ":" in name or ".." in PurePosixPath(name.replace("\\", "/")).parts:
            raise ZooError(f"{path}: it holds a file called {name!r}, which leads out of the archive")
    if len(set(names)) < len(names):
        raise ZooError(f"{path}: it holds {next(n for n in names if names.count(n) > 1)!r} twice")
    total = sum(member.file_size for member in members)
    if total > largest:
        raise ZooError(f"{path}: {total} bytes when unpacked, the limit is {largest}")


def _read_npz(path: Path, largest: int) -> dict[str, np.ndarray]:
    _check_archive(path, largest)
    tensors = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                with archive.open(member) as file:
                    tensors[member.filename.removesuffix(".npy")] = _read_npy(file, member.file_size)
    except (ValueError, zipfile.BadZipFile, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ZooError(f"{path}: cannot be read as .npz: {error}") from error
    return tensors


def _read_npy(file: Any, size: int) -> np.ndarray:
    """One array of an .npz file; ValueError where its header claims other than its bytes, before they are read."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"an array of format {version}, wanted (1, 0) or (2, 0)")
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which could run anything; wanted numbers")
    wanted = math.prod(shape) * dtype.itemsize
    if size - file.tell() != wanted:
        raise ValueError(f"an array {list(shape)} of {dtype} claims {wanted} bytes, there are {size - file.tell()}")
    return np.frombuffer(file.read(wanted), dtype).reshape(shape, order="F" if fortran else "C")


def _needed(path: Path, package: str) -> Any:
    """The package that reads a file; ZooError that says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ZooError(f"{path}: {package} reads this file and is not installed: pip install {package}") from error


def _read_torch(path: Path, unwrap: str, largest: int) -> dict[str, np.ndarray]:
    torch = _needed(path, "torch")
    if zipfile.is_zipfile(path):
        _check_archive(path, largest)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is not what it seems makes of a pickle
        reason = str(error).partition("\n")[0]
        raise ZooError(f"{path}: not a file of plain tensors, which is all that is read: {reason}") from error
    for name in filter(None, unwrap.split(".")):
        if not isinstance(found, Mapping) or name not in found:
            raise ZooError(f"{path}: there is no {name!r} of {unwrap!r} in it; it holds {_held(found)}")
        found = found[name]
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ZooError(f"{path}: wanted a dictionary of tensors; it holds {_held(found)} (--unwrap NAME takes one)")
    total = sum(tensor.numel() * tensor.element_size() for tensor in found.values())
    if total > largest:
        raise ZooError(f"{path}: {total} bytes of tensors, the limit is {largest}")
    return {str(name): _from_torch(torch, path, str(name), tensor) for name, tensor in found.items()}


def _held(value: Any) -> str:
    """What a torch file holds, for an error."""
    if not isinstance(value, Mapping):
        return f"a {type(value).__name__}"
    names = [f"{name} ({type(each).__name__})" for name, each in value.items() if type(each).__name__ != "Tensor"]
    return ", ".join(names[:8]) or f"{len(value)} tensors"


def _from_torch(torch: Any, path: Path, name: str, tensor: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16 and tensor.layout == torch.strided:
        return tensor.detach().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    try:
        return tensor.detach().numpy()
    except (TypeError, RuntimeError) as error:
        raise ZooError(f"{path}: tensor {name} is {tensor.dtype}, {tensor.layout}: wanted plain numbers") from error


def _read_onnx(path: Path, largest: int) -> dict[str, np.ndarray]:
    onnx = _needed(path, "onnx")
    if path.stat().st_size > largest:
        raise ZooError(f"{path}: {path.stat().st_size} bytes, the limit is {largest}")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's and onnx's own
        raise ZooError(f"{path}: cannot be read as ONNX: {error}") from error
    tensors: dict[str, np.ndarray] = {}
    for each in model.graph.initializer:
        if each.data_location == onnx.TensorProto.EXTERNAL:
            raise ZooError(f"{path}: tensor {each.name} lies in another file, which is not read")
        if not each.name or each.name in tensors:
            raise ZooError(f"{path}: a tensor without a name, or two called {each.name!r}")
        try:
            tensors[each.name] = onnx.numpy_helper.to_array(each)
        except (ValueError, TypeError) as error:
            raise ZooError(f"{path}: tensor {each.name} claims {list(each.dims)}: {error}") from error
    if not tensors:
        raise ZooError(f"{path}: it holds no tensors: not an ONNX model")
    return tensors
