"""fMRI files to regions, vertices and voxels."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from zoo.data.readers import Reading, discover, read
from zoo.errors import ZooError

SHAPE, VOLUMES = (4, 5, 3), 20
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
AFFINE[:3, 3] = -4, -5, -3


def series(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(*shape, VOLUMES)).astype(np.float32)


def labels() -> np.ndarray:
    made = np.zeros(SHAPE, np.int16)
    made[0, :2], made[2:, 3] = 3, 7
    return made


def write(path: Path, content: np.ndarray, repetition: float = 2.0, units: str = "sec") -> Path:
    image = nibabel.Nifti1Image(content, AFFINE)
    if content.ndim == 4:
        image.header.set_zooms((2, 2, 2, repetition))
        image.header.set_xyzt_units("mm", units)
    nibabel.save(image, path)
    return path


def read_one(path: Path, **how: Path) -> Reading:
    (source,) = discover(path, **how)
    return read(source)


def positions(reading: Reading) -> np.ndarray:
    return np.array([channel["loc"][:3] for channel in reading.raw.info["chs"]])


def test_nifti_regions_are_means_at_their_centres(tmp_path):
    bold = series(*SHAPE)
    reading = read_one(write(tmp_path / "bold.nii.gz", bold), parcellation=write(tmp_path / "atlas.nii.gz", labels()))
    assert reading.kinds == ("roi", "roi")
    assert reading.raw.ch_names == ["roi3", "roi7"]
    assert reading.raw.info["sfreq"] == 0.5
    for signal, label in zip(reading.raw.get_data(), (3, 7), strict=True):
        np.testing.assert_allclose(signal, bold[labels() == label].mean(axis=0), rtol=1e-5)
    centre = (np.argwhere(labels() == 3).mean(axis=0) * 2 + [-4, -5, -3]) / 1000
    np.testing.assert_allclose(positions(reading)[0], centre)


def test_nifti_voxels_of_a_mask(tmp_path):
    bold, mask = series(*SHAPE), write(tmp_path / "mask.nii", (labels() == 7).astype(np.int16))
    reading = read_one(write(tmp_path / "bold.nii", bold, 1500, "msec"), mask=mask)
    assert reading.kinds == ("voxel",) * 6
    assert reading.raw.info["sfreq"] == pytest.approx(1 / 1.5)
    np.testing.assert_allclose(reading.raw.get_data(), bold[labels() == 7], rtol=1e-6)


def test_nifti_regions_within_a_mask(tmp_path):
    bold, mask = series(*SHAPE), np.zeros(SHAPE, np.int16)
    mask[0, 0, 0] = 1
    reading = read_one(
        write(tmp_path / "bold.nii", bold),
        parcellation=write(tmp_path / "atlas.nii", labels()),
        mask=write(tmp_path / "mask.nii", mask),
    )
    assert reading.raw.ch_names == ["roi3"]
    np.testing.assert_allclose(reading.raw.get_data()[0], bold[0, 0, 0], rtol=1e-6)


def test_nifti_errors(tmp_path):
    file, atlas = write(tmp_path / "bold.nii", series(*SHAPE), 0.0), write(tmp_path / "atlas.nii", labels())
    with pytest.raises(ZooError, match=r"^bold.nii: a volume wants a parcellation or a mask"):
        read_one(file)
    with pytest.raises(ZooError, match=r"^bold.nii: .* wanted RepetitionTime or SamplingFrequency in bold.json"):
        read_one(file, parcellation=atlas)
    shifted = nibabel.Nifti1Image(labels(), np.eye(4))
    nibabel.save(shifted, tmp_path / "shifted.nii")
    with pytest.raises(ZooError, match=r"^shifted.nii: .* wanted the same grid"):
        read_one(file, parcellation=tmp_path / "shifted.nii")
    with pytest.raises(ZooError, match=r"^bold.nii: no voxel inside empty.nii"):
        read_one(file, mask=write(tmp_path / "empty.nii", np.zeros(SHAPE, np.int16)))
    with pytest.raises(ZooError, match=r"^atlas.nii: shape .* wanted \[x, y, z, time\]"):
        read_one(atlas, parcellation=atlas)


def test_sidecar_gives_the_repetition_time_and_wins_over_the_header(tmp_path):
    file, atlas = write(tmp_path / "bold.nii.gz", series(*SHAPE)), write(tmp_path / "atlas.nii", labels())
    (tmp_path / "bold.json").write_text(json.dumps({"RepetitionTime": 0.8}))
    assert read_one(file, parcellation=atlas).raw.info["sfreq"] == pytest.approx(1.25)


def test_a_folder_gives_volumes_with_time_only(tmp_path):
    write(tmp_path / "bold.nii", series(*SHAPE))
    write(tmp_path / "anatomy.nii", labels())
    assert [source.id for source in discover(tmp_path)] == ["bold"]


def test_mgh_vertices_and_annot_regions(tmp_path):
    signal = series(6)
    image = nibabel.MGHImage(signal.reshape(6, 1, 1, VOLUMES), np.eye(4))
    image.header["tr"] = 1400
    nibabel.save(image, tmp_path / "lh.mgz")
    reading = read_one(tmp_path / "lh.mgz")
    assert reading.kinds == ("vertex",) * 6
    assert reading.raw.info["sfreq"] == pytest.approx(1 / 1.4)
    np.testing.assert_allclose(reading.raw.get_data(), signal, rtol=1e-6)

    annot = tmp_path / "lh.annot"
    table = np.array([[0, 0, 0, 0, 0], [1, 0, 0, 0, 1], [2, 0, 0, 0, 2]])
    nibabel.freesurfer.write_annot(annot, np.array([0, 1, 1, 2, 2, 2]), table, [b"wall", b"V1", b"M1"], False)
    reading = read_one(tmp_path / "lh.mgz", parcellation=annot)
    assert reading.raw.ch_names == ["V1", "M1"]
    np.testing.assert_allclose(reading.raw.get_data()[0], signal[1:3].mean(axis=0), rtol=1e-5)


def test_mgh_volumes_are_no_surface(tmp_path):
    nibabel.save(nibabel.MGHImage(series(*SHAPE), np.eye(4)), tmp_path / "bold.mgz")
    with pytest.raises(ZooError, match=r"^bold.mgz: shape .* wanted a surface"):
        read_one(tmp_path / "bold.mgz")


def test_gifti_vertices_and_label_regions(tmp_path):
    signal = series(4)
    arrays = [nibabel.gifti.GiftiDataArray(column, meta={"TimeStep": "720"}) for column in signal.T]
    nibabel.save(nibabel.GiftiImage(darrays=arrays), tmp_path / "a.func.gii")
    reading = read_one(tmp_path / "a.func.gii")
    assert reading.raw.info["sfreq"] == pytest.approx(1 / 0.72)
    np.testing.assert_allclose(reading.raw.get_data(), signal, rtol=1e-6)

    table = nibabel.gifti.GiftiLabelTable()
    for key, name in ((0, "none"), (5, "hand")):
        label = nibabel.gifti.GiftiLabel(key)
        label.label = name
        table.labels.append(label)
    parcels = nibabel.gifti.GiftiDataArray(np.array([5, 0, 5, 0], np.int32), intent="NIFTI_INTENT_LABEL")
    nibabel.save(nibabel.GiftiImage(darrays=[parcels], labeltable=table), tmp_path / "a.label.gii")
    reading = read_one(tmp_path / "a.func.gii", parcellation=tmp_path / "a.label.gii")
    assert reading.raw.ch_names == ["hand"]
    np.testing.assert_allclose(reading.raw.get_data()[0], signal[[0, 2]].mean(axis=0), rtol=1e-5)


def cifti(path: Path, content: np.ndarray, *axes) -> Path:
    nibabel.save(nibabel.Cifti2Image(content, header=axes), path)
    return path


def test_cifti_points_parcels_and_labels(tmp_path):
    brain = nibabel.cifti2.BrainModelAxis
    left = brain.from_surface([0, 2, 3], 5, name="CORTEX_LEFT")
    inner = brain.from_mask(np.ones((1, 1, 2), bool), affine=AFFINE, name="THALAMUS_LEFT")
    time = nibabel.cifti2.SeriesAxis(0, 0.72, VOLUMES, "SECOND")
    signal = series(5)
    dense = cifti(tmp_path / "a.dtseries.nii", signal.T, time, left + inner)
    reading = read_one(dense)
    assert reading.kinds == ("vertex",) * 3 + ("voxel",) * 2
    assert reading.raw.ch_names[1:4] == ["CORTEX_LEFT-2", "CORTEX_LEFT-3", "THALAMUS_LEFT-0-0-0"]
    assert reading.raw.info["sfreq"] == pytest.approx(1 / 0.72)
    np.testing.assert_allclose(reading.raw.get_data(), signal, rtol=1e-6)

    # The label file knows the cortex only, and one vertex more of it.
    whole = brain.from_surface([0, 1, 2, 3], 5, name="CORTEX_LEFT")
    table = nibabel.cifti2.LabelAxis(["x"], {0: ("?", (0, 0, 0, 0)), 4: ("V1", (1, 0, 0, 1))})
    atlas = cifti(tmp_path / "a.dlabel.nii", np.array([[4, 4, 0, 4]], np.float32), table, whole)
    reading = read_one(dense, parcellation=atlas)
    assert reading.raw.ch_names == ["V1"]
    np.testing.assert_allclose(reading.raw.get_data()[0], signal[[0, 2]].mean(axis=0), rtol=1e-5)

    parcels = nibabel.cifti2.ParcelsAxis.from_brain_models([("V1", left[:2]), ("V2", left[2:])])
    reading = read_one(cifti(tmp_path / "a.ptseries.nii", signal[:2].T, time, parcels))
    assert reading.raw.ch_names == ["V1", "V2"]
    assert reading.kinds == ("roi", "roi")
