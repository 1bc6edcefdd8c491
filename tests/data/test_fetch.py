"""Fetching, with real pip against a folder of wheels in place of an index."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from zoo.data import fetch as fetching
from zoo.data.fetch import MANIFEST, _largest_wheel, fetch
from zoo.data.samples import SAMPLES, Sample
from zoo.errors import ZooError

MEMBERS = {
    "tiny/data/sub-01/a.mat": b"a" * 1000,
    "tiny/data/b.txt": b"b" * 10,
    "tiny/code.py": b"raise SystemExit",
    "tiny-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
    "tiny-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tiny-1.0.dist-info/RECORD": b"",
}


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder pip takes wheels from, with a wheel `tiny`, known to the table of samples."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in MEMBERS.items():
            archive.writestr(name, content)
    sample = Sample(
        name="tiny_sample",
        about="",
        package="tiny",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        root="tiny/data",
        files=("*.mat",),
        licence="MIT",
        citation="Nobody (2026)",
        sidecars={"sub-*/*.mat": {"Variable": "tc"}},
    )
    monkeypatch.setitem(SAMPLES, "tiny_sample", sample)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_keeps_the_listed_files_and_says_whose_they_are(index, tmp_path, capsys):
    folder = fetch("tiny_sample", cache=tmp_path / "cache")
    assert files(folder) == [MANIFEST, "sub-01/a.json", "sub-01/a.mat"]
    assert (folder / "sub-01/a.mat").read_bytes() == MEMBERS["tiny/data/sub-01/a.mat"]
    assert json.loads((folder / "sub-01/a.json").read_text()) == {"Variable": "tc"}
    assert files(tmp_path / "cache") == [f"tiny_sample/{name}" for name in files(folder)], "the wheel is removed"
    assert "licence: MIT\ncite: Nobody (2026)" in capsys.readouterr().err


def test_two_jobs_on_an_empty_cache_fetch_once(index, tmp_path, monkeypatch):
    downloads = []
    alone = fetching._download

    def slowly(sample, scratch):
        downloads.append(sample)
        time.sleep(0.5)
        return alone(sample, scratch)

    monkeypatch.setattr(fetching, "_download", slowly)
    with ThreadPoolExecutor(2) as jobs:
        folders = list(jobs.map(lambda _: fetch("tiny_sample", cache=tmp_path / "cache"), range(2)))
    assert len(downloads) == 1
    assert folders[0] == folders[1]
    assert files(folders[0]) == [MANIFEST, "sub-01/a.json", "sub-01/a.mat"]


def test_a_finished_cache_needs_no_index_and_prints_again(index, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("BRAIN_ZOO_CACHE", str(tmp_path / "cache"))
    folder = fetch("tiny_sample")
    next(index.iterdir()).unlink()
    capsys.readouterr()
    assert fetch("tiny_sample") == folder == tmp_path / "cache" / "tiny_sample"
    assert "cite: Nobody" in capsys.readouterr().err


def test_a_folder_that_pip_removes_meanwhile_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/a.whl").write_bytes(bytes(7))
    (tmp_path / "removed").mkdir()
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("removed"):
            raise FileNotFoundError(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert _largest_wheel(tmp_path) == 7


def test_a_changed_file_is_fetched_again(index, tmp_path, capsys):
    folder = fetch("tiny_sample", cache=tmp_path)
    (folder / "sub-01/a.mat").write_bytes(b"short")
    assert len((fetch("tiny_sample", cache=tmp_path) / "sub-01/a.mat").read_bytes()) == 1000
    assert "a.mat is missing or changed" in capsys.readouterr().err


def test_a_wheel_that_is_there_is_not_downloaded(index, tmp_path):
    wheel = next(index.iterdir())
    (tmp_path / "cache/wheels").mkdir(parents=True)
    wheel.rename(tmp_path / "cache/wheels" / wheel.name)
    assert (fetch("tiny_sample", cache=tmp_path / "cache") / "sub-01/a.mat").is_file()


def test_a_wrong_hash_deletes_the_file_and_says_so(index, tmp_path):
    wheel = next(index.iterdir())
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tiny/more.py", b"")
    with pytest.raises(ZooError, match=r"tiny-1.0-py3-none-any.whl: sha256 is .*, wanted .*; the file was deleted"):
        fetch("tiny_sample", cache=tmp_path / "cache")
    assert files(tmp_path / "cache") == []


def test_an_interrupted_unpacking_leaves_no_folder_and_restarts_from_the_wheel(index, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(json, "dumps", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch("tiny_sample", cache=tmp_path / "cache")
    assert files(tmp_path / "cache") == ["wheels/tiny-1.0-py3-none-any.whl"]
    next(index.iterdir()).unlink()
    assert (fetch("tiny_sample", cache=tmp_path / "cache") / "sub-01/a.mat").is_file()


def test_no_index_names_package_and_cause(index, tmp_path):
    next(index.iterdir()).unlink()
    with pytest.raises(ZooError, match=r"tiny_sample: pip could not download tiny==1.0 \(No matching distribution"):
        fetch("tiny_sample", cache=tmp_path / "cache")
    assert files(tmp_path / "cache") == []


def test_a_download_that_stands_still_stops(index, tmp_path, monkeypatch):
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    monkeypatch.setattr(fetching, "STALL_SECONDS", 0.3)
    with pytest.raises(ZooError, match=r"tiny==1.0: the download stood still for 0.3 s"):
        fetch("tiny_sample", cache=tmp_path / "cache")


def test_an_unwritable_cache_is_an_error(index, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ZooError, match="tiny_sample: cannot write to the cache"):
        fetch("tiny_sample", cache=tmp_path / "cache")


@pytest.mark.parametrize(("name", "nearest"), [("face_eeg", "faces_eeg"), ("mne:smaple", "sample")])
def test_unknown_name_gets_the_nearest(name, nearest):
    with pytest.raises(ZooError, match=f"no sample '{name}'; nearest name: {nearest} "):
        fetch(name)


def test_datasets_of_mne_are_downloaded_by_mne(monkeypatch):
    import mne

    monkeypatch.setattr(mne.datasets.somato, "data_path", lambda download: Path("somewhere") if download else None)
    assert fetch("somato") == fetch("mne:somato") == Path("somewhere")


def test_import_is_cheap():
    code = "import sys, zoo.data.fetch; print(sorted({'mne', 'rich', 'jax', 'scipy'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_faces_eeg_has_its_files(faces_eeg):
    found = files(faces_eeg)
    assert len([name for name in found if name.endswith("_eeg.edf")]) == 2
    assert "dataset_description.json" in found
    assert not [name for name in found if name.endswith((".fif", ".py", ".whl"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ending", "count"),
    [
        ("hcp_rest_rois", "functional/*.mat", 12),
        ("speech_ieeg", "demo_data.json", 1),
        ("rest_fmri_surface", "*.mgz", 2),
        ("ecog_grip", "*.vhdr", 1),
        ("iclabel", "*.onnx", 2),
    ],
)
def test_every_sample_is_what_the_table_says(name, ending, count):
    assert len(list(fetch(name).rglob(ending))) == count
