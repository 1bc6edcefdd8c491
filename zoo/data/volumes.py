"""fMRI files to time series of regions, vertices or voxels, through nibabel.

A parcellation gives the mean of each region; a label of 0 or less is background. A mask gives its voxels
one by one. Both together give the regions' means within the mask. Positions are in the file's own world
space (scanner or template, as its affine says), in metres.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.series import Series
from zoo.errors import ZooError


def read_nifti(path: Path, parcellation: Path | None, mask: Path | None) -> Series:
    """NIfTI [x, y, z, T] to regions or masked voxels. ZooError when neither is given or grids differ."""
    import nibabel
    from nibabel.affines import apply_affine

    chosen = parcellation or mask
    if chosen is None:
        raise ZooError(f"{path.name}: a volume wants a parcellation or a mask, and neither was given")
    image: Any = nibabel.load(path)
    if len(image.shape) != 4:
        raise ZooError(f"{path.name}: shape {image.shape}, wanted [x, y, z, time]")
    rate = _nifti_rate(image)
    inside = np.ones(image.shape[:3], bool) if mask is None else _grid(path, image, mask) > 0
    if parcellation is None:
        labels = None
    else:
        labels = np.where(inside, _grid(path, image, parcellation), 0)
        inside = labels > 0
    if not inside.any():
        raise ZooError(f"{path.name}: no voxel inside {chosen.name}")
    grid = np.argwhere(inside)
    position = apply_affine(image.affine, grid) / 1000
    signal = np.asanyarray(image.dataobj)[inside]
    if labels is None:
        names = tuple("voxel-" + "-".join(map(str, index)) for index in grid)
        return Series(signal, names, ("voxel",) * len(names), rate, position)
    ids = labels[inside]
    names = tuple(f"roi{label}" for label in np.unique(ids))
    return Series(region_means(signal, ids), names, ("roi",) * len(names), rate, region_means(position, ids))


def read_surface(path: Path, parcellation: Path | None) -> Series:
    """MGH or GIFTI series on one surface to its vertices, or to regions of a .annot, label GIFTI or MGH."""
    import nibabel

    image: Any = nibabel.load(path)
    if isinstance(image, nibabel.GiftiImage):
        signal = np.stack([array.data for array in image.darrays], axis=1)
        step = image.darrays[0].metadata.get("TimeStep") or image.meta.get("TimeStep")
        rate = 1000 / float(step) if step else None  # milliseconds
    else:
        # Old files fold more vertices than a short integer counts into the third dimension.
        if len(image.shape) != 4 or image.shape[1] != 1:
            raise ZooError(f"{path.name}: shape {image.shape}, wanted a surface [vertices, 1, 1, time]")
        signal = np.asanyarray(image.dataobj).reshape(-1, image.shape[3], order="F")
        milliseconds = float(image.header["tr"])
        rate = 1000 / milliseconds if milliseconds > 0 else None
    if parcellation is None:
        names = tuple(f"vertex{i}" for i in range(len(signal)))
        return Series(signal, names, ("vertex",) * len(names), rate)
    labels, label_names = _surface_labels(parcellation)
    if len(labels) != len(signal):
        raise ZooError(f"{parcellation.name}: {len(labels)} vertices, wanted the {len(signal)} of {path.name}")
    return _regions(path, signal, labels, label_names, rate)


def read_cifti(path: Path, parcellation: Path | None) -> Series:
    """CIFTI dtseries or ptseries to vertices and voxels, to its own parcels, or to those of a dlabel file."""
    import nibabel

    image: Any = nibabel.load(path)
    time, space = (image.header.get_axis(i) for i in (0, 1))
    if not isinstance(time, nibabel.cifti2.SeriesAxis) or time.unit != "SECOND":
        raise ZooError(f"{path.name}: not a CIFTI time series in seconds")
    signal, rate = np.asanyarray(image.dataobj).T, 1.0 / time.step if time.step else None
    if isinstance(space, nibabel.cifti2.ParcelsAxis):
        if parcellation is not None:
            raise ZooError(f"{path.name}: already parcels, so {parcellation.name} cannot apply")
        return Series(signal, tuple(space.name), ("roi",) * len(signal), rate)
    if parcellation is not None:
        labels, label_names = _cifti_labels(parcellation, space)
        return _regions(path, signal, labels, label_names, rate)
    on_surface = space.surface_mask
    index = [
        v if s else "-".join(map(str, ijk)) for s, v, ijk in zip(on_surface, space.vertex, space.voxel, strict=True)
    ]
    names = tuple(f"{part.removeprefix('CIFTI_STRUCTURE_')}-{i}" for part, i in zip(space.name, index, strict=True))
    return Series(signal, names, tuple("vertex" if s else "voxel" for s in on_surface), rate)


def has_time(path: Path) -> bool:
    """Whether a NIfTI or MGH file has a time axis; anatomies and masks have none."""
    import nibabel

    shape = nibabel.load(path).shape
    return len(shape) == 4 and shape[3] > 1


def region_means(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Means [R, T] of values [N, T] over the points of each of the R labels [N], in order of label."""
    import scipy.sparse

    where = np.unique(labels, return_inverse=True)[1]
    membership = scipy.sparse.csr_array((np.ones(len(where)), (where, np.arange(len(where)))))
    return (membership @ values) / np.bincount(where)[:, None]


def _regions(
    path: Path, signal: np.ndarray, labels: np.ndarray, label_names: dict[int, str], rate: float | None
) -> Series:
    inside = labels > 0
    if not inside.any():
        raise ZooError(f"{path.name}: the parcellation labels none of its points")
    names = tuple(label_names.get(int(label)) or f"roi{label}" for label in np.unique(labels[inside]))
    return Series(region_means(signal[inside], labels[inside]), names, ("roi",) * len(names), rate)


def _nifti_rate(image: Any) -> float | None:
    seconds = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6, "unknown": 1.0}
    step = float(image.header.get_zooms()[3]) * seconds.get(image.header.get_xyzt_units()[1], 0.0)
    return 1.0 / step if step > 0 else None


def _grid(path: Path, image: Any, labels: Path) -> np.ndarray:
    """The integer labels [x, y, z] of a mask or parcellation on the very grid of `image`."""
    import nibabel

    other: Any = nibabel.load(labels)
    if other.shape != image.shape[:3] or not np.allclose(other.affine, image.affine, atol=1e-3):
        raise ZooError(
            f"{labels.name}: shape {other.shape} or affine differs from {path.name} {image.shape[:3]}: "
            "wanted the same grid (resample it first)"
        )
    return np.rint(np.asanyarray(other.dataobj)).astype(int)


def _surface_labels(file: Path) -> tuple[np.ndarray, dict[int, str]]:
    """Integer label of each vertex and the labels' names."""
    import nibabel

    if file.suffix == ".annot":
        labels, _, names = nibabel.freesurfer.read_annot(file)
        return labels, {i: name.decode() for i, name in enumerate(names)}
    image: Any = nibabel.load(file)
    if isinstance(image, nibabel.GiftiImage):
        return image.darrays[0].data.astype(int), image.labeltable.get_labels_as_dict()
    return np.rint(np.asanyarray(image.dataobj)).astype(int).ravel(order="F"), {}


def _cifti_labels(file: Path, space: Any) -> tuple[np.ndarray, dict[int, str]]:
    """Label of each point of the brain-model axis `space` by a dlabel file; 0 where it says nothing."""
    import nibabel

    image: Any = nibabel.load(file)
    table, points = (image.header.get_axis(i) for i in (0, 1))
    if not isinstance(table, nibabel.cifti2.LabelAxis):
        raise ZooError(f"{file.name}: not a CIFTI label file, wanted a .dlabel.nii")
    values = np.rint(np.asanyarray(image.dataobj)[0]).astype(int)
    known = dict(zip(_cifti_points(points), values, strict=True))
    labels = np.array([known.get(point, 0) for point in _cifti_points(space)])
    return labels, {key: name for key, (name, _) in table.label[0].items()}


def _cifti_points(space: Any) -> list[tuple[Any, ...]]:
    return list(zip(space.name, space.vertex, map(tuple, space.voxel), strict=True))
