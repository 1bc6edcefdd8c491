"""Region series in .mat and .npz files, and the sidecars that describe them."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io

from zoo.data import matrices
from zoo.data.readers import discover, read
from zoo.errors import ZooError

SIGNALS = [np.random.default_rng(i).normal(size=(3, 20 + i)) for i in range(2)]


def describe(file: Path, **content: object) -> Path:
    file.with_suffix(".json").write_text(json.dumps({"RepetitionTime": 0.5, **content}))
    return file


def mat_5(path: Path) -> Path:
    """A struct with a struct array, as MATLAB 5 files store it."""
    trials = np.array([(signal, f"trial {i}") for i, signal in enumerate(SIGNALS)], dtype=[("x", "O"), ("said", "O")])
    scipy.io.savemat(path, {"out": {"trial": trials, "rate": 2.0}})
    return path


def mat_7_3(path: Path) -> Path:
    """The same in HDF5: dimensions reversed, struct arrays as one reference an element and field."""
    with h5py.File(path, "w") as file:
        for i, signal in enumerate(SIGNALS):
            file[f"#refs#/x{i}"] = signal.T
            file[f"#refs#/s{i}"] = np.array([[ord(c)] for c in f"trial {i}"], np.uint16)
            file[f"#refs#/s{i}"].attrs["MATLAB_class"] = np.bytes_("char")
        for field, letter in (("x", "x"), ("said", "s")):
            references = [[file[f"#refs#/{letter}{i}"].ref] for i in range(2)]
            file.create_dataset(f"out/trial/{field}", data=np.array(references, dtype=h5py.ref_dtype))
        file["out/rate"] = [[2.0]]
    return path


@pytest.mark.parametrize("write", [mat_5, mat_7_3])
def test_struct_arrays_give_one_recording_an_element(tmp_path, write):
    file = describe(write(tmp_path / "sub-7_x.mat"), Variable="out.trial.x")
    sources = discover(file)
    assert [(s.id, s.subject, s.run) for s in sources] == [
        ("sub-7_x_01", "7", "01"),
        ("sub-7_x_02", "7", "02"),
    ]
    for source, signal in zip(sources, SIGNALS, strict=True):
        reading = read(source)
        assert reading.kinds == ("roi",) * 3
        assert reading.raw.info["sfreq"] == 2
        np.testing.assert_allclose(reading.raw.get_data(), signal)
    assert matrices.load(file, "out.trial.said[1]") == "trial 1"
    assert float(matrices.load(file, "out.rate").squeeze()) == 2


def test_a_third_dimension_may_be_people(tmp_path):
    cube = np.random.default_rng(0).normal(size=(4, 3, 10))
    np.savez(tmp_path / "all.npz", bold=cube)
    sources = discover(describe(tmp_path / "all.npz", Variable="bold", Series="subject"))
    assert [source.subject for source in sources] == ["01", "02", "03", "04"]
    np.testing.assert_allclose(read(sources[2]).raw.get_data(), cube[2])


def test_sidecar_names_kinds_and_units(tmp_path):
    scipy.io.savemat(tmp_path / "a.mat", {"ecog": SIGNALS[0]})
    names = ["G1", "G2", "G3"]
    how = {"Variable": "ecog", "ChannelType": "ecog", "ChannelNames": names, "Units": "µV", "Subject": "x9"}
    (source,) = discover(describe(tmp_path / "a.mat", **how))
    assert source.subject == "x9"
    reading = read(source)
    assert reading.kinds == ("ecog",) * 3
    assert reading.raw.ch_names == names
    np.testing.assert_allclose(reading.raw.get_data(), SIGNALS[0] * 1e-6)


@pytest.mark.parametrize(
    ("sidecar", "cause"),
    [
        ({"Variable": "nothing"}, "^a.mat: no variable 'nothing': looked for 'nothing', found x, flat"),
        ({"Variable": "x[5]"}, r"^a.mat: no 'x\[5\]'"),
        ({"Variable": "flat"}, r"^a.mat: 'flat' is not a matrix of numbers, wanted \[channels, time\]"),
        ({}, "^a.mat: wanted Variable in a.json, one of x, flat"),
        ({"Variable": "x", "RepetitionTime": None}, "^a.mat: .* wanted RepetitionTime or SamplingFrequency"),
        ({"Variable": "x", "RepetitionTime": "soon"}, "^a.json: not a valid sidecar"),
        ({"Variable": "x", "ChannelNames": ["a", "b"]}, "^a.mat: 2 channel names for 3 channels"),
        (
            {"Variable": "x", "ChannelNames": ["a", "b", "a"]},
            "^a.mat: channel name 'a' occurs more than once",
        ),
        ({"Variable": "x", "ChannelType": "brain"}, "^a.json: ChannelType is 'brain', wanted one of eeg"),
        ({"Variable": "x", "ChannelType": "eeg"}, "^a.mat: eeg signals want Units in a.json"),
        ({"Variable": "x", "Units": "furlong"}, "^a.json: Units is 'furlong'"),
    ],
)
def test_bad_sidecars(tmp_path, sidecar, cause):
    scipy.io.savemat(tmp_path / "a.mat", {"x": SIGNALS[0], "flat": np.zeros((2, 2, 2, 2))})
    describe(tmp_path / "a.mat", **sidecar)
    with pytest.raises(ZooError, match=cause):
        read(discover(tmp_path / "a.mat")[0])


def test_a_file_that_is_no_matrix_is_named(tmp_path):
    for name in ("a.mat", "a.npz"):
        (tmp_path / name).write_bytes(b"hello" * 50)
        with pytest.raises(ZooError, match=f"^{name}: cannot be read as a matrix"):
            discover(describe(tmp_path / name, Variable="x"))
