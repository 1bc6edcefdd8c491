"""Files of tensors: what is written comes back, and files that lie are refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from hashlib import sha256
from io import BytesIO

import ml_dtypes
import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.weights.files import fingerprint, metadata, read, write

MOVED = np.arange(6, dtype=np.float32).reshape(2, 3).T
TENSORS = {
    "params/a/kernel": MOVED,
    "params/a/scale": np.float32(3) * np.ones((), np.float32),
    "half": np.array([1.5, -2], ml_dtypes.bfloat16),
    "count": np.array([7, -7], np.int64),
    "flag": np.array([True, False]),
    "none": np.zeros((0, 4), np.float16),
}
TWO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor, strict=True)


def refused(path, **options) -> str:
    with pytest.raises(ZooError) as caught:
        read(path, **options)
    said = str(caught.value)
    assert "\n" not in said
    assert str(path) in said
    return said


def test_what_is_written_is_read_with_its_metadata(tmp_path):
    write(tmp_path / "deep/a.safetensors", TENSORS, {"model": "labram_base"})
    same(read(tmp_path / "deep/a.safetensors"), TENSORS)
    assert metadata(tmp_path / "deep/a.safetensors") == {"model": "labram_base"}
    assert [each.name for each in (tmp_path / "deep").iterdir()] == ["a.safetensors"]


def test_what_the_format_s_own_library_wrote_is_read_and_it_reads_ours(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    plain = {name: np.array(tensor, order="C") for name, tensor in TENSORS.items() if name != "half"}
    library.save_file(plain, tmp_path / "theirs.safetensors")
    same(read(tmp_path / "theirs.safetensors"), plain)
    write(tmp_path / "ours.safetensors", plain)
    same(library.load_file(tmp_path / "ours.safetensors"), plain)


def test_a_write_that_fails_leaves_nothing_and_keeps_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    write(file, {"a": MOVED})
    before = file.read_bytes()

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ZooError, match="the disk is full"):
        write(file, {"a": 2 * MOVED})
    assert file.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_fingerprint_is_of_values_names_and_shapes_not_of_memory():
    assert fingerprint({"a": MOVED}) == fingerprint({"a": MOVED.copy(order="C")})
    others = ({"b": MOVED}, {"a": MOVED.T}, {"a": MOVED + 1}, {"a": MOVED.astype(np.float64)})
    assert len({fingerprint(each) for each in ({"a": MOVED}, *others)}) == 5


def test_npz(tmp_path):
    plain = {name: tensor for name, tensor in TENSORS.items() if name != "half"}
    np.savez_compressed(tmp_path / "a.npz", **plain)
    same(read(tmp_path / "a.npz"), plain)


def test_a_wrong_hash(tmp_path):
    write(tmp_path / "a.safetensors", {"a": MOVED})
    right = sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    read(tmp_path / "a.safetensors", sha256=right)
    assert "is not the file it should be" in refused(tmp_path / "a.safetensors", sha256="0" * 64)


def raw(header, data=b"", length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "not safetensors"),
        (raw({"a": TWO}, bytes(8), 1 << 60), "its header claims 1152921504606846976 bytes"),
        (raw({"a": TWO}, bytes(8), 70), "its header claims 70 bytes|not one of safetensors"),
        (raw(b"[1]"), "not one of safetensors"),
        (raw(b"[" * 100_000), "not one of safetensors"),
        (raw({"a": TWO}, bytes(4)), "claims bytes 0 to 8 of 4"),
        (raw({"a": TWO}, bytes(80)), "72 bytes at its end belong to no tensor"),
        (raw({"a": {**TWO, "shape": [3]}}, bytes(8)), "claims bytes 0 to 8 of 8, wanted 12"),
        (raw({"a": {**TWO, "shape": [1 << 62, 4]}}, bytes(8)), "claims bytes 0 to 8"),
        (raw({"a": {**TWO, "shape": [-1, -2]}}, bytes(8)), "wanted whole numbers"),
        (raw({"a": {**TWO, "data_offsets": [8, 0]}}, bytes(8)), "claims bytes 8 to 0"),
        (raw({"a": TWO, "b": {**TWO, "data_offsets": [4, 12]}}, bytes(12)), "tensor b .* wanted 8 of them from 8 on"),
        (raw({"a": TWO, "b": {**TWO, "data_offsets": [12, 20]}}, bytes(20)), "wanted 8 of them from 8 on"),
        (raw({"a": {**TWO, "dtype": "O"}}, bytes(8)), "dtype 'O'"),
        (raw({"a": {"shape": [2]}}, bytes(8)), "not one of safetensors"),
        (raw(b'{"a":%b,"a":%b}' % ((json.dumps(TWO).encode(),) * 2), bytes(8)), "'a' comes twice"),
    ],
)  # fmt: skip
def test_safetensors_that_lie(content, cause, tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(ZooError, match=cause):
        read(file)
    refused(file)


def test_more_than_the_limit(tmp_path):
    write(tmp_path / "a.safetensors", {"a": np.zeros(1000)})
    np.savez_compressed(tmp_path / "bomb.npz", a=np.zeros(1_000_000))
    assert (tmp_path / "bomb.npz").stat().st_size < 10_000
    assert "8000 bytes of tensors, the limit is 7000" in refused(tmp_path / "a.safetensors", largest=7000)
    assert "when unpacked, the limit is 100000" in refused(tmp_path / "bomb.npz", largest=100_000)


def npz(path, members: dict[str, bytes]):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def npy(array, shape=None) -> bytes:
    """An array's bytes, with another shape in the header where one is given."""
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": shape or array.shape}
    file = BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + array.tobytes()


class Harmful:
    """Would write a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("name", ["../a.npy", "/etc/a.npy", "x/../../a.npy", "..\\a.npy", "C:a.npy"])
def test_names_that_lead_out_of_an_archive(name, tmp_path):
    assert "leads out of the archive" in refused(npz(tmp_path / "a.npz", {name: npy(MOVED)}))
    assert {each.name for each in tmp_path.iterdir()} == {"a.npz"}


def test_npz_that_lies(tmp_path):
    file = tmp_path / "a.npz"
    assert "claims 800000000000 bytes" in refused(npz(file, {"a.npy": npy(MOVED, (10**10, 20))}).resolve())
    assert "cannot be read as .npz" in refused(npz(file, {"a.npy": b"not an array"}))
    file.write_bytes(b"not an archive")
    assert "not an archive" in refused(file)
    np.savez(file, a=np.array([Harmful(tmp_path / "mark")], object))
    assert "Python objects" in refused(file)
    assert not (tmp_path / "mark").exists()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", npy(MOVED))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.npy", npy(MOVED + 1))
    assert "twice" in refused(file)


def test_what_is_no_file_of_weights(tmp_path):
    assert "no such file" in refused(tmp_path / "absent.npz")
    (tmp_path / "a.txt").write_text("a")
    assert "wanted a file that ends in" in refused(tmp_path / "a.txt")
    write(tmp_path / "a.safetensors", {"a": MOVED})
    assert "only .pt" in refused(tmp_path / "a.safetensors", unwrap="state_dict")


def test_a_torch_file_without_torch_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "a.pt").write_bytes(b"")
    assert "pip install torch" in refused(tmp_path / "a.pt")
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    (tmp_path / "a.onnx").write_bytes(b"")
    assert "pip install onnx" in refused(tmp_path / "a.onnx")


@pytest.mark.filterwarnings("ignore:Validating")
def test_torch_files(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch reads its files")
    names = ("params/a/kernel", "params/a/scale", "count", "flag")
    plain = {name: torch.tensor(np.array(TENSORS[name])) for name in names}
    half = torch.tensor([1.5, -2], dtype=torch.bfloat16)
    torch.save({"epoch": 3, "ema": {"model": {**plain, "half": half}}}, tmp_path / "a.pt")
    wanted = {name: TENSORS[name] for name in (*names, "half")}
    same(read(tmp_path / "a.pt", unwrap="ema.model"), wanted)
    assert "it holds epoch (int), ema (dict) (--unwrap NAME" in refused(tmp_path / "a.pt")
    assert "there is no 'state_dict'" in refused(tmp_path / "a.pt", unwrap="state_dict")
    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "wide.pt")
    assert "4000000000 bytes of tensors" in refused(tmp_path / "wide.pt", largest=10**9)
    torch.save({"a": torch.zeros(3).to_sparse()}, tmp_path / "sparse.pt")
    assert "wanted plain numbers" in refused(tmp_path / "sparse.pt")


def test_torch_files_that_would_run_something(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch reads its files")
    torch.save({"a": torch.ones(2), "b": Harmful(tmp_path / "mark")}, tmp_path / "a.pt")
    assert "not a file of plain tensors" in refused(tmp_path / "a.pt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Harmful(tmp_path / "mark")))
    assert "not a file of plain tensors" in refused(tmp_path / "b.ckpt")
    (tmp_path / "c.bin").write_bytes(b"nothing")
    assert "not a file of plain tensors" in refused(tmp_path / "c.bin")
    assert "leads out" in refused(npz(tmp_path / "d.pt", {"../data.pkl": b""}))
    assert not (tmp_path / "mark").exists()


def test_onnx_files(tmp_path):
    onnx = pytest.importorskip("onnx", reason="the package onnx reads its files")
    file = tmp_path / "a.onnx"
    wanted = {"w": np.array(MOVED), "b": np.arange(3)}

    def saved(*tensors):
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "a", [], [], list(tensors))), str(file))
        return file

    first, second = (onnx.numpy_helper.from_array(np.array(value), name) for name, value in wanted.items())
    same(read(saved(first, second)), wanted)
    assert "two called 'w'" in refused(saved(first, first))
    outside = onnx.TensorProto(name="x", dims=[2], data_type=1, data_location=1)
    outside.external_data.add(key="location", value="../../secret")
    assert "lies in another file" in refused(saved(outside))
    lying = onnx.numpy_helper.from_array(np.zeros(2, np.float32), "w")
    lying.dims[0] = 1 << 40
    assert "tensor w claims [1099511627776]" in refused(saved(lying))
    assert "the limit is 10" in refused(file, largest=10)
    file.write_bytes(b"\xff" * 30)
    assert "ONNX" in refused(file)
