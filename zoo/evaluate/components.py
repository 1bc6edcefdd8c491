"""What the independent components of a recording are, by ICLabel.

    ica = mne.preprocessing.ICA(15, method="infomax", fit_params={"extended": True}).fit(raw)
    names, probabilities = label_components(raw, ica)
    ica.exclude = [each for each, name in enumerate(names) if name not in ("brain", "other")]

ICLabel was made for EEG in average reference, 1–100 Hz, and components of extended Infomax; a recording that is
otherwise gets a warning. Source of the features: Pion-Tonachini et al. 2019 and the package mne-icalabel
(BSD-3-Clause), which they equal; the spline is Sandwell's (1987, Geophysical Research Letters 14: 139–142).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from zoo.encoders.iclabel import BINS, CLASSES, PIXELS, ICLabel
from zoo.errors import ZooError

if TYPE_CHECKING:
    import mne

HEAD = 0.5
"""Radius of the head in a map, and what an electrode at the height of its widest circle lies at."""
SCALE = np.float32(0.99)
LINES_HZ = (50, 60)
NOTCH_DEPTH = 5.0
"""By how much both neighbours must exceed the spectrum at a line frequency for it to count as notched."""


class Features(NamedTuple):
    """ICLabel's inputs for N components, float32: maps [N, 32, 32], spectra and autocorrelations [N, 100]."""

    topography: np.ndarray
    spectrum: np.ndarray
    autocorrelation: np.ndarray


def label_components(inst: Any, ica: Any, variables: Any = None) -> tuple[list[str], np.ndarray]:
    """Most probable class of each component, and the probabilities [N, 7] of all of `zoo.encoders.iclabel.CLASSES`.

    inst: `mne.io.Raw` or `mne.Epochs`, filtered and referenced as the ICA's; ica: a fitted `mne.preprocessing.ICA`;
    variables: of the network, the published ones unless given. Errors as in `features`.
    """
    import jax

    given = features(inst, ica)
    if variables is None:
        import zoo

        _, variables = zoo.load("iclabel_base.pretrained")
    probabilities = np.asarray(jax.jit(ICLabel().apply)(variables, *given))
    return [CLASSES[each] for each in probabilities.argmax(1)], probabilities


def features(inst: Any, ica: Any, *, squeeze_again: bool = False) -> Features:
    """What ICLabel sees of each component of a fitted `mne.preprocessing.ICA` of a `mne.io.Raw` or `mne.Epochs`.

    squeeze_again: mne-icalabel shrinks the electrodes' radii into the head anew for every component. As long as none
    lies lower than .98 of the way down to the neck's pole that changes nothing. Where one does, its second and later
    maps are too small; True repeats that, bit for bit, and False shrinks all maps once.

    Raises ZooError: an ICA that is not fitted, or of other channels than the recording's; a channel that is not EEG or
    has no position; a rate below 100 Hz; less than a second of signal.
    """
    _check(inst, ica)
    weights = ica.unmixing_matrix_ @ ica.pca_components_[: ica.n_components_]
    sources = weights @ (inst.get_data(picks=ica.ch_names) * 1e6)
    sources = sources[None] if sources.ndim == 2 else sources
    long = not _is_epochs(inst) and inst.times.size / inst.info["sfreq"] > 5
    rate_hz = inst.info["sfreq"]
    return Features(
        SCALE * topographies(np.linalg.pinv(weights).T, _positions(inst, ica.ch_names), squeeze_again),
        SCALE * spectra(sources, rate_hz),
        SCALE * (stretch_autocorrelations if long else autocorrelations)(sources, rate_hz),
    )


def topographies(values: np.ndarray, positions: np.ndarray, squeeze_again: bool = False) -> np.ndarray:
    """Maps [N, 32, 32] float32 of the values [N, C] at electrodes [C, 3] (right, front, up): rows front, columns right.

    Each is 0 outside the head and its largest magnitude is 1.
    """
    right, front, up = positions.T
    radius = (np.pi / 2 - np.arctan2(up, np.hypot(right, front))) / np.pi
    angle = np.arctan2(right, front)
    maps = []
    for squeezed in range(len(values)):
        if squeezed == 0 or squeeze_again:
            edge = max(min(1.0, 1.02 * radius.max()), HEAD)
            radius = radius * (HEAD / edge)
            places = radius * np.exp(1j * angle)
            grid = [
                np.linspace(min(-HEAD, axis.min()), max(HEAD, axis.max()), PIXELS)
                for axis in (places.real, places.imag)
            ]
            # Rows of the spline's own picture are `imag`; the published one is its transpose, but for the mask.
            pixels = grid[0][:, None] + 1j * grid[1][None, :]
            outside = np.abs(grid[0][None, :] + 1j * grid[1][:, None]) > HEAD
        picture = spline(places, values[squeezed], pixels)
        picture[outside] = 0
        maps.append(picture / np.abs(picture).max())
    return np.array(maps, np.float32).reshape(-1, PIXELS, PIXELS)


def spline(places: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The biharmonic spline through the values [C] at places [C], at `wanted` [...]; the plane is that of complex
    numbers. Places that coincide share the mean of their values.
    """
    near = [np.spacing(np.ptp(axis) / 2) ** (1 / 3) for axis in (places.real, places.imag)]
    apart = places[:, None] - places
    same = (np.abs(apart.real) < near[0]) & (np.abs(apart.imag) < near[1])
    first = same.argmax(1)
    groups = same[np.unique(first)]
    share = groups / groups.sum(1, keepdims=True)
    places, values = share @ places, share @ values
    weights, *_ = np.linalg.lstsq(_green(np.abs(places[:, None] - places)), values, rcond=-1)
    return _green(np.abs(wanted[..., None] - places)) @ weights


def _green(distance: np.ndarray) -> np.ndarray:
    from scipy.special import xlogy

    return xlogy(distance**2, distance) - distance**2


def spectra(sources: np.ndarray, rate_hz: float) -> np.ndarray:
    """Spectra [N, 100] float32 of sources [E, N, T]: 1 to 100 Hz, the median over windows of a second in 20·log10 (as
    published), divided by the largest magnitude. Above half the rate the last value is repeated; a notch at 50 or 60 Hz
    is filled from its neighbours.
    """
    second = int(rate_hz)
    taper = np.hamming(second)
    bins = min(int(rate_hz / 2), BINS)
    windows = _windows(sources, second)
    power = np.abs(np.fft.fft(windows * taper, axis=-1)[..., 1 : bins + 1]) ** 2 * 2 / (rate_hz * np.sum(taper**2))
    if bins == int(rate_hz / 2):
        power[..., -1] /= 2
    level = 20 * np.log10(np.median(power, axis=1))
    level = np.pad(level, [(0, 0), (0, BINS - bins)], mode="edge")
    for line in LINES_HZ:
        around = level[:, [line - 2, line]]
        notched = (around - level[:, [line - 1]] > NOTCH_DEPTH).all(1)
        level[notched, line - 1] = around[notched].mean(1)
    return (level / np.abs(level).max(1, keepdims=True)).astype(np.float32)


def stretch_autocorrelations(sources: np.ndarray, rate_hz: float) -> np.ndarray:
    """Autocorrelations [N, 100] float32 of one long stretch [1, N, T]: windows of three seconds, each lag by its count
    of products; lags of 10 ms to 1 s.
    """
    samples = min(sources.shape[-1], int(rate_hz * 3))
    products = np.maximum(1, samples - np.arange(int(rate_hz) + 1))
    return _lags(_windows(sources, samples), rate_hz, products / samples)


def autocorrelations(sources: np.ndarray, rate_hz: float) -> np.ndarray:
    """The same of epochs, or of a stretch of up to five seconds, [E, N, T], each whole and every lag by that of 0."""
    return _lags(sources.transpose(1, 0, 2), rate_hz, np.ones(int(rate_hz) + 1))


def _lags(windows: np.ndarray, rate_hz: float, shares: np.ndarray) -> np.ndarray:
    """windows [N, W, T] → [N, 100]."""
    from scipy.signal import resample_poly

    size = 1 << (2 * windows.shape[-1] - 2).bit_length()
    power = np.mean(np.abs(np.fft.fft(windows, size, axis=-1)) ** 2, axis=1)
    lags = np.fft.ifft(power).real[:, : len(shares)]
    return resample_poly(lags / (lags[:, :1] * shares), 100, int(rate_hz), axis=1)[:, 1:].astype(np.float32)


def _windows(sources: np.ndarray, samples: int) -> np.ndarray:
    """[E, N, T] → [N, W, samples]: windows that overlap by half, within whole multiples of `samples`."""
    whole = sources.shape[-1] // samples * samples
    starts = np.ceil(np.arange(0, whole - samples / 2, samples / 2)).astype(int)
    cut = sources[..., starts[:, None] + np.arange(samples)]
    return cut.transpose(1, 0, 2, 3).reshape(sources.shape[1], -1, samples)


def _positions(inst: mne.io.BaseRaw, names: list[str]) -> np.ndarray:
    """[C, 3] in the head's frame."""
    index = {name: number for number, name in enumerate(inst.ch_names)}
    places = np.array([inst.info["chs"][index[name]]["loc"][:3] for name in names])
    for name, place in zip(names, places, strict=True):
        if not np.isfinite(place).all() or not place.any():
            raise ZooError(f"ICLabel: channel {name} has no position; wanted one of every channel (set_montage)")
    return places


def _is_epochs(inst: Any) -> bool:
    import mne

    return isinstance(inst, mne.BaseEpochs)


def _check(inst: Any, ica: Any) -> None:
    if not hasattr(ica, "unmixing_matrix_"):
        raise ZooError("ICLabel: the ICA is not fitted")
    if missing := [name for name in ica.ch_names if name not in inst.ch_names]:
        raise ZooError(f"ICLabel: the recording lacks {', '.join(missing)}, channels of the ICA")
    kinds = dict(zip(inst.ch_names, inst.get_channel_types(), strict=True))
    if other := [name for name in ica.ch_names if kinds[name] != "eeg"]:
        raise ZooError(f"ICLabel: {other[0]} is {kinds[other[0]]}, wanted EEG")
    rate_hz = inst.info["sfreq"]
    if rate_hz < 100:
        raise ZooError(f"ICLabel: got a signal at {rate_hz:g} Hz, wanted 100 Hz or more")
    if inst.times.size < rate_hz:
        raise ZooError(f"ICLabel: got {inst.times.size / rate_hz:.2f} s of signal, wanted a second or more")
    found = []
    if not inst.info["custom_ref_applied"] and not any(
        each["active"] and "average" in each["desc"].lower() for each in inst.info["projs"]
    ):
        found.append("is not in average reference")
    if (inst.info["highpass"], inst.info["lowpass"]) != (1, 100):
        found.append(f"has a band of {inst.info['highpass']:g} to {inst.info['lowpass']:g} Hz, not of 1 to 100 Hz")
    if ica.method not in ("infomax", "picard") or not ica.fit_params.get("extended"):
        found.append(f"was decomposed by {ica.method}, not by extended Infomax")
    if found:
        warnings.warn(f"ICLabel was not made for this: the recording {'; '.join(found)}", stacklevel=3)
